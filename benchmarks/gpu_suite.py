"""All GPU tests and benchmarks of the kernels, offline, in under 8 minutes; a short table last.

    python -m benchmarks.gpu_suite [--minutes 8]

The tests' time is Triton's compiler, several hundred times: so they run in several processes.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.bench_loss import bars
from benchmarks.loss_report import saved

ROOT = Path(__file__).parent.parent
PYTEST = [sys.executable, "-m", "pytest", "-q", "-m", "gpu"]
BENCH = [sys.executable, "-m", "benchmarks.bench_loss"]


def run(name: str, command: list[str], seconds: float) -> tuple[str, str, float]:
    start = time.monotonic()
    try:
        code = subprocess.run(command, cwd=ROOT, timeout=max(seconds, 1)).returncode
        verdict = "passed" if code == 0 else f"FAILED ({code})"
    except subprocess.TimeoutExpired:
        verdict = "OUT OF TIME"
    return name, verdict, time.monotonic() - start


def gpu_tests() -> list[str]:
    """Their ids, wherever they are."""
    command = [*PYTEST, "--collect-only", "tests"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    return re.findall(r"^tests/\S+::.+$", listed, re.M)


def tests(seconds: float, processes: int) -> list[tuple[str, str, float]]:
    """All GPU tests, dealt to this many processes."""
    ids = gpu_tests()
    if not ids:
        return [("tests", "FAILED (none)", 0.0)]
    hands = [ids[n::processes] for n in range(min(processes, len(ids)))]
    with ThreadPoolExecutor(len(hands)) as pool:
        jobs = [pool.submit(run, f"{len(hand)} tests", [*PYTEST, *hand], seconds) for hand in hands]
    return [job.result() for job in jobs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=8)
    args = parser.parse_args()
    end = time.monotonic() + args.minutes * 60
    done = tests(end - time.monotonic(), min(os.cpu_count() or 1, 8))
    for name, options in (("times", ["--save", "--rounds", "50"]), ("page", ["--write"])):
        done.append(run(name, [*BENCH, *options], end - time.monotonic()))
    lines = saved("cuda")
    for key in dict.fromkeys((x["shape"], x["cache"]) for x in lines):
        here = [x for x in lines if (x["shape"], x["cache"]) == key]
        for x in here:
            if x["contestant"].startswith("kdcache sparse") and "p50" in x:
                print(
                    f"{key[0]:>12} {key[1]}  {x['contestant']:<28} {x['p50']:9.1f} us  "
                    f"{x['of_copy']:.0%} of a copy"
                )
        print(f"{'':>12} {', '.join(bars(here)[:1])}")
    for name, verdict, seconds in done:
        print(f"{name:<16} {verdict:<14} {seconds:5.0f} s")
    sys.exit(any(verdict != "passed" for _, verdict, _ in done))


if __name__ == "__main__":
    main()
