"""The loop: its schedule, its determinism, the views it plays, and the run it leaves."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import kdcache
from kdcache import models
from kdcache.dataset import Dataset
from kdcache.errors import DatasetCorrupt, NonFinite, StorageError, UsageError
from kdcache.evaluate import evaluate
from kdcache.loader import Loader
from kdcache.models import Classifier
from kdcache.records import Batch, Target
from kdcache.spec import ViewSpec
from kdcache.targets import LabelTargets
from kdcache.train import (
    Run,
    Step,
    TrainSpec,
    learning_rate,
    optimizer_of,
    set_determinism,
    train,
)

STUDENT = "python:tests.conftest:convolutional_student"
SPEC = TrainSpec("labels", ViewSpec(8, min_area=0.5), epochs=2, batch_size=64, deterministic=True)


def fresh(spec: TrainSpec = SPEC) -> Classifier:
    set_determinism(spec)
    return models.load(STUDENT, "student", num_classes=10, size_px=8)


def trained(dataset: Dataset, spec: TrainSpec = SPEC) -> tuple[Classifier, list[Step]]:
    student, steps = fresh(spec), []
    train(spec, dataset, student, LabelTargets(10), workers=1, on_step=steps.append)
    return student, steps


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1, not 0"),
        ({"batch_size": 0}, "batch size must be at least 1, not 0"),
        ({"lr": 0.0}, "lr must be above 0, not 0.0"),
        ({"lr": -1e-3}, "lr must be above 0, not -0.001"),
        ({"lr": float("nan")}, "lr must be above 0, not nan"),
        ({"weight_decay": -1.0}, "weight decay must be at least 0, not -1.0"),
        ({"warmup": 1.0}, r"warmup must be in \[0, 1\), not 1.0"),
        ({"warmup": -0.1}, r"warmup must be in \[0, 1\), not -0.1"),
        ({"temperature": 0.0}, "temperature must be above 0, not 0.0"),
    ],
)
def test_a_spec_says_what_is_wrong(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        replace(SPEC, **change)


@pytest.mark.parametrize("steps", [1, 2, 10, 1000])
@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.5, 0.999])
def test_the_rate_rises_to_its_peak_and_falls_towards_zero(warmup: float, steps: int) -> None:
    spec = replace(SPEC, warmup=warmup, lr=0.5)
    rates = np.array([learning_rate(spec, step, steps) for step in range(steps)])
    rise = round(warmup * steps)
    assert (rates > 0).all()
    assert rates.max() == (0.5 if steps else 0)
    assert (np.diff(rates[:rise]) > 0).all()
    assert (np.diff(rates[rise:]) < 0).all()
    if rise:
        np.testing.assert_allclose(rates[0], 0.5 / rise)
        np.testing.assert_allclose(rates[rise - 1], 0.5)


def test_the_rate_at_known_steps() -> None:
    spec = replace(SPEC, warmup=0.2, lr=1.0)
    found = [learning_rate(spec, step, 10) for step in (0, 1, 2, 6, 10)]
    np.testing.assert_allclose(found, [0.5, 1.0, 1.0, 0.5, 0.0], atol=1e-12)


def test_the_logged_rate_is_the_schedules(digits_test: Dataset) -> None:
    _, steps = trained(digits_test)
    assert [(s.step, s.steps, s.epoch) for s in steps] == [(8, 8, 1)]
    assert steps[-1].lr == learning_rate(SPEC, 7, 8)
    assert steps[-1].rate > 0


def test_weight_decay_spares_norms_and_biases() -> None:
    student = fresh()
    groups = optimizer_of(student, replace(SPEC, weight_decay=0.3)).param_groups
    assert [g["weight_decay"] for g in groups] == [0.3, 0.0]
    assert all(w.ndim > 1 for w in groups[0]["params"])
    assert all(w.ndim == 1 for w in groups[1]["params"])
    assert sum(len(g["params"]) for g in groups) == len(list(student.parameters()))


# --- determinism -----------------------------------------------------------------------------


def test_equal_runs_give_equal_weights_and_other_seeds_others(digits_test: Dataset) -> None:
    first, second = trained(digits_test)[0], trained(digits_test)[0]
    assert first.fingerprint() == second.fingerprint()
    assert first.fingerprint() != fresh().fingerprint()
    other_student = trained(digits_test, replace(SPEC, seed=1))[0]
    other_views = trained(digits_test, replace(SPEC, view=replace(SPEC.view, seed=1)))[0]
    different = {s.fingerprint() for s in (first, other_student, other_views)}
    assert len(different) == 3


def test_training_lowers_the_loss(digits: Dataset) -> None:
    view = ViewSpec(8, crop="center", min_area=1.0, flip=False, mixup=0)
    spec = replace(SPEC, view=view, epochs=5)
    student, steps = trained(digits, spec)
    assert steps[-1].loss < 0.5
    assert evaluate(student, digits, size_px=8).top1 > 0.85
    assert student.training


# --- what it plays ---------------------------------------------------------------------------


class Spy:
    """Labels, and a note of the batches that asked for them."""

    def __init__(self) -> None:
        self.batches: list[Batch] = []

    def __call__(self, batch: Batch) -> Target:
        self.batches.append(batch)
        return LabelTargets(10)(batch)


@pytest.mark.parametrize(
    ("views", "played"), [(None, [0, 1, 2, 3, 4]), (2, [0, 1, 0, 1, 0]), (1, [0] * 5)]
)
def test_epochs_cycle_through_the_views(
    digits_test: Dataset, views: int | None, played: list[int]
) -> None:
    spy = Spy()
    spec = replace(SPEC, epochs=5, batch_size=100, views=views)
    train(spec, digits_test, fresh(), spy)
    assert [b.view for b in spy.batches] == [v for v in played for _ in range(2)]
    assert [b.positions_B.tolist() for b in spy.batches] == 5 * [
        list(range(100)), list(range(100, 200))
    ]  # fmt: skip


def test_one_batch_may_hold_all_samples(digits_test: Dataset) -> None:
    spy = Spy()
    train(replace(SPEC, epochs=1, batch_size=297), digits_test, fresh(), spy)
    assert [len(b) for b in spy.batches] == [297]


def test_a_batch_above_the_data_is_refused(digits_test: Dataset) -> None:
    with pytest.raises(UsageError, match="batch size 298 is more than the 297 samples of the data"):
        train(replace(SPEC, batch_size=298), digits_test, fresh(), LabelTargets(10))


# --- errors ----------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_ends_the_run_with_its_step(digits_test: Dataset) -> None:
    def targets(batch: Batch) -> Target:
        logits = torch.full((len(batch), 10), torch.nan)
        return Target(logits, None, None, 10)

    with pytest.raises(NonFinite, match="the loss is nan at step 8: lower --lr or raise --warmup"):
        train(SPEC, digits_test, fresh(), targets)


def test_a_weight_that_is_not_finite_is_not_kept(digits_test: Dataset) -> None:
    """The loss of a step says nothing of the weights that the step leaves."""
    student = fresh()
    student.network.unused = torch.nn.Parameter(torch.full((1,), torch.nan))
    with pytest.raises(NonFinite, match="a weight NaN or infinite"):
        train(SPEC, digits_test, student, LabelTargets(10))


def test_a_damaged_sample_ends_the_run(digits_test: Dataset) -> None:
    checksums = digits_test.checksums.copy()
    checksums[123] ^= 1
    damaged = replace(digits_test, checksums=checksums)
    with pytest.raises(DatasetCorrupt, match="sample 123 is damaged"):
        train(replace(SPEC, batch_size=297), damaged, fresh(), LabelTargets(10))


# --- the run's folder ------------------------------------------------------------------------


@pytest.fixture
def finished(digits_test: Dataset, tmp_path: Path) -> tuple[Classifier, Path]:
    student, _ = trained(digits_test)
    run = Run(tmp_path / "runs" / "a")
    run.log({"step": 1})
    result = evaluate(student, digits_test, size_px=8)
    run.finish(SPEC, digits_test, student, result, cache=None, teacher="someone", seconds=1.5)
    return student, tmp_path / "runs" / "a"


def test_a_run_says_how_it_was_made(
    finished: tuple[Classifier, Path], digits_test: Dataset
) -> None:
    student, folder = finished
    record = json.loads((folder / "run.json").read_text())
    assert {k: record[k] for k in asdict(SPEC)} == json.loads(json.dumps(asdict(SPEC)))
    assert record["student"] == STUDENT
    assert record["classes"] == 10
    assert record["class_names"] == list(digits_test.classes)
    assert record["data"] == digits_test.fingerprint
    assert record["weights"] == student.fingerprint()
    assert (record["cache"], record["teacher"], record["seconds"]) == (None, "someone", 1.5)
    assert (record["kdcache"], record["torch"]) == (kdcache.__version__, torch.__version__)
    assert record["evaluation"]["samples"] == 297
    assert (folder / "log.jsonl").read_text() == '{"step": 1}\n'
    assert {f.name for f in folder.iterdir()} == {"run.json", "log.jsonl", "student.safetensors"}


def test_a_runs_weights_come_back_as_they_were(finished: tuple[Classifier, Path]) -> None:
    student, folder = finished
    for role, name in (("teacher", str(folder)), ("student", STUDENT)):
        again = models.load(str(folder), role, num_classes=10, size_px=8)  # type: ignore[arg-type]
        assert again.fingerprint() == student.fingerprint()
        assert again.name == name


def test_a_run_is_finished_last(digits_test: Dataset, tmp_path: Path) -> None:
    run = Run(tmp_path / "r")
    with pytest.raises(UsageError, match=r"is not a finished run: it has no run\.json"):
        models.load(str(tmp_path / "r"), "teacher", num_classes=10, size_px=8)
    run.finish(SPEC, digits_test, fresh(), None)


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch])
def test_a_run_refuses_a_path_that_exists(tmp_path: Path, make: Any) -> None:
    make(tmp_path / "r")
    with pytest.raises(UsageError, match=r"r exists; choose another --out, or remove it"):
        Run(tmp_path / "r")


def test_a_run_below_a_file_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"cannot make .*Not a directory"):
        Run(tmp_path / "file" / "r")


def test_weights_that_share_memory_are_saved(digits_test: Dataset, tmp_path: Path) -> None:
    """Safetensors refuses tensors that alias each other; tied weights are common."""
    layer = nn.Linear(192, 192)
    network = nn.Sequential(nn.Flatten(), layer, layer, nn.Linear(192, 10))
    student = Classifier(network, "tied", (0.5,) * 3, (0.5,) * 3)
    Run(tmp_path / "r").finish(SPEC, digits_test, student, None)
    assert (tmp_path / "r" / "run.json").exists()


def test_the_loader_is_closed_when_the_run_ends_early(
    digits_test: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[Loader] = []
    close = Loader.close

    def spy(self: Loader) -> None:
        closed.append(self)
        close(self)

    def broken(batch: Batch) -> Target:
        raise RuntimeError("no answer")

    monkeypatch.setattr(Loader, "close", spy)
    with pytest.raises(RuntimeError, match="no answer"):
        train(SPEC, digits_test, fresh(), broken)
    assert len(closed) == 1
    assert not closed[0]._passes
