"""What a run writes and when: checkpoints, evaluations, the best weights, an end by signal."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kdcache.batch import Batch, Target
from kdcache.data.beton import Dataset
from kdcache.errors import NonFinite, Stopped, UsageError
from kdcache.evaluation.evaluate import Evaluation
from kdcache.models import load
from kdcache.models.run_json import read_run_json
from kdcache.teacher.targets import LabelTargets
from kdcache.training import checkpoint, loop, run_folder
from kdcache.training.loop import Progress, Stopwatch, set_determinism, train
from kdcache.training.options import RunOptions
from kdcache.training.run import TrainingRun
from kdcache.training.spec import TrainSpec
from kdcache.views.spec import ViewSpec

STUDENT = "python:tests.conftest:convolutional_student"
SPEC = TrainSpec("labels", ViewSpec(8, mixup=0), epochs=1, batch_size=29, deterministic=True)
STEPS = 10
EVALUATION = Evaluation(297, 0.5, None, 1.0, 0.1)
OPTIONS = RunOptions(max_checkpoints=99, workers=1)


def make_run(dataset: Dataset, spec: TrainSpec = SPEC, **fields: Any) -> TrainingRun:
    set_determinism(spec)
    student = load.load_model(STUDENT, "student", num_classes=10, size_px=8)
    return TrainingRun(spec, dataset, student, fields.pop("targets", LabelTargets(10)), **fields)


def saved(out: Path) -> list[int]:
    return [int(path.stem) for path in run_folder.checkpoints(out)]


@pytest.fixture(autouse=True)
def checkpoints_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """A finished run has no checkpoints; these tests look at them."""
    monkeypatch.setattr(run_folder.RunFolder, "_remove_checkpoints", lambda self: None)


@pytest.fixture
def evaluations(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """Replaces the evaluation by one with these top-1 accuracies in turn; the calls' steps."""

    def replace_by(*top1: float, during: Callable[[TrainingRun], None] = lambda run: None) -> Any:
        values, calls = iter(top1), []

        def evaluate(run: TrainingRun, *_: object) -> Evaluation:
            during(run)
            calls.append(run.student.content_hash())
            return replace(EVALUATION, top1=next(values))

        monkeypatch.setattr(loop, "_evaluate", evaluate)
        return calls

    return replace_by


@pytest.mark.parametrize("name", ["checkpoint_every", "checkpoint_minutes", "eval_every"])
@pytest.mark.parametrize("value", [0, -1, float("nan")])
def test_an_interval_is_above_0(name: str, value: float) -> None:
    with pytest.raises(UsageError, match=f"^{name.replace('_', '-')} must be above 0, not {value}"):
        RunOptions(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["max_checkpoints", "log_every"])
def test_none_is_too_few(name: str) -> None:
    with pytest.raises(UsageError, match=f"{name.replace('_', '-')} must be at least 1, not 0"):
        RunOptions(**{name: 0})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({}, [10]),
        ({"checkpoint_every": 3}, [3, 6, 9, 10]),
        ({"checkpoint_every": 3, "max_checkpoints": 2}, [9, 10]),
        ({"checkpoint_every": 5}, [5, 10]),
    ],
)
def test_checkpoints_by_step_and_after_the_last(
    digits_test: Dataset, tmp_path: Path, options: dict[str, int], steps: list[int]
) -> None:
    train(make_run(digits_test), tmp_path / "r", options=replace(OPTIONS, **options))
    assert saved(tmp_path / "r") == steps


def test_checkpoints_by_time(
    digits_test: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted from the last checkpoint, whatever that was for."""
    now_s = 100.0
    monkeypatch.setattr(loop.time, "monotonic", lambda: now_s)

    def report(progress: Progress) -> None:
        nonlocal now_s
        now_s += 25 * (progress.step > 0)

    options = replace(OPTIONS, checkpoint_every=4, checkpoint_minutes=1)
    train(make_run(digits_test), tmp_path / "r", options=options, report=report)
    assert saved(tmp_path / "r") == [3, 4, 7, 8, 10]


@pytest.mark.parametrize("number", [2, 15])
def test_a_signal_saves_a_checkpoint_and_stops(
    digits_test: Dataset, tmp_path: Path, number: int
) -> None:
    calls = iter([0] * 4 + [number])
    with pytest.raises(Stopped, match=f"stopped by signal {number} after step 5; chec") as stopped:
        train(make_run(digits_test), tmp_path / "r", options=OPTIONS, stop=lambda: next(calls))
    assert (stopped.value.signal, stopped.value.step) == (number, 5)
    assert saved(tmp_path / "r") == [5]


def test_a_signal_ends_a_training_in_memory(digits_test: Dataset) -> None:
    with pytest.raises(Stopped, match="after step 1"):
        train(make_run(digits_test), options=OPTIONS, stop=lambda: 15)


def test_no_checkpoint_of_bad_weights(digits_test: Dataset, tmp_path: Path) -> None:
    run = make_run(digits_test)

    def report(progress: Progress) -> None:
        if progress.step == 4:
            with torch.no_grad():
                next(run.student.parameters())[0, 0, 0, 0] = torch.inf

    options = replace(OPTIONS, checkpoint_every=2)
    with pytest.raises(NonFinite, match="step 4 made a weight NaN or infinite: lower --lr"):
        train(run, tmp_path / "r", options=options, report=report)
    assert saved(tmp_path / "r") == [2]


def test_nor_after_a_bad_loss_that_was_not_logged_yet(digits_test: Dataset, tmp_path: Path) -> None:
    calls = iter(range(1, 99))

    def targets(batch: Batch) -> Target:
        logits_BC = torch.zeros(len(batch), 10)
        logits_BC[0, 0] = torch.nan if next(calls) == 3 else 0
        return Target(logits_BC, None, None, 10)

    options = replace(OPTIONS, checkpoint_every=4)
    with pytest.raises(NonFinite, match="the loss is not finite at step 3"):
        train(make_run(digits_test, targets=targets), tmp_path / "r", options=options)
    assert not (tmp_path / "r").exists()


def test_the_best_weights_are_saved_and_equals_do_not_replace_them(
    digits_test: Dataset, tmp_path: Path, evaluations: Any
) -> None:
    best: list[float] = []

    def report(progress: Progress) -> None:
        if progress.step in (3, 5, 7, 9):
            evaluation = read_run_json(tmp_path / "r" / "best")["evaluation"]
            best.append(evaluation["top1"])

    hashes = evaluations(0.5, 0.7, 0.7, 0.6, 0.8)
    run = make_run(digits_test, val=digits_test)
    options = replace(OPTIONS, eval_every=2)
    record = train(run, tmp_path / "r", options=options, report=report)
    assert best == [0.5, 0.7, 0.7, 0.7]
    last = read_run_json(tmp_path / "r" / "best")
    assert (last["evaluation"]["top1"], last["weights"]) == (0.8, hashes[-1])
    assert record["evaluation"]["top1"] == 0.8
    assert saved(tmp_path / "r") == [2, 4, 6, 8, 10]


def test_an_evaluation_is_of_the_average_and_leaves_the_training_as_it_was(
    digits_test: Dataset, tmp_path: Path, evaluations: Any
) -> None:
    spec, trained = replace(SPEC, ema_decay=0.5), {}
    for evaluated in (False, True):
        run = make_run(digits_test, spec, val=digits_test if evaluated else None)
        hashes = evaluations(0.5, 0.6)
        live: list[str] = []
        train(
            run,
            tmp_path / str(evaluated),
            options=replace(OPTIONS, eval_every=5),
            report=lambda p, run=run, live=live: live.append(run.student.content_hash()),  # type: ignore[misc]
        )
        trained[evaluated] = live
    assert trained[False] == trained[True]
    assert not {*hashes} & {*live}
    assert read_run_json(tmp_path / "True" / "best")["weights"] == hashes[-1]
    assert read_run_json(tmp_path / "True")["weights"] == hashes[-1]


@pytest.mark.parametrize(("step", "evaluated"), [(3, [5, 10]), (5, [5, 10]), (6, [10])])
def test_a_resumed_run_makes_up_for_the_evaluation_of_its_checkpoint(
    digits_test: Dataset, tmp_path: Path, evaluations: Any, step: int, evaluated: list[int]
) -> None:
    calls = iter([0] * (step - 1) + [15])
    run = make_run(digits_test, val=digits_test)
    options = replace(OPTIONS, eval_every=5)
    evaluations(*[0.5] * 9)
    with pytest.raises(Stopped):
        train(run, tmp_path / "r", options=options, stop=lambda: next(calls))
    steps: list[int] = []
    at = 0

    def report(progress: Progress) -> None:
        nonlocal at
        at = progress.step

    evaluations(*[0.5] * 9, during=lambda run: steps.append(at))
    run = make_run(digits_test, val=digits_test)
    train(run, tmp_path / "r", options=replace(options, resume=True), report=report)
    assert steps == evaluated


@pytest.mark.parametrize("every", [5, 6])  # the last step is due, and is not
def test_the_last_step_is_evaluated_once_and_counts_for_the_best(
    digits_test: Dataset, tmp_path: Path, evaluations: Any, every: int
) -> None:
    hashes = evaluations(0.5, 0.7, 0.9)
    run = make_run(digits_test, val=digits_test)
    record = train(run, tmp_path / "r", options=replace(OPTIONS, eval_every=every))
    assert len(hashes) == 2
    assert record["evaluation"]["top1"] == 0.7
    assert read_run_json(tmp_path / "r" / "best")["evaluation"]["top1"] == 0.7


def test_without_eval_every_only_the_end_is_evaluated(
    digits_test: Dataset, tmp_path: Path, evaluations: Any
) -> None:
    hashes = evaluations(0.5)
    record = train(make_run(digits_test, val=digits_test), tmp_path / "r", options=OPTIONS)
    assert hashes == [record["weights"]]
    assert not (tmp_path / "r" / "best").exists()
    lines = [json.loads(x) for x in (tmp_path / "r" / "log.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines if "evaluation" in x] == [10]


class Clock:
    """time.perf_counter, by hand."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    by_hand = Clock()
    monkeypatch.setattr(loop.time, "perf_counter", by_hand)
    return by_hand  # type: ignore[return-value]


def test_a_stopwatch_leaves_pauses_out(clock: Clock) -> None:
    stopwatch = Stopwatch(7)
    clock.now_s += 2
    with stopwatch.paused():
        clock.now_s += 50
    clock.now_s += 1
    assert stopwatch.seconds == 10


def test_seconds_and_rates_leave_evaluations_out(
    digits_test: Dataset, tmp_path: Path, evaluations: Any, clock: Clock
) -> None:
    """Seconds are of all resumptions of a run together."""

    def evaluated(run: TrainingRun) -> None:
        clock.now_s += 50

    def report(progress: Progress) -> None:
        clock.now_s += 1 * (progress.step < STEPS)
        if progress.metrics and progress.step < STEPS:
            rates.append(progress.metrics.rate)

    evaluations(*[0.5] * 9, during=evaluated)
    rates: list[float] = []
    options = replace(OPTIONS, eval_every=2, log_every=2)
    calls = iter([0] * 4 + [15])
    run = make_run(digits_test, val=digits_test)
    with pytest.raises(Stopped):
        train(run, tmp_path / "r", options=options, stop=lambda: next(calls), report=report)
    assert checkpoint.load(run_folder.checkpoints(tmp_path / "r")[-1])["seconds"] == 6
    run = make_run(digits_test, val=digits_test)
    record = train(run, tmp_path / "r", options=replace(options, resume=True), report=report)
    assert record["seconds"] == 11
    assert rates[1:2] == [pytest.approx(2 * 29 / 2)]
