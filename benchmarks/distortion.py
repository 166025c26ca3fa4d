"""How far a record's distribution is from the teacher's, and what that is at other sizes.

A curve is a layout at several k: bytes a record, and KL(teacher || record). Between two of its
points log KL is taken as linear in bytes, which is fair since k may be any number in between.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable

import torch

Curve = list[tuple[float, float]]  # (bytes, KL), both falling or rising together


def divergences(
    log_p_BC: torch.Tensor,
    class_ids_BK: torch.Tensor | None,
    log_named_BK: torch.Tensor,
    log_tail_B: torch.Tensor | None,
) -> tuple[float, float]:
    """Mean KL in nats from the teacher's log-probabilities: over all classes, the record's tail
    spread evenly, and over the named classes and the tail as one outcome (what the bucket loss
    sees). A record without classes names all of them."""
    if class_ids_BK is None or log_tail_B is None:
        kl = _kl(log_p_BC, log_named_BK).sum(1).mean().item()
        return kl, kl
    named = torch.zeros_like(log_p_BC, dtype=torch.bool).scatter_(1, class_ids_BK, True)
    rest_BC = log_p_BC.masked_fill(named, -torch.inf)
    rest_B = rest_BC.logsumexp(1)
    bucket_B = _kl(log_p_BC.gather(1, class_ids_BK), log_named_BK).sum(1) + _kl(rest_B, log_tail_B)
    even_B = rest_B - math.log(log_p_BC.shape[1] - class_ids_BK.shape[1])
    shape_B = _kl(rest_BC, even_B[:, None]).masked_fill(named, 0).sum(1)
    return (bucket_B + shape_B).mean().item(), bucket_B.mean().item()


def _kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    return log_p.exp() * (log_p - log_q)


def bytes_at(curve: Curve, kl: float) -> float | None:
    """Bytes at which the curve reaches this KL; None where it does not."""
    points = sorted(curve)
    if points[0][1] <= kl:
        return points[0][0]
    for (b0, kl0), (b1, kl1) in itertools.pairwise(points):
        if kl1 <= kl <= kl0:
            share = math.log(kl0 / kl) / math.log(kl0 / kl1)
            return b0 + share * (b1 - b0)
    return None


def kl_at(curve: Curve, size: float) -> float | None:
    """KL that the curve reaches with this many bytes; None below its least."""
    points = sorted(curve)
    if size < points[0][0]:
        return None
    for (b0, kl0), (b1, kl1) in itertools.pairwise(points):
        if b0 <= size <= b1:
            share = (size - b0) / (b1 - b0)
            return math.exp(math.log(kl0) + share * (math.log(kl1) - math.log(kl0)))
    return points[-1][1]


def least(values: Iterable[float | None]) -> float | None:
    return min((v for v in values if v is not None), default=None)
