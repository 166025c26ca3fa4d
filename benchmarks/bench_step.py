"""Images a second of training from labels, from the tape and online, and of precompute.

    python -m benchmarks.bench_step [--rounds 5] [--samples 60000] [--save]

One student (kdcache:small), one teacher (kdcache:medium, with fresh weights: its speed is the
same), one loader, Fashion-MNIST with mixing. Precompute is measured against the bare teacher's
forward pass over batches that lie ready in memory.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness
from kdcache import dataset as datasets
from kdcache import models, targets
from kdcache.dataset import Dataset
from kdcache.loader import Loader
from kdcache.models import Classifier
from kdcache.precompute import precompute, tape_spec
from kdcache.records import TargetSource
from kdcache.sources import Source, open_source
from kdcache.spec import ViewSpec
from kdcache.train import TrainSpec, train

BATCH = 256
VIEW = ViewSpec(28, min_area=0.3, mixup=1.0)


def training(data: Dataset, source: Callable[[], TargetSource], device: str) -> Callable[[], int]:
    """One epoch of a fresh student."""

    def run() -> int:
        spec = TrainSpec(mode="labels", view=VIEW, epochs=1, batch_size=BATCH, views=1)
        torch.manual_seed(0)
        student = models.load("kdcache:small", "student", num_classes=10, size_px=28, device=device)
        train(spec, data, student, source())
        return len(data) // BATCH * BATCH

    return run


def recording(data: Dataset, teacher: Classifier, folder: Path) -> Callable[[], int]:
    numbers = itertools.count()
    spec = tape_spec(data, teacher, VIEW, views=1, top_k=None, dtype="float16")

    def run() -> int:
        precompute(data, teacher, spec, folder / f"{next(numbers)}.zarr", batch_size=BATCH)
        return len(data)

    return run


def bare_teacher(data: Dataset, teacher: Classifier, device: str) -> Callable[[], int]:
    with Loader(data, VIEW, BATCH, device=device) as loader:
        ready = [batch.images_BCHW.clone() for batch in loader.batches(0)]

    def run() -> int:
        with torch.inference_mode():
            for images in ready:
                logits = teacher(images)
            logits.sum().item()
        return len(data)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=60_000)
    parser.add_argument("--save", action="store_true", help="keep the result lines")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.save:
        harness.start_results("step")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        whole = open_source("fashion-mnist", "train")
        part = Source(whole.classes, whole.images[: args.samples], whole.labels[: args.samples])
        data, _ = datasets.convert(part, folder / "data.beton")
        fresh = models.load("kdcache:medium", "student", num_classes=10, size_px=28, device=device)
        teacher = fresh.eval().requires_grad_(False)
        spec = tape_spec(data, teacher, VIEW, views=1, top_k=None, dtype="float16")
        tape = precompute(data, teacher, spec, folder / "tape.zarr", batch_size=BATCH)

        def cached() -> TargetSource:
            return targets.CachedTargets(tape, data.fingerprint, VIEW)

        contestants = {
            "train, labels": training(data, lambda: targets.LabelTargets(10), device),
            "train, cached": training(data, cached, device),
            "train, online": training(data, lambda: targets.OnlineTargets(teacher), device),
            "precompute": recording(data, teacher, folder),
            "teacher, bare": bare_teacher(data, teacher, device),
        }
        samples = harness.interleave(contestants, args.rounds)
        lines: list[dict[str, Any]] = [
            {"case": name, **found.quantiles()} for name, found in samples.items()
        ]
        for ours, other, bar in (
            ("train, cached", "train, labels", 0.95),
            ("train, cached", "train, online", 1.0),
            ("precompute", "teacher, bare", 0.90),
        ):
            value = harness.ratio(samples, ours, other)
            lines.append({"case": f"{ours} / {other}", "ratio": value, "bar": bar,
                          "met": value >= bar})  # fmt: skip
        harness.report("step", f"images/s ({args.rounds} rounds)", lines, args.save)


if __name__ == "__main__":
    main()
