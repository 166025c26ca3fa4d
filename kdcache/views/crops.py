"""The crop box of each sample, in integers."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kdcache.views.philox import I64, U64, Purpose, below, draw
from kdcache.views.spec import ViewSpec

TABLE_ENTRIES = 1024
CROP_ATTEMPTS = 10  # as in torchvision's RandomResizedCrop, like the range of aspect ratios


@lru_cache(maxsize=1)
def aspect_ratios() -> NDArray[np.float64]:
    """1024 log-uniform aspect ratios of 3/4 to 4/3 (width by height).

    Rounded to 2^-20, so that no platform's last bit of exp or log reaches a crop box.
    """
    q = (np.arange(TABLE_ENTRIES) + 0.5) / TABLE_ENTRIES
    return np.round((3 / 4) ** (1 - 2 * q) * 2.0**20) / 2.0**20


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
    # floor(x + 0.5) rounds halves up; np.round would take them to even numbers.
    side = np.floor(np.sqrt(spec.min_scale) * np.minimum(h_image, w_image) + 0.5).astype(np.int64)
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
        share = spec.min_scale + r0.astype(np.float64) * 2.0**-32 * (1 - spec.min_scale)
        # Multiplication, division, square root and rounding alone: IEEE 754 makes these exact, and
        # so the box is the same on every platform.
        area = (h_image * w_image).astype(np.float64) * share
        ratio = ratios[below(r1, TABLE_ENTRIES).astype(np.int64)]
        w = np.floor(np.sqrt(area * ratio) + 0.5).astype(np.int64)
        h = np.floor(np.sqrt(area / ratio) + 0.5).astype(np.int64)
        # The words depend on the attempt's number, so it does not matter who needs this attempt.
        hit = todo & (w >= 1) & (w <= w_image) & (h >= 1) & (h <= h_image)
        top = below(r2, np.where(hit, h_image - h + 1, 1)).astype(np.int64)
        left = below(r3, np.where(hit, w_image - w + 1, 1)).astype(np.int64)
        boxes[hit] = np.stack([top, left, h, w], 1)[hit]
        # Every attempt is drawn for every sample, but the first one that fits counts.
        todo &= ~hit
    # No attempt fitted: the largest central box whose aspect ratio is allowed.
    w = np.minimum(w_image, np.floor(h_image * ratios[-1] + 0.5).astype(np.int64))
    h = np.minimum(h_image, np.floor(w_image / ratios[0] + 0.5).astype(np.int64))
    central = np.stack([(h_image - h) // 2, (w_image - w) // 2, h, w], 1)
    boxes[todo] = central[todo]
    return boxes
