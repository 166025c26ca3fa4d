"""Records of other logit caches, byte for byte as they document them, and what they stand for.

A layout packs teacher logits [B, C] into bytes [B, N] and unpacks them into the named classes and
their log-probabilities at T = 1. None of them says more about the tail than the mass that is left
over, which their losses spread evenly, and none keeps logits, so another temperature means
tempering that even tail too (`Named.at`).

tinyvit     int32 seed, k int16 classes, k float16 probabilities: 4 + 4k bytes
fkd         4 crop coordinates and k pairs (class, probability), all float32 or all float16, and a
            byte for the flip: 17 + 8k or 9 + 4k. float16 holds class numbers up to 2048 only.
distillkit  the log-probabilities of the first classes as bfloat16, the others as a least-squares
            fit over the rank, of powers and a square root, with float32 coefficients; class
            numbers of ceil(log2 C) bits. The documented choices are (16, powers 0 to 4) and, to
            save space, (1, powers 0 and 1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

# Where rounding leaves less than nothing for the tail. Their losses would make it negative or
# infinite; this is kinder to them.
LEAST_TAIL = 1e-6

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Named:
    """Log-probabilities of named classes at T = 1, float64; the rest is for all others alike."""

    class_ids_BK: torch.Tensor
    log_p_BK: torch.Tensor
    num_classes: int

    def at(self, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities at T of the named classes [B, K] and of the whole tail [B]."""
        left = self.num_classes - self.class_ids_BK.shape[1]
        rest_B = (1 - self.log_p_BK.exp().sum(1)).clamp(min=LEAST_TAIL)
        log_p_BK = self.log_p_BK / temperature
        log_tail_B = (rest_B / left).log() / temperature + math.log(left)
        total_B = torch.logaddexp(log_p_BK.logsumexp(1), log_tail_B)
        return log_p_BK - total_B[:, None], log_tail_B - total_B


class Layout(Protocol):
    def pack(self, logits_BC: torch.Tensor, k: int) -> Bytes: ...

    def unpack(self, rows: Bytes, k: int, num_classes: int) -> Named: ...


def _top(logits_BC: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and classes of the k largest, falling."""
    log_p_BK, class_ids_BK = torch.log_softmax(logits_BC.float(), 1).topk(k, dim=1)
    return log_p_BK, class_ids_BK


def _bytes(array: NDArray[np.generic]) -> Bytes:
    return np.ascontiguousarray(array).view(np.uint8).reshape(len(array), -1)


def _log(probabilities: NDArray[np.generic]) -> torch.Tensor:
    """A probability that rounds to 0 stands for half of the least that float16 has."""
    return torch.from_numpy(probabilities.astype(np.float64)).clamp(min=2.0**-25).log()


class TinyViT:
    def pack(self, logits_BC: torch.Tensor, k: int) -> Bytes:
        log_p_BK, class_ids_BK = _top(logits_BC, k)
        seeds_B = np.zeros((len(logits_BC), 1), np.int32)
        values_BK = log_p_BK.exp().numpy().astype(np.float16)
        parts = (seeds_B, class_ids_BK.numpy().astype(np.int16), values_BK)
        return np.concatenate([_bytes(part) for part in parts], axis=1)

    def unpack(self, rows: Bytes, k: int, num_classes: int) -> Named:
        class_ids_BK = rows[:, 4 : 4 + 2 * k].copy().view(np.int16).astype(np.int64)
        values_BK = rows[:, 4 + 2 * k :].copy().view(np.float16)
        return Named(torch.from_numpy(class_ids_BK), _log(values_BK), num_classes)


@dataclass(frozen=True)
class FKD:
    half: bool

    @property
    def dtype(self) -> np.dtype[np.floating]:
        return np.dtype(np.float16 if self.half else np.float32)

    def pack(self, logits_BC: torch.Tensor, k: int) -> Bytes:
        log_p_BK, class_ids_BK = _top(logits_BC, k)
        flips_B = np.zeros((len(logits_BC), 1), np.uint8)
        coords_B4 = np.zeros((len(logits_BC), 4), self.dtype)
        pairs = torch.stack([class_ids_BK.float(), log_p_BK.exp()], 2).numpy().astype(self.dtype)
        parts = (flips_B, coords_B4, pairs.reshape(len(pairs), -1))
        return np.concatenate([_bytes(part) for part in parts], axis=1)

    def unpack(self, rows: Bytes, k: int, num_classes: int) -> Named:
        start = 1 + 4 * self.dtype.itemsize
        pairs = rows[:, start:].copy().view(self.dtype).reshape(-1, k, 2)
        class_ids_BK = torch.from_numpy(pairs[..., 0].astype(np.int64))
        return Named(class_ids_BK, _log(pairs[..., 1]), num_classes)


@dataclass(frozen=True)
class DistillKit:
    """exact: how many log-probabilities are kept as they are; powers: the fit has 0 to this."""

    exact: int
    powers: int

    def pack(self, logits_BC: torch.Tensor, k: int) -> Bytes:
        log_p_BK, class_ids_BK = _top(logits_BC, k)
        exact = min(self.exact, k)
        head = log_p_BK[:, :exact].bfloat16().view(torch.int16).numpy()
        bits = _class_bits(logits_BC.shape[1])
        planes = (class_ids_BK.numpy()[:, :, None] >> np.arange(bits)) & 1
        ids = np.packbits(planes.reshape(len(planes), -1).astype(np.uint8), axis=1)
        parts = [_bytes(head), ids]
        if exact < k:
            terms_NJ = self._terms(k - exact)
            fit_BJ = log_p_BK[:, exact:].double() @ torch.linalg.pinv(terms_NJ).T
            parts.insert(1, _bytes(fit_BJ.float().numpy()))
        return np.concatenate(parts, axis=1)

    def unpack(self, rows: Bytes, k: int, num_classes: int) -> Named:
        exact, bits = min(self.exact, k), _class_bits(num_classes)
        head = torch.from_numpy(rows[:, : 2 * exact].copy().view(np.int16)).view(torch.bfloat16)
        log_p_BK, end = head.double(), 2 * exact
        if exact < k:
            width = 4 * (self.powers + 2)
            fit_BJ = torch.from_numpy(rows[:, end : end + width].copy().view(np.float32))
            fitted = (fit_BJ.double() @ self._terms(k - exact).T).clamp(max=0)
            log_p_BK, end = torch.cat([log_p_BK, fitted], 1), end + width
        planes = np.unpackbits(rows[:, end:], axis=1, count=k * bits).reshape(-1, k, bits)
        class_ids_BK = planes.astype(np.int64) @ (1 << np.arange(bits))
        return Named(torch.from_numpy(class_ids_BK), log_p_BK, num_classes)

    def _terms(self, ranks: int) -> torch.Tensor:
        """[N, J]: powers and the square root of the rank, scaled to [0, 1]."""
        t = torch.linspace(0, 1, ranks, dtype=torch.float64)
        return torch.stack([*(t**p for p in range(self.powers + 1)), t.sqrt()], 1)


def _class_bits(num_classes: int) -> int:
    return max(1, (num_classes - 1).bit_length())


LAYOUTS: dict[str, Layout] = {
    "TinyViT": TinyViT(),
    "FKD, float32": FKD(half=False),
    "FKD, float16": FKD(half=True),
    "DistillKit": DistillKit(exact=16, powers=4),
    "DistillKit, budget": DistillKit(exact=1, powers=1),
}
