"""`Source`: where images come from: class names, and an item for each image, a file or an array."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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
    into class_names. Nothing is decoded before it is needed. Without labels: no class_names, and
    every label is -1. `ignored` counts what was found and is no image, by reason.
    """

    class_names: tuple[str, ...]
    images: Sequence[Image]
    labels: Sequence[int]
    ignored: Mapping[str, int] = field(default_factory=dict)

    def name(self, i: int) -> str:
        """A file's path, or the number of the image, which is not decoded for it."""
        files = isinstance(self.images, list | tuple)
        image = self.images[i] if files else None
        return str(image) if isinstance(image, Path) else f"image {i}"
