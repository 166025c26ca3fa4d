"""`Records`: some rows of a cache as NumPy arrays, column by column, as they are stored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

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
