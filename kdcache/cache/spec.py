"""`CacheSpec`: whose logits a cache holds, for which views, kept how."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, get_args

from kdcache.cache.records import ValueType
from kdcache.errors import UsageError
from kdcache.spec import digest, require
from kdcache.views.settings import RowOrder
from kdcache.views.spec import MAX_VIEWS, ViewSpec

CACHE_VERSION = 1


def require_cache_version(version: object) -> None:
    """Raise UsageError for a tape of another version, whose spec may have other fields."""
    if version != CACHE_VERSION:
        raise UsageError(
            f"this kdcache reads tapes of version {CACHE_VERSION}, the tape has version "
            f"{version}: install the kdcache that made it"
        )


@dataclass(frozen=True)
class CacheSpec:
    """What a tape is: whose answers, to which views, kept how.

    classes      C, the number of classes of the teacher
    top_k        k <= C classes kept for each record; k = C keeps all logits, without indices
    dtype        how a kept logit is stored: "float32", "float16", or "uint8"
    dataset      fingerprint of the samples; teacher: fingerprint of the weights
    view         what the teacher saw; None where it is not a view of ours (an imported cache)
    order        "position": row p of view v answers position p of that view, for training on the
                 same views; "sample": row i answers sample i, for training on others (the "fixed
                 teacher" and "independent noise" of Beyer et al. 2022, section 3)
    average      each record is of the mean probabilities over views 0 ... average - 1; 0: it is of
                 one view
    draws        keep this many random draws from softmax(logits / temperature) instead of the top k
                 (Random Sampling KD, arXiv 2503.16870); top_k is then the most classes of a record
    temperature  of the draws, and so of training from them; 1 without draws
    """

    views: int
    samples: int
    classes: int
    top_k: int
    dtype: ValueType
    dataset: str
    teacher: str
    view: ViewSpec | None
    order: RowOrder = "position"
    average: int = 0
    draws: int = 0
    temperature: float = 1.0
    version: int = CACHE_VERSION

    def __post_init__(self) -> None:
        require(1 <= self.views <= MAX_VIEWS, "views", f"1 to {MAX_VIEWS}", self.views)
        require(self.samples >= 1, "samples", "at least 1", self.samples)
        require(self.classes >= 2, "classes", "at least 2", self.classes)
        require(
            1 <= self.top_k <= self.classes,
            "top-k",
            f"1 to {self.classes}, the number of classes, or 'all'",
            self.top_k,
        )
        require(
            self.dtype in get_args(ValueType),
            "dtype",
            f"one of {', '.join(get_args(ValueType))}",
            self.dtype,
        )
        require(
            self.order in get_args(RowOrder), "order", " or ".join(get_args(RowOrder)), self.order
        )
        require(0 <= self.average <= MAX_VIEWS, "average", f"0 to {MAX_VIEWS}", self.average)
        require(0 <= self.draws <= 255, "sampled", "1 to 255 draws", self.draws)
        require(0 < self.temperature < math.inf, "temperature", "above 0", self.temperature)
        require_cache_version(self.version)
        if self.view is None and self.order == "position":
            raise UsageError("a tape in position order needs the spec of its views")
        if self.average and (self.views != 1 or self.order != "sample"):
            raise UsageError("an averaged tape has one view, in sample order")
        if self.order == "sample" and self.view is not None and self.view.mixup:
            raise UsageError("a tape in sample order answers single images: it needs --mixup 0")
        if not self.draws and self.temperature != 1:
            raise UsageError("only draws have a temperature: the top k serve any T >= 1")
        if self.draws and self.top_k != min(self.draws, self.classes):
            raise UsageError(f"{self.draws} draws name at most {self.draws} classes")

    @property
    def dense(self) -> bool:
        """Every class's logit is kept."""
        return self.top_k == self.classes and not self.draws

    @property
    def digest(self) -> str:
        return digest(self.to_json())

    def to_json(self) -> dict[str, Any]:
        view = self.view.to_json() if self.view else None
        return {**asdict(self), "view": view, "temperature": float(self.temperature)}

    @staticmethod
    def from_json(value: dict[str, Any]) -> CacheSpec:
        view = ViewSpec(**value["view"]) if value["view"] else None
        return CacheSpec(**{**value, "view": view})
