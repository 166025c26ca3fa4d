"""Rows of a cache as NumPy arrays, column by column, as they are stored.

`Records` are some rows; a `RecordsBuffer` collects those of a shard.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.errors import KDCacheError

# What a calibrated record codec needs beside records: arrays that a cache holds once, by name.
Tables = Mapping[str, NDArray[Any]]
NO_TABLES: Tables = MappingProxyType({})


@dataclass(frozen=True)
class Records:
    """Rows of a cache.

    columns   by name [B, K]; the record codec says which there are (`codecs/`)
    """

    columns: Mapping[str, NDArray[Any]]

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, rows: slice | NDArray[np.int64]) -> Records:
        return Records({name: array[rows] for name, array in self.columns.items()})

    @staticmethod
    def concatenate(parts: Sequence[Records]) -> Records:
        if len(parts) == 1:
            return parts[0]
        names = parts[0].columns
        return Records({n: np.concatenate([part.columns[n] for part in parts]) for n in names})


class RecordsBuffer:
    """A known number of rows, filled in place batch by batch, from the first to the last.

    A list of each batch's small arrays would fragment the heap: they lie between the blocks that a
    batch frees, so that the heap grows with every batch (benchmarks/bench_memory.py).

    num_rows   rows in the end; the first batch says which columns there are
    """

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows
        self.num_filled = 0
        self._columns: dict[str, NDArray[Any]] = {}

    def append(self, batch: Records) -> None:
        """Copy the next rows. Raises KDCacheError for rows or columns that do not fit."""
        if not self._columns:
            self._columns = {
                name: np.empty((self.num_rows, *array.shape[1:]), array.dtype)
                for name, array in batch.columns.items()
            }
        start, stop = self.num_filled, self.num_filled + len(batch)
        expected = {name: (len(batch), *a.shape[1:]) for name, a in self._columns.items()}
        found = {name: array.shape for name, array in batch.columns.items()}
        # Assignment would repeat a single row without an error.
        if stop > self.num_rows or found != expected:
            raise KDCacheError(
                f"a batch of records has the columns {found}, expected {expected} (rows left: "
                f"{self.num_rows - start}): correct the record codec's `encode`"
            )
        for name, array in batch.columns.items():
            self._columns[name][start:stop] = array
        self.num_filled = stop

    def records(self) -> Records:
        """All rows, not copied. Raises KDCacheError unless each was appended."""
        if self.num_filled != self.num_rows:
            raise KDCacheError(
                f"{self.num_filled} records were computed, expected {self.num_rows}: correct the "
                "record codec's `encode`, which must give one record for each row of logits"
            )
        return Records(self._columns)
