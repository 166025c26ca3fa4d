"""A store in a folder: an object is a file, and a lock is a byte range of one.

In, out and invariants: those of `store.Store`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kdcache import files
from kdcache.errors import StorageError, conflict_at

LOCKS, CREATING = ".claims", ".creating"  # lock files in a folder; they hold nothing


class FolderStore:
    """Objects as files below a folder. `write_new` is atomic where the file system has locks."""

    conditional = True

    def __init__(self, root: Path) -> None:
        self.url = str(root)
        self.root = root
        self._locks: int | None = None

    def read(self, key: str) -> bytes | None:
        with self._storage_errors("read", key):
            try:
                return (self.root / key).read_bytes()
            except (FileNotFoundError, NotADirectoryError):
                return None

    def size(self, key: str) -> int:
        with self._storage_errors("read", key):
            try:
                return (self.root / key).stat().st_size
            except (FileNotFoundError, NotADirectoryError):
                return 0

    def write_new(self, key: str, data: bytes) -> bool:
        with self._storage_errors("write", key):
            created = files.create_file(self.root / key, data)
        # A rerun after a kill gives the same bytes again, which is no conflict.
        if not created and self.read(key) != data:
            raise conflict_at(self.url, key)
        return created

    def replace(self, key: str, old: bytes, new: bytes) -> None:
        # Rename replaces whatever is there, so reading and replacing are one step under a lock.
        with self._storage_errors("write", key), files.lock_file(self.root / CREATING):
            held, path = self.read(key), self.root / key
            if held == old:
                files.remove_abandoned(path.parent, path.name)
                files.write_file(path, new)
        if held not in (old, new):
            raise conflict_at(self.url, key)

    def delete(self, key: str) -> None:
        with self._storage_errors("write", key), contextlib.suppress(FileNotFoundError):
            path = self.root / key
            files.remove_abandoned(path.parent, path.name)
            path.unlink()
            files.sync_folder(path.parent)  # a power cut must not bring it back over new objects

    def sizes(self) -> dict[str, int]:
        with self._storage_errors("read"):
            return dict(files.iter_sizes(self.root, ignored=(LOCKS, CREATING)))

    def create(self, objects: dict[str, bytes], last: str) -> None:
        with self._storage_errors("write"), files.lock_file(self.root / CREATING):
            if not (self.root / last).exists():
                # With the lock, what is there is from a killed process: it is replaced.
                for key in sorted(objects, key=lambda key: key == last):
                    path = self.root / key
                    files.remove_abandoned(path.parent, path.name)
                    files.write_file(path, objects[key])

    def lock_shard(self, number: int) -> bool:
        # Byte `number` of an empty file: a lock that ends with its process.
        with self._storage_errors("write"):
            if self._locks is None:
                self._locks = os.open(self.root / LOCKS, os.O_RDWR | os.O_CREAT, 0o666)
            return files.lock(self._locks, number, 1, wait=False)

    def unlock_shard(self, number: int) -> None:
        assert self._locks is not None
        files.unlock(self._locks, number, 1)

    def release_locks(self, whole: bool = True) -> None:
        if self._locks is not None:
            os.close(self._locks)
            self._locks = None
        if whole:
            files.remove_abandoned(self.root, below=True)
        for name in (LOCKS, CREATING) if whole else ():
            with contextlib.suppress(OSError):  # not there, or the folder is read-only by now
                (self.root / name).unlink()

    @contextmanager
    def _storage_errors(self, verb: str, key: str = "") -> Iterator[None]:
        try:
            yield
        except OSError as error:
            line = f"cannot {verb} {self.root / key}: {error.strerror or error}"
            raise StorageError(line) from error
