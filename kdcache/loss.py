"""The distillation loss of a batch: student logits against a `Target`.

Sole importer of `kdcache.kernels`. Works in any training loop:

    loss = distillation_loss(student(x), target, temperature=2.0)
"""

from __future__ import annotations

import math

import torch

from kdcache.errors import UsageError
from kdcache.kernels import reference
from kdcache.kernels.reference import Tail
from kdcache.records import Target


def distillation_loss(
    logits_BC: torch.Tensor, target: Target, *, temperature: float = 1.0, tail: Tail = "bucket"
) -> torch.Tensor:
    """Mean over the batch of T^2 KL(target || softmax(logits / T)): a scalar.

    Raises UsageError when the class counts differ, when T is not positive, or when T < 1 is asked
    of a target with a tail (its summary holds for T >= 1).
    """
    return distillation_losses(logits_BC, target, temperature=temperature, tail=tail).mean()


def distillation_losses(
    logits_BC: torch.Tensor, target: Target, *, temperature: float = 1.0, tail: Tail = "bucket"
) -> torch.Tensor:
    """The same for each row [B]."""
    if logits_BC.shape[1] != target.num_classes:
        raise UsageError(
            f"the student has {logits_BC.shape[1]} classes, its targets have {target.num_classes}"
        )
    check_temperature(temperature, sparse=target.tail_B3 is not None)
    loss_B: torch.Tensor
    if target.classes_BK is None:
        loss_B = reference.dense_kl(logits_BC, target.logits_BK, temperature)
    else:
        log_p_BK, log_tail_B = log_probabilities(target, temperature)
        loss_B = reference.sparse_kl(
            logits_BC, target.classes_BK, log_p_BK, log_tail_B, temperature, tail
        )
    return loss_B


def log_probabilities(
    target: Target, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The target at T: log-probabilities of its named classes [B, K], and of its tail [B]."""
    log_p_BK, log_tail_B = reference.temper(
        target.logits_BK, target.tail_B3, target.num_classes, temperature
    )
    return log_p_BK, log_tail_B


def check_temperature(temperature: float, *, sparse: bool) -> None:
    """Refuse a temperature at which targets (sparse: with a tail) are not defined."""
    if not temperature > 0:
        raise UsageError(f"temperature must be above 0, not {temperature}")
    if temperature == math.inf:
        raise UsageError("temperature must be finite")
    if sparse and temperature < 1:
        raise UsageError(
            f"temperature must be at least 1 for top-k targets, not {temperature}: a tape made "
            "with --top-k all serves any temperature"
        )
