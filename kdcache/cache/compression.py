"""How Zarr stores each array of records: pipelines chosen by measurement (docs/tape-codec.md).

In: an array's name and type, and what tells its records apart. Out: filters and compressors for
`create_array`. What stays true: they are codecs of the Zarr v3 specification, so that any reader
of Zarr v3 reads a tape, and the last one is a CRC-32C, so that a changed byte is an error.
Cost at k = 10: a process on 2 cores reads some 8 million records a second through them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from zarr.codecs import BloscCodec, Crc32cCodec, TransposeCodec

# Chunks are [1, rows, K]: with this each column lies together.
COLUMNS = TransposeCodec(order=(0, 2, 1))


def pipeline(
    name: str, dtype: np.dtype[Any], *, classes: int, dense: bool, chunk_rows: int
) -> dict[str, Any]:
    """Keywords of `create_array` for the array `name` of a tape of a teacher with C classes."""
    filters, blosc = _blosc(name, dtype, classes, dense, chunk_rows)
    return {"filters": filters, "compressors": (blosc, Crc32cCodec())}


def _blosc(
    name: str, dtype: np.dtype[Any], classes: int, dense: bool, chunk_rows: int
) -> tuple[tuple[TransposeCodec, ...], BloscCodec]:
    if name == "classes" and classes > 256:
        # Byte by byte a class takes 8 bits and a badly coded rest; bit by bit, log2 C. Repeats are
        # too rare to pay for.
        return (), BloscCodec(cname="zstd", clevel=5, shuffle="bitshuffle")
    if name == "classes" or dense or dtype.itemsize > 1:
        # Records of a chunk share pairs of classes, or the exponents of their logits.
        return (), BloscCodec(cname="zstd", clevel=5, shuffle="shuffle")
    if name in ("logits", "counts"):
        # Steps and counts are small numbers: most of their bit planes are nearly empty.
        return (COLUMNS,), BloscCodec(cname="zstd", clevel=5, shuffle="bitshuffle")
    # Bytes without repeats: the lowest level looks for none, and codes each block, a column, by
    # frequencies of its own.
    return (COLUMNS,), BloscCodec(cname="zstd", clevel=1, shuffle="noshuffle", blocksize=chunk_rows)
