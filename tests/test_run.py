"""A run from beginning to end: its result, its report, and what it leaves when it fails."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from kdcache.batch import Batch, Target, TemperedTarget
from kdcache.data.beton import Dataset
from kdcache.errors import NonFinite, Stopped, StorageError, UsageError
from kdcache.evaluation.evaluate import evaluate
from kdcache.losses.loss import LOSSES
from kdcache.models import load, weights
from kdcache.models.run_json import read_run_json
from kdcache.teacher.targets import LabelTargets
from kdcache.training import checkpoint, run_folder
from kdcache.training.loop import Progress, set_determinism, train
from kdcache.training.options import RunOptions
from kdcache.training.run import TrainingRun
from kdcache.training.spec import TrainSpec
from kdcache.views.spec import ViewSpec
from tests.conftest import TEACHER

STUDENT = "python:tests.conftest:convolutional_student"
SPEC = TrainSpec("labels", ViewSpec(8, mixup=0), epochs=2, batch_size=64, deterministic=True)
ONE_WORKER = RunOptions(workers=1)
RESUME = RunOptions(resume=True, workers=1)


def make_run(dataset: Dataset, spec: TrainSpec = SPEC, **options: Any) -> TrainingRun:
    set_determinism(spec)
    student = load.load_model(STUDENT, "student", num_classes=10, size_px=8)
    return TrainingRun(spec, dataset, student, options.pop("targets", LabelTargets(10)), **options)


def test_a_run_ends_with_what_run_json_says(digits_test: Dataset, tmp_path: Path) -> None:
    teacher = load.load_model(TEACHER, "teacher", num_classes=10, size_px=8)
    run = make_run(
        digits_test,
        val=digits_test,
        reference_teacher=teacher,
        metadata={"teacher": "t", "cache": None},
    )
    reports: list[Progress] = []
    options = replace(ONE_WORKER, log_every=3)
    record = train(run, tmp_path / "r", options=options, report=reports.append)
    assert record == read_run_json(tmp_path / "r")
    assert [(p.step, p.num_steps) for p in reports] == [(step, 8) for step in range(9)]
    assert [p.metrics.step for p in reports if p.metrics] == [3, 6, 8]
    again = load.load_model(f"{tmp_path / 'r'}@{STUDENT}", "teacher", num_classes=10, size_px=8)
    found = evaluate(again, digits_test, size_px=8, teacher=teacher)
    assert record["evaluation"] == json.loads(json.dumps(found.__dict__))
    assert (record["teacher"], record["cache"]) == ("t", None)
    assert record["seconds"] > 0


def test_a_run_in_memory_ends_as_one_in_a_folder(digits_test: Dataset, tmp_path: Path) -> None:
    records = []
    for out in (None, tmp_path / "r"):
        run = make_run(digits_test, replace(SPEC, ema_decay=0.9), val=digits_test)
        records.append({**train(run, out, options=ONE_WORKER), "seconds": 0})
    assert records[1].pop("log_lines") == len(
        (tmp_path / "r" / "log.jsonl").read_text().splitlines()
    )
    assert records[0] == records[1]
    assert [f.name for f in tmp_path.iterdir()] == ["r"]


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_what_the_run_gives_is_in_memory_too(
    digits_test: Dataset, tmp_path: Path, decay: float
) -> None:
    """With ema_decay it is the average."""
    run = make_run(digits_test, replace(SPEC, ema_decay=decay), val=digits_test)
    record = train(run, tmp_path / "r", options=ONE_WORKER)
    given = load.load_model(f"{tmp_path / 'r'}@{STUDENT}", "teacher", num_classes=10, size_px=8)
    assert TrainSpec.from_json(record["spec"]).ema_decay == decay
    assert record["weights"] == given.content_hash() == run.student.content_hash()
    assert record["evaluation"]["top1"] == evaluate(given, digits_test, size_px=8).top1


def test_a_loss_that_is_nan_leaves_the_last_good_checkpoint(
    digits_test: Dataset, tmp_path: Path
) -> None:
    asked = 0

    def targets(batch: Batch) -> Target:
        nonlocal asked
        asked += 1
        logits_BC = torch.zeros(len(batch), 10)
        if asked == 6:
            logits_BC[0, 0] = torch.nan
        return Target(logits_BC, None, None, 10)

    with pytest.raises(NonFinite, match="the loss is not finite at step 6"):
        train(
            make_run(digits_test, targets=targets),
            tmp_path / "r",
            options=replace(ONE_WORKER, checkpoint_every=2),
        )
    assert [int(p.stem) for p in run_folder.checkpoints(tmp_path / "r")] == [2, 4]
    for path in run_folder.checkpoints(tmp_path / "r"):
        assert all(w.isfinite().all() for w in checkpoint.load(path)["student"].values())
    assert not (tmp_path / "r" / "run.json").exists()


def test_a_run_that_cannot_begin_leaves_nothing(digits_test: Dataset, tmp_path: Path) -> None:
    for spec, words in (
        (replace(SPEC, batch_size=298), "batch size 298 is more than"),
        (
            replace(SPEC, view_spec=ViewSpec(8), batch_size=99),
            "batch size must be even with mixing",
        ),
        (replace(SPEC, warmup=8), "a warm-up of 8 steps does not fit into the run's 8"),
    ):
        with pytest.raises(UsageError, match=words):
            train(make_run(digits_test, spec), tmp_path / "r")
        assert not (tmp_path / "r").exists()


def test_without_room_for_a_checkpoint_the_one_before_stays(
    digits_test: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(make_run(digits_test), tmp_path / "whole", options=ONE_WORKER)
    real = checkpoint.save_tensors

    def full(path: Path, *arguments: Any) -> None:
        if path.name.startswith("0000000006"):
            path.write_bytes(b"x" * 100)
            raise OSError(28, "No space left on device")
        real(path, *arguments)

    out = tmp_path / "r"
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_tensors", full)
        words = "cannot write the checkpoint .*6.safetensors: No space left on device; earlier"
        options = replace(ONE_WORKER, checkpoint_every=2, max_checkpoints=1)
        with pytest.raises(StorageError, match=words):
            train(make_run(digits_test), out, options=options)
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["0000000004.safetensors"]
    record = train(make_run(digits_test), out, options=RESUME)
    assert record["weights"] == whole["weights"]


def test_nor_is_a_run_lost_that_has_no_room_for_its_weights(
    digits_test: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(make_run(digits_test), tmp_path / "whole", options=ONE_WORKER)

    def full(path: Path, *_: object) -> None:
        path.write_bytes(b"x")
        raise OSError("I/O error: No space left on device (os error 28)")

    out = tmp_path / "r"
    with monkeypatch.context() as patch:
        patch.setattr(weights, "save_tensors", full)
        words = "cannot write .*No space left on device.*; free space, then resume with --resume"
        with pytest.raises(StorageError, match=words):
            train(make_run(digits_test), out, options=ONE_WORKER)
    assert not list(out.glob("student*"))
    reports: list[Progress] = []
    record = train(make_run(digits_test), out, options=RESUME, report=reports.append)
    assert [p.step for p in reports] == [8]
    assert record["weights"] == whole["weights"]


def test_a_run_can_be_moved(digits_test: Dataset, tmp_path: Path) -> None:
    whole = train(make_run(digits_test), tmp_path / "whole", options=ONE_WORKER)
    calls = iter([0, 0, 15])
    with pytest.raises(Stopped):
        train(make_run(digits_test), tmp_path / "a", options=ONE_WORKER, stop=lambda: next(calls))
    shutil.move(tmp_path / "a", tmp_path / "b")
    record = train(make_run(digits_test), tmp_path / "b", options=RESUME)
    assert record["weights"] == whole["weights"]


@dataclass(frozen=True)
class SquaredError:
    """A loss of a user's own."""

    scale: float = 1.0
    name: ClassVar[str] = "squared-error"

    def __call__(
        self, logits_BC: torch.Tensor, target: Target | TemperedTarget, batch: Batch
    ) -> torch.Tensor:
        wanted = torch.nn.functional.one_hot(batch.labels_B, logits_BC.shape[1])
        return self.scale * (logits_BC - wanted).square().mean()


def test_a_loss_of_a_users_own_is_part_of_the_run(
    digits_test: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, calls = tmp_path / "r", iter([0, 0, 15])
    run = make_run(digits_test, loss=SquaredError(2.0))
    with pytest.raises(UsageError, match=r"'squared-error' is not in .*LOSSES"):
        train(run, out)
    monkeypatch.setitem(LOSSES, "squared-error", SquaredError)
    with pytest.raises(Stopped):
        train(run, out, options=ONE_WORKER, stop=lambda: next(calls))
    for other, words in (
        (SquaredError(), r"a different run \(scale: 1 here, 2 there\)"),
        (None, r"a different run \(loss: None here"),
    ):
        with pytest.raises(UsageError, match=words):
            train(make_run(digits_test, loss=other), out, options=RESUME)
    train(make_run(digits_test, loss=SquaredError(2.0)), out, options=RESUME)
    monkeypatch.delitem(LOSSES, "squared-error")
    with pytest.raises(UsageError, match="unknown loss 'squared-error', known are distillation"):
        train(make_run(digits_test), out, options=RESUME)
