"""Fashion-MNIST: Debian's package dataset-fashion-mnist, else torchvision's download."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kdcache.data.sources.source import Source, Split
from kdcache.data.sources.torchvision_datasets import open_torchvision
from kdcache.errors import StorageError, UsageError

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
FASHION_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)


def open_fashion_mnist(argument: str, split: Split) -> Source:
    stem = "train" if split == "train" else "t10k"
    if (DEBIAN_FASHION_MNIST / f"{stem}-images-idx3-ubyte.gz").exists():
        images = _idx(DEBIAN_FASHION_MNIST / f"{stem}-images-idx3-ubyte.gz")
        labels = _idx(DEBIAN_FASHION_MNIST / f"{stem}-labels-idx1-ubyte.gz")
        return Source(FASHION_CLASSES, list(images), [int(y) for y in labels])
    try:
        return open_torchvision("FashionMNIST", split)
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
