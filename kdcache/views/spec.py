"""`ViewSpec`: everything that decides the pixels of a view."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from kdcache.spec import digest, require

Crop = Literal["inception", "random", "center", "whole"]

VIEW_VERSION = 1

# A view and a sample share 64 bits; `rng.py` gives a view 24 of them.
MAX_VIEWS = 1 << 24

# The classic evaluation crop: 224 of 256 px, so (7/8)^2 of the largest square.
EVAL_SCALE = (7 / 8) ** 2
# Up to this side images are small enough that evaluation shows them whole, and that we keep
# their pixels rather than a JPEG.
SMALL_PX = 64


@dataclass(frozen=True)
class ViewSpec:
    """Everything that decides the pixels of a view.

    size_px   side of the square view, in pixels
    crop      "inception": 10 tries for a box with an area of min_area to 1 of the image and an
              aspect ratio of 3/4 to 4/3 (Szegedy et al. 2015); "random": a square of min_area of
              the largest square, anywhere; "center": the same square in the middle; "whole": all
              of the image, squashed into the square
    min_area  the area above, in (0, 1]; 1 for "whole"
    flip      mirror left to right with probability 1/2
    mixup     alpha of Beta(alpha, alpha) for pair mixing (Zhang et al. 2018); 0 turns it off
    seed      64 bits that key every draw
    """

    size_px: int
    crop: Crop = "inception"
    min_area: float = 0.05
    flip: bool = True
    mixup: float = 1.0
    seed: int = 0
    version: int = VIEW_VERSION

    def __post_init__(self) -> None:
        require(1 <= self.size_px <= 4096, "size", "a side of 1 to 4096 px", self.size_px)
        require(
            self.crop in get_args(Crop), "crop", f"one of {', '.join(get_args(Crop))}", self.crop
        )
        require(0 < self.min_area <= 1, "min-area", "in (0, 1]", self.min_area)
        if self.crop == "whole":
            require(self.min_area == 1, "min-area", "1 for all of the image", self.min_area)
        require(
            self.mixup == 0 or 0.05 <= self.mixup <= 100, "mixup", "0 or 0.05 to 100", self.mixup
        )
        require(0 <= self.seed < 1 << 64, "view-seed", "in [0, 2^64)", self.seed)
        require(self.version == VIEW_VERSION, "view spec version", str(VIEW_VERSION), self.version)

    @property
    def digest(self) -> str:
        return digest(self.to_json())

    def to_json(self) -> dict[str, Any]:
        # 1 and 1.0 are equal here and two texts in JSON; equal specs have one digest.
        return {**asdict(self), "min_area": float(self.min_area), "mixup": float(self.mixup)}


def evaluation_view_spec(size_px: int) -> ViewSpec:
    """The one plain view that accuracy is measured on: a centre crop, or all of a small image."""
    area = 1.0 if size_px <= SMALL_PX else EVAL_SCALE
    return ViewSpec(size_px, crop="center", min_area=area, flip=False, mixup=0)
