"""A buffer of records has the rows that were appended, in order, and no other number of them."""

from __future__ import annotations

import numpy as np
import pytest

from kdcache.cache.records import Records, RecordsBuffer
from kdcache.errors import KDCacheError

ROWS = 7
WHOLE = Records(
    {
        "logits": np.arange(ROWS * 3, dtype=np.uint8).reshape(ROWS, 3),
        "classes": np.arange(ROWS * 2, dtype=np.uint16).reshape(ROWS, 2),
    }
)


def filled(*sizes: int) -> RecordsBuffer:
    """A buffer of ROWS rows with batches of these sizes."""
    buffer, start = RecordsBuffer(ROWS), 0
    for size in sizes:
        buffer.append(WHOLE[start : start + size])
        start += size
    return buffer


@pytest.mark.parametrize("sizes", [(ROWS,), (3, 3, 1), (1,) * ROWS])
def test_batches_make_the_records_that_they_were_cut_from(sizes: tuple[int, ...]) -> None:
    records = filled(*sizes).records()
    assert len(records) == ROWS
    assert list(records.columns) == list(WHOLE.columns)
    for name, expected in WHOLE.columns.items():
        assert records.columns[name].dtype == expected.dtype
        np.testing.assert_array_equal(records.columns[name], expected)


def test_a_batch_is_copied() -> None:
    batch = Records({"logits": np.ones((1, 2))})
    buffer = RecordsBuffer(1)
    buffer.append(batch)
    batch.columns["logits"][:] = 2
    np.testing.assert_array_equal(buffer.records().columns["logits"], [[1, 1]])


def test_the_arrays_are_made_once() -> None:
    buffer = filled(3)
    first = buffer._columns["logits"]
    buffer.append(WHOLE[3:])
    assert buffer.records().columns["logits"] is first


@pytest.mark.parametrize("sizes", [(), (3,), (3, 3)])
def test_too_few_rows_are_an_error(sizes: tuple[int, ...]) -> None:
    with pytest.raises(KDCacheError, match=f"^{sum(sizes)} records .* expected {ROWS}"):
        filled(*sizes).records()


def test_too_many_rows_are_an_error_and_change_nothing() -> None:
    buffer = filled(3, 3)
    with pytest.raises(KDCacheError, match="rows left: 1"):
        buffer.append(WHOLE[:2])
    buffer.append(WHOLE[6:])
    np.testing.assert_array_equal(buffer.records().columns["logits"], WHOLE.columns["logits"])


@pytest.mark.parametrize(
    "columns",
    [
        {"logits": WHOLE.columns["logits"][:2]},
        {**WHOLE[:2].columns, "tail": np.zeros((2, 1))},
        # One row, which NumPy would repeat; and another width.
        {**WHOLE[:2].columns, "classes": WHOLE.columns["classes"][:1]},
        {**WHOLE[:2].columns, "classes": WHOLE.columns["classes"][:2, :1]},
    ],
)
def test_other_columns_than_the_first_batch_has_are_an_error(
    columns: dict[str, np.ndarray],
) -> None:
    with pytest.raises(KDCacheError, match=r"columns .* expected .*classes.*encode"):
        filled(3).append(Records(columns))
