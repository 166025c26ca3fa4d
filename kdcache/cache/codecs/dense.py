"""All logits of a record, relative to its largest one, in class order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from kdcache.batch import Target
from kdcache.cache.codecs import values
from kdcache.cache.codecs.comparison import compare_logits
from kdcache.cache.codecs.protocol import Allowance, Column, MeasureNames, RowErrors, Rows
from kdcache.cache.codecs.values import ValueType
from kdcache.cache.records import Records
from kdcache.losses.distillation import check_temperature


@dataclass(frozen=True)
class Dense:
    """Every class's logit, for targets at any temperature.

    dtype   how a logit is stored; float32 keeps it exactly
    """

    dtype: ValueType = "float16"
    name: ClassVar[str] = "dense"
    default_temperature: ClassVar[float] = 1.0
    measures: ClassVar[MeasureNames] = MeasureNames()

    def __post_init__(self) -> None:
        values.require_value_type(self.dtype)

    def require_classes(self, num_classes: int) -> None: ...

    def require_temperature(self, temperature: float) -> None:
        check_temperature(temperature, sparse=False)

    def columns(self, num_classes: int) -> dict[str, Column]:
        return {"logits": Column(num_classes, np.dtype(self.dtype))}

    def num_named(self, num_classes: int) -> int:
        return num_classes

    def encode(self, logits_BC: torch.Tensor, rows: Rows | None = None) -> Records:
        z = logits_BC.float()
        relative = z - z.amax(1, keepdim=True)
        kept = values.gaps_to_codes(-relative) if self.dtype == "uint8" else relative
        return Records({"logits": values.to_array(kept, self.dtype)})

    def decode(self, records: Records, num_classes: int) -> Target:
        logits = torch.from_numpy(np.ascontiguousarray(records.columns["logits"]))
        logits = -values.codes_to_gaps(logits) if self.dtype == "uint8" else logits.float()
        # Rows that were never written hold the fill value, and so have no 0.
        values.require_largest(logits.amax(1))
        return Target(logits, None, None, num_classes)

    def error_bound(self, gaps: torch.Tensor) -> torch.Tensor:
        return values.error_bound(gaps, self.dtype)

    def compare(
        self, records: Records, live_BC: torch.Tensor, allowance: Allowance, rows: Rows
    ) -> RowErrors:
        return compare_logits(self, self.dtype, records, live_BC, allowance, rows)

    def describe(self, num_classes: int) -> str:
        return f"all classes, {self.dtype}"
