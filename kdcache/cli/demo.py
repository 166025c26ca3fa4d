"""The whole job on Fashion-MNIST: the commands that a user would type, a table, a picture.

In: an empty folder. Out: two .beton files, a teacher, a cache, three students trained on the same
views from labels, from the live teacher and from the cache, table.json and views.png.
"""

from __future__ import annotations

import json
import shlex
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from kdcache.cache.cache import LogitCache
from kdcache.cli import plots
from kdcache.data import beton
from kdcache.errors import UsageError
from kdcache.evaluation import evaluate
from kdcache.models import load
from kdcache.models.run_json import read_run_json
from kdcache.training.spec import TrainSpec

MARK = ".kdcache-demo"
VIEW = ["--min-scale", "0.3", "--mixup", "1"]
STUDENTS = ("labels", "online", "cached")
PICTURE_SAMPLES = 5


def run(
    folder: Path, epochs: int, command: Callable[[list[str]], object], console: Console
) -> None:
    """Do it all in `folder`, which is emptied first if an earlier demo made it."""
    start = time.perf_counter()
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file: choose another --out")
    if folder.exists() and any(folder.iterdir()):
        if not (folder / MARK).exists():
            raise UsageError(f"{folder} exists and no demo made it: choose another --out")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARK).touch()
    names = ("train.beton", "test.beton", "teacher", "cache.zarr")
    at = {name: str(folder / name) for name in names}

    def step(title: str, *line: str) -> None:
        console.rule(f"[bold]{title}", align="left")
        console.print("$ kdcache " + shlex.join(line), style="cyan", markup=False, soft_wrap=True)
        command(list(line))

    train = ["--data", at["train.beton"], "--val", at["test.beton"], "--epochs", str(epochs)]
    step("60,000 images for training", "convert", "fashion-mnist", at["train.beton"])
    step("10,000 for testing", "convert", "fashion-mnist", at["test.beton"], "--split", "test")
    step(
        "A teacher, from labels",
        "train",
        "--mode",
        "labels",
        "--student",
        "kdcache:medium",
        "--out",
        at["teacher"],
        *train,
        "--min-scale",
        "0.5",
        "--mixup",
        "0",
    )
    step(
        "Its answers to every view, on cache",
        "precompute",
        "--data",
        at["train.beton"],
        "--teacher",
        at["teacher"],
        "--out",
        at["cache.zarr"],
        "--views",
        str(epochs),
        *VIEW,
    )
    step("What is on the cache", "inspect", at["cache.zarr"])
    sources = {
        "labels": VIEW,
        "online": ["--teacher", at["teacher"], *VIEW],
        "cached": ["--cache", at["cache.zarr"]],
    }
    for mode in STUDENTS:
        step(
            f"The same student on the same views, {mode}",
            "train",
            "--mode",
            mode,
            "--student",
            "kdcache:small",
            "--out",
            str(folder / mode),
            *train,
            *sources[mode],
        )
    rows = [_measure(folder, name, at["test.beton"], at["teacher"]) for name in STUDENTS]
    rows.append(_measure(folder, "teacher", at["test.beton"], at["teacher"]))
    (folder / "table.json").write_text(json.dumps(rows, indent=2) + "\n")
    console.rule("[bold]Result", align="left")
    console.print(_table(rows))
    drawing = folder / "views.png"
    data = beton.open_dataset(Path(at["train.beton"]))
    first = [int(np.argmax(data.labels == c)) for c in range(PICTURE_SAMPLES)]
    plots.draw_views(
        LogitCache.open(at["cache.zarr"]),
        data,
        drawing,
        samples=first,
        views=list(range(min(3, epochs))),
    )
    minutes, seconds = divmod(round(time.perf_counter() - start), 60)
    console.print(f"picture {drawing}, in all {minutes} min {seconds} s", soft_wrap=True)


def _measure(folder: Path, name: str, test: str, teacher: str) -> dict[str, Any]:
    record = read_run_json(folder / name)
    spec = TrainSpec.from_json(record["spec"])
    size_px, data = spec.view_spec.size_px, beton.open_dataset(Path(test))
    options: Any = {"num_classes": len(data.class_names), "size_px": size_px}
    network = load.load_model(str(folder / name), "teacher", **options)
    judge = load.load_model(teacher, "teacher", **options)
    result = evaluate.evaluate(network, data, size_px=size_px, teacher=judge)
    images = spec.epochs * (record["num_samples"] // spec.batch_size) * spec.batch_size
    return {
        "name": name,
        "model": record["student"],
        "top1": result.top1,
        "agreement": result.agreement,
        "kl": result.kl,
        "images_per_s": images / record["seconds"],
        "seconds": record["seconds"],
    }


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table()
    table.add_column("targets")
    for heading in ("network", "accuracy", "agreement", "KL", "images/s", "seconds"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row["name"],
            row["model"].removeprefix("kdcache:"),
            f"{row['top1']:.2%}",
            f"{row['agreement']:.2%}",
            f"{row['kl']:.4f}",
            f"{row['images_per_s']:,.0f}",
            f"{row['seconds']:.0f}",
        )
    return table
