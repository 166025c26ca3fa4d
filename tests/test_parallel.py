"""Several processes on one cache: each shard once, the bytes of one process, whoever dies."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kdcache import waiting
from kdcache.cache.cache import LogitCache
from kdcache.cache.codecs import Dense
from kdcache.data.beton import Dataset
from kdcache.data.loader import render_digest
from kdcache.errors import TimedOut, UsageError
from kdcache.models import load
from kdcache.models.device import choose_device
from kdcache.teacher.precompute import make_cache_spec, wait_for_parts
from kdcache.torchrun import Process, current_process
from kdcache.views.spec import ViewSpec
from tests import processes
from tests.conftest import TEACHER, linear_teacher, synthetic_cache
from tests.processes import Job, contents

ROOT = Path(__file__).parents[1]
LAST_FAILS = "python:tests.test_parallel:teacher_whose_last_rank_fails"


@pytest.fixture(scope="module")
def whole(digits_test: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A cache that one process made."""
    folder = tmp_path_factory.mktemp("whole")
    job = Job(digits_test.path, folder / "t", folder / "log")
    job.run()
    return job


def same(job: Job, whole: Job) -> bool:
    """The bytes of one process, and nothing else."""
    out = Path(job.out)
    left = {f.name for f in out.parent.iterdir()} - {"t", "log"}
    return not left and contents(out) == contents(Path(whole.out))


# --- two at once -----------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 4])
def test_processes_on_one_cache_do_each_shard_once(whole: Job, tmp_path: Path, count: int) -> None:
    """From an empty place, all at the same instant."""
    for round in range(2):
        folder = tmp_path / str(round)
        folder.mkdir()
        job = Job(whole.data, folder / "t", folder / "log", start_s=time.time() + 0.3)
        running = [job.start() for _ in range(count)]
        assert [processes.ended(p) for p in running] == [0] * count
        assert Counter(job.computed()) == Counter(whole.computed())
        assert same(job, whole)


def test_a_killed_process_leaves_its_shards_to_the_other(whole: Job, tmp_path: Path) -> None:
    dice = random.Random(0)
    redone = 0
    for round in range(2):
        folder = tmp_path / str(round)
        folder.mkdir()
        job = Job(whole.data, folder / "t", folder / "log", fsync_s=0.005)
        killed, other = job.start(), job.start()
        while len(job.computed()) < 3:
            time.sleep(0.005)
        time.sleep(dice.uniform(0, 0.2))
        killed.kill()
        assert processes.ended(other) == 0
        redone += len(job.computed()) - len(whole.computed())
        assert set(job.computed()) == set(whole.computed())
        assert same(job, whole)
    assert redone <= 2 * 2


def test_of_two_specs_one_is_refused(whole: Job, tmp_path: Path) -> None:
    """Also where both create the cache in the same instant: of views of two seeds."""
    for round in range(2):
        folder = tmp_path / str(round)
        folder.mkdir()
        job = Job(whole.data, folder / "t", folder / "log", start_s=time.time() + 0.3)
        running = [job.start(), replace(job, view_seed=1).start()]
        codes = [processes.ended(p) for p in running]
        assert sorted(codes) == [0, 2]
        cache = LogitCache.open(job.out)
        assert cache.spec.view_spec is not None
        assert cache.spec.view_spec.seed == (0 if codes[0] == 0 else 1)
        assert cache.missing() == []
        assert len(job.computed()) == len(cache.shards())


# --- parts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 5, 30])
def test_parts_in_any_order_and_at_once_make_the_same_cache(
    whole: Job, tmp_path: Path, n: int
) -> None:
    """Also of more parts than there are shards."""
    order = random.Random(n).sample(range(n), n)
    running = []
    for i in order:
        part = Job(whole.data, tmp_path / "t", tmp_path / "log", part=(i, n))
        running.append(part.start())
        if len(running) == 3:  # three at once
            assert processes.ended(running.pop(0)) == 0
    assert [processes.ended(p) for p in running] == [0] * len(running)
    job = Job(whole.data, tmp_path / "t", tmp_path / "log")
    assert Counter(job.computed()) == Counter(whole.computed())
    assert same(job, whole)


def test_a_part_leaves_the_others_alone(whole: Job, tmp_path: Path) -> None:
    job = Job(whole.data, tmp_path / "t", tmp_path / "log", part=(1, 3))
    job.run()
    assert job.computed() == whole.computed()[7:14]
    missing = LogitCache.open(job.out).missing()
    assert missing == whole.computed()[:7] + whole.computed()[14:]


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "1/", "1/0", "a/b", "-1/2", "1/2/3"])
def test_a_bad_part_is_one_line(
    digits_test: Dataset, tmp_path: Path, kdcache: Any, text: str
) -> None:
    line = ["--data", digits_test.path, "--teacher", TEACHER, "--out", tmp_path / "t"]
    result = kdcache("precompute", *line, "--part", text)
    words = f"kdcache: --part is i/n with i from 1 to n, such as 1/4, not {text!r}\n"
    assert (result.code, result.err) == (2, words)
    assert not (tmp_path / "t").exists()


# --- waits ------------------------------------------------------------------------------------


def test_a_shard_that_nobody_finishes_is_not_waited_for_for_ever(
    digits_test: Dataset, tmp_path: Path, kdcache: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its holder has stopped: it is alive, and does nothing."""
    monkeypatch.setattr(waiting, "SAID_AFTER_S", 0.5)
    out = tmp_path / "t"
    line = ("precompute", "--data", digits_test.path, "--teacher", TEACHER, "--out", out)
    holder = processes.start(_hold_a_shard, digits_test, out)
    while not (tmp_path / "held").exists():
        time.sleep(0.01)
    assert holder.pid is not None
    os.kill(holder.pid, signal.SIGSTOP)
    result = kdcache(*line, "--timeout", 2)
    os.kill(holder.pid, signal.SIGKILL)
    processes.ended(holder)
    assert result.code == 2
    said, error = result.err.splitlines()
    words = rf"shards that other processes hold \(1 of {re.escape(str(out))}\)"
    assert re.fullmatch(f"kdcache: still waiting for {words}, for 2 s at most", said)
    assert re.fullmatch(
        rf"kdcache: waited \d+ s for {words}: end the process that is to write them, .*", error
    )
    assert kdcache(*line).code == 0


def _hold_a_shard(data: Dataset, out: Path) -> None:
    teacher = load.load_teacher(TEACHER, num_classes=10, size_px=8)
    spec = make_cache_spec(data, teacher, ViewSpec(8, mixup=1.0), Dense("float16"))
    cache = LogitCache.create(out, spec, {}, render_digest(data, spec.view_spec))
    assert cache.lock_shard(0, 0)
    (out.parent / "held").touch()
    time.sleep(60)


def test_a_rank_that_has_died_is_not_waited_for_for_ever(tmp_path: Path) -> None:
    cache = synthetic_cache(tmp_path / "t", torch.zeros(1, 20, 10), top_k=10)
    cache.delete_shard(0, 0)
    with pytest.raises(TimedOut, match=r"waited .* for the other processes' shards"):
        wait_for_parts(LogitCache.open(tmp_path / "t"), 0, 1, lambda rows: None, timeout_s=0.1)


# --- torchrun --------------------------------------------------------------------------------


def torchrun(*line: object) -> subprocess.CompletedProcess[str]:
    """On loopback, two processes."""
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    run += ["--master-addr", "127.0.0.1", "--master-port", "0", "--local-addr", "127.0.0.1"]
    return subprocess.run(
        [*run, "-m", "kdcache", *map(str, line)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=90,
    )


def test_torchrun_makes_the_same_cache_and_one_rank_answers(
    digits_test: Dataset, tmp_path: Path
) -> None:
    line = ["precompute", "--data", digits_test.path, "--teacher", TEACHER, "--views", 5]
    line += ["--workers", 1, "--json", "--out"]
    done = torchrun(*line, tmp_path / "two")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["shards_missing"] == 0
    assert "kdcache" not in done.stderr
    assert processes.command(tmp_path, *line, tmp_path / "one")().code == 0
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


@pytest.mark.slow
def test_a_rank_that_fails_ends_all_with_its_error(digits_test: Dataset, tmp_path: Path) -> None:
    line = ["precompute", "--data", digits_test.path, "--teacher", LAST_FAILS, "--views", 4]
    start = time.monotonic()
    done = torchrun(*line, "--workers", 1, "--out", tmp_path / "t")
    assert done.returncode == 1
    assert time.monotonic() - start < 60
    words = f"kdcache: the teacher {LAST_FAILS} gave NaN or infinity for sample"
    assert len([x for x in done.stderr.splitlines() if x.startswith(words)]) == 1
    assert done.stdout == ""
    assert set(LogitCache.open(tmp_path / "t").missing()) >= {(2, 0), (3, 0)}


class _LastRankFails(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.network = linear_teacher(num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.network(x.contiguous())
        return logits * (torch.nan if os.environ.get("RANK") == "1" and len(x) > 1 else 1)


def teacher_whose_last_rank_fails(num_classes: int) -> nn.Module:
    return _LastRankFails(num_classes)


def test_ranks_within_parts_cover_every_shard_once(
    digits_test: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kdcache: Any
) -> None:
    """torchrun on each of two machines, with --part 1/2 and 2/2; rank 0 waits, so it comes last."""
    line = ["precompute", "--data", digits_test.path, "--teacher", TEACHER, "--views", 6]
    monkeypatch.setenv("WORLD_SIZE", "2")
    for part in ("2/2", "1/2"):
        for rank in (1, 0):
            monkeypatch.setenv("RANK", str(rank))
            result = kdcache(*line, "--part", part, "--json", "--out", tmp_path / "t")
            assert result.code == 0
            if rank:
                assert (result.out, result.err) == ("", "")
            else:
                missing = json.loads(result.out)["shards_missing"]
                assert missing == (3 if part == "2/2" else 0)
    assert not (tmp_path / "t/.claims").exists()


@pytest.mark.parametrize(
    ("local", "gpus", "asked", "given"),
    [
        ("1", 8, None, "cuda:1"),
        ("1", 8, "cuda", "cuda:1"),
        ("1", 1, None, "cuda:0"),
        (None, 8, None, "cuda"),
        ("0", 0, None, "cpu"),
    ],
)
def test_ranks_share_the_gpus_of_a_machine(
    monkeypatch: pytest.MonkeyPatch, local: str | None, gpus: int, asked: str | None, given: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: torch.ones(1))
    if local is not None:
        for name, value in (("RANK", local), ("WORLD_SIZE", "2"), ("LOCAL_RANK", local)):
            monkeypatch.setenv(name, value)
    assert choose_device(asked) == given


def test_ranks_that_are_no_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "first")
    assert current_process() == Process()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="RANK must be a number"):
        current_process()
