"""What happens after a step: checkpoints when they are due, the best weights, an end by signal."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kdcache.errors import NonFinite, UsageError
from kdcache.evaluation.evaluate import Evaluation
from kdcache.models import load
from kdcache.training import keeper as keeping
from kdcache.training import run_folder
from kdcache.training.distributed import SINGLE_PROCESS
from kdcache.training.keeper import Keeper, Schedule, Stopped
from kdcache.training.loop import State, set_determinism
from kdcache.training.run_folder import RunFolder
from kdcache.training.spec import TrainSpec
from kdcache.views.spec import ViewSpec

SPEC = TrainSpec("labels", ViewSpec(8), epochs=1, batch_size=8, ema_decay=0.5)
FOUND = Evaluation(10, 0.5, None, 1.0, 0.1, None, None, None, None, None, None)
RECORD = {"student": "s", "classes": 10, "weights": "w", "view": SPEC.view_spec.to_json()}


class Clock:
    """time.monotonic, by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 100.0
        monkeypatch.setattr(keeping.time, "monotonic", lambda: self.now_s)


@pytest.fixture
def state() -> State:
    set_determinism(SPEC)
    name = "python:tests.conftest:convolutional_student"
    return State(SPEC, load.load_model(name, "student", num_classes=10, size_px=8))


@pytest.fixture
def run(tmp_path: Path) -> Any:
    with RunFolder(tmp_path / "r", {}, keep=99) as run:
        yield run


def steps(keeper: Keeper, state: State, first: int, last: int) -> list[int]:
    """Calls the keeper after these steps; which checkpoints there then are."""
    for state.step in range(first, last + 1):
        keeper(state)
    assert keeper.run is not None
    return [int(p.stem) for p in run_folder.checkpoints(keeper.run.folder)]


@pytest.mark.parametrize("name", ["checkpoint_every", "checkpoint_minutes", "eval_every"])
@pytest.mark.parametrize("value", [0, -1, float("nan")])
def test_a_schedule_says_what_is_wrong(name: str, value: float) -> None:
    words = f"^{name.replace('_', '-')} must be above 0, not {value}$"
    with pytest.raises(UsageError, match=words):
        Schedule(**{name: value})  # type: ignore[arg-type]


def test_the_last_step_is_always_kept(run: RunFolder, state: State) -> None:
    assert steps(Keeper(run, SINGLE_PROCESS, Schedule(), 7), state, 1, 7) == [7]


def test_checkpoints_by_step(run: RunFolder, state: State) -> None:
    assert steps(Keeper(run, SINGLE_PROCESS, Schedule(3), 10), state, 1, 10) == [3, 6, 9, 10]


def test_checkpoints_by_time(run: RunFolder, state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted from the last one, whatever it was for."""
    clock = Clock(monkeypatch)
    keeper = Keeper(run, SINGLE_PROCESS, Schedule(4, checkpoint_minutes=1), 99)
    for state.step in range(1, 9):
        clock.now_s += 25
        keeper(state)
    kept = [int(p.stem) for p in run_folder.checkpoints(run.folder)]
    assert kept == [3, 4, 7, 8]


@pytest.mark.parametrize("number", [2, 15])
def test_a_signal_keeps_this_step_and_stops(run: RunFolder, state: State, number: int) -> None:
    came = 0
    keeper = Keeper(run, SINGLE_PROCESS, Schedule(), 10, signal=lambda: came)
    assert steps(keeper, state, 1, 4) == []
    came = number
    with pytest.raises(Stopped, match=f"stopped by signal {number} after step 5") as end:
        steps(keeper, state, 5, 6)
    assert (end.value.signal, end.value.step) == (number, 5)
    assert [int(p.stem) for p in run_folder.checkpoints(run.folder)] == [5]


def test_bad_weights_are_not_kept(run: RunFolder, state: State) -> None:
    keeper = Keeper(run, SINGLE_PROCESS, Schedule(2), 10)
    assert steps(keeper, state, 1, 3) == [2]
    with torch.no_grad():
        next(state.student.parameters())[0, 0, 0, 0] = torch.inf
    with pytest.raises(NonFinite, match="step 4 made a weight NaN or infinite: lower --lr"):
        steps(keeper, state, 4, 4)
    assert [int(p.stem) for p in run_folder.checkpoints(run.folder)] == [2]


def test_nor_is_a_bad_loss_before_it_was_logged(run: RunFolder, state: State) -> None:
    keeper = Keeper(run, SINGLE_PROCESS, Schedule(2), 10)
    target = torch.zeros(4, 10)
    for step, loss in ((1, 1.0), (3, torch.nan), (4, 1.0)):
        state.meter.add(step, torch.tensor(loss), target, _dense(target))
    with pytest.raises(NonFinite, match="the loss is not finite at step 3"):
        steps(keeper, state, 4, 4)
    assert run_folder.checkpoints(run.folder) == []


def _dense(logits_BC: torch.Tensor) -> Any:
    from kdcache.batch import Target

    return Target(logits_BC, None, None, logits_BC.shape[1])


def test_the_best_weights_are_kept_and_equals_do_not_replace_them(
    run: RunFolder, state: State
) -> None:
    top1 = iter([0.5, 0.7, 0.7, 0.6, 0.8])
    keeper = Keeper(
        run,
        SINGLE_PROCESS,
        Schedule(eval_every=2),
        99,
        evaluate=lambda: replace(FOUND, top1=next(top1)),
        record=lambda found: {**RECORD, "top1": found.top1, "step": state.step},
    )
    best = []
    for state.step in range(1, 11):
        keeper(state)
        if state.step % 2 == 0:
            record = load.read_run_json(run.folder / "best")
            best.append((record["step"], record["top1"]))
    assert best == [(2, 0.5), (4, 0.7), (4, 0.7), (4, 0.7), (10, 0.8)]
    assert keeper.best == 0.8
    assert steps(keeper, state, 11, 11) == [2, 4, 6, 8, 10]


def test_what_is_evaluated_and_kept_is_the_average(run: RunFolder, state: State) -> None:
    own = [w.detach().clone() for w in state.student.parameters()]
    with torch.no_grad():
        for weight in state.student.parameters():
            weight += 1
    state.ema.update()
    seen: list[Any] = []

    def evaluate() -> Evaluation:
        seen.append(state.student.content_hash())
        return FOUND

    state.step = 1
    live = state.student.content_hash()
    keeper = Keeper(
        run,
        SINGLE_PROCESS,
        Schedule(eval_every=1),
        9,
        evaluate=evaluate,
        record=lambda found: {**RECORD, "weights": state.student.content_hash()},
    )
    keeper(state)
    assert state.student.content_hash() == live
    assert state.student.training
    with state.ema.applied():
        assert seen == [state.student.content_hash()]
    assert load.read_run_json(run.folder / "best")["weights"] == seen[0]
    assert not all(map(torch.equal, own, state.student.parameters()))


def test_a_run_that_goes_on_makes_up_for_the_evaluation_of_its_checkpoint(
    run: RunFolder, state: State
) -> None:
    asked: list[int] = []

    def evaluate() -> Evaluation:
        asked.append(state.step)
        return FOUND

    keeper = Keeper(
        run,
        SINGLE_PROCESS,
        Schedule(eval_every=2),
        9,
        evaluate=evaluate,
        record=lambda found: RECORD,
    )
    for state.step in (3, 4):
        keeper.go_on(state)
    assert asked == [4]
    assert run_folder.checkpoints(run.folder) == []


def test_the_last_step_is_evaluated_once_and_counts_for_the_best(
    run: RunFolder, state: State
) -> None:
    for every in (2, 3):  # the last step is due, and is not
        top1 = iter([0.5, 0.7])
        keeper = Keeper(
            run,
            SINGLE_PROCESS,
            Schedule(eval_every=every),
            4,
            evaluate=lambda found=top1: replace(FOUND, top1=next(found)),
            record=lambda found: {**RECORD, "top1": found.top1},
        )
        steps(keeper, state, 1, 4)
        assert keeper.found is not None
        assert keeper.found.top1 == 0.7
        assert next(top1, None) is None
        assert load.read_run_json(run.folder / "best")["top1"] == 0.7


def test_without_eval_every_only_the_end_is_evaluated(run: RunFolder, state: State) -> None:
    keeper = Keeper(run, SINGLE_PROCESS, Schedule(), 4, evaluate=lambda: FOUND)
    steps(keeper, state, 1, 3)
    assert keeper.found is None
    steps(keeper, state, 4, 4)
    assert keeper.found == FOUND
    assert not (run.folder / "best").exists()


def test_seconds_leave_evaluations_out(
    run: RunFolder, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0

    def evaluate() -> Evaluation:
        nonlocal now
        now += 50
        return FOUND

    monkeypatch.setattr("kdcache.keeper.time.perf_counter", lambda: now)
    keeper = Keeper(run, SINGLE_PROCESS, Schedule(), 1, evaluate=evaluate, seconds=7)
    now += 3
    steps(keeper, state, 1, 1)
    assert keeper.seconds == 10
