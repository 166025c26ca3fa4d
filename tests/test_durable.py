"""Killed, interrupted or out of room at any moment: nothing is lost, and a rerun ends the same."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kdcache.cache.cache import LogitCache
from kdcache.cache.codecs import TopK
from kdcache.cache.spec import CacheSpec
from kdcache.data.beton import Dataset
from kdcache.errors import KDCacheError
from kdcache.views.spec import ViewSpec
from tests import processes
from tests.conftest import TEACHER, linear_teacher
from tests.processes import Job, contents

SPEC = CacheSpec(1, 100, 30, TopK(4), "data", "teacher", ViewSpec(8))


@pytest.fixture(scope="module")
def whole(digits_test: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A cache that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    job = Job(digits_test.path, folder / "t", folder / "log")
    job.run()
    assert job.computed() == LogitCache.open(job.out).shards()
    return job


# --- killed ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("kills", "seed"), [(10, 0), pytest.param(30, 1, marks=pytest.mark.slow)])
def test_killed_at_random_moments_it_ends_with_the_same_bytes(
    whole: Job, tmp_path: Path, kills: int, seed: int
) -> None:
    """Caches are begun until there were enough kills; each is finished, however often killed."""
    dice = random.Random(seed)
    killed, redone = 0, 0
    while killed < kills:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        job = Job(whole.data, folder / "t", folder / "log", fsync_s=0.002)
        lives = 0
        while True:
            missing = set(_missing(job, whole))
            before = len(job.computed())
            lives += 1
            process = job.start()
            process.join(dice.uniform(0, 0.8))
            process.kill()
            code = processes.ended(process)
            computed = job.computed()[before:]
            assert set(computed) <= missing
            assert len(computed) - len(missing - set(_missing(job, whole))) <= 2
            if code == 0:
                break
            assert code == -signal.SIGKILL
        killed += lives - 1
        redone += len(job.computed()) - len(whole.computed())
        assert contents(folder / "t") == contents(Path(whole.out))
        assert {f.name for f in folder.iterdir()} == {"t", "log"}
    print(f"{killed} kills, {redone} shards computed again")
    assert redone <= 2 * killed


def _missing(job: Job, whole: Job) -> list[tuple[int, int]]:
    try:
        return LogitCache.open(job.out).missing()
    except KDCacheError:  # not even created
        return whole.computed()


@pytest.mark.parametrize("step", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_before_any_change_of_a_file_it_ends_with_the_same_bytes(
    tmp_path: Path, step: int
) -> None:
    """Every state, or every fourth, that a cache passes through, from nothing to whole."""
    assert processes.run(_make, tmp_path / "whole") == 0
    truth = contents(tmp_path / "whole")
    killed = 0
    while processes.run(_make_and_die, tmp_path / str(killed), killed) == -signal.SIGKILL:
        out = tmp_path / str(killed)
        assert processes.run(_make, out) == 0
        assert contents(out) == truth
        killed += step
    assert killed > 60
    assert contents(tmp_path / str(killed)) == truth
    assert len(list(tmp_path.iterdir())) == killed // step + 2


def _make(out: Path) -> None:
    """A cache of two shards, as precompute makes it; a kill does not need what a power cut does."""
    processes.small_shards()
    os.fsync = lambda descriptor: None
    cache = LogitCache.create(out, SPEC, {})
    for view, shard in cache.missing():
        assert cache.lock_shard(view, shard)
        rows = torch.arange(*cache.shard_range(shard))[:, None] * torch.arange(30)
        cache.write(view, shard, TopK(4).encode(rows.float()))
        cache.unlock_shard(view, shard)
    cache.store.release_locks()


def _make_and_die(out: Path, moment: int) -> None:
    """Make a cache, and be killed before the given change of its files."""
    changes = iter(range(1000))

    def watch(event: str, args: tuple[object, ...]) -> None:
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "fcntl.lockf"):
            path = "" if event == "fcntl.lockf" else str(args[0])
            if (path.startswith(str(out)) or not path) and next(changes) == moment:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    _make(out)


# --- interrupted -----------------------------------------------------------------------------


def _line(data: Dataset, out: Path, *options: object) -> list[object]:
    line = ["precompute", "--data", data.path, "--teacher", TEACHER, "--out", out]
    return [*line, "--batch-size", 64, "--workers", 1, *options]


def _wait_for(ready: Callable[[], object]) -> None:
    end = time.monotonic() + processes.LIMIT_S
    while not ready():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize("group", [False, True])
def test_ctrl_c_of_a_real_command_says_how_to_go_on(
    digits: Dataset, tmp_path: Path, group: bool
) -> None:
    """Sent to the process, or as a terminal does, to its whole group."""
    out = tmp_path / "a cache, größer.zarr"
    line = [sys.executable, "-m", "kdcache", *map(str, _line(digits, out, "--views", 100))]
    options: dict[str, Any] = {"cwd": Path(__file__).parents[1], "text": True}
    with subprocess.Popen(line, start_new_session=True, stderr=subprocess.PIPE, **options) as run:
        _wait_for(lambda: run.poll() is not None or list(out.glob("seals/c/3/*/0/0")))
        start = time.monotonic()
        (os.killpg if group else os.kill)(run.pid, signal.SIGINT)
        assert run.wait(5) == 130
        assert time.monotonic() - start < 5
        assert run.stderr is not None
        words = run.stderr.read()
    done = 100 - len(LogitCache.open(out).missing())
    assert 4 <= done < 100
    assert words.count("\n") == 1
    for expected in ("kdcache: ", f" {done} of 100 shards ", str(out), "the same command"):
        assert expected in words
    assert processes.command(tmp_path, *line[3:])().code == 0
    assert LogitCache.open(out).missing() == []
    assert not (out / ".claims").exists()


@pytest.mark.parametrize("seed", range(8))
def test_ctrl_c_at_any_moment_is_one_line(digits_test: Dataset, tmp_path: Path, seed: int) -> None:
    """From the start, while the model is loaded, to the end."""
    out = tmp_path / "t"
    line = _line(digits_test, out, "--views", 20)
    wait = processes.command(tmp_path, *line)
    wait.process.join(random.Random(seed).uniform(0.02, 0.8))
    if wait.process.exitcode is None:
        os.kill(wait.process.pid, signal.SIGINT)
    result = wait()
    assert result.code in (0, 130), result
    words = r"kdcache: stopped (with \d+ of 20 shards in|before the cache) [^\n]*\n"
    assert re.fullmatch(rf"({words})?", result.err), result
    assert processes.command(tmp_path, *line)().code == 0
    assert LogitCache.open(out).missing() == []
    assert {f.name for f in tmp_path.iterdir()} == {"t", "stdout", "stderr"}


# --- resumed ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def begun(digits_test: Dataset, tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """The command that made a cache which now lacks a shard."""
    folder = tmp_path_factory.mktemp("begun")
    line = _line(digits_test, folder / "t", "--views", 2, "--top-k", 2, "--dtype", "float32")
    assert processes.command(folder, *line)().code == 0
    LogitCache.open(folder / "t").delete_shard(1, 0)
    return line


OTHERS: list[tuple[list[object], str]] = [
    (
        ["--teacher", "python:tests.test_durable:another_teacher"],
        r"teacher_hash: \w{16} here, \w{16}",
    ),
    (
        ["--data", "OTHER"],
        r"num_samples: 1500 here, 297 there; dataset_hash: \w{16} here, \w{16} there",
    ),
    (["--top-k", 3], "k: 3 here, 2 there"),
    (["--top-k", "all"], "codec: .*Dense.* here, .*TopK.* there"),
    (["--dtype", "float16"], "dtype: float16 here, float32 there"),
    (["--dtype", "uint8"], "dtype: uint8 here, float32 there"),
    (["--row-order", "dataset"], "mixup: 0 here, 1 there; row_order: dataset here, view there"),
    (
        ["--average-views", 4, "--views", 1],
        "row_order: dataset here, view there; num_averaged_views: 4 here, 0 there",
    ),
    (["--view-seed", 7], "seed: 7 here, 0 there"),
    (["--size", 9, "--teacher", "python:tests.test_durable:any_size"], "size_px: 9 here, 8 there"),
    (["--crop", "center"], "crop: center here, inception there"),
    (["--min-scale", 0.5], "min_scale: 0.5 here, 0.05 there"),
    (["--no-flip"], "flip: False here, True there"),
    (["--mixup", 0.2], "mixup: 0.2 here, 1 there"),
    (["--precision", "bfloat16"], "precision: bfloat16 here, float32 there"),
]


@pytest.mark.parametrize(("options", "words"), OTHERS, ids=lambda x: str(x[0]) if x else "")
def test_a_cache_is_not_gone_on_with_by_another_command(
    begun: list[object], digits: Dataset, kdcache: Any, options: list[object], words: str
) -> None:
    out = Path(str(begun[begun.index("--out") + 1]))
    before = contents(out)
    line = list(begun)
    if "--teacher" in options:  # given twice, they would be two teachers
        at = line.index("--teacher")
        line[at : at + 2] = []
    result = kdcache(*line, *(digits.path if x == "OTHER" else x for x in options))
    assert result.code == 2, result.err
    # What is said of a teacher comes first.
    assert re.search(rf"is a different cache \(.*{words}", result.err.splitlines()[-1]), result.err
    assert contents(out) == before


def test_nor_by_draws(begun: list[object], kdcache: Any) -> None:
    line = list(begun)
    for other in ("--top-k", "--dtype"):
        at = line.index(other)
        line[at : at + 2] = []
    result = kdcache(*line, "--num-draws", 4)
    assert (result.code, len(result.err.splitlines())) == (2, 1), result.err
    assert re.search("codec: .*Sampled.* here, .*TopK.* there", result.err), result.err


def test_batch_size_and_workers_are_no_part_of_a_cache(begun: list[object], kdcache: Any) -> None:
    assert kdcache(*begun, "--batch-size", 7, "--workers", 2).code == 0
    cache = LogitCache.open(str(begun[begun.index("--out") + 1]))
    assert cache.missing() == []
    cache.delete_shard(1, 0)


def another_teacher(num_classes: int) -> nn.Module:
    network = linear_teacher(num_classes)
    network[1].bias.data[0] += 1e-3
    return network


def any_size(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(8), *linear_teacher(num_classes))
