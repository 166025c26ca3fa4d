"""A folder with a folder for each class, perhaps below folders of splits."""

from __future__ import annotations

import os
from pathlib import Path

import PIL.Image

from kdcache.data.sources.source import Source, Split
from kdcache.errors import UsageError

SPLIT_FOLDERS: dict[Split, tuple[str, ...]] = {"train": ("train",), "test": ("test", "val")}


def open_class_folders(folder: Path, split: Split) -> Source:
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
