"""What every benchmark shares: a machine stamp, interleaved rounds, quantiles, JSON lines.

A number is only as good as its rival in the same run: `interleave` runs the contestants in a new
random order each round, so that a busy neighbour hurts all of them alike.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import random
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

RESULTS = Path(__file__).parent / "results"


@dataclass
class Samples:
    """Rates in images a second and CPU seconds an image, one for each round."""

    rates: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)

    def quantiles(self) -> dict[str, float]:
        p20, p50, p80 = np.quantile(self.rates, [0.2, 0.5, 0.8])
        return {"p20": p20, "p50": p50, "p80": p80, "cpu_us": float(np.median(self.cpu_s)) * 1e6}


def interleave(
    contestants: dict[str, Callable[[], int]], rounds: int, seed: int = 0
) -> dict[str, Samples]:
    """Run each contestant once a round, after one round of warm-up; each returns its images."""
    samples = {name: Samples() for name in contestants}
    shuffle = random.Random(seed)
    for number in range(rounds + 1):
        names = list(contestants)
        shuffle.shuffle(names)
        for name in names:
            cpu, start = _cpu_seconds(), time.perf_counter()
            images = contestants[name]()
            seconds = time.perf_counter() - start
            if number > 0:
                samples[name].rates.append(images / seconds)
                samples[name].cpu_s.append((_cpu_seconds() - cpu) / images)
    return samples


def ratio(samples: dict[str, Samples], ours: str, other: str) -> float:
    """Median over rounds of our rate by the other's in the same round."""
    pairs = zip(samples[ours].rates, samples[other].rates, strict=True)
    return float(np.median([a / b for a, b in pairs]))


def _cpu_seconds() -> float:
    """Of this process and of its children that have ended."""
    t = os.times()
    return t.user + t.system + t.children_user + t.children_system


def machine() -> dict[str, Any]:
    """Where a number comes from."""
    versions = {}
    for name in ("kdcache", "torch", "torchvision", "numba", "numpy", "zarr", "ffcv", "triton"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    git = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True, cwd=Path(__file__).parent)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "gpu": gpu,
        "python": platform.python_version(),
        "commit": commit.stdout.strip() or None,
        "versions": versions,
    }


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def report(benchmark: str, title: str, lines: list[dict[str, Any]], save: bool) -> None:
    """Print a table, what all lines share only once; with `save`, add to the result lines."""
    shared = {k for k, v in lines[0].items() if all(k in x and x[k] == v for x in lines)}
    print(f"\n{title}" + "".join(f", {k} {cell(lines[0][k])}" for k in lines[0] if k in shared))
    for line in lines:
        own = (f"{k} {cell(v)}" for k, v in line.items() if k not in shared)
        print("  " + "   ".join(own))
    if save:
        RESULTS.mkdir(exist_ok=True)
        stamp = machine()
        path = RESULTS / f"{benchmark}.jsonl"
        with path.open("a") as file:
            for line in lines:
                file.write(json.dumps({"benchmark": benchmark, **line, "machine": stamp}) + "\n")


def start_results(benchmark: str) -> None:
    """Forget earlier result lines of this benchmark."""
    (RESULTS / f"{benchmark}.jsonl").unlink(missing_ok=True)


def cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
    return str(value)
