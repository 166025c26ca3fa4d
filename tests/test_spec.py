"""Specs refuse nonsense in words, and hash to digests that change only with the format version."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import FrozenInstanceError, fields, replace
from typing import Any, get_args

import pytest

from kdcache.cache.codecs import Dense, RecordCodec, Sampled, TopK, ValueType
from kdcache.cache.spec import CACHE_VERSION, CacheSpec
from kdcache.errors import KDCacheError, UsageError
from kdcache.spec import canonical_json, differences
from kdcache.views import philox
from kdcache.views.spec import MAX_VIEWS, VIEW_VERSION, ViewSpec, evaluation_view_spec

VIEW = ViewSpec(32, "random", 0.5, False, 0.2, 7)
CACHE = CacheSpec(3, 1000, 100, TopK(10), "0123456789abcdef", "fedcba9876543210", VIEW)

VIEW_CHANGES: dict[str, Any] = {
    "size_px": 33,
    "crop": "center",
    "min_scale": 0.25,
    "flip": True,
    "mixup": 0.3,
    "seed": 8,
}
# Another number of views is the same cache, which has grown.
CACHE_CHANGES: dict[str, Any] = {
    "num_samples": 999,
    "num_classes": 101,
    "codec": TopK(11),
    "dataset_hash": "other",
    "teacher_hash": "another",
    "view_spec": replace(VIEW, seed=8),
    "row_order": "dataset",
    "num_averaged_views": 5,
    "precision": "bfloat16",
}
CODECS: list[RecordCodec] = [
    *(codec for dtype in get_args(ValueType) for codec in (TopK(10, dtype), Dense(dtype))),
    TopK(11),
    Sampled(10),
    Sampled(12),
    Sampled(10, 2.0),
]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size_px": 0}, "size must be a side of 1 to 4096 px, not 0"),
        ({"size_px": 4097}, "size must be a side of 1 to 4096 px, not 4097"),
        ({"crop": "round"}, "crop must be one of inception, random, center, whole, not 'round'"),
        ({"min_scale": 0}, r"min-scale must be in \(0, 1\], not 0"),
        ({"min_scale": 2.0}, r"min-scale must be in \(0, 1\], not 2.0"),
        ({"min_scale": float("nan")}, r"min-scale must be in \(0, 1\], not nan"),
        ({"crop": "whole", "min_scale": 0.9}, "min-scale must be 1 for all of the image, not 0.9"),
        ({"mixup": -1.0}, "mixup must be 0 or 0.05 to 100, not -1.0"),
        ({"mixup": 0.01}, "mixup must be 0 or 0.05 to 100, not 0.01"),
        ({"mixup": float("nan")}, "mixup must be 0 or 0.05 to 100, not nan"),
        ({"mixup": float("inf")}, "mixup must be 0 or 0.05 to 100, not inf"),
        ({"seed": -1}, r"view-seed must be in \[0, 2\^64\), not -1"),
        ({"seed": 1 << 64}, r"view-seed must be in \[0, 2\^64\)"),
        ({"version": 2}, "reads views of versions 1 to 1, found version 2"),
    ],
)
def test_a_view_spec_says_what_is_wrong(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        replace(VIEW, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_views": 0}, "views must be 1 to 16777216, not 0"),
        ({"num_views": (1 << 24) + 1}, "views must be 1 to 16777216"),
        ({"num_samples": 0}, "samples must be 1 to "),
        ({"num_classes": 1}, "classes must be 2 to 2147483648, not 1"),
        ({"codec": TopK(101)}, "top-k must be 1 to 100, the number of classes, or 'all', not 101"),
        ({"codec": TopK(100)}, "top-k must be 1 to 100, the number of classes, or 'all', not 100"),
        ({"precision": "float64"}, "precision must be one of .*, not 'float64'"),
    ],
)
def test_a_cache_spec_says_what_is_wrong(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        replace(CACHE, **change)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TopK(0), "top-k must be at least 1, or 'all', not 0"),
        (lambda: TopK(3, "int4"), "dtype must be one of float32, float16, uint8, not 'int4'"),
        (lambda: Dense("int4"), "dtype must be one of float32, float16, uint8, not 'int4'"),
        (lambda: Sampled(0), "1 to 255 draws, not 0"),
        (lambda: Sampled(256), "1 to 255 draws, not 256"),
        (lambda: Sampled(10, 0.0), "temperature must be above 0, not 0.0"),
    ],
)
def test_a_record_codec_says_what_is_wrong(make: Callable[[], object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make()


def test_views_fit_into_the_draws() -> None:
    assert 1 << philox.VIEW_BITS == MAX_VIEWS


def test_specs_are_frozen_and_their_errors_are_value_errors() -> None:
    with pytest.raises(FrozenInstanceError):
        VIEW.seed = 1  # type: ignore[misc]
    assert issubclass(UsageError, ValueError)
    assert issubclass(UsageError, KDCacheError)


def test_canonical_json_is_sorted_and_tight_and_has_no_nan() -> None:
    assert canonical_json({"b": [1, 2.5], "a": None}) == '{"a":null,"b":[1,2.5]}'
    assert canonical_json({"b": 1, "a": 2}) == canonical_json({"a": 2, "b": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json(float("nan"))


def test_digests_are_those_of_these_versions() -> None:
    """They lie in caches: they may change only together with VIEW_VERSION or CACHE_VERSION."""
    assert (VIEW_VERSION, CACHE_VERSION) == (1, 2)
    assert ViewSpec(224).digest == "9586f7371cd7e7af"
    assert CACHE.identity == "5b5d819bd65f32e3"


@pytest.mark.parametrize("field", VIEW_CHANGES)
def test_every_field_changes_a_views_digest(field: str) -> None:
    assert replace(VIEW, **{field: VIEW_CHANGES[field]}).digest != VIEW.digest


@pytest.mark.parametrize("field", CACHE_CHANGES)
def test_every_field_changes_a_caches_identity(field: str) -> None:
    base = CACHE
    if field in ("row_order", "num_averaged_views"):  # these need something of the other fields
        base = replace(CACHE, num_views=1, view_spec=replace(VIEW, mixup=0))
    if field == "num_averaged_views":
        base = replace(base, row_order="dataset")
    assert replace(base, **{field: CACHE_CHANGES[field]}).identity != base.identity


def test_every_parameter_of_a_codec_changes_a_caches_identity() -> None:
    found = {replace(CACHE, codec=codec).identity for codec in CODECS}
    assert len(found) == len(CODECS)


def test_the_number_of_views_does_not_change_a_caches_identity() -> None:
    assert replace(CACHE, num_views=60).identity == CACHE.identity


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"row_order": "dataset"}, "in dataset order is of single images: it needs --mixup 0"),
        ({"num_averaged_views": 3}, "averaged views has one view, in dataset order"),
        ({"view_spec": None}, "in view order needs the spec of its views"),
        ({"row_order": "position"}, "row-order must be view or dataset, not 'position'"),
    ],
)
def test_a_cache_that_cannot_be_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        replace(CACHE, **change)


def test_no_field_is_forgotten_here() -> None:
    assert {f.name for f in fields(ViewSpec)} == {*VIEW_CHANGES, "transforms", "version"}
    assert {f.name for f in fields(CacheSpec)} == {*CACHE_CHANGES, "num_views"}


def test_equal_specs_have_one_digest_and_one_text() -> None:
    """1 and 1.0 are equal in Python and differ in JSON."""
    whole, real = ViewSpec(8, min_scale=1, mixup=1), ViewSpec(8, min_scale=1.0, mixup=1.0)
    assert whole == real
    assert whole.digest == real.digest
    caches = [replace(CACHE, view_spec=v) for v in (whole, real)]
    assert canonical_json(caches[0].to_json()) == canonical_json(caches[1].to_json())


@pytest.mark.parametrize("view", [VIEW, ViewSpec(1, seed=(1 << 64) - 1), evaluation_view_spec(224)])
def test_a_cache_spec_survives_json(view: ViewSpec) -> None:
    for codec in CODECS:
        again(replace(CACHE, view_spec=view, codec=codec))
    again(replace(CACHE, view_spec=None, row_order="dataset", precision=None))


def again(cache: CacheSpec) -> None:
    found = CacheSpec.from_json(json.loads(json.dumps(cache.to_json())), {})
    assert found == cache
    assert found.identity == cache.identity


def test_unknown_and_missing_fields_are_not_a_spec() -> None:
    with pytest.raises(UsageError, match=r"'colour'.*install the kdcache that wrote it"):
        CacheSpec.from_json({**CACHE.to_json(), "colour": "red"}, {})
    with pytest.raises(KeyError):
        CacheSpec.from_json({k: v for k, v in CACHE.to_json().items() if k != "view_spec"}, {})
    with pytest.raises(UsageError, match="reads caches of versions 1 to 2, found version 9"):
        CacheSpec.from_json({**CACHE.to_json(), "version": 9}, {})


def test_differences_names_each_field_and_both_values() -> None:
    assert differences(CACHE, CACHE) == []
    other = replace(CACHE, num_samples=60_000, view_spec=replace(VIEW, min_scale=0.25, flip=True))
    assert differences(CACHE, other) == [
        "num_samples: 1000 here, 60000 there",
        "min_scale: 0.5 here, 0.25 there",
        "flip: False here, True there",
    ]


def test_evaluation_shows_small_images_whole_and_crops_the_centre_of_large_ones() -> None:
    assert evaluation_view_spec(64) == ViewSpec(64, "center", 1.0, False, 0)
    assert evaluation_view_spec(65) == ViewSpec(65, "center", (7 / 8) ** 2, False, 0)
