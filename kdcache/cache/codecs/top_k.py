"""Teacher logits to records and back.

In: logits [B, C]. Out: `Records`, NumPy arrays as they lie on the tape; `decode` makes a `Target`
of them. A record keeps the k largest logits relative to the largest one, falling, their classes,
and three numbers for the tail, from which the target at any temperature T >= 1 follows
(`kernels/reference.py`, `tail_log_mass`). With k = C it keeps all relative logits in class order.

float32 and float16 keep these numbers as they are. uint8 keeps codes q for gaps below the largest
logit, gap(q) = 64 (q / 255)^2: the steps grow with the gap, as the probability that they blur
shrinks. A sparse record of them is a staircase that only falls, and each code is kept as its step
from the one before, which takes half the bits once compressed:

    logits  0, then the step to each next logit
    tail    the step to the tail's log-mean-exp, the step from there to its mean, and the code of
            its standard deviation

Error of a kept logit with gap g: none for float32; at most g 2^-11 + 2^-25 for float16, which
saturates at a gap of 65,504; at most sqrt(g) / 31.8 + 0.0008 for uint8, which saturates at 64.
uint8's bound holds for the tail's log-mean-exp, mean and standard deviation too.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray

from kdcache.batch import Target
from kdcache.cache.records import Records, ValueType, class_dtype
from kdcache.errors import CacheCorrupt

GAP_LIMIT = 64.0
CODES = 255
_GAPS = torch.tensor([GAP_LIMIT * (q / CODES) ** 2 for q in range(CODES + 1)], dtype=torch.float32)


def tail_dtype(dtype: ValueType) -> np.dtype[np.generic]:
    return np.dtype(dtype)


def record_bytes(classes: int, top_k: int, dtype: ValueType) -> int:
    """Bytes of a record before compression."""
    value = np.dtype(dtype).itemsize
    if top_k == classes:
        return classes * value
    return top_k * (value + class_dtype(classes).itemsize) + 3 * tail_dtype(dtype).itemsize


def effective_top_k(classes: int, top_k: int, dtype: ValueType) -> int:
    """k, or C where keeping every logit takes no more bytes than k of them with their classes."""
    dense = record_bytes(classes, classes, dtype) <= record_bytes(classes, top_k, dtype)
    return classes if dense else top_k


def encode(logits_BC: torch.Tensor, top_k: int, dtype: ValueType) -> Records:
    """Records of finite teacher logits [B, C], computed where the logits are."""
    z = logits_BC.float()
    relative = z - z.amax(1, keepdim=True)
    if top_k == z.shape[1]:
        dense = _codes(-relative) if dtype == "uint8" else relative
        return Records(logits=_array(dense, dtype))
    top, order = relative.topk(top_k + 1, dim=1)
    kept, classes, next_B1 = top[:, :top_k], order[:, :top_k], top[:, top_k:]
    left = z.shape[1] - top_k
    # Not logsumexp of what a mask leaves: exp takes ten times as long where it meets -inf.
    rest = (relative - next_B1).scatter_(1, classes, -80).exp_()
    at_one = rest.sum(1).log() + next_B1[:, 0]
    mean = relative.scatter(1, classes, 0).sum(1) / left
    variance = (relative - mean[:, None]).scatter_(1, classes, 0).square_().sum(1) / left
    tail = torch.stack([at_one, mean, variance], 1)
    return from_parts(kept, classes, tail, z.shape[1], dtype)


def from_parts(
    kept_BK: torch.Tensor,
    classes_BK: torch.Tensor,
    tail_B3: torch.Tensor,
    num_classes: int,
    dtype: ValueType,
) -> Records:
    """Records of kept logits, falling from 0, of their classes, and of the summary of the rest."""
    if dtype == "uint8":
        kept_BK, tail_B3 = _steps(kept_BK, tail_B3, num_classes - kept_BK.shape[1])
    return Records(
        logits=_array(kept_BK, dtype),
        classes=classes_BK.cpu().numpy().astype(class_dtype(num_classes)),
        tail=_array(tail_B3, dtype),
    )


def decode(records: Records, classes: int) -> Target:
    """The target of each record. Raises TapeCorrupt for a record that no teacher can have given."""
    assert records.logits is not None
    logits = torch.from_numpy(np.ascontiguousarray(records.logits))
    if records.classes is None or records.tail is None:
        logits = -_gaps(logits) if logits.dtype == torch.uint8 else logits.float()
        _require_largest(logits.amax(1))
        return Target(logits, None, None, classes)
    named = torch.from_numpy(records.classes.astype(np.int64))
    if named.numel() and int(named.max()) >= classes:
        raise CacheCorrupt(f"a record names class {int(named.max())} of {classes}")
    tail = torch.from_numpy(np.ascontiguousarray(records.tail))
    _require_largest(logits[:, 0])
    if logits.dtype == torch.uint8:
        logits, tail = _from_steps(logits, tail, classes - logits.shape[1])
    elif not bool(tail.isfinite().all()):
        raise CacheCorrupt("a record has no tail, so it was never written")
    return Target(logits.float(), named, tail.float(), classes)


def error_bound(gaps: torch.Tensor, dtype: ValueType) -> torch.Tensor:
    """The largest error of kept logits, or of a tail's numbers, by their gap below the largest."""
    if dtype == "float32":
        return torch.zeros_like(gaps)
    return gaps * 2**-11 + 2**-25 if dtype == "float16" else gaps.sqrt() / 31.8 + 0.0008


def limit(dtype: ValueType) -> float:
    """The largest gap that a record holds."""
    return GAP_LIMIT if dtype == "uint8" else float(np.finfo(dtype).max)


def dense_target(logits_BC: torch.Tensor) -> Target:
    """The target of live teacher logits: what a dense float32 record of them decodes to."""
    z = logits_BC.float()
    return Target(z - z.amax(1, keepdim=True), None, None, z.shape[1])


def _require_largest(largest_B: torch.Tensor) -> None:
    if not bool((largest_B == 0).all()):
        raise CacheCorrupt("a record has no largest logit, so it was never written")


def _codes(gaps: torch.Tensor) -> torch.Tensor:
    """int16, 0 to CODES."""
    return (gaps / GAP_LIMIT).sqrt().mul(CODES).add(0.5).clamp(max=CODES).to(torch.int16)


def _gaps(codes: torch.Tensor) -> torch.Tensor:
    # index_select reads a table 15 times as fast as indexing does.
    return _GAPS.index_select(0, codes.reshape(-1).int()).view(codes.shape)


def _steps(
    kept_BK: torch.Tensor, tail_B3: torch.Tensor, left: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Kept logits and tail as steps [B, K] and [B, 3] of a staircase."""
    at_one, mean, variance = tail_B3.unbind(1)
    # Each lies below the one before: the largest of the tail, its log-mean-exp, its mean. Rounding
    # may think otherwise.
    tail_gaps = torch.stack([math.log(left) - at_one, -mean], 1).clamp(min=0)
    stairs = torch.cat([_codes(-kept_BK), _codes(tail_gaps)], 1).cummax(1).values
    steps = stairs.diff(dim=1, prepend=stairs[:, :1])
    deviation = _codes(variance.clamp(min=0).sqrt())
    k = kept_BK.shape[1]
    return steps[:, :k], torch.cat([steps[:, k:], deviation[:, None]], 1)


def _from_steps(
    steps_BK: torch.Tensor, tail_B3: torch.Tensor, left: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The reverse of `_steps`. Raises TapeCorrupt for a staircase that ends below the last code."""
    codes_BK = steps_BK.cumsum(1, dtype=torch.int32)
    tail_B2 = codes_BK[:, -1:] + tail_B3[:, :2].cumsum(1, dtype=torch.int32)
    if tail_B2.numel() and int(tail_B2[:, 1].max()) > CODES:
        raise CacheCorrupt("a record's steps lead below the last code, so it was never written")
    mean_exp, mean, deviation = _gaps(torch.cat([tail_B2, tail_B3[:, 2:]], 1)).unbind(1)
    return -_gaps(codes_BK), torch.stack([math.log(left) - mean_exp, -mean, deviation.square()], 1)


def _array(values: torch.Tensor, dtype: ValueType) -> NDArray[np.generic]:
    array = values.cpu().numpy()
    if dtype == "float16":
        array = array.clip(-limit(dtype), limit(dtype))
    return np.ascontiguousarray(array.astype(dtype))
