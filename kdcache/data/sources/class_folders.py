"""A folder with a folder for each class, perhaps below folders of splits; or a flat folder.

What stays true: each real folder is read once, whatever links lead to it; only regular files become
images; files whose name does not say what they are are decided by their first bytes; all that is
left out is counted, by reason. Hidden names and those that systems leave behind do not count.
"""

from __future__ import annotations

import os
import stat
from collections import Counter, deque
from pathlib import Path

import PIL.Image

from kdcache.data.sources.source import Source, Split
from kdcache.errors import StorageError, UsageError

TRAIN_NAMES = ("train", "training")
# In this order, where there are several.
TEST_NAMES = ("test", "testing", "val", "valid", "validation")
SPLIT_NAMES: dict[Split, tuple[str, ...]] = {"train": TRAIN_NAMES, "test": TEST_NAMES}
# Left by Synology, macOS, Windows, QNAP and Linux; other names of that kind begin with a dot.
SYSTEM_NAMES = frozenset(
    {
        "@eadir",
        "__macosx",
        "__pycache__",
        "#recycle",
        "$recycle.bin",
        "system volume information",
        "lost+found",
        "thumbs.db",
        "desktop.ini",
    }
)
HIDDEN = "hidden or a system's"
LINKED_AGAIN = "a link to a folder that is read anyway"
BROKEN_LINK = "a broken link"
NOT_REGULAR = "not a regular file"
OUTSIDE = "outside the class folders"
# Image formats that Pillow may not read: what their files hold, and where.
FOREIGN_MAGIC = (
    (4, b"ftypheic"),
    (4, b"ftypheix"),
    (4, b"ftypmif1"),
    (4, b"ftypavif"),
    (0, b"\xff\x0a"),  # JPEG XL
    (4, b"JXL \r\n\x87\n"),
)

FolderKey = tuple[int, int]


def open_class_folders(folder: Path, split: Split, *, allow_empty: bool = False) -> Source:
    """The images in `folder`, whose classes are its folders; without any, they have no labels.

    split        read the folder of this split, where there are such
    allow_empty  a class folder may hold no image

    Raises UsageError for a folder that holds no image or unclear splits, StorageError for one that
    cannot be read.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder} is a file; SOURCE is a folder with one folder for each class")
    folder = _split_folder(folder, split)
    walk = Walk(folder)
    folders, files = walk.entries(folder)
    if not folders:
        images = walk.images(files)
        if not images:
            raise UsageError(f"{folder} holds no images, nor class folders with images in them")
        return Source((), images, [-1] * len(images), +walk.ignored)
    walk.ignored[OUTSIDE] += len(files)
    images, labels = [], []
    for label, found in enumerate(walk.images_of_classes(folders)):
        if not (found or allow_empty):
            raise UsageError(
                f"class folder {folders[label]} holds no image: remove it, or keep the class "
                "with --allow-empty"
            )
        images += found
        labels += [label] * len(found)
    if not images:
        raise UsageError(f"{folder} has no class folders with images in them")
    return Source(tuple(x.name for x in folders), images, labels, +walk.ignored)


def _split_folder(folder: Path, split: Split) -> Path:
    """The folder of the split, or `folder` itself where its folders are classes."""
    names = sorted(x.name for x in Walk(folder).entries(folder)[0])
    by_name = {name: name.lower() for name in names}
    train, test = (
        [n for known in SPLIT_NAMES[part] for n in names if by_name[n] == known]
        for part in SPLIT_NAMES
    )
    # A class may be called train, but not beside one called test, and not the only one.
    if (not (train and test) and set(names) != {*train, *test}) or not names:
        if split == "test":
            raise UsageError(
                f"{folder} has no folders train/ and test/ (or val/): give the folder of the test "
                "images without --split"
            )
        return folder
    wanted = train if split == "train" else test
    if not wanted:
        raise UsageError(f"{folder} has no folder for the {split} split, only {', '.join(names)}")
    same = [n for n in wanted if by_name[n] == by_name[wanted[0]]]
    if len(same) > 1 or (split == "train" and len(wanted) > 1):
        raise UsageError(
            f"{folder} has several folders for the {split} split: {', '.join(wanted)}; give one of "
            "them as SOURCE"
        )
    return folder / wanted[0]


class Walk:
    """Reads folders below `root`, and counts in `ignored` what is no image."""

    def __init__(self, root: Path) -> None:
        self.ignored: Counter[str] = Counter()
        # A link to a folder above would lead to everything again.
        self._read = {_key(x) for x in (root.resolve(), *root.resolve().parents)}
        extensions = PIL.Image.registered_extensions()
        self._suffixes = {s for s, kind in extensions.items() if kind in PIL.Image.OPEN}

    def entries(self, folder: Path) -> tuple[list[Path], list[Path]]:
        """The folders and the files in a folder, sorted; links count as what they lead to."""
        try:
            names = sorted(os.listdir(folder))
        except OSError as error:
            raise StorageError(
                f"cannot read the folder {folder}: {error.strerror or error}"
            ) from error
        folders, files = [], []
        for name in names:
            path = folder / name
            if name.startswith(".") or name.lower() in SYSTEM_NAMES:
                self.ignored[HIDDEN] += 1
                continue
            mode = _mode(path)
            if stat.S_ISDIR(mode):
                folders.append(path)
            elif stat.S_ISREG(mode) or not mode:
                files.append(path)
            else:
                self.ignored[NOT_REGULAR] += 1
        return folders, files

    def images_of_classes(self, class_folders: list[Path]) -> list[list[Path]]:
        """The images of each class, sorted by path. All real folders are read before any link."""
        owners: dict[FolderKey, Path] = {}
        for folder in class_folders:
            if (first := owners.setdefault(_key(folder), folder)) != folder:
                raise UsageError(f"class folders {first} and {folder} are the same folder")
        self._read |= owners.keys()
        files: list[list[Path]] = [[] for _ in class_folders]
        links: deque[tuple[int, Path]] = deque()
        for label, folder in enumerate(class_folders):
            self._descend(folder, label, files, links)
        while links:
            label, link = links.popleft()
            if _key(link) in self._read:
                self.ignored[LINKED_AGAIN] += 1
            else:
                self._read.add(_key(link))
                self._descend(link, label, files, links)
        return [sorted(self.images(x)) for x in files]

    def _descend(
        self, folder: Path, label: int, files: list[list[Path]], links: deque[tuple[int, Path]]
    ) -> None:
        """Add the files below a folder, and its links to folders to those to be followed later."""
        waiting = [folder]
        while waiting:
            inner, here = self.entries(waiting.pop())
            files[label] += here
            for path in inner:
                if path.is_symlink():
                    links.append((label, path))
                else:
                    self._read.add(_key(path))
                    waiting.append(path)

    def images(self, files: list[Path]) -> list[Path]:
        """Those of the files that are images, readable or not; the others are counted."""
        found = []
        for path in files:
            suffix = path.suffix.lower()
            if suffix in self._suffixes:
                found.append(path)
            elif not path.exists():
                self.ignored[BROKEN_LINK] += 1
            elif _is_image(path):
                found.append(path)
            else:
                self.ignored[suffix or "no extension"] += 1
        return found


def _mode(path: Path) -> int:
    """0 for a broken link, which is a file."""
    try:
        return path.stat().st_mode
    except OSError:
        return 0


def _key(path: Path) -> FolderKey:
    status = path.stat()
    return status.st_dev, status.st_ino


def _is_image(path: Path) -> bool:
    """Whether a file begins as an image does."""
    try:
        with path.open("rb") as file:
            head = file.read(16)
            file.seek(0)
            if any(head[at : at + len(magic)] == magic for at, magic in FOREIGN_MAGIC):
                return True
            with PIL.Image.open(file):
                return True
    except PIL.UnidentifiedImageError:
        return False
    except (PIL.Image.DecompressionBombError, OSError, ValueError, SyntaxError):
        return True  # it may be one: `convert` says what is wrong with it
