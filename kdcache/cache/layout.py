"""Records of a shard to the objects of a Zarr group, and back, in memory.

In: `Records`, and where they stand on the tape. Out: the bytes that Zarr makes of them, an object
for each array; or the reverse. What stays true: the bytes are a function of records and metadata,
and a plain `zarr.open` reads them. Storing them is the business of `store.py`.

    logits   [V, N, K]  float32, float16 or uint8    relative to the record's largest
    classes  [V, N, K]  uint16 or uint32             not on dense tapes
    tail     [V, N, 3]  of the logits' type          neither on dense nor on sampled tapes
    counts   [V, N, K]  uint8                        sampled tapes, in the place of logits
    seals    [V, S, A, 32]  uint8                    a digest for each shard of each other array
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import zarr
from zarr.buffer.cpu import Buffer
from zarr.storage import MemoryStore

from kdcache.cache.codecs import top_k
from kdcache.cache.compression import pipeline
from kdcache.cache.records import Records, class_dtype
from kdcache.cache.spec import CacheSpec

CHUNK_BYTES = 1 << 18
SHARD_BYTES = 1 << 24
SEAL_BYTES = 32
GROUP = "zarr.json"


@dataclass(frozen=True)
class Layout:
    """Rows of an inner chunk, and of a shard: the unit of work and of commitment."""

    chunk_rows: int
    shard_rows: int

    @staticmethod
    def of(spec: CacheSpec) -> Layout:
        """About 256 KiB of records in a chunk and 16 MiB in a shard, in whole pairs."""
        row = record_bytes(spec)
        chunk = 2
        while chunk < spec.samples and chunk * row < CHUNK_BYTES:
            chunk *= 2
        shards = max(1, min(SHARD_BYTES // (chunk * row), -(-spec.samples // chunk)))
        return Layout(chunk, chunk * shards)

    def shards(self, samples: int) -> int:
        """Shards of a view."""
        return -(-samples // self.shard_rows)


def columns(spec: CacheSpec) -> dict[str, tuple[int, np.dtype[Any]]]:
    """Width and type of each array of records."""
    classes = {"classes": (spec.top_k, class_dtype(spec.classes))}
    if spec.draws:
        return {**classes, "counts": (spec.top_k, np.dtype(np.uint8))}
    logits = {"logits": (spec.top_k, np.dtype(spec.dtype))}
    if spec.dense:
        return logits
    return {**logits, **classes, "tail": (3, top_k.tail_dtype(spec.dtype))}


def record_bytes(spec: CacheSpec) -> int:
    """Bytes of a record before compression."""
    return sum(width * dtype.itemsize for width, dtype in columns(spec).values())


def key(name: str, view: int, shard: int) -> str:
    """Of an array's object in the store."""
    return f"{name}/c/{view}/{shard}/0" + ("/0" if name == "seals" else "")


def metadata(spec: CacheSpec, layout: Layout, attributes: dict[str, Any]) -> dict[str, bytes]:
    """The zarr.json of the group, under GROUP, and of each array."""
    store = MemoryStore()
    group = zarr.create_group(store, attributes=attributes)
    found = columns(spec)
    for name, (width, dtype) in found.items():
        group.create_array(
            name,
            shape=(spec.views, spec.samples, width),
            chunks=(1, layout.chunk_rows, width),
            shards=(1, layout.shard_rows, width),
            dtype=dtype,
            fill_value=np.iinfo(dtype).max if dtype.kind == "u" else np.nan,
            **pipeline(
                name, dtype, classes=spec.classes, dense=spec.dense, chunk_rows=layout.chunk_rows
            ),
        )
    group.create_array(
        "seals",
        shape=(spec.views, layout.shards(spec.samples), len(found), SEAL_BYTES),
        chunks=(1, 1, len(found), SEAL_BYTES),
        dtype=np.uint8,
        compressors=None,
    )
    return _bytes_of(store)


def encode(
    zarr_json: dict[str, bytes], view: int, start: int, records: Records
) -> dict[str, bytes]:
    """The object of each array, by name, for the shard whose first position is `start`."""
    store = _store(zarr_json)
    group = zarr.open_group(store, mode="r+")
    for name, array in records.arrays().items():
        _array(group, name)[view, start : start + len(records)] = array
    objects = _bytes_of(store)
    return {key.partition("/")[0]: objects[key] for key in objects.keys() - zarr_json.keys()}


def decode(
    zarr_json: dict[str, bytes], view: int, start: int, stop: int, objects: dict[str, bytes]
) -> Records:
    """Records of positions [start, stop) from the objects, by key, that hold them.

    Raises whatever Zarr and its codecs do for bytes that are not what `encode` gave.
    """
    group = zarr.open_group(_store({**zarr_json, **objects}), mode="r")
    names = {key.partition("/")[0] for key in objects}
    return Records(**{n: np.asarray(_array(group, n)[view, start:stop]) for n in names})


def _array(group: zarr.Group, name: str) -> zarr.Array[Any]:
    array = group[name]
    assert isinstance(array, zarr.Array)
    return array


def _store(objects: dict[str, bytes]) -> MemoryStore:
    return MemoryStore({key: Buffer.from_bytes(data) for key, data in objects.items()})


def _bytes_of(store: MemoryStore) -> dict[str, bytes]:
    return {key: buffer.to_bytes() for key, buffer in store._store_dict.items()}
