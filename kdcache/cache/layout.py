"""Records of a shard to the objects of a Zarr group, and back, in memory.

In: `Records`, and their place in the cache. Out: the bytes that Zarr makes of them, an object for
each array; or the reverse. What stays true: the bytes are a function of records and metadata, and
plain Zarr reads them. `store.py` stores them.

    one array for each column of the record codec, [num_views, num_samples, width]
    one for each table of a calibrated one, in one piece, which has nothing of views
    seals    [num_views, shards, columns, 32]  uint8, a SHA-256 for each shard of each column
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import zarr
from zarr.buffer.cpu import Buffer
from zarr.codecs import Crc32cCodec
from zarr.storage import MemoryStore

from kdcache.cache.codecs import Column
from kdcache.cache.compression import pipeline
from kdcache.cache.records import NO_TABLES, Records, Tables
from kdcache.cache.spec import CacheSpec
from kdcache.spec import parse_json

# Of records before compression. A cache stores its own sizes, so that these may change.
CHUNK_BYTES = 1 << 18
SHARD_BYTES = 1 << 24
# Of an entropy-coded chunk, whose tables of frequencies are paid once: rows, and at most so many
# bytes.
CODED_ROWS = 4096
MAX_CODED_BYTES = 1 << 26
SEAL_BYTES = 32
MAX_SHARD_ROWS = 1 << 32
MAX_SHARDS = 1 << 20  # of a cache: 16 TiB of records
GROUP = "zarr.json"
# Of Zarr and its codecs, for bytes and shapes that are not what `encode` gave.
DECODE_ERRORS = (ArithmeticError, LookupError, OSError, RuntimeError, TypeError, ValueError)
SEALS = "seals"


@dataclass(frozen=True)
class Layout:
    """Rows of an inner chunk, and of a shard, the unit of work and of commitment."""

    chunk_rows: int
    shard_rows: int

    def __post_init__(self) -> None:
        for rows in (self.chunk_rows, self.shard_rows):
            if type(rows) is not int or not 1 <= rows <= MAX_SHARD_ROWS:
                raise ValueError(f"a chunk or a shard has {rows!r} rows")

    @staticmethod
    def of(spec: CacheSpec) -> Layout:
        """About 256 KiB of records in a chunk and 16 MiB in a shard, in whole pairs.

        More in a chunk, and so perhaps in a shard, where it is entropy-coded.
        """
        row, least_rows = spec.record_bytes, 0
        if any(c.packing == "rans" for c in spec.codec.columns(spec.num_classes).values()):
            least_rows = min(CODED_ROWS, MAX_CODED_BYTES // row)
        # Even from the start, so that no pair of a view lies in two shards.
        chunk = 2
        while chunk < spec.num_samples and (chunk * row < CHUNK_BYTES or 2 * chunk <= least_rows):
            chunk *= 2
        shards = max(1, min(SHARD_BYTES // (chunk * row), -(-spec.num_samples // chunk)))
        return Layout(chunk, chunk * shards)

    def shards(self, num_samples: int) -> int:
        """Shards of a view."""
        return -(-num_samples // self.shard_rows)


def key(name: str, view: int, shard: int) -> str:
    """Of an array's object in the store."""
    return f"{name}/c/{view}/{shard}/0" + ("/0" if name == SEALS else "")


def group_json(attributes: dict[str, Any]) -> bytes:
    """The zarr.json of the group."""
    store = MemoryStore()
    zarr.create_group(store, attributes=attributes)
    return _bytes_of(store)[GROUP]


def metadata(
    spec: CacheSpec, layout: Layout, attributes: dict[str, Any], tables: Tables = NO_TABLES
) -> dict[str, bytes]:
    """The zarr.json of the group, under GROUP, and of each array; and the objects of the tables."""
    # In memory: Zarr's own writing does not fsync, and gives no bytes to hash.
    store = MemoryStore()
    group = zarr.create_group(store, attributes=attributes)
    columns = spec.codec.columns(spec.num_classes)
    for name, column in columns.items():
        group.create_array(
            name,
            shape=(spec.num_views, spec.num_samples, column.width),
            chunks=(1, layout.chunk_rows, column.width),
            shards=(1, layout.shard_rows, column.width),
            dtype=column.dtype,
            fill_value=_fill_value(column),
            **pipeline(column, layout.chunk_rows),
        )
    group.create_array(
        SEALS,
        shape=(spec.num_views, layout.shards(spec.num_samples), len(columns), SEAL_BYTES),
        chunks=(1, 1, len(columns), SEAL_BYTES),
        dtype=np.uint8,
        # Digests are random bytes, which do not compress.
        compressors=None,
    )
    for name, table in tables.items():
        # Floats of unlike values do not compress.
        group.create_array(name, data=table, chunks=table.shape, compressors=Crc32cCodec())
    return _bytes_of(store)


def _fill_value(column: Column) -> float:
    """What rows of a shard that do not exist hold; decoding refuses a record of it."""
    if column.packing == "rans":
        return 0  # the rows that pad a view's last shard should take no bits
    return int(np.iinfo(column.dtype).max) if column.dtype.kind == "u" else np.nan


def require_arrays(
    zarr_json: dict[str, bytes], spec: CacheSpec, layout: Layout, grown_views: int | None
) -> None:
    """Raise ValueError unless the zarr.json are of arrays of this spec's records.

    grown_views   of the arrays that are to replace these, one after another
    """
    num_shards = spec.num_views * layout.shards(spec.num_samples)
    if num_shards > MAX_SHARDS:
        raise ValueError(f"it has {num_shards:,} shards, and at most {MAX_SHARDS:,} can be")
    if parse_json(zarr_json[GROUP]).get("zarr_format") != 3:
        raise ValueError("it is no group of Zarr v3")
    for name, column in spec.codec.columns(spec.num_classes).items():
        found = parse_json(zarr_json[f"{name}/{GROUP}"])["shape"]
        if found[0] not in (spec.num_views, grown_views) or found[1:] != [
            spec.num_samples,
            column.width,
        ]:
            raise ValueError(f"the array {name} has the shape {found}")


def resize(
    zarr_json: dict[str, bytes], num_views: int, tables: Collection[str]
) -> dict[str, bytes]:
    """Every zarr.json, of the arrays for so many views; all else that they say stays."""
    store = _store(zarr_json)
    for name, array in zarr.open_group(store, mode="r+").arrays():
        # Resized, not made anew: what the stored metadata says of codecs has to stay.
        if name not in tables:
            array.resize((num_views, *array.shape[1:]))
    return _bytes_of(store)


def encode(
    zarr_json: dict[str, bytes], view: int, start: int, records: Records
) -> dict[str, bytes]:
    """The object of each array, by name, for the shard whose first position is `start`."""
    store = _store(zarr_json)
    group = zarr.open_group(store, mode="r+")
    for name, array in records.columns.items():
        # Zarr leaves out what equals the fill value, but a shard has an object of each column.
        empty = bool((array == _array(group, name).fill_value).all())
        with zarr.config.set({"array.write_empty_chunks": empty}):
            _array(group, name)[view, start : start + len(records)] = array
    objects = _bytes_of(store)
    return {key.partition("/")[0]: objects[key] for key in objects.keys() - zarr_json.keys()}


def decode(
    zarr_json: dict[str, bytes], view: int, start: int, stop: int, objects: dict[str, bytes]
) -> Records:
    """Records of positions [start, stop) from the objects, by key, that hold them.

    Raises DECODE_ERRORS.
    """
    group = zarr.open_group(_store({**zarr_json, **objects}), mode="r")
    names = {key.partition("/")[0] for key in objects}
    return Records({n: np.asarray(_array(group, n)[view, start:stop]) for n in names})


def pack(spec: CacheSpec, records: Records) -> tuple[int, float]:
    """Encode records in whole chunks, as in a cache: how many they were, and bytes of each."""
    layout, rows = Layout.of(spec), len(records)
    if rows < min(spec.num_samples, layout.shard_rows):
        chunk = min(layout.chunk_rows, rows)
        rows = rows // chunk * chunk
        layout = Layout(chunk, rows)
    rows = min(rows, layout.shard_rows, spec.num_samples)
    zarr_json = metadata(replace(spec, num_views=1, num_samples=rows), layout, {})
    objects = encode(zarr_json, 0, 0, records[:rows])
    return rows, sum(map(len, objects.values())) / rows


def decode_tables(objects: dict[str, bytes], names: Collection[str]) -> Tables:
    """Some arrays of a cache, whole."""
    group = zarr.open_group(_store(objects), mode="r")
    return {name: np.asarray(_array(group, name)[:]) for name in names}


def _array(group: zarr.Group, name: str) -> zarr.Array[Any]:
    array = group[name]
    assert isinstance(array, zarr.Array)
    return array


def _store(objects: dict[str, bytes]) -> MemoryStore:
    return MemoryStore({key: Buffer.from_bytes(data) for key, data in objects.items()})


def _bytes_of(store: MemoryStore) -> dict[str, bytes]:
    return {key: buffer.to_bytes() for key, buffer in store._store_dict.items()}
