"""Where a cache's objects lie: bytes by key, in a folder or in an object store.

In: a path or a URL. Out: a `Store`. What stays true: an object is there whole or not at all; what
`write` has returned from survives a power cut (a folder's files are fsynced, renamed, and their
folder is fsynced); what lies at the place is never mixed with what others put there.

`claim` keeps two writers of one machine (or of one NFS) off the same work; it ends with its
process, however that ends. An object store, or a file system without locks, has no such thing:
give its writers disjoint parts.

S3 takes its credentials and its address from where AWS's own tools do: ~/.aws, or AWS_PROFILE,
AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY; AWS_ENDPOINT_URL for a store that is not Amazon's. All
else that s3fs knows can be set in fsspec's configuration (~/.config/fsspec/*.json, FSSPEC_S3_...).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import fsspec

from kdcache.errors import MissingDependency, StorageError

PARTIAL = ".partial"
CLAIMS, CREATING = ".claims", ".creating"
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
# A store that does not answer is an error in about a minute; s3fs alone would try for six.
S3_CLIENT = {
    "connect_timeout": 5, "read_timeout": 6, "retries": {"mode": "standard", "max_attempts": 3}
}  # fmt: skip
S3_ROUNDS = 2


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
        """Put the first objects of a store, `last` last; where that is there already, none."""

    def lock_shard(self, number: int) -> bool:
        """Whether this process may do piece `number`; False while another one does."""

    def unlock_shard(self, number: int) -> None:
        """Give a claimed piece back."""

    def release_locks(self, whole: bool = True) -> None:
        """Give all claims back; where the work is whole, remove what they were made with."""


def open_store(url: str | os.PathLike[str]) -> Store:
    """A folder, or `s3://…` and whatever else fsspec knows. Raises MissingDependency."""
    text = os.fspath(url)
    protocol, separator, rest = text.partition("://")
    if not separator or protocol in ("file", "local"):
        return FolderStore(Path(rest if separator else text))
    return ObjectStore(text)


class FolderStore:
    """Objects as files below a folder."""

    def __init__(self, root: Path) -> None:
        self.url = str(root)
        self.root = root
        self._claims: int | None = None

    def read(self, key: str) -> bytes | None:
        with self._doing("read", key):
            try:
                return (self.root / key).read_bytes()
            except (FileNotFoundError, NotADirectoryError):
                return None

    def size(self, key: str) -> int:
        with self._doing("read", key):
            try:
                return (self.root / key).stat().st_size
            except (FileNotFoundError, NotADirectoryError):
                return 0

    def write(self, key: str, data: bytes) -> None:
        with self._doing("write", key):
            _write_file(self.root / key, data)

    def delete(self, key: str) -> None:
        with self._doing("write", key):
            (self.root / key).unlink(missing_ok=True)

    def sizes(self) -> dict[str, int]:
        with self._doing("read"):
            return dict(_sizes_below(self.root, ""))

    def create(self, objects: dict[str, bytes], last: str) -> None:
        with self._doing("write"), _alone(self.root / CREATING):
            if not (self.root / last).exists():
                for key in sorted(objects, key=lambda key: key == last):
                    _write_file(self.root / key, objects[key])

    def lock_shard(self, number: int) -> bool:
        # Byte `number` of an empty file: a lock that ends with its process.
        with self._doing("write"):
            if self._claims is None:
                self._claims = os.open(self.root / CLAIMS, os.O_RDWR | os.O_CREAT, 0o666)
            return _lock(self._claims, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number)

    def unlock_shard(self, number: int) -> None:
        assert self._claims is not None
        _lock(self._claims, fcntl.LOCK_UN, 1, number)

    def release_locks(self, whole: bool = True) -> None:
        if self._claims is not None:
            os.close(self._claims)
            self._claims = None
        for name in (CLAIMS, CREATING) if whole else ():
            with contextlib.suppress(OSError):  # not there, or the folder is read-only by now
                (self.root / name).unlink()

    @contextmanager
    def _doing(self, verb: str, key: str = "") -> Iterator[None]:
        try:
            yield
        except OSError as error:
            line = f"cannot {verb} {self.root / key}: {error.strerror or error}"
            raise StorageError(line) from error


class ObjectStore:
    """Objects below a prefix of an object store, where a put is whole or not at all."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        protocol = url.partition("://")[0]
        options: dict[str, Any] = {}
        if protocol in ("s3", "s3a"):
            ours = fsspec.config.conf.get(protocol, {}).get("config_kwargs", {})
            options["config_kwargs"] = {**S3_CLIENT, **ours}
        try:
            self._fs, self._prefix = fsspec.core.url_to_fs(
                self.url, use_listings_cache=False, **options
            )
        except ImportError as error:
            raise MissingDependency(
                f"{self.url} needs a package ({error}): for s3, pip install 'kdcache[s3]'"
            ) from error
        except ValueError as error:
            raise StorageError(f"cannot open {self.url}: {error}") from error
        if options:
            self._fs.retries = S3_ROUNDS

    def read(self, key: str) -> bytes | None:
        with self._doing("read"):
            try:
                return bytes(self._fs.cat_file(f"{self._prefix}/{key}"))
            except FileNotFoundError:
                return None

    def size(self, key: str) -> int:
        with self._doing("read"):
            try:
                return int(self._fs.size(f"{self._prefix}/{key}"))
            except FileNotFoundError:
                return 0

    def write(self, key: str, data: bytes) -> None:
        with self._doing("write"):
            self._fs.pipe_file(f"{self._prefix}/{key}", data)

    def delete(self, key: str) -> None:
        with self._doing("write"), contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(f"{self._prefix}/{key}")

    def sizes(self) -> dict[str, int]:
        with self._doing("read"):
            try:
                found: dict[str, dict[str, Any]] = self._fs.find(self._prefix, detail=True)
            except FileNotFoundError:
                return {}
        return {name[len(self._prefix) + 1 :]: int(x["size"]) for name, x in found.items()}

    def create(self, objects: dict[str, bytes], last: str) -> None:
        if not self.size(last):
            for key in sorted(objects, key=lambda key: key == last):
                self.write(key, objects[key])

    def lock_shard(self, number: int) -> bool:
        return True

    def unlock_shard(self, number: int) -> None: ...

    def release_locks(self, whole: bool = True) -> None: ...

    @contextmanager
    def _doing(self, verb: str) -> Iterator[None]:
        try:
            yield
        except _troubles() as error:
            words = (str(error).splitlines() or [repr(error)])[0]
            if isinstance(error, PermissionError):
                words += "; check the credentials"
            raise StorageError(f"cannot {verb} {self.url}: {words}") from error


def _troubles() -> tuple[type[BaseException], ...]:
    """OSError, and what S3's client raises besides: no credentials, no such host."""
    try:
        from aiohttp import ClientError as HttpError
        from botocore.exceptions import BotoCoreError, ClientError
    except ImportError:
        return OSError, RuntimeError, ValueError
    return OSError, RuntimeError, ValueError, BotoCoreError, ClientError, HttpError


def _write_file(path: Path, data: bytes) -> None:
    """To a partial name, to the disk, then renamed. One name: a rerun replaces what a kill left."""
    _make_folder(path.parent)
    partial = path.with_name(path.name + PARTIAL)
    try:
        partial.write_bytes(data)
        commit_file(partial, path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def commit_file(partial: Path, path: Path) -> None:
    """Give a whole file its name, so that a power cut leaves the old one there or the new one."""
    descriptor = os.open(partial, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    partial.replace(path)
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


def _sizes_below(folder: Path | str, prefix: str) -> Iterator[tuple[str, int]]:
    """(key, bytes) of the files below a folder that are objects; of a file or nothing, none."""
    try:
        entries = os.scandir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return
    with entries:
        for entry in entries:
            if entry.is_dir():
                yield from _sizes_below(entry.path, f"{prefix}{entry.name}/")
            elif not entry.name.endswith(PARTIAL) and entry.name not in (CLAIMS, CREATING):
                with contextlib.suppress(FileNotFoundError):  # another process may be at work
                    yield prefix + entry.name, entry.stat().st_size


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One process at a time; the others wait. The file at `path` is there only meanwhile."""
    _make_folder(path.parent)
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(descriptor, fcntl.LOCK_EX)
            if not _is_at(descriptor, path):  # whoever had the lock has removed this file
                continue
            try:
                yield
            finally:
                with contextlib.suppress(OSError):
                    path.unlink()
            return
        finally:
            os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _lock(descriptor: int, how: int, length: int = 0, start: int = 0) -> bool:
    """Whether the lock is ours now. Where the file system has no locks, it always is."""
    try:
        fcntl.lockf(descriptor, how, length, start)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):  # POSIX allows either for "taken"
            return False
        if error.errno not in NO_LOCKS:
            raise
    return True
