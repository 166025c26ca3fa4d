"""`Source`: where images come from: class names, and an item for each image, a file or an array."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from kdcache.choices import Split as Split

Image = Path | NDArray[np.uint8] | PIL.Image.Image


@dataclass(frozen=True)
class Source:
    """Images with labels.

    images[i] is a path, a PIL image, or a uint8 array [H, W] or [H, W, 3]; labels[i] is an index
    into class_names. Nothing is decoded before it is asked for.
    """

    class_names: tuple[str, ...]
    images: Sequence[Image]
    labels: Sequence[int]

    def name(self, i: int) -> str:
        image = self.images[i]
        return str(image) if isinstance(image, Path) else f"image {i}"
