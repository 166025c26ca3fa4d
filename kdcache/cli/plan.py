"""`kdcache plan`."""

from __future__ import annotations

import math
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from kdcache.cli.options import OutputOptions
from kdcache.cli.output import format_bytes, format_table, show, show_lines, warn
from kdcache.training.options import PlanOptions

if TYPE_CHECKING:
    from kdcache.training.estimate import Estimate


def plan(options: PlanOptions, output: OutputOptions) -> None:
    """Estimate size, time and break-even of a cache by a short measurement on this machine."""
    from kdcache.training.estimate import estimate

    start = time.perf_counter()
    found = estimate(options)
    warn(found.warnings)
    size, free = found.plan.bytes, found.free_bytes
    if free is not None and free < size:
        warn(
            [
                f"{options.out} has {format_bytes(free)} free, the cache takes "
                f"{format_bytes(size)}: use fewer --views, a smaller --top-k, --dtype uint8, or "
                "another disk"
            ]
        )
    if output.as_json:
        show(_as_json(found), True)
        return
    show(_as_text(found, options.out, time.perf_counter() - start), False)
    if found.comparisons:
        show_lines(_table(found))


def _as_json(found: Estimate) -> dict[str, Any]:
    spec = found.spec
    result = {
        "spec": spec.to_json(),
        "record": spec.codec.describe(spec.num_classes),
        **asdict(found.plan),
        "records_per_s": 1 / found.seconds_per_record,
        "free_bytes": found.free_bytes,
        "records_measured": found.records_measured,
        "fidelity": [asdict(x) for x in found.fidelity],
    }
    if found.steps:
        even = found.break_even_epochs
        result |= {
            **asdict(found.steps),
            "epochs": found.epochs,
            "hours_of_students": [asdict(row) for row in found.comparisons],
            "break_even_epochs": even if math.isfinite(even) else None,
        }
    return result


def _as_text(found: Estimate, out: str | None, seconds: float) -> dict[str, str]:
    from kdcache.cache.fidelity import describe_fidelity

    spec, plan, rate = found.spec, found.plan, 1 / found.seconds_per_record
    assert spec.view_spec is not None
    views = f"{spec.num_views} view{'s' * (spec.num_views > 1)}"
    if spec.num_averaged_views:
        views = f"{spec.num_averaged_views} views averaged"
    lines = {
        "cache": f"{format_bytes(plan.bytes)}: {views} of {spec.num_samples} samples, "
        f"{plan.bytes_per_record:.1f} bytes a record ({spec.record_bytes} uncompressed)",
        "record": spec.codec.describe(spec.num_classes),
    }
    if found.fidelity:
        lines["fidelity"] = describe_fidelity(found.fidelity)
    lines |= {
        "view": spec.view_spec.describe(),
        "objects": f"{plan.objects}, in {plan.shards} shard{'s' * (plan.shards > 1)}",
        "teacher": f"{_hours(plan.hours)} on {found.device}, {rate:,.0f} records/s",
        "writing": f"{format_bytes(round(plan.bytes / plan.hours / 3600))}/s; compression takes "
        f"{plan.packing_hours / plan.hours:.1%} of that time, in parallel to the teacher",
    }
    if found.steps:
        lines |= {
            "student": f"{found.steps.cached_s * 1e3:.3g} ms an image from the cache, "
            f"{found.steps.online_s * 1e3:.3g} ms online",
            "faster if": _break_even(found.break_even_epochs, found.epochs),
        }
    if found.free_bytes is not None:
        lines["free"] = f"{format_bytes(found.free_bytes)} at {out}"
    measured = f"{found.records_measured} records in {seconds:.0f} s"
    lines["measured"] = f"{measured}: estimates, for this machine and its present load"
    return lines


def _break_even(even: float, epochs: int) -> str:
    if not math.isfinite(even):
        return (
            "never: a step took no longer with the teacher than without it, so the teacher is "
            "cheap beside the student, or this machine is too busy for the measurement"
        )
    least = math.floor(even / epochs) + 1
    some = f"{least} student{'s' * (least > 1)} of {epochs} epoch{'s' * (epochs > 1)}"
    return f"students x epochs > {even:.3g}: from {some} on"


def _table(found: Estimate) -> list[str]:
    rows = [[f"students of {found.epochs} epochs", "from a cache", "online", "saved"]]
    for row in found.comparisons:
        saved = f"{1 - row.cached / row.online:.0%}"
        rows.append([f"{row.students}", _hours(row.cached), _hours(row.online), saved])
    return format_table(rows)


def _hours(hours: float) -> str:
    if hours < 1 / 60:
        return f"{hours * 3600:.3g} s"
    return f"{hours * 60:.3g} min" if hours < 1 else f"{hours:,.3g} h"
