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


def cache_setting_name(tape: CacheSpec) -> str:
    """The name of the set-up that a tape serves; "custom" for none of ours."""
    return next((setup.name for setup in SETTINGS if _serves(setup, tape)), CUSTOM)


def cached_view_spec(
    setup: Setting | None, tape: CacheSpec, url: str, given: dict[str, Any], natural_size_px: int
) -> tuple[str, ViewSpec]:
    """The set-up's name and the student's view of a run from this tape.

    What is not given comes from the tape; where no set-up is named, that comes from the tape too,
    or is "custom" where the options contradict it. Raises TapeMismatch where the tape serves
    another set-up or other views than the named one, UsageError for options that contradict that.
    """
    if setup is not None:
        implied = _implied_options(setup, _served_view(setup, tape, url))
        view = setup.student_view({**implied, **given}, natural_size_px)
        require_setting(setup, tape, url, view, resized="size_px" in given)
        return setup.name, view
    if tape.order == "position":
        assert tape.view is not None
        view = replace(tape.view, **given)
        return setting_name(view), view
    serves = cache_setting_name(tape)
    if serves != CUSTOM:
        with contextlib.suppress(UsageError, CacheMismatch):
            return cached_view_spec(get_setting(serves), tape, url, given, natural_size_px)
    view = make_view_spec({"mixup": 0, **given}, natural_size_px)
    if view.mixup:
        raise UsageError(f"{url} answers single images: train with --mixup 0")
    return CUSTOM, view


def require_setting(
    setting: Setting, tape: CacheSpec, url: str, student: ViewSpec, *, resized: bool = False
) -> None:
    """Raise TapeMismatch unless the tape holds what the teacher says in this set-up.

    resized   the student's size was asked for, and the tape's may differ from it. A fixed
              teacher serves every seed, independent noise every seed but the student's own.
    """
    seen = _served_view(setting, tape, url)
    if setting.independent and seen.seed == student.seed:
        raise CacheMismatch(
            f"{url} has the student's own seed ({student.seed}), so teacher and student would "
            f"see the same crops: give another --view-seed, or {_remedy(setting)}"
        )
    expected = setting.tape_view(student, size_px=seen.size_px if resized else None)
    if setting.order == "sample":
        expected = replace(expected, seed=seen.seed)
    different = differences(expected, seen)
    if different:
        raise CacheMismatch(
            f"{url} holds other views than the teacher sees in {setting.name} "
            f"({'; '.join(different)}): give the options it was made with, or {_remedy(setting)}"
        )


def _served_view(setting: Setting, tape: CacheSpec, url: str) -> ViewSpec:
    """The tape's view. Raises TapeMismatch where the tape serves another set-up."""
    serves = cache_setting_name(tape)
    if tape.view is None:
        raise CacheMismatch(
            f"{url} was imported, and its views are not of kdcache's making: leave --setup "
            f"out, or {_remedy(setting)}"
        )
    if serves != setting.name:
        other = "leave --setup out" if serves == CUSTOM else f"train with --setup {serves}"
        raise CacheMismatch(
            f"{url} was made for {'no set-up of kdcache' if serves == CUSTOM else serves}, "
            f"not for {setting.name}: {other}, or {_remedy(setting)}"
        )
    return tape.view


def _implied_options(setting: Setting, tape_view: ViewSpec) -> dict[str, Any]:
    """The options of the student's view that a tape's view implies."""
    seed = other_seed(tape_view.seed) if setting.independent else tape_view.seed
    given = {"size_px": tape_view.size_px, "min_area": tape_view.min_area, "seed": seed}
    if setting.mixing:
        given["mixup"] = tape_view.mixup
    if setting.teacher_crop != "center":
        given["flip"] = tape_view.flip
    return given


def _serves(setting: Setting, tape: CacheSpec) -> bool:
    """Whether the tape is of this set-up, whatever its size, seed and area."""
    seen = tape.view
    if seen is None or (tape.order, bool(tape.average)) != (setting.order, bool(setting.average)):
        return False
    one = setting.fixed and not setting.average
    alike = (seen.crop, bool(seen.mixup)) == (setting.teacher_crop or setting.crop, setting.mixing)
    return alike and not (setting.fixed and tape.views > 1) and not (one and seen.flip)


def _remedy(setting: Setting) -> str:
    return f"precompute a tape with --setup {setting.name}"
