"""How logits are stored as numbers: float32, float16, or 8-bit codes of their gaps.

A stored logit is relative to the record's largest one. "uint8" keeps codes q for gaps below that,
gap(q) = 64 (q / 255)^2: the steps grow with the gap, as the probability that they blur shrinks.

Error of a logit with gap g: none for float32; at most g 2^-11 + 2^-25 for float16, which saturates
at a gap of 65,504; at most sqrt(g) / 31.8 + 0.0008 for uint8, which saturates at 64.
"""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from kdcache.choices import ValueType as ValueType
from kdcache.errors import CacheCorrupt
from kdcache.spec import require

# In nats: a class this far below the largest has a probability of at most e^-64.
GAP_LIMIT = 64.0
MAX_CODE = 255
_GAPS = torch.tensor([GAP_LIMIT * (q / MAX_CODE) ** 2 for q in range(MAX_CODE + 1)])


def require_value_type(dtype: object) -> None:
    """Raise UsageError for another type."""
    known = get_args(ValueType)
    require(dtype in known, "dtype", f"one of {', '.join(known)}", dtype)


def error_bound(gaps: torch.Tensor, dtype: ValueType) -> torch.Tensor:
    """The largest error of stored logits, by their gap below the largest, in nats."""
    if dtype == "float32":
        return torch.zeros_like(gaps)
    # Half a unit in the last place of float16, and half of its least number; for uint8, half a
    # step.
    return gaps * 2**-11 + 2**-25 if dtype == "float16" else gaps.sqrt() / 31.8 + 0.0008


def gap_limit(dtype: ValueType) -> float:
    """The largest gap that a record holds."""
    return GAP_LIMIT if dtype == "uint8" else float(np.finfo(dtype).max)


def gaps_to_codes(gaps: torch.Tensor) -> torch.Tensor:
    """int16, 0 to MAX_CODE."""
    # + 0.5 and the truncation of `to` round to the nearest code.
    return (gaps / GAP_LIMIT).sqrt().mul(MAX_CODE).add(0.5).clamp(max=MAX_CODE).to(torch.int16)


def codes_to_gaps(codes: torch.Tensor) -> torch.Tensor:
    # index_select reads a table 15 times as fast as indexing does.
    return _GAPS.index_select(0, codes.reshape(-1).int()).view(codes.shape)


def to_array(values: torch.Tensor, dtype: ValueType) -> NDArray[Any]:
    """Contiguous, in the type that is stored."""
    array = values.cpu().numpy()
    if dtype == "float16":
        # Beyond float16's range a cast gives infinity, which is no logit.
        array = array.clip(-gap_limit(dtype), gap_limit(dtype))
    return np.ascontiguousarray(array.astype(dtype))


def require_largest(largest_B: torch.Tensor) -> None:
    """Raise CacheCorrupt unless the largest relative logit of each record is 0."""
    if not bool((largest_B == 0).all()):
        raise CacheCorrupt("a record has no largest logit: it is uninitialised")


def class_id_dtype(num_classes: int) -> np.dtype[Any]:
    return np.dtype(np.uint16 if num_classes <= 1 << 16 else np.uint32)
