"""Pair mixing: the partner's weight, and mixed pixels as integers."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.special import betaincinv

from kdcache.views.crops import TABLE_ENTRIES
from kdcache.views.philox import Purpose, below, draw
from kdcache.views.spec import ViewSpec

MIX_UNIT = 256  # a mixing weight of 256 would be all of the partner; ours go up to half


@lru_cache(maxsize=16)
def mix_weight_table(alpha: float) -> NDArray[np.int64]:
    """1024 equally likely weights of the partner in 1/256: quantiles of min(b, 1-b), b ~ Beta.

    At most 128: a position shows mostly its own sample, as in the paper's code, which takes
    max(b, 1-b) for it. For alpha = 0 the table is all zeros.
    """
    if alpha == 0:
        return np.zeros(TABLE_ENTRIES, np.int64)
    q = (np.arange(TABLE_ENTRIES) + 0.5) / TABLE_ENTRIES
    # q / 2: the lower half of a symmetric distribution is that of min(b, 1 - b).
    quantiles: NDArray[np.float64] = betaincinv(alpha, alpha, q / 2)
    return np.round(quantiles * MIX_UNIT).astype(np.int64)


def pair_mix_weights(
    spec: ViewSpec, view: int, positions: ArrayLike, num_samples: int
) -> NDArray[np.int16]:
    """The partner's weight in 1/256 at each position of a view; 0 where nothing is mixed.

    Positions 2j and 2j + 1 are partners and share the draw of pair j, so the pair shows
    (1-w) a + w b and w a + (1-w) b. The last position of an odd count has no partner.
    """
    p = np.asarray(positions, np.int64)
    table = mix_weight_table(spec.mixup)
    # By the pair's number in the view, not in a batch: any batch size gives the same weights.
    word = draw(spec.seed, view, p >> 1, Purpose.MIX)[0]
    weight = table[below(word, TABLE_ENTRIES).astype(np.int64)]
    # The last of an odd count stays as it is.
    return np.where(p ^ 1 < num_samples, weight, 0).astype(np.int16)


def mix_pairs(images: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Mix rows 2j and 2j + 1 of a uint8 batch [B, ...] by the partner's weights [B] in 1/256.

    x + floor((w (y - x) + 127) / 256): integers that fit 16 bits, because w <= 128, so the result
    is the same to the bit on every device. A last odd row stays as it is. Returns a new tensor.
    """
    paired = len(images) // 2 * 2
    # The size is spelled out: for a single row there is no pair to infer it from.
    x = images[:paired].reshape(paired // 2, 2, math.prod(images.shape[1:])).to(torch.int16)
    w = weights[:paired].reshape(paired // 2, 2, 1)
    mixed = x.flip(1).sub_(x).mul_(w).add_(127).bitwise_right_shift_(8).add_(x)
    out = torch.empty_like(images, memory_format=torch.contiguous_format)
    out[:paired] = mixed.to(torch.uint8).reshape(images[:paired].shape)
    out[paired:] = images[paired:]
    return out
