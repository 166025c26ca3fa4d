"""The entropy coder loses nothing, is near the entropy, and takes no damaged bytes."""

from __future__ import annotations

import hashlib
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from numpy.typing import NDArray

from kdcache.cache import rans

RNG = np.random.default_rng(0)
ROWS = 3000
COLUMNS = {
    "zero": np.zeros(ROWS),
    "constant": np.full(ROWS, -7),
    "one outlier": np.where(np.arange(ROWS) == 1234, 30000, 0),
    "few outliers": np.where(RNG.random(ROWS) < 0.01, RNG.integers(-32768, 32767, ROWS), 1),
    "signs": RNG.integers(-1, 2, ROWS),
    "narrow": np.rint(RNG.normal(0, 3, ROWS)),
    "wide": np.rint(RNG.normal(100, 900, ROWS)),
    "uniform": RNG.integers(-32768, 32768, ROWS),
    "ends": RNG.choice([-32768, 32767], ROWS),
    "window": RNG.integers(-127, 128, ROWS),
    "window and one": RNG.integers(-127, 129, ROWS),
}
ALL = np.stack(list(COLUMNS.values()), 1).astype(np.int16)


def through(array: NDArray[np.generic]) -> NDArray[np.generic]:
    return rans.decode(rans.encode(array), array.dtype)


@pytest.mark.parametrize("kind", [np.int16, np.uint16])
@pytest.mark.parametrize("rows", [1, 2, 127, 128, 129, ROWS])
def test_every_value_comes_back(rows: int, kind: type) -> None:
    array = ALL[:rows].view(kind)
    found = through(array)
    assert found.dtype == array.dtype
    np.testing.assert_array_equal(found, array)


@settings(max_examples=60, deadline=None)
@given(
    arrays(
        np.int16, array_shapes(min_dims=2, max_dims=2, max_side=40), elements=st.integers(-300, 300)
    )
)
def test_any_array_comes_back(array: NDArray[np.int16]) -> None:
    np.testing.assert_array_equal(through(array), array)


def test_a_row_major_or_column_major_array_gives_the_same_bytes() -> None:
    assert rans.encode(np.asfortranarray(ALL)) == rans.encode(ALL)


def test_the_bytes_are_as_they_were() -> None:
    """Another code would make caches that an earlier kdcache cannot read."""
    array = np.array([[0, 5, -300], [1, 5, 300], [0, 5, 0], [-1, 5, 2]], np.int16)
    data = rans.encode(array)
    assert data[:8].hex() == "0400000003000000"
    assert data[8:20].hex() == "ffffffff05000000daffffff"  # -1, 5, -300 >> 3
    assert hashlib.sha256(data).hexdigest()[:16] == "9a71d0179bf50c80"
    assert hashlib.sha256(rans.encode(ALL[:300])).hexdigest()[:16] == "a4ff9053f341c8c4"


def entropy_bytes(array: NDArray[np.int16]) -> float:
    """Of each column by its own frequencies."""
    total = 0.0
    for column in array.T:
        p = np.unique(column, return_counts=True)[1] / len(column)
        total -= float((p * np.log2(p)).sum()) * len(column) / 8
    return total


def test_it_is_within_three_percent_of_the_entropy() -> None:
    deviations = np.r_[np.geomspace(10, 0.3, 100), np.zeros(150)]
    array = np.rint(RNG.normal(0, 1, (4096, 250)) * deviations).astype(np.int16)
    # A general compressor follows, which halves the tables.
    size = len(zlib.compress(rans.encode(array), 9))
    assert entropy_bytes(array) < size < 1.03 * entropy_bytes(array) + 4 * rans.LANES


def test_columns_of_one_value_take_no_bits_of_the_stream() -> None:
    narrow = ALL[:, [4, 5]]
    wider = np.concatenate([narrow, np.full((ROWS, 1000), 3, np.int16)], 1)
    # Six bytes of window and four of frequencies for each; the general compressor behind it makes
    # one run of them.
    assert len(rans.encode(wider)) == len(rans.encode(narrow)) + 1000 * (6 + 4)


def test_an_outlier_costs_itself_alone() -> None:
    column = COLUMNS["narrow"][:, None].astype(np.int16)
    far = column.copy()
    far[77] = 31000
    # The window grows to its limit: 2 bytes for a frequency of each value that does not occur.
    assert len(rans.encode(far)) < len(rans.encode(column)) + 2 * rans.MAX_WINDOW + 16


@pytest.mark.parametrize("cut", [1, 2, 100])
def test_cut_bytes_are_an_error(cut: int) -> None:
    with pytest.raises(ValueError, match=r"words|smaller"):
        rans.decode(rans.encode(ALL)[:-cut], ALL.dtype)


def test_changed_bytes_never_read_outside_the_arrays() -> None:
    data = rans.encode(ALL[:200])
    for at in range(0, len(data), 7):
        changed = bytearray(data)
        changed[at] ^= 0x55
        if at < 8:
            continue  # numbers of rows and columns: memory is all that could fail
        try:
            rans.decode(bytes(changed), ALL.dtype)
        except (ValueError, OverflowError):
            continue
