"""The command line: parse, compose the library, print. Errors are one line and exit code 2.

Heavy modules are imported in the commands that use them, so `kdcache --help` is quick and works
without FFCV.
"""

from __future__ import annotations

import re
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kdcache import __version__, exchange_commands, inspect_commands, tape_commands
from kdcache.console import (
    AreaOption,
    BatchOption,
    CropOption,
    DataOption,
    DeviceOption,
    FlipOption,
    JsonOption,
    MixupOption,
    SizeOption,
    ViewSeedOption,
    WorkersOption,
    device_of,
    err_console,
    given_view,
    out_console,
    progress_bar,
    require_classes,
    show,
    view_of,
)
from kdcache.errors import KDCacheError, MissingDependency, TapeMismatch, UsageError
from kdcache.spec import Mode, OnError, Split, ViewSpec, evaluation_views

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
bench = typer.Typer(
    help="Measure on this machine, from a checkout.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(bench, name="bench")



def main() -> None:
    """Entry point: the app, with our own errors as one line."""
    try:
        app()
    except KDCacheError as error:
        err_console.print(f"kdcache: {error}", markup=False, soft_wrap=True, style="red")
        sys.exit(2)
    except KeyboardInterrupt:  # before there was a command
        sys.exit(130)


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
    with progress_bar("convert", len(found.images), "images") as update:
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
    show(answer, as_json)


app.command()(exchange_commands.plan)
app.command()(tape_commands.precompute)


@app.command()
def train(
    mode: Annotated[Mode, typer.Option(help="Where the targets come from.")],
    data: DataOption,
    student: Annotated[str, typer.Option(help="The model to train.")],
    out: Annotated[Path, typer.Option(help="The run's folder; it must not exist.")],
    cache: Annotated[str | None, typer.Option(help="The tape, for --mode cached.")] = None,
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
    given = given_view(view_seed, size, crop, min_area, flip, mixup)
    tape = _tape_for_training(mode, cache, teacher, dataset, given, views)
    same = tape is not None and tape.spec.order == "position"
    if tape and not same:
        given.setdefault("mixup", 0)
    view = tape.spec.view if tape and same else view_of(given, dataset)
    assert view is not None
    spec = training.TrainSpec(
        mode=mode, view=view,
        epochs=epochs, batch_size=batch_size, lr=lr, weight_decay=weight_decay, warmup=warmup,
        temperature=temperature, seed=seed, deterministic=deterministic,
        views=tape.spec.views if tape and same else views,
    )  # fmt: skip
    if mode == "labels" and temperature != 1:
        raise UsageError("--temperature goes with a teacher, not with --mode labels")
    training.set_determinism(spec)
    options: Any = {
        "num_classes": len(dataset.classes), "size_px": spec.view.size_px,
        "device": device_of(device),
    }  # fmt: skip
    network = models.load(student, "student", **options)
    require_classes(teacher, dataset)
    teacher_model = models.load(teacher, "teacher", **options) if teacher else None
    targets = _targets(tape, teacher_model, dataset, view, temperature)
    total = epochs * (len(dataset) // batch_size) * batch_size
    with training.Run(out) as run, progress_bar(f"train {mode}", total, "images") as update:

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
            cache=cache, teacher=teacher, seconds=seconds,
        )  # fmt: skip
    answer = {
        "run": str(out), "student": network.name, "images_per_s": round(total / seconds),
        "seconds": round(seconds, 2), **_percentages(result),
    }  # fmt: skip
    show({**record, **answer} if as_json else answer, as_json)


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
        "num_classes": len(dataset.classes), "size_px": size_px, "device": device_of(device)
    }  # fmt: skip
    require_classes(model, dataset)
    network = models.load(model, "teacher", **options)
    require_classes(teacher, dataset)
    teacher_model = models.load(teacher, "teacher", **options) if teacher else None
    with progress_bar("eval", len(dataset), "images") as update:
        result = evaluate.evaluate(
            network, dataset, size_px=size_px, teacher=teacher_model, batch_size=batch_size,
            workers=workers, progress=update,
        )  # fmt: skip
    if as_json:
        show(asdict(result), True)
    else:
        show({"model": model, "samples": result.samples, **_percentages(result)}, False)


app.command()(inspect_commands.inspect)
app.command()(inspect_commands.verify)
app.command()(exchange_commands.export)
app.command("import")(exchange_commands.import_tape)


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


def _tape_for_training(
    mode: Mode, cache: str | None, teacher: str | None, dataset: Dataset,
    given: dict[str, Any], views: int | None,
) -> Tape | None:  # fmt: skip
    """The tape of a cached run, checked against the data and the options; None in other modes."""
    from kdcache.loader import pixel_digest
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
    spec = tape.spec
    if spec.classes != len(dataset.classes):
        raise TapeMismatch(
            f"{cache} has {spec.classes} classes, {dataset.path} has {len(dataset.classes)}"
        )
    if spec.order == "sample":
        tape.require_plays(dataset.fingerprint, None)
        return tape
    assert spec.view is not None
    tape.require_plays(dataset.fingerprint, replace(spec.view, **given))
    tape.require_pixels(pixel_digest(dataset, spec.view))
    if views is not None and views != spec.views:
        raise TapeMismatch(f"{cache} has {spec.views} views, not {views}: leave --views out")
    return tape


def _targets(
    tape: Tape | None, teacher: Classifier | None, dataset: Dataset, view: ViewSpec,
    temperature: float,
) -> TargetSource:  # fmt: skip
    from kdcache import loss, targets

    if tape and tape.spec.draws:
        if temperature != tape.spec.temperature:
            raise UsageError(
                f"{tape.url} holds draws at T = {tape.spec.temperature:g}: train with "
                f"--temperature {tape.spec.temperature:g}, or precompute at {temperature:g}"
            )
    elif tape:
        loss.check_temperature(temperature, sparse=not tape.spec.dense)
    if tape and tape.spec.order == "sample":
        return targets.FixedTargets(tape, dataset.fingerprint, view)
    if tape:
        return targets.CachedTargets(tape, dataset.fingerprint, view)
    if teacher:
        return targets.OnlineTargets(teacher)
    return targets.LabelTargets(len(dataset.classes))


def _percentages(result: Evaluation | None) -> dict[str, str]:
    if result is None:
        return {}
    shares = {"top-1": result.top1, "top-5": result.top5, "agreement": result.agreement}
    answer = {name: f"{share:.2%}" for name, share in shares.items() if share is not None}
    if result.kl is not None:
        answer["KL(teacher||model)"] = f"{result.kl:.4f}"
    return answer


