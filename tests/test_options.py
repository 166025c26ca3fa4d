"""From options to a run: what a recipe, a cache and a setting settle, and what is loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numba
import pytest
import torch

from kdcache.choices import Tail
from kdcache.data.beton import Dataset
from kdcache.errors import CacheMismatch, UsageError
from kdcache.losses.distillation import distillation_loss
from kdcache.models import load
from kdcache.models.weights import save_weights
from kdcache.options import build, describe, option, option_names
from kdcache.teacher import targets
from kdcache.teacher.precompute import precompute
from kdcache.training.load import load_training_run, loader_threads
from kdcache.training.loop import iter_batches, open_loader
from kdcache.training.options import RunOptions, TrainCommand, TrainOptions
from kdcache.training.recipes import get_recipe
from kdcache.training.spec import TrainSpec
from kdcache.views.options import ViewOptions
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


def given(dataset: Dataset, mode: Any = "labels", **options: Any) -> TrainOptions:
    return TrainOptions(mode=mode, data=dataset.path, **{"student": STUDENT, **options})


def test_labels(digits_test: Dataset) -> None:
    run = load_training_run(given(digits_test))
    assert isinstance(run.targets, targets.LabelTargets)
    assert (run.loss, run.reference_teacher, run.cache, run.teacher) == (None, None, None, None)
    assert (run.spec.view_spec, run.spec.teacher_view_spec) == (ViewSpec(8), None)
    assert run.student.num_classes == 10
    assert run.class_names == digits_test.class_names


def test_a_live_teacher_is_part_of_the_run(digits_test: Dataset) -> None:
    run = load_training_run(given(digits_test, "online", teachers=(TEACHER,)))
    teacher = load.load_model(TEACHER, "teacher", num_classes=10, size_px=8)
    assert run.teacher == teacher.content_hash()
    assert isinstance(run.targets, targets.OnlineTargets)
    assert run.spec.setting == "function-matching"
    two = load_training_run(given(digits_test, "online", teachers=(TEACHER, TEACHER)))
    assert two.teacher != run.teacher


def test_a_teacher_that_averages_decodes_with_the_workers_that_were_asked_for(
    digits_test: Dataset,
) -> None:
    for workers in (1, 2):
        run = load_training_run(
            given(
                digits_test,
                "online",
                teachers=(TEACHER,),
                setting="fixed-average",
                num_averaged_views=2,
            ),
            workers=workers,
        )
        assert isinstance(run.targets, targets.AverageTargets)
        assert run.targets._loader.workers == min(workers, numba.config.NUMBA_NUM_THREADS)


def test_a_cache_settles_the_views_and_its_judge_is_no_part_of_the_run(
    digits_test: Dataset, cache: str
) -> None:
    for teachers in ((), (TEACHER,)):
        run = load_training_run(given(digits_test, "cached", cache=cache, teachers=teachers))
        assert isinstance(run.targets, targets.CachedTargets)
        assert run.spec.view_spec == ViewSpec(8, min_scale=0.3, seed=9)
        assert run.spec.num_views == 3
        assert run.cache == run.targets.cache.spec.identity
        assert run.teacher is None
        assert (run.reference_teacher is not None) == bool(teachers)
        assert run.metadata["cache"] == cache


def test_a_label_weight_brings_the_labels(digits_test: Dataset, cache: str) -> None:
    run = load_training_run(given(digits_test, "cached", cache=cache, label_weight=0.1))
    assert run.spec.label_weight == 0.1


@pytest.mark.parametrize("tail", [None, *get_args(Tail)])
def test_the_loss_of_a_run_makes_its_assumption_about_the_tail(
    digits_test: Dataset, tmp_path: Path, tail: Tail | None
) -> None:
    teacher = load.load_model(TEACHER, "teacher", num_classes=10, size_px=8)
    spec = cache_spec(digits_test, teacher, ViewSpec(8), num_views=1, top_k=3, dtype="float32")
    precompute(digits_test, teacher, spec, tmp_path / "t.zarr")
    path, options = str(tmp_path / "t.zarr"), {"epochs": 1, "batch_size": 64, "temperature": 3.0}
    run = load_training_run(given(digits_test, "cached", cache=path, tail=tail, **options))
    assert run.spec.tail == (tail or "uniform")
    with open_loader(run, workers=1) as loader:
        batch = next(iter_batches(loader, run.spec))
    target = run.targets(batch)
    logits_BC = torch.randn(64, 10)

    def gradient(loss: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        z = logits_BC.clone().requires_grad_()
        return torch.autograd.grad(loss(z), z)[0]

    found = gradient(partial(run.make_loss(), target=target, batch=batch))
    for other in get_args(Tail):
        one = gradient(partial(distillation_loss, target=target, temperature=3.0, tail=other))
        assert torch.equal(found, one) == (other == run.spec.tail)


def test_a_recipe_settles_what_was_not_asked_for(digits_test: Dataset) -> None:
    recipe = get_recipe("fashion-mnist")
    run = load_training_run(given(digits_test, recipe="fashion-mnist", view=ViewOptions(size_px=8)))
    assert (run.spec.epochs, run.spec.lr) == (recipe.spec.epochs, recipe.spec.lr)
    assert run.spec.view_spec.min_scale == recipe.spec.view_spec.min_scale
    own = load_training_run(
        given(
            digits_test,
            recipe="fashion-mnist",
            view=ViewOptions(size_px=8, min_scale=0.9),
            epochs=3,
        )
    )
    assert (own.spec.epochs, own.spec.lr, own.spec.view_spec.min_scale) == (3, recipe.spec.lr, 0.9)


def test_a_student_is_needed_or_a_recipe_that_names_one(digits_test: Dataset) -> None:
    with pytest.raises(UsageError, match="give --student MODEL, or a --recipe, which names one"):
        load_training_run(given(digits_test, student=None))


def test_the_seed_decides_the_initial_weights(digits_test: Dataset) -> None:
    torch.rand(3)
    first = [
        load_training_run(given(digits_test, seed=seed)).student.content_hash()
        for seed in (0, 0, 1)
    ]
    assert first[0] == first[1] != first[2]


def test_initial_weights_may_be_given(digits_test: Dataset, tmp_path: Path) -> None:
    other = load_training_run(given(digits_test, seed=5)).student
    save_weights(other, tmp_path / "w.safetensors")
    run = load_training_run(given(digits_test, init=str(tmp_path / "w.safetensors")))
    assert run.student.content_hash() == other.content_hash()


def test_a_compiled_student_has_the_names_of_its_weights(digits_test: Dataset) -> None:
    plain = load_training_run(given(digits_test)).student
    compiled = load_training_run(given(digits_test, compile_student=True)).student
    assert compiled.network._compiled_call_impl is not None
    assert compiled.content_hash() == plain.content_hash()


@pytest.mark.parametrize(
    ("mode", "options", "words"),
    [
        ("online", {}, "--mode online needs --teacher MODEL"),
        ("cached", {}, r"--mode cached needs --cache C.zarr"),
        ("labels", {"label_weight": 0.5}, "--label-weight goes with a teacher"),
        ("labels", {"temperature": 2}, "--temperature goes with a teacher"),
        ("labels", {"unlabeled": True}, "--unlabeled ignores the labels"),
        ("labels", {"teacher_size_px": 9}, "--teacher-size goes with --mode online, not with"),
        ("labels", {"num_averaged_views": 2}, "--average-views goes with --mode online, not with"),
        (
            "online",
            {"teachers": (TEACHER,), "unlabeled": True, "label_weight": 0.5},
            "--label-weight needs labels of the teacher's classes",
        ),
        (
            "online",
            {"teachers": (TEACHER,), "num_averaged_views": 2},
            "--average-views goes with --setting fixed-average",
        ),
    ],
)
def test_what_does_not_go_together(
    digits_test: Dataset, mode: Any, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        load_training_run(given(digits_test, mode, **options))


def test_a_cache_of_another_number_of_views(digits_test: Dataset, cache: str) -> None:
    with pytest.raises(CacheMismatch, match="has 3 views, not 2: leave --views out"):
        load_training_run(given(digits_test, "cached", cache=cache, num_views=2))


def test_epochs_beyond_the_views_of_a_cache_are_told(digits_test: Dataset, cache: str) -> None:
    enough = load_training_run(given(digits_test, "cached", cache=cache, epochs=3))
    assert enough.warnings == ()
    more = load_training_run(given(digits_test, "cached", cache=cache, epochs=4))
    wraps = f"{cache} has 3 views for 4 epochs: epoch e trains on view e mod 3"
    assert more.warnings == (wraps,)


def test_what_a_cache_decides_against_a_recipe_is_told(digits_test: Dataset, cache: str) -> None:
    found = load_training_run(
        given(digits_test, "cached", cache=cache, recipe="fashion-mnist", epochs=3, batch_size=64)
    )
    [line] = found.warnings
    assert line.startswith(
        f"the views come from the cache, not from the recipe: {found.spec.setting}"
    )


def test_a_warm_up_beyond_the_run_is_refused_before_anything_is_made(digits_test: Dataset) -> None:
    with pytest.raises(UsageError, match="a warm-up of 500 steps does not fit into the run's"):
        load_training_run(given(digits_test, "labels", warmup=500))


def test_momentum_goes_with_sgd(digits_test: Dataset) -> None:
    with pytest.raises(UsageError, match="--momentum goes with --optimizer sgd, not with adamw"):
        load_training_run(given(digits_test, "labels", momentum=0.5))
    load_training_run(given(digits_test, "labels", momentum=0.5, optimizer="sgd"))


def test_an_evaluation_needs_validation_data(digits_test: Dataset, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--eval-every needs --val"):
        TrainCommand(train=given(digits_test), out=tmp_path / "r", run=RunOptions(eval_every=3))


@pytest.mark.parametrize(("local_size", "threads"), [(None, None), ("2", 1), ("1", None)])
def test_the_processes_of_a_machine_divide_its_cores(
    monkeypatch: pytest.MonkeyPatch, local_size: str | None, threads: int | None
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1, 2})
    if local_size is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local_size)
    assert loader_threads(None) == threads
    assert loader_threads(5) == 5


# --- options in dataclasses --------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Inner:
    seed: int = option(3, help="A seed.", name="--view-seed", group="B")


@dataclass(frozen=True, kw_only=True)
class Outer:
    out: str = option(help="A place.", name="OUT", positional=True)
    inner: Inner = Inner()
    seed: int | None = option(None, help="Another seed.")
    names: tuple[str, ...] = option((), help="Names.", name="--name")


def test_options_are_described_by_their_fields() -> None:
    described = {one.key: one for one in describe(Outer)}
    assert list(described) == ["out", "view_seed", "seed", "name"]
    assert [one.name for one in described.values()] == ["OUT", "--view-seed", "--seed", "--name"]
    assert described["out"].default is MISSING
    assert described["view_seed"].option.group == "B"
    assert option_names(Outer) == {"out": "OUT", "seed": "--seed", "names": "--name"}


def test_options_are_built_from_their_values() -> None:
    values = {"out": "x", "view_seed": 4, "seed": None, "name": ["a", "b"]}
    assert build(Outer, values) == Outer(out="x", inner=Inner(seed=4), names=("a", "b"))


def test_a_value_that_an_option_refuses_is_never_built() -> None:
    with pytest.raises(UsageError, match=r"no such file: no\.beton"):
        build(TrainOptions, {"data": Path("no.beton")})


def test_fields_of_the_training_spec_are_fields_of_the_options() -> None:
    """What is given is told by the name of a field: one that is renamed would be lost."""
    # The last one is what old runs had.
    made = {"view_spec", "teacher_view_spec", "decay_embeddings"}
    own = {field.name for field in fields(TrainSpec)} - made
    assert own <= {field.name for field in fields(TrainOptions)}
    view = {field.name for field in fields(ViewSpec)} - {"transforms", "version"}
    assert view == {field.name for field in fields(ViewOptions)}
