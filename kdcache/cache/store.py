"""Where a cache's objects are stored: bytes by key, in a folder or in an object store.

In: a path or a URL. Out: a `Store`. Invariants: an object is there whole or not at all; what
`write` or `write_new` has returned from is not lost in a power cut; `write_new` never changes an
object that is there.

Two writers with equal bytes may write the same objects. Where their bytes differ, one of them gets
StorageConflict, if both use `write_once`:

1. Objects that count together have one that is written last: zarr.json of a cache, the checksums of
   a shard. Without it, the others do not count.
2. Each object is put only where there is none (S3: If-None-Match). If there is one, equal bytes are
   success, so a rerun after a kill goes on and a put whose reply was lost can be sent again. Other
   bytes are a conflict.
3. So a writer that gets to the last object has found each of the others as its own, and no other
   writer changes them afterwards. Only a delete can: see `Cache.lock_shard`.

`lock_shard` keeps two writers of one machine (or of one NFS) from computing the same shard. An
object store, and a file system without locks, have no such lock: give each writer its own part.

S3's credentials and address come from where AWS's own tools find them (~/.aws, AWS_PROFILE,
AWS_ENDPOINT_URL, ...); all else can be set in fsspec's configuration (~/.config/fsspec/*.json).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import fsspec

from kdcache import files
from kdcache.errors import MissingDependency, StorageConflict, StorageError

LOCKS, CREATING = ".claims", ".creating"  # lock files in a folder; they hold nothing
# A store that does not answer is an error in about a minute; s3fs alone would try for six.
S3_CLIENT = {
    "connect_timeout": 5,
    "read_timeout": 6,
    "retries": {"mode": "standard", "max_attempts": 3},
}
S3_ROUNDS = 2
# The first botocore with these for PutObject. s3fs drops what botocore does not have.
IF_NONE_MATCH_SINCE, IF_MATCH_SINCE = (1, 35, 2), (1, 35, 69)
EXISTS, CONCURRENT, NOT_IMPLEMENTED = 412, 409, 501  # replies to a put with If-None-Match
PUT_ROUNDS = 5


class Store(Protocol):
    """Bytes by key; a key is a relative path with slashes. All methods raise StorageError.

    conditional   `write_new` is atomic; without, it checks and then puts
    """

    url: str
    conditional: bool

    def read(self, key: str) -> bytes | None:
        """The object, or None."""

    def size(self, key: str) -> int:
        """Bytes of an object; 0 where there is none."""

    def write(self, key: str, data: bytes) -> None:
        """Put or replace an object: durably, and whole or not at all."""

    def write_new(self, key: str, data: bytes) -> bool:
        """Put an object where there is none: durably, and whole or not at all.

        False where it is there already with these bytes. Raises StorageConflict for other bytes.
        """

    def replace(self, key: str, old: bytes, new: bytes) -> None:
        """Put `new` where `old` is: durably, and whole or not at all.

        Nothing happens where `new` is there already. Raises StorageConflict for other bytes.
        """

    def delete(self, key: str) -> None:
        """Remove an object, if it is there."""

    def sizes(self) -> dict[str, int]:
        """Bytes of every object, by key."""

    def create(self, objects: dict[str, bytes], last: str) -> None:
        """Put the first objects of a store, `last` last; where that is there already, none.

        Where another writer puts its own `last` meanwhile, that one stays: read it afterwards.
        Raises StorageConflict where one of the others is there with other bytes.
        """

    def lock_shard(self, number: int) -> bool:
        """Whether this process may write shard `number`; False while another one does."""

    def unlock_shard(self, number: int) -> None:
        """Let other processes lock a shard."""

    def release_locks(self, whole: bool = True) -> None:
        """Unlock all shards; where the work is whole, remove the lock files."""


def open_store(url: str | os.PathLike[str]) -> Store:
    """A folder, or `s3://…` and whatever else fsspec supports. Raises MissingDependency."""
    text = os.fspath(url)
    protocol, separator, rest = text.partition("://")
    if not separator or protocol in ("file", "local"):
        return FolderStore(Path(rest if separator else text))
    return ObjectStore(text)


def write_once(store: Store, objects: dict[str, bytes], last: str) -> None:
    """Put objects that count once `last` is there, each where there is none, `last` last.

    Objects with equal bytes may be there already. Raises StorageConflict where one has other bytes,
    and StorageError; both leave nothing that this call has put.
    """
    held = store.read(last)
    if held and held != objects[last]:
        raise _conflict(store, last)
    put: list[str] = []
    try:
        for key in sorted(objects, key=lambda key: key == last):
            if store.write_new(key, objects[key]):
                put.append(key)
    except StorageError:
        with contextlib.suppress(StorageError):
            for key in reversed(put):
                store.delete(key)
        raise


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

    def write(self, key: str, data: bytes) -> None:
        with self._storage_errors("write", key):
            files.write_file(self.root / key, data)

    def write_new(self, key: str, data: bytes) -> bool:
        with self._storage_errors("write", key):
            created = files.create_file(self.root / key, data)
        if not created and self.read(key) != data:
            raise _conflict(self, key)
        return created

    def replace(self, key: str, old: bytes, new: bytes) -> None:
        with self._storage_errors("write", key), files.lock_file(self.root / CREATING):
            held = self.read(key)
            if held == old:
                files.write_file(self.root / key, new)
        if held not in (old, new):
            raise _conflict(self, key)

    def delete(self, key: str) -> None:
        with self._storage_errors("write", key), contextlib.suppress(FileNotFoundError):
            path = self.root / key
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
                    files.write_file(self.root / key, objects[key])

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


class ObjectStore:
    """Objects below a prefix of an object store, where a put is whole or not at all.

    `write_new` is atomic on S3, where the server honours If-None-Match, as Amazon's does. A server
    that ignores it, an old botocore and fsspec's other file systems get a check before the put;
    `conditional` is False where that can be known.
    """

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
        self.conditional = False
        if options:
            self._fs.retries = S3_ROUNDS
            self.conditional = _botocore_version() >= IF_NONE_MATCH_SINCE

    def read(self, key: str) -> bytes | None:
        with self._storage_errors("read"):
            return self._get(key)

    def size(self, key: str) -> int:
        with self._storage_errors("read"):
            try:
                return int(self._fs.size(f"{self._prefix}/{key}"))
            except FileNotFoundError:
                return 0

    def write(self, key: str, data: bytes) -> None:
        with self._storage_errors("write"):
            self._fs.pipe_file(f"{self._prefix}/{key}", data)

    def write_new(self, key: str, data: bytes) -> bool:
        with self._storage_errors("write"):
            for _ in range(PUT_ROUNDS):
                held = self._get(key)
                if held is not None:
                    break
                if self._put_new(key, data):
                    return True
        if held != data:
            raise _conflict(self, key)
        return False

    def _get(self, key: str) -> bytes | None:
        try:
            return bytes(self._fs.cat_file(f"{self._prefix}/{key}"))
        except FileNotFoundError:
            return None

    def _put_new(self, key: str, data: bytes) -> bool:
        """Put an object; False where the server has one, or another is being put."""
        if self.conditional:
            bucket, name, _ = self._fs.split_path(f"{self._prefix}/{key}")
            arguments = {"Bucket": bucket, "Key": name, "Body": data, "IfNoneMatch": "*"}
            try:
                # Not pipe_file(mode="create"): s3fs before 2024.12 takes and ignores that mode.
                self._fs.call_s3("put_object", **arguments)
                return True
            except OSError as error:
                status = _http_status(error)
                if status in (EXISTS, CONCURRENT):
                    return False
                if status != NOT_IMPLEMENTED:
                    raise
                self.conditional = False
        self._fs.pipe_file(f"{self._prefix}/{key}", data)
        return True

    def replace(self, key: str, old: bytes, new: bytes) -> None:
        with self._storage_errors("write"):
            for _ in range(PUT_ROUNDS):
                # The tag first: whatever changes the object after this makes the put fail.
                tag = (
                    self._fs.info(f"{self._prefix}/{key}").get("ETag") if self.conditional else None
                )
                held = self._get(key)
                if held != old or self._put_over(key, new, tag):
                    break
        if held not in (old, new):
            raise _conflict(self, key)

    def _put_over(self, key: str, data: bytes, tag: str | None) -> bool:
        """Replace the object with this tag; False where it is no longer there."""
        if tag is None or _botocore_version() < IF_MATCH_SINCE:
            self._fs.pipe_file(f"{self._prefix}/{key}", data)
            return True
        bucket, name, _ = self._fs.split_path(f"{self._prefix}/{key}")
        try:
            self._fs.call_s3("put_object", Bucket=bucket, Key=name, Body=data, IfMatch=tag)
        except OSError as error:
            if _http_status(error) not in (EXISTS, CONCURRENT):
                raise
            return False
        return True

    def delete(self, key: str) -> None:
        with self._storage_errors("write"), contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(f"{self._prefix}/{key}")

    def sizes(self) -> dict[str, int]:
        with self._storage_errors("read"):
            try:
                found: dict[str, dict[str, Any]] = self._fs.find(self._prefix, detail=True)
            except FileNotFoundError:
                return {}
        return {name[len(self._prefix) + 1 :]: int(x["size"]) for name, x in found.items()}

    def create(self, objects: dict[str, bytes], last: str) -> None:
        if self.size(last):
            return
        for key in sorted(objects, key=lambda key: key == last):
            try:
                self.write_new(key, objects[key])
            except StorageConflict as error:
                if key != last:
                    raise StorageConflict(
                        f"{error}; another process creates this store, or was killed doing so: "
                        "remove what is there, or choose another path"
                    ) from error

    def lock_shard(self, number: int) -> bool:
        return True

    def unlock_shard(self, number: int) -> None: ...

    def release_locks(self, whole: bool = True) -> None: ...

    @contextmanager
    def _storage_errors(self, verb: str) -> Iterator[None]:
        try:
            yield
        except _client_errors() as error:
            words = (str(error).splitlines() or [repr(error)])[0]
            if isinstance(error, PermissionError):
                words += "; check the credentials"
            raise StorageError(f"cannot {verb} {self.url}: {words}") from error


def _conflict(store: Store, key: str) -> StorageConflict:
    return StorageConflict(f"{store.url}/{key} is there with other bytes than were to be written")


def _client_errors() -> tuple[type[BaseException], ...]:
    """OSError, and what S3's client raises besides: no credentials, no such host."""
    try:
        from aiohttp import ClientError as HttpError
        from botocore.exceptions import BotoCoreError, ClientError
    except ImportError:
        return OSError, RuntimeError, ValueError
    return OSError, RuntimeError, ValueError, BotoCoreError, ClientError, HttpError


def _http_status(error: OSError) -> int | None:
    """Of the reply behind an error of s3fs, which keeps botocore's error as the cause."""
    response = getattr(error.__cause__, "response", None) or {}
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return None if status is None else int(status)


def _botocore_version() -> tuple[int, ...]:
    from botocore import __version__

    return tuple(int(part) for part in __version__.split(".")[:3])
