"""The command line: parse, compose the library, print. Errors are one line and exit code 2.

Heavy modules are imported in the commands that use them, so `kdcache --help` is quick and works
without FFCV.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from kdcache import __version__
from kdcache.errors import KDCacheError, MissingDependency, TapeMismatch, UsageError
from kdcache.spec import Crop, Mode, OnError, Split, TapeSpec, ValueType, ViewSpec, evaluation_views

if TYPE_CHECKING:
    from kdcache.dataset import Dataset
    from kdcache.evaluate import Evaluation
    from kdcache.models import Classifier
    from kdcache.records import TargetSource
    from kdcache.tape import Tape

app = typer.Typer(
    help="Record a teacher's answers to deterministic views once; train any number of students.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
out_console = Console(highlight=False)
err_console = Console(stderr=True, highlight=False)


bench = typer.Typer(
    help="Measure on this machine, from a checkout.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(bench, name="bench")

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
    typer.Option("--size", help="Side of a view in px.  [default: the images' up to 64, else 224]"),
]
CropOption = Annotated[Crop | None, typer.Option(help="Kind of crop.  [default: inception]")]
AreaOption = Annotated[
    float | None,
    typer.Option(
        help="Smallest area of a crop as a share of the image; exact for random and center.  "
        "[default: 0.05; random and center 0.766]"
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


def main() -> None:
    """Entry point: the app, with our own errors as one line."""
    try:
        app()
    except KDCacheError as error:
        err_console.print(f"kdcache: {error}", markup=False, soft_wrap=True, style="red")
        sys.exit(2)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print(__version__)
        raise typer.Exit


@app.command()
def convert(
    source: Annotated[
        str,
        typer.Argument(
            help="A folder of class folders, fashion-mnist, digits, or torchvision:NAME.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT.beton", show_default=False)],
    split: Annotated[Split, typer.Option(help="Which part of the data set.")] = "train",
    max_side: Annotated[
        int | None, typer.Option(help="Shrink images whose longer side is above this many px.")
    ] = None,
    quality: Annotated[
        int, typer.Option(help="Of the JPEGs that must be made; others keep their bytes.")
    ] = 95,
    on_error: Annotated[OnError, typer.Option(help="What an unreadable image does.")] = "fail",
    as_json: JsonOption = False,
) -> None:
    """Turn images into a .beton file with a sidecar of checksums."""
    from kdcache import dataset, sources

    start = time.perf_counter()
    found = sources.open_source(source, split)
    with _progress("convert", len(found.images), "images") as update:
        data, skipped = dataset.convert(
            found, out, max_side_px=max_side, quality=quality,
            on_error=on_error, progress=update,
        )  # fmt: skip
    for line in skipped:
        err_console.print(f"skipped {line}", markup=False, soft_wrap=True)
    answer = {
        "path": str(out), "samples": len(data), "classes": len(data.classes),
        "skipped": len(skipped), "bytes": out.stat().st_size, "fingerprint": data.fingerprint,
        "seconds": round(time.perf_counter() - start, 2),
    }  # fmt: skip
    _print(answer, as_json)


@app.command()
def precompute(
    data: DataOption,
    teacher: Annotated[str, typer.Option(help="The model that answers.")],
    out: Annotated[Path, typer.Option(help="The tape to make or finish.")],
    views: Annotated[int, typer.Option(help="How many views of the data to record.")],
    top_k: Annotated[
        str | None,
        typer.Option(
            help="Classes to keep of an answer, or 'all'.  [default: 16, or all if fewer]"
        ),
    ] = None,
    dtype: Annotated[ValueType, typer.Option(help="How a logit is stored.")] = "float16",
    view_seed: ViewSeedOption = None,
    size: SizeOption = None,
    crop: CropOption = None,
    min_area: AreaOption = None,
    flip: FlipOption = None,
    mixup: MixupOption = None,
    batch_size: BatchOption = 256,
    workers: WorkersOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run the teacher over views of the data and store its answers on a tape."""
    from kdcache import dataset as datasets
    from kdcache import models
    from kdcache import precompute as recording

    start = time.perf_counter()
    dataset = datasets.open_dataset(data)
    k = _top_k(top_k, len(dataset.classes))
    given = _given_view(view_seed, size, crop, min_area, flip, mixup)
    view = _view_spec(given, dataset)
    _require_classes(teacher, dataset)
    model = models.load(
        teacher, "teacher", num_classes=len(dataset.classes), size_px=view.size_px,
        device=_device(device),
    )  # fmt: skip
    spec = recording.tape_spec(
        dataset, model, view, views=views, top_k=k, dtype=dtype
    )  # fmt: skip
    with _progress("precompute", views * len(dataset), "views") as update:
        tape = recording.precompute(
            dataset, model, spec, out, batch_size=batch_size, workers=workers, progress=update
        )
    seconds = time.perf_counter() - start
    rows = spec.views * spec.samples
    stored = tape.stored_bytes()
    answer = {
        "path": str(out), "views": spec.views, "samples": spec.samples,
        "top_k": "all" if spec.dense else spec.top_k, "dtype": spec.dtype,
        "bytes": stored, "bytes_per_record": round(stored / rows, 2), "seconds": round(seconds, 2),
    }  # fmt: skip
    _print(answer, as_json)


@app.command()
def train(
    mode: Annotated[Mode, typer.Option(help="Where the targets come from.")],
    data: DataOption,
    student: Annotated[str, typer.Option(help="The model to train.")],
    out: Annotated[Path, typer.Option(help="The run's folder; it must not exist.")],
    cache: Annotated[Path | None, typer.Option(help="The tape, for --mode cached.")] = None,
    teacher: Annotated[
        str | None,
        typer.Option(help="For --mode online; with --val also the judge of cached."),
    ] = None,
    val: Annotated[Path | None, typer.Option(help="A .beton file to measure accuracy on.")] = None,
    epochs: Annotated[int, typer.Option(help="Times through the data.")] = 10,
    batch_size: BatchOption = 256,
    lr: Annotated[float, typer.Option(help="Highest learning rate of AdamW.")] = 3e-3,
    weight_decay: Annotated[float, typer.Option(help="Decoupled, as in AdamW.")] = 1e-2,
    warmup: Annotated[float, typer.Option(help="Share of the steps with a rising rate.")] = 0.1,
    temperature: Annotated[float, typer.Option(help="T of the distillation loss.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the student's first weights.")] = 0,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="Equal runs give equal weights; slower.")
    ] = False,
    views: Annotated[
        int | None,
        typer.Option(
            min=1, help="Views to cycle through.  [default: the tape's; else one an epoch]"
        ),
    ] = None,
    view_seed: ViewSeedOption = None,
    size: SizeOption = None,
    crop: CropOption = None,
    min_area: AreaOption = None,
    flip: FlipOption = None,
    mixup: MixupOption = None,
    workers: WorkersOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train a student on labels, on a live teacher, or on a tape."""
    from kdcache import dataset as datasets
    from kdcache import evaluate, models
    from kdcache import train as training

    start = time.perf_counter()
    dataset = datasets.open_dataset(data)
    val_data = datasets.open_dataset(val) if val else None
    if val_data and val_data.classes != dataset.classes:
        raise UsageError(f"{val} has other classes than {data}")
    given = _given_view(view_seed, size, crop, min_area, flip, mixup)
    tape = _tape_for_training(mode, cache, teacher, dataset, given, views)
    spec = training.TrainSpec(
        mode=mode, view=tape.spec.view if tape else _view_spec(given, dataset),
        epochs=epochs, batch_size=batch_size, lr=lr, weight_decay=weight_decay, warmup=warmup,
        temperature=temperature, seed=seed, deterministic=deterministic,
        views=tape.spec.views if tape else views,
    )  # fmt: skip
    if mode == "labels" and temperature != 1:
        raise UsageError("--temperature goes with a teacher, not with --mode labels")
    training.set_determinism(spec)
    options: Any = {
        "num_classes": len(dataset.classes), "size_px": spec.view.size_px, "device": _device(device)
    }  # fmt: skip
    network = models.load(student, "student", **options)
    _require_classes(teacher, dataset)
    teacher_model = models.load(teacher, "teacher", **options) if teacher else None
    targets = _targets(tape, teacher_model, dataset, temperature)
    total = epochs * (len(dataset) // batch_size) * batch_size
    with training.Run(out) as run, _progress(f"train {mode}", total, "images") as update:

        def on_step(step: training.Step) -> None:
            run.log(asdict(step))
            update(step.step * batch_size, f"loss {step.loss:.3f}")

        training.train(spec, dataset, network, targets, workers=workers, on_step=on_step)
        seconds = time.perf_counter() - start
        result: Evaluation | None = None
        if val_data:
            result = evaluate.evaluate(
                network, val_data, size_px=spec.view.size_px, teacher=teacher_model, workers=workers
            )
        record = run.finish(
            spec, dataset, network, result,
            cache=str(cache) if cache else None, teacher=teacher, seconds=seconds,
        )  # fmt: skip
    answer = {
        "run": str(out), "student": network.name, "images_per_s": round(total / seconds),
        "seconds": round(seconds, 2), **_percentages(result),
    }  # fmt: skip
    _print({**record, **answer} if as_json else answer, as_json)


@app.command("eval")
def eval_command(
    model: Annotated[str, typer.Argument(help="A run's folder, or a model.", show_default=False)],
    data: DataOption,
    teacher: Annotated[str | None, typer.Option(help="Also measure closeness to it.")] = None,
    size: SizeOption = None,
    batch_size: BatchOption = 256,
    workers: WorkersOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure accuracy, and agreement with a teacher."""
    from kdcache import dataset as datasets
    from kdcache import evaluate, models

    dataset = datasets.open_dataset(data)
    is_run = Path(model).is_dir()
    if size is None and is_run:
        size = models.run_record(Path(model))["view"]["size_px"]
    size_px = dataset.natural_size_px if size is None else size
    evaluation_views(size_px)  # refuses a size that cannot be
    options: Any = {
        "num_classes": len(dataset.classes), "size_px": size_px, "device": _device(device)
    }  # fmt: skip
    _require_classes(model, dataset)
    network = models.load(model, "teacher", **options)
    _require_classes(teacher, dataset)
    teacher_model = models.load(teacher, "teacher", **options) if teacher else None
    with _progress("eval", len(dataset), "images") as update:
        result = evaluate.evaluate(
            network, dataset, size_px=size_px, teacher=teacher_model, batch_size=batch_size,
            workers=workers, progress=update,
        )  # fmt: skip
    if as_json:
        _print(asdict(result), True)
    else:
        _print({"model": model, "samples": result.samples, **_percentages(result)}, False)


@app.command()
def inspect(
    cache: Annotated[Path, typer.Argument(metavar="C.zarr", show_default=False)],
    as_json: JsonOption = False,
) -> None:
    """Say what a tape is, how complete, and what the teacher answered."""
    from kdcache import codec
    from kdcache import summary as summaries
    from kdcache.tape import Tape

    tape = Tape.open(cache)
    summary = summaries.summarise(tape)
    spec = tape.spec
    if as_json:
        _print({"spec": spec.to_json(), "info": tape.info, "summary": asdict(summary)}, True)
        return
    some = f"top {spec.top_k} of {spec.classes} classes and the tail"
    kept = "all classes" if spec.dense else some
    answer = {
        "tape": f"{cache} (version {spec.version}, {spec.digest})",
        "teacher": f"{tape.info['teacher']} ({spec.teacher}), {spec.classes} classes",
        "data": f"{spec.samples} samples ({spec.dataset})",
        "view": _describe(spec.view),
        "record": f"{kept}, {spec.dtype}, {codec.spec_record_bytes(spec)} bytes before compression",
        "complete": f"{summary.views_complete} of {spec.views} views, "
        f"{summary.shards - summary.shards_missing} of {summary.shards} shards",
        "size": _size(summary.stored_bytes),
    }
    if summary.bytes_per_record:
        view_bytes = _size(round(summary.bytes_per_record * spec.samples))
        answer["size"] += f", {summary.bytes_per_record:.1f} bytes a record, {view_bytes} a view"
    if summary.rows:
        answer |= {
            "entropy": f"{summary.entropy:.3f} nats (mean over {summary.rows} records, T = 1)",
            "largest": f"{summary.largest_probability:.1%} mean probability of the first class",
            "tail mass": f"{summary.tail_mass:.2%} mean probability of classes not kept",
        }
    _print(answer, False)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for all that the demo makes.")] = Path("demo"),
    epochs: Annotated[int, typer.Option(min=1, help="Epochs of every training.")] = 3,
) -> None:
    """Do the whole job on Fashion-MNIST: convert, teacher, tape, three students, one table."""
    from kdcache import demo as demonstration

    demonstration.run(out, epochs, lambda line: app(line, standalone_mode=False), out_console)


@bench.command("loss")
def bench_loss(
    shape: Annotated[
        list[str] | None,
        typer.Option(help="ROWSxCLASSES; may be given again.  [default: those of the docs]"),
    ] = None,
    rounds: Annotated[int, typer.Option(help="Interleaved measurements of each form.")] = 100,
    threads: Annotated[int, typer.Option(help="On the CPU.")] = 2,
    save: Annotated[bool, typer.Option("--save", help="Keep the result lines.")] = False,
) -> None:
    """Time of the distillation loss, forward and backward, against other ways to compute it."""
    try:
        from benchmarks.bench_loss import main as measure
    except ModuleNotFoundError as error:
        raise MissingDependency(
            f"no module {error.name!r}: benchmarks are not part of an installed kdcache; run this "
            "in a checkout's top folder, as python -m kdcache bench loss"
        ) from error
    arguments = ["--rounds", str(rounds), "--threads", str(threads), *["--save"] * save]
    for one in shape or ():
        if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", one):
            raise UsageError(f"--shape is ROWSxCLASSES, such as 512x1000, not {one!r}")
        arguments += ["--shape", one]
    measure(arguments)


def _given_view(
    view_seed: int | None, size: int | None, crop: Crop | None, min_area: float | None,
    flip: bool | None, mixup: float | None,
) -> dict[str, Any]:  # fmt: skip
    """The view options that were given, by their field in ViewSpec."""
    options = {
        "seed": view_seed, "size_px": size, "crop": crop,
        "min_area": min_area, "flip": flip, "mixup": mixup,
    }  # fmt: skip
    return {name: value for name, value in options.items() if value is not None}


def _view_spec(given: dict[str, Any], dataset: Dataset) -> ViewSpec:
    from kdcache.spec import MILD_AREA

    options = {"size_px": dataset.natural_size_px, **given}
    if options.get("crop") in ("random", "center"):
        options.setdefault("min_area", MILD_AREA)
    return ViewSpec(**options)


def _top_k(text: str | None, classes: int) -> int | None:
    """k as a number, or None for all."""
    if text is None:
        return min(16, classes)
    if text == "all":
        return None
    try:
        return int(text)
    except ValueError:
        raise UsageError(f"top-k must be a number or 'all', not {text!r}") from None


def _tape_for_training(
    mode: Mode, cache: Path | None, teacher: str | None, dataset: Dataset,
    given: dict[str, Any], views: int | None,
) -> Tape | None:  # fmt: skip
    """The tape of a cached run, checked against the data and the options; None in other modes."""
    from kdcache.tape import Tape

    if mode == "online" and teacher is None:
        raise UsageError("--mode online needs --teacher MODEL")
    if mode != "cached":
        if cache is not None:
            raise UsageError(f"--cache goes with --mode cached, not with --mode {mode}")
        if mode == "labels" and teacher is not None:
            raise UsageError("--teacher goes with --mode online or cached, not with --mode labels")
        return None
    if cache is None:
        raise UsageError("--mode cached needs --cache C.zarr")
    tape = Tape.open(cache)
    spec: TapeSpec = tape.spec
    if spec.classes != len(dataset.classes):
        raise TapeMismatch(
            f"{cache} has {spec.classes} classes, {dataset.path} has {len(dataset.classes)}"
        )
    tape.require_plays(dataset.fingerprint, replace(spec.view, **given))
    if views is not None and views != spec.views:
        raise TapeMismatch(f"{cache} has {spec.views} views, not {views}: leave --views out")
    return tape


def _targets(
    tape: Tape | None, teacher: Classifier | None, dataset: Dataset, temperature: float
) -> TargetSource:
    from kdcache import loss, targets

    if tape:
        loss.check_temperature(temperature, sparse=not tape.spec.dense)
        return targets.CachedTargets(tape, dataset.fingerprint, tape.spec.view)
    if teacher:
        return targets.OnlineTargets(teacher)
    return targets.LabelTargets(len(dataset.classes))


def _require_classes(model: str | None, dataset: Dataset) -> None:
    """A run that was trained on as many classes of other names or order would answer nonsense."""
    from kdcache import models

    if not model or not Path(model).is_dir():
        return
    trained = models.run_record(Path(model)).get("class_names")
    if trained is not None and len(trained) == len(dataset.classes):
        for there, here in zip(trained, dataset.classes, strict=True):
            if there != here:
                raise UsageError(
                    f"{model} was trained on other classes than {dataset.path}: {there!r} there, "
                    f"{here!r} here"
                )


def _device(name: str | None) -> str:
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).cpu()
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device {name!r}: {str(error).splitlines()[0]}") from error
    return name


def _percentages(result: Evaluation | None) -> dict[str, str]:
    if result is None:
        return {}
    shares = {"top-1": result.top1, "top-5": result.top5, "agreement": result.agreement}
    answer = {name: f"{share:.2%}" for name, share in shares.items() if share is not None}
    if result.kl is not None:
        answer["KL(teacher||model)"] = f"{result.kl:.4f}"
    return answer


def _describe(view: ViewSpec) -> str:
    area = f"area {view.min_area:g} to 1" if view.crop == "inception" else f"area {view.min_area:g}"
    flip = "flip" if view.flip else "no flip"
    mixup = f"mixup {view.mixup:g}" if view.mixup else "no mixup"
    return f"{view.size_px} px, {view.crop} crop ({area}), {flip}, {mixup}, seed {view.seed}"


def _size(count: int) -> str:
    value = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


def _print(answer: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(answer))
        return
    table = Table.grid(padding=(0, 2))
    for name, value in answer.items():
        table.add_row(name, Text(str(value), overflow="fold"))
    out_console.print(table)


class _Rate(ProgressColumn):
    def render(self, task: Any) -> Text:
        return Text(f"{task.speed or 0:,.0f} {task.fields['unit']}/s")


@contextmanager
def _progress(name: str, total: int, unit: str) -> Iterator[Any]:
    """A bar on stderr with rate and time left; the value is called with (done, note)."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"),
        _Rate(), TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
    )  # fmt: skip
    silent = not err_console.is_terminal
    with Progress(*columns, console=err_console, transient=True, disable=silent) as progress:
        task = progress.add_task(name, total=total, unit=unit, note="")

        def update(done: int, note: str = "") -> None:
            progress.update(task, completed=done, note=note)

        yield update
