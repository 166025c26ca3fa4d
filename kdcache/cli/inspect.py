"""The commands that look at a tape: inspect, verify. `cli` puts them into the app.

Heavy modules are imported in the commands that use them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kdcache.cache.setting import cache_setting_name
from kdcache.cli.output import (
    BatchOption,
    DeviceOption,
    JsonOption,
    PrecisionOption,
    WorkersOption,
    describe,
    device_of,
    out_console,
    progress_bar,
    show,
    show_table,
    size_of,
)
from kdcache.errors import CacheCorrupt, UsageError
from kdcache.spec import Precision

if TYPE_CHECKING:
    from kdcache.cache.cache import LogitCache
    from kdcache.cache.summary import Distribution, Entry, Summary
    from kdcache.cache.verify import Fault, Picked
    from kdcache.data.beton import Dataset
    from kdcache.teacher.recompute import Measure

SHOWN_CLASSES = 10

TapeArgument = Annotated[str, typer.Argument(metavar="C.zarr", show_default=False)]


def inspect(
    cache: TapeArgument,
    data: Annotated[
        Path | None,
        typer.Option(help="The data of the tape: for the teacher's accuracy, and for --draw."),
    ] = None,
    sample: Annotated[
        int | None, typer.Option(help="Show one record: the answer to this sample.")
    ] = None,
    view: Annotated[int | None, typer.Option(help="The view of --sample.  [default: 0]")] = None,
    draw: Annotated[
        Path | None, typer.Option(help="A PNG to draw the view of --sample in.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Say what a tape is, how complete, and what the teacher answered, in all or to one view."""
    from kdcache.cache import summary as summaries
    from kdcache.cache.cache import LogitCache

    if sample is None and (view is not None or draw is not None):
        raise UsageError("--view and --draw go with --sample")
    if draw is not None and data is None:
        raise UsageError("--draw needs --data, to render the view")
    tape = LogitCache.open(cache)
    dataset = _data_of(tape, data) if data else None
    # Its classes are the teacher's.
    known = None if tape.info.get("other_domain") else dataset
    if sample is not None:
        found = summaries.entry(tape, sample, view or 0, known.classes if known else None)
        if draw is not None:
            from kdcache.cli import plots

            assert dataset is not None
            plots.draw_views(tape, dataset, draw, samples=[sample], views=[view or 0])
        drawn = {"picture": str(draw)} if draw else {}
        show({**asdict(found), **drawn} if as_json else {**_entry(found), **drawn}, as_json)
        return
    summary = summaries.summarise(tape, known.labels if known else None)
    if as_json:
        spec = tape.spec.to_json()
        show({"spec": spec, "info": tape.info, "summary": asdict(summary)}, True)
    else:
        show(_summary(tape, summary), False)


def _data_of(tape: LogitCache, data: Path) -> Dataset:
    from kdcache.data import beton as datasets

    dataset = datasets.open_dataset(data)
    tape.require_plays(dataset.fingerprint, tape.spec.view)
    return dataset


def _summary(tape: LogitCache, summary: Summary) -> dict[str, str]:
    from kdcache.cache import layout
    from kdcache.cache import summary as summaries

    spec = tape.spec
    some = f"top {spec.top_k} of {spec.classes} classes and the tail"
    kept = f"{'all classes' if spec.dense else some}, {spec.dtype}"
    if spec.draws:
        kept = f"{spec.draws} draws at T = {spec.temperature:g}"
    if spec.order == "sample":
        kept += f", mean of {spec.average} views" if spec.average else ""
        kept += ", in sample order"
    answer = {
        "tape": f"{tape.url} (version {spec.version}, {spec.digest})",
        "teacher": f"{tape.info['teacher']} ({spec.teacher}), {spec.classes} classes",
        "data": f"{spec.samples} samples ({spec.dataset})",
        "set-up": cache_setting_name(spec),
        "view": describe(spec.view) if spec.view else "not of kdcache's making",
        "record": f"{kept}, {layout.record_bytes(spec)} bytes before compression",
        "complete": f"{summary.views_complete} of {spec.views} views, "
        f"{summary.shards - summary.shards_missing} of {summary.shards} shards",
    }
    if summary.missing:
        answer["coverage"] = summaries.coverage(tape, summary.missing)
    answer["size"] = size_of(summary.stored_bytes)
    if summary.bytes_per_record:
        view_bytes = size_of(round(summary.bytes_per_record * spec.samples))
        answer["size"] += f", {summary.bytes_per_record:.1f} bytes a record, {view_bytes} a view"
    if summary.entropy and summary.largest_probability and summary.tail_mass:
        answer |= {
            "answers": f"{summary.rows} records, T = {summary.temperature:g}: mean; p5, p25, p50, "
            "p75, p95",
            "entropy": _quantiles(summary.entropy, "{:.3f}") + " nats",
            "largest": _quantiles(summary.largest_probability, "{:.1%}") + " for the first class",
        }
        if not spec.dense and not spec.draws:
            answer["tail mass"] = _quantiles(summary.tail_mass, "{:.2%}") + " for all not kept"
    if summary.accuracy:
        answer["accuracy"] = f"{summary.accuracy.own:.1%} name the sample's own class first"
        if summary.accuracy.partner is not None:
            answer["accuracy"] += (
                f" (at least half of a mixed view), {summary.accuracy.partner:.1%} its partner's"
            )
    return answer


def _quantiles(found: Distribution, form: str) -> str:
    quantiles = (found.p5, found.p25, found.p50, found.p75, found.p95)
    return f"{form.format(found.mean)}; {', '.join(map(form.format, quantiles))}"


def _entry(entry: Entry) -> dict[str, str]:
    mixed = f", with {entry.weight:.0%} of sample {entry.partner}" if entry.weight else ""
    shown = list(zip(entry.names, entry.classes, entry.probabilities, strict=True))
    left = sum(p for _, _, p in shown[SHOWN_CLASSES:])
    answer = {
        "record": f"view {entry.view}, position {entry.position}",
        "sample": f"{entry.sample}{mixed}",
        "entropy": f"{entry.entropy:.3f} nats at T = {entry.temperature:g}",
    }
    answer |= {f"{name} ({c})": f"{p:.2%}" for name, c, p in shown[:SHOWN_CLASSES]}
    if shown[SHOWN_CLASSES:]:
        answer[f"{len(shown) - SHOWN_CLASSES} more"] = f"{left:.2%}"
    answer["classes not kept"] = f"{entry.tail:.2%}"
    return answer


def verify(
    cache: TapeArgument,
    data: Annotated[
        Path | None, typer.Option(help="The data of the tape, with --teacher: recompute records.")
    ] = None,
    teacher: Annotated[
        list[str] | None,
        typer.Option(help="The teacher of the tape; each, in order, where there are several."),
    ] = None,
    samples: Annotated[
        int, typer.Option(min=1, help="How many records to recompute, spread over the tape.")
    ] = 512,
    discard: Annotated[
        bool, typer.Option("--discard", help="Take damaged shards off the tape.")
    ] = False,
    precision: PrecisionOption = "float32",
    batch_size: BatchOption = 256,
    workers: WorkersOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check every shard of a tape, and a sample of its records against the teacher.

    The exit code is 0 where all is there and right, and 1 where it is not.
    """
    from kdcache.cache import summary as summaries
    from kdcache.cache import verify as verification
    from kdcache.cache.cache import LogitCache

    if (data is None) == bool(teacher):
        raise UsageError("--data and --teacher go together: both, or neither for the shards alone")
    try:
        tape = LogitCache.open(cache)
    except CacheCorrupt as error:
        show({"path": cache, "ok": False, "manifest": str(error)}, as_json)
        raise typer.Exit(1) from None
    wanted, check = {}, None
    if data and teacher:
        check = _recomputation(tape, data, teacher, precision, batch_size, workers, device)
        wanted = verification.sample(tape.spec, samples)
    rows = tape.spec.views * tape.spec.samples
    with progress_bar("verify", rows, "records") as update:
        faults, picked = verification.read(tape, wanted, update)
    measures = check(picked) if check else []
    discarded = [fault for fault in faults if fault.kind == "damaged"] if discard else []
    for fault in discarded:
        tape.discard(fault.view, fault.shard)
    ok = not faults and all(measure.ok for measure in measures)
    if as_json:
        absent = summaries.gaps((f.view, f.shard) for f in faults if f.kind == "missing")
        show(
            {
                "path": cache,
                "ok": ok,
                "shards": len(tape.places()),
                "missing": [asdict(gap) for gap in absent],
                "faults": [asdict(f) for f in faults if f.kind != "missing"],
                "discarded": len(discarded),
                "records": sum(len(p.rows_B) for p in picked),
                "measures": [asdict(measure) for measure in measures],
            },
            True,
        )
    else:
        _show_verdict(tape, faults, measures, discarded=bool(discarded))
    if not ok:
        raise typer.Exit(1)


def _recomputation(
    tape: LogitCache,
    data: Path,
    teachers: list[str],
    precision: Precision,
    batch_size: int,
    workers: int | None,
    device: str | None,
) -> Callable[[list[Picked]], list[Measure]]:
    """What recomputes records, its arguments checked before the tape is read."""
    from kdcache.data import beton as datasets
    from kdcache.models import load
    from kdcache.teacher import recompute

    recompute.require_recomputable(tape)
    spec = tape.spec
    assert spec.view is not None
    dataset = datasets.open_dataset(data)
    model = load.load_teacher(
        teachers,
        num_classes=spec.classes,
        size_px=spec.view.size_px,
        device=device_of(device),
        precision=precision,
    )
    measures = recompute.identify(tape, dataset, model)

    def check(picked: list[Picked]) -> list[Measure]:
        if len(dataset) != spec.samples:
            return measures
        count = sum(len(some.rows_B) for some in picked)
        with progress_bar("recompute", count, "records") as update:
            return measures + recompute.recompute(
                tape,
                dataset,
                model,
                picked,
                batch_size=batch_size,
                workers=workers,
                progress=update,
            )

    return check


def _show_verdict(
    tape: LogitCache, faults: list[Fault], measures: list[Measure], *, discarded: bool
) -> None:
    from kdcache.cache import summary as summaries

    whole, absent = len(tape.places()), [f for f in faults if f.kind == "missing"]
    answer = {"tape": tape.url, "shards": f"{whole - len(faults)} of {whole} are there and right"}
    if absent:
        gaps = summaries.gaps((fault.view, fault.shard) for fault in absent)
        answer["missing"] = summaries.coverage(tape, gaps)
    show(answer, False)
    bad = [fault for fault in faults if fault.kind != "missing"]
    for fault in bad:
        gone = ", and now discarded" if discarded and fault.kind == "damaged" else ""
        line = f"view {fault.view} shard {fault.shard} is {fault.kind}{gone}: {fault.reason}"
        out_console.print(line, markup=False, soft_wrap=True)
    if measures:
        rows = [
            [m.what, _bound(m, m.found), _bound(m, m.tolerance), "ok" if m.ok else "FAIL"]
            for m in measures
        ]
        show_table([["measure", "found", "allowed", "verdict"], *rows])
        for measure in measures:
            if measure.note:
                out_console.print(f"{measure.what}: {measure.note}", markup=False, soft_wrap=True)
    made = "`kdcache precompute`" if tape.spec.view else "`kdcache import`"
    if any(fault.kind == "damaged" for fault in bad) and not discarded:
        line = "`kdcache verify --discard` takes damaged shards off the tape; then run the same "
        out_console.print(f"{line}{made} again", markup=False, soft_wrap=True)
    elif absent or discarded:
        line = f"run the same {made} again: it makes what is missing"
        out_console.print(line, markup=False, soft_wrap=True)


def _bound(measure: Measure, value: float | str) -> str:
    if isinstance(value, str):
        return value
    return f"{value:.2%}" if measure.name in ("top1", "drawn") else f"{value:.3g}"
