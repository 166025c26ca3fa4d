"""A run from beginning to end: what it gives, what it tells, what it leaves when it fails."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kdcache.batch import Batch, Target
from kdcache.data.beton import Dataset
from kdcache.errors import NonFinite, StorageError, UsageError
from kdcache.evaluation.evaluate import evaluate
from kdcache.models import load
from kdcache.teacher.targets import LabelTargets
from kdcache.training import checkpoint, run_folder, session
from kdcache.training.keeper import Schedule
from kdcache.training.loop import Step, set_determinism
from kdcache.training.session import TrainingRun
from kdcache.training.spec import TrainSpec
from kdcache.views.spec import ViewSpec
from tests.conftest import TEACHER

STUDENT = "python:tests.conftest:convolutional_student"
SPEC = TrainSpec("labels", ViewSpec(8, mixup=0), epochs=2, batch_size=64, deterministic=True)


def job(dataset: Dataset, spec: TrainSpec = SPEC, **options: Any) -> TrainingRun:
    set_determinism(spec)
    student = load.load_model(STUDENT, "student", num_classes=10, size_px=8)
    return TrainingRun(spec, dataset, student, options.pop("targets", LabelTargets(10)), **options)


def test_a_run_ends_with_what_run_json_says(digits_test: Dataset, tmp_path: Path) -> None:
    teacher = load.load_model(TEACHER, "teacher", num_classes=10, size_px=8)
    this = job(digits_test, val=digits_test, judge=teacher, about={"teacher": "t", "cache": None})
    told: list[Step] = []
    started: list[tuple[int, int]] = []
    record = session.run(
        this,
        tmp_path / "r",
        log_every=3,
        on_step=told.append,
        on_start=lambda *args: started.append(args),
        workers=1,
    )
    assert record == json.loads((tmp_path / "r" / "run.json").read_text())
    assert started == [(0, 8)]
    assert [s.step for s in told] == [3, 6, 8]
    again = load.load_model(str(tmp_path / "r"), "teacher", num_classes=10, size_px=8)
    found = evaluate(again, digits_test, size_px=8, teacher=teacher)
    assert record["evaluation"] == json.loads(json.dumps(found.__dict__))
    assert (record["teacher"], record["cache"]) == ("t", None)
    assert record["seconds"] > 0


def test_the_average_is_what_the_run_gives(digits_test: Dataset, tmp_path: Path) -> None:
    """And what it is measured by; nothing of it is in the steps."""
    records = {}
    for ema in (0.0, 0.9):
        this = job(digits_test, replace(SPEC, ema_decay=ema), val=digits_test)
        records[ema] = session.run(this, tmp_path / str(ema), workers=1)
        given = load.load_model(str(tmp_path / str(ema)), "teacher", num_classes=10, size_px=8)
        assert records[ema]["ema"] == ema
        assert records[ema]["weights"] == given.content_hash()
        assert records[ema]["evaluation"]["top1"] == evaluate(given, digits_test, size_px=8).top1
        # What is left in memory is the weights as they were trained.
        assert (this.student.content_hash() == given.content_hash()) == (ema == 0)
        records[ema]["live"] = this.student.content_hash()
    assert records[0.0]["live"] == records[0.9]["live"]
    logs = [(tmp_path / str(ema) / "log.jsonl").read_text().splitlines() for ema in records]
    losses = [[json.loads(line).get("loss") for line in log] for log in logs]
    assert losses[0] == losses[1]


def test_seconds_are_of_all_its_lives(digits_test: Dataset, tmp_path: Path) -> None:

    out = tmp_path / "r"
    calls = iter([0, 0, 0])
    with pytest.raises(StopIteration):
        session.run(
            job(digits_test), out, schedule=Schedule(1), signal=lambda: next(calls), workers=1
        )
    (newest,) = run_folder.checkpoints(out)[-1:]
    state = checkpoint.load(newest)
    assert (state["step"], state["best"]) == (3, -1.0)
    checkpoint.save(newest, {**state, "seconds": 1000.0})
    record = session.run(job(digits_test), out, resume=True, workers=1)
    assert 1000 < record["seconds"] < 1100


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
        session.run(
            job(digits_test, targets=targets), tmp_path / "r", schedule=Schedule(2), workers=1
        )
    assert [int(p.stem) for p in run_folder.checkpoints(tmp_path / "r")] == [2, 4]
    for path in run_folder.checkpoints(tmp_path / "r"):
        assert all(w.isfinite().all() for w in checkpoint.load(path)["student"].values())
    assert not (tmp_path / "r" / "run.json").exists()


def test_a_run_that_cannot_begin_leaves_nothing(digits_test: Dataset, tmp_path: Path) -> None:
    for spec, words in (
        (replace(SPEC, batch_size=298), "batch size 298 is more than"),
        (replace(SPEC, view_spec=ViewSpec(8), batch_size=99), "batch size must be even with mixing"),
        (replace(SPEC, warmup=8), "a warm-up of 8 steps does not fit into the run's 8"),
        (replace(SPEC, label_weight=0.5), "a label weight needs labels"),
    ):
        with pytest.raises(UsageError, match=words):
            session.run(job(digits_test, spec), tmp_path / "r")
        assert not (tmp_path / "r").exists()


def test_without_room_for_a_checkpoint_the_one_before_stays(
    digits_test: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = session.run(job(digits_test), tmp_path / "whole", workers=1)
    real = checkpoint.save_tensors

    def full(path: Path, *arguments: Any) -> None:
        if path.name.startswith("0000000006"):
            path.write_bytes(b"x" * 100)
            raise OSError(28, "No space left on device")
        real(path, *arguments)

    out = tmp_path / "r"
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_tensors", full)
        words = "cannot write the checkpoint .*6.safetensors: No space left on device; earlier ones"
        with pytest.raises(StorageError, match=words):
            session.run(job(digits_test), out, schedule=Schedule(2), keep=1, workers=1)
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["0000000004.safetensors"]
    record = session.run(job(digits_test), out, resume=True, workers=1)
    assert record["weights"] == whole["weights"]


def test_nor_is_a_run_lost_that_has_no_room_for_its_weights(
    digits_test: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = session.run(job(digits_test), tmp_path / "whole", workers=1)

    def full(path: Path, *_: object) -> None:
        path.write_bytes(b"x")
        raise OSError("I/O error: No space left on device (os error 28)")

    out = tmp_path / "r"
    with monkeypatch.context() as patch:
        patch.setattr(load, "save_tensors", full)
        words = "cannot write .*No space left on device.*; with room for it, --resume goes on"
        with pytest.raises(StorageError, match=words):
            session.run(job(digits_test), out, workers=1)
    assert not list(out.glob("student*"))
    started: list[int] = []
    record = session.run(
        job(digits_test), out, resume=True, on_start=lambda step, steps: started.append(step)
    )
    assert started == [8]
    assert record["weights"] == whole["weights"]


def test_a_run_can_be_moved(digits_test: Dataset, tmp_path: Path) -> None:
    whole = session.run(job(digits_test), tmp_path / "whole", workers=1)
    calls = iter([0, 0, 0])
    with pytest.raises(StopIteration):
        session.run(
            job(digits_test), tmp_path / "a", schedule=Schedule(1), signal=lambda: next(calls)
        )
    shutil.move(tmp_path / "a", tmp_path / "b")
    record = session.run(job(digits_test), tmp_path / "b", resume=True, workers=1)
    assert record["weights"] == whole["weights"]
