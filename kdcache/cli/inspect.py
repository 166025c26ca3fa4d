"""The commands that look at a cache: inspect, verify. `cli` puts them into the app.

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

CacheArgument = Annotated[str, typer.Argument(metavar="C.zarr", show_default=False)]


def inspect(
    path: CacheArgument,
    data: Annotated[
        Path | None,
        typer.Option(help="The data of the cache: for the teacher's accuracy, and for --draw."),
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
    """Say what a cache is, how complete, and what the teacher answered, in all or to one view."""
    from kdcache.cache import summary as summaries
    from kdcache.cache.cache import LogitCache

    if sample is None and (view is not None or draw is not None):
        raise UsageError("--view and --draw go with --sample")
    if draw is not None and data is None:
        raise UsageError("--draw needs --data, to render the view")
    cache = LogitCache.open(path)
    dataset = _data_of(cache, data) if data else None
    # Its classes are the teacher's.
    known = None if cache.metadata.get("unlabeled") else dataset
    if sample is not None:
        found = summaries.entry(cache, sample, view or 0, known.class_names if known else None)
        if draw is not None:
            from kdcache.cli import plots

            assert dataset is not None
            plots.draw_views(cache, dataset, draw, samples=[sample], views=[view or 0])
        drawn = {"picture": str(draw)} if draw else {}
        show({**asdict(found), **drawn} if as_json else {**_entry(found), **drawn}, as_json)
        return
    summary = summaries.summarise(cache, known.labels if known else None)
    if as_json:
        spec = cache.spec.to_json()
        show({"spec": spec, "info": cache.metadata, "summary": asdict(summary)}, True)
    else:
        show(_summary(cache, summary), False)


def _data_of(cache: LogitCache, data: Path) -> Dataset:
    from kdcache.data import beton as datasets

    dataset = datasets.open_dataset(data)
    cache.require_compatible(dataset.content_hash, cache.spec.view_spec)
    return dataset


def _summary(cache: LogitCache, summary: Summary) -> dict[str, str]:
    from kdcache.cache import summary as summaries

    spec = cache.spec
    kept = spec.codec.describe(spec.num_classes)
    if spec.row_order == "dataset":
        kept += f", mean of {spec.num_averaged_views} views" if spec.num_averaged_views else ""
        kept += ", in sample order"
    answer = {
        "cache": f"{cache.url} (version {cache.manifest.version}, {cache.manifest.identity})",
        "teacher": f"{cache.metadata['teacher']} ({spec.teacher_hash}), {spec.num_classes} classes",
        "data": f"{spec.num_samples} samples ({spec.dataset_hash})",
        "setting": cache_setting_name(spec),
        "view": describe(spec.view_spec) if spec.view_spec else "not of kdcache's making",
        "record": f"{kept}, {spec.record_bytes} bytes before compression",
        "complete": f"{summary.views_complete} of {spec.num_views} views, "
        f"{summary.shards - summary.shards_missing} of {summary.shards} shards",
    }
    if summary.missing:
        answer["coverage"] = summaries.coverage(cache, summary.missing)
    answer["size"] = size_of(summary.stored_bytes)
    if summary.bytes_per_record:
        view_bytes = size_of(round(summary.bytes_per_record * spec.num_samples))
        answer["size"] += f", {summary.bytes_per_record:.1f} bytes a record, {view_bytes} a view"
    if summary.entropy and summary.largest_probability and summary.tail_mass:
        answer |= {
            "answers": f"{summary.rows} records, T = {summary.temperature:g}: mean; p5, p25, p50, "
            "p75, p95",
            "entropy": _quantiles(summary.entropy, "{:.3f}") + " nats",
            "largest": _quantiles(summary.largest_probability, "{:.1%}") + " for the first class",
        }
        if summary.tail_mass.p95 > 0:
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
    path: CacheArgument,
    data: Annotated[
        Path | None, typer.Option(help="The data of the cache, with --teacher: recompute records.")
    ] = None,
    teacher: Annotated[
        list[str] | None,
        typer.Option(help="The teacher of the cache; each, in order, where there are several."),
    ] = None,
    samples: Annotated[
        int, typer.Option(min=1, help="How many records to recompute, spread over the cache.")
    ] = 512,
    discard: Annotated[
        bool, typer.Option("--delete-damaged", help="Take damaged shards off the cache.")
    ] = False,
    precision: PrecisionOption = "float32",
    batch_size: BatchOption = 256,
    workers: WorkersOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check every shard of a cache, and a sample of its records against the teacher.

    The exit code is 0 where all is there and right, and 1 where it is not.
    """
    from kdcache.cache import summary as summaries
    from kdcache.cache import verify as verification
    from kdcache.cache.cache import LogitCache

    if (data is None) == bool(teacher):
        raise UsageError("--data and --teacher go together: both, or neither for the shards alone")
    try:
        cache = LogitCache.open(path)
    except CacheCorrupt as error:
        show({"path": path, "ok": False, "manifest": str(error)}, as_json)
        raise typer.Exit(1) from None
    wanted, check = {}, None
    if data and teacher:
        check = _recomputation(cache, data, teacher, precision, batch_size, workers, device)
        wanted = verification.sample(cache.spec, samples)
    rows = cache.spec.num_views * cache.spec.num_samples
    with progress_bar("verify", rows, "records") as update:
        faults, picked = verification.read(cache, wanted, update)
    measures = check(picked) if check else []
    discarded = [fault for fault in faults if fault.kind == "damaged"] if discard else []
    for fault in discarded:
        cache.delete_shard(fault.view, fault.shard)
    ok = not faults and all(measure.ok for measure in measures)
    if as_json:
        absent = summaries.gaps((f.view, f.shard) for f in faults if f.kind == "missing")
        show(
            {
                "path": path,
                "ok": ok,
                "shards": len(cache.shards()),
                "missing": [asdict(gap) for gap in absent],
                "faults": [asdict(f) for f in faults if f.kind != "missing"],
                "discarded": len(discarded),
                "records": sum(len(p.rows_B) for p in picked),
                "measures": [asdict(measure) for measure in measures],
            },
            True,
        )
    else:
        _show_verdict(cache, faults, measures, discarded=bool(discarded))
    if not ok:
        raise typer.Exit(1)


def _recomputation(
    cache: LogitCache,
    data: Path,
    teachers: list[str],
    precision: Precision,
    batch_size: int,
    workers: int | None,
    device: str | None,
) -> Callable[[list[Picked]], list[Measure]]:
    """What recomputes records, its arguments checked before the cache is read."""
    from kdcache.data import beton as datasets
    from kdcache.models import load
    from kdcache.teacher import recompute

    recompute.require_recomputable(cache)
    spec = cache.spec
    assert spec.view_spec is not None
    dataset = datasets.open_dataset(data)
    model = load.load_teacher(
        teachers,
        num_classes=spec.num_classes,
        size_px=spec.view_spec.size_px,
        device=device_of(device),
        precision=precision,
    )
    measures = recompute.identify(cache, dataset, model)

    def check(picked: list[Picked]) -> list[Measure]:
        if len(dataset) != spec.num_samples:
            return measures
        count = sum(len(some.rows_B) for some in picked)
        with progress_bar("recompute", count, "records") as update:
            return measures + recompute.recompute(
                cache,
                dataset,
                model,
                picked,
                batch_size=batch_size,
                workers=workers,
                progress=update,
            )

    return check


def _show_verdict(
    cache: LogitCache, faults: list[Fault], measures: list[Measure], *, discarded: bool
) -> None:
    from kdcache.cache import summary as summaries

    whole, absent = len(cache.shards()), [f for f in faults if f.kind == "missing"]
    answer = {"cache": cache.url, "shards": f"{whole - len(faults)} of {whole} are there and right"}
    if absent:
        gaps = summaries.gaps((fault.view, fault.shard) for fault in absent)
        answer["missing"] = summaries.coverage(cache, gaps)
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
    made = "`kdcache precompute`" if cache.spec.view_spec else "`kdcache import`"
    if any(fault.kind == "damaged" for fault in bad) and not discarded:
        line = "`kdcache verify --delete-damaged` takes damaged shards off the cache; then run the same "
        out_console.print(f"{line}{made} again", markup=False, soft_wrap=True)
    elif absent or discarded:
        line = f"run the same {made} again: it makes what is missing"
        out_console.print(line, markup=False, soft_wrap=True)


def _bound(measure: Measure, value: float | str) -> str:
    if isinstance(value, str):
        return value
    return f"{value:.2%}" if measure.name in ("top1", "drawn") else f"{value:.3g}"
