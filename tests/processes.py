"""Processes that record the digits on a tape, to be watched and killed.

They are forked from one that has the heavy modules loaded and no threads, so they start in no time.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from kdcache import models, shards
from kdcache import precompute as recording
from kdcache.dataset import open_dataset
from kdcache.errors import KDCacheError
from kdcache.precompute import precompute, tape_spec
from kdcache.spec import ViewSpec
from tests.conftest import TEACHER

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.processes"])


@dataclass(frozen=True)
class Job:
    """One call of precompute, on small shards.

    log        gets a line for each shard that is computed
    fsync_s    what every fsync takes, so that kills hit between the writes too
    """

    data: Path
    out: str
    log: Path
    part: tuple[int, int] = (0, 1)
    views: int = 3
    fsync_s: float = 0.0

    def start(self) -> BaseProcess:
        process = _context.Process(target=_record, args=(self,))
        process.start()
        return process

    def run(self) -> int:
        """Its exit code."""
        process = self.start()
        process.join(60)
        assert process.exitcode is not None
        return process.exitcode

    def computed(self) -> list[tuple[int, int]]:
        """The (view, shard) pairs that were computed, by all with this log, in order."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [(int(v), int(s)) for v, s in (line.split() for line in lines)]


def _record(job: Job) -> None:
    torch.set_num_threads(1)
    shards.CHUNK_BYTES, shards.SHARD_BYTES = 512, 2048
    log = os.open(job.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    answers, fsync = recording.answers, os.fsync

    def logged(loader: Any, teacher: Any, spec: Any, view: int, rows: Any) -> Any:
        os.write(log, f"{view} {rows[0] // shards.Layout.of(spec).shard_rows}\n".encode())
        return answers(loader, teacher, spec, view, rows)

    def slow(descriptor: int) -> None:
        time.sleep(job.fsync_s)
        fsync(descriptor)

    recording.answers, os.fsync = logged, slow
    data = open_dataset(job.data)
    teacher = models.load(TEACHER, "teacher", num_classes=len(data.classes), size_px=8)
    spec = tape_spec(data, teacher, ViewSpec(8), views=job.views, dtype="float32")
    try:
        precompute(data, teacher, spec, job.out, batch_size=16, workers=1, part=job.part)
    except KDCacheError as error:
        print(error)
        os._exit(2)
