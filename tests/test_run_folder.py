"""A run's folder: what it says, what it refuses, what it leaves when things go wrong."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import kdcache
from kdcache.data.beton import Dataset
from kdcache.errors import CheckpointCorrupt, MissingDependency, StorageError, UsageError
from kdcache.evaluation.evaluate import evaluate
from kdcache.models import load
from kdcache.models.classifier import Classifier
from kdcache.spec import differences
from kdcache.training import checkpoint, run_folder
from kdcache.training.identity import RunIdentity
from kdcache.training.loop import set_determinism
from kdcache.training.run_folder import RunFolder, make_run_json
from kdcache.training.spec import TrainSpec
from kdcache.views.spec import ViewSpec

STUDENT = "python:tests.conftest:convolutional_student"
SPEC = TrainSpec("labels", ViewSpec(8), epochs=1, batch_size=8)
IDENTITY = RunIdentity(SPEC, "s", "w" * 16, "d" * 16)


def student() -> Classifier:
    set_determinism(SPEC)
    return load.load_model(STUDENT, "student", num_classes=10, size_px=8)


def state(step: int) -> dict[str, Any]:
    return {"step": step, "x": torch.full((3,), float(step))}


def names(folder: Path) -> set[str]:
    return {str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()}


# --- what it says ----------------------------------------------------------------------------


@pytest.fixture
def finished(digits_test: Dataset, tmp_path: Path) -> tuple[Classifier, Path]:
    made, out = student(), tmp_path / "runs" / "a"
    result = evaluate(made, digits_test, size_px=8)
    with RunFolder(out, RunIdentity.of(SPEC, digits_test, made)) as run:
        run.log({"step": 1})
        run.save(state(1))
        record = make_run_json(SPEC, digits_test, made, result, teacher="someone", seconds=1.5)
        run.finish(record, made)
    return made, out


def test_a_run_says_how_it_was_made(
    finished: tuple[Classifier, Path], digits_test: Dataset
) -> None:
    made, folder = finished
    record = json.loads((folder / "run.json").read_text())
    assert record["spec"] == SPEC.to_json()
    assert record["student"] == STUDENT
    assert record["num_classes"] == 10
    assert record["class_names"] == list(digits_test.class_names)
    assert (record["data"], record["num_samples"]) == (digits_test.content_hash, 297)
    assert record["weights"] == made.content_hash()
    assert (record["teacher"], record["seconds"]) == ("someone", 1.5)
    assert (record["kdcache"], record["torch"]) == (kdcache.__version__, torch.__version__)
    assert record["evaluation"]["num_samples"] == 297
    assert (folder / "log.jsonl").read_text() == '{"step": 1}\n'
    assert names(folder) == {"run.json", "log.jsonl", "spec.json", "student.safetensors"}
    assert not (folder / "checkpoints").exists()


def test_a_spec_says_all_that_decides_a_run(digits_test: Dataset, tmp_path: Path) -> None:
    made = student()
    this = RunIdentity.of(SPEC, digits_test, made, cache="t" * 16, teacher="u" * 16)
    with RunFolder(tmp_path / "r", this) as run:
        run.log({"step": 1})
    said = json.loads((tmp_path / "r" / "spec.json").read_text())
    assert RunIdentity.from_json(said) == this
    assert said == {
        "spec": SPEC.to_json(),
        "student": STUDENT,
        "initial_weights": made.content_hash(),
        "data": digits_test.content_hash,
        "cache": "t" * 16,
        "teacher": "u" * 16,
        "loss": None,
    }


def test_a_runs_weights_come_back_as_they_were(finished: tuple[Classifier, Path]) -> None:
    made, folder = finished
    for role, name in (("teacher", str(folder)), ("student", STUDENT)):
        again = load.load_model(f"{folder}@{STUDENT}", role, num_classes=10, size_px=8)  # type: ignore[arg-type]
        assert again.content_hash() == made.content_hash()
        assert again.name == name


def test_weights_that_share_memory_are_saved(digits_test: Dataset, tmp_path: Path) -> None:
    """Safetensors refuses tensors that alias each other; tied weights are common."""
    layer = nn.Linear(192, 192)
    network = nn.Sequential(nn.Flatten(), layer, layer, nn.Linear(192, 10))
    tied = Classifier(network, "tied", (0.5,) * 3, (0.5,) * 3)
    with RunFolder(tmp_path / "r", IDENTITY) as run:
        run.finish(make_run_json(SPEC, digits_test, tied, None), tied)
    assert (tmp_path / "r" / "run.json").exists()


def test_what_a_run_leaves_has_the_rights_of_any_new_file(
    finished: tuple[Classifier, Path], tmp_path: Path
) -> None:
    checkpoint.save(tmp_path / "c", state(1))
    (tmp_path / "new").touch()
    for file in (tmp_path / "c", *finished[1].iterdir()):
        assert stat.S_IMODE(file.stat().st_mode) == stat.S_IMODE((tmp_path / "new").stat().st_mode)


def test_the_best_weights_are_a_run_of_their_own(digits_test: Dataset, tmp_path: Path) -> None:
    made = student()
    with RunFolder(tmp_path / "r", IDENTITY) as run:
        run.log({"step": 1})
        for _ in range(2):
            run.save_best(make_run_json(SPEC, digits_test, made, None), made)
    name = f"{tmp_path / 'r' / 'best'}@{STUDENT}"
    best = load.load_model(name, "teacher", num_classes=10, size_px=8)
    assert best.content_hash() == made.content_hash()
    assert names(tmp_path / "r" / "best") == {"run.json", "student.safetensors"}
    with pytest.raises(UsageError, match=r"r is not a finished run: it has no run\.json"):
        load.load_model(str(tmp_path / "r"), "teacher", num_classes=10, size_px=8)


def test_a_log_for_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for steps in ((1, 2), (3,)):
        with RunFolder(tmp_path / "r", IDENTITY, resume=True, tensorboard=True) as run:
            for step in steps:
                run.log({"step": step, "steps": 3, "loss": 1 / step, "agreement": 0.5})
            run.save(state(step))
            run.log({"step": step, "evaluation": {"top1": 0.25, "top5": None}})
    events = EventAccumulator(str(tmp_path / "r" / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"loss", "agreement", "top1"}
    losses = [(e.step, e.value) for e in events.Scalars("loss")]
    assert losses == [(1, 1), (2, 0.5), (3, pytest.approx(1 / 3))]
    assert [e.step for e in events.Scalars("top1")] == [2, 3]


def test_tensorboard_is_an_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    with pytest.raises(MissingDependency, match=r"pip install 'kdcache\[tensorboard\]'"):
        RunFolder(tmp_path / "r", IDENTITY, tensorboard=True)
    assert not (tmp_path / "r").exists()


# --- checkpoints -----------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "saved"), [(1, [40]), (2, [30, 40]), (9, [9, 10, 30, 40])])
def test_the_last_checkpoints_are_kept(tmp_path: Path, count: int, saved: list[int]) -> None:
    with RunFolder(tmp_path / "r", IDENTITY, max_checkpoints=count) as run:
        for step in (9, 10, 30, 40):
            run.save(state(step))
    assert [int(p.stem) for p in run_folder.checkpoints(tmp_path / "r")] == saved
    with RunFolder(tmp_path / "r", IDENTITY, resume=True) as run:
        assert run.resumed is not None
        assert run.resumed["step"] == 40
        assert run.resumed["x"].tolist() == [40] * 3


def test_the_log_is_cut_to_what_came_before_the_checkpoint(tmp_path: Path) -> None:
    lines = [
        {"step": 5, "loss": 1},
        {"step": 5, "evaluation": {}},
        {"step": 10, "loss": 2},
        {"step": 10, "evaluation": {}},
        {"step": 15, "loss": 3},
    ]
    with RunFolder(tmp_path / "r", IDENTITY) as run:
        for line in lines[:3]:
            run.log(line)
        run.save(state(10))
        for line in lines[3:]:
            run.log(line)
    log = tmp_path / "r" / "log.jsonl"
    for end in ("", '{"step": 10, "lo', "\n\x00\x00\n", "[1]\n", '{"step": "3"}\n'):
        log.write_text(log.read_text() + end)
        with RunFolder(tmp_path / "r", IDENTITY, resume=True):
            pass
        assert [json.loads(x) for x in log.read_text().splitlines()] == lines[:3]


def test_what_a_kill_left_is_swept_away(digits_test: Dataset, tmp_path: Path) -> None:
    made = student()
    with RunFolder(tmp_path / "r", IDENTITY) as run:
        run.save(state(1))
        run.save_best(make_run_json(SPEC, digits_test, made, None), made)
    before = names(tmp_path / "r")
    for name in (
        "checkpoints/0000000002.safetensors.partial",
        "checkpoints/.tmpx",
        "best/.tmpx",
        "spec.json.partial",
    ):
        (tmp_path / "r" / name).write_text("x")
    with RunFolder(tmp_path / "r", IDENTITY, resume=True) as run:
        assert run.resumed is not None
    assert names(tmp_path / "r") == before


def test_checkpoints_that_outlived_their_run_are_removed(
    finished: tuple[Classifier, Path], digits_test: Dataset
) -> None:
    """A kill came after run.json."""
    made, folder = finished
    before = names(folder)
    checkpoint.save(run_folder.checkpoint_path(folder, 1), state(1))
    with RunFolder(folder, RunIdentity.of(SPEC, digits_test, made), resume=True) as run:
        assert run.finished
    assert names(folder) == before


# --- refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch])
def test_a_run_refuses_a_path_that_exists(tmp_path: Path, make: Any) -> None:
    make(tmp_path / "r")
    with pytest.raises(UsageError, match=r"r exists; choose another --out, or remove it$"):
        RunFolder(tmp_path / "r", IDENTITY)


def test_a_run_that_was_begun_is_gone_on_with_only_if_asked_to(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "r", IDENTITY) as run:
        run.log({"step": 1})
    words = r"r exists; .*, or remove it, or give --resume to resume the run in it$"
    with pytest.raises(UsageError, match=words):
        RunFolder(tmp_path / "r", IDENTITY)


@pytest.mark.parametrize("left", [None, "spec.json.partial"])
def test_resume_begins_where_nothing_was_begun(tmp_path: Path, left: str | None) -> None:
    if left:
        (tmp_path / "r").mkdir()
        (tmp_path / "r" / left).write_text('{"lr"')
    with RunFolder(tmp_path / "r", IDENTITY, resume=True) as run:
        assert run.resumed is None
        run.log({"step": 1})
    assert names(tmp_path / "r") == {"spec.json", "log.jsonl"}


def test_resume_does_not_touch_what_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "thesis").write_text("mine")
    with pytest.raises(UsageError, match=r"holds no run to resume \(no spec.json\)"):
        RunFolder(tmp_path, IDENTITY, resume=True)
    with pytest.raises(UsageError, match="thesis exists; choose another --out, or remove it"):
        RunFolder(tmp_path / "thesis", IDENTITY, resume=True)
    assert names(tmp_path) == {"thesis"}


@pytest.mark.parametrize(
    ("spec", "change", "words"),
    [
        (
            {"lr": 0.2},
            {},
            r"different run \(lr: 0.2 here, 0.1 there\): give the options that it was",
        ),
        ({"lr": 0.1000000001}, {}, r"different run \(lr: 0.1000000001 here, 0.1 there\)"),
        ({}, {"cache": "abc"}, r"\(cache: abc here, None there\)"),
        ({"view_spec": ViewSpec(8, seed=1)}, {}, r"\(seed: 1 here, 0 there\)"),
        ({"lr": 1.0}, {"student": "t"}, r"\(lr: 1 here, 0.1 there; student: t here, s there\)"),
    ],
)
def test_another_run_is_refused_by_its_differences(
    tmp_path: Path, spec: dict[str, Any], change: dict[str, Any], words: str
) -> None:
    this = replace(IDENTITY, spec=replace(SPEC, lr=0.1))
    other = replace(this, spec=replace(this.spec, **spec), **change)
    with RunFolder(tmp_path / "r", this) as run:
        run.save(state(3))
    with pytest.raises(UsageError, match=words):
        RunFolder(tmp_path / "r", other, resume=True)
    # Its checkpoint in this run's folder is found too.
    with RunFolder(tmp_path / "s", other) as run:
        run.log({"step": 1})
    os.renames(tmp_path / "r" / "checkpoints", tmp_path / "s" / "checkpoints")
    at = words[words.index("(") - 1 : words.index(")") + 1]
    with pytest.raises(
        UsageError, match=rf"0000000003.* is a checkpoint of a different run {at}: rem"
    ):
        RunFolder(tmp_path / "s", other, resume=True)


def test_each_thing_that_decides_a_run_is_part_of_it(digits_test: Dataset, digits: Dataset) -> None:
    made = student()
    this = RunIdentity.of(SPEC, digits_test, made, cache="t", teacher="u")
    other = student()
    with torch.no_grad():
        next(other.parameters())[0] += 1
    for changed in (
        RunIdentity.of(replace(SPEC, seed=1), digits_test, made, cache="t", teacher="u"),
        RunIdentity.of(SPEC, digits, made, cache="t", teacher="u"),
        RunIdentity.of(SPEC, digits_test, other, cache="t", teacher="u"),
        RunIdentity.of(SPEC, digits_test, made, cache="v", teacher="u"),
        RunIdentity.of(SPEC, digits_test, made, cache="t", teacher="v"),
    ):
        assert len(differences(this, changed)) == 1
    assert RunIdentity.of(SPEC, digits_test, student(), cache="t", teacher="u") == this


@pytest.mark.parametrize("text", ["", "{", "\x00", "[]", "null"])
def test_a_damaged_spec(tmp_path: Path, text: str) -> None:
    with RunFolder(tmp_path / "r", IDENTITY) as run:
        run.log({"step": 1})
    (tmp_path / "r" / "spec.json").write_text(text)
    with pytest.raises(UsageError, match=r"spec.json is damaged: .*; choose another --out"):
        RunFolder(tmp_path / "r", IDENTITY, resume=True)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _older(path: Path) -> None:
    path.write_bytes((path.parent / "0000000005.safetensors").read_bytes())


@pytest.mark.parametrize("damage", [_truncate, _flip, _empty, _directory, _older])
def test_a_checkpoint_that_is_not_what_was_written(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    with RunFolder(tmp_path / "r", IDENTITY) as run:
        run.save(state(5))
        run.save(state(6))
    newest = run_folder.checkpoints(tmp_path / "r")[-1]
    damage(newest)
    words = "0000000006.safetensors.* remove it; --resume then resumes from the checkpoint before"
    with pytest.raises(CheckpointCorrupt, match=words):
        RunFolder(tmp_path / "r", IDENTITY, resume=True)
    newest.rmdir() if newest.is_dir() else newest.unlink()
    with RunFolder(tmp_path / "r", IDENTITY, resume=True) as run:
        assert run.resumed is not None
        assert run.resumed["step"] == 5


# --- what is left behind ---------------------------------------------------------------------


def test_a_run_below_a_file_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"cannot write .*Not a directory"):
        RunFolder(tmp_path / "file" / "r", IDENTITY)


@pytest.mark.parametrize("logged", [False, True])
def test_a_run_that_fails_before_its_first_line_leaves_nothing(
    tmp_path: Path, logged: bool
) -> None:
    def fail(run: RunFolder) -> None:
        if logged:
            run.log({"step": 1})
        raise KeyError

    with pytest.raises(KeyError), RunFolder(tmp_path / "r", IDENTITY) as run:
        fail(run)
    assert (tmp_path / "r").exists() == logged


def test_a_run_that_goes_on_and_fails_leaves_what_there_was(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "r", IDENTITY) as run:
        run.log({"step": 1})
    with pytest.raises(KeyError), RunFolder(tmp_path / "r", IDENTITY, resume=True):
        raise KeyError
    assert (tmp_path / "r" / "spec.json").exists()


def test_a_log_that_cannot_be_written_is_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Closing a file tries once more to write what did not fit."""
    with RunFolder(tmp_path / "r", IDENTITY) as run:
        run.save(state(1))
    (tmp_path / "r" / "log.jsonl").unlink()
    (tmp_path / "r" / "log.jsonl").symlink_to("/dev/full")
    monkeypatch.setattr(RunFolder, "_cut_log", lambda self, step, num_lines: None)
    with pytest.raises(StorageError, match=r"cannot write .*log.jsonl: No space left on device"):
        with RunFolder(tmp_path / "r", IDENTITY, resume=True) as run:
            run.log({"step": 2})


@pytest.mark.parametrize(("kept", "found"), [([0, 2], 2), ([0], 1), ([0, 1, 1, 2], 4)])
def test_lost_lines_of_a_log_are_noticed(tmp_path: Path, kept: list[int], found: int) -> None:
    out = tmp_path / "r"
    with RunFolder(out, IDENTITY) as run:
        for step in (1, 2, 3):
            run.log({"step": step})
        run.save(state(3))
        run.log({"step": 4})  # after the checkpoint: not needed
    lines = (out / "log.jsonl").read_text().splitlines(keepends=True)
    (out / "log.jsonl").write_text("".join(lines[i] for i in kept))
    words = rf"log\.jsonl has lost lines or got others: expected 3, found {found}; restore it"
    with pytest.raises(UsageError, match=words):
        RunFolder(out, IDENTITY, resume=True)
    (out / "log.jsonl").unlink()
    with RunFolder(out, IDENTITY, resume=True) as run:
        assert run.resumed


def test_lost_lines_of_a_finished_run_are_noticed(finished: tuple[Classifier, Path]) -> None:
    _, out = finished
    assert run_folder.read_log(out) == [{"step": 1}]
    (out / "log.jsonl").write_text("")
    with pytest.raises(UsageError, match="expected 1, found 0"):
        run_folder.read_log(out)


@pytest.mark.parametrize("at_once", [False, True])
def test_two_do_not_train_in_one_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: bool
) -> None:
    out = tmp_path / "r"
    with RunFolder(out, IDENTITY) as first:
        if at_once:  # the second one, too, found nothing there
            monkeypatch.setattr(Path, "iterdir", lambda path: iter(()))
        words = rf"another process trains in .*r \(process {os.getpid()} on .*\): wait for it, or"
        with pytest.raises(UsageError, match=words):
            RunFolder(out, IDENTITY, resume=True)
        monkeypatch.undo()
        first.log({"step": 1})
    with RunFolder(out, IDENTITY, resume=True):
        assert names(out) == {"spec.json", "log.jsonl", ".lock"}
    assert names(out) == {"spec.json", "log.jsonl"}
