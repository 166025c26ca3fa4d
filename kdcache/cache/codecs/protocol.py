"""The seam `RecordCodec`: teacher logits to records and back, and how a recomputed one compares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray

from kdcache.batch import Target, TemperedTarget
from kdcache.cache.records import Records, Tables

# How Zarr packs a column; `compression.py` has the pipelines, chosen by measurement.
Packing = Literal["shuffle", "bitshuffle", "columns", "entropy", "rans"]


@dataclass(frozen=True)
class Column:
    """A stored array [num_views, num_samples, width]."""

    width: int
    dtype: np.dtype[Any]
    packing: Packing = "shuffle"

    @property
    def record_bytes(self) -> int:
        """Bytes of a record before compression."""
        return self.width * self.dtype.itemsize


@dataclass(frozen=True)
class Rows:
    """Which rows of a view: what a codec that draws may draw from.

    seed      of the view spec
    row_ids   int64 [B]: positions of the view, or sample ids where rows are in dataset order
    """

    seed: int
    view: int
    row_ids: NDArray[np.int64]


@dataclass(frozen=True)
class Allowance:
    """What the teacher's arithmetic may change of a row's logits, in nats [B]."""

    largest_B: torch.Tensor
    typical_B: torch.Tensor


@dataclass(frozen=True)
class RowErrors:
    """How records differ from recomputed logits, as float64 [B].

    agrees    1 where the record's top class is the recomputed one, near ties aside; of draws, the
              fraction that hit the class they would hit now, near its boundary aside
    typical   KL(record || recomputed) in nats; of draws, the mean distance to where they lie now
    allowed   the largest `typical` that rounding explains
    largest   error of a stored number, in nats; of draws, their distance
    ratio     the largest ratio of such an error to what is allowed of it
    """

    agrees: torch.Tensor
    typical: torch.Tensor
    allowed: torch.Tensor
    largest: torch.Tensor
    ratio: torch.Tensor

    @staticmethod
    def concatenate(parts: Sequence[RowErrors]) -> RowErrors:
        columns = zip(*(vars(p).values() for p in parts), strict=True)
        return RowErrors(*(torch.cat(x) for x in columns))


@dataclass(frozen=True)
class MeasureNames:
    """(key, text) of the three measures that `verify` makes of RowErrors; unit of `largest`."""

    agrees: tuple[str, str] = ("top1", "top-1 agreement, near ties aside")
    typical: tuple[str, str] = ("kl", "mean KL(cache || live), nats")
    ratio: tuple[str, str] = ("gap", "largest gap, of what is allowed")
    unit: str = " nats"


class CodecSpec(Protocol):
    """What a record keeps: a frozen dataclass whose fields are its parameters and its JSON.

    name                 what it is called in JSON; unique in `CODECS`
    default_temperature  T of a target where none is asked for: 1, or the only one that it has
    measures             what `verify` calls its comparison
    """

    name: ClassVar[str]
    measures: ClassVar[MeasureNames]

    @property
    def default_temperature(self) -> float: ...

    def require_classes(self, num_classes: int) -> None:
        """Raise UsageError for parameters that do not fit a teacher of so many classes."""

    def require_temperature(self, temperature: float) -> None:
        """Raise UsageError for a temperature at which targets of these records are not defined."""

    def columns(self, num_classes: int) -> Mapping[str, Column]:
        """The stored arrays, by name; not "seals"."""

    def num_named(self, num_classes: int) -> int:
        """The most classes that a record names; all others are its tail."""

    def describe(self, num_classes: int) -> str:
        """A phrase for people: what a record keeps."""


class RecordCoder(Protocol):
    """Logits to records and back."""

    def encode(self, logits_BC: torch.Tensor, rows: Rows) -> Records:
        """Records of finite teacher logits [B, C], computed where the logits are."""

    def decode(self, records: Records, num_classes: int) -> Target | TemperedTarget:
        """The target of each record, on the CPU or on the coder's device.

        Raises CacheCorrupt for a record that no teacher can have given.
        """

    def error_bound(self, gaps: torch.Tensor) -> torch.Tensor:
        """The largest error of a stored number, by its gap below the largest logit, in nats."""

    def compare(
        self, records: Records, live_BC: torch.Tensor, allowance: Allowance, rows: Rows
    ) -> RowErrors:
        """How records differ from recomputed float64 logits [B, C] on the CPU."""


class RecordCodec(CodecSpec, RecordCoder, Protocol):
    """A codec that needs nothing but its parameters."""


@runtime_checkable
class CalibratedCodec(CodecSpec, Protocol):
    """A codec that needs tables, which are made of teacher logits before the first record.

    num_calibration_records   rows of logits that `fit` takes
    """

    @property
    def num_calibration_records(self) -> int: ...

    def fit(self, logits_NC: torch.Tensor) -> Tables:
        """The tables, by name: arrays that a cache holds once."""

    def bind(self, tables: Tables, device: torch.device) -> RecordCoder:
        """The coder that uses these tables, on a device."""
