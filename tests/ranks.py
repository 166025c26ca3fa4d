"""Processes that train together, as torchrun would start them, in no time."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path

from torch import distributed

from kdcache.cli import app
from tests import processes
from tests.conftest import Result

LIMIT_S = 60
HOST = "127.0.0.1"


@dataclass
class Ranks:
    """Several processes, and the store through which they meet."""

    store: distributed.TCPStore
    running: list[BaseProcess] = field(default_factory=list)

    def codes(self) -> list[int]:
        """Their exit codes. When one fails, the others get a SIGTERM, as from torchrun."""
        end, told = time.monotonic() + LIMIT_S, False
        while any(p.is_alive() for p in self.running):
            failed = any(p.exitcode for p in self.running)
            if failed and not told:
                told = True
                for p in self.running:
                    if p.is_alive() and p.pid:
                        os.kill(p.pid, signal.SIGTERM)
            if time.monotonic() > end:
                for p in self.running:
                    p.kill()
                raise AssertionError(f"processes have not ended in {LIMIT_S} s")
            time.sleep(0.01)
        return [processes.ended(p) for p in self.running]

    def kill(self, rank: int, number: signal.Signals) -> None:
        pid = self.running[rank].pid
        assert pid is not None
        os.kill(pid, number)


def start(count: int, function: Callable[..., None], *args: object) -> Ranks:
    """Each calls `function(*args, rank, count)`."""
    store = distributed.TCPStore(
        HOST, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=LIMIT_S)
    )
    ranks = Ranks(store)
    for rank in range(count):
        ranks.running.append(
            processes.start(_as_rank, rank, count, store.port, function, *args, rank, count)
        )
    return ranks


def run(count: int, function: Callable[..., None], *args: object) -> None:
    assert start(count, function, *args).codes() == [0] * count


def _as_rank(
    rank: int, count: int, port: int, function: Callable[..., None], *args: object
) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(count),
        LOCAL_WORLD_SIZE=str(count),
        MASTER_ADDR=HOST,
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",
        TORCHELASTIC_RESTART_COUNT="0",
    )
    app.AFTER_S, app.LOST_S = 3.0, 20.0
    function(*args)


@dataclass
class Commands:
    """The command line in several processes; called, the result of each."""

    ranks: Ranks
    folder: Path

    def __call__(self) -> list[Result]:
        codes = self.ranks.codes()
        return [
            Result(code, self._text(rank, "out"), self._text(rank, "err"))
            for rank, code in enumerate(codes)
        ]

    def _text(self, rank: int, name: str) -> str:
        path = self.folder / f"{name}{rank}"
        return path.read_text() if path.exists() else ""


def command(count: int, folder: Path, *line: object) -> Commands:
    folder.mkdir(exist_ok=True)
    return Commands(start(count, _command, folder, [str(word) for word in line]), folder)


def _command(folder: Path, line: list[str], rank: int, count: int) -> None:
    processes.run_command(folder / f"out{rank}", folder / f"err{rank}", line)
