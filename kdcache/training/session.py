"""A training run from beginning to end: folder, state, loop, evaluation, result.

In: a `Job`, which is all that a run needs, loaded and checked. Out: the run's folder, and what its
run.json says. What stays true: begun again with `resume`, however it ended, it ends as one that was
never stopped; one process writes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from kdcache.batch import TargetSource
from kdcache.data.beton import Dataset
from kdcache.errors import UsageError
from kdcache.evaluation import evaluate
from kdcache.evaluation.evaluate import Evaluation
from kdcache.models.classifier import Classifier, Teacher
from kdcache.models.run_json import read_run_json
from kdcache.training import checkpoint, run_folder
from kdcache.training.distributed import SINGLE_PROCESS, World
from kdcache.training.identity import RunIdentity
from kdcache.training.keeper import Keeper, Schedule
from kdcache.training.loop import LOG_EVERY_STEPS, State, Step, num_steps, train
from kdcache.training.run_folder import RunFolder
from kdcache.training.spec import TrainSpec


@dataclass(frozen=True)
class TrainingRun:
    """A run, loaded.

    labels       what the spec's label_weight weighs
    val          images to evaluate on; judge: the teacher that the student is then compared with,
                 which sees judge_size_px
    cache         digest of the spec of the cache that targets come from; teacher: content_hash of the
                 live teacher. They are part of what the run is; `about` is told in run.json only
    class_names  where they are not the data's
    notes        lines that the user should read as it begins
    """

    spec: TrainSpec
    dataset: Dataset
    student: Classifier
    targets: TargetSource
    labels: TargetSource | None = None
    val: Dataset | None = None
    judge: Teacher | None = None
    judge_size_px: int | None = None
    cache: str | None = None
    teacher: str | None = None
    class_names: tuple[str, ...] | None = None
    about: dict[str, str | None] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def run(
    job: TrainingRun,
    out: Path,
    *,
    world: World = SINGLE_PROCESS,
    schedule: Schedule = Schedule(),  # noqa: B008
    resume: bool = False,
    keep: int = run_folder.MAX_CHECKPOINTS,
    tensorboard: bool = False,
    workers: int | None = None,
    log_every: int = LOG_EVERY_STEPS,
    on_start: Callable[[int, int], None] = lambda step, steps: None,
    on_step: Callable[[Step], None] = lambda step: None,
    on_tick: Callable[[int], None] = lambda step: None,
    signal: Callable[[], int] = lambda: 0,
) -> dict[str, Any]:
    """Train, evaluate, and write the result to `out`; what run.json says.

    on_start  gets the step that the run goes on from, 0 for a new one, and how many there are
    on_tick   gets the number of every step
    signal    the number of a signal that shall end the run soon, or 0

    Raises keeper.Stopped after a signal, and what `Run`, `train` and `evaluate` raise.
    """
    identity = RunIdentity.of(
        job.spec, job.dataset, job.student, cache=job.cache, teacher=job.teacher
    )
    folder = None
    if world.first:
        folder = RunFolder(out, identity, resume=resume, keep=keep, tensorboard=tensorboard)
    with folder or contextlib.nullcontext():
        if world.told(int(run_folder.is_finished(out))):
            return read_run_json(out)
        state, kept = _state(job, folder, out, world)
        steps = num_steps(job.spec, job.dataset)[1]
        keeper = Keeper(
            folder,
            world,
            schedule,
            steps,
            evaluate=(lambda: _evaluated(job, world, workers)) if job.val else None,
            record=lambda found: _record(job, found, keeper.seconds),
            signal=signal,
            best=kept.get("best", -1.0),
            seconds=kept.get("seconds", 0.0),
        )

        def logged(step: Step) -> None:
            if folder:
                folder.log(asdict(step))
            on_step(step)

        def after_step(state: State) -> None:
            on_tick(state.step)
            keeper(state)

        on_start(state.step, steps)
        if kept:
            keeper.go_on(state)
        train(
            job.spec,
            job.dataset,
            job.student,
            job.targets,
            labels=job.labels,
            state=state,
            world=world,
            workers=workers,
            log_every=log_every,
            on_step=logged,
            after_step=after_step,
        )
        with state.ema.applied():
            record = _record(job, keeper.found, keeper.seconds)
            if folder:
                folder.finish(record, job.student)
    return record


def _state(
    job: TrainingRun, folder: RunFolder | None, out: Path, world: World
) -> tuple[State, dict[str, Any]]:
    """The state that the run goes on from, and all that its checkpoint holds; {} for a new run."""
    state = State(job.spec, job.student)
    kept = folder.resumed if folder else None
    step = world.told(kept["step"] if kept else 0)
    if step == 0:
        return state, {}
    if kept is None:
        path = run_folder.checkpoint_path(out, step)
        if not path.exists():
            raise UsageError(
                f"process {world.rank} does not see {path}, which process 0 goes on from: --out "
                "must be on a file system that all machines share"
            )
        kept = checkpoint.load(path)
    state.load_state_dict(kept)
    return state, kept


def _evaluated(job: TrainingRun, world: World, workers: int | None) -> Evaluation:
    assert job.val is not None
    return evaluate.evaluate(
        job.student,
        job.val,
        size_px=job.spec.view_spec.size_px,
        teacher=job.judge,
        teacher_size_px=job.judge_size_px,
        workers=workers,
        part=(world.rank, world.count),
        reduce=world.totals,
    )


def _record(job: TrainingRun, evaluation: Evaluation | None, seconds: float) -> dict[str, Any]:
    return run_folder.make_run_json(
        job.spec,
        job.dataset,
        job.student,
        evaluation,
        class_names=job.class_names,
        **job.about,
        seconds=seconds,
    )
