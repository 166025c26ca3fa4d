"""Training steps: where their time goes, and how many a second against two other loops.

    python -m benchmarks.bench_step [--rounds 7] [--samples 24576] [--photos 96] [--save]

About 7 minutes of 2 CPU cores. One student (kdcache:small), one teacher (four of it: four times its
forward pass) and one set of images for all: Fashion-MNIST at 28 px, and photos as JPEG files at 224
px and at 64 px, where decoding takes more than both networks. "plain loop" and "torchdistill" are
rivals.py and rival_torchdistill.py, with the number of DataLoader workers that served the plain
loop best just before (lines "workers"). All take random crops, flips and mixtures of the same
images, and make the same steps: AdamW, cosine, clipping at 1.0. Online does what the plain loop
does, with a cheaper way to the images: the more of the time the networks take, as with photos, the
nearer the two must come to each other.

The bars: cached is worth at least 0.97 of training from labels and 2 plain loops, online 1.2 plain
loops. On a GPU also: the device waits for data or targets under 3 % of the time.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import breakdown, harness, rivals
from benchmarks.step_cases import Case, fashion, photos
from kdcache.batch import TargetSource
from kdcache.cache.cache import LogitCache
from kdcache.cache.codecs import Dense
from kdcache.data.loader import Loader
from kdcache.models.classifier import Classifier
from kdcache.teacher import targets
from kdcache.teacher.precompute import make_cache_spec, precompute
from kdcache.training.loop import train
from kdcache.training.run import TrainingRun
from kdcache.training.spec import Mode, TrainSpec

WAIT_BAR = 3.0  # % of the step, on a GPU
BARS = (
    ("train, cached", "train, labels", 0.97),
    ("train, cached", "plain loop", 2.0),
    ("train, online", "plain loop", 1.2),
    ("train, cached", "torchdistill", None),
    ("train, online", "torchdistill", None),
    ("train, cached", "train, online", 1.0),
    ("precompute", "teacher, forward", 0.9),
    ("student, forward", "teacher, forward", None),
)
Line = dict[str, Any]


def training(case: Case, mode: Mode, source: TargetSource) -> Callable[[], int]:
    """One run of a fresh student."""
    spec = TrainSpec(
        mode,
        case.view,
        case.epochs,
        case.batch_size,
        lr=rivals.LR,
        weight_decay=rivals.WEIGHT_DECAY,
        temperature=rivals.TEMPERATURE,
        num_views=case.epochs,
    )

    def run() -> int:
        train(TrainingRun(spec, case.data, case.student(), source))
        return case.images

    return run


def sources(case: Case, teacher: Classifier, cache: LogitCache) -> dict[Mode, TargetSource]:
    return {
        "labels": targets.LabelTargets(len(case.data.class_names)),
        "cached": targets.CachedTargets(cache, case.data.content_hash, case.view),
        "online": targets.OnlineTargets(teacher),
    }


def record(case: Case, teacher: Classifier, path: Path) -> LogitCache:
    spec = make_cache_spec(case.data, teacher, case.view, Dense(), num_views=case.epochs)
    return precompute(case.data, teacher, spec, path, batch_size=case.batch_size)


def recording(case: Case, teacher: Classifier, folder: Path) -> Callable[[], int]:
    numbers = itertools.count()

    def run() -> int:
        record(case, teacher, folder / f"{next(numbers)}.zarr")
        return case.epochs * len(case.data)

    return run


def forward(case: Case, network: Classifier) -> Callable[[], int]:
    """The network alone, over batches that lie ready in memory."""
    with Loader(case.data, case.view, case.batch_size, device=case.device) as loader:
        ready = [batch.images_BCHW.clone() for batch in loader.batches(0)]
    network.eval()

    def run() -> int:
        with torch.inference_mode():
            for images in ready:
                logits = network(images)
            logits.sum().item()
        return len(case.data)

    return run


def worker_counts() -> list[int]:
    """1, 2, 4 ... cores of this machine."""
    cores = len(os.sched_getaffinity(0))
    return sorted({*(1 << i for i in range(cores.bit_length())), cores})


def rivals_of(case: Case, workers: int) -> dict[str, Callable[[], int]]:
    runs = {"plain loop": rivals.plain(case, workers)}
    if importlib.util.find_spec("torchdistill"):
        from benchmarks.rival_torchdistill import torchdistill

        runs["torchdistill"] = torchdistill(case, workers)
    else:
        print("torchdistill is left out: pip install 'kdcache[rivals]'")
    return runs


def ratios(group: str, samples: dict[str, harness.Samples]) -> list[Line]:
    lines = []
    for ours, other, bar in BARS:
        if other in samples:
            value = harness.ratio(samples, ours, other)
            line: Line = {"group": group, "case": f"{ours} / {other}", "ratio": value}
            lines.append(line if bar is None else line | {"bar": bar, "met": value >= bar})
    return lines


def parts(
    case: Case, found: dict[Mode, TargetSource], samples: dict[str, harness.Samples]
) -> list[Line]:
    """The breakdown of each mode, beside what a step took without the profiler."""
    lines = []
    for mode, source in found.items():
        cache = source if isinstance(source, targets.CachedTargets) else None
        result = breakdown.measure(training(case, mode, source), case.device, cache)
        plain_ms = 1e3 * case.batch_size / samples[f"train, {mode}"].quantiles()["p50"]
        for unit in ("ms", "% of the step"):
            line: Line = {"group": case.name, "mode": mode, **result.line(unit)}
            line["not profiled"] = plain_ms if unit == "ms" else 100 * plain_ms / result.step_ms
            if unit != "ms" and case.device.type == "cuda":
                line |= {"bar": WAIT_BAR, "met": line["wait"] < WAIT_BAR}
            lines.append(line)
    return lines


def measure(case: Case, rounds: int, save: bool) -> None:
    teacher = case.teacher()
    rates = rivals.rates_by_workers(case, worker_counts())
    tried = [{"group": case.name, "workers": w, "plain loop": rate} for w, rate in rates.items()]
    harness.report("step", "DataLoader workers: images/s of the plain loop", tried, save)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found = sources(case, teacher, record(case, teacher, folder / "cache.zarr"))
        contestants = {
            **{f"train, {mode}": training(case, mode, source) for mode, source in found.items()},
            **rivals_of(case, max(rates, key=lambda workers: rates[workers])),
            "precompute": recording(case, teacher, folder),
            "teacher, forward": forward(case, teacher),
            "student, forward": forward(case, case.student()),
        }
        samples = harness.interleave(contestants, rounds)
        lines = [{"group": case.name, "case": name, **s.quantiles()} for name, s in samples.items()]
        harness.report("step", f"{case.name}: images/s ({rounds} rounds)", lines, save)
        harness.report("step", "ratios of rates in one round", ratios(case.name, samples), save)
        harness.report("step", "one step", parts(case, found, samples), save)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--samples", type=int, default=24_576, help="of Fashion-MNIST; 0: none")
    parser.add_argument("--photos", type=int, default=96, help="0: none")
    parser.add_argument("--photo-px", type=int, nargs="+", default=[224, 64])
    parser.add_argument("--save", action="store_true", help="keep the result lines")
    args = parser.parse_args()
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # the profiler tells of every start and stop
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.save:
        harness.start_results("step")
    if args.samples:
        with fashion(args.samples, device) as case:
            measure(case, args.rounds, args.save)
    for side_px in args.photo_px if args.photos else ():
        with photos(args.photos, side_px, 2, device) as case:
            measure(case, args.rounds, args.save)


if __name__ == "__main__":
    main()
