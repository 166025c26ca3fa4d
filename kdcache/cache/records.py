"""`Records`: NumPy arrays of some rows of a cache, as they are stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

ValueType = Literal["float32", "float16", "uint8"]


@dataclass(frozen=True)
class Records:
    """Rows of a tape; what a kind of tape does not have is None.

    logits   [B, K] of the tape's dtype
    classes  [B, K] uint16 or uint32
    tail     [B, 3] of the tape's dtype
    counts   [B, K] uint8: how often each class was drawn; 0 where fewer than K were
    """

    logits: NDArray[np.generic] | None = None
    classes: NDArray[np.generic] | None = None
    tail: NDArray[np.generic] | None = None
    counts: NDArray[np.generic] | None = None

    def arrays(self) -> dict[str, NDArray[np.generic]]:
        """Those that are there, by name."""
        found = {name: getattr(self, name) for name in ("logits", "classes", "tail", "counts")}
        return {name: array for name, array in found.items() if array is not None}

    def __len__(self) -> int:
        return len(next(iter(self.arrays().values())))

    def __getitem__(self, rows: slice | NDArray[np.int64]) -> Records:
        return Records(**{name: array[rows] for name, array in self.arrays().items()})

    @staticmethod
    def concatenate(parts: list[Records]) -> Records:
        if len(parts) == 1:
            return parts[0]
        joined = {
            name: np.concatenate([part.arrays()[name] for part in parts])
            for name in parts[0].arrays()
        }
        return Records(**joined)


def class_dtype(classes: int) -> np.dtype[np.generic]:
    return np.dtype(np.uint16 if classes <= 1 << 16 else np.uint32)
