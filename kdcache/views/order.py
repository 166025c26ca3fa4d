"""Views as pure functions of (spec, view, sample): order, crop box, flip, pair, mixing weight.

In: a ViewSpec and integers. Out: integers. What stays true: nothing here depends on batch size,
workers, processes, platform or history; `tests/test_views.py` pins golden values, which may change
only together with the view spec's version. This is the definition; `data/render.py` holds the
compiled form that the loader runs, and tests compare the two.

Cost: an order is a sort, about 10 ms for 60,000 samples and 1 s for 1.28 million; all else is
linear in the number of indices given.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kdcache.errors import UsageError
from kdcache.views.philox import I64, SAMPLE_BITS, Purpose, draw
from kdcache.views.spec import MAX_VIEWS, ViewSpec


def view_order(spec: ViewSpec, view: int, num_samples: int) -> I64:
    """The sample at each position of a view: a permutation of range(samples), read-only."""
    _check_view(view)
    return _order(spec.seed, view, num_samples)


@lru_cache(maxsize=2)  # precompute asks once for each shard of a view
def _order(seed: int, view: int, num_samples: int) -> I64:
    high, low, _, _ = draw(seed, view, np.arange(num_samples), Purpose.ORDER)
    # A sort by 64-bit draws: position and sample follow from the draws alone, in any library.
    found = np.argsort((high << np.uint64(32)) | low, kind="stable").astype(np.int64)
    # The cache gives the same array to every caller.
    found.flags.writeable = False
    return found


def view_positions(spec: ViewSpec, view: int, num_samples: int) -> I64:
    """The position of each sample in a view: the inverse of `order`."""
    inverse = np.empty(num_samples, np.int64)
    inverse[view_order(spec, view, num_samples)] = np.arange(num_samples)
    return inverse


def view_tokens(view: int, samples: ArrayLike) -> NDArray[np.uint64]:
    """What travels through FFCV in the place of a sample's index: view << 40 | sample."""
    _check_view(view)
    return np.ascontiguousarray(np.uint64(view << SAMPLE_BITS) | np.asarray(samples, np.uint64))


def _check_view(view: int) -> None:
    if not 0 <= view < MAX_VIEWS:
        raise UsageError(f"a view must be 0 to {MAX_VIEWS - 1}, not {view}")
