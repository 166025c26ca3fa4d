"""`kdcache demo`: the whole job on Fashion-MNIST, by the commands that a user would type.

In: an empty folder. Out: two .beton files, a teacher, a cache, three students trained on the same
views from labels, from the online teacher and from the cache, table.json and views.png.
"""

from __future__ import annotations

import json
import shlex
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from kdcache.cli.output import format_table, out_console, show_lines
from kdcache.errors import UsageError
from kdcache.options import option

MARK = ".kdcache-demo"
VIEW = ["--min-scale", "0.3", "--mixup", "1"]
STUDENTS = ("labels", "online", "cached")
PICTURE_SAMPLES = 5


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    out: Path = option(
        Path("demo"), help="Folder for everything that the demo makes.", metavar="DIR"
    )
    epochs: int = option(3, help="Epochs of every training.", metavar="N", at_least=1)


def demo(context: typer.Context, options: DemoOptions) -> None:
    """Run the whole path on Fashion-MNIST: convert, teacher, cache, three students, one table."""
    root: Any = context.find_root().command
    run(options.out, options.epochs, lambda line: root.main(line, standalone_mode=False))


def run(folder: Path, epochs: int, command: Callable[[list[str]], object]) -> None:
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
        out_console().rule(f"[bold]{title}", align="left")
        out_console().print(
            "$ kdcache " + shlex.join(line), style="cyan", markup=False, soft_wrap=True
        )
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
        "Its logits for every view, in a cache",
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
    step("What the cache holds", "inspect", at["cache.zarr"])
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
    out_console().rule("[bold]Result", align="left")
    show_lines(_table(rows))
    drawing = folder / "views.png"
    _draw(at["cache.zarr"], at["train.beton"], drawing, min(3, epochs))
    minutes, seconds = divmod(round(time.perf_counter() - start), 60)
    show_lines([f"picture {drawing}, in all {minutes} min {seconds} s"])


def _draw(cache: str, data: str, out: Path, num_views: int) -> None:
    """Views of the first sample of some classes."""
    from kdcache.cache.cache import LogitCache
    from kdcache.cli import plots
    from kdcache.data.beton import open_dataset

    dataset = open_dataset(data)
    labels = dataset.labels.tolist()
    samples = [labels.index(c) for c in range(PICTURE_SAMPLES)]
    views = list(range(num_views))
    plots.draw_views(LogitCache.open(cache), dataset, out, samples=samples, views=views)


def _measure(folder: Path, name: str, test: str, teacher: str) -> dict[str, Any]:
    from kdcache.evaluation.evaluate import evaluate
    from kdcache.evaluation.load import load_evaluation_run
    from kdcache.evaluation.options import EvaluateOptions
    from kdcache.models.run_json import read_run_json
    from kdcache.training.spec import TrainSpec

    record = read_run_json(folder / name)
    spec = TrainSpec.from_json(record["spec"])
    run = load_evaluation_run(
        EvaluateOptions(model=str(folder / name), data=Path(test), teachers=(teacher,))
    )
    result = evaluate(run.model, run.dataset, size_px=run.size_px, teacher=run.teacher)
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


def _table(rows: list[dict[str, Any]]) -> list[str]:
    lines = [["targets", "network", "accuracy", "agreement", "KL", "images/s", "seconds"]]
    for row in rows:
        lines.append(
            [
                row["name"],
                row["model"].removeprefix("kdcache:"),
                f"{row['top1']:.2%}",
                f"{row['agreement']:.2%}",
                f"{row['kl']:.4f}",
                f"{row['images_per_s']:,.0f}",
                f"{row['seconds']:.0f}",
            ]
        )
    return format_table(lines)
