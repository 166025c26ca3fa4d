"""The commands before a cache and beside it: plan, export, import. `cli` puts them into the app.

Heavy modules are imported in the commands that use them.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from kdcache.cli.output import (
    AreaOption,
    AverageOption,
    BatchOption,
    CropOption,
    DataOption,
    DeviceOption,
    DrawTemperatureOption,
    DtypeOption,
    FlipOption,
    JsonOption,
    MixupOption,
    NumDrawsOption,
    OrderOption,
    PrecisionOption,
    SettingOption,
    SizeOption,
    TeacherOption,
    TopKOption,
    UnlabeledOption,
    ViewSeedOption,
    ViewsOption,
    WorkersOption,
    describe,
    device_of,
    err_console,
    given_view,
    interruptible,
    out_console,
    progress_bar,
    show,
    size_of,
    stopped,
    teacher_and_spec,
)
from kdcache.errors import UsageError

if TYPE_CHECKING:
    from kdcache.cache.cache import LogitCache
    from kdcache.data.beton import Dataset
    from kdcache.training.planning import Comparison

STUDENTS = (1, 2, 5, 10, 50)
CHECKED_RECORDS = 65_536

CacheArgument = Annotated[str, typer.Argument(metavar="C.zarr", show_default=False)]


def plan(
    data: DataOption,
    teacher: TeacherOption,
    setting: SettingOption = None,
    unlabeled: UnlabeledOption = False,
    views: ViewsOption = 1,
    top_k: TopKOption = None,
    dtype: DtypeOption = "float16",
    row_order: OrderOption = None,
    average_views: AverageOption = 0,
    num_draws: NumDrawsOption = 0,
    temperature: DrawTemperatureOption = 1.0,
    out: Annotated[
        str | None, typer.Option(help="Where the cache would lie: is there room for it?")
    ] = None,
    student: Annotated[
        str | None, typer.Option(help="A model to train: when is a cache faster than online?")
    ] = None,
    students: Annotated[
        int | None,
        typer.Option(min=1, help="How many to train.  [default: a table of 1, 2, 5, 10, 50]"),
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Of each student.  [default: one for each view]")
    ] = None,
    view_seed: ViewSeedOption = None,
    size: SizeOption = None,
    crop: CropOption = None,
    min_scale: AreaOption = None,
    flip: FlipOption = None,
    mixup: MixupOption = None,
    precision: PrecisionOption = "float32",
    batch_size: BatchOption = 256,
    workers: WorkersOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say what a cache will take and when it pays, from some seconds of measuring here."""
    from kdcache.data import beton as datasets
    from kdcache.models import load
    from kdcache.training import planning

    if student is None and (students or epochs):
        raise UsageError("--students and --epochs go with --student MODEL")
    start = time.perf_counter()
    dataset = datasets.open_dataset(data)
    where = device_of(device)
    model, spec = teacher_and_spec(
        dataset,
        teacher,
        given_view(view_seed, size, crop, min_scale, flip, mixup),
        where,
        precision,
        num_views=views,
        top_k=top_k,
        dtype=dtype,
        row_order=row_order,
        num_averaged_views=average_views,
        sampled=num_draws,
        temperature=temperature,
        setting=setting,
        unlabeled=unlabeled,
    )
    assert spec.view_spec is not None
    machine: Any = {"batch_size": batch_size, "workers": workers}
    network = None
    if student:
        network = load.load_model(
            student,
            "student",
            num_classes=spec.num_classes,
            size_px=spec.view_spec.size_px,
            device=where,
        )
    measured = planning.record_some(dataset, model, spec, **machine)
    found = planning.make_plan(spec, measured)
    free = planning.free_bytes(out) if out else None
    rate, length = 1 / measured.seconds, epochs or spec.num_averaged_views or views
    answer: dict[str, Any] = {
        "spec": spec.to_json(),
        **asdict(found),
        "records_per_s": rate,
        "free_bytes": free,
        "records_measured": len(measured.records),
    }
    kept = (
        f"{spec.num_averaged_views} views averaged"
        if spec.num_averaged_views
        else f"{views} view{'s' * (views > 1)}"
    )
    lines = {
        "cache": f"{size_of(found.bytes)}: {kept} of {spec.num_samples} samples, "
        f"{found.bytes_per_record:.1f} bytes a record ({spec.record_bytes} uncompressed)",
        "view": describe(spec.view_spec),
        "objects": f"{found.objects}, in {found.shards} shard{'s' * (found.shards > 1)}",
        "teacher": f"{_hours(found.hours)} on {where}, {rate:,.0f} records/s",
        "writing": f"{size_of(round(found.bytes / found.hours / 3600))}/s; packing takes "
        f"{found.packing_hours / found.hours:.1%} of that time, beside the teacher",
    }
    rows: list[Comparison] = []
    if network:
        steps = planning.train_some(dataset, model, network, spec, measured, **machine)
        even = planning.break_even(spec, measured, steps)
        counts = [students] if students else STUDENTS
        rows = [planning.compare(spec, found, steps, students=n, epochs=length) for n in counts]
        answer |= {
            **asdict(steps),
            "epochs": length,
            "hours_of_students": [asdict(row) for row in rows],
            "break_even_epochs": even if math.isfinite(even) else None,
        }
        lines |= {
            "student": f"{steps.cached_s * 1e3:.3g} ms an image from the cache, "
            f"{steps.online_s * 1e3:.3g} ms online",
            "faster if": _pays(even, length),
        }
    if free is not None:
        lines["room"] = f"{size_of(free)} free at {out}"
    lines["measured"] = (
        f"{len(measured.records)} records packed, {time.perf_counter() - start:.0f} s in all: "
        "estimates, on this machine as busy as it was"
    )
    if free is not None and free < found.bytes:
        err_console.print(
            f"kdcache: {out} has room for {size_of(free)}, the cache takes {size_of(found.bytes)}: "
            "use fewer --views, a smaller --top-k, --dtype uint8, or another disk",
            markup=False,
            soft_wrap=True,
            style="yellow",
        )
    show(answer if as_json else lines, as_json)
    if rows and not as_json:
        out_console.print(_table(rows, length))


def _pays(even: float, epochs: int) -> str:
    if not math.isfinite(even):
        return (
            "never: a step took no longer with the teacher than without it, so it is cheap beside "
            "the student, or this machine is too busy to tell"
        )
    least = math.floor(even / epochs) + 1
    some = f"{least} student{'s' * (least > 1)} of {epochs} epoch{'s' * (epochs > 1)}"
    return f"students x epochs > {even:.3g}: from {some} on"


def _table(rows: list[Comparison], epochs: int) -> Table:
    table = Table(f"students of {epochs} epochs", "from a cache", "online", "saved")
    for column in table.columns:
        column.justify = "right"
    for row in rows:
        saved = f"{1 - row.cached / row.online:.0%}"
        table.add_row(f"{row.students}", _hours(row.cached), _hours(row.online), saved)
    return table


def _hours(hours: float) -> str:
    if hours < 1 / 60:
        return f"{hours * 3600:.3g} s"
    return f"{hours * 60:.3g} min" if hours < 1 else f"{hours:,.3g} h"


def export(
    path: CacheArgument,
    out: Annotated[Path, typer.Argument(metavar="OUT_DIR", show_default=False)],
    top_k: Annotated[
        int | None,
        typer.Option(help="Classes to write.  [default: the cache's; of a cache of all, 100]"),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write a cache's answers as TinyViT saves them: a folder for each view."""
    from kdcache.cache.cache import LogitCache
    from kdcache.interop import tinyvit

    start = time.perf_counter()
    cache = LogitCache.open(path)
    spec = cache.spec
    k = tinyvit.exported_top_k(spec, top_k)
    with progress_bar("export", spec.num_views * spec.num_samples, "records") as update:
        written = tinyvit.export(cache, out, k, update)
    answer = {
        "path": str(out),
        "epochs": spec.num_views,
        "samples": spec.num_samples,
        "top_k": k,
        "bytes": written,
        "seconds": round(time.perf_counter() - start, 2),
    }
    show(answer, as_json)


def import_cache(
    folder: Annotated[Path, typer.Argument(metavar="DIR", show_default=False)],
    out: Annotated[str, typer.Argument(metavar="OUT.zarr", show_default=False)],
    data: DataOption,
    average_epochs: Annotated[
        bool, typer.Option("--average-epochs", help="Keep one view: the mean of all epochs.")
    ] = False,
    names: Annotated[
        Path | None,
        typer.Option(
            help="A file with the key of each sample, one a line.  [default: keys are indices]"
        ),
    ] = None,
    dtype: DtypeOption = "float16",
    as_json: JsonOption = False,
) -> None:
    """Make a cache of logits that TinyViT has saved, in sample order: a view for each epoch."""
    start = time.perf_counter()
    with interruptible(lambda: stopped(out)) as check:
        from kdcache.data import beton as datasets
        from kdcache.interop import tinyvit, tinyvit_reader

        dataset = datasets.open_dataset(data)
        known = _lines(names) if names else None
        with progress_bar("check", len(dataset), "records of an epoch") as update:

            def checking(done: int) -> None:
                check()
                update(done % len(dataset), f"{done:,} records")

            saved = tinyvit_reader.open_saved(folder, dataset, known, checking)
        spec = tinyvit.make_cache_spec(saved, dataset, dtype=dtype, average=average_epochs)
        total = spec.num_views * spec.num_samples
        with progress_bar("import", total, "records") as update:

            def importing(done: int) -> None:
                check()
                update(done)

            cache = tinyvit.import_cache(saved, dataset, spec, out, importing)
    accuracy = _accuracy(cache, dataset)
    stored = cache.stored_bytes()
    answer = {
        "path": out,
        "views": spec.num_views,
        "samples": spec.num_samples,
        "record": spec.codec.describe(spec.num_classes),
        "bytes": stored,
        "bytes_per_record": round(stored / total, 2),
        "accuracy": round(accuracy, 4),
        "seconds": round(time.perf_counter() - start, 2),
    }
    if accuracy * len(dataset.class_names) < 2:
        err_console.print(
            f"kdcache: the first class of an answer is the label for {accuracy:.1%} of the "
            f"samples, hardly more than by chance: the keys may count the images of {data} in "
            "another order, or the classes",
            markup=False,
            soft_wrap=True,
            style="yellow",
        )
    show(answer, as_json)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {path}: {error}") from error


def _accuracy(cache: LogitCache, dataset: Dataset) -> float:
    """How often the first class of an answer is the label, over records spread over view 0."""
    from kdcache.batch import Target

    step, right, seen = -(-cache.spec.num_samples // CHECKED_RECORDS), 0, 0
    for shard in range(cache.shards_per_view):
        target = cache.decode(cache.read_shard(0, shard)[::step])
        assert isinstance(target, Target)
        first = target.logits_BK.argmax(1)
        if target.class_ids_BK is not None:
            first = target.class_ids_BK.gather(1, first[:, None])[:, 0]
        labels = dataset.labels[slice(*cache.shard_range(shard))][::step]
        right += int((first.numpy() == labels).sum())
        seen += len(labels)
    return right / seen
