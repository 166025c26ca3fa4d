"""`kdcache train`."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from kdcache.cli.options import OutputOptions
from kdcache.cli.output import err_console, format_evaluation, notice, progress_bar, show, warn
from kdcache.cli.signals import StopSignal, stop_signal
from kdcache.errors import NonFinite, Stopped
from kdcache.torchrun import current_process
from kdcache.training.options import TrainCommand

if TYPE_CHECKING:
    from kdcache.training.loop import Progress

BAR_S = 0.2  # from one update of the bar to the next
LINE_S = 60.0  # from one line of a log to the next, where there is no terminal for a bar


def train(options: TrainCommand, output: OutputOptions) -> None:
    """Train a student on labels, with an online teacher, or from a cache."""
    from kdcache.models.device import choose_device
    from kdcache.training import loop, run_folder
    from kdcache.training.distributed import ProcessGroup
    from kdcache.training.load import load_training_run, loader_threads

    process, out = current_process(), options.out
    workers = loader_threads(options.run.workers)
    device = choose_device(options.train.device)
    meeting = ProcessGroup(process.rank, process.world_size, device, options.run.timeout_s)
    with meeting as group, _stop_signal() as stop:
        begun = run_folder.begun_spec(out) if options.run.resume else None
        run = load_training_run(options.train, workers=workers, begun=begun)
        was_finished = run_folder.is_finished(out)
        warn(() if was_finished else run.warnings)
        with _Report(f"train {options.train.mode}", run.spec.batch_size) as report:
            try:
                record = loop.train(
                    run,
                    out,
                    process_group=group,
                    options=replace(options.run, workers=workers),
                    stop=stop,
                    report=report,
                )
            except Stopped as stopped:
                notice(
                    f"stopped after step {stopped.step:,}, checkpoint saved; the same command with "
                    "--resume resumes from there"
                )
                raise typer.Exit(128 + stopped.signal) from None
            except NonFinite as error:
                steps = [int(path.stem) for path in run_folder.checkpoints(out)]
                if not steps:
                    raise
                saved = f"the checkpoint of step {steps[-1]} is saved"
                raise NonFinite(f"{error}; {saved}") from error
    if was_finished:
        notice(f"{out} is a finished run: there is nothing to resume")
    if process.rank == 0:
        _show(record, out, output.as_json)


@contextmanager
def _stop_signal() -> Iterator[StopSignal]:
    """Within, SIGTERM and Ctrl-C only set the value. A process whose peers have ended ends."""
    from kdcache.training.distributed import is_peer_failure

    with stop_signal((signal.SIGINT, signal.SIGTERM)) as stop:
        try:
            yield stop
        except RuntimeError as error:
            if stop.number and is_peer_failure(error):
                raise typer.Exit(128 + stop.number) from None
            raise


class _Report:
    """How training goes: a bar on a terminal, elsewhere a line now and then. Use it with `with`."""

    def __init__(self, name: str, batch_size: int) -> None:
        self.name, self.batch_size = name, batch_size
        self._exit = ExitStack()
        self._update: Callable[..., None] | None = None
        self._metrics, self._first = "", 0
        self._begun = self._shown_at = self._printed_at = time.monotonic()

    def __enter__(self) -> _Report:
        return self

    def __exit__(self, *_: object) -> None:
        self._exit.close()

    def __call__(self, progress: Progress) -> None:
        """After every step; most do no more than look at the clock."""
        if self._update is None:
            self._start(progress)
            return
        if progress.metrics:
            loss, agreement = progress.metrics.loss, progress.metrics.agreement
            self._metrics = f"loss {loss:.4g}, agreement {agreement:.1%}"
        now = time.monotonic()
        if now - self._shown_at >= BAR_S:
            self._shown_at = now
            self._update(progress.step * self.batch_size, self._metrics)
        if not err_console().is_terminal and now - self._printed_at >= LINE_S:
            self._printed_at = now
            self._print(progress, now)

    def _start(self, progress: Progress) -> None:
        if progress.step:
            notice(f"resumes after step {progress.step:,} of {progress.num_steps:,}")
        self._first = progress.step
        self._begun = self._shown_at = self._printed_at = time.monotonic()
        total, done = progress.num_steps * self.batch_size, progress.step * self.batch_size
        bar = progress_bar(self.name, total, "images", done)
        self._update = self._exit.enter_context(bar)

    def _print(self, progress: Progress, now: float) -> None:
        step, steps = progress.step, progress.num_steps
        step_s = (now - self._begun) / (step - self._first)
        left = timedelta(seconds=round((steps - step) * step_s))
        metrics = f"{self._metrics}, " if self._metrics else ""
        rate = self.batch_size / step_s
        notice(f"step {step:,} of {steps:,}: {metrics}{rate:,.0f} images/s, {left} left")


def _show(record: dict[str, Any], out: Path, as_json: bool) -> None:
    from kdcache.training import run_folder
    from kdcache.training.spec import TrainSpec

    spec = TrainSpec.from_json(record["spec"])
    images = spec.epochs * (record["num_samples"] // spec.batch_size) * spec.batch_size
    last = run_folder.last_step(out)
    text = {
        "run": str(out),
        "student": record["student"],
        "training loss": f"{last['loss']:.4g}",
        "training agreement": f"{last['agreement']:.2%}",
        "images_per_s": round(images / record["seconds"]),
        "seconds": round(record["seconds"], 2),
        **format_evaluation(record["evaluation"]),
    }
    show({**record, **text} if as_json else text, as_json)
