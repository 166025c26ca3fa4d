"""The commands about tapes: parse, compose the library, print. `cli` puts them into the app.

Heavy modules are imported in the commands that use them.
"""

from __future__ import annotations

import os
import re
import time
from dataclasses import asdict
from typing import Annotated

import typer

from kdcache.console import (
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
    OrderOption,
    PrecisionOption,
    SampledOption,
    SizeOption,
    TeacherOption,
    TopKOption,
    ViewSeedOption,
    ViewsOption,
    WorkersOption,
    describe,
    device_of,
    err_console,
    given_view,
    progress_bar,
    show,
    size_of,
    teacher_and_spec,
)
from kdcache.errors import UsageError


def precompute(
    data: DataOption,
    teacher: TeacherOption,
    out: Annotated[str, typer.Option(help="The tape to make or finish: a folder, or s3://...")],
    views: ViewsOption = 1,
    top_k: TopKOption = None,
    dtype: DtypeOption = "float16",
    order: OrderOption = "position",
    average: AverageOption = 0,
    sampled: SampledOption = 0,
    temperature: DrawTemperatureOption = 1.0,
    view_seed: ViewSeedOption = None,
    size: SizeOption = None,
    crop: CropOption = None,
    min_area: AreaOption = None,
    flip: FlipOption = None,
    mixup: MixupOption = None,
    part: Annotated[
        str | None,
        typer.Option(
            help="i/n: do only the i-th of n parts; jobs for all n make the tape.  "
            "[default: all; under torchrun, the rank's]"
        ),
    ] = None,
    precision: PrecisionOption = "float32",
    batch_size: BatchOption = 256,
    workers: WorkersOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run the teacher over views of the data and store its answers on a tape."""
    from kdcache import dataset as datasets
    from kdcache import precompute as recording
    from kdcache.tape import Tape

    start = time.perf_counter()
    mine = _part(part)
    dataset = datasets.open_dataset(data)
    model, spec = teacher_and_spec(
        dataset, teacher, given_view(view_seed, size, crop, min_area, flip, mixup),
        device_of(device), precision, views=views, top_k=top_k, dtype=dtype, order=order,
        average=average, sampled=sampled, temperature=temperature,
    )  # fmt: skip
    rows = spec.views * spec.samples
    try:
        with progress_bar("precompute", rows, "records") as update:
            tape = recording.precompute(
                dataset, model, spec, out, batch_size=batch_size, workers=workers, part=mine,
                progress=update,
            )  # fmt: skip
    except KeyboardInterrupt:
        tape = Tape.open(out)
        left, whole = len(tape.missing()), len(tape.places())
        err_console.print(
            f"kdcache: stopped with {whole - left} of {whole} shards on {out}; the same command "
            "goes on from there", markup=False, soft_wrap=True,
        )  # fmt: skip
        raise typer.Exit(130) from None
    stored, missing = tape.stored_bytes(), tape.missing()
    answer = {
        "path": out, "views": spec.views, "samples": spec.samples,
        "top_k": "all" if spec.dense else spec.top_k, "dtype": spec.dtype,
        "bytes": stored, "bytes_per_record": None if missing else round(stored / rows, 2),
        "shards_missing": len(missing), "seconds": round(time.perf_counter() - start, 2),
    }  # fmt: skip
    show(answer, as_json)


def _part(text: str | None) -> tuple[int, int]:
    """(i, n), i from 0, of "i/n"; of torchrun's rank and world size where none is given."""
    if text is None:
        return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    found = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", text)
    if not found or int(found[1]) > int(found[2]):
        raise UsageError(f"--part is i/n with i from 1 to n, such as 1/4, not {text!r}")
    return int(found[1]) - 1, int(found[2])


def inspect(
    cache: Annotated[str, typer.Argument(metavar="C.zarr", show_default=False)],
    as_json: JsonOption = False,
) -> None:
    """Say what a tape is, how complete, and what the teacher answered."""
    from kdcache import shards
    from kdcache import summary as summaries
    from kdcache.tape import Tape

    tape = Tape.open(cache)
    summary = summaries.summarise(tape)
    spec = tape.spec
    if as_json:
        show({"spec": spec.to_json(), "info": tape.info, "summary": asdict(summary)}, True)
        return
    some = f"top {spec.top_k} of {spec.classes} classes and the tail"
    kept = f"{'all classes' if spec.dense else some}, {spec.dtype}"
    if spec.draws:
        kept = f"{spec.draws} draws at T = {spec.temperature:g}"
    if spec.order == "sample":
        kept += f", mean of {spec.average} views" if spec.average else ""
        kept += ", in sample order"
    answer = {
        "tape": f"{cache} (version {spec.version}, {spec.digest})",
        "teacher": f"{tape.info['teacher']} ({spec.teacher}), {spec.classes} classes",
        "data": f"{spec.samples} samples ({spec.dataset})",
        "view": describe(spec.view) if spec.view else "not of kdcache's making",
        "record": f"{kept}, {shards.record_bytes(spec)} bytes before compression",
        "complete": f"{summary.views_complete} of {spec.views} views, "
        f"{summary.shards - summary.shards_missing} of {summary.shards} shards",
        "size": size_of(summary.stored_bytes),
    }
    if summary.bytes_per_record:
        view_bytes = size_of(round(summary.bytes_per_record * spec.samples))
        answer["size"] += f", {summary.bytes_per_record:.1f} bytes a record, {view_bytes} a view"
    if summary.rows:
        answer |= {
            "entropy": f"{summary.entropy:.3f} nats (mean over {summary.rows} records, T = 1)",
            "largest": f"{summary.largest_probability:.1%} mean probability of the first class",
            "tail mass": f"{summary.tail_mass:.2%} mean probability of classes not kept",
        }
    show(answer, False)
