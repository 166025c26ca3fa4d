"""Memory of precompute: what the process has of its own while it records many samples.

    python -m benchmarks.bench_memory [--samples 1281167] [--save]

A data set as large as ImageNet, of 8 px images, and a teacher of one linear layer with 1000
classes, so that little but the records takes memory; k = 10, uint8, batches of 1,024, on the CPU.
Each contestant runs precompute in a process of its own:

in place   kdcache: the arrays of a shard are allocated once, and each batch is copied into them
list       each batch's small arrays are kept in a list and concatenated when the shard is whole

The memory is RssAnon of /proc/self/status after each batch, in MB: at the start of recording, in
the middle of the first shard, and the largest after that. growth_mb is the largest less the middle.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import nn

from benchmarks import harness
from kdcache.cache.cache import LogitCache
from kdcache.cache.codecs import TopK
from kdcache.cache.records import Records
from kdcache.data.beton import open_dataset
from kdcache.data.convert import convert
from kdcache.data.sources import Source
from kdcache.models.classifier import Classifier
from kdcache.teacher import precompute
from kdcache.views.spec import ViewSpec

SAMPLES, CLASSES, SIZE_PX, K, BATCH = 1_281_167, 1000, 8, 10, 1024
DISTINCT = 1024  # images, which repeat
MOST_GROWTH_MB = 150.0
CASES = ("in place", "list")
RECORD = "import sys; from benchmarks import bench_memory as b; b.record(*sys.argv[1:])"


class RecordsList:
    """The alternative to `RecordsBuffer`, with its methods."""

    def __init__(self, num_rows: int) -> None:
        self.batches: list[Records] = []

    def append(self, batch: Records) -> None:
        self.batches.append(batch)

    def records(self) -> Records:
        return Records.concatenate(self.batches)


def make_dataset(path: Path, num_samples: int) -> None:
    random = np.random.default_rng(0)
    images = list(random.integers(0, 256, (DISTINCT, SIZE_PX, SIZE_PX, 3), np.uint8))
    names = tuple(f"class {i:04}" for i in range(CLASSES))
    labels = [i % CLASSES for i in range(num_samples)]
    convert(Source(names, [images[i % DISTINCT] for i in range(num_samples)], labels), path)


def make_teacher() -> Classifier:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE_PX**2, CLASSES))
    teacher = Classifier(network, "linear", (0.5,) * 3, (0.25,) * 3)
    teacher.num_classes = CLASSES
    return teacher.eval().requires_grad_(False)


def own_mb() -> float:
    """Anonymous memory of this process, in MB; the mapped data set is no part of it."""
    status = Path("/proc/self/status").read_text().splitlines()
    (line,) = (x for x in status if x.startswith("RssAnon"))
    return int(line.split()[1]) * 1024 / 1e6


def record(case: str, data: str, out: str) -> None:
    """In a process of its own: precompute, and print a JSON object of the memory."""
    dataset, teacher = open_dataset(data), make_teacher()
    view_spec = ViewSpec(SIZE_PX, min_scale=0.3, mixup=0.0)
    spec = precompute.make_cache_spec(dataset, teacher, view_spec, TopK(K, "uint8"))
    used: list[tuple[int, float]] = []

    def progress(rows: int) -> None:
        used.append((rows, own_mb()))

    start = time.perf_counter()
    with mock.patch.object(
        precompute, "RecordsBuffer", RecordsList if case == "list" else precompute.RecordsBuffer
    ):
        cache = precompute.precompute(
            dataset, teacher, spec, out, batch_size=BATCH, progress=progress
        )
    rate = len(dataset) / (time.perf_counter() - start)
    print(json.dumps({**_summary(used, cache), "records_per_s": rate}))


def _summary(used: list[tuple[int, float]], cache: LogitCache) -> dict[str, float]:
    later = [mb for rows, mb in used if rows >= cache.num_rows(0) // 2]
    return {
        "start_mb": used[0][1],
        "middle_mb": later[0],
        "peak_mb": max(later),
        "growth_mb": max(later) - later[0],
    }


def measure(folder: Path, num_samples: int) -> list[dict[str, Any]]:
    data = folder / "data.beton"
    start = time.perf_counter()
    make_dataset(data, num_samples)
    print(f"{num_samples} images converted in {time.perf_counter() - start:.0f} s", flush=True)
    lines = []
    for case in CASES:
        out = str(folder / case.replace(" ", "-"))
        done = subprocess.run(
            [sys.executable, "-c", RECORD, case, str(data), out],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            cwd=Path(__file__).parents[1],
        )
        lines.append({"case": case, "samples": num_samples, **json.loads(done.stdout)})
        print(lines[-1], flush=True)
    ours, other = (line["growth_mb"] for line in lines)
    lines[0] |= {"bar": MOST_GROWTH_MB, "met": ours < MOST_GROWTH_MB}
    return [*lines, {"case": "growth, list / in place", "ratio": other / ours, "unit": "times"}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--save", action="store_true", help="keep the result lines")
    args = parser.parse_args()
    if args.save:
        harness.start_results("memory")
    with tempfile.TemporaryDirectory() as name:
        lines = measure(Path(name), args.samples)
    harness.report("memory", "memory of precompute", lines, args.save)


if __name__ == "__main__":
    main()
