"""The settings of the paper: which pixels the teacher and the student get, online and from a cache.

Expected pixels come from `views/` and OpenCV (`test_render.by_the_definition`) and from the table
of definitions here, not from `views/settings.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from kdcache.batch import Batch, Target, TargetSource
from kdcache.cache.cache import LogitCache
from kdcache.cache.codecs import Dense
from kdcache.cache.setting import cache_setting_name, cached_view_spec, require_setting
from kdcache.cache.spec import CacheSpec
from kdcache.cli import plots
from kdcache.data.beton import Dataset
from kdcache.data.loader import Loader
from kdcache.errors import CacheMismatch, UsageError
from kdcache.models.classifier import Classifier
from kdcache.teacher.precompute import precompute
from kdcache.teacher.targets import AverageTargets, CachedTargets, FixedTargets, OnlineTargets
from kdcache.views import settings
from kdcache.views.order import view_order, view_positions
from kdcache.views.settings import SETTINGS, Setting, get_setting, other_seed, setting_name
from kdcache.views.spec import EVAL_SCALE, ViewSpec
from tests.conftest import TEACHER, Result, cache_spec
from tests.test_render import by_the_definition, stored_images

Run = Callable[..., Result]

SIZE, EPOCHS, BATCH, CLASSES, AVERAGE, SEED = 16, 2, 10, 5, 3, 9
HIGH = 1 << 63


@dataclass(frozen=True)
class Definition:
    """A setting as the paper has it: what each side sees, and of which views, in epoch e."""

    paper: str
    student: ViewSpec
    teacher: ViewSpec
    teacher_views: Callable[[int], list[int]] = lambda e: [e]


MILD = ViewSpec(SIZE, "random", EVAL_SCALE, mixup=0, seed=SEED)
INCEPTION = ViewSpec(SIZE, "inception", 0.05, mixup=0, seed=SEED)
WHOLE = ViewSpec(SIZE, "whole", 1.0, flip=False, mixup=0, seed=SEED)
CENTER = ViewSpec(SIZE, "center", EVAL_SCALE, flip=False, mixup=0, seed=SEED)
MIXED = replace(INCEPTION, mixup=1.0)
DEFINITIONS = {
    "fixed-whole": Definition("fix/rs", WHOLE, WHOLE, lambda e: [0]),
    "fixed-center": Definition("fix/cc", MILD, CENTER, lambda e: [0]),
    "fixed-average": Definition("fix/ic_ens", INCEPTION, INCEPTION, lambda e: list(range(AVERAGE))),
    "independent-random": Definition("ind/rc", MILD, replace(MILD, seed=SEED + HIGH)),
    "independent-inception": Definition("ind/ic", INCEPTION, replace(INCEPTION, seed=SEED + HIGH)),
    "consistent-random": Definition("same/rc", MILD, MILD),
    "consistent-inception": Definition("same/ic", INCEPTION, INCEPTION),
    "function-matching": Definition("function matching", MIXED, MIXED),
}
GIVEN: dict[str, Any] = {"size_px": SIZE, "seed": SEED}


class Spy(nn.Module):
    """Keeps the pixels that it gets. Its logits are exact in float32, in batches of any make-up."""

    def __init__(self, size_px: int) -> None:
        super().__init__()
        pattern = torch.arange(3 * size_px**2 * CLASSES).view(-1, CLASSES)
        self.register_buffer("weight", (pattern * 7919 % 11 - 5).float() / 4096)
        self.seen: list[np.ndarray] = []

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        bytes_BCHW = (x_BCHW * 255).round()
        self.seen.append(bytes_BCHW.permute(0, 2, 3, 1).to(torch.uint8).numpy().copy())
        return bytes_BCHW.flatten(1) @ self.weight


def spy_teacher(size_px: int = SIZE) -> tuple[Classifier, Spy]:
    spy = Spy(size_px)
    teacher = Classifier(spy, "spy", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    teacher.num_classes = CLASSES
    return teacher.eval().requires_grad_(False), spy


@pytest.fixture(scope="module")
def cv2() -> ModuleType:
    module = pytest.importorskip("cv2")
    if not hasattr(module, "resize"):
        pytest.skip("cv2 is a stub here")
    return module


@pytest.fixture(scope="module")
def stored(photos: Dataset) -> list[np.ndarray]:
    return stored_images(photos)


def by_sample(cv2: ModuleType, stored: list[np.ndarray], spec: ViewSpec, view: int) -> np.ndarray:
    """The pixels of each sample in a view, in sample order."""
    out = np.zeros((len(stored), spec.size_px, spec.size_px, 3), np.uint8)
    order = view_order(spec, view, len(stored))
    out[order] = by_the_definition(cv2, stored, spec, view)
    return out


def images_of(batch: Batch) -> np.ndarray:
    return batch.images_BCHW.permute(0, 2, 3, 1).numpy()


def online_source(
    setting: Setting, teacher: Classifier, dataset: Dataset, student: ViewSpec
) -> TargetSource:
    if setting.num_averaged_views:
        seen = setting.cache_view_spec(student)
        return AverageTargets(teacher, dataset, seen, AVERAGE, BATCH, workers=1)
    return OnlineTargets(teacher)


def recorded(
    setting: Setting, teacher: Classifier, dataset: Dataset, out: Path, **given: Any
) -> LogitCache:
    """The cache that `precompute --setting NAME` makes, of all classes as float32."""
    count = 1 if setting.fixed else EPOCHS
    view, row_order, average = setting.cache_fields(
        {**GIVEN, **given},
        SIZE,
        num_views=count,
        num_averaged_views=AVERAGE if setting.num_averaged_views else 0,
    )
    spec = cache_spec(
        dataset,
        teacher,
        view,
        num_views=count,
        dtype="float32",
        row_order=row_order,
        num_averaged_views=average,
    )
    return precompute(dataset, teacher, spec, out, batch_size=BATCH, workers=1, class_names=())


def played(
    setting: Setting, dataset: Dataset, student: ViewSpec, size_px: int | None = None
) -> list[Batch]:
    """All batches of the first epochs, with what a live teacher sees."""
    seen = setting.teacher_view_spec(student, size_px=size_px)
    with Loader(dataset, student, BATCH, teacher_view_spec=seen, workers=1) as loader:
        return [batch for epoch in range(EPOCHS) for batch in loader.batches(epoch)]


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=lambda s: s.name)
def test_online_both_sides_see_what_the_paper_says(
    photos: Dataset, cv2: ModuleType, stored: list[np.ndarray], setting: Setting
) -> None:
    wanted = DEFINITIONS[setting.name]
    student = setting.student_view_spec(GIVEN, 999)
    teacher, spy = spy_teacher()
    source = online_source(setting, teacher, photos, student)
    batches = played(setting, photos, student)
    assert len(batches) == EPOCHS * -(-len(photos) // BATCH)
    for batch in batches:
        shown = by_sample(cv2, stored, wanted.student, batch.view)
        assert (images_of(batch) == shown[batch.sample_ids_B]).all()
        spy.seen.clear()
        source(batch)
        asked = wanted.teacher_views(batch.view)
        seen = np.concatenate(spy.seen).reshape(len(asked), len(batch), SIZE, SIZE, 3)
        for number, pixels in zip(asked, seen, strict=True):
            expected = by_sample(cv2, stored, wanted.teacher, number)[batch.sample_ids_B]
            assert (pixels == expected).all()


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=lambda s: s.name)
def test_a_cache_is_of_what_the_paper_says(
    photos: Dataset, cv2: ModuleType, stored: list[np.ndarray], setting: Setting, tmp_path: Path
) -> None:
    wanted, n = DEFINITIONS[setting.name], len(photos)
    teacher, spy = spy_teacher()
    cache = recorded(setting, teacher, photos, tmp_path / "t")
    assert cache.metadata["setting"] == cache_setting_name(cache.spec) == setting.name
    seen, expected = np.concatenate(spy.seen), []
    consistent = setting.name.startswith(("consistent", "function"))
    for epoch in range(cache.spec.num_views):
        shown = {v: by_sample(cv2, stored, wanted.teacher, v) for v in wanted.teacher_views(epoch)}
        rows = view_order(wanted.teacher, epoch, n) if consistent else np.arange(n)
        for start in range(0, n, BATCH):
            expected += [pixels[rows[start : start + BATCH]] for pixels in shown.values()]
    assert (seen == np.concatenate(expected)).all()


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=lambda s: s.name)
def test_cached_equals_online_to_the_bit(photos: Dataset, setting: Setting, tmp_path: Path) -> None:
    teacher, _ = spy_teacher()
    cache = recorded(setting, teacher, photos, tmp_path / "t")
    name, student = cached_view_spec(None, cache.spec, cache.url, {}, 999)
    assert (name, student) == (setting.name, setting.student_view_spec(GIVEN, 999))
    assert cached_view_spec(setting, cache.spec, cache.url, GIVEN, 999) == (name, student)
    kind = CachedTargets if cache.spec.row_order == "view" else FixedTargets
    cached = kind(cache, photos.content_hash, student)
    online = online_source(setting, teacher, photos, student)
    answers = []
    for batch in played(setting, photos, student):
        found, live = cached(batch), online(batch)
        assert isinstance(found, Target)
        assert isinstance(live, Target)
        assert torch.equal(found.logits_BK, live.logits_BK)
        answers.append(live.logits_BK)
    # The comparison can fail: answers differ between samples, and between epochs where they should.
    half = len(answers) // 2
    by_epoch = [torch.cat(answers[:half]), torch.cat(answers[half:])]
    assert len(by_epoch[0].unique(dim=0)) > 35
    orders = [torch.from_numpy(view_positions(student, e, len(photos))) for e in (0, 1)]
    moved = by_epoch[0][orders[0]] != by_epoch[1][orders[1]]
    assert bool(moved.any(1).float().mean() > 0.9) == (not setting.fixed)
    assert bool(moved.any()) == (not setting.fixed)


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=lambda s: s.name)
def test_a_bigger_teacher_sees_the_same_boxes(
    photos: Dataset, cv2: ModuleType, stored: list[np.ndarray], setting: Setting, tmp_path: Path
) -> None:
    """The paper's T384 to S224: only the number of pixels differs, online and on a cache."""
    wanted, big = DEFINITIONS[setting.name], 24
    larger = replace(wanted.teacher, size_px=big)
    student = setting.student_view_spec(GIVEN, 999)
    assert setting.cache_view_spec(student, size_px=big) == larger
    if not setting.num_averaged_views:
        assert setting.teacher_view_spec(student, size_px=big) == larger
        for batch in played(setting, photos, student, big):
            assert (
                images_of(batch)
                == by_sample(cv2, stored, wanted.student, batch.view)[batch.sample_ids_B]
            ).all()
            number = wanted.teacher_views(batch.view)[0]
            seen = batch.for_teacher.permute(0, 2, 3, 1).numpy()
            expected = by_sample(cv2, stored, larger, number)[batch.sample_ids_B]
            assert (seen == expected).all()
    teacher, _ = spy_teacher(big)
    cache = recorded(setting, teacher, photos, tmp_path / "t", size_px=big)
    name, seen_by_student = cached_view_spec(None, cache.spec, cache.url, {"size_px": SIZE}, 999)
    assert (name, seen_by_student) == (setting.name, student)
    with pytest.raises(CacheMismatch, match="size_px: 16 here, 24 there"):
        require_setting(setting, cache.spec, cache.url, student)
    require_setting(setting, cache.spec, cache.url, student, resized=True)
    if cache.spec.row_order == "view":
        with pytest.raises(CacheMismatch, match="size_px: 16 here, 24 there"):
            CachedTargets(cache, photos.content_hash, student)
        with pytest.raises(CacheMismatch, match="seed: 1 here, 9 there"):
            cache.require_compatible(photos.content_hash, replace(student, seed=1), resized=True)
        source = CachedTargets(cache, photos.content_hash, student, resized=True)
        for batch in played(setting, photos, student, big):
            live, found = OnlineTargets(teacher)(batch), source(batch)
            assert isinstance(found, Target)
            assert torch.equal(found.logits_BK, live.logits_BK)


def test_names_and_papers_names() -> None:
    assert {s.name: s.paper for s in SETTINGS.values()} == {
        n: d.paper for n, d in DEFINITIONS.items()
    }
    assert settings.DEFAULT_SETTING.name == "function-matching"
    for setting in SETTINGS.values():
        assert get_setting(setting.name) is get_setting(setting.paper) is setting
        assert "\n" not in setting.sees
        view = setting.student_view_spec(GIVEN, 999)
        if not setting.num_averaged_views:
            assert setting_name(view, setting.teacher_view_spec(view)) == setting.name
            assert setting_name(view, setting.teacher_view_spec(view, size_px=24)) == setting.name
    words = r"unknown setting '': a setting is one of fixed-whole, .*, function-matching$"
    with pytest.raises(UsageError, match=words):
        get_setting("")
    with pytest.raises(UsageError, match=r", function-matching; did you mean consistent-random\?$"):
        get_setting("consistant-random")
    assert setting_name(replace(MILD, mixup=1.0)) == setting_name(CENTER) == "custom"
    assert setting_name(MILD, replace(CENTER, min_scale=0.5)) == "custom"


def test_the_teachers_seed_is_a_bijection() -> None:
    for seed in (0, 1, HIGH - 1, HIGH, 2**64 - 1):
        assert other_seed(seed) != seed
        assert other_seed(other_seed(seed)) == seed
        assert 0 <= other_seed(seed) < 2**64


@pytest.mark.parametrize(
    ("name", "given", "words"),
    [
        (
            "consistent-inception",
            {"mixup": 1.0},
            "does not mix: with --mixup 1 it would be function-matching; "
            "give --setting function-matching, or leave --mixup 1 out",
        ),
        ("function-matching", {"mixup": 0}, "mixes: with --mixup 0 it would be consistent-incep"),
        (
            "consistent-random",
            {"crop": "inception"},
            "--crop inception it would be consistent-incep",
        ),
        ("independent-random", {"crop": "inception"}, "it would be independent-inception"),
        ("function-matching", {"crop": "center"}, "has the inception crop: leave --crop center"),
        ("fixed-center", {"crop": "center"}, "has the random crop: leave --crop center out, or"),
        ("independent-random", {"mixup": 1.0}, "does not mix: leave --mixup 1 out, or --setting"),
        ("fixed-whole", {"flip": True}, "the same view every epoch: leave --flip out"),
        ("fixed-whole", {"min_scale": 0.5}, "min-scale must be 1 for all of the image, not 0.5"),
    ],
)
def test_options_that_make_another_setup_are_refused(
    name: str, given: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        get_setting(name).student_view_spec(given, SIZE)


def test_options_that_leave_the_setup_as_it_is_are_taken() -> None:
    given = {"size_px": 20, "min_scale": 0.3, "flip": False, "seed": 4, "mixup": 0.2}
    assert get_setting("function-matching").student_view_spec(given, SIZE) == ViewSpec(
        20, "inception", 0.3, False, 0.2, 4
    )
    view = get_setting("fixed-center").student_view_spec({"min_scale": 0.5}, SIZE)
    assert get_setting("fixed-center").teacher_view_spec(view) == ViewSpec(
        SIZE, "center", 0.5, False, 0
    )


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("fixed-center", {"num_views": 2}, "has one answer for each sample: --views 1, not 2"),
        (
            "fixed-center",
            {"num_averaged_views": 5},
            "targets of one view: --average-views goes with --setting fixed-a",
        ),
        (
            "consistent-random",
            {"row_order": "dataset"},
            "needs a cache in view order: leave --row-order",
        ),
        (
            "independent-random",
            {"row_order": "view"},
            "needs a cache in dataset order: leave --row-order",
        ),
    ],
)
def test_caches_that_a_setup_does_not_need_are_refused(
    name: str, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        get_setting(name).cache_fields({}, SIZE, **options)


def cache_of(name: str, num_views: int = 1, **given: Any) -> CacheSpec:
    view, row_order, average = get_setting(name).cache_fields(
        {**GIVEN, **given}, SIZE, num_views=num_views
    )
    codec = Dense("float32")
    return CacheSpec(num_views, 41, 5, codec, "0" * 16, "1" * 16, view, row_order, average)


def test_a_cache_serves_its_own_setup_only() -> None:
    for setting in SETTINGS.values():
        spec = cache_of(setting.name)
        for other in SETTINGS.values():
            if other is setting:
                assert cached_view_spec(other, spec, "t", {}, 999)[0] == setting.name
                continue
            with pytest.raises(CacheMismatch) as caught:
                cached_view_spec(other, spec, "t", {}, 999)
            assert str(caught.value) == (
                f"t was made for {setting.name}, not for {other.name}: train with --setting "
                f"{setting.name}, or precompute a cache with --setting {other.name}"
            )


def test_a_cache_of_other_views_is_refused() -> None:
    fixed, independent = get_setting("fixed-center"), get_setting("independent-random")
    for setting, given, words in (
        (fixed, {"min_scale": 0.5}, r"holds other views .* fixed-center \(min_scale: 0.5 here"),
        (get_setting("consistent-random"), {"seed": 2}, r"\(seed: 2 here, 9 there\)"),
        (independent, {"seed": other_seed(SEED)}, "has the student's own seed"),
        (independent, {"flip": False}, "flip: False here, True there"),
    ):
        with pytest.raises(CacheMismatch, match=words):
            cached_view_spec(setting, cache_of(setting.name), "t", given, 999)
    # A fixed teacher serves students of any seed, independent noise those of any other seed.
    assert cached_view_spec(fixed, cache_of("fixed-center"), "t", {"seed": 2}, 9)[1].seed == 2
    assert (
        cached_view_spec(independent, cache_of("independent-random"), "t", {"seed": 2}, 9)[1].seed
        == 2
    )


def test_caches_of_no_setup() -> None:
    custom = replace(cache_of("fixed-center"), view_spec=replace(CENTER, flip=True))
    imported = replace(custom, view_spec=None)
    for spec, words in (
        (custom, "t was made for no setting of kdcache, not for fixed-center: leave --setting out"),
        (
            imported,
            "t was imported, and its views are not of kdcache's making: leave --setting out",
        ),
    ):
        assert cache_setting_name(spec) == "custom"
        with pytest.raises(CacheMismatch, match=words):
            cached_view_spec(get_setting("fixed-center"), spec, "t", {}, 999)
        given = {"crop": "random", "size_px": 20}
        assert cached_view_spec(None, spec, "t", given, 999) == (
            "custom",
            ViewSpec(20, "random", EVAL_SCALE, mixup=0),
        )
    # Options that contradict the setting of a cache make one's own of it.
    given = {"crop": "inception"}
    assert cached_view_spec(None, cache_of("fixed-center"), "t", given, 8) == (
        "custom",
        ViewSpec(8, mixup=0),
    )
    changed = {"crop": "random", "min_scale": 0.5}
    assert cached_view_spec(None, cache_of("function-matching"), "t", changed, 8)[0] == "custom"


def test_several_fixed_views_are_no_setup() -> None:
    assert cache_setting_name(replace(cache_of("fixed-center"), num_views=2)) == "custom"
    assert (
        cache_setting_name(replace(cache_of("independent-random"), num_views=2))
        == "independent-random"
    )


# --- the command line ------------------------------------------------------------------------


def made(kdcache: Run, dataset: Dataset, out: Path, *options: object) -> LogitCache:
    line = ("--data", dataset.path, "--teacher", TEACHER, "--out", out, *options)
    result = kdcache("precompute", *line)
    assert result.code == 0, result.err
    return LogitCache.open(out)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (["--setting", "fix/cc"], "fixed-center"),
        (["--setting", "fixed-average", "--average-views", 2], "fixed-average"),
        (["--setting", "independent-random", "--views", 2, "--view-seed", 3], "independent-random"),
        (["--setting", "function-matching"], "function-matching"),
        ([], "function-matching"),
        (["--mixup", 0], "consistent-inception"),
        (["--mixup", 0, "--crop", "random"], "consistent-random"),
        (["--crop", "whole", "--mixup", 0], "custom"),
        (["--crop", "random"], "custom"),
        (["--row-order", "dataset", "--views", 2], "independent-inception"),
    ],
)
def test_precompute_by_name(
    kdcache: Run, digits_test: Dataset, tmp_path: Path, options: list[object], name: str
) -> None:
    cache = made(kdcache, digits_test, tmp_path / "t", *options)
    assert cache.metadata["setting"] == cache_setting_name(cache.spec) == name
    if name == "independent-random":
        assert cache.spec.view_spec is not None
        assert (cache.spec.view_spec.seed, cache.spec.num_views) == (HIGH + 3, 2)
    result = kdcache("inspect", tmp_path / "t")
    assert re.search(rf"^setting +{name} ", result.out, re.MULTILINE)


def test_several_teachers(kdcache: Run, digits_test: Dataset, tmp_path: Path) -> None:
    other = "python:tests.test_settings:other_teacher"
    alone = made(kdcache, digits_test, tmp_path / "1", "--top-k", "all", "--dtype", "float32")
    both = made(
        kdcache,
        digits_test,
        tmp_path / "2",
        "--teacher",
        other,
        "--top-k",
        "all",
        "--dtype",
        "float32",
    )
    assert both.metadata["teacher"] == f"{TEACHER} + {other}"
    assert both.spec.teacher_hash != alone.spec.teacher_hash
    rows = np.arange(len(digits_test))
    p_1 = alone.target(0, rows).log_p_BK.exp()
    cache = kdcache(
        "precompute",
        "--data",
        digits_test.path,
        "--teacher",
        other,
        "--out",
        tmp_path / "3",
        "--top-k",
        "all",
        "--dtype",
        "float32",
    )
    assert cache.code == 0
    p_2 = LogitCache.open(tmp_path / "3").target(0, rows).log_p_BK.exp()
    torch.testing.assert_close(
        both.target(0, rows).log_p_BK.exp(), (p_1 + p_2) / 2, rtol=1e-4, atol=1e-6
    )
    line = ("verify", tmp_path / "2", "--data", digits_test.path, "--json")
    right = kdcache(*line, "--teacher", TEACHER, "--teacher", other)
    assert right.code == 0, right.out
    assert json.loads(right.out)["ok"]
    assert kdcache(*line, "--teacher", TEACHER).code == 1


def test_another_domain(kdcache: Run, digits_test: Dataset, tmp_path: Path) -> None:
    teacher = "python:tests.test_settings:seven_classes"
    line = ("precompute", "--data", digits_test.path, "--teacher", teacher, "--out", tmp_path / "t")
    result = kdcache(*line)
    assert result.code == 2
    assert result.err.count("\n") == 1
    assert ("has 7 classes, the data has 10") in result.err
    assert kdcache(*line, "--unlabeled", "--top-k", "all").code == 0
    cache = LogitCache.open(tmp_path / "t")
    assert (cache.spec.num_classes, cache.spec.codec) == (7, Dense())
    assert (cache.metadata["class_names"], cache.metadata["unlabeled"]) == ([], True)
    # Labels of other classes tell nothing of such a cache.
    shown = kdcache("inspect", tmp_path / "t", "--data", digits_test.path)
    assert shown.code == 0
    assert "accuracy" not in shown.out
    assert kdcache("inspect", tmp_path / "t", "--sample", 3, "--data", digits_test.path).code == 0
    verified = kdcache("verify", tmp_path / "t", "--data", digits_test.path, "--teacher", teacher)
    assert verified.code == 0, verified.out


@pytest.mark.parametrize("name", ["fixed-average", "independent-random", "function-matching"])
def test_a_run_from_a_cache_is_the_run_with_a_live_teacher(
    kdcache: Run, digits_test: Dataset, tmp_path: Path, name: str
) -> None:
    """The same weights to the bit, from `--setting` to the end."""
    average = ["--average-views", 2] if name == "fixed-average" else []
    views = [] if average else ["--views", 2]
    cache = made(
        kdcache,
        digits_test,
        tmp_path / "t",
        "--setting",
        name,
        *average,
        *views,
        "--top-k",
        "all",
        "--dtype",
        "float32",
        "--batch-size",
        54,
        "--view-seed",
        5,
    )
    weights = []
    for mode, options in (
        ("cached", ["--cache", tmp_path / "t"]),
        ("cached", ["--cache", tmp_path / "t", "--setting", name]),
        ("online", ["--teacher", TEACHER, "--setting", name, "--view-seed", 5, *average, *views]),
    ):
        out = tmp_path / f"run{len(weights)}"
        result = kdcache(
            "train",
            "--mode",
            mode,
            *options,
            "--data",
            digits_test.path,
            "--student",
            "python:tests.conftest:convolutional_student",
            "--epochs",
            2,
            "--batch-size",
            54,
            "--deterministic",
            "--out",
            out,
        )
        assert result.code == 0, result.err
        record = json.loads((out / "run.json").read_text())
        assert record["spec"].get("setting", "function-matching") == name
        weights.append(record["weights"])
    assert len(set(weights)) == 1
    with pytest.raises(CacheMismatch, match=f"was made for {name}, not for fixed-center"):
        cached_view_spec(get_setting("fixed-center"), cache.spec, cache.url, {}, 8)


def test_refusals_are_one_line(kdcache: Run, digits_test: Dataset, tmp_path: Path) -> None:
    line = ("precompute", "--data", digits_test.path, "--teacher", TEACHER, "--out", tmp_path / "t")
    for options, words in (
        (["--setting", "same"], "unknown setting 'same': a setting is one of fixed-whole"),
        (["--setting", "same/ic", "--mixup", 1], "consistent-inception does not mix"),
        (["--setting", "fix/rs", "--views", 3], "--views 1, not 3"),
    ):
        result = kdcache(*line, *options)
        assert result.code == 2
        assert words in result.err
        assert result.err.count("\n") == 1
    assert not (tmp_path / "t").exists()
    made(kdcache, digits_test, tmp_path / "t", "--setting", "ind/ic", "--views", 1)
    line = (
        "train",
        "--mode",
        "cached",
        "--cache",
        tmp_path / "t",
        "--data",
        digits_test.path,
        "--student",
        "kdcache:small",
        "--out",
        tmp_path / "r",
    )
    for options, words in (
        (["--setting", "same/ic"], "was made for independent-inception, not for consistent-incep"),
        (["--setting", "ind/ic", "--view-seed", HIGH], "has the student's own seed"),
        (
            ["--setting", "ind/ic", "--crop", "random"],
            "with --crop random it would be independent-r",
        ),
    ):
        result = kdcache(*line, *options)
        assert result.code == 2
        assert words in result.err
        assert result.err.count("\n") == 1


def other_teacher(num_classes: int) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, num_classes))
    with torch.no_grad():
        network[1].weight.copy_(torch.randn(num_classes, 192, generator=generator) / 4)
        network[1].bias.zero_()
    return network


def seven_classes(num_classes: int | None) -> nn.Module:
    return other_teacher(7)


# --- the picture -----------------------------------------------------------------------------


def test_the_picture_shows_what_either_side_sees(
    photos: Dataset, cv2: ModuleType, stored: list[np.ndarray], tmp_path: Path
) -> None:
    for setting in SETTINGS.values():
        wanted = DEFINITIONS[setting.name]
        shown = plots._seen(setting, photos, 7, SIZE, SEED)
        assert len(shown) == 3
        for epoch, (teacher, student) in enumerate(shown):
            assert (student == by_sample(cv2, stored, wanted.student, epoch)[7]).all()
            if not setting.num_averaged_views:
                number = wanted.teacher_views(epoch)[0]
                assert (teacher == by_sample(cv2, stored, wanted.teacher, number)[7]).all()
                continue
            assert teacher.shape == (3 * SIZE + 2, 3 * SIZE + 2, 3)
            fifth = teacher[SIZE + 1 : 2 * SIZE + 1, SIZE + 1 : 2 * SIZE + 1]
            assert (fifth == by_sample(cv2, stored, wanted.teacher, 4)[7]).all()


def test_the_picture_is_a_picture(photos: Dataset, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plots.draw_setups(photos, tmp_path / "x.png", sample=7, size_px=SIZE)
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
