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
    BatchOption,
    CropOption,
    DataOption,
    DeviceOption,
    FlipOption,
    JsonOption,
    MixupOption,
    PrecisionOption,
    SizeOption,
    ViewSeedOption,
    WorkersOption,
    describe,
    device_of,
    err_console,
    given_view,
    progress_bar,
    require_classes,
    show,
    size_of,
    top_k_of,
    view_of,
)
from kdcache.errors import UsageError
from kdcache.spec import Order, ValueType


def precompute(
    data: DataOption,
    teacher: Annotated[str, typer.Option(help="The model that answers.")],
    out: Annotated[str, typer.Option(help="The tape to make or finish: a folder, or s3://...")],
    views: Annotated[int, typer.Option(help="How many views of the data to record.")] = 1,
    top_k: Annotated[
        str | None,
        typer.Option(
            help="Classes to keep of an answer, or 'all'.  [default: 16, or all if fewer]"
        ),
    ] = None,
    dtype: Annotated[ValueType, typer.Option(help="How a logit is stored.")] = "float16",
    order: Annotated[
        Order,
        typer.Option(
            help="position: for training on the same views; sample: for training on other views "
            "than the teacher saw, without mixing."
        ),
    ] = "position",
    average: Annotated[
        int,
        typer.Option(
            min=0, help="One record a sample: mean probabilities over this many views of it."
        ),
    ] = 0,
    sampled: Annotated[
        int, typer.Option(min=0, help="Keep this many random draws instead of the top k.")
    ] = 0,
    temperature: Annotated[float, typer.Option(help="T of the draws, for --sampled.")] = 1.0,
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
    from kdcache import models
    from kdcache import precompute as recording
    from kdcache.tape import Tape

    start = time.perf_counter()
    mine = _part(part)
    dataset = datasets.open_dataset(data)
    if sampled and (top_k is not None or average):
        raise UsageError("--sampled goes without --top-k and --average")
    k = top_k_of(top_k, len(dataset.classes))
    given = given_view(view_seed, size, crop, min_area, flip, mixup)
    if average:
        order = "sample"
    if order == "sample":
        given.setdefault("mixup", 0)
    view = view_of(given, dataset)
    require_classes(teacher, dataset)
    model = models.load(
        teacher, "teacher", num_classes=len(dataset.classes), size_px=view.size_px,
        device=device_of(device),
    )  # fmt: skip
    model.precision = precision
    spec = recording.tape_spec(
        dataset, model, view, views=views, top_k=k, dtype="uint8" if sampled else dtype,
        order=order, average=average, draws=sampled, temperature=temperature,
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
