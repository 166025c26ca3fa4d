"""The options of a view."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from kdcache.choices import Crop
from kdcache.options import VIEWS, option


@dataclass(frozen=True, kw_only=True)
class ViewOptions:
    """Fields of `ViewSpec`; None where an option is not given."""

    seed: int | None = option(
        None,
        name="--view-seed",
        help="Seed of crops, flips, the order of samples and pairs.",
        default_text="0",
        group=VIEWS,
        metavar="N",
    )
    size_px: int | None = option(
        None,
        name="--size",
        help="Side of the square views.",
        default_text="the model's or its pretrained weights', else the images' up to 64, else 224",
        group=VIEWS,
        metavar="PX",
    )
    crop: Crop | None = option(None, help="Kind of crop.", default_text="inception", group=VIEWS)
    min_scale: float | None = option(
        None,
        help="Smallest area of an inception crop, as a fraction of the image; of random and center "
        "crops, their area, as a fraction of the largest square.",
        default_text="0.05; random and center 0.766; whole 1",
        group=VIEWS,
        metavar="FRACTION",
    )
    flip: bool | None = option(
        None, help="Flip views horizontally with probability 1/2.", default_text="flip", group=VIEWS
    )
    mixup: float | None = option(
        None,
        help="Alpha of the mixing weights, Beta(alpha, alpha); 0: no mixing.",
        default_text="1",
        group=VIEWS,
        metavar="ALPHA",
    )

    def given(self) -> dict[str, Any]:
        """The options that are given, by field of ViewSpec."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}
