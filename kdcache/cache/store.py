"""Where a cache's objects are stored: bytes by key, in a folder or in an object store.

In: a path or a URL. Out: a `Store`. Invariants: an object is there whole or not at all; what
`write_new` or `replace` has returned from is not lost in a power cut; `write_new` never changes an
object that is there.

Two writers with equal bytes may write the same objects. Where their bytes differ, one of them gets
StorageConflict, if both use `write_once`:

1. Objects that count together have one that is written last: zarr.json of a cache, the checksums of
   a shard. Without it, the others do not count.
2. Each object is put only where there is none (S3: If-None-Match). If there is one, equal bytes are
   success, so a rerun after a kill goes on and a put whose reply was lost can be sent again. Other
   bytes are a conflict.
3. So a writer that gets to the last object has found each of the others as its own, and no other
   writer changes them afterwards. Only a delete can: see `LogitCache.lock_shard`.

`lock_shard` keeps two writers of one machine (or of one NFS) from computing the same shard. An
object store, and a file system without locks, have no such lock: give each writer its own part.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Protocol

from kdcache.cache.folder_store import FolderStore
from kdcache.cache.object_store import ObjectStore
from kdcache.errors import StorageError, conflict_at


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
    # Before anything is put: where `last` is there, all is, and one read tells a conflict.
    held = store.read(last)
    if held and held != objects[last]:
        raise conflict_at(store.url, last)
    put: list[str] = []
    try:
        for key in sorted(objects, key=lambda key: key == last):
            if store.write_new(key, objects[key]):
                put.append(key)
    except StorageError:
        with contextlib.suppress(StorageError):
            # Only what this call has put, and `last` first, so that no part of it counts meanwhile.
            for key in reversed(put):
                store.delete(key)
        raise
