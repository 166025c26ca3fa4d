"""scikit-learn's digits: 1,797 grey images of 8 px, the last 297 for testing."""

from __future__ import annotations

import numpy as np

from kdcache.data.sources.source import Source, Split
from kdcache.errors import MissingDependency


def open_digits(argument: str, split: Split) -> Source:
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
