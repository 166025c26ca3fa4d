"""`kdcache precompute`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer

from kdcache.cli.options import OutputOptions
from kdcache.cli.output import notice, progress_bar, show, warn
from kdcache.cli.signals import StopSignal, stop_signal
from kdcache.errors import KDCacheError
from kdcache.teacher.options import PrecomputeOptions
from kdcache.torchrun import current_process

if TYPE_CHECKING:
    from kdcache.cache.cache import LogitCache
    from kdcache.teacher.calibration import RecordChoice

PATIENCE_S = 3.0


def precompute(options: PrecomputeOptions, output: OutputOptions) -> None:
    """Run the teacher over views of the data and record its logits in a cache.

    A cache that has fewer --views gets the missing ones; one that was interrupted is completed.
    """
    from kdcache.cache.fidelity import LiveError
    from kdcache.cache.setting import cache_setting_name

    start = time.perf_counter()
    added, error = 0, LiveError()
    with interruptible(options.out) as stop:
        from kdcache.teacher.load import load_precompute_run, run_precompute

        rows = options.records.num_calibration_records
        with progress_bar("calibrate", rows, "records") as update:

            def calibrating(done: int) -> None:
                stop.check()
                update(done)

            run = load_precompute_run(options.records, options.out, calibrating)
        warn(run.warnings)
        if run.choice and current_process().rank == 0:
            notice(choice_line(run.choice, run.spec.num_classes))

        def on_start(cache: LogitCache) -> None:
            nonlocal added
            had, added = cache.num_stored_views, cache.spec.num_views - cache.num_stored_views
            if added:
                notice(f"{options.out} has {had} view{'s' * (had > 1)}: adding {added}")

        rows = run.spec.num_views * run.spec.num_samples
        processes = options.parts[1] * current_process().world_size
        with progress_bar("precompute", rows // processes, "records") as update:

            def progress(done: int) -> None:
                stop.check()
                update(done)

            cache = run_precompute(run, options, error=error, on_start=on_start, progress=progress)
    if current_process().rank > 0:
        return
    stored, missing, spec = cache.stored_bytes(), cache.missing(), cache.spec
    records = spec.num_views * spec.num_samples
    result = {
        "path": options.out,
        "setting": cache_setting_name(spec),
        "views": spec.num_views,
        "views_added": added,
        "samples": spec.num_samples,
        "record": spec.codec.describe(spec.num_classes),
        "bytes": stored,
        "bytes_per_record": None if missing else round(stored / records, 2),
        "shards_missing": len(missing),
        "kl_to_live_mean": round(error.mean, 6),
        "kl_to_live_largest": round(error.largest, 6),
        "kl_records": error.count,
        "seconds": round(time.perf_counter() - start, 2),
    }
    show(result, output.as_json)


def choice_line(choice: RecordChoice, num_classes: int) -> str:
    """What records keep, and how much of the live teacher that is."""
    from kdcache.cache.fidelity import describe_fidelity

    line = f"{choice.codec.describe(num_classes)}: {choice.bytes_per_record:.0f} bytes a record"
    return f"{line}; {describe_fidelity(choice.fidelity)}" if choice.fidelity else line


@contextmanager
def interruptible(out: str) -> Iterator[StopSignal]:
    """Within, Ctrl-C ends the command where the value's `check` is called next, or after some
    seconds; then what the cache at `out` has is printed, and the exit code is 130."""
    try:
        with stop_signal(patience_s=PATIENCE_S) as stop:
            yield stop
    except KeyboardInterrupt:
        notice(_progress_of(out))
        raise typer.Exit(130) from None


def _progress_of(out: str) -> str:
    from kdcache.cache.cache import LogitCache

    try:
        cache = LogitCache.open(out)
        missing, shards = len(cache.missing()), len(cache.shards())
    except KDCacheError:
        return f"stopped before the cache {out} was created"
    done = f"{shards - missing} of {shards} shards in {out}"
    return f"stopped with {done}; the same command resumes from there"
