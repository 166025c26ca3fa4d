"""The distillation losses in plain PyTorch: the definition that any faster form has to match.

Notation, for one row: z student logits, t teacher logits, T temperature, q = softmax(z / T),
p = softmax(t / T). Every loss is T^2 KL(p || q), so that its gradient keeps its scale as T changes
(Hinton et al. 2015, section 2); rows are returned, the caller averages. Computation is in float32,
or in float64 when the student's logits are; the maximum is subtracted before scaling by 1/T, so
large logits lose nothing. A class with p = 0 contributes nothing, even where q = 0.
"""

from __future__ import annotations

import math
from typing import Literal

import torch

Tail = Literal["bucket", "uniform", "renormalise", "none"]


def log_softmax(logits_BC: torch.Tensor, temperature: float) -> torch.Tensor:
    """log softmax(z / T), in at least float32."""
    z = logits_BC if logits_BC.dtype == torch.float64 else logits_BC.float()
    return torch.log_softmax((z - z.detach().amax(1, keepdim=True)) / temperature, dim=1)


def dense_kl(
    student_BC: torch.Tensor, teacher_BC: torch.Tensor, temperature: float
) -> torch.Tensor:
    """T^2 KL(p || q) of each row [B], from the logits of both [B, C]."""
    log_q = log_softmax(student_BC, temperature)
    log_p = log_softmax(teacher_BC.to(log_q.dtype), temperature)
    return temperature**2 * _cross(log_p, log_q).sum(1)


def sparse_kl(
    student_BC: torch.Tensor,
    classes_BK: torch.Tensor,
    log_p_BK: torch.Tensor,
    log_tail_B: torch.Tensor | None,
    temperature: float,
    tail: Tail = "bucket",
) -> torch.Tensor:
    """T^2 KL of each row [B] when the teacher names only K classes and the mass r of the others.

    log_p_BK and log_tail_B are log-probabilities at temperature T; no tail means r = 0. What is
    assumed of the C - K classes that are not named:

    bucket       nothing: they are one outcome, sum_K p (log p - log q) + r (log r - log Q)
                 with Q the student's mass there. A lower bound of the dense loss.
    uniform      each has r / (C - K)
    renormalise  they have none, and p is divided by its sum
    none         they are left out, and p stays as it is (unbiased sparse samples)
    """
    log_q_BC = log_softmax(student_BC, temperature)
    log_p = log_p_BK.to(log_q_BC.dtype)
    if tail == "renormalise":
        log_p = log_p - log_p.logsumexp(1, keepdim=True)
    log_q = log_q_BC.gather(1, classes_BK)
    loss = _cross(log_p, log_q).sum(1)
    left = student_BC.shape[1] - classes_BK.shape[1]
    if log_tail_B is not None and left > 0 and tail in ("bucket", "uniform"):
        log_r = log_tail_B.to(log_q_BC.dtype)
        # A row whose tail has no mass must not see the student's, which may be impossible there.
        empty_B = log_r.exp() == 0
        if tail == "bucket":
            rest = log_q_BC.scatter(1, classes_BK, -torch.inf).masked_fill(empty_B[:, None], 0)
            loss = loss + _cross(log_r, rest.logsumexp(1))
        else:
            log_u = log_r - math.log(left)
            rest_sum = log_q_BC.sum(1) - log_q.sum(1)
            spread = log_r.exp() * log_u - log_u.exp() * rest_sum
            loss = loss + spread.masked_fill(empty_B, 0)
    return temperature**2 * loss


def _cross(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """p (log p - log q), and 0 where p is 0."""
    p = log_p.exp()
    # The inner `where` keeps infinities out of the gradient of the branch that is not taken.
    named = p > 0
    zero = torch.zeros_like(log_p)
    return p * (torch.where(named, log_p, zero) - torch.where(named, log_q, zero))


def tail_log_mass(tail_B3: torch.Tensor, left: int, inverse_temperature: float) -> torch.Tensor:
    """log sum over the tail of exp(b t), for b = 1/T in (0, 1], from three numbers.

    K(b) = log sum exp(b t) has K(0) = log(left), K'(0) = mean, K''(0) = variance; `tail_B3` holds
    K(1), mean and variance. The cubic through these four facts: exact at b = 1 and as b goes to 0.
    A wide tail bends more than a cubic does, so the value is kept where any K must lie: above its
    tangent at 0 and b K(1), below the chord from 0 to 1.
    """
    at_one, mean, variance = tail_B3.unbind(1)
    b = inverse_temperature
    start = math.log(left)
    cubic = at_one - start - mean - variance / 2
    value = start + b * (mean + b * (variance / 2 + b * cubic))
    lowest = torch.maximum(start + b * mean, b * at_one)
    return torch.minimum(torch.maximum(value, lowest), start + b * (at_one - start))


def temper(
    logits_BK: torch.Tensor, tail_B3: torch.Tensor | None, num_classes: int, temperature: float
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Log-probabilities at T of the named classes [B, K] and of the whole tail [B]."""
    scaled = logits_BK / temperature
    total = scaled.logsumexp(1)
    if tail_B3 is None:
        return scaled - total[:, None], None
    mass = tail_log_mass(tail_B3, num_classes - logits_BK.shape[1], 1 / temperature)
    total = torch.logaddexp(total, mass)
    return scaled - total[:, None], mass - total
