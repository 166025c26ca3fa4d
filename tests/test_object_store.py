"""Caches in an S3 bucket: a server that speaks S3, on loopback, whole, mute, rude or dead."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pytest
import zarr

from kdcache.cache.cache import LogitCache
from kdcache.cache.object_store import ObjectStore
from kdcache.data.beton import Dataset, open_dataset
from kdcache.data.loader import Loader
from kdcache.teacher.targets import CachedTargets
from tests import processes
from tests.conftest import TEACHER, Result
from tests.processes import Job, contents
from tests.servers import BreaksOff, Mute, free_port, odd_server, serving

STUDENT = "python:tests.conftest:convolutional_student"
IMPATIENT = '{"config_kwargs": {"read_timeout": 0.2, "retries": {"max_attempts": 1}}}'


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with serving() as (address, _):
        yield address


@pytest.fixture
def as_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], None]:
    """A user whose environment names the server and a key, and nothing else."""

    def log_in(address: str) -> None:
        values = {
            "AWS_ENDPOINT_URL": address,
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_CONFIG_FILE": "/nonexistent",
            "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        for name, value in values.items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("AWS_PROFILE", raising=False)

    return log_in


@pytest.fixture
def client(server: str, as_user: Callable[[str], None]) -> Any:
    as_user(server)
    return amazon(server)


@pytest.fixture
def bucket(client: Any, tmp_path: Path) -> str:
    name = tmp_path.name.replace("_", "-").lower()[-60:]
    client.create_bucket(Bucket=name)
    return name


@pytest.fixture(scope="module")
def whole(digits_test: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """The same cache in a folder."""
    folder = tmp_path_factory.mktemp("whole")
    job = Job(digits_test.path, folder / "t", folder / "log")
    job.run()
    return job


def amazon(address: str) -> Any:
    """Another client than ours."""
    return boto3.client("s3", endpoint_url=address)


def objects(client: Any, bucket: str, prefix: str = "t/") -> dict[str, bytes]:
    """What lies in the bucket, by key below the prefix."""
    found = client.list_objects_v2(Bucket=bucket, Prefix=prefix)
    keys = [entry["Key"] for entry in found.get("Contents", ())]
    bodies = (client.get_object(Bucket=bucket, Key=key)["Body"] for key in keys)
    return {k[len(prefix) :]: body.read() for k, body in zip(keys, bodies, strict=True)}


# --- it works --------------------------------------------------------------------------------


def _read_with_zarr(url: str, folder: Path) -> None:
    there, here = zarr.open(url, mode="r"), zarr.open(folder, mode="r")
    assert isinstance(there, zarr.Group)
    assert sorted(there.array_keys()) == sorted(here.array_keys()) == ["logits", "seals"]
    np.testing.assert_array_equal(there["logits"][:], here["logits"][:])


def test_a_cache_is_made_inspected_verified_and_trained_from(
    digits_test: Dataset, client: Any, bucket: str, tmp_path: Path
) -> None:
    url = f"s3://{bucket}/deep/t.zarr"
    data = ["--data", digits_test.path]
    line = ["precompute", *data, "--teacher", TEACHER, "--views", 2, "--workers", 1, "--out"]
    for out in (url, tmp_path / "t"):
        result = processes.command(tmp_path, *line, out)()
        assert (result.code, result.err) == (0, ""), result
    assert objects(client, bucket, "deep/t.zarr/") == contents(tmp_path / "t")
    train = ["train", "--mode", "cached", *data, "--student", STUDENT, "--epochs", 2]
    for command in (
        ["inspect", url],
        ["verify", url],
        ["verify", url, *data, "--teacher", TEACHER],
        [*train, "--cache", url, "--out", tmp_path / "run"],
        [*line, url + "/"],
    ):
        result = processes.command(tmp_path, *command)()
        assert (result.code, result.err) == (0, ""), result
    assert processes.run(_read_with_zarr, url, tmp_path / "t") == 0


def test_a_killed_writer_is_finished_by_the_same_command(
    whole: Job, client: Any, bucket: str, tmp_path: Path
) -> None:
    dice = random.Random(0)
    killed = redone = 0
    while killed < 6:
        name = f"t{killed}"
        log = tmp_path / f"log{killed}"
        job = Job(whole.data, f"s3://{bucket}/{name}", log, fsync_s=0.005)
        lives = 0
        while True:
            lives += 1
            process = job.start()
            # Longer with each life: on a busy machine, a start alone may take more than a second.
            process.join(dice.uniform(0.05, 1) * (1 + lives / 4))
            process.kill()
            code = processes.ended(process)
            if code == 0:
                break
            assert code == -signal.SIGKILL
        killed += lives - 1
        redone += len(job.computed()) - len(whole.computed())
        assert objects(client, bucket, f"{name}/") == contents(Path(whole.out))
        if lives == 1:
            log.unlink()
            for key in objects(client, bucket, f"{name}/"):
                client.delete_object(Bucket=bucket, Key=f"{name}/{key}")
    assert redone <= 2 * killed


def test_parts_at_once_make_the_same_cache(
    whole: Job, client: Any, bucket: str, tmp_path: Path
) -> None:
    job = Job(whole.data, f"s3://{bucket}/t", tmp_path / "log")
    job.run()  # the cache must exist: a bucket has no locks
    before = objects(client, bucket)
    for key in before:
        if "/c/" in key:
            client.delete_object(Bucket=bucket, Key=f"t/{key}")
    job.log.unlink()
    running = [replace(job, part=(i, 3)).start() for i in (2, 0, 1)]
    assert [processes.ended(p) for p in running] == [0, 0, 0]
    assert Counter(job.computed()) == Counter(whole.computed())
    assert objects(client, bucket) == before == contents(Path(whole.out))


def _train_and_watch(url: str, data: Path, most_held: int) -> None:
    """Two epochs of batches that lie across shards; each object is asked for once in each."""
    asked: list[str] = []
    read = ObjectStore.read

    def watched(store: ObjectStore, key: str) -> bytes | None:
        asked.append(key)
        return read(store, key)

    ObjectStore.read = watched  # type: ignore[method-assign]
    dataset, cache = open_dataset(data), LogitCache.open(url)
    assert cache.spec.view_spec is not None
    with Loader(dataset, cache.spec.view_spec, 20, workers=1) as loader:
        asked.clear()
        targets = CachedTargets(cache, dataset.content_hash, cache.spec.view_spec)
        for view in (0, 1):
            for batch in loader.batches(view):
                targets(batch)
                ahead = (view, int(batch.positions_B[-1]) // cache.manifest.layout.shard_rows + 1)
                later = [k for k in asked if _place(k) > ahead and k[-4:] != "json"]
                assert later in ([], [k for k in asked if _place(k) == (view + 1, 0)])
                assert len(targets._shards) <= most_held
        time.sleep(0.5)
    counts = Counter(asked)
    assert set(counts.values()) == {1}
    shards = {_place(key) for key in counts}
    assert shards == {(v, s) for v in (0, 1) for s in range(7)} | {(2, 0)}


def _place(key: str) -> tuple[int, int]:
    view, shard = key.split("/")[2:4]
    return int(view), int(shard)


def test_the_reader_streams(whole: Job, bucket: str, tmp_path: Path) -> None:
    """A shard ahead, never more held than a batch needs and the next, nothing fetched twice."""
    job = Job(whole.data, f"s3://{bucket}/t", tmp_path / "log")
    job.run()
    assert processes.run(_train_and_watch, job.out, whole.data, 3) == 0


# --- it does not -----------------------------------------------------------------------------


def one_line(result: Result, *words: str) -> None:
    assert result.code == 2, result
    assert len(result.err.splitlines()) == 1, result.err
    for word in ("kdcache: ", *words):
        assert word in result.err, result.err


def precompute(folder: Path, data: Dataset, url: str) -> Result:
    line = ["precompute", "--data", data.path, "--teacher", TEACHER, "--out", url]
    result: Result = processes.command(folder, *line)()
    return result


def test_a_bucket_that_is_not_there(
    digits_test: Dataset, server: str, as_user: Callable[[str], None], tmp_path: Path
) -> None:
    as_user(server)
    url = "s3://nobody-has-this/t"
    one_line(precompute(tmp_path, digits_test, url), "write s3://nobody", "bucket does not exist")
    one_line(processes.command(tmp_path, "inspect", url)(), f"no cache at {url}")


def test_wrong_and_no_credentials(
    digits_test: Dataset,
    as_user: Callable[[str], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with serving(INITIAL_NO_AUTH_ACTION_COUNT="0") as (address, _):
        as_user(address)
        result = precompute(tmp_path, digits_test, "s3://bucket/t")
        one_line(result, "cannot read s3://bucket/t: Forbidden; check the credentials")
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        result = precompute(tmp_path, digits_test, "s3://bucket/t")
        one_line(result, "cannot read s3://bucket/t: Unable to locate credentials")


@pytest.mark.parametrize("host", ["127.0.0.1", "nowhere.invalid"])
def test_nobody_answers(
    digits_test: Dataset, as_user: Callable[[str], None], tmp_path: Path, host: str
) -> None:
    """A port where nobody listens; a name that is none. Both within seconds."""
    as_user(f"http://{host}:{free_port()}")
    start = time.monotonic()
    result = precompute(tmp_path, digits_test, "s3://bucket/t")
    one_line(result, "cannot read s3://bucket/t: Could not connect to the endpoint URL")
    assert time.monotonic() - start < 15


@pytest.mark.parametrize("mute", [pytest.param(True, marks=pytest.mark.slow), False])
def test_a_server_that_is_mute_or_breaks_off(
    as_user: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mute: bool
) -> None:
    """Nothing is read in part. What the user's configuration says of patience counts."""
    monkeypatch.setenv("FSSPEC_S3", IMPATIENT)
    with odd_server(Mute if mute else BreaksOff) as address:
        as_user(address)
        start = time.monotonic()
        result = processes.command(tmp_path, "inspect", "s3://bucket/t")()
    one_line(result, "cannot read s3://bucket/t: ", "Read timeout" if mute else "")
    assert time.monotonic() - start < 20


@pytest.mark.slow
def test_a_mute_server_is_given_up_in_a_minute(
    as_user: Callable[[str], None], tmp_path: Path
) -> None:
    with odd_server(Mute) as address:
        as_user(address)
        start = time.monotonic()
        one_line(processes.command(tmp_path, "inspect", "s3://bucket/t")(), "Read timeout")
    assert time.monotonic() - start < 80


def _train_from_a_dying_store(server: int, url: str, data: Path, out: Path) -> None:
    """The server dies when the fourth shard is asked for."""
    read_shard, count = LogitCache.read_shard, iter(range(1000))

    def read(cache: LogitCache, view: int, shard: int) -> Any:
        if next(count) == 3:
            os.kill(server, signal.SIGKILL)
        return read_shard(cache, view, shard)

    LogitCache.read_shard = read  # type: ignore[method-assign]
    line = ["train", "--mode", "cached", "--data", str(data), "--student", STUDENT, "--cache", url]
    line += ["--out", str(out / "run"), "--batch-size", "32", "--epochs", "3"]
    processes.run_command(out / "stdout", out / "stderr", line)


def test_a_server_that_dies(
    whole: Job, as_user: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FSSPEC_S3", IMPATIENT)
    with serving() as (address, server):
        as_user(address)
        amazon(address).create_bucket(Bucket="bucket")
        job = Job(whole.data, "s3://bucket/t", tmp_path / "log")
        job.run()
        start = time.monotonic()
        code = processes.run(_train_from_a_dying_store, server, job.out, job.data, tmp_path)
    result = Result(code, "", (tmp_path / "stderr").read_text())
    one_line(result, "cannot read s3://bucket/t: Could not connect")
    assert time.monotonic() - start < 30
    assert not (tmp_path / "run" / "run.json").exists()


def _write_to_a_dying_store(server: int, job: Job) -> None:
    write_new, count = ObjectStore.write_new, iter(range(1000))

    def dying(store: ObjectStore, key: str, data: bytes) -> bool:
        if "/c/" in key and next(count) == 5:
            time.sleep(1)  # by then the next shard is computed, and waits for this one
            os.kill(server, signal.SIGKILL)
        return write_new(store, key, data)

    processes.PUT = dying
    with (job.log.parent / "stderr").open("w") as words, contextlib.redirect_stderr(words):
        processes.record(job)


@pytest.mark.slow
def test_a_server_that_dies_under_a_writer(
    whole: Job, as_user: Callable[[str], None], tmp_path: Path
) -> None:
    with serving() as (address, server):
        as_user(address)
        amazon(address).create_bucket(Bucket="bucket")
        job = Job(whole.data, "s3://bucket/t", tmp_path / "log")
        start = time.monotonic()
        code = processes.run(_write_to_a_dying_store, server, job)
    one_line(
        Result(code, "", "kdcache: " + (tmp_path / "stderr").read_text()),
        "view 0 shard 2: cannot write s3://bucket/t: ",
        "run the same command again",
    )
    assert time.monotonic() - start < 30
