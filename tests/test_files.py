"""Durable files: whole or not at all, in whatever order the disk keeps things; and locks."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from kdcache import files
from tests import processes

# --- writing ---------------------------------------------------------------------------------


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What is synced, renamed and made, by name, in order."""
    seen: list[tuple[str, str]] = []
    fsync, replace, mkdir = os.fsync, os.replace, os.mkdir

    def synced(descriptor: int) -> None:
        seen.append(("fsync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        fsync(descriptor)

    def replaced(source: Any, target: Any) -> None:
        seen.append(("rename", Path(target).name))
        replace(source, target)

    def made(path: Any, *rest: Any) -> None:
        seen.append(("mkdir", Path(path).name))
        mkdir(path, *rest)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    monkeypatch.setattr(os, "mkdir", made)
    return seen


WRITERS = [files.write_file, files.create_file]


@pytest.mark.parametrize("write", WRITERS)
def test_bytes_are_synced_before_the_name_and_the_folder_after(
    tmp_path: Path, events: list[tuple[str, str]], write: Any
) -> None:
    folder = tmp_path / "a" / "b"
    write(folder / "f", b"data")
    assert events == [
        ("mkdir", "a"),
        ("fsync", tmp_path.name),
        ("mkdir", "b"),
        ("fsync", "a"),
        ("fsync", "f.partial"),
        ("rename", "f"),
        ("fsync", "b"),
    ]
    assert (folder / "f").read_bytes() == b"data"
    assert os.listdir(folder) == ["f"]


@pytest.mark.parametrize("write", WRITERS)
def test_what_a_killed_process_left_is_replaced(tmp_path: Path, write: Any) -> None:
    files.partial_path(tmp_path / "f").write_bytes(b"a longer beginning")
    write(tmp_path / "f", b"data")
    assert (tmp_path / "f").read_bytes() == b"data"
    assert os.listdir(tmp_path) == ["f"]


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_an_error_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Any, call: str
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "f", b"data")
    assert os.listdir(tmp_path) == []


def _write_a_part(partial: Path) -> None:
    partial.write_bytes(b"a beginning")
    raise KeyboardInterrupt


def test_a_write_replaces_and_an_error_keeps_what_was_there(tmp_path: Path) -> None:
    files.write_file(tmp_path / "f", b"old")
    files.write_file(tmp_path / "f", b"new")
    with pytest.raises(KeyboardInterrupt), files.replace_file(tmp_path / "f") as partial:
        _write_a_part(partial)
    assert (tmp_path / "f").read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["f"]


def test_a_file_that_is_there_is_not_created(tmp_path: Path) -> None:
    assert files.create_file(tmp_path / "f", b"old")
    assert not files.create_file(tmp_path / "f", b"new")
    assert not files.create_file(tmp_path / "f", b"old")
    assert (tmp_path / "f").read_bytes() == b"old"


def _create(path: Path, at: float) -> None:
    data = str(os.getpid()).encode() * 100_000
    time.sleep(max(0.0, at - time.time()))
    created = files.create_file(path, data)
    assert created == (path.read_bytes() == data)
    sys.exit(int(created))


def test_of_processes_that_create_a_file_at_once_one_does(tmp_path: Path) -> None:
    for round in range(3):
        at = time.time() + 0.2
        running = [processes.start(_create, tmp_path / str(round), at) for _ in range(4)]
        assert sorted(map(processes.ended, running)) == [0, 0, 0, 1]
    assert sorted(os.listdir(tmp_path)) == ["0", "1", "2"]


def test_abandoned_files_are_removed(tmp_path: Path) -> None:
    for name in ("f", "f.partial", ".tmpAb12", "partial", "f.partial-7"):
        (tmp_path / name).touch()
    files.remove_abandoned(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["f", "f.partial-7", "partial"]
    files.remove_abandoned(tmp_path / "none")


def test_tensors_have_the_mode_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    files.save_tensors(tmp_path / "f", {"x": torch.arange(3)}, {"about": "it"})
    assert (tmp_path / "f").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert safetensors.torch.load_file(tmp_path / "f")["x"].tolist() == [0, 1, 2]
    with pytest.raises(OSError, match="No such file"):
        files.save_tensors(tmp_path / "none" / "f", {})


# --- locks -----------------------------------------------------------------------------------


def _hold(path: Path) -> None:
    with files.lock_file(path):
        (path.parent / "held").touch()
        time.sleep(60)


def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    holder = processes.start(_hold, tmp_path / "lock")
    while not (tmp_path / "held").exists():
        time.sleep(0.01)
    waiting = processes.start(_take, tmp_path / "lock")
    waiting.join(0.2)
    assert waiting.exitcode is None
    holder.kill()
    assert processes.ended(holder) == -signal.SIGKILL
    assert processes.ended(waiting) == 0
    assert os.listdir(tmp_path) == ["held"]


def _take(path: Path) -> None:
    with files.lock_file(path):
        assert path.exists()


def test_a_locked_file_that_was_renamed_stays(tmp_path: Path) -> None:
    with files.lock_file(tmp_path / "lock"):
        (tmp_path / "lock").rename(tmp_path / "other")
        (tmp_path / "lock").touch()
    assert sorted(os.listdir(tmp_path)) == ["lock", "other"]


def _lock_folder(folder: Path) -> None:
    try:
        files.lock_folder(folder)
    except BlockingIOError:
        sys.exit(1)


def test_a_folder_is_locked_until_its_descriptor_is_closed(tmp_path: Path) -> None:
    descriptor = files.lock_folder(tmp_path)
    assert processes.run(_lock_folder, tmp_path) == 1
    os.close(descriptor)
    assert processes.run(_lock_folder, tmp_path) == 0


def test_without_locks_every_lock_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    monkeypatch.setattr(fcntl, "flock", refuse)
    assert files.create_file(tmp_path / "f", b"data")
    with files.lock_file(tmp_path / "lock") as descriptor:
        assert files.lock(descriptor, wait=False)
        files.unlock(descriptor)
    os.close(files.lock_folder(tmp_path))
    assert os.listdir(tmp_path) == ["f"]
