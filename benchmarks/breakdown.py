"""Where a training step's time goes, from a profiler's trace of `train.train`.

In: something that trains. Out: milliseconds a step of each of the loop's named ranges. On the CPU a
range takes what passes between its begin and its end in the loop's thread. On a GPU it takes what
the device computes for it, wherever in the process that was launched while the range was open.

"wait" is on the CPU what the loop stands still for: the loader's queue and the cache's reader. On a
GPU it is idle time of the device, or copies, between two steps: from the end of the last kernel of
a step to the first of the next one's target or forward pass, and between these two.
"""

from __future__ import annotations

import bisect
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from kdcache.data import passes
from kdcache.teacher.targets import CachedTargets

RANGES = ("load", "target", "forward", "loss", "backward", "optimizer")
LAUNCHES = ("cuda_runtime", "cuda_driver")
WORK = ("kernel", "gpu_memcpy", "gpu_memset")

Event = dict[str, Any]


@dataclass(frozen=True)
class Breakdown:
    """Milliseconds a step. `step_ms` is all of it, under the profiler; `other` is in no range."""

    steps: int
    step_ms: float
    ranges_ms: dict[str, float]
    wait_ms: float

    def line(self, unit: str) -> dict[str, Any]:
        """A result line in "ms" or in "% of the step"."""
        scale = 1.0 if unit == "ms" else 100 / self.step_ms
        other = self.step_ms - sum(self.ranges_ms.values())
        values = {**self.ranges_ms, "other": other, "step": self.step_ms, "wait": self.wait_ms}
        return {"unit": unit, **{name: value * scale for name, value in values.items()}}


def measure(
    run: Callable[[], object], device: torch.device, cache: CachedTargets | None
) -> Breakdown:
    """Of one run, all of whose steps count: run it before, so that nothing is compiled now."""
    waited_s = cache.waited_s if cache else 0.0
    events = traced(run, device)
    if device.type == "cuda":
        return on_device(events)
    cache_wait_us = 1e6 * (cache.waited_s - waited_s) if cache else 0.0
    return on_host(events, cache_wait_us)


def traced(run: Callable[[], object], device: torch.device) -> list[Event]:
    """The events of a Chrome trace, with the loader's waits as ranges called wait."""
    take = passes.Pass._take

    def timed(self: passes.Pass) -> object:
        with record_function("wait"):
            return take(self)

    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with mock.patch.object(passes.Pass, "_take", timed), profile(activities=activities) as found:
        run()
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "trace.json"
        found.export_chrome_trace(str(path))
        events: list[Event] = json.loads(path.read_text())["traceEvents"]
    return [event for event in events if event.get("ph") == "X"]


def on_host(events: list[Event], cache_wait_us: float) -> Breakdown:
    ranges = _ranges(events)
    total = {name: sum(e["dur"] for e in ranges if e["name"] == name) for name in RANGES}
    wait = sum(e["dur"] for e in _named(events, "wait")) + cache_wait_us
    return _breakdown(ranges, total, wait)


def on_device(events: list[Event]) -> Breakdown:
    ranges = _ranges(events)
    work = _work(events, ranges)
    total = dict.fromkeys(RANGES, 0.0)
    for name, event in work:
        total[name] += event["dur"]
    return _breakdown(ranges, total, _idle(work))


def _breakdown(ranges: list[Event], total_us: dict[str, float], wait_us: float) -> Breakdown:
    steps = sum(e["name"] == "optimizer" for e in ranges)
    whole_us = ranges[-1]["ts"] + ranges[-1]["dur"] - ranges[0]["ts"]
    return Breakdown(
        steps,
        whole_us / steps / 1e3,
        {n: us / steps / 1e3 for n, us in total_us.items()},
        wait_us / steps / 1e3,
    )


def _named(events: list[Event], *names: str) -> list[Event]:
    return [e for e in events if e.get("cat") == "user_annotation" and e["name"] in names]


def _ranges(events: list[Event]) -> list[Event]:
    """The loop's ranges in order of time; they do not overlap."""
    return sorted(_named(events, *RANGES), key=lambda e: float(e["ts"]))


def _work(events: list[Event], ranges: list[Event]) -> list[tuple[str, Event]]:
    """What the device did, in order of time, each with the range in which it was launched."""
    begins = [e["ts"] for e in ranges]
    launched = {e["args"]["correlation"]: e["ts"] for e in events if e.get("cat") in LAUNCHES}
    found = []
    for event in events:
        at = launched.get(event.get("args", {}).get("correlation"))
        if event.get("cat") in WORK and at is not None:
            i = bisect.bisect_right(begins, at) - 1
            if i >= 0 and at <= ranges[i]["ts"] + ranges[i]["dur"]:
                found.append((ranges[i]["name"], event))
    return sorted(found, key=lambda item: float(item[1]["ts"]))


def _idle(work: list[tuple[str, Event]]) -> float:
    """Microseconds without a kernel before the first one of a target or a forward pass."""
    idle, before, end = 0.0, "", None
    for name, event in work:
        if name == "load" or event["cat"] != "kernel":
            continue
        if end is not None and name in ("target", "forward") and name != before:
            idle += max(0.0, event["ts"] - end)
        before, end = name, max(end or 0.0, event["ts"] + event["dur"])
    return idle
