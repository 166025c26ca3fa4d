"""What a cache's record codec is made from, and measured on: live logits of some rows.

In: a loader, a teacher, the spec of a cache. Out: a `Calibration`; of it a codec's tables, and how
good records would be. What stays true: which rows it has depends on the numbers of samples and of
records alone, so every process, part and run after a kill makes equal tables, and so does a cache
that has fewer views or gets more. Cost: the teacher's passes over these rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from kdcache.batch import Target
from kdcache.cache import layout as layouts
from kdcache.cache.codecs import (
    CalibratedCodec,
    CodecSpec,
    Dense,
    RecordCoder,
    TopK,
    Transformed,
    bind,
)
from kdcache.cache.fidelity import Fidelity, measure_fidelity
from kdcache.cache.records import Records, Tables
from kdcache.cache.spec import CacheSpec
from kdcache.data.loader import Loader
from kdcache.errors import UsageError
from kdcache.models.classifier import Teacher
from kdcache.teacher.logits import iter_teacher_logits
from kdcache.teacher.options import LEAST_COSINE, RecordOptions
from kdcache.views.spec import ViewSpec

Progress = Callable[[int], None]

# Of so many pairs of rows, one is left out of the tables, to measure records on.
HELD_OUT_EVERY = 4
# A dense record of so few classes is small, and exact.
DENSE_CLASSES = 100
# Rows that a codec which needs no tables is measured on.
MEASURED_RECORDS = 1024
ROWS_AT_ONCE = 512  # of many classes, encoding takes some copies of their logits
# For a teacher of too many classes for transformed records.
DEFAULT_TOP_K = 16
DISTORTIONS = [float(f"{m}e-{e}") for e in range(5) for m in (7, 5, 3, 2, 1.5, 1)][3:]


@dataclass(frozen=True)
class Calibration:
    """Live logits [N, C], float32 on the CPU, in whole pairs, of a cache's rows."""

    logits_NC: torch.Tensor

    def split(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows that make tables, and those that measure."""
        held_N = torch.arange(len(self.logits_NC)) // 2 % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
        if not held_N.any():  # a handful of rows
            return self.logits_NC, self.logits_NC
        return self.logits_NC[~held_N], self.logits_NC[held_N]

    def make_tables(self, codec: CodecSpec) -> Tables:
        """The tables of a codec; none for one that needs none."""
        return codec.fit(self.split()[0]) if isinstance(codec, CalibratedCodec) else {}


@dataclass(frozen=True)
class RecordChoice:
    """A codec with its tables, and what records of it were measured to be.

    bytes_per_record   as they are stored
    fidelity           at some temperatures; none where no target has all of them
    """

    codec: CodecSpec
    tables: Tables
    bytes_per_record: float
    fidelity: tuple[Fidelity, ...]


def calibrate(
    loader: Loader,
    teacher: Teacher,
    spec: CacheSpec,
    num_records: int,
    progress: Progress = lambda rows: None,
) -> Calibration:
    """Live logits of `calibration_rows`; `progress` is called with the rows done so far.

    Raises what `iter_teacher_logits` raises.
    """
    parts, done = [], 0
    for view, rows in calibration_rows(spec, num_records):
        for _, logits_BC in iter_teacher_logits(loader, teacher, spec, view, rows):
            parts.append(logits_BC.float().cpu())
            done += len(logits_BC)
            progress(done)
    return Calibration(torch.cat(parts))


def calibration_rows(spec: CacheSpec, count: int) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Views, and rows of each: about `count` in whole pairs, spread evenly over view 0; or all of
    view 0, of view 1, ..., and some of the last.

    Where views are all alike, or averaged, there are no more rows than samples.
    """
    units = -(-spec.num_samples // 2)
    left, view = -(-count // 2), 0
    while left > 0:
        taken = min(left, units)
        pairs = np.arange(taken) * units // taken
        rows = (2 * pairs[:, None] + np.arange(2)).reshape(-1)
        yield view, rows[rows < spec.num_samples]
        left, view = left - taken, view + 1
        if spec.num_averaged_views or not _varies(spec.view_spec):
            return


def _varies(view_spec: ViewSpec | None) -> bool:
    assert view_spec is not None
    some = view_spec.crop in ("inception", "random") or view_spec.flip or view_spec.mixup
    return bool(some or view_spec.transforms)


def measure_codec(spec: CacheSpec, calibration: Calibration) -> RecordChoice:
    """Make the tables of the spec's codec, encode, and measure."""
    return _measure(spec, calibration, calibration.make_tables(spec.codec))


def _measure(spec: CacheSpec, calibration: Calibration, tables: Tables) -> RecordChoice:
    records = _encode(spec, bind(spec.codec, tables), calibration.logits_NC)
    _, size = layouts.pack(spec, records)
    return RecordChoice(spec.codec, tables, size, _fidelity(spec, calibration, tables))


def _fidelity(
    spec: CacheSpec, calibration: Calibration, tables: Tables, *at: float
) -> tuple[Fidelity, ...]:
    _, held_BC = calibration.split()
    coder = bind(spec.codec, tables)
    target = coder.decode(_encode(spec, coder, held_BC), spec.num_classes)
    if not isinstance(target, Target):
        return ()  # draws are right on average and at one temperature
    return measure_fidelity(held_BC, target, *([at] if at else []))


def _encode(spec: CacheSpec, coder: RecordCoder, logits_NC: torch.Tensor) -> Records:
    parts = torch.split(logits_NC, ROWS_AT_ONCE)
    rows = spec.rows(0, np.arange(ROWS_AT_ONCE))
    return Records.concatenate([coder.encode(part, rows) for part in parts])


def choose_record(
    spec: CacheSpec, calibration: Calibration, options: RecordOptions
) -> RecordChoice:
    """Of more than DENSE_CLASSES classes, the smallest records that give a student near the
    teacher nearly its gradient, at the options' temperature.

    Dense where that takes no more bytes; the largest logits where there are too many classes.
    """
    base = Transformed(num_calibration_records=options.num_calibration_records)
    try:
        base.require_classes(spec.num_classes)
    except UsageError:
        return measure_codec(replace(spec, codec=TopK(DEFAULT_TOP_K)), calibration)
    rows_NC, _ = calibration.split()
    tables = base.fit(rows_NC)

    def at(i: int) -> tuple[CacheSpec, Tables]:
        codec = replace(base, distortion=DISTORTIONS[i])
        return replace(spec, codec=codec), codec.fit(rows_NC, tables)

    first, last = 0, len(DISTORTIONS) - 1
    while first < last:  # the largest distortion that will do
        middle = (first + last) // 2
        tried, tables = at(middle)
        found = _fidelity(tried, calibration, tables, options.temperature)
        first, last = (first, middle) if found[0].cosine >= LEAST_COSINE else (middle + 1, last)
    chosen, tables = at(first)
    exact = measure_codec(replace(spec, codec=Dense()), calibration)
    records = spec.num_views * spec.num_samples

    def size(choice: RecordChoice) -> float:
        return choice.bytes_per_record + sum(x.nbytes for x in choice.tables.values()) / records

    return min(_measure(chosen, calibration, tables), exact, key=size)
