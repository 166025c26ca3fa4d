"""Transformed records at work: replay, what making them costs beside a teacher, training from them.

    python -m benchmarks.bench_transformed [LOGITS.npy] [--rounds 7] [--photos 96] [--save]

LOGITS is what `benchmarks.mixed_views` makes of an ImageNet teacher, [N, 1000]; without it the
logits are synthetic, and the records of another size.

replay   records of C = 1000 at D = 1 and D = 0.02 to dense targets, as training reads them: sealed,
         a shard read ahead, one matrix product a batch. Beside it the same without reading ahead,
         whose time is compared with the sum of two that no reader of these bytes goes below: of
         the matrix products alone, and of the entropy decoder alone.
work     milliseconds of CPU that a record takes to encode, compress, seal and store, beside those
         of a forward pass of EfficientNet-Lite0's architecture
train    steps of a student (kdcache:small, 1000 classes, photos at 224 px) from transformed records
         against steps from labels, and the share of them that waits for a shard
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import harness
from benchmarks.bench_cache import logits as synthetic_logits
from benchmarks.step_cases import photos
from kdcache.batch import TargetSource
from kdcache.cache import rans
from kdcache.cache.cache import LogitCache
from kdcache.cache.codecs import Transformed
from kdcache.cache.records import RecordsBuffer
from kdcache.cache.spec import CacheSpec
from kdcache.models import load
from kdcache.models.classifier import Classifier
from kdcache.teacher.targets import CachedTargets, LabelTargets
from kdcache.training.loop import train
from kdcache.training.run import TrainingRun
from kdcache.training.spec import TrainSpec
from kdcache.views.spec import ViewSpec

CLASSES, BATCH, ROWS = 1000, 256, 1 << 15
REPLAY_BAR, OVERHEAD_BAR, WORK_BAR, TRAIN_BAR, WAIT_BAR = 60_000, 1.3, 0.05, 0.97, 0.01
Line = dict[str, Any]


def read_logits(path: Path | None) -> torch.Tensor:
    if path is not None:
        return torch.from_numpy(np.load(path))
    z = synthetic_logits(8192, CLASSES)
    return z + torch.randn(z.shape, generator=torch.Generator().manual_seed(1))


def make_cache(path: Path, spec: CacheSpec, live: torch.Tensor) -> LogitCache:
    """A cache of these logits, again and again."""
    codec = spec.codec
    assert isinstance(codec, Transformed)
    cache = LogitCache.create(path, spec, {"teacher": "benchmark"}, tables=codec.fit(live))
    coder = cache.coder()
    for view, shard in cache.missing():
        buffer, (start, stop) = RecordsBuffer(cache.num_rows(shard)), cache.shard_range(shard)
        for rows in torch.arange(start, stop).split(BATCH):
            some = np.asarray(rows)
            buffer.append(coder.encode(live[rows % len(live)], spec.rows(view, some)))
        cache.write(view, shard, buffer.records())
    return cache


def stream(cache: LogitCache) -> int:
    """Every record to a dense target, in batches, a shard read ahead."""
    rows = 0
    with ThreadPoolExecutor(1) as reader:
        ahead = reader.submit(cache.read_shard, *cache.shards()[0])
        for place in [*cache.shards()[1:], None]:
            records = ahead.result()
            if place:
                ahead = reader.submit(cache.read_shard, *place)
            for first in range(0, len(records), BATCH):
                cache.decode(records[first : first + BATCH])
            rows += len(records)
    return rows


def serial(cache: LogitCache) -> int:
    """The same, one after another."""
    for place in cache.shards():
        records = cache.read_shard(*place)
        for first in range(0, len(records), BATCH):
            cache.decode(records[first : first + BATCH])
    return cache.spec.num_samples


def products(cache: LogitCache) -> Callable[[], int]:
    """The matrix product of each batch, over the directions that the batch uses."""
    codes = cache.read_shard(0, 0).columns["coefficients"]
    used = [int(codes[i : i + BATCH].any(0).sum()) for i in range(0, len(codes), BATCH)]
    left, right = torch.randn(BATCH, max(used)), torch.randn(max(used), CLASSES)
    out = torch.empty(BATCH, CLASSES)

    def run() -> int:
        for number in used:
            torch.mm(left[:, :number], right[:number], out=out)
        return len(used) * BATCH

    return run


def decoder(cache: LogitCache) -> Callable[[], int]:
    """The entropy decoder alone, over what a shard holds, on one core as a reader's thread is."""
    records = cache.read_shard(0, 0)
    rows = cache.manifest.layout.chunk_rows
    chunks = [
        (rans.encode(array[i : i + rows]), array.dtype)
        for array in records.columns.values()
        for i in range(0, len(records), rows)
    ]

    def run() -> int:
        for data, dtype in chunks:
            rans.decode(data, dtype)
        return len(records)

    return run


def bench_replay(live: torch.Tensor, folder: Path, rounds: int) -> list[Line]:
    lines: list[Line] = []
    for distortion in (1.0, 0.02):
        name = f"D = {distortion:g}"
        spec = spec_of(Transformed(distortion), ROWS)
        cache = make_cache(folder / name, spec, live)
        samples = harness.interleave(
            {
                f"{name}: replay": partial(stream, cache),
                f"{name}: replay, not ahead": partial(serial, cache),
                f"{name}: matrix products": products(cache),
                f"{name}: entropy decoder": decoder(cache),
            },
            rounds,
        )
        lines += [{"case": case, **found.quantiles()} for case, found in samples.items()]
        seconds = [1 / np.array(found.rates) for found in samples.values()]
        overhead = float(np.median(seconds[1] / (seconds[2] + seconds[3])))
        lines.append({"case": f"{name}: time over that of both", "ratio": overhead})
        if distortion == 1:
            rate = float(np.median(samples[f"{name}: replay"].rates))
            lines[-1] |= {"bar": OVERHEAD_BAR, "met": overhead <= OVERHEAD_BAR}
            lines[-5] |= {"bar": REPLAY_BAR, "met": rate >= REPLAY_BAR}
    return lines


def bench_work(live: torch.Tensor, folder: Path, rounds: int) -> list[Line]:
    import timm

    network = timm.create_model("tf_efficientnet_lite0").eval()
    images = torch.randn(32, 3, 224, 224).contiguous(memory_format=torch.channels_last)
    network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward() -> int:
        with torch.inference_mode():
            network(images)
        return len(images)

    spec, numbers = spec_of(Transformed(0.1), 8192), iter(range(1 << 20))
    codec = spec.codec
    assert isinstance(codec, Transformed)
    tables = codec.fit(live)

    def record() -> int:
        cache = LogitCache.create(folder / f"w{next(numbers)}", spec, {}, tables=tables)
        coder = cache.coder()
        for view, shard in cache.missing():
            buffer = RecordsBuffer(cache.num_rows(shard))
            for first in range(0, buffer.num_rows, BATCH):
                some = torch.arange(first, min(first + BATCH, buffer.num_rows))
                rows = spec.rows(view, np.asarray(some))
                buffer.append(coder.encode(live[some % len(live)], rows))
            cache.write(view, shard, buffer.records())
        return spec.num_samples

    samples = harness.interleave({"forward pass": forward, "record": record}, rounds)
    share = np.array(samples["record"].cpu_s) / np.array(samples["forward pass"].cpu_s)
    ratio = float(np.median(share))
    return [
        *({"case": case, **found.quantiles()} for case, found in samples.items()),
        {
            "case": "CPU time of recording / of the teacher",
            "ratio": ratio,
            "bar": WORK_BAR,
            "met": ratio < WORK_BAR,
        },
    ]


def bench_train(live: torch.Tensor, folder: Path, rounds: int, num_photos: int) -> list[Line]:
    with photos(num_photos, 224, 2, torch.device("cpu")) as case:
        spec = replace(
            spec_of(Transformed(1.0), len(case.data), case.view),
            num_views=case.epochs,
            dataset_hash=case.data.content_hash,
        )
        cached = CachedTargets(
            make_cache(folder / "train", spec, live), case.data.content_hash, case.view
        )
        settings = TrainSpec(
            "cached", case.view, case.epochs, case.batch_size, num_views=case.epochs
        )
        waits = []

        def run(source: TargetSource) -> int:
            start, waited = time.perf_counter(), cached.waited_s
            train(TrainingRun(settings, case.data, student(), source))
            if source is cached:
                waits.append((cached.waited_s - waited) / (time.perf_counter() - start))
            return case.images

        samples = harness.interleave(
            {
                "train, transformed": lambda: run(cached),
                "train, labels": lambda: run(LabelTargets(CLASSES)),
            },
            rounds,
        )
    ratio = harness.ratio(samples, "train, transformed", "train, labels")
    wait = float(np.median(waits[1:]))
    return [
        *({"case": name, **found.quantiles()} for name, found in samples.items()),
        {
            "case": "transformed / labels",
            "ratio": ratio,
            "bar": TRAIN_BAR,
            "met": ratio >= TRAIN_BAR,
        },
        {"case": "share that waits", "ratio": wait, "bar": WAIT_BAR, "met": wait < WAIT_BAR},
    ]


def student() -> Classifier:
    torch.manual_seed(0)
    return load.load_model("kdcache:small", "student", num_classes=CLASSES, size_px=224)


def spec_of(codec: Transformed, rows: int, view: ViewSpec = ViewSpec(224)) -> CacheSpec:  # noqa: B008
    return CacheSpec(1, rows, CLASSES, codec, "0" * 16, "0" * 16, view)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("logits", type=Path, nargs="?")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--photos", type=int, default=96)
    parser.add_argument("--only", action="append", choices=("replay", "work", "train"))
    parser.add_argument("--save", action="store_true", help="keep the result lines")
    args = parser.parse_args()
    live = read_logits(args.logits)
    if args.save:
        harness.start_results("transformed")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parts: dict[str, Callable[[], list[Line]]] = {
            "replay": lambda: bench_replay(live, folder, args.rounds),
            "work": lambda: bench_work(live, folder, args.rounds),
            "train": lambda: bench_train(live, folder, args.rounds, args.photos),
        }
        for title in args.only or parts:
            harness.report("transformed", title, parts[title](), args.save)


if __name__ == "__main__":
    main()
