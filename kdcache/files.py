"""Durable files and file locks: the one place where kdcache writes to a file system.

A file appears at its path whole or not at all, also after a power cut: its bytes go to a partial
file in the same folder, are synced, and are then renamed; the folder is synced last. A process that
is killed in between leaves the partial file, which a rerun replaces or `remove_abandoned` deletes.

A lock ends with its process, however the process ends. On a file system without locks, every lock
counts as taken. All functions raise OSError.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError

PARTIAL = ".partial"
ABANDONED = ("*" + PARTIAL, ".tmp*")  # safetensors writes to .tmp*
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


def partial_path(path: Path) -> Path:
    """Where the bytes of `path` are while they are written. One name: a rerun replaces it."""
    return path.with_name(path.name + PARTIAL)


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

    Of several processes that call this at once, one writes and the others wait for it.
    """
    if path.exists():
        return False
    partial = partial_path(path)
    with lock_file(partial) as descriptor:
        # Again under the lock: another process may have written it in the meantime.
        if path.exists():
            return False
        # A killed process may have left bytes here.
        os.ftruncate(descriptor, 0)
        with open(descriptor, "wb", closefd=False) as file:
            file.write(data)
        # Not commit_file: closing another descriptor of the file would end the lock.
        os.fsync(descriptor)
        _rename(partial, path)
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
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def commit_file(partial: Path, path: Path) -> None:
    """Rename a whole file to `path`, so that a power cut leaves the old file there or the new."""
    # The bytes before the name, or a power cut could leave the name with none of them.
    sync_file(partial)
    _rename(partial, path)


def remove_abandoned(folder: Path) -> None:
    """Delete the partial files in a folder that killed processes have left."""
    for pattern in ABANDONED:
        for path in folder.glob(pattern):
            path.unlink()


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
            elif not entry.name.endswith(PARTIAL) and entry.name not in ignored:
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
def lock_file(path: Path) -> Iterator[int]:
    """One process at a time; the others wait. Gives a descriptor of the locked file.

    The file is made here, and removed at the end unless it has been renamed.
    """
    make_folder(path.parent)
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            lock(descriptor)
            if not _is_at(descriptor, path):  # the process before has removed or renamed it
                continue
            try:
                yield descriptor
            finally:
                if _is_at(descriptor, path):
                    with contextlib.suppress(OSError):
                        path.unlink()
            return
        finally:
            os.close(descriptor)


def lock_folder(folder: Path) -> int:
    """Lock a folder until the returned descriptor is closed. Raises BlockingIOError where another
    process holds it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise
    except OSError:
        pass  # a file system without locks
    return descriptor


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
