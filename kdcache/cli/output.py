"""What the commands share: their common options, and how they print.

Heavy modules are imported in the functions that use them, as in the commands.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from kdcache import torchrun
from kdcache.cache.codecs import RecordCodec, Sampled, ValueType, choose_codec
from kdcache.cache.spec import CacheSpec
from kdcache.errors import KDCacheError, UsageError
from kdcache.spec import Precision
from kdcache.views.settings import RowOrder, get_setting, make_view_spec
from kdcache.views.spec import Crop, ViewSpec

if TYPE_CHECKING:
    from kdcache.data.beton import Dataset
    from kdcache.models.classifier import Teacher

out_console = Console(highlight=False)
err_console = Console(stderr=True, highlight=False)
PATIENCE_S = 3.0

DataOption = Annotated[Path, typer.Option("--data", help="The .beton file to read.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the answer as JSON.")]
WorkersOption = Annotated[
    int | None,
    typer.Option(
        min=1, help="Threads that decode.  [default: all cores; half with a network on the CPU]"
    ),
]
DeviceOption = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:1 ...  [default: cuda where there is one]")
]
BatchOption = Annotated[int, typer.Option("--batch-size", help="Images in a batch.")]
SizeOption = Annotated[
    int | None,
    typer.Option(
        "--size",
        help="Side of a view in px.  [default: the model's, if it has one (a run's, a vision "
        "transformer's), or the images' up to 64, else 224]",
    ),
]
CropOption = Annotated[Crop | None, typer.Option(help="Kind of crop.  [default: inception]")]
AreaOption = Annotated[
    float | None,
    typer.Option(
        help="Smallest area of a crop as a share of the image; exact for random and center.  "
        "[default: 0.05; random and center 0.766; whole 1]"
    ),
]
FlipOption = Annotated[
    bool | None,
    typer.Option("--flip/--no-flip", help="Mirror half of the images.  [default: flip]"),
]
MixupOption = Annotated[
    float | None,
    typer.Option(help="Alpha of Beta(alpha, alpha) for mixing pairs; 0: none.  [default: 1]"),
]
ViewSeedOption = Annotated[
    int | None, typer.Option(help="Decides crops, flips, order and pairs.  [default: 0]")
]
TeacherOption = Annotated[
    list[str],
    typer.Option(
        "--teacher", help="The model that answers. Given again: the mean of their probabilities."
    ),
]
SettingOption = Annotated[
    str | None,
    typer.Option(
        "--setting",
        help="What teacher and student see: fixed-whole, fixed-center, fixed-average_views, "
        "independent-random, independent-inception, consistent-random, consistent-inception or "
        "function-matching.  [default: as the other options say, else function-matching]",
    ),
]
UnlabeledOption = Annotated[
    bool,
    typer.Option(
        "--unlabeled",
        help="The data's classes are not the teacher's: its own count, and labels are not used.",
    ),
]
ViewsOption = Annotated[int, typer.Option(help="How many views of the data to record.")]
TopKOption = Annotated[
    str | None,
    typer.Option(help="Classes to keep of an answer, or 'all'.  [default: 16, or all if fewer]"),
]
DtypeOption = Annotated[ValueType, typer.Option(help="How a logit is stored.")]
OrderOption = Annotated[
    RowOrder | None,
    typer.Option(
        help="position: for training on the same views; sample: for training on other views "
        "than the teacher saw, without mixing.  [default: the setting's, else position]"
    ),
]
AverageOption = Annotated[
    int,
    typer.Option(
        min=0,
        help="One record a sample: mean probabilities over this many views of it.  "
        "[default: 0; of fixed-average 1024]",
    ),
]
NumDrawsOption = Annotated[
    int, typer.Option(min=0, help="Keep this many random draws instead of the top k.")
]
DrawTemperatureOption = Annotated[float, typer.Option(help="T of the draws, for --num-draws.")]
PrecisionOption = Annotated[
    Precision, typer.Option(help="Of the teacher's arithmetic, by autocast.")
]


def given_view(
    view_seed: int | None,
    size: int | None,
    crop: Crop | None,
    min_scale: float | None,
    flip: bool | None,
    mixup: float | None,
) -> dict[str, Any]:
    """The view options that were given, by their field in ViewSpec."""
    options = {
        "seed": view_seed,
        "size_px": size,
        "crop": crop,
        "min_scale": min_scale,
        "flip": flip,
        "mixup": mixup,
    }
    return {name: value for name, value in options.items() if value is not None}


def top_k_of(text: str | None, num_classes: int) -> int | None:
    """k as a number, or None for all."""
    if text is None:
        return min(16, num_classes)
    if text == "all":
        return None
    try:
        return int(text)
    except ValueError:
        raise UsageError(f"top-k must be a number or 'all', not {text!r}") from None


def require_classes(model: str | None, dataset: Dataset) -> None:
    """A run that was trained on as many classes of other names or order would answer nonsense."""
    from kdcache.models.run_json import read_run_json

    if not model or not Path(model).is_dir():
        return
    trained = read_run_json(Path(model)).get("class_names")
    if trained is not None and len(trained) == len(dataset.class_names):
        for there, here in zip(trained, dataset.class_names, strict=True):
            if there != here:
                raise UsageError(
                    f"{model} was trained on other classes than {dataset.path}: {there!r} there, "
                    f"{here!r} here"
                )


def load_teacher(
    names: list[str],
    dataset: Dataset,
    size_px: int,
    device: str,
    precision: Precision,
    *,
    unlabeled: bool = False,
) -> Teacher:
    """The teacher of these names, checked to have the data's classes unless they are others."""
    from kdcache.models import load

    classes = None if unlabeled else len(dataset.class_names)
    for name in names:
        own_px = load.natural_size_px(name)
        if own_px not in (None, size_px):
            notice(f"{name} was made for views of {own_px} px and is shown {size_px} px")
    try:
        for name in names if classes else ():
            require_classes(name, dataset)
        return load.load_teacher(
            names, num_classes=classes, size_px=size_px, device=device, precision=precision
        )
    except UsageError as error:
        if classes is None or " classes" not in str(error):
            raise
        raise UsageError(
            f"{error}; where the data is of another domain than the teacher's, give --unlabeled"
        ) from error


def teacher_and_spec(
    dataset: Dataset,
    teachers: list[str],
    given: dict[str, Any],
    device: str,
    precision: Precision,
    *,
    num_views: int,
    top_k: str | None,
    dtype: ValueType,
    row_order: RowOrder | None,
    num_averaged_views: int,
    sampled: int,
    temperature: float,
    setting: str | None = None,
    unlabeled: bool = False,
) -> tuple[Teacher, CacheSpec]:
    """What precompute records, from its options; `given` are those of the view."""
    from kdcache.models import load
    from kdcache.teacher import precompute

    natural_px = load.natural_size_px(teachers[0]) or dataset.natural_size_px
    if setting is not None:
        view, row_order, num_averaged_views = get_setting(setting).cache_fields(
            given,
            natural_px,
            num_views=num_views,
            row_order=row_order,
            num_averaged_views=num_averaged_views,
        )
    else:
        row_order = "dataset" if num_averaged_views else row_order or "view"
        view = make_view_spec(
            {"mixup": 0, **given} if row_order == "dataset" else given, natural_px
        )
    if sampled and (top_k is not None or num_averaged_views):
        raise UsageError("--num-draws goes without --top-k and --average")
    if temperature != 1 and not sampled:
        raise UsageError("only draws have a temperature: give --num-draws, or no --temperature")
    model = load_teacher(teachers, dataset, view.size_px, device, precision, unlabeled=unlabeled)
    codec: RecordCodec
    if sampled:
        codec = Sampled(sampled, temperature)
    else:
        codec = choose_codec(model.num_classes, top_k_of(top_k, model.num_classes), dtype)
    return model, precompute.make_cache_spec(
        dataset,
        model,
        view,
        codec,
        num_views=num_views,
        row_order=row_order,
        num_averaged_views=num_averaged_views,
    )


def class_names_of(teachers: list[str]) -> tuple[str, ...]:
    """Of the classes that these teachers tell apart, where one of them says so; else empty."""
    from kdcache.models.run_json import read_run_json

    for name in teachers:
        if Path(name).is_dir():
            return tuple(read_run_json(Path(name)).get("class_names") or ())
    return ()


def rank() -> tuple[int, int]:
    """The number of this process, and of how many, where torchrun started it; else (0, 1)."""
    process = torchrun.current_process()
    return process.rank, process.world_size


def device_of(name: str | None) -> str:
    """Checked to work; the processes that torchrun starts on a machine share its GPUs out."""
    import torch

    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and torch.cuda.is_available() and rank() != (0, 1):
        return f"cuda:{torchrun.current_process().local_rank % torch.cuda.device_count()}"
    try:
        torch.zeros(1, device=name).cpu()
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device {name!r}: {str(error).splitlines()[0]}") from error
    return name


def describe(view: ViewSpec) -> str:
    area = (
        f"area {view.min_scale:g} to 1" if view.crop == "inception" else f"area {view.min_scale:g}"
    )
    flip = "flip" if view.flip else "no flip"
    mixup = f"mixup {view.mixup:g}" if view.mixup else "no mixup"
    return f"{view.size_px} px, {view.crop} crop ({area}), {flip}, {mixup}, seed {view.seed}"


def size_of(count: int) -> str:
    value = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


def show(answer: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(answer))
        return
    table = Table.grid(padding=(0, 2))
    for name, value in answer.items():
        table.add_row(name, Text(str(value), overflow="fold"))
    out_console.print(table)


def show_table(rows: list[list[str]]) -> None:
    """Text in columns under its first row; only the first column wraps."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="")
    for number, heading in enumerate(rows[0]):
        table.add_column(heading, no_wrap=number > 0)
    for row in rows[1:]:
        table.add_row(*map(Text, row))
    out_console.print(table)


class _Rate(ProgressColumn):
    def render(self, task: Any) -> Text:
        return Text(f"{task.speed or 0:,.0f} {task.fields['unit']}/s")


@contextmanager
def interruptible(last_words: Callable[[], str]) -> Iterator[Callable[[], None]]:
    """Ctrl-C ends the command where the value is called next, or after some seconds.

    Raised at once it may meet a destructor or a callback, where Python prints it and goes on.
    """
    came = False

    def note(number: int, frame: object) -> None:
        nonlocal came
        came = True
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second one does not wait
        signal.signal(signal.SIGALRM, signal.default_int_handler)
        signal.setitimer(signal.ITIMER_REAL, PATIENCE_S)

    def check() -> None:
        if came:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, note)
    try:
        yield check
    except KeyboardInterrupt:
        if came:
            signal.setitimer(signal.ITIMER_REAL, 0)
        if rank()[0] == 0:
            err_console.print(f"kdcache: {last_words()}", markup=False, soft_wrap=True)
        raise typer.Exit(130) from None
    finally:
        if came:
            signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGINT, before)


def stopped(out: str) -> str:
    """The last words of a command that was making a cache."""
    from kdcache.cache.cache import LogitCache

    try:
        cache = LogitCache.open(out)
        left, whole = len(cache.missing()), len(cache.shards())
    except KDCacheError:
        return f"stopped before the cache {out} was begun"
    done = f"{whole - left} of {whole} shards on {out}"
    return f"stopped with {done}; the same command goes on from there"


def notice(line: str) -> None:
    """A line on stderr, from the first process only."""
    if rank()[0] == 0:
        err_console.print(f"kdcache: {line}", markup=False, soft_wrap=True)


def percentages(evaluation: dict[str, Any] | None) -> dict[str, str]:
    """The figures of an evaluation, by what they are called, as text."""
    if evaluation is None:
        return {}
    shares = {
        "top-1": "top1",
        "top-5": "top5",
        "teacher's top-1": "teacher_top1",
        "agreement": "agreement",
        "agreement at 5": "agreement5",
        "calibration error": "calibration_error",
    }
    numbers = {
        "KL(teacher||model)": "kl",
        "distance of logits": "euclidean",
        "CKA of features": "cka",
    }
    known = {name: value for name, value in evaluation.items() if value is not None}
    return {
        **{name: f"{known[key]:.2%}" for name, key in shares.items() if key in known},
        **{name: f"{known[key]:.4f}" for name, key in numbers.items() if key in known},
    }


@contextmanager
def progress_bar(name: str, total: int, unit: str, done: int = 0) -> Iterator[Any]:
    """A bar on stderr with rate and time left; the value is called with (done, note)."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        _Rate(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    silent = not err_console.is_terminal or rank()[0] > 0
    with Progress(*columns, console=err_console, transient=True, disable=silent) as progress:
        task = progress.add_task(name, total=total, completed=done, unit=unit, note="")

        def update(done: int, note: str = "") -> None:
            progress.update(task, completed=done, note=note)

        yield update
