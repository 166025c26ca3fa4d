"""The options of `kdcache train` and `kdcache plan`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from kdcache.choices import Mode, OptimizerName, Precision, Tail
from kdcache.errors import UsageError
from kdcache.models.options import OutputOptions
from kdcache.options import (
    DATA,
    LOGGING,
    OPTIMIZATION,
    RUN,
    TEACHER,
    data_option,
    device_option,
    option,
    timeout_option,
    workers_option,
)
from kdcache.paths import require_cache, require_dataset
from kdcache.spec import require
from kdcache.teacher.options import SETTING_HELP, RecordOptions
from kdcache.views.options import ViewOptions


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """What decides a run, as it was given; None where an option is not given.

    A field that has the name of one of TrainSpec's, and is not None, is that field's value.
    """

    data: Path = data_option()
    val: Path | None = option(
        None,
        help="A .beton file to evaluate the student on.",
        group=DATA,
        metavar="DATA.beton",
        require=require_dataset,
    )
    unlabeled: bool = option(
        False,
        help="Ignore the labels and class names of the data: its classes are not the teacher's.",
        group=DATA,
    )
    mode: Mode = option(help="Where the targets come from.", group=TEACHER)
    teachers: tuple[str, ...] = option(
        (),
        name="--teacher",
        help="The teacher of --mode online. With --mode cached and --val, also report agreement "
        "with this teacher. Repeat the option to average the probabilities of several.",
        group=TEACHER,
        metavar="MODEL",
    )
    output: OutputOptions = OutputOptions()
    cache: str | None = option(
        None,
        help="The cache of --mode cached.",
        group=TEACHER,
        metavar="C.zarr",
        require=require_cache,
    )
    setting: str | None = option(
        None,
        help=SETTING_HELP,
        default_text="the cache's, else as the other options imply",
        group=TEACHER,
        metavar="NAME",
    )
    num_views: int | None = option(
        None,
        name="--views",
        help="Views that the epochs cycle through.",
        default_text="the cache's, else a new view every epoch",
        group=TEACHER,
        metavar="N",
        at_least=1,
    )
    num_averaged_views: int | None = option(
        None,
        name="--average-views",
        help="Views that an online teacher averages, with --setting fixed-average.",
        default_text="1024",
        group=TEACHER,
        metavar="N",
        at_least=1,
    )
    teacher_size_px: int | None = option(
        None,
        name="--teacher-size",
        help="Side of an online teacher's views.",
        default_text="the student's",
        group=TEACHER,
        metavar="PX",
        at_least=1,
    )
    view: ViewOptions = ViewOptions()
    recipe: str | None = option(
        None,
        help="Hyperparameters to start from; `kdcache recipes` lists them.",
        group=OPTIMIZATION,
        metavar="NAME",
    )
    epochs: int | None = option(
        None, help="Passes through the data.", default_text="10", group=OPTIMIZATION, metavar="N"
    )
    batch_size: int | None = option(
        None,
        help="Images per step, over all processes.",
        default_text="256",
        group=OPTIMIZATION,
        metavar="N",
    )
    optimizer: OptimizerName | None = option(
        None,
        help="soap needs the package pytorch-optimizer.",
        default_text="adamw",
        group=OPTIMIZATION,
    )
    lr: float | None = option(
        None, help="Peak learning rate.", default_text="0.003", group=OPTIMIZATION, metavar="LR"
    )
    weight_decay: float | None = option(
        None,
        help="Decoupled weight decay, as in AdamW.",
        default_text="0.01",
        group=OPTIMIZATION,
        metavar="WD",
    )
    momentum: float | None = option(
        None, help="SGD momentum.", default_text="0.9", group=OPTIMIZATION, metavar="M"
    )
    warmup: float | None = option(
        None,
        help="Warm-up length: a fraction of all steps if below 1, else a number of steps.",
        default_text="0.1",
        group=OPTIMIZATION,
        metavar="FRACTION or N",
    )
    temperature: float | None = option(
        None,
        help="Temperature of the distillation loss.",
        default_text="1",
        group=OPTIMIZATION,
        metavar="T",
    )
    tail: Tail | None = option(
        None,
        help="What the loss assumes of the classes that a record leaves out. bucket: compare their "
        "total probability only; uniform: each has an equal share of it; renormalise: they have "
        "none, the named classes are scaled to sum to 1; none: leave them out, scale nothing.",
        default_text="uniform",
        group=OPTIMIZATION,
    )
    label_weight: float | None = option(
        None,
        help="Weight W of the labels: (1 - W) times the distillation loss plus W times the "
        "cross-entropy.",
        default_text="0",
        group=OPTIMIZATION,
        metavar="W",
    )
    ema_decay: float | None = option(
        None,
        name="--ema",
        help="Decay of a moving average of the parameters, which the run then saves; 0: off.",
        default_text="0",
        group=OPTIMIZATION,
        metavar="DECAY",
    )
    ema_statistics: int | None = option(
        None,
        help="With --ema: images of training views from which the statistics of batch "
        "normalisation are computed anew for the average, whenever it is evaluated or saved; 0: "
        "those of training are kept.",
        default_text="0",
        group=OPTIMIZATION,
        metavar="IMAGES",
        at_least=0,
    )
    precision: Precision | None = option(
        None,
        help="Precision of forward passes, by autocast.",
        default_text="float32",
        group=OPTIMIZATION,
    )
    student: str | None = option(
        None, help="The model to train.", default_text="the recipe's", group=RUN, metavar="MODEL"
    )
    init: str | None = option(
        None,
        help="Initial weights: a .safetensors file, a run's folder, or 'pretrained'.",
        default_text="random",
        group=RUN,
        metavar="WEIGHTS",
    )
    seed: int | None = option(
        None,
        help="Seed of the student's initialisation and of dropout.",
        default_text="0",
        group=RUN,
        metavar="N",
    )
    deterministic: bool = option(
        False, help="Identical runs give identical weights; slower.", group=RUN
    )
    compile_student: bool = option(
        False, name="--compile", help="Compile the student with torch.compile.", group=RUN
    )
    device: str | None = device_option()

    def __post_init__(self) -> None:
        _require_mode(self)

    def given(self) -> dict[str, Any]:
        """The options that are given, by field."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What a run writes, and when; it may differ each time that a run is resumed.

    resume              resume the run in its folder, or begin where there is none
    checkpoint_every    steps from one checkpoint to the next; None: none by steps
    checkpoint_minutes  minutes from one checkpoint to the next; None: none by time
    max_checkpoints     older ones are deleted
    eval_every          steps from one evaluation to the next, with a checkpoint before each and the
                        best weights saved; None: one evaluation, after the last step
    log_every           steps from one log line to the next
    tensorboard         log for TensorBoard too
    workers             threads that decode images; None: chosen by the loader
    timeout_s           how long to wait for other processes, in seconds
    """

    resume: bool = option(
        False, help="Resume the run in --out, or begin it if there is none.", group=RUN
    )
    checkpoint_every: int | None = option(
        None, help="Save a checkpoint every N steps.", group=RUN, metavar="N", at_least=1
    )
    checkpoint_minutes: float | None = option(
        15.0,
        help="Save a checkpoint every MINUTES.",
        default_text="15",
        group=RUN,
        metavar="MINUTES",
    )
    max_checkpoints: int = option(
        2, help="Checkpoints to keep; older ones are deleted.", group=RUN, metavar="N", at_least=1
    )
    workers: int | None = workers_option()
    timeout_s: float = timeout_option()
    eval_every: int | None = option(
        None,
        help="Evaluate on --val every N steps, and save the best weights.",
        default_text="after the last step",
        group=LOGGING,
        metavar="N",
        at_least=1,
    )
    log_every: int = option(50, help="Log every N steps.", group=LOGGING, metavar="N", at_least=1)
    tensorboard: bool = option(False, help="Also log for TensorBoard.", group=LOGGING)

    def __post_init__(self) -> None:
        for name in ("checkpoint_every", "checkpoint_minutes", "eval_every"):
            value = getattr(self, name)
            require(value is None or value > 0, name.replace("_", "-"), "above 0", value)
        for name in ("max_checkpoints", "log_every"):
            value = getattr(self, name)
            require(value >= 1, name.replace("_", "-"), "at least 1", value)


@dataclass(frozen=True, kw_only=True)
class TrainCommand:
    """All options of `kdcache train`."""

    train: TrainOptions
    out: Path = option(help="The run's folder.", group=RUN, metavar="DIR")
    run: RunOptions = RunOptions()

    def __post_init__(self) -> None:
        if self.run.eval_every and self.train.val is None:
            raise UsageError("--eval-every needs --val DATA.beton")


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """A cache whose size and time are to be estimated, and students to train from it."""

    records: RecordOptions
    out: str | None = option(
        None, help="Check the free space at this path.", group=DATA, metavar="C.zarr"
    )
    student: str | None = option(
        None,
        help="A model to train: also estimate when the cache is faster than an online teacher.",
        group=RUN,
        metavar="MODEL",
    )
    students: int | None = option(
        None,
        help="Students to train.",
        default_text="a table of 1, 2, 5, 10, 50",
        group=RUN,
        metavar="N",
        at_least=1,
    )
    epochs: int | None = option(
        None,
        help="Epochs of each student.",
        default_text="one per view",
        group=RUN,
        metavar="N",
        at_least=1,
    )

    def __post_init__(self) -> None:
        if self.student is None and (self.students or self.epochs):
            raise UsageError("--students and --epochs go with --student MODEL")


def _require_mode(options: TrainOptions) -> None:
    """Raise UsageError for options that another mode has."""
    mode, weight = options.mode, options.label_weight
    labels, online, cached = (mode == name for name in ("labels", "online", "cached"))
    for wrong, line in (
        (online and not options.teachers, "--mode online needs --teacher MODEL"),
        (cached and not options.cache, "--mode cached needs --cache C.zarr"),
        (options.cache and not cached, f"--cache goes with --mode cached, not with --mode {mode}"),
        (
            labels and options.teachers,
            "--teacher goes with --mode online or cached, not with --mode labels",
        ),
        (labels and weight, "--label-weight goes with a teacher, not with --mode labels"),
        (
            labels and options.temperature not in (None, 1),
            "--temperature goes with a teacher, not with --mode labels",
        ),
        (
            options.tail and not cached,
            "--tail goes with a cache whose records leave classes out, not with --mode " + mode,
        ),
        (
            labels and options.unlabeled,
            "--unlabeled ignores the labels: it goes with --mode online or cached",
        ),
        (
            options.unlabeled and weight,
            "--label-weight needs labels of the teacher's classes, which --unlabeled ignores",
        ),
        (
            options.teacher_size_px and not online,
            f"--teacher-size goes with --mode online, not with --mode {mode}: a cache has its size",
        ),
        (
            options.num_averaged_views and not online,
            f"--average-views goes with --mode online, not with --mode {mode}",
        ),
    ):
        if wrong:
            raise UsageError(line)
