"""`kdcache verify`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import typer

from kdcache.cli.options import OutputOptions
from kdcache.cli.output import format_table, progress_bar, show, show_lines
from kdcache.errors import CacheCorrupt
from kdcache.teacher.options import VerifyOptions

if TYPE_CHECKING:
    from kdcache.cache.cache import LogitCache
    from kdcache.cache.verify import Fault
    from kdcache.teacher.recompute import Measure


def verify(options: VerifyOptions, output: OutputOptions) -> None:
    """Check every shard of a cache, and some of its records against the teacher.

    The exit code is 0 if all is complete and valid, else 1.
    """
    from kdcache.cache import summary as summaries
    from kdcache.cache import verify as verification
    from kdcache.cache.cache import LogitCache

    try:
        cache = LogitCache.open(options.cache)
        cache.coder()  # reads its tables, without which no record can be checked
    except CacheCorrupt as error:
        show({"path": options.cache, "ok": False, "manifest": str(error)}, output.as_json)
        raise typer.Exit(1) from None
    recomputation = None
    if options.data is not None:
        from kdcache.teacher.load import load_recomputation

        recomputation = load_recomputation(cache, options)
    rows = cache.spec.num_views * cache.spec.num_samples
    with progress_bar("verify", rows, "records") as update:
        wanted = recomputation.rows if recomputation else {}
        faults, picked = verification.read(cache, wanted, update)
    measures: list[Measure] = []
    num_records = sum(len(some.rows_B) for some in picked)
    if recomputation:
        with progress_bar("recompute", num_records, "records") as update:
            measures = recomputation.measure(cache, picked, options, update)
    deleted = verification.delete_damaged(cache, faults) if options.delete_damaged else []
    ok = not faults and all(measure.ok for measure in measures)
    if output.as_json:
        absent = summaries.gaps((f.view, f.shard) for f in faults if f.kind == "missing")
        result = {
            "path": options.cache,
            "ok": ok,
            "shards": len(cache.shards()),
            "missing": [asdict(gap) for gap in absent],
            "faults": [asdict(f) for f in faults if f.kind != "missing"],
            "deleted": len(deleted),
            "records": num_records,
            "measures": [asdict(measure) for measure in measures],
        }
        show(result, True)
    else:
        _show_verdict(cache, faults, measures, deleted=bool(deleted))
    if not ok:
        raise typer.Exit(1)


def _show_verdict(
    cache: LogitCache, faults: list[Fault], measures: list[Measure], *, deleted: bool
) -> None:
    from kdcache.cache import summary as summaries

    whole, absent = len(cache.shards()), [f for f in faults if f.kind == "missing"]
    answer = {
        "cache": cache.url,
        "shards": f"{whole - len(faults)} of {whole} are complete and valid",
    }
    if absent:
        gaps = summaries.gaps((fault.view, fault.shard) for fault in absent)
        answer["missing"] = summaries.coverage(cache, gaps)
    show(answer, False)
    bad = [fault for fault in faults if fault.kind != "missing"]
    for fault in bad:
        gone = ", and now deleted" if deleted and fault.kind == "damaged" else ""
        line = f"view {fault.view} shard {fault.shard} is {fault.kind}{gone}: {fault.reason}"
        show_lines([line])
    if measures:
        rows = [
            [m.what, _bound(m, m.found), _bound(m, m.tolerance), "ok" if m.ok else "FAIL"]
            for m in measures
        ]
        show_lines(format_table([["measure", "found", "allowed", "verdict"], *rows]))
        show_lines([f"{measure.what}: {measure.note}" for measure in measures if measure.note])
    made = "`kdcache precompute`" if cache.spec.view_spec else "`kdcache import`"
    if any(fault.kind == "damaged" for fault in bad) and not deleted:
        line = "`kdcache verify --delete-damaged` deletes damaged shards; then run the same"
        show_lines([f"{line} {made} again"])
    elif absent or deleted:
        show_lines([f"run the same {made} again: it computes the missing shards"])


def _bound(measure: Measure, value: float | str) -> str:
    if isinstance(value, str):
        return value
    return f"{value:.2%}" if measure.name in ("top1", "drawn") else f"{value:.3g}"
