"""Where a tape's objects lie: bytes by key, in a folder or in an object store.

In: a path or a URL. Out: a `Store`. What stays true: an object is there whole or not at all; what
`write` has returned from survives a power cut (a folder's files are fsynced, renamed, and their
folder is fsynced); what lies at the place is never mixed with what others put there.

`claim` keeps two writers of one machine (or of one NFS) off the same work; it ends with its
process, however that ends. An object store has no such thing: give its writers disjoint parts.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import fsspec

from kdcache.errors import MissingDependency, StorageError


class Store(Protocol):
    """Bytes by key; a key is a relative path with slashes. All raise StorageError."""

    url: str

    def read(self, key: str) -> bytes | None:
        """The object, or None."""

    def size(self, key: str) -> int:
        """Bytes of an object; 0 where there is none."""

    def write(self, key: str, data: bytes) -> None:
        """Put or replace an object: durably, and whole or not at all."""

    def delete(self, key: str) -> None:
        """Remove an object, if it is there."""

    def sizes(self) -> dict[str, int]:
        """Bytes of every object, by key."""

    def create(self, objects: dict[str, bytes], last: str) -> None:
        """Put the first objects of a store; the one called `last` comes into being last."""

    def claim(self, number: int) -> bool:
        """Whether this process may do piece `number`; False while another one does."""

    def release(self, number: int) -> None:
        """Give a claimed piece back."""

    def forget_claims(self) -> None:
        """Remove what claims are made with: for when no work is left."""


def open_store(url: str | Path) -> Store:
    """A folder, or `s3://…` and whatever else fsspec knows. Raises MissingDependency."""
    text = str(url)
    protocol, separator, rest = text.partition("://")
    if not separator or protocol == "file":
        return FolderStore(Path(rest if separator else text))
    return ObjectStore(text)


class FolderStore:
    """Objects as files below a folder."""

    def __init__(self, root: Path) -> None:
        self.url = str(root)
        self.root = root
        self._lock: int | None = None

    def read(self, key: str) -> bytes | None:
        try:
            return (self.root / key).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise StorageError(f"cannot read {self.root / key}: {error.strerror}") from error

    def size(self, key: str) -> int:
        file = self.root / key
        return file.stat().st_size if file.is_file() else 0

    def write(self, key: str, data: bytes) -> None:
        with self._writing():
            _write_file(self.root / key, data)

    def delete(self, key: str) -> None:
        with self._writing():
            (self.root / key).unlink(missing_ok=True)

    def sizes(self) -> dict[str, int]:
        found = {}
        for file in self.root.rglob("*"):
            with contextlib.suppress(FileNotFoundError):  # a precompute may be at work
                if file.is_file():
                    found[file.relative_to(self.root).as_posix()] = file.stat().st_size
        return found

    def create(self, objects: dict[str, bytes], last: str) -> None:
        """In a folder beside the place, which is then renamed: `last` needs no care of its own."""
        partial = self.root.with_name(f"{self.root.name}.partial-{os.getpid()}")
        with self._writing():
            shutil.rmtree(partial, ignore_errors=True)
            try:
                for key, data in objects.items():
                    _write_file(partial / key, data)
                with contextlib.suppress(FileNotFoundError):
                    self.root.rmdir()  # refuses what is not empty
                partial.rename(self.root)
                _sync_folder(self.root.parent)
            finally:
                shutil.rmtree(partial, ignore_errors=True)

    def claim(self, number: int) -> bool:
        # Byte `number` of an empty file beside the tape: a lock that ends with its process.
        with self._writing():
            if self._lock is None:
                self._lock = os.open(self._lock_path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number)
            except (BlockingIOError, PermissionError):  # POSIX allows either for "taken"
                return False
            return True

    def release(self, number: int) -> None:
        assert self._lock is not None
        fcntl.lockf(self._lock, fcntl.LOCK_UN, 1, number)

    def forget_claims(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
        self._lock_path.unlink(missing_ok=True)

    @property
    def _lock_path(self) -> Path:
        return self.root.with_name(self.root.name + ".lock")

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            line = f"cannot write {self.root}: {error.strerror or error}"
            raise StorageError(line) from error


class ObjectStore:
    """Objects below a prefix of an object store, where a put is whole or not at all."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        try:
            self._fs, self._prefix = fsspec.core.url_to_fs(self.url)
        except ImportError as error:
            raise MissingDependency(
                f"{self.url} needs a package ({error}): for s3, pip install 'kdcache[s3]'"
            ) from error
        except ValueError as error:
            raise StorageError(f"cannot open {self.url}: {error}") from error
        self._fs.use_listings_cache = False

    def read(self, key: str) -> bytes | None:
        with self._talking("read"):
            try:
                return bytes(self._fs.cat_file(f"{self._prefix}/{key}"))
            except FileNotFoundError:
                return None

    def size(self, key: str) -> int:
        with self._talking("read"):
            try:
                return int(self._fs.size(f"{self._prefix}/{key}"))
            except FileNotFoundError:
                return 0

    def write(self, key: str, data: bytes) -> None:
        with self._talking("write"):
            self._fs.pipe_file(f"{self._prefix}/{key}", data)

    def delete(self, key: str) -> None:
        with self._talking("write"), contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(f"{self._prefix}/{key}")

    def sizes(self) -> dict[str, int]:
        with self._talking("list"):
            self._fs.invalidate_cache()
            try:
                found: dict[str, dict[str, Any]] = self._fs.find(self._prefix, detail=True)
            except FileNotFoundError:
                return {}
        return {name[len(self._prefix) + 1 :]: int(x["size"]) for name, x in found.items()}

    def create(self, objects: dict[str, bytes], last: str) -> None:
        for key in sorted(objects, key=lambda key: key == last):
            self.write(key, objects[key])

    def claim(self, number: int) -> bool:
        return True

    def release(self, number: int) -> None: ...

    def forget_claims(self) -> None: ...

    @contextmanager
    def _talking(self, verb: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise
        except _troubles() as error:
            words = (str(error).splitlines() or [repr(error)])[0]
            raise StorageError(f"cannot {verb} {self.url}: {words}") from error


def _troubles() -> tuple[type[BaseException], ...]:
    """OSError, and what S3's client raises besides: no credentials, no such host."""
    try:
        from botocore.exceptions import BotoCoreError, ClientError
    except ImportError:
        return OSError, RuntimeError, ValueError
    return OSError, RuntimeError, ValueError, BotoCoreError, ClientError


def _write_file(path: Path, data: bytes) -> None:
    """To a partial name, to the disk, then renamed. One name: a rerun replaces what a kill left."""
    _make_folder(path.parent)
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _make_folder(path: Path) -> None:
    if not path.is_dir():
        _make_folder(path.parent)
        path.mkdir(exist_ok=True)
        _sync_folder(path.parent)


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
