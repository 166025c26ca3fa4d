"""Horizontal flips. The loader runs a compiled form for `ViewSpec.flip` (`data/render.py`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kdcache.views.philox import Purpose, draw


def flip_draws(seed: int, view: int, sample_ids: ArrayLike) -> NDArray[np.bool_]:
    """Whether each sample is flipped, with probability 1/2: the highest bit of its draw."""
    return (draw(seed, view, sample_ids, Purpose.FLIP)[0] >> np.uint64(31)).astype(bool)


@dataclass(frozen=True)
class HorizontalFlip:
    """The definition: half of the samples of a view are reversed from left to right."""

    name: ClassVar[str] = "horizontal_flip"

    def apply(
        self,
        images_BHWC: NDArray[np.uint8],
        *,
        seed: int,
        view: int,
        sample_ids_B: NDArray[np.int64],
    ) -> None:
        flipped = flip_draws(seed, view, sample_ids_B)
        images_BHWC[flipped] = images_BHWC[flipped, :, ::-1].copy()
