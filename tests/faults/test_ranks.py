"""Processes that train together, of which one is killed at a random moment, again and again."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import pytest

from kdcache.data.beton import Dataset
from kdcache.training import run_folder
from tests import ranks
from tests.test_distributed import assert_same, training

# Three whole pairs a process; the others' batches of 32 do not divide by three.
LONG = ("--batch-size", 36, "--epochs", 12, "--log-every", 1, "--checkpoint-every", 3)
STEPS = 96
LONGEST_LIFE_S = 4.0


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("count", "kills"), [(2, 12), (3, 12)])
def test_ranks_killed_at_random_end_with_the_same(
    digits_test: Dataset, tmp_path: Path, count: int, kills: int
) -> None:
    dice = random.Random(count * kills)
    line = (*training(digits_test.path, tmp_path / "run", *LONG, "--lr", 1e-3), "--resume")
    whole = training(digits_test.path, tmp_path / "whole", *LONG, "--lr", 1e-3)
    assert [r.code for r in ranks.command(count, tmp_path / "io", *whole)()] == [0] * count
    killed = 0
    for life in range(kills):
        running = ranks.command(count, tmp_path / f"io{life}", *line)
        time.sleep(dice.uniform(0, LONGEST_LIFE_S))
        rank = dice.randrange(count)
        running.ranks.kill(rank, signal.SIGKILL)
        found = running()
        if run_folder.is_finished(tmp_path / "run"):
            break
        killed += 1
        # None hangs, and none says more than that it was stopped or lost another one.
        assert found[rank].code == -signal.SIGKILL
        assert all(r.code for r in found), found
        assert all("Traceback" not in r.err for r in found), found
    again = ranks.command(count, tmp_path / "io-last", *line)()
    assert [r.code for r in again] == [0] * count, again
    assert_same(tmp_path / "run", tmp_path / "whole", STEPS)
    print(f"{count} processes: killed {killed} times, held")
