"""From options to a job: what a recipe, a cache and a setting settle, and what is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numba
import pytest
import torch

from kdcache.data.beton import Dataset
from kdcache.errors import CacheMismatch, UsageError
from kdcache.models import load
from kdcache.models.weights import save_weights
from kdcache.teacher import targets
from kdcache.teacher.precompute import precompute
from kdcache.training.options import TrainOptions, make_training_run
from kdcache.training.recipes import get_recipe
from kdcache.views.spec import ViewSpec
from tests.conftest import TEACHER, cache_spec

STUDENT = "python:tests.conftest:convolutional_student"


@pytest.fixture(scope="module")
def cache(digits_test: Dataset, tmp_path_factory: pytest.TempPathFactory) -> str:
    teacher = load.load_model(TEACHER, "teacher", num_classes=10, size_px=8)
    spec = cache_spec(
        digits_test, teacher, ViewSpec(8, min_scale=0.3, seed=9), num_views=3, dtype="float32"
    )
    out = tmp_path_factory.mktemp("cache") / "t.zarr"
    precompute(digits_test, teacher, spec, out)
    return str(out)


def asked(dataset: Dataset, mode: Any = "labels", **options: Any) -> TrainOptions:
    return TrainOptions(mode, dataset.path, **{"student": STUDENT, **options})


def test_labels(digits_test: Dataset) -> None:
    job = make_training_run(asked(digits_test))
    assert isinstance(job.targets, targets.LabelTargets)
    assert (job.labels, job.judge, job.cache, job.teacher) == (None, None, None, None)
    assert (job.spec.view_spec, job.spec.teacher_view_spec) == (ViewSpec(8), None)
    assert job.student.num_classes == 10
    assert job.class_names == digits_test.class_names


def test_a_live_teacher_is_part_of_the_run(digits_test: Dataset) -> None:
    job = make_training_run(asked(digits_test, "online", teachers=(TEACHER,)))
    teacher = load.load_model(TEACHER, "teacher", num_classes=10, size_px=8)
    assert job.teacher == teacher.content_hash()
    assert isinstance(job.targets, targets.OnlineTargets)
    assert job.spec.setting == "function-matching"
    two = make_training_run(asked(digits_test, "online", teachers=(TEACHER, TEACHER)))
    assert two.teacher != job.teacher


def test_a_teacher_that_averages_decodes_with_the_workers_that_were_asked_for(
    digits_test: Dataset,
) -> None:
    for workers in (1, 2):
        job = make_training_run(
            asked(
                digits_test,
                "online",
                teachers=(TEACHER,),
                setting="fixed-average",
                training={"average": 2},
                workers=workers,
            )
        )
        assert isinstance(job.targets, targets.AverageTargets)
        assert job.targets._loader.workers == min(workers, numba.config.NUMBA_NUM_THREADS)


def test_a_cache_settles_the_views_and_its_judge_is_no_part_of_the_run(
    digits_test: Dataset, cache: str
) -> None:
    for teachers in ((), (TEACHER,)):
        job = make_training_run(asked(digits_test, "cached", cache=cache, teachers=teachers))
        assert isinstance(job.targets, targets.CachedTargets)
        assert job.spec.view_spec == ViewSpec(8, min_scale=0.3, seed=9)
        assert job.spec.num_views == 3
        assert job.cache == job.targets.cache.spec.digest
        assert job.teacher is None
        assert (job.judge is not None) == bool(teachers)
        assert job.about["cache"] == cache


def test_a_label_weight_brings_the_labels(digits_test: Dataset, cache: str) -> None:
    job = make_training_run(
        asked(digits_test, "cached", cache=cache, training={"label_weight": 0.1})
    )
    assert isinstance(job.labels, targets.LabelTargets)
    assert job.spec.label_weight == 0.1


def test_a_recipe_settles_what_was_not_asked_for(digits_test: Dataset) -> None:
    recipe = get_recipe("fashion-mnist")
    job = make_training_run(asked(digits_test, recipe="fashion-mnist", view={"size_px": 8}))
    assert (job.spec.epochs, job.spec.lr) == (recipe.spec.epochs, recipe.spec.lr)
    assert job.spec.view_spec.min_scale == recipe.spec.view_spec.min_scale
    own = make_training_run(
        asked(
            digits_test,
            recipe="fashion-mnist",
            view={"size_px": 8, "min_scale": 0.9},
            training={"epochs": 3},
        )
    )
    assert (own.spec.epochs, own.spec.lr, own.spec.view_spec.min_scale) == (3, recipe.spec.lr, 0.9)


def test_a_student_is_needed_or_a_recipe_that_names_one(digits_test: Dataset) -> None:
    with pytest.raises(UsageError, match="give --student MODEL, or a --recipe, which names one"):
        make_training_run(asked(digits_test, student=None))


def test_the_seed_settles_the_first_weights(digits_test: Dataset) -> None:
    torch.rand(3)
    first = [
        make_training_run(asked(digits_test, training={"seed": seed})).student.content_hash()
        for seed in (0, 0, 1)
    ]
    assert first[0] == first[1] != first[2]


def test_first_weights_may_be_given(digits_test: Dataset, tmp_path: Path) -> None:
    given = make_training_run(asked(digits_test, training={"seed": 5})).student
    save_weights(given, tmp_path / "w.safetensors")
    job = make_training_run(asked(digits_test, init=str(tmp_path / "w.safetensors")))
    assert job.student.content_hash() == given.content_hash()


def test_a_compiled_student_has_the_names_of_its_weights(digits_test: Dataset) -> None:
    plain = make_training_run(asked(digits_test)).student
    compiled = make_training_run(asked(digits_test, compile=True)).student
    assert compiled.network._compiled_call_impl is not None
    assert compiled.content_hash() == plain.content_hash()


@pytest.mark.parametrize(
    ("mode", "options", "words"),
    [
        ("online", {}, "--mode online needs --teacher MODEL"),
        ("cached", {}, r"--mode cached needs --cache C.zarr"),
        ("labels", {"training": {"label_weight": 0.5}}, "--label-weight goes with a teacher"),
        ("labels", {"training": {"temperature": 2}}, "--temperature goes with a teacher"),
        ("labels", {"unlabeled": True}, "--unlabeled leaves labels out"),
        ("labels", {"teacher_size": 9}, "--teacher-size goes with --mode online, not with"),
        ("labels", {"training": {"average": 2}}, "--average-views goes with --mode online, not with"),
        (
            "online",
            {"teachers": (TEACHER,), "unlabeled": True, "training": {"label_weight": 0.5}},
            "--label-weight needs labels of the teacher's classes",
        ),
        (
            "online",
            {"teachers": (TEACHER,), "training": {"average": 2}},
            "--average-views goes with --setting fixed-average",
        ),
    ],
)
def test_what_does_not_go_together(
    digits_test: Dataset, mode: Any, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        make_training_run(asked(digits_test, mode, **options))


def test_a_cache_of_another_number_of_views(digits_test: Dataset, cache: str) -> None:
    with pytest.raises(CacheMismatch, match="has 3 views, not 2: leave --views out"):
        make_training_run(asked(digits_test, "cached", cache=cache, training={"views": 2}))


def test_epochs_beyond_the_views_of_a_cache_are_told(digits_test: Dataset, cache: str) -> None:
    enough = make_training_run(asked(digits_test, "cached", cache=cache, training={"epochs": 3}))
    assert enough.notes == ()
    more = make_training_run(asked(digits_test, "cached", cache=cache, training={"epochs": 4}))
    wraps = f"{cache} has 3 views for 4 epochs: it wraps, epoch e plays view e mod 3"
    assert more.notes == (wraps,)


def test_what_a_cache_decides_against_a_recipe_is_told(digits_test: Dataset, cache: str) -> None:
    given = {"epochs": 3, "batch_size": 64}
    found = make_training_run(
        asked(digits_test, "cached", cache=cache, recipe="fashion-mnist", training=given)
    )
    [line] = found.notes
    assert line.startswith(f"the cache decides what is seen, not the recipe: {found.spec.setting}, 8")


def test_a_warm_up_beyond_the_run_is_refused_before_anything_is_made(digits_test: Dataset) -> None:
    with pytest.raises(UsageError, match="a warm-up of 500 steps does not fit into the run's"):
        make_training_run(asked(digits_test, "labels", training={"warmup": 500}))


def test_momentum_goes_with_sgd(digits_test: Dataset) -> None:
    with pytest.raises(UsageError, match="--momentum goes with --optimizer sgd, not with adamw"):
        make_training_run(asked(digits_test, "labels", training={"momentum": 0.5}))
    make_training_run(asked(digits_test, "labels", training={"momentum": 0.5, "optimizer": "sgd"}))
