"""Pipelines lose nothing, are Zarr's own, catch a changed byte, and are worth their names."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import get_args

import numpy as np
import pytest
import torch
import zarr
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec
from zarr.core.buffer.cpu import Buffer
from zarr.storage import MemoryStore

from kdcache.cache.codecs import Column, Sampled, ValueType
from kdcache.cache.compression import pipeline
from tests.conftest import codec_for

ROWS, CHUNK_ROWS = 2600, 1024
# The chunk codecs of the Zarr v3 specification.
SPECIFIED = {"transpose", "bytes", "blosc", "zstd", "gzip", "crc32c"}

Case = tuple[str, NDArray[np.generic], int, bool, Column]


def cases() -> Iterator[Case]:
    torch.manual_seed(0)
    for classes, dtype in itertools.product((169, 1000), get_args(ValueType)):
        # A low rank makes some classes likely together, as a network's head does.
        z = 0.5 * torch.randn(ROWS, 30) @ torch.randn(30, classes)
        for top_k in (10, classes):
            codec = codec_for(classes, top_k, dtype)
            columns = codec.columns(classes)
            for name, array in codec.encode(z).columns.items():
                yield name, array, classes, top_k == classes, columns[name]
    counts = np.random.default_rng(0).poisson(1, (ROWS, 12)).astype(np.uint8)
    yield "counts", counts, 1000, False, Sampled(12).columns(1000)["counts"]


CASES = list(cases())
IDS = [
    f"{name}-{array.dtype}-{classes}{'-dense' * dense}" for name, array, classes, dense, _ in CASES
]


def stored(case: Case, **other: object) -> tuple[MemoryStore, str]:
    name, array, _, _, column = case
    store = MemoryStore()
    ours = pipeline(column, CHUNK_ROWS)
    made = zarr.create_array(
        store,
        name=name,
        shape=(1, *array.shape),
        dtype=array.dtype,
        chunks=(1, CHUNK_ROWS, array.shape[1]),
        shards=(1, 4 * CHUNK_ROWS, array.shape[1]),
        **(other or ours),
    )
    made[0] = array
    return store, f"{name}/c/0/0/0"


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_arrays_come_back_as_they_were(case: Case) -> None:
    store, _ = stored(case)
    found = zarr.open_group(store, mode="r")[case[0]]
    assert isinstance(found, zarr.Array)
    np.testing.assert_array_equal(found[0], case[1])
    np.testing.assert_array_equal(found[0, 1000:1050], case[1][1000:1050])


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_any_reader_of_zarr_will_do_and_a_checksum_comes_last(case: Case) -> None:
    store, _ = stored(case)
    found = zarr.open_group(store, mode="r")[case[0]]
    assert isinstance(found, zarr.Array)
    assert isinstance(found.compressors[-1], Crc32cCodec)
    codecs = found.metadata.to_dict()["codecs"][0]["configuration"]["codecs"]
    assert {c["name"] for c in codecs} <= SPECIFIED


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_a_changed_byte_is_an_error(case: Case) -> None:
    store, key = stored(case)
    data = bytearray(store._store_dict[key].to_bytes())
    data[len(data) // 3] ^= 4
    store._store_dict[key] = Buffer.from_bytes(bytes(data))
    found = zarr.open_group(store, mode="r")[case[0]]
    assert isinstance(found, zarr.Array)
    with pytest.raises((ValueError, RuntimeError)):
        found[:]


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_it_is_smaller_than_zarrs_own_choice(case: Case) -> None:
    """Or nearly as small: Zarr's is zstd alone."""
    ours, theirs = stored(case), stored(case, compressors="auto")
    sizes = [len(store._store_dict[key].to_bytes()) for store, key in (ours, theirs)]
    assert sizes[0] < 1.03 * sizes[1]
