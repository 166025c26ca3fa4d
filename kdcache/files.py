"""Durable files and file locks: the one place where kdcache writes to a file system.

A file appears at its path whole or not at all, also after a power cut: its bytes go to a partial
file of a random name in the same folder, are synced, and are then renamed; the folder is synced
last. A process that is killed in between leaves the partial file, which `remove_abandoned` deletes.

A lock ends with its process, however the process ends. All functions raise OSError.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import os
import secrets
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError

from kdcache.waiting import Wait

PARTIAL, LOCK = ".partial", ".lock"
SAFETENSORS_PARTIAL = ".tmp*"
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
NO_LINKS = {errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK}
LONGEST_STEM = 200  # bytes: names have 255
LOCK_LIMIT_S = 600.0


class Taken(BlockingIOError):
    """Another process has the lock; str() says which."""


def partial_path(path: Path) -> Path:
    """A new path for the bytes of `path` while they are written."""
    stem = path.name.encode()[:LONGEST_STEM].decode(errors="ignore")
    return path.with_name(f"{stem}.{secrets.token_hex(4)}{PARTIAL}")


def make_folder(path: Path) -> None:
    """Make a folder and its parents, each durably, where they are missing."""
    if not path.is_dir():
        # From the top: a folder counts as made once its entry in its parent is synced.
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        sync_folder(path.parent)


def write_file(path: Path, data: bytes) -> None:
    """Put or replace a file, and make its folder where there is none."""
    with replace_file(path) as partial:
        partial.write_bytes(data)


def create_file(path: Path, data: bytes) -> bool:
    """Put a file where there is none; False where there is one, whatever it holds.

    Of several processes that call this at once, one writes. A file system without hard links may
    let two of them write, and then has the bytes of either.
    """
    if path.exists():
        return False
    make_folder(path.parent)
    partial = partial_path(path)
    try:
        partial.write_bytes(data)
        sync_file(partial)
        try:
            os.link(partial, path)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            _rename(partial, path)
        else:
            sync_folder(path.parent)
    finally:
        _remove(partial)
    return True


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """The partial path to write to. It becomes `path` at the end, and is removed on an error."""
    partial = partial_path(path)
    try:
        make_folder(path.parent)
        yield partial
        commit_file(partial, path)
    # Also for Ctrl-C: a partial file would take the space of a whole one.
    except BaseException:
        _remove(partial)
        raise


@contextmanager
def replace_folder(path: Path) -> Iterator[Path]:
    """A partial folder to write to, for the one process that writes `path`; otherwise as
    `replace_file`. What is at `path` must be an empty folder or nothing."""
    remove_abandoned(path.parent, path.name)
    partial = partial_path(path)
    try:
        make_folder(partial)
        yield partial
        for folder, _, _ in os.walk(partial):
            sync_folder(Path(folder))
        _rename(partial, path)
    except BaseException:
        _remove(partial)
        raise


def commit_file(partial: Path, path: Path) -> None:
    """Rename a whole file to `path`, so that a power cut leaves the old file there or the new."""
    # The bytes before the name, or a power cut could leave the name with none of them.
    sync_file(partial)
    _rename(partial, path)


def remove_abandoned(folder: Path, name: str = "", *, below: bool = False) -> None:
    """Delete the partial files in a folder that killed processes have left.

    name    of the file that they were to become; "": of any
    below   in the folders below it too

    For a process that alone writes there, or holds a lock on what it removes.
    """
    stem = glob.escape(name.encode()[:LONGEST_STEM].decode(errors="ignore"))
    # Earlier versions wrote to `name.partial` and `name.partial-PID`.
    patterns = (f"{stem}{PARTIAL}*", f"{stem}.*{PARTIAL}") if name else (f"*{PARTIAL}",)
    for pattern in (*patterns, *(() if name else (SAFETENSORS_PARTIAL,))):
        for path in folder.rglob(pattern) if below else folder.glob(pattern):
            _remove(path)


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def iter_sizes(
    folder: Path | str, prefix: str = "", *, ignored: tuple[str, ...] = ()
) -> Iterator[tuple[str, int]]:
    """(relative path, bytes) of the committed files below a folder; of a file or nothing, none."""
    try:
        entries = os.scandir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return
    with entries:
        for entry in entries:
            if entry.is_dir():
                yield from iter_sizes(entry.path, f"{prefix}{entry.name}/", ignored=ignored)
            elif not entry.name.endswith((PARTIAL, LOCK)) and entry.name not in ignored:
                with contextlib.suppress(FileNotFoundError):  # another process may be at work
                    yield prefix + entry.name, entry.stat().st_size


def save_tensors(
    path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file with the mode of any new file: the library's own is 0600."""
    # Made here first, so that the process's umask decides its mode.
    path.touch()
    mode = path.stat().st_mode
    try:
        safetensors.torch.save_file(tensors, path, metadata)
    except SafetensorError as error:
        raise OSError(str(error)) from error
    path.chmod(mode)


def sync_file(path: Path) -> None:
    _sync(path, os.O_RDWR)


def sync_folder(path: Path) -> None:
    # A new name is in the folder's own data, which is synced apart from the file's.
    _sync(path, os.O_RDONLY)


@contextmanager
def lock_file(path: Path) -> Iterator[None]:
    """One process at a time; the others wait, and raise TimeoutError in the end.

    The file is made here, and removed at the end.
    """
    wait = Wait(f"the lock {path}", LOCK_LIMIT_S, "end the process that holds it, or remove it")
    while True:
        try:
            with hold(path):
                yield
            return
        except Taken as taken:
            wait.pause(str(taken))


@contextmanager
def hold(path: Path) -> Iterator[None]:
    """Have a lock, of which a file at this path is the sign. Raises Taken where another has it.

    The file is opened for writing, without which NFS locks nothing. It says who has it: host, boot,
    namespace, process and when that began. On a file system without locks this text decides: of a
    process that is seen to have ended, the file is removed.
    """
    make_folder(path.parent)
    while True:
        descriptor, created = _open_lock(path)
        try:
            owner = _read_owner(descriptor)
            if not _lock_whole(descriptor, created):
                if not _has_ended(owner):
                    raise Taken(_describe_owner(owner))
                _remove(path)
            if not _is_at(descriptor, path):  # removed, here or by the process before
                continue
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, " ".join(_this_process()).encode(), 0)
            try:
                yield
            finally:
                if _is_at(descriptor, path):
                    _remove(path)
            return
        finally:
            os.close(descriptor)


def _open_lock(path: Path) -> tuple[int, bool]:
    """Opened, and whether it was made here."""
    with contextlib.suppress(FileExistsError):
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666), True
    return os.open(path, os.O_RDWR | os.O_CREAT, 0o666), False


def _lock_whole(descriptor: int, created: bool) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return created
    return True


def _this_process() -> tuple[str, ...]:
    return (socket.gethostname(), _boot(), _namespace(), str(os.getpid()), _began(os.getpid()))


def _read_owner(descriptor: int) -> list[str]:
    return os.pread(descriptor, 1000, 0).decode(errors="replace").split()


def _has_ended(owner: list[str]) -> bool:
    """Whether that process can be seen to be no more, which from another machine it cannot."""
    if len(owner) != 5 or owner[0] != socket.gethostname():
        return False
    _, boot, namespace, pid, began = owner
    return boot != _boot() or (namespace == _namespace() and _began(pid) != began)


def _describe_owner(owner: list[str]) -> str:
    return f"process {owner[3]} on {owner[0]}" if len(owner) == 5 else "another process"


def _boot() -> str:
    return _proc("/proc/sys/kernel/random/boot_id")


def _namespace() -> str:
    """Of process numbers: in another one, a container, the same number is another process."""
    try:
        return str(os.stat("/proc/self/ns/pid").st_ino)
    except OSError:
        return "-"


def _began(pid: int | str) -> str:
    """When, in ticks since the machine began; numbers of processes come again."""
    # The name in parentheses may hold anything.
    text = _proc(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return text[19] if len(text) > 19 else "-"


def _proc(path: str) -> str:
    try:
        return Path(path).read_text().strip() or "-"
    except OSError:
        return "-"


def lock(descriptor: int, start: int = 0, length: int = 0, *, wait: bool = True) -> bool:
    """Lock bytes of an open file for this process; a length of 0 means to the end.

    Without `wait`, False where another process holds them.
    """
    return _lock(
        descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB, start, length
    )


def unlock(descriptor: int, start: int = 0, length: int = 0) -> None:
    _lock(descriptor, fcntl.LOCK_UN, start, length)


def _lock(descriptor: int, operation: int, start: int, length: int) -> bool:
    try:
        fcntl.lockf(descriptor, operation, length, start)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):  # POSIX allows either for "taken"
            return False
        if error.errno not in NO_LOCKS:
            raise
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _rename(partial: Path, path: Path) -> None:
    partial.replace(path)
    sync_folder(path.parent)


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
