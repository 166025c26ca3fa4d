"""What a cache will take, before it is made: bytes, objects, hours, and when it pays.

In: data, a teacher, the spec of a cache, perhaps a student. Out: a `Plan`, estimated from some
seconds of the real thing: loader, teacher, codec and Zarr's pipelines in memory, and the training
loop itself, with the teacher live and with its answers at hand. With

    V  passes that the teacher makes over N samples: views, or those that are averaged
    r  seconds to record one view of one sample: load, ask, encode
    o  seconds of a training step for one sample, online; c the same from a cache

    bytes   = bytes of a record, as packed here * records + seals + metadata
    record  = V N r                         packing overlaps, and costs only where it takes longer
    cached  = V N r + students epochs N c
    online  = students epochs N o           so cached is faster where
              students * epochs > V r / (o - c)

If loading takes no time, r = o - c, and a cache pays as soon as it is played more often than once:
students * epochs > V. What stays true: nothing is written. Figures are estimates: a machine that is
busy now, a disk that is slow later, or more processes change them.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import shutil
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from kdcache.batch import Batch, Target, TargetSource, TemperedTarget
from kdcache.cache import layout as layouts
from kdcache.cache.layout import Layout
from kdcache.cache.records import Records
from kdcache.cache.spec import CacheSpec
from kdcache.data.beton import Dataset
from kdcache.data.loader import Loader
from kdcache.models.classifier import Classifier, Teacher
from kdcache.teacher.precompute import iter_teacher_logits
from kdcache.teacher.targets import OnlineTargets
from kdcache.training import loop
from kdcache.training.spec import TrainSpec
from kdcache.views.spec import MAX_VIEWS

# A busy machine is busy in bursts: a rate is the median of some blocks, and what is compared takes
# turns, block by block.
BLOCKS, BLOCK_S = 5, 0.6
WARM_BATCHES = 2  # compile kernels, choose algorithms, fill queues
AVERAGED = 2  # views that stand for all those of an averaged cache


@dataclass(frozen=True)
class Recording:
    """What recording takes, for each record; `records` of them were measured.

    seconds   of the teacher's passes, loading and encoding; packed_s of Zarr, which overlaps
    """

    records: Records
    seconds: float
    packed_s: float
    packed_bytes: float


@dataclass(frozen=True)
class Steps:
    """Seconds that a training step takes for each sample."""

    online_s: float
    cached_s: float


@dataclass(frozen=True)
class Plan:
    """Estimates for a whole cache: bytes and objects in the store, hours to make it."""

    bytes: int
    bytes_per_record: float
    objects: int
    shards: int
    hours: float
    packing_hours: float


@dataclass(frozen=True)
class Comparison:
    """Hours for some students of some epochs each, the cache's own included in `cached`."""

    students: int
    cached: float
    online: float


def record_some(
    dataset: Dataset, teacher: Teacher, spec: CacheSpec, *, batch_size: int, workers: int | None
) -> Recording:
    """Record for some seconds, and pack what came of it. Raises what `precompute` does."""
    assert spec.view_spec is not None
    asked = replace(spec, num_averaged_views=min(spec.num_averaged_views, AVERAGED))
    parts, rates, rows, start = [], [], 0, 0.0
    with Loader(
        dataset, spec.view_spec, batch_size, workers=workers, device=teacher.device
    ) as loader:
        for batch, (view, rows_B, logits_BC) in enumerate(_passes(loader, teacher, asked), 1):
            parts.append(asked.codec.encode(logits_BC, asked.rows(view, rows_B)))
            rows += len(rows_B)
            seconds = time.perf_counter() - start
            if batch == WARM_BATCHES or (batch > WARM_BATCHES and seconds > BLOCK_S):
                rates += [seconds / rows] * (batch > WARM_BATCHES)
                rows, start = 0, time.perf_counter()
            if len(rates) == BLOCKS:
                break
    scale = spec.num_averaged_views / asked.num_averaged_views if spec.num_averaged_views else 1
    records = Records.concatenate(parts)[: min(spec.num_samples, Layout.of(spec).shard_rows)]
    packed_s, packed_bytes = _pack(records, spec)
    return Recording(records, statistics.median(rates) * scale, packed_s, packed_bytes)


def _passes(
    loader: Loader, teacher: Teacher, spec: CacheSpec
) -> Iterator[tuple[int, NDArray[np.int64], torch.Tensor]]:
    """(view, rows, logits) of batch after batch, without end."""
    for view in itertools.count():
        for rows_B, logits_BC in iter_teacher_logits(
            loader, teacher, spec, view, np.arange(spec.num_samples)
        ):
            yield view, rows_B, logits_BC


def _pack(records: Records, spec: CacheSpec) -> tuple[float, float]:
    """Seconds and bytes that each record takes in Zarr's pipelines, in whole chunks."""
    layout, rows = Layout.of(spec), len(records)
    if rows < min(spec.num_samples, layout.shard_rows):
        chunk = min(layout.chunk_rows, rows)
        rows = rows // chunk * chunk
        layout = Layout(chunk, rows)
    zarr_json = layouts.metadata(replace(spec, num_views=1, num_samples=rows), layout, {})
    for _ in range(2):  # the first warms up
        start = time.perf_counter()
        objects = layouts.encode(zarr_json, 0, 0, records[:rows])
    return (time.perf_counter() - start) / rows, sum(map(len, objects.values())) / rows


def make_plan(spec: CacheSpec, recording: Recording) -> Plan:
    """The whole cache, from what some of its records take."""
    layout, records = Layout.of(spec), spec.num_views * spec.num_samples
    places = spec.num_views * layout.shards(spec.num_samples)
    arrays = len(spec.codec.columns(spec.num_classes))
    zarr_json = layouts.metadata(spec, layout, {"kdcache": {"spec": spec.to_json()}})
    seals = places * arrays * layouts.SEAL_BYTES
    size = round(records * recording.packed_bytes) + seals + sum(map(len, zarr_json.values()))
    packing = records * recording.packed_s / 3600
    return Plan(
        size,
        size / records,
        places * (arrays + 1) + len(zarr_json),
        places,
        max(records * recording.seconds / 3600, packing),
        packing,
    )


def train_some(
    dataset: Dataset,
    teacher: Teacher,
    student: Classifier,
    spec: CacheSpec,
    recording: Recording,
    *,
    batch_size: int,
    workers: int | None,
) -> Steps:
    """Train the student for some seconds each way. Raises what `train` does."""
    assert spec.view_spec is not None
    endless = TrainSpec(
        "cached",
        spec.view_spec,
        epochs=MAX_VIEWS,
        batch_size=batch_size,
        temperature=spec.codec.default_temperature,
    )
    turns = _Turns(OnlineTargets(teacher), _Replay(spec, recording.records))
    with contextlib.suppress(_EnoughError):
        loop.train(endless, dataset, student, turns, workers=workers)
    online, cached = turns.step_s
    # What the teacher costs is a small difference: of neighbours in time, equally disturbed.
    more = statistics.median(o - c for o, c in zip(online, cached, strict=True))
    least = statistics.median(cached)
    return Steps(max(0.0, least + more) / batch_size, least / batch_size)


def break_even(spec: CacheSpec, recording: Recording, steps: Steps) -> float:
    """The number of epochs, over all students, from which on a cache is faster; inf for never."""
    saved_s = steps.online_s - steps.cached_s
    return spec.num_views * recording.seconds / saved_s if saved_s > 0 else math.inf


def compare(spec: CacheSpec, plan: Plan, steps: Steps, *, students: int, epochs: int) -> Comparison:
    """Hours of this many students, both ways."""
    views_h = students * epochs * spec.num_samples / 3600
    return Comparison(students, plan.hours + views_h * steps.cached_s, views_h * steps.online_s)


def free_bytes(out: str) -> int | None:
    """Room on the disk where a cache would lie; None for an object store."""
    if "://" in out:
        return None
    folder = Path(out).absolute()
    while not folder.is_dir():
        folder = folder.parent
    return shutil.disk_usage(folder).free


class _Replay:
    """The measured records as targets, over and over."""

    def __init__(self, spec: CacheSpec, records: Records) -> None:
        self.spec = spec
        self.records = records

    def __call__(self, batch: Batch) -> Target | TemperedTarget:
        spec, records = self.spec, self.records[np.arange(len(batch)) % len(self.records)]
        device = batch.images_BCHW.device
        return spec.codec.decode(records, spec.num_classes).to(device)


class _EnoughError(Exception):
    """The time to measure is over."""


class _Turns:
    """A `TargetSource` that is one and the other in turns, and ends the training that asks it.

    step_s   of each, the seconds of a whole step: the mean of each block
    """

    def __init__(self, *sources: TargetSource) -> None:
        self.sources = sources
        self.step_s: tuple[list[float], ...] = tuple([] for _ in sources)
        self.turn = self.steps = 0
        self.start = time.perf_counter()

    def __call__(self, batch: Batch) -> Target | TemperedTarget:
        device = batch.images_BCHW.device
        warm = self.turn < len(self.sources)  # the first block of each
        enough = self.steps >= WARM_BATCHES if warm else self.steps > 0
        if enough and (warm or time.perf_counter() - self.start > BLOCK_S):
            _wait(device)
            if not warm:
                seconds = (time.perf_counter() - self.start) / self.steps
                self.step_s[self.turn % len(self.sources)].append(seconds)
            if self.turn + 1 == (BLOCKS + 1) * len(self.sources):
                raise _EnoughError
            self.turn, self.steps, self.start = self.turn + 1, 0, time.perf_counter()
        self.steps += 1
        return self.sources[self.turn % len(self.sources)](batch)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
