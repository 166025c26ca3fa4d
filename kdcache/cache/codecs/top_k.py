"""The k largest logits, and three numbers for the tail.

A record has the k largest logits relative to the largest one, falling, their class ids, and of the
tail its log-sum-exp at T = 1, its mean and its variance, from which the target at any temperature
T >= 1 follows (`kernels/reference.py`, `tail_log_mass`).

float32 and float16 store these numbers as they are. A record of uint8 codes (`values.py`) is a
staircase that only falls, and each code is stored as its step from the one before, which takes half
the bits once compressed:

    logits  0, then the step to each next logit
    tail    the step to the tail's log-mean-exp, the step from there to its mean, and the code of
            its standard deviation

uint8's error bound holds for the tail's log-mean-exp, mean and standard deviation too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from kdcache.batch import Target
from kdcache.cache.codecs import values
from kdcache.cache.codecs.comparison import compare_logits
from kdcache.cache.codecs.protocol import Allowance, Column, MeasureNames, Packing, RowErrors, Rows
from kdcache.cache.codecs.values import MAX_CODE, ValueType
from kdcache.cache.records import Records
from kdcache.errors import CacheCorrupt
from kdcache.losses.distillation import check_temperature
from kdcache.spec import require


@dataclass(frozen=True)
class TopK:
    """The k largest of C logits.

    k       1 to C - 1
    dtype   how a number is stored
    """

    k: int
    dtype: ValueType = "float16"
    name: ClassVar[str] = "top_k"
    default_temperature: ClassVar[float] = 1.0
    measures: ClassVar[MeasureNames] = MeasureNames()

    def __post_init__(self) -> None:
        require(self.k >= 1, "top-k", "at least 1, or 'all'", self.k)
        values.require_value_type(self.dtype)

    def require_classes(self, num_classes: int) -> None:
        expected = f"1 to {num_classes}, the number of classes, or 'all'"
        require(self.k < num_classes, "top-k", expected, self.k)

    def require_temperature(self, temperature: float) -> None:
        check_temperature(temperature, sparse=True)

    def columns(self, num_classes: int) -> dict[str, Column]:
        value = np.dtype(self.dtype)
        codes = value.itemsize == 1
        # Byte by byte a class id takes 8 bits and a badly coded rest; bit by bit, log2 C. Repeats
        # are too rare to pay for. Few classes make pairs that records of a chunk share.
        ids: Packing = "bitshuffle" if num_classes > 256 else "shuffle"
        return {
            "logits": Column(self.k, value, "columns" if codes else "shuffle"),
            "classes": Column(self.k, values.class_id_dtype(num_classes), ids),
            "tail": Column(3, value, "entropy" if codes else "shuffle"),
        }

    def num_named(self, num_classes: int) -> int:
        return self.k

    def encode(self, logits_BC: torch.Tensor, rows: Rows | None = None) -> Records:
        # Relative to the largest: the absolute level of logits means nothing, and costs float16 its
        # precision.
        z = logits_BC.float()
        relative = z - z.amax(1, keepdim=True)
        # One more than is kept: the largest of the tail, to which its exponentials are relative.
        top, order = relative.topk(self.k + 1, dim=1)
        kept, class_ids, next_B1 = top[:, : self.k], order[:, : self.k], top[:, self.k :]
        left = z.shape[1] - self.k
        # Not logsumexp of what a mask leaves: exp takes ten times as long where it meets -inf.
        rest = (relative - next_B1).scatter_(1, class_ids, -80).exp_()
        at_one = rest.sum(1).log() + next_B1[:, 0]
        mean = relative.scatter(1, class_ids, 0).sum(1) / left
        variance = (relative - mean[:, None]).scatter_(1, class_ids, 0).square_().sum(1) / left
        return self.pack(kept, class_ids, torch.stack([at_one, mean, variance], 1), z.shape[1])

    def pack(
        self,
        logits_BK: torch.Tensor,
        class_ids_BK: torch.Tensor,
        tail_B3: torch.Tensor,
        num_classes: int,
    ) -> Records:
        """Records of logits that are known already.

        logits_BK     of the K classes, falling from 0
        class_ids_BK  their classes, of num_classes
        tail_B3       of the others, minus the same largest logit: log-sum-exp, mean, variance
        """
        if self.dtype == "uint8":
            logits_BK, tail_B3 = _to_steps(logits_BK, tail_B3, num_classes - self.k)
        ids = class_ids_BK.cpu().numpy().astype(values.class_id_dtype(num_classes))
        return Records(
            {
                "logits": values.to_array(logits_BK, self.dtype),
                "classes": ids,
                "tail": values.to_array(tail_B3, self.dtype),
            }
        )

    def decode(self, records: Records, num_classes: int) -> Target:
        logits = torch.from_numpy(np.ascontiguousarray(records.columns["logits"]))
        tail = torch.from_numpy(np.ascontiguousarray(records.columns["tail"]))
        class_ids = class_ids_of(records.columns["classes"], num_classes)
        # Before steps become codes: the first step is that of the largest logit, 0 in either form.
        values.require_largest(logits[:, 0])
        if self.dtype == "uint8":
            logits, tail = _from_steps(logits, tail, num_classes - logits.shape[1])
        elif not bool(tail.isfinite().all()):
            raise CacheCorrupt("a record has no tail: it is uninitialised")
        return Target(logits.float(), class_ids, tail.float(), num_classes)

    def error_bound(self, gaps: torch.Tensor) -> torch.Tensor:
        return values.error_bound(gaps, self.dtype)

    def compare(
        self, records: Records, live_BC: torch.Tensor, allowance: Allowance, rows: Rows
    ) -> RowErrors:
        return compare_logits(self, self.dtype, records, live_BC, allowance, rows)

    def describe(self, num_classes: int) -> str:
        return f"top {self.k} of {num_classes} classes and the tail, {self.dtype}"


def class_ids_of(column_BK: np.ndarray[Any, Any], num_classes: int) -> torch.Tensor:
    """int64 class ids. Raises CacheCorrupt for one that is no class."""
    ids = torch.from_numpy(column_BK.astype(np.int64))
    if ids.numel() and int(ids.max()) >= num_classes:
        raise CacheCorrupt(f"a record names class {int(ids.max())} of {num_classes}")
    return ids


def _to_steps(
    kept_BK: torch.Tensor, tail_B3: torch.Tensor, left: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and tail as steps [B, K] and [B, 3] of a staircase."""
    at_one, mean, variance = tail_B3.unbind(1)
    # Each lies below the one before: the largest of the tail, its log-mean-exp, its mean. Rounding
    # may break that.
    tail_gaps = torch.stack([math.log(left) - at_one, -mean], 1).clamp(min=0)
    gaps = torch.cat([values.gaps_to_codes(-kept_BK), values.gaps_to_codes(tail_gaps)], 1)
    # Rounding may put a lower number above the one before; steps are unsigned.
    stairs = gaps.cummax(1).values
    steps = stairs.diff(dim=1, prepend=stairs[:, :1])
    deviation = values.gaps_to_codes(variance.clamp(min=0).sqrt())
    k = kept_BK.shape[1]
    return steps[:, :k], torch.cat([steps[:, k:], deviation[:, None]], 1)


def _from_steps(
    steps_BK: torch.Tensor, tail_B3: torch.Tensor, left: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The reverse. Raises CacheCorrupt for a staircase that ends below the last code."""
    # The sum of a damaged record's steps does not fit into a byte.
    codes_BK = steps_BK.cumsum(1, dtype=torch.int32)
    tail_B2 = codes_BK[:, -1:] + tail_B3[:, :2].cumsum(1, dtype=torch.int32)
    if tail_B2.numel() and int(tail_B2[:, 1].max()) > MAX_CODE:
        raise CacheCorrupt("a record's steps lead below the last code: it is uninitialised")
    gaps = values.codes_to_gaps(torch.cat([tail_B2, tail_B3[:, 2:]], 1))
    mean_exp, mean, deviation = gaps.unbind(1)
    tail = torch.stack([math.log(left) - mean_exp, -mean, deviation.square()], 1)
    return -values.codes_to_gaps(codes_BK), tail
