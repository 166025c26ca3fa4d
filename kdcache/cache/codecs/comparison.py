"""Records of logits against recomputed ones: what differs, beside what rounding allows."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from kdcache.batch import Target
from kdcache.cache.codecs import values
from kdcache.cache.codecs.protocol import Allowance, RowErrors, Rows
from kdcache.cache.codecs.values import ValueType
from kdcache.cache.records import Records
from kdcache.losses.distillation import distillation_losses

if TYPE_CHECKING:
    from kdcache.cache.codecs.protocol import RecordCoder

# What is left of 0 in float32.
LEAST_KL = 1e-6


def compare_logits(
    codec: RecordCoder,
    dtype: ValueType,
    records: Records,
    live_BC: torch.Tensor,
    allowance: Allowance,
    rows: Rows,
) -> RowErrors:
    """`RecordCodec.compare` of records that keep logits, and perhaps a tail, as `dtype`."""
    num_classes = live_BC.shape[1]
    target = codec.decode(records, num_classes)
    assert isinstance(target, Target)
    relative_BC = live_BC - live_BC.amax(1, keepdim=True)
    arithmetic_B1 = allowance.largest_B[:, None]

    # By how much the recomputed logit of the record's class is below the largest: a near tie may
    # swap the two.
    lag_B1 = -relative_BC.gather(1, target.top_class()[:, None])
    agrees_B1 = lag_B1 <= arithmetic_B1 + codec.error_bound(lag_B1)

    kl_B = distillation_losses(live_BC, target)
    # What the codec alone makes of these logits. Errors e of the logits give a KL of about
    # e^2 / 2, so that of two errors is at most twice the sum of each one's.
    again = codec.decode(codec.encode(live_BC, rows), num_classes)
    assert isinstance(again, Target)
    codec_B = distillation_losses(live_BC, again).clamp(min=0)
    allowed_B = 2 * codec_B + allowance.typical_B.square() + LEAST_KL

    live_BK, stored_BK, rounding_BK = relative_BC, target.logits_BK.double(), -relative_BC
    if target.class_ids_BK is not None and target.tail_B3 is not None:
        left = num_classes - target.class_ids_BK.shape[1]
        kept_BK = relative_BC.gather(1, target.class_ids_BK)
        live_BK = torch.cat([kept_BK, _tail_of(relative_BC, target.class_ids_BK)], 1)
        stored_BK = torch.cat([stored_BK, _tail_numbers(target.tail_B3.double(), left)], 1)
        rounding_BK = live_BK.abs()
        if dtype != "uint8":  # the others store the log-sum-exp
            # Rounding is relative to the number that is stored, which is larger by log(left).
            rounding_BK[:, -3] += math.log(left)
    # Saturated logits are compared with what the codec can hold.
    limit = values.gap_limit(dtype)
    gap_BK = (stored_BK - live_BK.clamp(min=-limit, max=limit)).abs()
    allowed_BK = arithmetic_B1 + codec.error_bound(rounding_BK) + LEAST_KL
    return RowErrors(
        agrees_B1[:, 0].double(), kl_B, allowed_B, gap_BK.amax(1), (gap_BK / allowed_BK).amax(1)
    )


def _tail_of(relative_BC: torch.Tensor, class_ids_BK: torch.Tensor) -> torch.Tensor:
    """Log-mean-exp, mean and standard deviation [B, 3] of all logits but those of some classes."""
    named_BC = torch.zeros_like(relative_BC, dtype=torch.bool).scatter_(1, class_ids_BK, True)
    left = relative_BC.shape[1] - class_ids_BK.shape[1]
    tail_BT = relative_BC[~named_BC].view(-1, left)
    log_mean_exp_B = tail_BT.logsumexp(1) - math.log(left)
    return torch.stack([log_mean_exp_B, tail_BT.mean(1), tail_BT.std(1, correction=0)], 1)


def _tail_numbers(tail_B3: torch.Tensor, left: int) -> torch.Tensor:
    """The same three numbers of a target's summary of the tail."""
    at_one_B, mean_B, variance_B = tail_B3.unbind(1)
    return torch.stack([at_one_B - math.log(left), mean_B, variance_B.clamp(min=0).sqrt()], 1)
