"""Stores: durable writes, full and read-only disks, locks, and every way to name a place."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import os
import re
import resource
import shutil
import sys
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from kdcache.cache.cache import LogitCache
from kdcache.cache.codecs import TopK
from kdcache.cache.folder_store import FolderStore
from kdcache.cache.object_store import ObjectStore
from kdcache.cache.spec import CacheSpec
from kdcache.cache.store import open_store
from kdcache.cli import app, output
from kdcache.data.beton import Dataset
from kdcache.errors import MissingDependency, StorageConflict, StorageError, UsageError
from kdcache.files import write_file
from kdcache.views.spec import ViewSpec
from tests import processes
from tests.conftest import TEACHER, overwrite
from tests.processes import Job, contents

SPEC = CacheSpec(2, 50, 30, TopK(4), "data", "teacher", ViewSpec(8))
STUDENT = "python:tests.conftest:convolutional_student"
CANNOT = 77  # exit code: this machine does not allow what the test needs


@pytest.fixture(scope="module")
def whole(digits_test: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("whole")
    job = Job(digits_test.path, folder / "t", folder / "log")
    job.run()
    return job


def write_all(cache: LogitCache) -> None:
    torch.manual_seed(0)
    for view, shard in cache.shards():
        logits = torch.randn(cache.num_rows(shard), SPEC.num_classes)
        cache.write(view, shard, TopK(4).encode(logits))


# --- durable ---------------------------------------------------------------------------------


def test_what_counts_is_on_the_disk_first_and_the_seal_comes_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """File, name, folder: in this order for every object, and the folders that hold them."""
    events: list[tuple[str, Path]] = []
    fsync, replace, link, mkdir = os.fsync, os.replace, os.link, os.mkdir

    def synced(descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        events.append(("fsync", Path(re.sub(r"\.[0-9a-f]{8}\.partial", ".partial", path))))
        fsync(descriptor)

    def replaced(source: Any, target: Any) -> None:
        events.append(("name", Path(target)))
        replace(source, target)

    def linked(source: Any, target: Any) -> None:
        events.append(("name", Path(target)))
        link(source, target)

    def made(path: Any, *rest: Any) -> None:
        events.append(("mkdir", Path(path)))
        mkdir(path, *rest)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    monkeypatch.setattr(os, "link", linked)
    monkeypatch.setattr(os, "mkdir", made)
    out = tmp_path / "deep" / "t"
    write_all(LogitCache.create(out, SPEC, {}))
    named = [path.relative_to(out).as_posix() for what, path in events if what == "name"]
    assert sorted(named) == sorted(contents(out))
    assert named.index("zarr.json") == 4
    assert [n for n in named if "/c/" in n] == [
        f"{name}/c/{view}/0/0{'/0' if name == 'seals' else ''}"
        for view in (0, 1)
        for name in ("logits", "classes", "tail", "seals")
    ]
    for i, (what, path) in enumerate(events):
        if what == "name":
            assert events[i - 1] == ("fsync", path.with_name(path.name + ".partial"))
        if what != "fsync":
            assert events[i + 1] == ("fsync", path.parent)


# --- full ------------------------------------------------------------------------------------


def _record(job: Job) -> str:
    """The words of a command that fails; "" for one that does not."""
    words = io.StringIO()
    with contextlib.redirect_stderr(words):
        try:
            processes.record(job)
        except SystemExit as end:
            code = end.code
        else:
            code = 0
    assert code == (2 if words.getvalue() else 0)
    return words.getvalue()


def _on_a_full_disk(job: Job, disk: Path, pages: int) -> None:
    try:
        processes.own_mounts()
        processes.mount("-t", "tmpfs", "-o", "size=4m", "tmpfs", disk)
    except OSError as error:
        print(error)
        sys.exit(CANNOT)
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    (disk / "ballast").write_bytes(bytes(free - pages * 4096))
    words = _record(job)
    assert "No space left on device" in words, words
    assert len(words.splitlines()) == 1
    begun, before = (Path(job.out) / "zarr.json").exists(), len(job.computed())
    missing = len(LogitCache.open(job.out).missing()) if begun else 21
    (disk / "ballast").unlink()
    assert _record(job) == ""
    assert len(job.computed()) - before == missing
    shutil.copytree(job.out, disk.parent / "copy")


@pytest.mark.parametrize("pages", [1, 4, 8, 9, 10, 11, 12, 30])
def test_a_full_disk(whole: Job, tmp_path: Path, pages: int) -> None:
    """Full while the cache is created, or in a shard's first object, second, seal, or later."""
    disk = tmp_path / "disk"
    disk.mkdir()
    job = Job(whole.data, disk / "t", tmp_path / "log")
    code = processes.run(_on_a_full_disk, job, disk, pages)
    if code == CANNOT:
        pytest.skip("no mounts allowed here")
    assert code == 0
    assert contents(tmp_path / "copy") == contents(Path(whole.out))


def _with_files_limited(job: Job) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1600, resource.RLIM_INFINITY))
    words = _record(job)
    assert words.startswith("view 0 shard 0: cannot write"), words
    assert "File too large; fix the storage and run the same command again" in words
    assert len(words.splitlines()) == 1
    left = {f.name for f in Path(job.out).rglob("*") if f.is_file()}
    assert left == {"zarr.json", ".claims"}
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    assert _record(job) == ""


def test_a_write_that_the_system_refuses(whole: Job, tmp_path: Path) -> None:
    """Files may not grow above 1600 bytes, a shard here has more: no privileges needed."""
    job = Job(whole.data, tmp_path / "t", tmp_path / "log")
    assert processes.run(_with_files_limited, job) == 0
    assert contents(tmp_path / "t") == contents(Path(whole.out))


# --- read-only -------------------------------------------------------------------------------


def _main(*line: object) -> tuple[int, str]:
    words = io.StringIO()
    sys.argv = ["kdcache", *map(str, line)]
    with contextlib.redirect_stderr(words), contextlib.redirect_stdout(io.StringIO()):
        output.err_console().file = words
        try:
            app.main()
        except SystemExit as end:
            return int(end.code or 0), words.getvalue()
    return 0, words.getvalue()


def _read_only(folder: Path, data: Path) -> None:
    if os.getuid():
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o555 if path.is_dir() else 0o444)
    else:
        try:
            processes.own_mounts()
            processes.mount("--bind", folder, folder)
            processes.mount("-o", "remount,bind,ro", folder)
        except OSError as error:
            print(error)
            sys.exit(CANNOT)
    make = ["precompute", "--data", data, "--teacher", TEACHER, "--views", 2, "--out"]
    for name in ("part.zarr", "new.zarr", "deep/new.zarr"):
        code, words = _main(*make, folder / name)
        assert (code, len(words.splitlines())) == (2, 1), words
        assert f"kdcache: cannot write {folder}" in words
        assert "Read-only file system" in words or "Permission denied" in words
    line = ["train", "--mode", "cached", "--data", data, "--cache", folder / "whole.zarr"]
    line += ["--student", STUDENT, "--epochs", 1, "--out", folder.parent / "run"]
    assert _main(*line) == (0, "")
    assert _main("inspect", folder / "whole.zarr") == (0, "")
    assert _main(*make, folder / "whole.zarr") == (0, "")


def test_a_folder_that_is_read_only(digits_test: Dataset, tmp_path: Path) -> None:
    """What is there is read and trained from; what is not cannot be made, in a line."""
    folder = tmp_path / "folder"
    line = ["precompute", "--data", digits_test.path, "--teacher", TEACHER, "--views", 2]
    assert processes.command(tmp_path, *line, "--out", folder / "whole.zarr")().code == 0
    shutil.copytree(folder / "whole.zarr", folder / "part.zarr")
    (folder / "part.zarr/seals/c/1/0/0/0").unlink()
    code = processes.run(_read_only, folder, digits_test.path)
    if code == CANNOT:
        pytest.skip("no mounts allowed here")
    assert code == 0


# --- places ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["t", "./t/", "a b/größer 張.zarr", "../sideways/t", "{}/t", "file://{}/t", "local://{}/t"],
)
def test_a_folder_by_any_name(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    url = name.format(tmp_path)
    write_all(LogitCache.create(url, SPEC, {}))
    found = LogitCache.open(url)
    assert found.missing() == []
    assert found.store.sizes() == {k: len(v) for k, v in contents(Path(found.url)).items()}
    assert len(list(tmp_path.rglob("zarr.json"))) == 5


def test_a_cache_in_the_working_folder_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own folder may be prepared (striping, a mount), so it is not replaced."""
    monkeypatch.chdir(tmp_path)
    before = tmp_path.stat().st_ino
    cache = LogitCache.create(".", SPEC, {})
    assert cache.lock_shard(0, 0)
    write_all(cache)
    cache.store.release_locks()
    assert LogitCache.open(".").missing() == []
    assert tmp_path.stat().st_ino == before
    assert not list(tmp_path.glob(".c*"))


@pytest.mark.parametrize("url", ["memory://bucket/t", "memory://bucket/deep/t/"])
def test_an_object_store_keeps_the_same_bytes(tmp_path: Path, url: str) -> None:
    write_all(LogitCache.create(tmp_path / "t", SPEC, {}))
    cache = LogitCache.create(url, SPEC, {})
    assert isinstance(cache.store, ObjectStore)
    write_all(cache)
    assert {k: cache.store.read(k) for k in cache.store.sizes()} == contents(tmp_path / "t")
    cache.delete_shard(1, 0)
    assert LogitCache.open(url).missing() == [(1, 0)]
    cache.delete_shard(1, 0)
    for key in cache.store.sizes():
        cache.store.delete(key)


def test_a_killed_creation_in_an_object_store_is_done_again() -> None:
    """An object is whole or not there, so what is left is what the rerun writes."""
    whole = LogitCache.create("memory://bucket/not-killed", SPEC, {}).store.read("logits/zarr.json")
    assert whole is not None
    store = open_store("memory://bucket/killed")
    overwrite(store, "logits/zarr.json", whole)
    with pytest.raises(UsageError, match="exists and is not a cache"):
        LogitCache.open(store.url)
    assert LogitCache.create(store.url, SPEC, {}).spec == SPEC
    store = open_store("memory://bucket/another")
    overwrite(store, "logits/zarr.json", b"{")
    with pytest.raises(StorageConflict, match="remove what is there, or choose another path"):
        LogitCache.create(store.url, SPEC, {})
    assert store.sizes() == {"logits/zarr.json": 1}
    open_store("memory://bucket/other").write_new("thesis.txt", b"two years of work")
    with pytest.raises(UsageError, match="exists and is not a cache"):
        LogitCache.create("memory://bucket/other", SPEC, {})


def test_a_store_that_nobody_knows() -> None:
    with pytest.raises(StorageError, match=r"cannot open odd://bucket/t: Protocol not known"):
        LogitCache.open("odd://bucket/t")


def _without_s3fs() -> None:
    sys.modules["s3fs"] = None  # type: ignore[assignment]
    with pytest.raises(MissingDependency, match=r"needs a package .*pip install 'kdcache\[s3\]'"):
        open_store("s3://bucket/t")


def test_a_store_that_needs_a_package() -> None:
    assert processes.run(_without_s3fs) == 0


def test_the_users_settings_come_before_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"config_kwargs": {"read_timeout": 77}, "anon": True}
    monkeypatch.setitem(fsspec.config.conf, "s3", given)
    store = open_store("s3://bucket/t")
    assert isinstance(store, ObjectStore)
    assert store._fs.config_kwargs["read_timeout"] == 77
    assert store._fs.config_kwargs["connect_timeout"] == 5
    assert store._fs.anon


def test_a_file_that_cannot_be_read_is_an_error_and_not_a_missing_shard(tmp_path: Path) -> None:
    write_all(LogitCache.create(tmp_path / "t", SPEC, {}))
    shard = tmp_path / "t/logits/c/0/0/0"
    shard.unlink()
    shard.mkdir()
    with pytest.raises(StorageError, match=rf"cannot read {shard}: Is a directory"):
        LogitCache.open(tmp_path / "t").read(0, 0, 1)


# --- locks -----------------------------------------------------------------------------------


def _lock(folder: Path) -> None:
    store = FolderStore(folder)
    sys.exit(sum(store.lock_shard(n) << n for n in range(4)))


def test_a_lock_holds_for_other_processes_until_it_is_released(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    assert store.lock_shard(1)
    assert store.lock_shard(3)
    assert processes.run(_lock, tmp_path) == 0b0101
    store.unlock_shard(3)
    assert processes.run(_lock, tmp_path) == 0b1101
    store.release_locks(whole=False)
    assert processes.run(_lock, tmp_path) == 0b1111
    store.release_locks()
    assert list(tmp_path.iterdir()) == []


def test_where_there_are_no_locks_all_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    cache = LogitCache.create(tmp_path / "t", SPEC, {})
    assert cache.lock_shard(0, 0)
    write_all(cache)
    cache.unlock_shard(0, 0)
    cache.store.release_locks()
    assert LogitCache.open(tmp_path / "t").missing() == []


def _create(folder: Path) -> None:
    FolderStore(folder).create({"a": bytes(1000), "b": str(os.getpid()).encode()}, "b")


def test_whoever_waited_for_a_creation_finds_it_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first holds the lock while the other has opened it; both end, one has written."""
    waiting: list[Any] = []

    def slowly(path: Path, data: bytes) -> None:
        if not waiting:
            waiting.append(processes.start(_create, tmp_path))
            waiting[0].join(0.3)
            assert waiting[0].exitcode is None
        write_file(path, data)

    monkeypatch.setattr("kdcache.files.write_file", slowly)
    _create(tmp_path)
    assert processes.ended(waiting[0]) == 0
    assert (tmp_path / "b").read_bytes() == str(os.getpid()).encode()
    assert {f.name for f in tmp_path.iterdir()} == {"a", "b"}
