"""The seam `Transform`: what a view does to a resized crop, before pairs are mixed.

A member is a frozen dataclass in a file of its own: its fields are its parameters and its JSON, and
`TRANSFORMS` names it. What stays true: the result is a pure function of the pixels and of (seed,
view, sample), so it does not change with batch size, workers, processes or resume.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from kdcache.errors import UsageError
from kdcache.spec import require_known_fields, spec_to_json
from kdcache.views.transforms.flip import HorizontalFlip


class Transform(Protocol):
    """Changes crops in place.

    name   what it is called in JSON; unique in `TRANSFORMS`
    """

    name: ClassVar[str]

    def apply(
        self,
        images_BHWC: NDArray[np.uint8],
        *,
        seed: int,
        view: int,
        sample_ids_B: NDArray[np.int64],
    ) -> None:
        """Change uint8 images [B, H, W, 3] in place.

        Draw with `philox.draw(seed, view, sample_ids_B, purpose)`; purposes from 1000 up to 65535
        are free for transforms that are not kdcache's.
        """


TRANSFORMS: dict[str, type[Any]] = {HorizontalFlip.name: HorizontalFlip}


def transform_to_json(transform: Transform) -> dict[str, Any]:
    return {"name": transform.name, **spec_to_json(transform)}


def transform_from_json(value: Mapping[str, Any]) -> Transform:
    """Raises UsageError for a name that `TRANSFORMS` lacks."""
    parameters = dict(value)
    name = parameters.pop("name")
    if name not in TRANSFORMS:
        raise UsageError(
            f"unknown transform {name!r}, known are {', '.join(TRANSFORMS)}: import the module "
            "that adds it to kdcache.views.transforms.TRANSFORMS"
        )
    cls = TRANSFORMS[name]
    require_known_fields(cls, parameters, f"the transform {name!r}")
    transform: Transform = cls(**parameters)
    return transform
