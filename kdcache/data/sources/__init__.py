"""Where images come from: class folders, Fashion-MNIST, digits, torchvision's data sets.

In: a name and a split. Out: a `Source`: class names and a list of items, each a file or an array.
Nothing is decoded here.
"""

from __future__ import annotations

import gzip
import inspect
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import PIL.Image
import torchvision.datasets as tvd
from numpy.typing import NDArray

from kdcache.errors import MissingDependency, StorageError, UsageError, did_you_mean

Split = Literal["train", "test"]
Image = Path | NDArray[np.uint8] | PIL.Image.Image

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
    "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
SPLIT_FOLDERS: dict[Split, tuple[str, ...]] = {"train": ("train",), "test": ("test", "val")}


@dataclass(frozen=True)
class Source:
    """Images with labels.

    images[i] is a path, a PIL image, or a uint8 array [H, W] or [H, W, 3]; labels[i] is an index
    into classes.
    """

    classes: tuple[str, ...]
    images: Sequence[Image]
    labels: Sequence[int]

    def name(self, i: int) -> str:
        image = self.images[i]
        return str(image) if isinstance(image, Path) else f"image {i}"


def open_source(name: str, split: Split) -> Source:
    """The source called `name`. Raises UsageError when there is none."""
    if name == "fashion-mnist":
        return _fashion_mnist(split)
    if name == "digits":
        return _digits(split)
    if name.startswith("torchvision:"):
        return _torchvision(name.removeprefix("torchvision:"), split)
    folder = Path(name)
    if not folder.exists():
        raise UsageError(
            f"no such folder: {name}; SOURCE is a folder of class folders, 'fashion-mnist', "
            "'digits' or 'torchvision:NAME'" + did_you_mean(name, ("fashion-mnist", "digits"))
        )
    return _class_folders(folder, split)


def _class_folders(folder: Path, split: Split) -> Source:
    if not folder.is_dir():
        raise UsageError(f"{folder} is a file; SOURCE is a folder with one folder for each class")
    present = {d.name for d in folder.iterdir() if d.is_dir()}
    # Splits rather than classes: a class may be called train, but not the only one.
    if "train" in present and (present & {"test", "val"} or len(present) == 1):
        inner = [d for d in SPLIT_FOLDERS[split] if d in present]
        if not inner:
            raise UsageError(f"{folder} has no folder for the {split} split")
        folder = folder / inner[0]
        present = {d.name for d in folder.iterdir() if d.is_dir()}
    elif split == "test":
        raise UsageError(
            f"{folder} has no folders train/ and test/ (or val/): give the folder of the test "
            "images without --split"
        )
    extensions = PIL.Image.registered_extensions()
    suffixes = {s for s, kind in extensions.items() if kind in PIL.Image.OPEN}
    classes, images, labels = tuple(sorted(present)), [], []
    for label, c in enumerate(classes):
        files = sorted(
            Path(root) / f
            for root, _, names in os.walk(folder / c, followlinks=True)
            for f in names
            if Path(f).suffix.lower() in suffixes
        )
        if not files:
            raise UsageError(f"class folder {folder / c} holds no image")
        images += files
        labels += [label] * len(files)
    if not images:
        raise UsageError(f"{folder} has no class folders with images in them")
    return Source(classes, images, labels)


def _fashion_mnist(split: Split) -> Source:
    stem = "train" if split == "train" else "t10k"
    if (DEBIAN_FASHION_MNIST / f"{stem}-images-idx3-ubyte.gz").exists():
        images = _idx(DEBIAN_FASHION_MNIST / f"{stem}-images-idx3-ubyte.gz")
        labels = _idx(DEBIAN_FASHION_MNIST / f"{stem}-labels-idx1-ubyte.gz")
        return Source(FASHION_CLASSES, list(images), [int(y) for y in labels])
    try:
        return _torchvision("FashionMNIST", split)
    except StorageError as error:
        raise UsageError(
            "Fashion-MNIST is neither installed (apt-get install dataset-fashion-mnist) nor can "
            f"it be downloaded: {error}"
        ) from error


def _idx(path: Path) -> NDArray[np.uint8]:
    """The array of an IDX file of bytes (LeCun's MNIST format)."""
    data = gzip.decompress(path.read_bytes())
    dims = data[3]
    shape = np.frombuffer(data, ">u4", dims, 4).astype(int)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * dims).reshape(shape)


def _digits(split: Split) -> Source:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingDependency(
            "the digits come with scikit-learn: pip install 'kdcache[digits]'"
        ) from error
    data = load_digits()
    images = np.round(data.images * (255 / 16)).astype(np.uint8)
    rows = slice(0, 1500) if split == "train" else slice(1500, None)
    labels = [int(y) for y in data.target[rows]]
    return Source(tuple("0123456789"), list(images[rows]), labels)


def _torchvision(name: str, split: Split) -> Source:
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
