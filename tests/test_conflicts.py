"""Two writers of one shard, or of one cache: equal bytes are one cache, others are a conflict."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import boto3
import botocore
import numpy as np
import pytest
import torch

from kdcache.cache.cache import LogitCache
from kdcache.cache.codecs import TopK
from kdcache.cache.folder_store import FolderStore
from kdcache.cache.object_store import ObjectStore
from kdcache.cache.records import Records
from kdcache.cache.spec import CacheSpec
from kdcache.cache.store import Store, open_store
from kdcache.errors import StorageConflict, StorageError
from kdcache.views.spec import ViewSpec
from tests.servers import losing_replies, serving

SPEC = CacheSpec(1, 50, 30, TopK(4), "data", "teacher", ViewSpec(8))
OBJECTS = 4  # of a shard: logits, classes, tail, and their checksums last


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with serving() as (address, _):
        yield address


@pytest.fixture
def log_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """A user whose environment names a server and a key. s3fs keeps the clients that it made."""
    s3fs = pytest.importorskip("s3fs")

    def log_in(address: str) -> None:
        s3fs.S3FileSystem.clear_instance_cache()
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")

    yield log_in
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def bucket(server: str, log_in: Callable[[str], None], tmp_path: Path) -> str:
    log_in(server)
    name = tmp_path.name.replace("_", "-").lower()[-60:].strip("-")
    boto3.client("s3", endpoint_url=server).create_bucket(Bucket=name)
    return name


@pytest.fixture(params=["folder", "memory", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "s3":
        return f"s3://{request.getfixturevalue('bucket')}/t"
    return str(tmp_path / "t") if request.param == "folder" else f"memory://{tmp_path}/t"


def answers(seed: int) -> Records:
    torch.manual_seed(seed)
    return TopK(4).encode(torch.randn(SPEC.num_samples, SPEC.num_classes))


def objects(store: Store) -> dict[str, bytes | None]:
    return {key: store.read(key) for key in store.sizes()}


def truth(folder: Path, seed: int) -> dict[str, bytes | None]:
    """What an undisturbed cache holds."""
    cache = LogitCache.create(folder / f"truth{seed}", SPEC, {})
    cache.write(0, 0, answers(seed))
    return objects(cache.store)


class Killed(BaseException): ...


def before_put(
    cache: LogitCache, number: int, action: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Call `action` before the cache's put of this number, which counts from 0."""
    write_new, puts = cache.store.write_new, iter(range(1000))

    def interrupted(key: str, data: bytes) -> bool:
        if next(puts) == number:
            action()
        return write_new(key, data)

    monkeypatch.setattr(cache.store, "write_new", interrupted)


def kill() -> None:
    raise Killed


# --- a shard ---------------------------------------------------------------------------------


def test_a_second_writer_with_other_records_is_refused(url: str, tmp_path: Path) -> None:
    LogitCache.create(url, SPEC, {}).write(0, 0, answers(1))
    with pytest.raises(StorageConflict, match="view 0 shard 0: ") as caught:
        LogitCache.open(url).write(0, 0, answers(2))
    assert "--part" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert objects(open_store(url)) == truth(tmp_path, 1)
    np.testing.assert_array_equal(
        LogitCache.open(url).read_shard(0, 0).columns["logits"], answers(1).columns["logits"]
    )


@pytest.mark.parametrize("number", range(OBJECTS))
def test_of_two_writers_at_once_the_first_one_stays(
    url: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second writes all its objects before one of the first's."""
    first, second = LogitCache.create(url, SPEC, {}), LogitCache.open(url)

    def write_the_second() -> None:
        if number == 0:
            second.write(0, 0, answers(2))
        else:
            with pytest.raises(StorageConflict, match="view 0 shard 0"):
                second.write(0, 0, answers(2))

    before_put(first, number, write_the_second, monkeypatch)
    if number == 0:
        with pytest.raises(StorageConflict, match="view 0 shard 0"):
            first.write(0, 0, answers(1))
    else:
        first.write(0, 0, answers(1))
    assert objects(open_store(url)) == truth(tmp_path, 2 if number == 0 else 1)


@pytest.mark.parametrize("number", range(OBJECTS))
def test_writers_with_equal_records_both_succeed(
    url: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = LogitCache.create(url, SPEC, {}), LogitCache.open(url)
    before_put(first, number, lambda: second.write(0, 0, answers(1)), monkeypatch)
    first.write(0, 0, answers(1))
    first.write(0, 0, answers(1))
    assert objects(open_store(url)) == truth(tmp_path, 1)


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("number", range(OBJECTS))
def test_a_killed_write_is_finished_by_a_rerun(
    url: str, number: int, seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same records, or on another machine with other ones."""
    killed = LogitCache.create(url, SPEC, {})
    assert killed.lock_shard(0, 0)
    before_put(killed, number, kill, monkeypatch)
    with pytest.raises(Killed):
        killed.write(0, 0, answers(1))
    killed.store.release_locks()
    again = LogitCache.create(url, SPEC, {})
    assert again.missing() == [(0, 0)]
    assert again.lock_shard(0, 0)
    again.write(0, 0, answers(seed))
    again.store.release_locks()
    assert objects(again.store) == truth(tmp_path, seed)


def test_a_finished_shard_is_not_deleted_by_a_lock(url: str, tmp_path: Path) -> None:
    cache = LogitCache.create(url, SPEC, {})
    cache.write(0, 0, answers(1))
    assert cache.lock_shard(0, 0)
    cache.store.release_locks()
    assert objects(cache.store) == truth(tmp_path, 1)


def test_a_failed_write_leaves_what_was_there(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own objects are deleted, an equal one that another writer has put is not."""
    cache = LogitCache.create(url, SPEC, {})
    key = "logits/c/0/0/0"
    logits = truth(tmp_path, 1)[key]
    assert logits is not None
    assert cache.store.write_new(key, logits)
    before = objects(cache.store)

    def fail() -> None:
        raise StorageError("no space")

    before_put(cache, 2, fail, monkeypatch)
    with pytest.raises(StorageError, match="view 0 shard 0: no space; fix"):
        cache.write(0, 0, answers(1))
    assert objects(cache.store) == before


# --- a cache ----------------------------------------------------------------------------------


def creating(monkeypatch: pytest.MonkeyPatch, number: int, action: Callable[[], Any]) -> None:
    """Call `action` before put `number` of the next object store that is used."""
    write_new, puts = ObjectStore.write_new, iter(range(1000))

    def interrupted(store: ObjectStore, key: str, data: bytes) -> bool:
        if next(puts) == number:
            action()
        return write_new(store, key, data)

    monkeypatch.setattr(ObjectStore, "write_new", interrupted)


@pytest.mark.parametrize("url", ["memory", "s3"], indirect=True)
@pytest.mark.parametrize("number", range(5))
def test_two_creations_at_once_make_one_cache(
    url: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their specs are equal, what else the manifest holds is not."""
    creating(monkeypatch, number, lambda: LogitCache.create(url, SPEC, {"device": "second"}))
    cache = LogitCache.create(url, SPEC, {"device": "first"})
    assert cache.metadata == LogitCache.open(url).metadata == {"device": "second"}


@pytest.mark.parametrize("url", ["memory", "s3"], indirect=True)
@pytest.mark.parametrize("number", range(1, 5))
def test_of_two_specs_at_once_the_first_is_made(
    url: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def create_the_second() -> None:
        with pytest.raises(StorageConflict, match=r"other bytes .*; another process creates"):
            LogitCache.create(url, replace(SPEC, codec=TopK(5)), {})

    creating(monkeypatch, number, create_the_second)
    assert LogitCache.create(url, SPEC, {}).spec == LogitCache.open(url).spec == SPEC


@pytest.mark.parametrize("url", ["memory", "s3"], indirect=True)
@pytest.mark.parametrize("number", range(5))
def test_a_killed_creation_is_finished_by_a_rerun(
    url: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        creating(patch, number, kill)
        with pytest.raises(Killed):
            LogitCache.create(url, SPEC, {})
    assert objects(LogitCache.create(url, SPEC, {}).store) == objects(
        LogitCache.create(tmp_path / "truth", SPEC, {}).store
    )


# --- S3 --------------------------------------------------------------------------------------


def unaware(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store's next check finds nothing: another writer puts its object just after it."""
    assert isinstance(store, ObjectStore)
    get, gets = store._get, iter(range(1000))
    monkeypatch.setattr(store, "_get", lambda key: get(key) if next(gets) else None)


def test_the_server_decides_between_puts_at_the_same_instant(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(f"s3://{bucket}/t")
    assert store.conditional
    assert store.write_new("a", b"first")
    unaware(store, monkeypatch)
    assert not store.write_new("a", b"first")
    unaware(store, monkeypatch)
    with pytest.raises(StorageConflict, match=f"s3://{bucket}/t/a is there with other bytes"):
        store.write_new("a", b"second")
    assert store.read("a") == b"first"


def test_a_put_whose_reply_was_lost_is_no_conflict(
    server: str, bucket: str, log_in: Callable[[str], None], tmp_path: Path
) -> None:
    """The client sends it again, and meets its own object."""
    with losing_replies(server) as (address, lost):
        log_in(address)
        cache = LogitCache.create(f"s3://{bucket}/t", SPEC, {})
        cache.write(0, 0, answers(1))
        assert objects(cache.store) == truth(tmp_path, 1)
    assert len(lost) == len(truth(tmp_path, 1))


def test_another_put_under_way_is_waited_for(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """409: the server puts another one just now. Then that is there, or none is."""
    store = open_store(f"s3://{bucket}/t")
    assert isinstance(store, ObjectStore)
    refuse(store, monkeypatch, 409, times=2)
    assert store.write_new("a", b"first")
    assert store.read("a") == b"first"
    assert store.conditional


def test_a_server_without_conditional_puts_gets_a_check(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(f"s3://{bucket}/t")
    assert isinstance(store, ObjectStore)
    refuse(store, monkeypatch, 501, times=1)
    assert store.write_new("a", b"first")
    assert not store.conditional
    with pytest.raises(StorageConflict):
        store.write_new("a", b"second")
    assert store.read("a") == b"first"


def refuse(store: ObjectStore, monkeypatch: pytest.MonkeyPatch, status: int, times: int) -> None:
    """The server's first replies to a put are this status."""
    call, calls = store._fs.call_s3, iter(range(1000))

    def refused(*args: object, **options: object) -> object:
        if next(calls) >= times:
            return call(*args, **options)
        reply = {"Error": {"Code": "?"}, "ResponseMetadata": {"HTTPStatusCode": status}}
        raise OSError(22, "refused") from botocore.exceptions.ClientError(reply, "PutObject")

    monkeypatch.setattr(store._fs, "call_s3", refused)


@pytest.mark.parametrize(("version", "conditional"), [("1.35.1", False), ("1.35.2", True)])
def test_an_old_client_would_drop_the_condition(
    version: str, conditional: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(botocore, "__version__", version)
    assert open_store("s3://bucket/t").conditional == conditional
    assert not open_store("memory://bucket/t").conditional


# --- objects that are replaced: the manifest of a cache that grows ------------------------------


def test_an_object_is_replaced_where_it_is_the_expected_one(url: str) -> None:
    store = open_store(url)
    assert store.write_new("a/b", b"old")
    store.replace("a/b", b"old", b"new")
    assert store.read("a/b") == b"new"
    store.replace("a/b", b"old", b"new")  # as after a lost reply
    assert store.read("a/b") == b"new"
    with pytest.raises(StorageConflict, match="a/b is there with other bytes"):
        store.replace("a/b", b"old", b"other")
    assert objects(store) == {"a/b": b"new"}


def test_the_server_decides_between_two_replacements(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another writer's put falls between the look at the object and the put."""
    store, other = open_store(f"s3://{bucket}/t"), open_store(f"s3://{bucket}/t")
    assert isinstance(store, ObjectStore)
    assert store.write_new("a", b"old")
    get, gets = store._get, iter(range(1000))

    def outrun(key: str) -> bytes | None:
        held = get(key)
        if next(gets) == 0:
            other.replace(key, b"old", b"theirs")
        return held

    monkeypatch.setattr(store, "_get", outrun)
    with pytest.raises(StorageConflict, match="a is there with other bytes"):
        store.replace("a", b"old", b"ours")
    assert store.read("a") == b"theirs"


def grow(url: str, num_views: int) -> LogitCache:
    cache = LogitCache.create(url, replace(SPEC, num_views=num_views), {})
    for view, shard in cache.missing():
        cache.write(view, shard, answers(view))
    cache.add_views()
    return cache


def replacements(monkeypatch: pytest.MonkeyPatch, action: Callable[[int], None]) -> None:
    """Call `action(number)` before each replacement of an object in any store."""
    numbers = iter(range(1000))
    for kind in (FolderStore, ObjectStore):

        def counted(store: Any, key: str, old: bytes, new: bytes, real: Any = kind.replace) -> None:
            action(next(numbers))
            real(store, key, old, new)

        monkeypatch.setattr(kind, "replace", counted)


REPLACED = OBJECTS + 2  # each array's zarr.json, and before and after them the group's


@pytest.mark.parametrize("number", range(REPLACED))
def test_a_cache_that_grows_is_the_old_one_or_the_new_one(
    url: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen by a reader before each step, and when the writer is killed there."""
    grow(url, 1)
    before = objects(open_store(url))
    seen: list[int] = []

    def look(current: int) -> None:
        reader = LogitCache.open(url)
        assert reader.missing() == []
        seen.append(sum(len(records) for _, _, records in reader) // SPEC.num_samples)
        if current == number:
            kill()

    with monkeypatch.context() as patch:
        replacements(patch, look)
        with pytest.raises(Killed):
            grow(url, 3)
    assert seen == [1] * (number + 1)
    assert LogitCache.open(url).num_stored_views == 1
    assert grow(url, 3).num_stored_views == 3
    after = objects(open_store(url))
    assert after == objects(grow(str(tmp_path / "at once"), 3).store)
    assert {key: after[key] for key in before if "/c/" in key} == {
        key: data for key, data in before.items() if "/c/" in key
    }
