"""`CacheSpec`: whose logits a cache holds, for which views, kept how."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

from kdcache.cache.codecs import (
    CodecSpec,
    Dense,
    Rows,
    Sampled,
    TopK,
    codec_from_json,
    codec_to_json,
    record_bytes,
)
from kdcache.errors import UsageError
from kdcache.spec import (
    Precision,
    digest,
    require,
    require_known_fields,
    require_version,
    spec_to_json,
)
from kdcache.views.settings import RowOrder
from kdcache.views.spec import MAX_VIEWS, ViewSpec

CACHE_VERSION = 2
MAX_SAMPLES, MAX_CLASSES = 1 << 40, 1 << 31


@dataclass(frozen=True)
class CacheSpec:
    """What a cache is.

    num_views     views that it holds; a cache may grow, so this is no part of its identity
    num_samples   samples of the dataset
    num_classes   C, of the teacher
    codec         what is kept of a record, and how
    dataset_hash  content hash of the samples; teacher_hash: of the teacher's parameters
    view_spec     what the teacher saw; None where it is not a view of kdcache's (an imported cache)
    row_order     "view": row p of view v belongs to position p of that view, for training on the
                  same views; "dataset": row i belongs to sample i, for training on others (the
                  "fixed teacher" and "independent noise" of Beyer et al. 2022, section 3)
    num_averaged_views  each record is of the mean probabilities over this many views, from view 0;
                  0: it is of one view
    precision     of the teacher's forward passes; None where it is not known
    """

    num_views: int
    num_samples: int
    num_classes: int
    codec: CodecSpec
    dataset_hash: str
    teacher_hash: str
    view_spec: ViewSpec | None
    row_order: RowOrder = "view"
    num_averaged_views: int = 0
    precision: Precision | None = "float32"

    def __post_init__(self) -> None:
        _require_count("views", self.num_views, 1, MAX_VIEWS)
        _require_count("samples", self.num_samples, 1, MAX_SAMPLES)
        _require_count("classes", self.num_classes, 2, MAX_CLASSES)
        self.codec.require_classes(self.num_classes)
        orders = get_args(RowOrder)
        require(self.row_order in orders, "row-order", " or ".join(orders), self.row_order)
        averaged = self.num_averaged_views
        _require_count("average-views", averaged, 0, MAX_VIEWS)
        known = (None, *get_args(Precision))
        require(self.precision in known, "precision", f"one of {known}", self.precision)
        if self.view_spec is None and self.row_order == "view":
            raise UsageError("a cache in view order needs the spec of its views")
        if averaged and (self.num_views != 1 or self.row_order != "dataset"):
            raise UsageError("a cache of averaged views has one view, in dataset order")
        if self.row_order == "dataset" and self.view_spec is not None and self.view_spec.mixup:
            raise UsageError("a cache in dataset order is of single images: it needs --mixup 0")

    @property
    def record_bytes(self) -> int:
        """Bytes of a record before compression."""
        return record_bytes(self.codec, self.num_classes)

    @property
    def identity(self) -> str:
        """16 hex digits over all that decides a record: everything but the number of views."""
        found = self.to_json()
        # A cache may get more views, and its checksums must stay valid.
        del found["num_views"]
        return digest(found)

    def rows(self, view: int, row_ids: Any) -> Rows:
        """Rows of a view, in the form that record codecs take.

        row_ids   int64 [B]: positions of the view, or sample ids where rows are in dataset order
        """
        return Rows(self.view_spec.seed if self.view_spec else 0, view, row_ids)

    def to_json(self) -> dict[str, Any]:
        """The version, and the fields that differ from its defaults."""
        found = {"version": CACHE_VERSION, **spec_to_json(self), "codec": codec_to_json(self.codec)}
        # It has no default, so a reader must find the field.
        if self.view_spec is None:
            found["view_spec"] = None
        return found

    @classmethod
    def from_json(cls, value: Mapping[str, Any], metadata: Mapping[str, Any]) -> CacheSpec:
        """The spec that any version of kdcache wrote.

        value      what `to_json` gave
        metadata   of the manifest, which holds what version 1 had not in its spec

        Raises UsageError for a later version's.
        """
        found = dict(value)
        if require_version("caches", found.pop("version"), CACHE_VERSION) == 1:
            return _from_version_1(found, metadata.get("precision"))
        require_known_fields(cls, found, "the cache's spec")
        view_spec = found.pop("view_spec")
        return cls(
            **{**found, "codec": codec_from_json(found["codec"])},
            view_spec=ViewSpec.from_json(view_spec) if view_spec else None,
        )


def _require_count(name: str, found: object, least: int, most: int) -> None:
    ok = isinstance(found, int) and least <= found <= most
    require(ok, name, f"{least} to {most}", found)


def _from_version_1(found: dict[str, Any], precision: Precision | None) -> CacheSpec:
    num_classes, top_k, dtype = found["classes"], found["top_k"], found["dtype"]
    codec: CodecSpec = Dense(dtype) if top_k == num_classes else TopK(top_k, dtype)
    if found["draws"]:
        codec = Sampled(found["draws"], found["temperature"])
    return CacheSpec(
        num_views=found["views"],
        num_samples=found["samples"],
        num_classes=num_classes,
        codec=codec,
        dataset_hash=found["dataset"],
        teacher_hash=found["teacher"],
        view_spec=ViewSpec.from_json(found["view"]) if found["view"] else None,
        row_order="view" if found["order"] == "position" else "dataset",
        num_averaged_views=found["average"],
        precision=precision,
    )
