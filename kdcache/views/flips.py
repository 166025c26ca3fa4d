"""Which samples of a view are flipped."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kdcache.views.philox import Purpose, draw
from kdcache.views.spec import ViewSpec


def flip_draws(spec: ViewSpec, view: int, samples: ArrayLike) -> NDArray[np.bool_]:
    """Whether each sample is mirrored left to right."""
    if not spec.flip:
        return np.zeros(np.shape(samples), bool)
    return (draw(spec.seed, view, samples, Purpose.FLIP)[0] >> np.uint64(31)).astype(bool)
