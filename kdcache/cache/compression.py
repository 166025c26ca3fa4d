"""How Zarr packs a column of records: pipelines chosen by measurement (docs/record-codecs.md).

In: a `Column`. Out: filters and compressors for `create_array`. What stays true: they are codecs of
the Zarr v3 specification, so that any reader of Zarr v3 reads a cache, and the last one is a
CRC-32C, so that a changed byte is an error. Cost at k = 10: a process on 2 cores reads some 8
million records a second through them.

    shuffle     bytes of one significance lie together, then LZ77 and entropy coding: records of a
                chunk share exponents, or pairs of classes
    bitshuffle  bit by bit, for numbers whose high bits are alike and that do not repeat
    columns     for small numbers: each column lies together, and most bit planes are nearly empty
    entropy     for bytes without repeats: the lowest level looks for none, and codes each block, a
                column, by frequencies of its own
"""

from __future__ import annotations

from typing import Any

from zarr.codecs import BloscCodec, Crc32cCodec, TransposeCodec

from kdcache.cache.codecs import Column

# Chunks are [1, rows, K]: with this each column lies together.
_COLUMNS = TransposeCodec(order=(0, 2, 1))


def pipeline(column: Column, chunk_rows: int) -> dict[str, Any]:
    """Keywords of `create_array`."""
    filters: tuple[TransposeCodec, ...] = ()
    shuffle, level, block = "shuffle", 5, {}
    if column.packing in ("bitshuffle", "columns"):
        shuffle = "bitshuffle"
    if column.packing in ("columns", "entropy"):
        filters = (_COLUMNS,)
    if column.packing == "entropy":
        shuffle, level, block = "noshuffle", 1, {"blocksize": chunk_rows}
    blosc = BloscCodec(cname="zstd", clevel=level, shuffle=shuffle, **block)
    # The CRC last, over the compressed bytes: Zarr itself checks the shard's index alone.
    return {"filters": filters, "compressors": (blosc, Crc32cCodec())}
