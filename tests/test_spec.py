"""Specs refuse nonsense in words, and hash to digests that change only with the format version."""

from __future__ import annotations

import json
import re
from dataclasses import FrozenInstanceError, fields, replace
from typing import Any

import pytest

from kdcache.cache.spec import CACHE_VERSION, CacheSpec
from kdcache.errors import KDCacheError, UsageError
from kdcache.spec import canonical_json, differences
from kdcache.views import philox
from kdcache.views.spec import MAX_VIEWS, VIEW_VERSION, ViewSpec, evaluation_view_spec

VIEW = ViewSpec(32, "random", 0.5, False, 0.2, 7)
TAPE = CacheSpec(3, 1000, 100, 10, "float16", "0123456789abcdef", "fedcba9876543210", VIEW)

VIEW_CHANGES: dict[str, Any] = {
    "size_px": 33,
    "crop": "center",
    "min_scale": 0.25,
    "flip": True,
    "mixup": 0.3,
    "seed": 8,
}
TAPE_CHANGES: dict[str, Any] = {
    "views": 4,
    "samples": 999,
    "classes": 101,
    "top_k": 11,
    "dtype": "uint8",
    "dataset": "other",
    "teacher": "another",
    "view": replace(VIEW, seed=8),
    "row_order": "dataset",
    "average": 5,
    "draws": 10,
    "temperature": 2.0,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size_px": 0}, "size must be a side of 1 to 4096 px, not 0"),
        ({"size_px": 4097}, "size must be a side of 1 to 4096 px, not 4097"),
        ({"crop": "round"}, "crop must be one of inception, random, center, whole, not 'round'"),
        ({"min_scale": 0}, r"min-area must be in \(0, 1\], not 0"),
        ({"min_scale": 2.0}, r"min-area must be in \(0, 1\], not 2.0"),
        ({"min_scale": float("nan")}, r"min-area must be in \(0, 1\], not nan"),
        ({"crop": "whole", "min_scale": 0.9}, "min-area must be 1 for all of the image, not 0.9"),
        ({"mixup": -1.0}, "mixup must be 0 or 0.05 to 100, not -1.0"),
        ({"mixup": 0.01}, "mixup must be 0 or 0.05 to 100, not 0.01"),
        ({"mixup": float("nan")}, "mixup must be 0 or 0.05 to 100, not nan"),
        ({"mixup": float("inf")}, "mixup must be 0 or 0.05 to 100, not inf"),
        ({"seed": -1}, r"view-seed must be in \[0, 2\^64\), not -1"),
        ({"seed": 1 << 64}, r"view-seed must be in \[0, 2\^64\)"),
        ({"version": 2}, "view spec version must be 1, not 2"),
    ],
)
def test_a_view_spec_says_what_is_wrong(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        replace(VIEW, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"views": 0}, "views must be 1 to 16777216, not 0"),
        ({"views": (1 << 24) + 1}, "views must be 1 to 16777216"),
        ({"samples": 0}, "samples must be at least 1, not 0"),
        ({"classes": 1}, "classes must be at least 2, not 1"),
        ({"top_k": 0}, "top-k must be 1 to 100, the number of classes, or 'all', not 0"),
        ({"top_k": 101}, "top-k must be 1 to 100, the number of classes, or 'all', not 101"),
        ({"dtype": "int4"}, "dtype must be one of float32, float16, uint8, not 'int4'"),
        ({"version": 9}, "reads caches of version 1, the cache has version 9: install the kdcache"),
    ],
)
def test_a_cache_spec_says_what_is_wrong(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        replace(TAPE, **change)


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


def test_digests_are_those_of_version_1() -> None:
    """They lie in caches: they may change only together with VIEW_VERSION or TAPE_VERSION."""
    assert (VIEW_VERSION, CACHE_VERSION) == (1, 1)
    assert ViewSpec(224).digest == "9ad7b6578af24170"
    assert TAPE.digest == "932fa267bb22b9af"


@pytest.mark.parametrize("field", VIEW_CHANGES)
def test_every_field_changes_a_views_digest(field: str) -> None:
    assert replace(VIEW, **{field: VIEW_CHANGES[field]}).digest != VIEW.digest


@pytest.mark.parametrize("field", TAPE_CHANGES)
def test_every_field_changes_a_caches_digest(field: str) -> None:
    base = TAPE
    if field in ("order", "average"):  # these ask for something of the other fields
        base = replace(TAPE, num_views=1, view=replace(VIEW, mixup=0))
    if field == "average":
        base = replace(base, row_order="dataset")
    if field == "temperature":
        base = replace(TAPE, draws=10)
    assert replace(base, **{field: TAPE_CHANGES[field]}).digest != base.digest


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"row_order": "dataset"}, "a cache in sample order answers single images: it needs --mixup 0"),
        ({"average": 3}, "an averaged cache has one view, in sample order"),
        ({"temperature": 2.0}, "only draws have a temperature: the top k serve any T >= 1"),
        ({"draws": 256}, "sampled must be 1 to 255 draws, not 256"),
        ({"draws": 12}, "12 draws name at most 12 classes"),
        ({"view": None}, "a cache in position order needs the spec of its views"),
        ({"draws": 10, "temperature": 0.0}, "temperature must be above 0, not 0.0"),
    ],
)
def test_a_cache_that_cannot_be_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        replace(TAPE, **change)


def test_no_field_is_forgotten_here() -> None:
    assert {f.name for f in fields(ViewSpec)} == {*VIEW_CHANGES, "version"}
    assert {f.name for f in fields(CacheSpec)} == {*TAPE_CHANGES, "version"}


def test_equal_specs_have_one_digest_and_one_text() -> None:
    """1 and 1.0 are equal in Python and differ in JSON."""
    whole, real = ViewSpec(8, min_scale=1, mixup=1), ViewSpec(8, min_scale=1.0, mixup=1.0)
    assert whole == real
    assert whole.digest == real.digest
    caches = [replace(TAPE, view=v) for v in (whole, real)]
    assert canonical_json(caches[0].to_json()) == canonical_json(caches[1].to_json())


@pytest.mark.parametrize("view", [VIEW, ViewSpec(1, seed=(1 << 64) - 1), evaluation_view_spec(224)])
def test_a_cache_spec_survives_json(view: ViewSpec) -> None:
    cache = replace(TAPE, view=view)
    again = CacheSpec.from_json(json.loads(json.dumps(cache.to_json())))
    assert again == cache
    assert again.digest == cache.digest
    foreign = replace(TAPE, view=None, row_order="dataset")
    assert CacheSpec.from_json(json.loads(json.dumps(foreign.to_json()))) == foreign


def test_unknown_and_missing_fields_are_not_a_spec() -> None:
    with pytest.raises(TypeError):
        CacheSpec.from_json({**TAPE.to_json(), "colour": "red"})
    with pytest.raises(KeyError):
        CacheSpec.from_json({k: v for k, v in TAPE.to_json().items() if k != "view"})


def test_only_k_equal_to_c_is_dense() -> None:
    assert not TAPE.dense
    assert replace(TAPE, top_k=100).dense


def test_differences_names_each_field_and_both_values() -> None:
    assert differences(TAPE, TAPE) == []
    other = replace(TAPE, num_samples=60_000, view=replace(VIEW, min_scale=0.25, flip=True))
    assert differences(TAPE, other) == [
        "samples: 1000 here, 60000 there",
        "min_scale: 0.5 here, 0.25 there",
        "flip: False here, True there",
    ]


def test_evaluation_shows_small_images_whole_and_crops_the_centre_of_large_ones() -> None:
    assert evaluation_view_spec(64) == ViewSpec(64, "center", 1.0, False, 0)
    assert evaluation_view_spec(65) == ViewSpec(65, "center", (7 / 8) ** 2, False, 0)
