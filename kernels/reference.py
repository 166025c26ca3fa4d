"""The distillation losses in plain PyTorch: the definition that any faster form has to match.

Notation, for one row: z student logits, t teacher logits, T temperature, q = softmax(z / T),
p = softmax(t / T). Every loss is T^2 KL(p || q), so that its gradient keeps its scale as T changes
(Hinton et al. 2015, section 2). Computation is in float32, or in float64 when the student's logits
are; the maximum is subtracted before scaling by 1/T, so large logits lose nothing. A class with
p = 0 contributes nothing, even where q = 0.

`rows` is the whole definition, one number for each row; `reduce` is their mean or sum. A loss with
labels is (1 - a) of it plus a times `label_cross_entropy`, with the same row weights and reduction.
"""

from __future__ import annotations

import math
from typing import Literal

import torch

from kdcache.kernels.problem import Problem, Tail

Reduction = Literal["mean", "sum", "none"]


def rows(problem: Problem) -> torch.Tensor:
    """w T^2 KL of each row [B]; w is its row weight, T the temperature."""
    student_BC, values, class_ids_BK, tail_values, row_weights_B, temperature, tail, _ = problem
    if class_ids_BK is None:
        loss_B = dense_kl(student_BC, values, temperature)
    else:
        log_p_BK, log_tail_B = values, tail_values
        if not problem.tempered:
            rest = None if tail == "renormalise" else tail_values
            log_p_BK, log_tail_B = temper(values, rest, student_BC.shape[1], temperature)
        loss_B = sparse_kl(student_BC, class_ids_BK, log_p_BK, log_tail_B, temperature, tail)
    return weighted(loss_B, row_weights_B)


def weighted(loss_B: torch.Tensor, row_weights_B: torch.Tensor | None) -> torch.Tensor:
    return loss_B if row_weights_B is None else loss_B * row_weights_B.to(loss_B.dtype)


def reduce(loss_B: torch.Tensor, reduction: Reduction) -> torch.Tensor:
    """Mean over the rows (not over their weights; 0 of no rows), sum, or the rows themselves."""
    if reduction == "none":
        return loss_B
    return loss_B.sum() / (max(len(loss_B), 1) if reduction == "mean" else 1)


def label_cross_entropy(student_BC: torch.Tensor, labels_B: torch.Tensor) -> torch.Tensor:
    """-log softmax(z)[label] of each row [B], at T = 1.

    0 where the label is negative: the row has none. NaN, with a gradient of NaN for the whole row,
    where the label is C or more.
    """
    wrong_B = labels_B >= student_BC.shape[1]
    index_B = labels_B.clamp(min=0).masked_fill(wrong_B, 0).long()
    ce_B = -log_softmax(student_BC, 1.0).gather(1, index_B[:, None])[:, 0]
    ce_B = ce_B * torch.ones_like(ce_B).masked_fill(wrong_B, torch.nan)
    return torch.where(labels_B < 0, torch.zeros_like(ce_B), ce_B)


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
    class_ids_BK: torch.Tensor,
    log_p_BK: torch.Tensor,
    log_tail_B: torch.Tensor | None,
    temperature: float,
    tail: Tail = "bucket",
) -> torch.Tensor:
    """T^2 KL of each row [B] when the teacher names only K classes and the mass r of the others.

    log_p_BK and log_tail_B are log-probabilities at temperature T; no tail means r = 0. An entry
    with log p = -inf names no class: it pads a row that has fewer than K. No class is named twice.
    What is assumed of the classes that are not named:

    bucket       nothing: they are one outcome, sum_K p (log p - log q) + r (log r - log Q)
                 with Q the student's mass there. A lower bound of the dense loss.
    uniform      each has an equal share of r
    renormalise  they have none, and p is divided by its sum
    none         they are left out, and p stays as it is (unbiased sparse samples)
    """
    log_q_BC = log_softmax(student_BC, temperature)
    class_ids_BK = class_ids_BK.long()
    log_p = log_p_BK.to(log_q_BC.dtype)
    live = log_p > -torch.inf
    if tail == "renormalise":
        log_p = log_p - log_p.logsumexp(1, keepdim=True)
    loss = _cross(log_p, log_q_BC.gather(1, class_ids_BK)).sum(1)
    if log_tail_B is not None and tail in ("bucket", "uniform"):
        count = torch.zeros_like(log_q_BC).scatter_add(1, class_ids_BK, live.to(log_q_BC.dtype))
        named = count > 0
        left = (~named).sum(1)
        log_r = log_tail_B.to(log_q_BC.dtype).masked_fill(left == 0, -torch.inf)
        # A row whose tail has no mass must not see the student's, which may be impossible there.
        empty = (log_r.exp() == 0)[:, None]
        if tail == "bucket":
            rest = log_q_BC.masked_fill(named, -torch.inf).masked_fill(empty, 0).logsumexp(1)
            loss = loss + _cross(log_r, rest)
        else:
            log_u = (log_r - left.clamp(min=1).to(log_r.dtype).log())[:, None]
            each = _cross(log_u.expand_as(log_q_BC), log_q_BC)
            loss = loss + each.masked_fill(named | empty, 0).sum(1)
    return temperature**2 * loss


def _cross(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """p (log p - log q), and 0 where p is 0. A NaN is NaN, and so is its gradient."""
    p = log_p.exp()
    # The inner `where` keeps infinities out of the gradient of the branch that is not taken.
    named = p != 0
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
