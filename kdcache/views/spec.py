"""`ViewSpec`: everything that decides the pixels of a view."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

from kdcache.choices import Crop as Crop
from kdcache.spec import digest, require, require_known_fields, require_version, spec_to_json
from kdcache.views.transforms import Transform, transform_from_json, transform_to_json

VIEW_VERSION = 1
# A view and a sample share 64 bits; `philox.py` gives a view 24 of them.
MAX_VIEWS = 1 << 24

# The classic evaluation crop: 224 of 256 px, so (7/8)^2 of the largest square.
EVAL_SCALE = (7 / 8) ** 2
# Up to this side images are small enough that evaluation shows them whole, and that we store
# their pixels rather than a JPEG.
SMALL_PX = 64

# Names of fields in JSON that earlier code wrote.
_RENAMED = {"min_area": "min_scale"}


@dataclass(frozen=True)
class ViewSpec:
    """Everything that decides the pixels of a view.

    size_px     side of the square view, in pixels
    crop        "inception": 10 tries for a box with an area of min_scale to 1 of the image and an
                aspect ratio of 3/4 to 4/3 (Szegedy et al. 2015); "random": a square of min_scale of
                the largest square, anywhere; "center": the same square in the middle; "whole": all
                of the image, resized without keeping the aspect ratio
    min_scale   the smallest area of a crop, as a fraction in (0, 1]; 1 for "whole"
    flip        horizontal flip with probability 1/2
    mixup       alpha of Beta(alpha, alpha) for pair mixing (Zhang et al. 2018); 0 turns it off
    seed        64 bits that key every draw
    transforms  applied to the resized crop in this order, before pairs are mixed
    version     of the algorithms that make the pixels
    """

    size_px: int
    crop: Crop = "inception"
    min_scale: float = 0.05
    flip: bool = True
    mixup: float = 1.0
    seed: int = 0
    transforms: tuple[Transform, ...] = ()
    version: int = VIEW_VERSION

    def __post_init__(self) -> None:
        crops = get_args(Crop)
        # Of a file's JSON these may be anything, and True is an int in Python.
        for name, value in (("size", self.size_px), ("view-seed", self.seed)):
            require(isinstance(value, int) and value is not True, name, "a whole number", value)
        require(1 <= self.size_px <= 4096, "size", "a side of 1 to 4096 px", self.size_px)
        require(self.crop in crops, "crop", f"one of {', '.join(crops)}", self.crop)
        require(0 < self.min_scale <= 1, "min-scale", "in (0, 1]", self.min_scale)
        if self.crop == "whole":
            require(self.min_scale == 1, "min-scale", "1 for all of the image", self.min_scale)
        require(
            self.mixup == 0 or 0.05 <= self.mixup <= 100, "mixup", "0 or 0.05 to 100", self.mixup
        )
        require(0 <= self.seed < 1 << 64, "view-seed", "in [0, 2^64)", self.seed)
        require_version("views", self.version, VIEW_VERSION)

    @property
    def digest(self) -> str:
        return digest(self.to_json())

    def describe(self) -> str:
        """A phrase for people."""
        scale = f"{self.min_scale:g} to 1" if self.crop == "inception" else f"{self.min_scale:g}"
        flip = "flip" if self.flip else "no flip"
        mixup = f"mixup {self.mixup:g}" if self.mixup else "no mixup"
        crop = f"{self.crop} crop (area {scale})"
        return f"{self.size_px} px, {crop}, {flip}, {mixup}, seed {self.seed}"

    def to_json(self) -> dict[str, Any]:
        """The version, and the fields that differ from its defaults."""
        found = {**spec_to_json(self), "version": self.version}
        if self.transforms:
            found["transforms"] = [transform_to_json(t) for t in self.transforms]
        return found

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ViewSpec:
        """The spec whose `to_json` in any version gave `value`.

        Raises UsageError for one of a later version.
        """
        require_version("views", value["version"], VIEW_VERSION)
        found = {_RENAMED.get(name, name): x for name, x in value.items()}
        require_known_fields(cls, found, "the view spec")
        transforms = tuple(transform_from_json(t) for t in found.pop("transforms", ()))
        return cls(**found, transforms=transforms)


def evaluation_view_spec(size_px: int) -> ViewSpec:
    """The one plain view that accuracy is measured on: a centre crop, or all of a small image."""
    scale = 1.0 if size_px <= SMALL_PX else EVAL_SCALE
    return ViewSpec(size_px, crop="center", min_scale=scale, flip=False, mixup=0)
