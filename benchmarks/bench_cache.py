"""The cache at work: views streamed, memory as it grows, what training waits, what writing costs.

    python -m benchmarks.bench_cache [--rounds 5] [--save]

stream   records of a cache of C = 1000, k = 10 (1 million views, page cache warm) to targets, as
         training reads them: sealed, decoded, one shard read ahead. Beside it the same arrays by
         plain Zarr, unsealed and not made targets, and TinyViT's layout record by record, as its
         reader seeks and reads, with the tail spread over a dense row.
memory   peak resident memory of a process that streams caches of 10^5, 10^6 and 10^7 views, above
         that of one that has opened a cache and read nothing.
wait     one epoch of a student (kdcache:small) from a cache in training: the share of its time in
         which it waits for a shard, and that of all that the cache costs it.
write    precompute by a small teacher (kdcache:medium, 1000 classes, k = 10) with and without
         storing what it says (compressed, sealed and fsynced in a thread beside the teacher), and
         without even encoding it.
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import zarr

from benchmarks import harness
from benchmarks.layouts import TinyViT
from kdcache.batch import Batch, Target, TemperedTarget
from kdcache.cache.cache import LogitCache
from kdcache.cache.codecs import Rows, TopK, ValueType
from kdcache.cache.records import Records
from kdcache.cache.spec import CacheSpec
from kdcache.data.beton import Dataset
from kdcache.data.convert import convert
from kdcache.data.sources import Source, open_source
from kdcache.models import load
from kdcache.teacher import precompute, targets
from kdcache.training.loop import train
from kdcache.training.spec import TrainSpec
from kdcache.views.spec import ViewSpec

CLASSES, K, BATCH = 1000, 10, 256
VIEW = ViewSpec(28, min_scale=0.3, mixup=1.0)
DISTINCT = 65_536  # records are made once and written again and again
TINYVIT_ROWS = 20_000
STREAM_ROWS = 8192  # made targets at a time
CACHE_BARS = {"stream": 3e6, "wait": 0.01, "write": 0.03}


def logits(rows: int, num_classes: int) -> torch.Tensor:
    """Like a classifier's: a few classes stand out, and which ones go together."""
    g = torch.Generator().manual_seed(0)
    factors = torch.randn(rows, 32, generator=g)
    return factors @ torch.randn(32, num_classes, generator=g) * 0.5


def make_cache(path: Path, rows: int, dtype: ValueType) -> LogitCache:
    codec = TopK(K, dtype)
    spec = CacheSpec(1, rows, CLASSES, codec, "0" * 16, "0" * 16, VIEW)
    cache = LogitCache.create(path, spec, {"teacher": "synthetic"})
    some = codec.encode(logits(DISTINCT, CLASSES))
    for view, shard in cache.missing():
        count = cache.num_rows(shard)
        cache.write(view, shard, Records.concatenate([some] * (count // DISTINCT + 1))[:count])
    return cache


def stream(cache: LogitCache) -> int:
    """Every record as part of a target, a shard read ahead: one core reads, the other decodes."""
    torch.set_num_threads(1)
    rows = 0
    with ThreadPoolExecutor(1) as reader:
        ahead = None
        for place in [*cache.shards(), None]:
            future = reader.submit(cache.read_shard, *place) if place else None
            if ahead is not None:
                records = ahead.result()
                for first in range(0, len(records), STREAM_ROWS):
                    target = cache.decode(records[first : first + STREAM_ROWS])
                    assert isinstance(target, Target)
                    rows += len(target.logits_BK)
            ahead = future
    return rows


def plain_zarr(cache: LogitCache) -> int:
    group = zarr.open_group(cache.url, mode="r")
    names = ("logits", "classes", "tail")
    rows = cache.manifest.layout.shard_rows
    for start in range(0, cache.spec.num_samples, rows):
        for name in names:
            array = group[name]
            assert isinstance(array, zarr.Array)
            np.asarray(array[0, start : start + rows])
    return cache.spec.num_samples


def tinyvit(path: Path, rows: int) -> Callable[[], int]:
    """Seek and read a record at a time, then a dense row with an even tail."""
    layout = TinyViT()
    packed = layout.pack(logits(rows, CLASSES), K)
    path.write_bytes(packed.tobytes())
    size = packed.shape[1]

    def run() -> int:
        with path.open("rb") as file:
            for start in range(0, rows, BATCH):
                batch = []
                for row in range(start, min(start + BATCH, rows)):
                    file.seek(row * size)
                    batch.append(np.frombuffer(file.read(size), np.uint8))
                named = layout.unpack(np.stack(batch), K, CLASSES)
                p = named.log_p_BK.exp()
                even = (1 - p.sum(1, keepdim=True)) / (CLASSES - K)
                even.expand(-1, CLASSES).scatter(1, named.class_ids_BK, p)
        return rows

    return run


def bench_stream(folder: Path, rounds: int) -> list[dict[str, Any]]:
    rows = 1_000_000
    dtypes: tuple[ValueType, ...] = ("uint8", "float16")
    caches = {dtype: make_cache(folder / dtype, rows, dtype) for dtype in dtypes}
    contestants: dict[str, Callable[[], int]] = {
        f"stream: kdcache, {dtype}": partial(stream, cache) for dtype, cache in caches.items()
    }
    contestants["stream: plain Zarr, uint8"] = lambda: plain_zarr(caches["uint8"])
    contestants["stream: TinyViT's layout"] = tinyvit(folder / "v.bin", TINYVIT_ROWS)
    samples = harness.interleave(contestants, rounds)
    lines: list[dict[str, Any]] = [
        {"case": name, **found.quantiles()} for name, found in samples.items()
    ]
    for dtype, cache in caches.items():
        p50 = samples[f"stream: kdcache, {dtype}"].quantiles()["p50"]
        lines.append(
            {
                "case": f"views/s, {dtype}",
                "ratio": p50 / 1e6,
                "unit": "million",
                "bar": 3,
                "met": bool(p50 >= CACHE_BARS["stream"]),
            }
        )
        lines.append(
            {
                "case": f"bytes a view on disk, {dtype}",
                "ratio": cache.stored_bytes() / rows,
                "unit": "bytes",
            }
        )
    for other in ("plain Zarr, uint8", "TinyViT's layout"):
        value = harness.ratio(samples, "stream: kdcache, uint8", f"stream: {other}")
        lines.append({"case": f"kdcache, uint8 / {other}", "ratio": value, "unit": "times"})
    return lines


READ = """
import sys
from benchmarks.bench_cache import peak_bytes, stream
from kdcache.cache.cache import Cache
cache = Cache.open(sys.argv[1])
if sys.argv[2] == "all":
    stream(cache)
print(peak_bytes())
"""


def peak_bytes() -> int:
    """Of this process's memory map: getrusage's figure is also that of who started it."""
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x)
    return int(line.split()[1]) * 1024


def bench_memory(folder: Path, rounds: int) -> list[dict[str, Any]]:
    lines = []
    for rows in (100_000, 1_000_000, 10_000_000):
        cache = make_cache(folder / f"m{rows}", rows, "uint8")
        peaks = {}
        for how in ("nothing", "all"):
            done = subprocess.run(
                [sys.executable, "-c", READ, cache.url, how],
                capture_output=True,
                text=True,
                check=True,
                cwd=Path(__file__).parents[1],
            )
            peaks[how] = int(done.stdout)
        lines.append(
            {
                "views": rows,
                "cache_mb": cache.stored_bytes() / 1e6,
                "opened_mb": peaks["nothing"] / 1e6,
                "streamed_mb": peaks["all"] / 1e6,
                "above_mb": (peaks["all"] - peaks["nothing"]) / 1e6,
            }
        )
    return lines


def dataset_of(num_samples: int, num_classes: int, folder: Path) -> Dataset:
    """Fashion-MNIST, said to have this many classes."""
    whole = open_source("fashion-mnist", "train")
    names = tuple(f"class {i:04}" for i in range(num_classes))
    part = Source(names, whole.images[:num_samples], whole.labels[:num_samples])
    return convert(part, folder / f"{num_samples}-{num_classes}.beton")[0]


class Clocked:
    """A target source and the seconds spent in it."""

    def __init__(self, inner: targets.CachedTargets) -> None:
        self.inner = inner
        self.seconds = 0.0

    def __call__(self, batch: Batch) -> Target | TemperedTarget:
        start = time.perf_counter()
        target = self.inner(batch)
        self.seconds += time.perf_counter() - start
        return target


def bench_wait(folder: Path, rounds: int) -> list[dict[str, Any]]:
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    samples = 30_000
    data = dataset_of(samples, CLASSES, folder)
    codec = TopK(K, "uint8")
    spec = CacheSpec(2, samples, CLASSES, codec, data.content_hash, "0" * 16, VIEW)
    cache = LogitCache.create(folder / "wait", spec, {"teacher": "synthetic"})
    some = codec.encode(logits(samples, CLASSES))
    for view, shard in cache.missing():
        cache.write(view, shard, some[slice(*cache.shard_range(shard))])
    shares = []
    for _ in range(rounds):
        student = load.load_model("kdcache:small", "student", num_classes=CLASSES, size_px=28)
        clocked = Clocked(targets.CachedTargets(cache, data.content_hash, VIEW))
        start = time.perf_counter()
        train(TrainSpec("cached", VIEW, 2, BATCH, num_views=2), data, student, clocked)
        seconds = time.perf_counter() - start
        shares.append((clocked.inner.waited_s / seconds, clocked.seconds / seconds))
    wait, whole = np.median(np.array(shares), 0)
    return [
        {
            "case": "share of training that waits for a shard",
            "ratio": float(wait),
            "unit": "of 1",
            "bar": CACHE_BARS["wait"],
            "met": bool(wait < CACHE_BARS["wait"]),
        },
        {
            "case": "share of training that targets take in all",
            "ratio": float(whole),
            "unit": "of 1",
        },
    ]


def bench_write(folder: Path, rounds: int) -> list[dict[str, Any]]:
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    data = dataset_of(10_000, CLASSES, folder)
    teacher = load.load_model("kdcache:medium", "student", num_classes=CLASSES, size_px=28)
    teacher.eval().requires_grad_(False)
    spec = precompute.make_cache_spec(data, teacher, VIEW, TopK(K, "uint8"))
    numbers = itertools.count()

    def record() -> int:
        precompute.precompute(data, teacher, spec, folder / f"w{next(numbers)}")
        return len(data)

    def discard(encoded: bool) -> int:
        """All that precompute does but to store: the shards are said to be there."""
        written: set[tuple[int, int]] = set()

        def note(cache: LogitCache, view: int, shard: int, records: Records) -> None:
            written.add((view, shard))

        def missing(cache: LogitCache) -> list[tuple[int, int]]:
            return [place for place in cache.shards() if place not in written]

        def nothing(codec: TopK, z: torch.Tensor, rows: Rows) -> Records:
            return Records({"logits": np.empty((len(z), 1))})

        encode = TopK.encode if encoded else nothing
        with (
            mock.patch.multiple(LogitCache, write=note, missing=missing),
            mock.patch.object(TopK, "encode", encode),
        ):
            return record()

    samples = harness.interleave(
        {
            "precompute: stored": record,
            "precompute: encoded, not stored": lambda: discard(True),
            "precompute: asked alone": lambda: discard(False),
        },
        rounds,
    )
    writing = 1 - harness.ratio(samples, "precompute: stored", "precompute: encoded, not stored")
    encoding = 1 - harness.ratio(
        samples, "precompute: encoded, not stored", "precompute: asked alone"
    )
    lines: list[dict[str, Any]] = [{"case": n, **s.quantiles()} for n, s in samples.items()]
    return [
        *lines,
        {
            "case": "share of precompute's time that storing takes",
            "ratio": writing,
            "unit": "of 1",
            "bar": CACHE_BARS["write"],
            "met": bool(writing < CACHE_BARS["write"]),
        },
        {
            "case": "share of precompute's time that encoding takes",
            "ratio": encoding,
            "unit": "of 1",
        },
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--save", action="store_true", help="keep the result lines")
    parser.add_argument("--only", action="append", choices=("stream", "memory", "wait", "write"))
    args = parser.parse_args()
    if args.save:
        harness.start_results("cache")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parts: dict[str, Callable[[Path, int], list[dict[str, Any]]]] = {
            "stream": bench_stream,
            "memory": bench_memory,
            "wait": bench_wait,
            "write": bench_write,
        }
        for title in args.only or parts:
            harness.report("cache", title, parts[title](folder, args.rounds), args.save)


if __name__ == "__main__":
    main()
