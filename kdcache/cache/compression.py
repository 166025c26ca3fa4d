"""How Zarr packs a column of records: pipelines chosen by measurement (docs/record-codecs.md).

In: a `Column`. Out: the codecs for `create_array`. What stays true: but for one they are codecs of
the Zarr v3 specification, so that any reader of Zarr v3 reads the column, and the last one is a
CRC-32C, so that a changed byte is an error. Cost at k = 10: a process on 2 cores reads some 8
million records a second through them.

    shuffle     bytes of one significance lie together, then LZ77 and entropy coding: records of a
                chunk share exponents, or pairs of classes
    bitshuffle  bit by bit, for numbers whose high bits are alike and that do not repeat
    columns     for small numbers: each column lies together, and most bit planes are nearly empty
    entropy     for bytes without repeats: the lowest level looks for none, and codes each block, a
                column, by frequencies of its own
    rans        for columns of small numbers, most of which take less than a bit each: Huffman
                codes, which the others end in, take at least one. `RansCodec` is ours; a reader
                without kdcache takes it from docs/cache-format.md
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from zarr.abc.codec import ArrayBytesCodec
from zarr.codecs import BloscCodec, Crc32cCodec, TransposeCodec
from zarr.registry import register_codec

from kdcache.cache.codecs import Column

RANS = "kdcache.rans"

# Chunks are [1, rows, K]: with this each column lies together.
_COLUMNS = TransposeCodec(order=(0, 2, 1))


@dataclass(frozen=True)
class RansCodec(ArrayBytesCodec):  # type: ignore[misc]
    """`rans` as a serializer of Zarr v3: chunks [1, rows, columns] of 16-bit integers."""

    is_fixed_size = False

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> RansCodec:
        return cls()

    def to_dict(self) -> dict[str, Any]:
        return {"name": RANS}

    async def _encode_single(self, chunk_array: Any, chunk_spec: Any) -> Any:
        array = chunk_array.as_numpy_array().reshape(-1, chunk_spec.shape[-1])
        data = await asyncio.to_thread(_rans().encode, array)
        return chunk_spec.prototype.buffer.from_bytes(data)

    async def _decode_single(self, chunk_bytes: Any, chunk_spec: Any) -> Any:
        dtype = chunk_spec.dtype.to_native_dtype()
        shape = chunk_spec.shape[-2:]
        array = await asyncio.to_thread(_rans().decode, chunk_bytes.to_bytes(), dtype, shape)
        return chunk_spec.prototype.nd_buffer.from_numpy_array(array.reshape(chunk_spec.shape))

    def compute_encoded_size(self, input_byte_length: int, _chunk_spec: Any) -> int:
        raise NotImplementedError  # it depends on the values


def _rans() -> Any:
    """Numba, which it needs, takes a second to import, and other columns do not need it."""
    from kdcache.cache import rans

    return rans


register_codec(RANS, RansCodec)


def pipeline(column: Column, chunk_rows: int) -> dict[str, Any]:
    """Keywords of `create_array`."""
    if column.packing == "rans":
        # Tables of frequencies lie before the words: zstd halves those, and leaves these alone.
        tables = BloscCodec(cname="zstd", clevel=5, shuffle="noshuffle")
        return {"serializer": RansCodec(), "compressors": (tables, Crc32cCodec())}
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
