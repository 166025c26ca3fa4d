"""What must be true of a path that a user gives, checked before anything large is imported."""

from __future__ import annotations

import os
from pathlib import Path

from kdcache.errors import UsageError

PathLike = str | os.PathLike[str]


def require_dataset(path: PathLike) -> None:
    """Raise UsageError where there is no file."""
    if not Path(path).is_file():
        raise UsageError(f"no such file: {path}; make it with `kdcache convert SOURCE {path}`")


def require_new_dataset(path: PathLike) -> None:
    """Raise UsageError where `convert` cannot write a .beton file."""
    out = Path(path)
    if out.suffix != ".beton":
        raise UsageError(f"the output is a .beton file, not {out.name!r}")
    if out.exists():
        raise UsageError(f"{out} exists; remove it or choose another name")
    if not out.parent.is_dir():
        raise UsageError(f"no such folder: {out.parent}")


def require_cache(url: PathLike) -> None:
    """Raise UsageError where nothing is at a path. An object store is not looked at."""
    if "://" not in str(url) and not Path(url).exists():
        raise UsageError(f"no cache at {url}: make one with `kdcache precompute`")


def require_folder(path: PathLike) -> None:
    """Raise UsageError where there is no folder."""
    if not Path(path).is_dir():
        raise UsageError(f"no such folder: {path}")


def require_file(path: PathLike) -> None:
    """Raise UsageError where there is no file."""
    if not Path(path).is_file():
        raise UsageError(f"cannot read {path}: no such file")
