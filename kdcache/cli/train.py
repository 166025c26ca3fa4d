"""The commands that make a student: parse, compose the library, print. `cli` puts them in the app.

Heavy modules are imported in the functions that use them.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kdcache import torchrun
from kdcache.cli.output import (
    AreaOption,
    BatchOption,
    CropOption,
    DataOption,
    DeviceOption,
    FlipOption,
    JsonOption,
    MixupOption,
    SettingOption,
    SizeOption,
    UnlabeledOption,
    ViewSeedOption,
    WorkersOption,
    device_of,
    err_console,
    given_view,
    notice,
    percentages,
    progress_bar,
    rank,
    require_classes,
    show,
)
from kdcache.errors import NonFinite, Stopped, UsageError
from kdcache.spec import Precision
from kdcache.training.spec import Mode, OptimizerName
from kdcache.views.spec import evaluation_view_spec

if TYPE_CHECKING:
    from kdcache.training.loop import Progress

BAR_S = 0.2  # from one look of the bar to the next
LINE_S = 60.0  # from one line of a log to the next, where there is no terminal for a bar


def train(
    mode: Annotated[Mode, typer.Option(help="Where the targets come from.")],
    data: DataOption,
    out: Annotated[Path, typer.Option(help="The run's folder.")],
    student: Annotated[
        str | None, typer.Option(help="The model to train.  [default: the recipe's]")
    ] = None,
    cache: Annotated[str | None, typer.Option(help="The cache, for --mode cached.")] = None,
    teacher: Annotated[
        list[str] | None,
        typer.Option(
            help="For --mode online; with --val also the judge of cached. Given again: the mean "
            "of their probabilities."
        ),
    ] = None,
    val: Annotated[Path | None, typer.Option(help="A .beton file to measure accuracy on.")] = None,
    recipe: Annotated[
        str | None, typer.Option(help="Settings to start from; `kdcache recipes` lists them.")
    ] = None,
    setting: SettingOption = None,
    unlabeled: UnlabeledOption = False,
    label_weight: Annotated[
        float | None, typer.Option(help="Share of the labels in the loss, beside the teacher.")
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(help="Times through the data.  [default: 10]")
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(help="Images in a step, of all processes together.  [default: 256]"),
    ] = None,
    optimizer: Annotated[
        OptimizerName | None, typer.Option(help="soap needs pytorch-optimizer.  [default: adamw]")
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Highest rate.  [default: 0.003]")] = None,
    weight_decay: Annotated[
        float | None, typer.Option(help="Decoupled, as in AdamW.  [default: 0.01]")
    ] = None,
    momentum: Annotated[float | None, typer.Option(help="Of SGD.  [default: 0.9]")] = None,
    warmup: Annotated[
        float | None,
        typer.Option(
            help="Share of the steps, or from 1 up steps, that the rate rises over.  [default: 0.1]"
        ),
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="T of the distillation loss.  [default: 1]")
    ] = None,
    ema: Annotated[
        float | None,
        typer.Option(help="Decay of a moving average of the weights, to keep instead of them."),
    ] = None,
    precision: Annotated[
        Precision | None, typer.Option(help="Of the arithmetic, by autocast.  [default: float32]")
    ] = None,
    init: Annotated[
        str | None, typer.Option(help="First weights: a .safetensors file, a run, or 'pretrained'.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of the student's first weights.  [default: 0]")
    ] = None,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="Equal runs give equal weights; slower.")
    ] = False,
    compile_student: Annotated[
        bool, typer.Option("--compile", help="Compile the student with torch.compile.")
    ] = False,
    views: Annotated[
        int | None,
        typer.Option(
            min=1, help="Views to cycle through.  [default: the cache's; else one an epoch]"
        ),
    ] = None,
    average_views: Annotated[
        int | None, typer.Option(min=1, help="Views that a live teacher averages in fixed-average.")
    ] = None,
    teacher_size: Annotated[
        int | None,
        typer.Option(
            min=1, help="Side in px of what a live teacher sees.  [default: the student's]"
        ),
    ] = None,
    view_seed: ViewSeedOption = None,
    size: SizeOption = None,
    crop: CropOption = None,
    min_scale: AreaOption = None,
    flip: FlipOption = None,
    mixup: MixupOption = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in --out, if there is one.")
    ] = False,
    checkpoint_every: Annotated[
        int | None, typer.Option(min=1, help="Steps from one checkpoint to the next.")
    ] = None,
    checkpoint_minutes: Annotated[
        float, typer.Option(help="Time from one checkpoint to the next.")
    ] = 15,
    keep: Annotated[int, typer.Option(min=1, help="Checkpoints to keep.")] = 2,
    eval_every: Annotated[
        int | None,
        typer.Option(
            min=1, help="Steps from one evaluation on --val to the next; keeps the best weights."
        ),
    ] = None,
    log_every: Annotated[
        int, typer.Option(min=1, help="Steps from one log line to the next.")
    ] = 50,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Also log for TensorBoard.")
    ] = False,
    workers: WorkersOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train a student on labels, on a live teacher, or on a cache."""
    from kdcache.training import distributed, loop, run_folder
    from kdcache.training.options import TrainOptions, make_training_run
    from kdcache.training.run import RunOptions

    if eval_every and val is None:
        raise UsageError("--eval-every needs --val DATA.beton")
    options = {
        "epochs": epochs,
        "batch_size": batch_size,
        "optimizer": optimizer,
        "lr": lr,
        "weight_decay": weight_decay,
        "momentum": momentum,
        "warmup": warmup,
        "temperature": temperature,
        "label_weight": label_weight,
        "ema_decay": ema,
        "precision": precision,
        "seed": seed,
        "num_views": views,
        "num_averaged_views": average_views,
    }
    asked = TrainOptions(
        mode,
        data,
        student,
        cache,
        tuple(teacher or ()),
        val,
        recipe,
        setting,
        unlabeled,
        teacher_size,
        init,
        deterministic,
        compile_student,
        device_of(device),
        {name: value for name, value in options.items() if value is not None},
        given_view(view_seed, size, crop, min_scale, flip, mixup),
        _threads(workers),
    )
    run_options = RunOptions(
        resume,
        checkpoint_every,
        checkpoint_minutes,
        keep,
        eval_every,
        log_every,
        tensorboard,
        asked.workers,
    )
    process_group = distributed.ProcessGroup(*rank(), asked.device)
    with process_group, _stop_signal() as stop:
        run = make_training_run(asked)
        with _Report(f"train {mode}", run.spec.batch_size, run.warnings) as report:
            finished = run_folder.is_finished(out)
            try:
                record = loop.train(
                    run,
                    out,
                    process_group=process_group,
                    options=run_options,
                    stop=stop,
                    report=report,
                )
            except Stopped as end:
                notice(
                    f"stopped after step {end.step:,}; checkpoint saved; the same command with "
                    "--resume resumes from there"
                )
                raise typer.Exit(128 + end.signal) from None
            except NonFinite as error:
                saved = [int(path.stem) for path in run_folder.checkpoints(out)]
                if not saved:
                    raise
                raise NonFinite(f"{error}; the checkpoint of step {saved[-1]} is saved") from error
    if finished:
        notice(f"{out} is a finished run: nothing to resume")
    if process_group.is_main:
        _show(record, out, as_json)


@contextmanager
def _stop_signal() -> Iterator[Callable[[], int]]:
    """Within, SIGTERM and Ctrl-C only set what the value gives: their number; 0 before. A second
    Ctrl-C does not wait; nor does a process whose others have ended."""
    from kdcache.training.distributed import is_peer_failure

    came = 0

    def note(number: int, frame: object) -> None:
        nonlocal came
        came = number
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: came
    except RuntimeError as error:
        if came and is_peer_failure(error):
            raise typer.Exit(128 + came) from None
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _threads(workers: int | None) -> int | None:
    """Threads of the loader: by default the processes of a machine share its cores."""
    processes = torchrun.current_process().local_world_size
    if workers is not None or processes == 1:
        return workers
    return max(1, len(os.sched_getaffinity(0)) // processes)


class _Report:
    """How training goes: a bar on a terminal, elsewhere a line now and then. Use it with `with`."""

    def __init__(self, name: str, batch_size: int, warnings: tuple[str, ...]) -> None:
        self.name, self.batch_size, self.warnings = name, batch_size, warnings
        self._exit = ExitStack()
        self._update: Callable[..., None] | None = None
        self._metrics = ""

    def __enter__(self) -> _Report:
        return self

    def __exit__(self, *_: object) -> None:
        self._exit.close()

    def __call__(self, progress: Progress) -> None:
        """Before the first step, and after every step; most calls only read the clock."""
        if self._update is None:
            self._start(progress.step, progress.num_steps)
            return
        if progress.metrics:
            loss, agreement = progress.metrics.loss, progress.metrics.agreement
            self._metrics = f"loss {loss:.4g}, agreement {agreement:.1%}"
        self._show(progress.step, self._update)

    def _start(self, step: int, num_steps: int) -> None:
        for line in self.warnings:
            notice(line)
        if step:
            notice(f"resumes after step {step:,} of {num_steps:,}")
        self._first, self._num_steps = step, num_steps
        self._begun = self._shown_at = self._told_at = time.monotonic()
        images = step * self.batch_size
        bar = progress_bar(self.name, num_steps * self.batch_size, "images", images)
        self._update = self._exit.enter_context(bar)

    def _show(self, step: int, update: Callable[..., None]) -> None:
        now = time.monotonic()
        if now - self._shown_at >= BAR_S:
            self._shown_at = now
            update(step * self.batch_size, self._metrics)
        if not err_console.is_terminal and now - self._told_at >= LINE_S:
            self._told_at = now
            step_s = (now - self._begun) / (step - self._first)
            left = timedelta(seconds=round((self._num_steps - step) * step_s))
            metrics = f"{self._metrics}, " if self._metrics else ""
            rate = f"{self.batch_size / step_s:,.0f} images/s"
            notice(f"step {step:,} of {self._num_steps:,}: {metrics}{rate}, {left} left")


def _show(record: dict[str, Any], out: Path, as_json: bool) -> None:
    from kdcache.training import run_folder
    from kdcache.training.spec import TrainSpec

    spec = TrainSpec.from_json(record["spec"])
    images = spec.epochs * (record["num_samples"] // spec.batch_size) * spec.batch_size
    last = run_folder.last_step(out)
    answer = {
        "run": str(out),
        "student": record["student"],
        "training loss": f"{last['loss']:.4g}",
        "training agreement": f"{last['agreement']:.2%}",
        "images_per_s": round(images / record["seconds"]),
        "seconds": round(record["seconds"], 2),
        **percentages(record["evaluation"]),
    }
    show({**record, **answer} if as_json else answer, as_json)


def evaluate(
    model: Annotated[str, typer.Argument(help="A run's folder, or a model.", show_default=False)],
    data: DataOption,
    teacher: Annotated[
        list[str] | None,
        typer.Option(help="Also measure closeness to it. Given again: to the mean of them."),
    ] = None,
    size: SizeOption = None,
    teacher_size: Annotated[
        int | None,
        typer.Option(min=1, help="Side in px of what the teacher sees.  [default: the same]"),
    ] = None,
    batch_size: BatchOption = 256,
    workers: WorkersOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure accuracy, calibration, and closeness to a teacher."""
    from kdcache.data import beton as datasets
    from kdcache.evaluation import evaluate as evaluation
    from kdcache.models import load

    dataset = datasets.open_dataset(data)
    if size is None:
        size = load.natural_size_px(model) or dataset.natural_size_px
    for px in (size, teacher_size or size):
        evaluation_view_spec(px)  # refuses a size that cannot be
    options: Any = {"num_classes": len(dataset.class_names), "device": device_of(device)}
    require_classes(model, dataset)
    network = load.load_model(model, "teacher", size_px=size, **options)
    judge = None
    if teacher:
        for name in teacher:
            require_classes(name, dataset)
        judge = load.load_teacher(teacher, size_px=teacher_size or size, **options)
    with progress_bar("eval", len(dataset), "images") as update:
        result = evaluation.evaluate(
            network,
            dataset,
            size_px=size,
            teacher=judge,
            teacher_size_px=teacher_size,
            batch_size=batch_size,
            workers=workers,
            progress=update,
        )
    found = asdict(result)
    answer = {"model": model, "samples": result.num_samples, **percentages(found)}
    show(found if as_json else answer, as_json)
