"""All GPU tests and benchmarks of the kernels, offline, in under 8 minutes; a short table last.

    python -m benchmarks.gpu_suite [--minutes 8]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
TESTS = ["tests/test_kernels_triton.py", "tests/test_loss_module.py"]


def run(name: str, command: list[str], seconds: float) -> tuple[str, str, float]:
    start = time.monotonic()
    try:
        code = subprocess.run(command, cwd=ROOT, timeout=max(seconds, 1)).returncode
        verdict = "passed" if code == 0 else f"FAILED ({code})"
    except subprocess.TimeoutExpired:
        verdict = "OUT OF TIME"
    return name, verdict, time.monotonic() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=8)
    args = parser.parse_args()
    end = time.monotonic() + args.minutes * 60
    python = sys.executable
    jobs = [
        ("tests", [python, "-m", "pytest", "-q", "-m", "gpu", *TESTS]),
        ("cold and warm", [python, "-m", "benchmarks.bench_loss", "--save", "--rounds", "50"]),
        ("page", [python, "-m", "benchmarks.bench_loss", "--write"]),
    ]
    done = [run(name, command, end - time.monotonic()) for name, command in jobs]
    from benchmarks.bench_loss import bars
    from benchmarks.loss_report import saved

    lines = saved("cuda")
    for key in dict.fromkeys((x["shape"], x["cache"]) for x in lines):
        here = [x for x in lines if (x["shape"], x["cache"]) == key]
        for x in here:
            if x["contestant"].startswith("kdcache sparse") and "p50" in x:
                print(f"{key[0]:>12} {key[1]}  {x['contestant']:<28} {x['p50']:9.1f} us  "
                      f"{x['of_copy']:.0%} of a copy")  # fmt: skip
        print(f"{'':>12} {bars(here)[:1]}")
    for name, verdict, seconds in done:
        print(f"{name:<16} {verdict:<14} {seconds:5.0f} s")
    sys.exit(any(verdict != "passed" for _, verdict, _ in done))


if __name__ == "__main__":
    main()
