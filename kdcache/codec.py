"""Teacher logits to records and back.

In: logits [B, C]. Out: `Records`, NumPy arrays as they lie on the tape; `decode` makes a `Target`
of them. A record keeps the k largest logits relative to the largest one, their classes, and three
numbers for the tail, from which the target at any temperature T >= 1 follows
(`kernels/reference.py`, `tail_log_mass`). With k = C it keeps all relative logits in class order.

Error of a kept logit with gap g below the largest: none for float32; at most g 2^-11 + 2^-25 for
float16, which saturates at a gap of 65,504; at most sqrt(g) / 31.8 + 0.0008 for uint8, which
saturates at 64: its steps grow with the gap, as the probability that they blur shrinks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from kdcache.errors import TapeCorrupt
from kdcache.records import Target
from kdcache.spec import TapeSpec, ValueType

GAP_LIMIT = 64.0
CODES = 255
_GAPS = torch.tensor([GAP_LIMIT * (q / CODES) ** 2 for q in range(CODES + 1)], dtype=torch.float32)


@dataclass(frozen=True)
class Records:
    """Rows of a tape; what a kind of tape does not have is None.

    logits   [B, K] of the tape's dtype (uint8: a code for the gap; 0 is the largest logit)
    classes  [B, K] uint16 or uint32
    tail     [B, 3] float16 or float32
    counts   [B, K] uint8: how often each class was drawn; 0 where fewer than K were
    """

    logits: NDArray[np.generic] | None = None
    classes: NDArray[np.generic] | None = None
    tail: NDArray[np.generic] | None = None
    counts: NDArray[np.generic] | None = None

    def arrays(self) -> dict[str, NDArray[np.generic]]:
        """Those that are there, by name."""
        found = {name: getattr(self, name) for name in ("logits", "classes", "tail", "counts")}
        return {name: array for name, array in found.items() if array is not None}

    def __len__(self) -> int:
        return len(next(iter(self.arrays().values())))

    def __getitem__(self, rows: slice | NDArray[np.int64]) -> Records:
        return Records(**{name: array[rows] for name, array in self.arrays().items()})

    @staticmethod
    def concatenate(parts: list[Records]) -> Records:
        if len(parts) == 1:
            return parts[0]
        joined = {
            name: np.concatenate([part.arrays()[name] for part in parts])
            for name in parts[0].arrays()
        }
        return Records(**joined)


def class_dtype(classes: int) -> np.dtype[np.generic]:
    return np.dtype(np.uint16 if classes <= 1 << 16 else np.uint32)


def tail_dtype(dtype: ValueType) -> np.dtype[np.generic]:
    return np.dtype(np.float32 if dtype == "float32" else np.float16)


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
        return Records(_quantise(relative, dtype), None, None)
    kept, classes = relative.topk(top_k, dim=1)
    named = torch.zeros_like(relative, dtype=torch.bool).scatter_(1, classes, True)
    left = z.shape[1] - top_k
    at_one = relative.masked_fill(named, -torch.inf).logsumexp(1)
    mean = relative.masked_fill(named, 0).sum(1) / left
    variance = (relative - mean[:, None]).square_().masked_fill_(named, 0).sum(1) / left
    tail = torch.stack([at_one, mean, variance], 1)
    return Records(
        _quantise(kept, dtype),
        classes.cpu().numpy().astype(class_dtype(z.shape[1])),
        _clip_half(tail, tail_dtype(dtype)),
    )


def decode(records: Records, classes: int) -> Target:
    """The target of each record. Raises TapeCorrupt for a record that no teacher can have given."""
    assert records.logits is not None
    values = torch.from_numpy(np.ascontiguousarray(records.logits))
    logits = -_GAPS[values.int()] if values.dtype == torch.uint8 else values.float()
    if not bool((logits.amax(1) == 0).all()):
        raise TapeCorrupt("a record has no largest logit, so it was never written")
    if records.classes is None or records.tail is None:
        return Target(logits, None, None, classes)
    named = torch.from_numpy(records.classes.astype(np.int64))
    if int(named.max()) >= classes:
        raise TapeCorrupt(f"a record names class {int(named.max())} of {classes}")
    tail = torch.from_numpy(records.tail.astype(np.float32))
    if not bool(tail.isfinite().all()):
        raise TapeCorrupt("a record has no tail, so it was never written")
    return Target(logits, named, tail, classes)


def dense_target(logits_BC: torch.Tensor) -> Target:
    """The target of live teacher logits: what a dense float32 record of them decodes to."""
    z = logits_BC.float()
    return Target(z - z.amax(1, keepdim=True), None, None, z.shape[1])


def _quantise(relative: torch.Tensor, dtype: ValueType) -> NDArray[np.generic]:
    if dtype == "uint8":
        code = (-relative / GAP_LIMIT).sqrt().mul(CODES).add(0.5).clamp(max=CODES)
        return code.to(torch.uint8).cpu().numpy()
    return _clip_half(relative, np.dtype(dtype))


def _clip_half(values: torch.Tensor, dtype: np.dtype[np.generic]) -> NDArray[np.generic]:
    array = values.cpu().numpy()
    if dtype == np.float16:
        limit = float(np.finfo(np.float16).max)
        array = array.clip(-limit, limit)
    return array.astype(dtype)


def spec_record_bytes(spec: TapeSpec) -> int:
    return record_bytes(spec.classes, spec.top_k, spec.dtype)
