"""A later kdcache's specs have more fields: what is stored now stays valid there, to the digest."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from kdcache.cache import codecs, manifest, spec, verify
from kdcache.cache.cache import LogitCache
from kdcache.cache.codecs import Dense, Sampled, TopK, Transformed
from kdcache.cache.spec import CacheSpec
from kdcache.errors import CacheMismatch, UsageError
from kdcache.training.spec import TrainSpec
from kdcache.views.spec import ViewSpec
from tests.test_golden import CACHES


@dataclass(frozen=True)
class LaterViewSpec(ViewSpec):
    blur: float = 0.0


@dataclass(frozen=True)
class LaterCacheSpec(CacheSpec):
    calibration: str | None = None


@dataclass(frozen=True)
class LaterTopK(TopK):
    rounding: str = "nearest"


@dataclass(frozen=True)
class LaterDense(Dense):
    rounding: str = "nearest"


@dataclass(frozen=True)
class LaterSampled(Sampled):
    rounding: str = "nearest"


@dataclass(frozen=True)
class LaterTransformed(Transformed):
    rounding: str = "nearest"


@dataclass(frozen=True)
class LaterTrainSpec(TrainSpec):
    label_smoothing: float = 0.0


VIEW = ViewSpec(8, min_scale=0.5, seed=7)
CACHE = CacheSpec(2, 7, 20, TopK(4), "0123456789abcdef", "fedcba9876543210", VIEW)


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """kdcache as it may be one day."""
    monkeypatch.setattr(spec, "ViewSpec", LaterViewSpec)
    monkeypatch.setattr(spec, "CacheSpec", LaterCacheSpec)
    monkeypatch.setattr(manifest, "CacheSpec", LaterCacheSpec)
    for name in ("TopK", "Dense", "Sampled", "Transformed"):
        kind = globals()[f"Later{name}"]
        monkeypatch.setattr(spec, name, kind, raising=False)
        monkeypatch.setitem(codecs.CODECS, kind.name, kind)


def extended(value: Any, kind: type, **fields: Any) -> Any:
    return kind(**vars(value), **fields)


@pytest.mark.usefixtures("later")
@pytest.mark.parametrize("path", CACHES, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_caches_of_now_are_valid(path: Path) -> None:
    cache = LogitCache.open(path)
    assert isinstance(cache.spec, LaterCacheSpec)
    assert cache.spec.calibration is None
    assert vars(cache.spec.codec)["rounding"] == "nearest"
    assert verify.read(cache, {}) == ([], [])
    if path.parent.name != "v1" and not cache.manifest.tables:
        assert cache.spec.identity == cache.manifest.identity


@pytest.mark.usefixtures("later")
@pytest.mark.parametrize("path", CACHES, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_records_that_the_new_field_changes_do_not_belong_to_them(path: Path) -> None:
    cache = LogitCache.open(path)
    others = [replace(cache.spec, calibration="x")]  # type: ignore[call-arg]
    others += [replace(cache.spec, codec=replace(cache.spec.codec, rounding="down"))]  # type: ignore[type-var]
    if cache.spec.view_spec:
        others += [replace(cache.spec, view_spec=replace(cache.spec.view_spec, blur=1.0))]  # type: ignore[call-arg]
    for other in others:
        assert other.identity != cache.spec.identity
        with pytest.raises(CacheMismatch, match=r"calibration|rounding|blur"):
            cache.require(other)
    cache.require(cache.spec)


@pytest.mark.parametrize(
    ("now", "kind", "fields"),
    [
        (VIEW, LaterViewSpec, {"blur": 1.0}),
        (CACHE, LaterCacheSpec, {"calibration": "x"}),
        (TrainSpec("cached", VIEW), LaterTrainSpec, {"label_smoothing": 0.1}),
    ],
    ids=["view", "cache", "train"],
)
def test_a_default_changes_no_json_and_another_value_does(
    now: Any, kind: type, fields: dict[str, Any]
) -> None:
    assert extended(now, kind).to_json() == now.to_json()
    with_value = extended(now, kind, **fields).to_json()
    assert with_value == now.to_json() | fields
    read_by_now = {"metadata": {}} if kind is LaterCacheSpec else {}
    (name,) = fields
    with pytest.raises(UsageError, match=f"{name!r}.*install"):
        type(now).from_json(with_value, **read_by_now)
