"""`kdcache inspect`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kdcache.cli.options import OutputOptions
from kdcache.cli.output import format_bytes, show
from kdcache.errors import UsageError
from kdcache.options import option
from kdcache.paths import require_cache, require_dataset

if TYPE_CHECKING:
    from kdcache.cache.cache import LogitCache
    from kdcache.cache.summary import Distribution, Entry, Summary
    from kdcache.data.beton import Dataset

SHOWN_CLASSES = 10


@dataclass(frozen=True, kw_only=True)
class InspectOptions:
    cache: str = option(
        name="C.zarr", help="The cache to describe.", positional=True, require=require_cache
    )
    data: Path | None = option(
        None,
        help="The data of the cache: for the teacher's accuracy, and for --draw.",
        metavar="DATA.beton",
        require=require_dataset,
    )
    sample: int | None = option(None, help="Show the record of this sample.", metavar="N")
    view: int | None = option(None, help="The view of --sample.", default_text="0", metavar="N")
    draw: Path | None = option(None, help="Draw the view of --sample as a PNG.", metavar="OUT.png")

    def __post_init__(self) -> None:
        if self.sample is None and (self.view is not None or self.draw is not None):
            raise UsageError("--view and --draw go with --sample")
        if self.draw is not None and self.data is None:
            raise UsageError("--draw needs --data, to render the view")


def inspect(options: InspectOptions, output: OutputOptions) -> None:
    """Describe a cache: content, completeness, statistics of its records; or show one record."""
    from kdcache.cache.cache import LogitCache
    from kdcache.cache.summary import summarise

    cache = LogitCache.open(options.cache)
    dataset = _open_data(cache, options.data) if options.data else None
    # The classes of unlabeled data are not the teacher's.
    labeled = None if cache.metadata.get("unlabeled") else dataset
    if options.sample is not None:
        _inspect_record(cache, dataset, labeled, options, output)
        return
    summary = summarise(cache, labeled.labels if labeled else None)
    if output.as_json:
        spec = cache.spec.to_json()
        show({"spec": spec, "info": cache.metadata, "summary": asdict(summary)}, True)
    else:
        show(_summary(cache, summary), False)


def _inspect_record(
    cache: LogitCache,
    dataset: Dataset | None,
    labeled: Dataset | None,
    options: InspectOptions,
    output: OutputOptions,
) -> None:
    from kdcache.cache.summary import entry

    assert options.sample is not None
    view, drawn = options.view or 0, {}
    record = entry(cache, options.sample, view, labeled.class_names if labeled else None)
    if options.draw is not None:
        from kdcache.cli import plots

        assert dataset is not None
        plots.draw_views(cache, dataset, options.draw, samples=[options.sample], views=[view])
        drawn = {"picture": str(options.draw)}
    text = asdict(record) if output.as_json else _entry(record)
    show({**text, **drawn}, output.as_json)


def _open_data(cache: LogitCache, data: Path) -> Dataset:
    from kdcache.data.beton import open_dataset

    dataset = open_dataset(data)
    cache.require_compatible(dataset.content_hash, cache.spec.view_spec)
    return dataset


def _summary(cache: LogitCache, summary: Summary) -> dict[str, str]:
    from kdcache.cache.setting import cache_setting_name
    from kdcache.cache.summary import coverage

    spec = cache.spec
    kept = spec.codec.describe(spec.num_classes)
    if spec.row_order == "dataset":
        kept += f", mean of {spec.num_averaged_views} views" if spec.num_averaged_views else ""
        kept += ", in dataset order"
    answer = {
        "cache": f"{cache.url} (version {cache.manifest.version}, {cache.manifest.identity})",
        "teacher": f"{cache.metadata.get('teacher', 'unknown')} ({spec.teacher_hash}), "
        f"{spec.num_classes} classes",
        "data": f"{spec.num_samples} samples ({spec.dataset_hash})",
        "setting": cache_setting_name(spec),
        "view": spec.view_spec.describe() if spec.view_spec else "not rendered by kdcache",
        "record": f"{kept}, {spec.record_bytes} bytes before compression",
        "complete": f"{summary.views_complete} of {spec.num_views} views, "
        f"{summary.shards - summary.shards_missing} of {summary.shards} shards",
    }
    if summary.missing:
        answer["coverage"] = coverage(cache, summary.missing)
    answer["size"] = format_bytes(summary.stored_bytes)
    if summary.bytes_per_record:
        view_bytes = format_bytes(round(summary.bytes_per_record * spec.num_samples))
        answer["size"] += f", {summary.bytes_per_record:.1f} bytes a record, {view_bytes} a view"
    if summary.entropy and summary.largest_probability and summary.tail_mass:
        answer |= {
            "records": f"{summary.rows} records, T = {summary.temperature:g}: mean; p5, p25, p50, "
            "p75, p95",
            "entropy": _quantiles(summary.entropy, "{:.3f}") + " nats",
            "largest": _quantiles(summary.largest_probability, "{:.1%}") + " for the first class",
        }
        if summary.tail_mass.p95 > 0:
            answer["tail mass"] = _quantiles(summary.tail_mass, "{:.2%}") + " for all not kept"
    if summary.accuracy:
        answer["accuracy"] = f"{summary.accuracy.own:.1%} at the sample's own class"
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
