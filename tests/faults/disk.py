"""A disk that fails once: the n-th write, fsync, rename or read below a folder."""

from __future__ import annotations

import builtins
import errno
import io
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from kdcache import files

NEVER = 1 << 60


class Disk:
    """Counts what is done to files below a folder; operation number `fail_at` fails, from 0.

    done   what was done, by name
    """

    def __init__(self, folder: Path, fail_at: int = NEVER) -> None:
        self.folder, self.fail_at = str(folder), fail_at
        self.done: list[str] = []
        self._lock = threading.Lock()

    @property
    def failed(self) -> bool:
        return len(self.done) > self.fail_at

    def does(self, what: str, path: object) -> None:
        """Raises OSError where it is this one's turn."""
        if not str(path).startswith(self.folder):
            return
        with self._lock:
            self.done.append(f"{what} {os.path.relpath(str(path), self.folder)}")
            number = len(self.done) - 1
        if number == self.fail_at:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Within, all of Python's writes, fsyncs, renames and reads are of this disk."""
        real, sync, from_file, save = io.open, os.fsync, np.fromfile, files.save_tensors

        def opened(path: Any, mode: str = "r", *rest: Any, **options: Any) -> Any:
            if isinstance(path, int):
                return real(path, mode, *rest, **options)
            writes = set(mode) & set("wax+")
            self.does("open" if writes else "read", os.fspath(path))
            file = real(path, mode, *rest, **options)
            return _Written(file, self, os.fspath(path)) if writes else file

        def synced(descriptor: int) -> None:
            self.does("fsync", os.readlink(f"/proc/self/fd/{descriptor}"))
            sync(descriptor)

        def from_disk(path: Any, *rest: Any, **options: Any) -> Any:
            self.does("read", path)
            return from_file(path, *rest, **options)

        def saved(path: Path, *rest: Any) -> None:
            self.does("write", path)
            save(path, *rest)

        with (
            mock.patch.object(io, "open", opened),
            mock.patch.object(builtins, "open", opened),
            mock.patch.object(os, "fsync", synced),
            mock.patch.object(os, "replace", self._second("rename", os.replace)),
            mock.patch.object(os, "link", self._second("link", os.link)),
            mock.patch.object(os, "mkdir", self._first("mkdir", os.mkdir)),
            mock.patch.object(np, "fromfile", from_disk),
            mock.patch.object(files, "save_tensors", saved),
            mock.patch("kdcache.training.checkpoint.save_tensors", saved),
            mock.patch("kdcache.models.weights.save_tensors", saved),
        ):
            yield

    def _first(self, what: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def run(path: Any, *rest: Any, **options: Any) -> Any:
            self.does(what, os.fspath(path))
            return real(path, *rest, **options)

        return run

    def _second(self, what: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def run(source: Any, target: Any, *rest: Any, **options: Any) -> Any:
            self.does(what, os.fspath(target))
            return real(source, target, *rest, **options)

        return run


class _Written:
    """A file that is open for writing."""

    def __init__(self, file: Any, disk: Disk, path: str) -> None:
        self._file, self._disk, self._path = file, disk, path

    def write(self, data: Any) -> Any:
        self._disk.does("write", self._path)
        return self._file.write(data)

    def __enter__(self) -> _Written:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)
