"""Where images come from: a file for each kind of source, and a line in `SOURCES`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from kdcache.data.sources.class_folders import open_class_folders
from kdcache.data.sources.digits import open_digits
from kdcache.data.sources.fashion_mnist import open_fashion_mnist
from kdcache.data.sources.source import Image, Source, Split
from kdcache.data.sources.torchvision_datasets import open_torchvision
from kdcache.errors import UsageError, did_you_mean

__all__ = ["SOURCES", "Image", "Source", "Split", "open_source"]

# "NAME" or "NAME:ARGUMENT" to a function of the argument and the split.
SOURCES: dict[str, Callable[[str, Split], Source]] = {
    "fashion-mnist": open_fashion_mnist,
    "digits": open_digits,
    "torchvision": open_torchvision,
}


def open_source(name: str, split: Split = "train", *, allow_empty: bool = False) -> Source:
    """The source called `name`: one of `SOURCES`, or a folder of class folders or of images.

    split        which part of it, where it has parts
    allow_empty  a class folder may hold no image; the class keeps its place

    Raises UsageError where there is none, and what opening it raises.
    """
    kind, _, argument = name.partition(":")
    if kind in SOURCES:
        return SOURCES[kind](argument, split)
    folder = Path(name)
    if not folder.exists():
        raise UsageError(
            f"no such folder: {name}; SOURCE is a folder of class folders or images, "
            "'fashion-mnist', 'digits' or 'torchvision:NAME'" + did_you_mean(name, SOURCES)
        )
    return open_class_folders(folder, split, allow_empty=allow_empty)
