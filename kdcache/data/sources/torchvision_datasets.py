"""torchvision's data sets by name, downloaded where they can be."""

from __future__ import annotations

import inspect
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kdcache.data.sources.source import Image, Source, Split
from kdcache.errors import StorageError, UsageError, did_you_mean


def open_torchvision(name: str, split: Split) -> Source:
    # Here, not above: it takes a second to import, and the loader and most sources never need it.
    import torchvision.datasets as tvd

    kind = getattr(tvd, name, None)
    if not (inspect.isclass(kind) and issubclass(kind, tvd.VisionDataset)):
        close = did_you_mean(name, tvd.__all__)
        raise UsageError(f"torchvision has no data set {name!r}: see torchvision.datasets{close}")
    known = inspect.signature(kind).parameters
    options: dict[str, Any] = {"root": str(_cache_folder())}
    if "train" in known:
        options["train"] = split == "train"
    elif "split" in known:
        options["split"] = split
    elif split == "test":
        raise UsageError(f"torchvision's {name} has no test split")
    if "download" in known:
        options["download"] = True
    try:
        images = _Lazy(kind(**options))
        labels = images.labels()
    except (TypeError, ValueError, NotImplementedError) as error:
        raise UsageError(
            f"torchvision's {name} does not give one image and one class for a name and a split: "
            f"{error}"
        ) from error
    except (OSError, RuntimeError) as error:
        raise StorageError(f"torchvision could not provide {name}: {error}") from error
    classes = getattr(images.data, "classes", None) or range(max(labels) + 1)
    return Source(tuple(map(str, classes)), images, labels)


class _Lazy(Sequence[Image]):
    """The images of a torchvision data set, each decoded when it is asked for."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: Any) -> Any:
        return self.data[i][0]

    def labels(self) -> list[int]:
        """Its `targets` where it has one for each image; else each image is decoded for it."""
        listed = getattr(self.data, "targets", None)
        if listed is None or len(listed) != len(self):
            listed = [self.data[i][1] for i in range(len(self))]
        return [int(y) for y in listed]


def _cache_folder() -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "kdcache"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
