"""Views as pure functions of (spec, view, sample): order, crop box, flip, pair, mixing weight.

In: a ViewSpec and integers. Out: integers. What stays true: nothing here depends on batch size,
workers, processes, platform or history; `tests/test_views.py` pins golden values, which may change
only together with the view spec's version. This is the definition; `pixels.py` holds the compiled
form that the loader runs, and tests compare the two.

Cost: an order is a sort, about 10 ms for 60,000 samples and 1 s for 1.28 million; all else is
linear in the number of indices given.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.special import betaincinv

from kdcache.errors import UsageError
from kdcache.rng import SAMPLE_BITS, U64, Purpose, below, draw
from kdcache.spec import MAX_VIEWS, ViewSpec

I64 = NDArray[np.int64]

TABLE_ENTRIES = 1024
CROP_ATTEMPTS = 10
MIX_UNIT = 256  # a mixing weight of 256 would be all of the partner; ours go up to half


def order(spec: ViewSpec, view: int, samples: int) -> I64:
    """The sample at each position of a view: a permutation of range(samples), read-only."""
    _check_view(view)
    return _order(spec.seed, view, samples)


@lru_cache(maxsize=2)  # precompute asks once for each shard of a view
def _order(seed: int, view: int, samples: int) -> I64:
    high, low, _, _ = draw(seed, view, np.arange(samples), Purpose.ORDER)
    found = np.argsort((high << np.uint64(32)) | low, kind="stable").astype(np.int64)
    found.flags.writeable = False
    return found


def position(spec: ViewSpec, view: int, samples: int) -> I64:
    """The position of each sample in a view: the inverse of `order`."""
    inverse = np.empty(samples, np.int64)
    inverse[order(spec, view, samples)] = np.arange(samples)
    return inverse


def tokens(view: int, samples: ArrayLike) -> NDArray[np.uint64]:
    """What travels through FFCV in the place of a sample's index: view << 40 | sample."""
    _check_view(view)
    return np.ascontiguousarray(np.uint64(view << SAMPLE_BITS) | np.asarray(samples, np.uint64))


def _check_view(view: int) -> None:
    if not 0 <= view < MAX_VIEWS:
        raise UsageError(f"a view must be 0 to {MAX_VIEWS - 1}, not {view}")


@lru_cache(maxsize=1)
def aspect_ratios() -> NDArray[np.float64]:
    """1024 log-uniform aspect ratios of 3/4 to 4/3 (width by height).

    Rounded to 2^-20, so that no platform's last bit of exp or log reaches a crop box.
    """
    q = (np.arange(TABLE_ENTRIES) + 0.5) / TABLE_ENTRIES
    return np.round((3 / 4) ** (1 - 2 * q) * 2.0**20) / 2.0**20


@lru_cache(maxsize=16)
def mix_weights(alpha: float) -> NDArray[np.int64]:
    """1024 equally likely weights of the partner in 1/256: quantiles of min(b, 1-b), b ~ Beta.

    At most 128: a position shows mostly its own sample, as in the paper's code, which takes
    max(b, 1-b) for it. For alpha = 0 the table is all zeros.
    """
    if alpha == 0:
        return np.zeros(TABLE_ENTRIES, np.int64)
    q = (np.arange(TABLE_ENTRIES) + 0.5) / TABLE_ENTRIES
    quantiles: NDArray[np.float64] = betaincinv(alpha, alpha, q / 2)
    return np.round(quantiles * MIX_UNIT).astype(np.int64)


def crop_boxes(
    spec: ViewSpec, view: int, samples: ArrayLike, heights: ArrayLike, widths: ArrayLike
) -> I64:
    """The crop of each sample as rows of (top, left, height, width), in pixels of the image."""
    s = np.asarray(samples, np.uint64)
    h_image = np.broadcast_to(np.asarray(heights, np.int64), s.shape)
    w_image = np.broadcast_to(np.asarray(widths, np.int64), s.shape)
    if spec.crop == "inception":
        return _inception_boxes(spec, view, s, h_image, w_image)
    if spec.crop == "whole":
        return np.stack([np.zeros_like(h_image), np.zeros_like(w_image), h_image, w_image], 1)
    side = np.floor(np.sqrt(spec.min_area) * np.minimum(h_image, w_image) + 0.5).astype(np.int64)
    side = np.maximum(side, 1)
    if spec.crop == "center":
        return np.stack([(h_image - side) // 2, (w_image - side) // 2, side, side], 1)
    _, _, r2, r3 = draw(spec.seed, view, s, Purpose.CROP)
    top, left = below(r2, h_image - side + 1), below(r3, w_image - side + 1)
    return np.stack([top.astype(np.int64), left.astype(np.int64), side, side], 1)


def _inception_boxes(spec: ViewSpec, view: int, s: U64, h_image: I64, w_image: I64) -> I64:
    boxes = np.zeros((len(s), 4), np.int64)
    todo = np.ones(len(s), bool)
    ratios = aspect_ratios()
    for attempt in range(CROP_ATTEMPTS):
        r0, r1, r2, r3 = draw(spec.seed, view, s, Purpose.CROP, attempt)
        share = spec.min_area + r0.astype(np.float64) * 2.0**-32 * (1 - spec.min_area)
        area = (h_image * w_image).astype(np.float64) * share
        ratio = ratios[below(r1, TABLE_ENTRIES).astype(np.int64)]
        w = np.floor(np.sqrt(area * ratio) + 0.5).astype(np.int64)
        h = np.floor(np.sqrt(area / ratio) + 0.5).astype(np.int64)
        hit = todo & (w >= 1) & (w <= w_image) & (h >= 1) & (h <= h_image)
        top = below(r2, np.where(hit, h_image - h + 1, 1)).astype(np.int64)
        left = below(r3, np.where(hit, w_image - w + 1, 1)).astype(np.int64)
        boxes[hit] = np.stack([top, left, h, w], 1)[hit]
        todo &= ~hit
    # No attempt fitted: the largest central box whose aspect ratio is allowed.
    w = np.minimum(w_image, np.floor(h_image * ratios[-1] + 0.5).astype(np.int64))
    h = np.minimum(h_image, np.floor(w_image / ratios[0] + 0.5).astype(np.int64))
    central = np.stack([(h_image - h) // 2, (w_image - w) // 2, h, w], 1)
    boxes[todo] = central[todo]
    return boxes


def flips(spec: ViewSpec, view: int, samples: ArrayLike) -> NDArray[np.bool_]:
    """Whether each sample is mirrored left to right."""
    if not spec.flip:
        return np.zeros(np.shape(samples), bool)
    return (draw(spec.seed, view, samples, Purpose.FLIP)[0] >> np.uint64(31)).astype(bool)


def pair_weights(
    spec: ViewSpec, view: int, positions: ArrayLike, samples: int
) -> NDArray[np.int16]:
    """The partner's weight in 1/256 at each position of a view; 0 where nothing is mixed.

    Positions 2j and 2j + 1 are partners and share the draw of pair j, so the pair shows
    (1-w) a + w b and w a + (1-w) b. The last position of an odd count has no partner.
    """
    p = np.asarray(positions, np.int64)
    table = mix_weights(spec.mixup)
    word = draw(spec.seed, view, p >> 1, Purpose.MIX)[0]
    weight = table[below(word, TABLE_ENTRIES).astype(np.int64)]
    return np.where(p ^ 1 < samples, weight, 0).astype(np.int16)


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
