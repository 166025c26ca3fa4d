"""The record codecs: how teacher logits are kept, a file each, and a line in `CODECS`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch

from kdcache.cache.codecs.dense import Dense
from kdcache.cache.codecs.protocol import (
    CalibratedCodec,
    CodecSpec,
    Column,
    RecordCodec,
    RecordCoder,
    Rows,
)
from kdcache.cache.codecs.sampled import Sampled
from kdcache.cache.codecs.top_k import TopK
from kdcache.cache.codecs.transformed import Transformed
from kdcache.cache.codecs.values import ValueType
from kdcache.cache.records import NO_TABLES, Tables
from kdcache.errors import UsageError
from kdcache.spec import require_known_fields, spec_to_json

__all__ = [
    "CODECS",
    "CalibratedCodec",
    "CodecSpec",
    "Column",
    "Dense",
    "RecordCodec",
    "RecordCoder",
    "Rows",
    "Sampled",
    "TopK",
    "Transformed",
    "ValueType",
    "bind",
    "choose_codec",
    "codec_from_json",
    "codec_to_json",
    "record_bytes",
]

CODECS: dict[str, type[Any]] = {codec.name: codec for codec in (TopK, Dense, Sampled, Transformed)}


def bind(
    codec: CodecSpec, tables: Tables = NO_TABLES, device: torch.device | str = "cpu"
) -> RecordCoder:
    """What converts logits to records and back: the codec itself where it needs no tables."""
    if isinstance(codec, CalibratedCodec):
        return codec.bind(tables, torch.device(device))
    return cast(RecordCodec, codec)


def codec_to_json(codec: CodecSpec) -> dict[str, Any]:
    return {"name": codec.name, **spec_to_json(codec)}


def codec_from_json(value: Mapping[str, Any]) -> CodecSpec:
    """Raises UsageError for a name that `CODECS` lacks, or parameters that its codec lacks."""
    parameters = dict(value)
    name = parameters.pop("name")
    if name not in CODECS:
        raise UsageError(
            f"unknown record codec {name!r}, known are {', '.join(CODECS)}: install the kdcache "
            "that wrote it, or import the module that adds it to kdcache.cache.codecs.CODECS"
        )
    require_known_fields(CODECS[name], parameters, f"the record codec {name!r}")
    codec: CodecSpec = CODECS[name](**parameters)
    return codec


def choose_codec(num_classes: int, top_k: int | None, dtype: ValueType = "float16") -> RecordCodec:
    """The k largest logits, or all of them where top_k is None or that takes no more bytes."""
    dense = Dense(dtype)
    if top_k is None or top_k == num_classes:
        return dense
    sparse = TopK(top_k, dtype)
    sparse.require_classes(num_classes)
    # A top-k record names its classes, so from some k on the dense one is smaller, and it is exact.
    smaller = record_bytes(sparse, num_classes) < record_bytes(dense, num_classes)
    return sparse if smaller else dense


def record_bytes(codec: CodecSpec, num_classes: int) -> int:
    """Bytes of a record before compression."""
    return sum(column.record_bytes for column in codec.columns(num_classes).values())
