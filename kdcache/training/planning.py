"""Estimates of a cache's size, time and break-even, from a short measurement on this machine.

In: data, a teacher, the spec of a cache, perhaps a student. Out: a `Plan`. Measured are the loader,
the teacher, the codec and Zarr's pipelines in memory, and the steps of the training loop, with a
live teacher and with recorded targets. With

    V  passes of the teacher over N samples: views, or averaged views
    r  seconds to record one view of one sample: load, teacher, encode
    o  seconds of a training step for one sample, online; c the same from a cache

    bytes   = bytes of a record, as packed here * records + seals + metadata
    record  = V N r                         packing overlaps; it counts only where it is slower
    cached  = V N r + students epochs N c
    online  = students epochs N o           so cached is faster where
              students * epochs > V r / (o - c)

If loading takes no time, r = o - c, and a cache pays as soon as its views are used more than once:
students * epochs > V. What stays true: nothing is written. Other load on the machine, a slower disk
or more processes change the figures.
"""

from __future__ import annotations

import itertools
import math
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from kdcache.batch import Batch, Target, TargetSource, TemperedTarget
from kdcache.cache import layout as layouts
from kdcache.cache.codecs import RecordCoder
from kdcache.cache.layout import Layout
from kdcache.cache.records import NO_TABLES, Records, Tables
from kdcache.cache.spec import CacheSpec
from kdcache.data.beton import Dataset
from kdcache.data.loader import Loader
from kdcache.models.classifier import Classifier, Teacher
from kdcache.teacher.logits import iter_teacher_logits
from kdcache.teacher.targets import OnlineTargets
from kdcache.training.loop import count_steps, iter_batches, open_loader
from kdcache.training.optim import learning_rate
from kdcache.training.run import TrainingRun
from kdcache.training.spec import TrainSpec
from kdcache.training.state import State
from kdcache.training.step import train_step
from kdcache.views.spec import MAX_VIEWS

# Other load on the machine comes in bursts: a rate is the median of some blocks, and two rates that
# are compared are measured in turns, block by block.
BLOCKS, BLOCK_S = 5, 0.6
WARM_BATCHES = 2  # compile kernels, choose algorithms, fill queues
MEASURED_AVERAGED_VIEWS = 2  # the time of an averaged cache is scaled up from these


@dataclass(frozen=True)
class Recording:
    """The time and size of one record, measured on `records`.

    seconds        loading, the teacher's passes and encoding
    packed_s       Zarr's compression, which overlaps with the rest
    packed_bytes   after compression
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
    dataset: Dataset,
    teacher: Teacher,
    spec: CacheSpec,
    coder: RecordCoder,
    *,
    batch_size: int,
    workers: int | None,
) -> Recording:
    """Record for some seconds, and compress the records. Raises what `precompute` raises."""
    assert spec.view_spec is not None
    num_averaged = min(spec.num_averaged_views, MEASURED_AVERAGED_VIEWS)
    measured = replace(spec, num_averaged_views=num_averaged)
    most = min(spec.num_samples, Layout.of(spec).shard_rows)
    parts: list[Records] = []
    rates, rows, start = [], 0, 0.0
    with Loader(
        dataset, spec.view_spec, batch_size, workers=workers, device=teacher.device
    ) as loader:
        for batch, (view, rows_B, logits_BC) in enumerate(_passes(loader, teacher, measured), 1):
            records = coder.encode(logits_BC, measured.rows(view, rows_B))
            if sum(map(len, parts)) < most:  # the rest is measured, and not kept
                parts.append(records)
            rows += len(rows_B)
            seconds = time.perf_counter() - start
            if batch == WARM_BATCHES or (batch > WARM_BATCHES and seconds > BLOCK_S):
                # The first block is the warm-up, whose time is not one of the rates.
                rates += [seconds / rows] * (batch > WARM_BATCHES)
                rows, start = 0, time.perf_counter()
            if len(rates) == BLOCKS:
                break
    scale = spec.num_averaged_views / num_averaged if num_averaged else 1
    records = Records.concatenate(parts)[:most]
    layouts.pack(spec, records)  # warms up
    start = time.perf_counter()
    rows, packed_bytes = layouts.pack(spec, records)
    packed_s = (time.perf_counter() - start) / rows
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


def make_plan(spec: CacheSpec, recording: Recording, tables: Tables = NO_TABLES) -> Plan:
    """The whole cache, from the time and size of its first records."""
    layout, records = Layout.of(spec), spec.num_views * spec.num_samples
    places = spec.num_views * layout.shards(spec.num_samples)
    arrays = len(spec.codec.columns(spec.num_classes))
    zarr_json = layouts.metadata(spec, layout, {"kdcache": {"spec": spec.to_json()}}, tables)
    seals = places * arrays * layouts.SEAL_BYTES
    size = round(records * recording.packed_bytes) + seals + sum(map(len, zarr_json.values()))
    packing = records * recording.packed_s / 3600
    return Plan(
        size,
        size / records,
        places * (arrays + 1) + len(zarr_json),
        places,
        # Packing runs in a thread of its own beside the teacher: the slower of the two decides.
        max(records * recording.seconds / 3600, packing),
        packing,
    )


def train_some(
    dataset: Dataset,
    teacher: Teacher,
    student: Classifier,
    spec: CacheSpec,
    coder: RecordCoder,
    recording: Recording,
    *,
    batch_size: int,
    workers: int | None,
) -> Steps:
    """Train the student for some seconds with a live teacher and with a cache, in turns. Raises
    what `loop.train` raises."""
    assert spec.view_spec is not None
    # The schedule must not end while time is measured.
    endless = TrainSpec(
        "cached",
        spec.view_spec,
        epochs=MAX_VIEWS,
        batch_size=batch_size,
        temperature=spec.codec.default_temperature,
    )
    online, cached = OnlineTargets(teacher), _Replay(spec, coder, recording.records)
    run = TrainingRun(endless, dataset, student, cached)
    state, loss = State(endless, student), run.make_loss()
    _, num_steps = count_steps(endless, len(dataset))
    online_s: list[float] = []
    cached_s: list[float] = []
    student.train()
    with open_loader(run, workers=workers) as loader:
        batches = iter_batches(loader, endless)

        def step(targets: TargetSource) -> None:
            lr = learning_rate(endless, state.step, num_steps)
            train_step(state, student, next(batches), targets, loss, lr)

        for targets in (online, cached):
            for _ in range(WARM_BATCHES):
                step(targets)
        # A GPU's steps are queued: without waiting, the first block would hold the warm-up's.
        _synchronize(student.device)
        for _ in range(BLOCKS):
            online_s.append(_seconds_per_call(partial(step, online), student.device))
            cached_s.append(_seconds_per_call(partial(step, cached), student.device))
    # The teacher's cost is a small difference, so it is taken between neighbours in time, which
    # other load on the machine disturbs equally.
    teacher_s = statistics.median(o - c for o, c in zip(online_s, cached_s, strict=True))
    step_s = statistics.median(cached_s)
    # Noise may make a fast teacher cost less than nothing.
    return Steps(max(0.0, step_s + teacher_s) / batch_size, step_s / batch_size)


def break_even(spec: CacheSpec, recording: Recording, steps: Steps) -> float:
    """The number of epochs, over all students, from which on a cache is faster; inf for never."""
    saved_s = steps.online_s - steps.cached_s
    return spec.num_views * recording.seconds / saved_s if saved_s > 0 else math.inf


def compare(spec: CacheSpec, plan: Plan, steps: Steps, *, students: int, epochs: int) -> Comparison:
    """Hours of this many students, from a cache and online."""
    views_h = students * epochs * spec.num_samples / 3600
    return Comparison(students, plan.hours + views_h * steps.cached_s, views_h * steps.online_s)


def free_bytes(out: str) -> int | None:
    """Free space of the disk that a cache would be on; None for an object store."""
    if "://" in out:
        return None
    folder = Path(out).absolute()
    while not folder.is_dir():
        folder = folder.parent
    return shutil.disk_usage(folder).free


class _Replay:
    """A `TargetSource` that repeats the measured records."""

    def __init__(self, spec: CacheSpec, coder: RecordCoder, records: Records) -> None:
        self.spec = spec
        self.coder = coder
        self.records = records

    def __call__(self, batch: Batch) -> Target | TemperedTarget:
        spec, records = self.spec, self.records[np.arange(len(batch)) % len(self.records)]
        device = batch.images_BCHW.device
        return self.coder.decode(records, spec.num_classes).to(device)


def _seconds_per_call(call: Callable[[], None], device: torch.device) -> float:
    """The mean over one block."""
    start, count = time.perf_counter(), 0
    while count == 0 or time.perf_counter() - start <= BLOCK_S:
        call()
        count += 1
    _synchronize(device)
    return (time.perf_counter() - start) / count


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
