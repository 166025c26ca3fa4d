"""The setting that a cache serves, and the views of a student that trains from it."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

from kdcache.cache.spec import CacheSpec
from kdcache.errors import CacheMismatch, UsageError
from kdcache.spec import differences
from kdcache.views.settings import (
    CUSTOM,
    SETTINGS,
    Setting,
    get_setting,
    make_view_spec,
    other_seed,
    setting_name,
)
from kdcache.views.spec import ViewSpec


def cache_setting_name(cache: CacheSpec) -> str:
    """The name of the setting that a cache serves; "custom" for none of ours."""
    return next((setting.name for setting in SETTINGS.values() if _serves(setting, cache)), CUSTOM)


def cached_view_spec(
    setting: Setting | None, cache: CacheSpec, url: str, given: dict[str, Any], natural_size_px: int
) -> tuple[str, ViewSpec]:
    """The setting's name and the student's view of a run from this cache.

    What is not given comes from the cache; where no setting is named, that comes from the cache
    too, or is "custom" where the options contradict it. Raises CacheMismatch where the cache serves
    another setting or other views than the named one, UsageError for options that contradict that.
    """
    if setting is not None:
        implied = _implied_options(setting, _served_view(setting, cache, url))
        view = setting.student_view_spec({**implied, **given}, natural_size_px)
        require_setting(setting, cache, url, view, resized="size_px" in given)
        return setting.name, view
    if cache.row_order == "view":
        assert cache.view_spec is not None
        view = replace(cache.view_spec, **given)
        return setting_name(view), view
    serves = cache_setting_name(cache)
    if serves != CUSTOM:
        # Options that contradict the cache's setting make it a custom run, which is no error here.
        with contextlib.suppress(UsageError, CacheMismatch):
            return cached_view_spec(get_setting(serves), cache, url, given, natural_size_px)
    view = make_view_spec({"mixup": 0, **given}, natural_size_px)
    if view.mixup:
        raise UsageError(f"{url} holds records of single images: train with --mixup 0")
    return CUSTOM, view


def require_setting(
    setting: Setting, cache: CacheSpec, url: str, student: ViewSpec, *, resized: bool = False
) -> None:
    """Raise CacheMismatch unless the cache holds what the teacher says in this setting.

    resized   the student's size was asked for, and the cache's may differ from it. A fixed
              teacher serves every seed, independent noise every seed but the student's own.
    """
    seen = _served_view(setting, cache, url)
    if setting.independent and seen.seed == student.seed:
        raise CacheMismatch(
            f"{url} has the student's own seed ({student.seed}), so teacher and student would "
            f"see the same crops: give another --view-seed, or {_remedy(setting)}"
        )
    expected = setting.cache_view_spec(student, size_px=seen.size_px if resized else None)
    if setting.row_order == "dataset":
        # In dataset order a record belongs to a sample, whatever the seed of the student's crops.
        expected = replace(expected, seed=seen.seed)
    different = differences(expected, seen)
    if different:
        raise CacheMismatch(
            f"{url} holds other views than the teacher sees in {setting.name} "
            f"({'; '.join(different)}): give the options it was made with, or {_remedy(setting)}"
        )


def _served_view(setting: Setting, cache: CacheSpec, url: str) -> ViewSpec:
    """The cache's view. Raises CacheMismatch where the cache serves another setting."""
    serves = cache_setting_name(cache)
    if cache.view_spec is None:
        raise CacheMismatch(
            f"{url} was imported, and its views are not of kdcache's making: leave --setting "
            f"out, or {_remedy(setting)}"
        )
    if serves != setting.name:
        other = "leave --setting out" if serves == CUSTOM else f"train with --setting {serves}"
        raise CacheMismatch(
            f"{url} was made for {'no setting of kdcache' if serves == CUSTOM else serves}, "
            f"not for {setting.name}: {other}, or {_remedy(setting)}"
        )
    return cache.view_spec


def _implied_options(setting: Setting, cache_view_spec: ViewSpec) -> dict[str, Any]:
    """The options of the student's view that a cache's view implies."""
    seed = other_seed(cache_view_spec.seed) if setting.independent else cache_view_spec.seed
    given = {
        "size_px": cache_view_spec.size_px,
        "min_scale": cache_view_spec.min_scale,
        "seed": seed,
    }
    if setting.mixing:
        given["mixup"] = cache_view_spec.mixup
    if setting.teacher_crop != "center":
        given["flip"] = cache_view_spec.flip
    return given


def _serves(setting: Setting, cache: CacheSpec) -> bool:
    """Whether the cache is of this setting, whatever its size, seed and area."""
    seen = cache.view_spec
    if seen is None or (cache.row_order, bool(cache.num_averaged_views)) != (
        setting.row_order,
        bool(setting.num_averaged_views),
    ):
        return False
    one = setting.fixed and not setting.num_averaged_views
    alike = (seen.crop, bool(seen.mixup)) == (setting.teacher_crop or setting.crop, setting.mixing)
    return alike and not (setting.fixed and cache.num_views > 1) and not (one and seen.flip)


def _remedy(setting: Setting) -> str:
    return f"precompute a cache with --setting {setting.name}"
