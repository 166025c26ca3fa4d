"""The training loop in one function: `train`.

In: a `TrainingRun`. Out: the student, trained in place, the run's folder, and what its run.json
holds. What stays true:

- Epoch e plays view e mod V. The loop does not depend on where targets come from.
- A step is a function of the state before it and of its number. So a run that was killed anywhere
  and is resumed ends with exactly the weights of an uninterrupted run, with `deterministic` bit for
  bit.
- Processes shard each batch, and the result is that of one process, to rounding. All act at the
  same step; the main process writes.
- A checkpoint holds finite weights only.

Cost: a step transfers no value to the host, except where a line is logged.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.profiler import record_function

from kdcache.batch import Batch
from kdcache.data.loader import Loader
from kdcache.errors import Stopped, UsageError
from kdcache.evaluation.evaluate import Evaluation, evaluate
from kdcache.models.run_json import read_run_json
from kdcache.spec import facts
from kdcache.training import batch_statistics, checkpoint, run_folder
from kdcache.training.distributed import SINGLE_PROCESS, ProcessGroup
from kdcache.training.optim import learning_rate
from kdcache.training.options import RunOptions
from kdcache.training.run import TrainingRun
from kdcache.training.run_folder import RunFolder
from kdcache.training.spec import TrainSpec
from kdcache.training.state import State
from kdcache.training.step import train_step
from kdcache.views.philox import Purpose, draw

# What a process wants after a step; above SAVE it is the number of a signal.
NOTHING, SAVE = 0, 1


@dataclass(frozen=True)
class StepMetrics:
    """A line of the log.

    loss, agreement   means over the steps since the last line: of the loss, and of the share of
                      images for which the student's class is the target's
    lr                of this step
    rate              images per second of all processes since the last line
    """

    step: int
    steps: int
    epoch: int
    loss: float
    agreement: float
    lr: float
    rate: float


@dataclass(frozen=True)
class Progress:
    """The last step that was made, of how many, and its metrics where they were logged."""

    step: int
    num_steps: int
    metrics: StepMetrics | None = None


Report = Callable[[Progress], None]


def silent(progress: Progress) -> None:
    """The report that shows nothing."""


def train(
    run: TrainingRun,
    out: os.PathLike[str] | str | None = None,
    *,
    process_group: ProcessGroup = SINGLE_PROCESS,
    options: RunOptions = RunOptions(),  # noqa: B008
    stop: Callable[[], int] = lambda: 0,
    report: Report = silent,
) -> dict[str, Any]:
    """Train the student in place; what run.json holds. At the end the student has the weights that
    the run gives: with `ema_decay` their moving average.

    out            the run's folder; None: train in memory and write nothing
    process_group  of a run under torchrun
    options        what is written and when
    stop           called after each step: the number of a signal that ends the run early, or 0
    report         called in every process before the first step, with the step that the run
                   resumes from or 0, and after each step; what it raises ends the training

    A finished run in `out` is read and returned. Raises Stopped after a signal, with a checkpoint
    saved; NonFinite where the loss or a weight is NaN or infinite; UsageError where spec, data and
    processes do not fit; and what loader, targets, evaluation and `RunFolder` raise. A run that
    fails before its first log line leaves no folder.
    """
    spec, student = run.spec, run.student
    folder = None
    # Threads are chosen by each machine.
    process_group.require_same(run.facts() | facts(replace(options, workers=None)))
    if out is not None and process_group.is_main:
        folder = RunFolder(
            Path(out),
            run.identity,
            resume=options.resume,
            max_checkpoints=options.max_checkpoints,
            tensorboard=options.tensorboard,
        )
    with contextlib.ExitStack() as stack:
        stack.enter_context(folder or contextlib.nullcontext())
        # One value for all processes: one that trained on would wait for those that have returned.
        if out is not None and process_group.broadcast(int(run_folder.is_finished(Path(out)))):
            return read_run_json(Path(out))
        loss = run.make_loss()
        num_batches, num_steps = count_steps(spec, len(run.dataset))
        process_group.require_equal_shards(spec)

        state = State(spec, student)
        resumed = _load_checkpoint(state, folder, out, process_group)
        best_top1: float = resumed.get("best", -1.0)
        clock = Stopwatch(resumed.get("seconds", 0.0))
        logged_s, saved_at, evaluation = clock.seconds, time.monotonic(), None
        report(Progress(state.step, num_steps))

        student.train()
        model = process_group.data_parallel(student)
        loader = stack.enter_context(open_loader(run, process_group, options.workers))
        batches = iter_batches(loader, spec, state.step, process_group)
        while True:
            # Evaluate. First in the loop: a resumed run makes up for the evaluation after its
            # checkpoint, which comes first so that a long evaluation loses no training.
            if _is_evaluated(run, options, state.step, num_steps):
                with _averaged(state, run, process_group, options.workers):
                    # A run's seconds are those of its training.
                    with clock.paused():
                        evaluation = _evaluate(run, process_group, options.workers)
                    is_best = evaluation.top1 > best_top1
                    best_top1 = max(best_top1, evaluation.top1)
                    if folder:
                        folder.log({"step": state.step, "evaluation": asdict(evaluation)})
                        # With one evaluation, at the end, the best weights are the final ones.
                        if is_best and options.eval_every:
                            folder.save_best(_run_json(run, evaluation, clock.seconds), student)
            if state.step == num_steps:
                break

            with record_function("load"):
                batch = next(batches)
            lr = learning_rate(spec, state.step, num_steps)
            train_step(state, model, batch, run.targets, loss, lr)
            is_last = state.step == num_steps

            # Log.
            metrics = None
            if state.step % options.log_every == 0 or is_last:
                # The step recorded a bad loss on the device; only here the host reads it.
                state.meter.require_finite(process_group)
                mean_loss, agreement, images = state.meter.pop_means(process_group)
                rate, logged_s = images / (clock.seconds - logged_s), clock.seconds
                epoch = (state.step - 1) // num_batches
                metrics = StepMetrics(state.step, num_steps, epoch, mean_loss, agreement, lr, rate)
                if folder:
                    folder.log(asdict(metrics))
            report(Progress(state.step, num_steps, metrics))

            # Checkpoint.
            time_is_up = _has_passed(options.checkpoint_minutes, since=saved_at)
            # A signal may reach one process, and a timer expire in one: all act on the largest
            # request, and one step later, when it has arrived without a wait.
            wanted = process_group.all_reduce_max_async(max(stop(), SAVE * time_is_up))
            if (
                wanted
                or is_last
                or _is_multiple(state.step, options.checkpoint_every)
                or _is_evaluated(run, options, state.step, num_steps)
            ):
                # Before the state is saved: no checkpoint holds NaN.
                state.require_finite(process_group)
                values = state.state_dict(process_group)
                if folder:
                    folder.save({**values, "best": best_top1, "seconds": clock.seconds})
                saved_at = time.monotonic()

            # Stop.
            if wanted > SAVE and not is_last:
                process_group.barrier()  # torchrun ends all processes when the first one ends
                raise Stopped(wanted, state.step)

        state.ema.copy_to_network()
        _estimate_statistics(state, run, process_group, options.workers)
        record = _run_json(run, evaluation, clock.seconds)
        if folder:
            record = folder.finish(record, student)
    return record


def open_loader(
    run: TrainingRun, process_group: ProcessGroup = SINGLE_PROCESS, workers: int | None = None
) -> Loader:
    """The loader of the run's views, in batches of this process."""
    spec = run.spec
    return Loader(
        run.dataset,
        spec.view_spec,
        spec.batch_size // process_group.size,
        teacher_view_spec=None if spec.num_averaged_views else spec.teacher_view_spec,
        workers=workers,
        device=run.student.device,
    )


def iter_batches(
    loader: Loader, spec: TrainSpec, start: int = 0, process_group: ProcessGroup = SINGLE_PROCESS
) -> Iterator[Batch]:
    """The batches of a run after its first `start` steps.

    Each comes with torch's generators seeded for its step, so that what dropout draws depends on
    the step and the process alone.
    """
    num_batches, _ = count_steps(spec, len(loader.dataset))
    first_epoch, first_batch = divmod(start, num_batches)
    for epoch in range(first_epoch, spec.epochs):
        # A cache with fewer views than there are epochs is played again from its first view.
        view = epoch % spec.num_views if spec.num_views else epoch
        left = range(first_batch if epoch == first_epoch else 0, num_batches)
        batches = loader.batches(view, process_group.shard(left, spec.batch_size))
        # The rank is part of the draw, as each process draws for its own images.
        low, high, _, _ = draw(
            spec.seed, epoch, list(left), Purpose.STEP, attempt=process_group.rank
        )
        for low_word, high_word, batch in zip(low, high, batches, strict=True):
            _seed(int(low_word) | int(high_word) << 32, loader.device)
            yield batch


def count_steps(spec: TrainSpec, num_samples: int) -> tuple[int, int]:
    """Batches of an epoch, and steps of the run. The last samples, which fill no batch, are left
    out. Raises UsageError where there is no batch."""
    num_batches = num_samples // spec.batch_size
    if num_batches == 0:
        raise UsageError(
            f"batch size {spec.batch_size} is more than the {num_samples} samples of the data"
        )
    return num_batches, num_batches * spec.epochs


def set_determinism(spec: TrainSpec) -> None:
    """Seed torch; with `deterministic` also one thread and deterministic algorithms."""
    torch.manual_seed(spec.seed)
    if spec.deterministic:
        # cuBLAS is deterministic only with a fixed workspace; torch refuses to go on without one.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        # A sum is divided among the threads, so their number decides how it is rounded.
        torch.set_num_threads(1)


class Stopwatch:
    """Seconds since it was made, plus those given, without pauses."""

    def __init__(self, seconds: float = 0.0) -> None:
        self._start = time.perf_counter() - seconds

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._start

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._start += time.perf_counter() - start


def _has_passed(minutes: float | None, *, since: float) -> bool:
    return minutes is not None and time.monotonic() - since >= 60 * minutes


@contextlib.contextmanager
def _averaged(
    state: State, run: TrainingRun, process_group: ProcessGroup, workers: int | None
) -> Iterator[None]:
    """Within, the student has the weights that the run would give after this step."""
    with state.ema.applied(), batch_statistics.kept(run.student):
        _estimate_statistics(state, run, process_group, workers)
        yield


def _estimate_statistics(
    state: State, run: TrainingRun, process_group: ProcessGroup, workers: int | None
) -> None:
    """From the first batches of the view of the last step."""
    spec = run.spec
    if not spec.ema_statistics:
        return
    num_batches, _ = count_steps(spec, len(run.dataset))
    epoch = max(state.step - 1, 0) // num_batches
    view = epoch % spec.num_views if spec.num_views else epoch
    wanted = min(num_batches, -(-spec.ema_statistics // spec.batch_size))
    with open_loader(run, process_group, workers) as loader:
        batches = loader.batches(view, process_group.shard(range(wanted), spec.batch_size))
        batch_statistics.estimate(run.student, (batch.images_BCHW for batch in batches))


def _is_evaluated(run: TrainingRun, options: RunOptions, step: int, num_steps: int) -> bool:
    """After this step there is an evaluation."""
    is_due = step == num_steps or _is_multiple(step, options.eval_every)
    return run.val is not None and step > 0 and is_due


def _is_multiple(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _seed(seed: int, device: torch.device) -> None:
    # torch.manual_seed would seed all devices, and keep a stack trace where CUDA is not ready.
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def _load_checkpoint(
    state: State,
    folder: RunFolder | None,
    out: os.PathLike[str] | str | None,
    process_group: ProcessGroup,
) -> dict[str, Any]:
    """Load the newest checkpoint into the state, in every process; its content, {} without one."""
    content = folder.resumed if folder else None
    if out is None:
        return {}
    # `folder` has checked the step.
    step = process_group.broadcast(content["step"] if content else 0)
    if step == 0:
        return {}
    # The main process has read it already; the others take the same step, not what is newest to
    # them.
    path = run_folder.checkpoint_path(Path(out), step)
    if content is None:
        if not path.exists():
            raise UsageError(
                f"process {process_group.rank} does not see {path}, from which process 0 resumes: "
                "--out must be on a file system that all machines share"
            )
        content = checkpoint.load(path)
    with checkpoint.using(path):
        state.load_state_dict(content)
        best, seconds = content.get("best", -1.0), content.get("seconds", 0.0)
        return {"best": float(best), "seconds": float(seconds)}


def _evaluate(run: TrainingRun, process_group: ProcessGroup, workers: int | None) -> Evaluation:
    assert run.val is not None
    return evaluate(
        run.student,
        run.val,
        size_px=run.spec.view_spec.size_px,
        teacher=run.reference_teacher,
        teacher_size_px=run.reference_size_px,
        workers=workers,
        part=(process_group.rank, process_group.size),
        reduce=process_group.all_reduce_sums,
    )


def _run_json(run: TrainingRun, evaluation: Evaluation | None, seconds: float) -> dict[str, Any]:
    return run_folder.make_run_json(
        run.spec,
        run.dataset,
        run.student,
        evaluation,
        class_names=run.class_names,
        **run.metadata,
        seconds=seconds,
    )
