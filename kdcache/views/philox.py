"""Counter-based draws: Philox4x32-10 (Salmon et al., SC 2011), vectorised in NumPy.

A draw is a pure function of (seed, view, index, purpose, attempt). Each coordinate has a word or
bits of its own in the counter, so no two draws can coincide: seed 1 view 0 is not seed 0 view 1.

    key      seed, low and high 32 bits
    counter  index low | index high (8 bits) + purpose << 16 | view | attempt

`data/render.py` has the same function compiled for one index at a time; tests compare the two.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from numpy.typing import ArrayLike, NDArray

I64 = NDArray[np.int64]
U64 = NDArray[np.uint64]

# The constants of the paper's reference implementation (Random123).
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10

# A token of 64 bits names a view and a sample: 2^40 samples, 2^24 views.
SAMPLE_BITS = 40
VIEW_BITS = 64 - SAMPLE_BITS

_LOW = np.uint64(0xFFFFFFFF)
_32 = np.uint64(32)


class Purpose(IntEnum):
    """What a draw is for: one number for each, never reused."""

    CROP = 1
    FLIP = 2
    ORDER = 3
    MIX = 4
    TARGET = 5
    VERIFY = 6
    SEED = 7
    STEP = 8


def philox(counter: tuple[ArrayLike, ArrayLike, ArrayLike, ArrayLike], key: int) -> tuple[U64, ...]:
    """Four 32-bit words (as uint64) for each counter; the counter's words broadcast."""
    c0, c1, c2, c3 = np.broadcast_arrays(*(np.asarray(c, np.uint64) for c in counter))
    k0, k1 = key & 0xFFFFFFFF, key >> 32
    m0, m1 = np.uint64(MULTIPLIERS[0]), np.uint64(MULTIPLIERS[1])
    for _ in range(ROUNDS):
        p0, p1 = m0 * c0, m1 * c2
        c0, c1, c2, c3 = (
            (p1 >> _32) ^ c1 ^ np.uint64(k0),
            p1 & _LOW,
            (p0 >> _32) ^ c3 ^ np.uint64(k1),
            p0 & _LOW,
        )
        # Masked, as the arithmetic of 32-bit words is done in Python's integers.
        k0, k1 = (k0 + WEYL[0]) & 0xFFFFFFFF, (k1 + WEYL[1]) & 0xFFFFFFFF
    return c0, c1, c2, c3


def draw(
    seed: int, view: int, index: ArrayLike, purpose: Purpose, attempt: int = 0
) -> tuple[U64, ...]:
    """Four words of 32 random bits for each index."""
    i = np.asarray(index, np.uint64)
    high = (i >> _32) | np.uint64(purpose << 16)
    return philox((i & _LOW, high, np.uint64(view), np.uint64(attempt)), seed)


def below(word: U64, bound: ArrayLike) -> U64:
    """A 32-bit word scaled to [0, bound) by multiplication and shift, in integers."""
    # Some values are more likely than others by at most bound / 2^32, which no image shows.
    return (word * np.asarray(bound, np.uint64)) >> _32
