"""What happens after a step beside training: checkpoints, evaluations, and an orderly end.

In: a `Run` in the process that writes, a `State` after each step. Out: what the run's folder holds.
What stays true: all processes act at the same step; a checkpoint is of finite weights only.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from kdcache.errors import UsageError
from kdcache.evaluation.evaluate import Evaluation
from kdcache.training.distributed import World
from kdcache.training.loop import State
from kdcache.training.run_folder import RunFolder

NOTHING, SAVE = 0, 1  # what a process asks of all; from 2 on it is the number of a signal


@dataclass(frozen=True)
class Schedule:
    """When to do what; None: never.

    checkpoint_every, checkpoint_minutes   a checkpoint: after so many steps, and so much time
    eval_every                             after so many steps, and the last, a checkpoint and an
                                           evaluation, which also keeps the best weights; None:
                                           an evaluation after the last step only
    """

    checkpoint_every: int | None = None
    checkpoint_minutes: float | None = None
    eval_every: int | None = None

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value is not None and not value > 0:
                raise UsageError(f"{name.replace('_', '-')} must be above 0, not {value}")


class Stopped(Exception):
    """The run ended before its last step because a signal came; its checkpoint is kept."""

    def __init__(self, signal: int, step: int) -> None:
        super().__init__(f"stopped by signal {signal} after step {step}")
        self.signal = signal
        self.step = step


class Keeper:
    """To be called after each step, in every process, with the state; `go_on` with the first one
    of a run that goes on.

    run       the folder, in the first process; None in the others
    evaluate  measures the student as it is now, in all processes together
    record    what run.json says of the student with such an evaluation
    signal    the number of the signal that came, or 0
    best      the highest top-1 so far
    seconds   how long the run took so far, evaluations left out; read it at any time
    found     the last evaluation

    Raises Stopped when a signal came to any process, NonFinite before a bad checkpoint is kept,
    StorageError when one cannot be.
    """

    def __init__(
        self,
        run: RunFolder | None,
        world: World,
        schedule: Schedule,
        steps: int,
        *,
        evaluate: Callable[[], Evaluation] | None = None,
        record: Callable[[Evaluation], dict[str, Any]] = asdict,
        signal: Callable[[], int] = lambda: 0,
        best: float = -1.0,
        seconds: float = 0.0,
    ) -> None:
        self.run, self.world, self.schedule, self.steps = run, world, schedule, steps
        self.evaluate, self.record, self.signal, self.best = evaluate, record, signal, best
        self.found: Evaluation | None = None
        self._begun = time.perf_counter() - seconds
        self._saved_at = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._begun

    def __call__(self, state: State) -> None:
        wish = self.world.largest_soon(max(self.signal(), SAVE * self._time_is_up()))
        last = state.step == self.steps
        measures = self._measures(state)
        if wish or last or measures or _due(state.step, self.schedule.checkpoint_every):
            self._save(state)
        if wish > SAVE and not last:
            self.world.wait()  # one that ended earlier would have torchrun end the one that writes
            raise Stopped(wish, state.step)
        if measures:
            self._measure(state)

    def go_on(self, state: State) -> None:
        """To be called with the state of a checkpoint, before its next step: it was kept before
        the evaluation, so that one that takes long loses nothing."""
        if self._measures(state):
            self._measure(state)

    def _measures(self, state: State) -> bool:
        last = state.step == self.steps
        return self.evaluate is not None and (last or _due(state.step, self.schedule.eval_every))

    def _time_is_up(self) -> bool:
        minutes = self.schedule.checkpoint_minutes
        return minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes

    def _save(self, state: State) -> None:
        state.require_finite(self.world)
        kept = state.state_dict(self.world)
        if self.run:
            self.run.save({**kept, "best": self.best, "seconds": self.seconds})
        self._saved_at = time.monotonic()

    def _measure(self, state: State) -> None:
        assert self.evaluate is not None
        state.require_finite(self.world)
        begun = time.perf_counter()
        with state.ema.applied():
            self.found = found = self.evaluate()
            better = found.top1 > self.best
            self.best = max(self.best, found.top1)
            self._begun += time.perf_counter() - begun
            if self.run:
                self.run.log({"step": state.step, "evaluation": asdict(found)})
                if better and self.schedule.eval_every:
                    self.run.keep_best(self.record(found), state.student)
        state.student.train()


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
