"""Durable files: whole or not at all, in whatever order the disk keeps things; and locks."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from kdcache import files, waiting
from tests import processes

# --- writing ---------------------------------------------------------------------------------


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What is synced, renamed and made, by name, in order."""
    seen: list[tuple[str, str]] = []
    fsync, replace, link, mkdir = os.fsync, os.replace, os.link, os.mkdir

    def synced(descriptor: int) -> None:
        name = Path(os.readlink(f"/proc/self/fd/{descriptor}")).name
        seen.append(("fsync", re.sub(r"\.[0-9a-f]{8}\.partial", ".partial", name)))
        fsync(descriptor)

    def replaced(source: Any, target: Any) -> None:
        seen.append(("name", Path(target).name))
        replace(source, target)

    def linked(source: Any, target: Any) -> None:
        seen.append(("name", Path(target).name))
        link(source, target)

    def made(path: Any, *rest: Any) -> None:
        seen.append(("mkdir", Path(path).name))
        mkdir(path, *rest)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    monkeypatch.setattr(os, "link", linked)
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
        ("name", "f"),
        ("fsync", "b"),
    ]
    assert (folder / "f").read_bytes() == b"data"
    assert os.listdir(folder) == ["f"]


def test_no_two_writers_share_a_partial_file_and_its_name_fits(tmp_path: Path) -> None:
    path = tmp_path / ("ü" * 127)
    paths = {files.partial_path(path) for _ in range(100)}
    assert len(paths) == 100
    files.write_file(path, b"data")
    assert path.read_bytes() == b"data"


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("call", ["fsync", "replace and link"])
def test_an_error_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Any, call: str
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for name in call.split(" and "):
        monkeypatch.setattr(os, name, full)
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
    old = ("f.partial", "f.partial-7")
    for name in ("f", "g", *old, ".tmpAb12", "partial", "f.0123abcd.partial", "g.01234567.partial"):
        (tmp_path / name).touch()
    (tmp_path / "f.partial-8").mkdir()
    files.remove_abandoned(tmp_path, "f")
    assert sorted(os.listdir(tmp_path)) == [".tmpAb12", "f", "g", "g.01234567.partial", "partial"]
    files.remove_abandoned(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["f", "g", "partial"]
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "f.0123abcd.partial").touch()
    files.remove_abandoned(tmp_path)
    assert os.listdir(tmp_path / "a")
    files.remove_abandoned(tmp_path, below=True)
    assert not os.listdir(tmp_path / "a")
    files.remove_abandoned(tmp_path / "none")


@pytest.mark.parametrize("error", [errno.EPERM, errno.EOPNOTSUPP])
def test_without_hard_links_a_file_is_renamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, "link", refuse)
    assert files.create_file(tmp_path / "f", b"data")
    assert not files.create_file(tmp_path / "f", b"other")
    assert (tmp_path / "f").read_bytes() == b"data"
    assert os.listdir(tmp_path) == ["f"]


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


def test_who_has_a_lock_is_said(tmp_path: Path) -> None:
    """In this process too: a lock is that of an open file."""
    words = rf"process {os.getpid()} on {socket.gethostname()}"
    with files.hold(tmp_path / "lock"):
        with pytest.raises(files.Taken, match=words), files.hold(tmp_path / "lock"):
            pass
    assert os.listdir(tmp_path) == []


def test_a_wait_for_a_lock_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(files, "LOCK_LIMIT_S", 0.3)
    monkeypatch.setattr(waiting, "SAID_AFTER_S", 0.1)
    with files.hold(tmp_path / "lock"):
        words = rf"waited .* s for the lock .*lock \(process {os.getpid()} on"
        with pytest.raises(TimeoutError, match=words), files.lock_file(tmp_path / "lock"):
            pass
    assert len(caplog.messages) == 1
    assert "still waiting for the lock" in caplog.messages[0]


# --- on a file system without locks ------------------------------------------------------------


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    monkeypatch.setattr(fcntl, "flock", refuse)


OTHER_HOST = "elsewhere 1-2-3 4026531836 1 5"


@pytest.mark.usefixtures("no_locks")
def test_the_file_is_the_lock(tmp_path: Path) -> None:
    with files.hold(tmp_path / "lock"):
        with pytest.raises(files.Taken), files.hold(tmp_path / "lock"):
            pass
    with files.hold(tmp_path / "lock"):
        pass
    assert os.listdir(tmp_path) == []


@pytest.mark.usefixtures("no_locks")
def test_a_lock_of_a_process_that_has_ended_is_removed(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    with files.hold(lock):
        host, boot, namespace, pid, began = lock.read_text().split()
    for ended in (
        (host, boot, namespace, "4194304", began),  # no such process
        (host, boot, namespace, pid, "1"),  # its number has come again
        (host, "another-boot", "1", "1", began),
    ):
        lock.write_text(" ".join(ended))
        with files.hold(lock):
            assert lock.read_text().split()[3] == str(os.getpid())
        assert not lock.exists()


@pytest.mark.usefixtures("no_locks")
@pytest.mark.parametrize("text", [OTHER_HOST, "", "what is this"])
def test_a_lock_of_a_process_that_cannot_be_seen_stays(tmp_path: Path, text: str) -> None:
    (tmp_path / "lock").write_text(text)
    with pytest.raises(files.Taken), files.hold(tmp_path / "lock"):
        pass
    assert (tmp_path / "lock").read_text() == text


@pytest.mark.usefixtures("no_locks")
def test_in_another_namespace_a_number_is_another_process(tmp_path: Path) -> None:
    with files.hold(tmp_path / "lock"):
        host, boot, _, _, began = (tmp_path / "lock").read_text().split()
    (tmp_path / "lock").write_text(" ".join((host, boot, "1", "4194304", began)))
    with pytest.raises(files.Taken, match="process 4194304 on"), files.hold(tmp_path / "lock"):
        pass


@pytest.mark.usefixtures("no_locks")
def test_bytes_of_a_file_count_as_locked(tmp_path: Path) -> None:
    with (tmp_path / "f").open("wb") as file:
        assert files.lock(file.fileno(), wait=False)
        files.unlock(file.fileno())
