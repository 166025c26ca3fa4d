"""Processes to be watched, interrupted and killed.

They are forked from one that has the heavy modules loaded and no threads, so they start in no time.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import fsspec
import torch

from kdcache import waiting
from kdcache.cache import layout
from kdcache.cache.object_store import ObjectStore
from kdcache.cli import app
from kdcache.data.beton import open_dataset
from kdcache.models import load
from kdcache.teacher import precompute as recording
from kdcache.teacher.precompute import precompute
from kdcache.training import loop
from kdcache.views.spec import ViewSpec
from tests.conftest import TEACHER, Result, cache_spec

LIMIT_S = 90
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.processes"])
ANSWERS, FSYNC, PUT = recording.iter_teacher_logits, os.fsync, ObjectStore.write_new
HEAVY = (app, loop)  # what the commands would import
# A forked process would look through all that was imported, copying it, before anything else.
gc.collect()
gc.freeze()


def start(function: Callable[..., None], *args: object) -> BaseProcess:
    environment = dict(os.environ)  # of now; the process to fork from has an older one
    process = _context.Process(target=_one_thread, args=(environment, function, *args))
    process.start()
    return process


def run(function: Callable[..., None], *args: object) -> int:
    """The exit code of a process that calls a function."""
    return ended(start(function, *args))


def ended(process: BaseProcess) -> int:
    process.join(LIMIT_S)
    if process.exitcode is None:
        process.kill()
        raise AssertionError(f"a process has not ended in {LIMIT_S} s")
    return process.exitcode


def _one_thread(environment: dict[str, str], function: Callable[..., None], *args: object) -> None:
    os.environ.clear()
    os.environ.update(environment)
    fsspec.config.conf.clear()
    fsspec.config.set_conf_env(fsspec.config.conf)
    torch.set_num_threads(1)
    # A semaphore of this method has no name that outlives a killed process.
    multiprocessing.set_start_method("fork", force=True)
    function(*args)


def contents(path: Path) -> dict[str, bytes]:
    """Of every file below a folder."""
    return {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file()}


@dataclass(frozen=True)
class Job:
    """One call of precompute, on small shards.

    log       gets a line for each shard that is computed
    fsync_s   what every fsync or put takes, so that kills hit between the writes too
    start_s   on the clock of time.time: for several to come to the same thing at once
    """

    data: Path
    out: str | Path
    log: Path
    part: tuple[int, int] = (0, 1)
    num_views: int = 3
    view_seed: int = 0
    fsync_s: float = 0.0
    start_s: float = 0.0

    def start(self) -> BaseProcess:
        return start(record, self)

    def run(self) -> None:
        assert run(record, self) == 0

    def computed(self) -> list[tuple[int, int]]:
        """The (view, shard) pairs that were computed, by all with this log, in order."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [(int(v), int(s)) for v, s in (line.split() for line in lines)]


def record(job: Job) -> None:
    small_shards()
    log = os.open(job.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def logged(loader: Any, teacher: Any, spec: Any, view: int, rows: Any) -> Any:
        os.write(log, f"{view} {rows[0] // layout.Layout.of(spec).shard_rows}\n".encode())
        return ANSWERS(loader, teacher, spec, view, rows)

    def slow(descriptor: int) -> None:
        time.sleep(job.fsync_s)
        FSYNC(descriptor)

    def slow_put(store: ObjectStore, key: str, data: bytes) -> bool:
        time.sleep(job.fsync_s)
        return PUT(store, key, data)

    recording.iter_teacher_logits, os.fsync = logged, slow
    ObjectStore.write_new = slow_put  # type: ignore[method-assign]
    waiting.PAUSE_S = 0.05, 0.1
    data = open_dataset(job.data)
    teacher = load.load_model(TEACHER, "teacher", num_classes=len(data.class_names), size_px=8)
    spec = cache_spec(
        data, teacher, ViewSpec(8, seed=job.view_seed), num_views=job.num_views, dtype="float32"
    )
    time.sleep(max(0.0, job.start_s - time.time()))
    with as_command():
        precompute(data, teacher, spec, job.out, batch_size=16, workers=1, part=job.part)


def small_shards() -> None:
    """About 50 digits in a shard, in chunks of 16."""
    layout.CHUNK_BYTES, layout.SHARD_BYTES = 512, 2048


@contextlib.contextmanager
def as_command() -> Any:
    """Our errors end the process as they end a command."""
    try:
        yield
    except app.KDCacheError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


def command(folder: Path, *line: object) -> Any:
    """The command line once it has begun; called, its result. Its words go through files."""
    out, err = folder / "stdout", folder / "stderr"
    err.unlink(missing_ok=True)
    process = start(run_command, out, err, [str(word) for word in line])
    while process.is_alive() and not err.exists():
        time.sleep(0.001)

    def result() -> Result:
        return Result(ended(process), out.read_text(), err.read_text())

    result.process = process  # type: ignore[attr-defined]
    return result


def run_command(out: Path, err: Path, line: list[str]) -> None:
    for path, stream in ((out, sys.stdout), (err, sys.stderr)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, stream.fileno())
    sys.argv = ["kdcache", *line]
    app.main()


def own_mounts() -> None:
    """What this process mounts, it alone sees. Raises OSError where that is not allowed."""
    new_users, new_mounts = 0x10000000, 0x00020000
    user, group = os.getuid(), os.getgid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(new_mounts | (new_users if user else 0)):
        raise OSError(ctypes.get_errno(), "no mounts of one's own")
    if user:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    mount("--make-rprivate", "/")


def mount(*options: object) -> None:
    done = subprocess.run(["mount", *map(str, options)], capture_output=True, text=True)
    if done.returncode:
        raise OSError(done.stderr)
