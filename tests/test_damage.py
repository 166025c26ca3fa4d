"""Every changed byte and every wrong shard is noticed, before a target reaches a loss."""

from __future__ import annotations

import random
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kdcache.cache import layout, verify
from kdcache.cache.cache import LogitCache
from kdcache.cache.codecs import TopK
from kdcache.cache.spec import CacheSpec
from kdcache.data.beton import Dataset
from kdcache.errors import CacheCorrupt, CacheIncomplete, KDCacheError, UsageError
from kdcache.losses import loss as losses
from kdcache.views.spec import ViewSpec
from tests.conftest import Result
from tests.processes import Job, contents

SPEC = CacheSpec(2, 100, 30, TopK(4), "data", "teacher", ViewSpec(8))
STUDENT = "python:tests.conftest:convolutional_student"


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "CHUNK_BYTES", 512)
    monkeypatch.setattr(layout, "SHARD_BYTES", 2048)


@pytest.fixture
def cache(tmp_path: Path, small_shards: None) -> Path:
    made = write_all(tmp_path / "t", SPEC)
    assert len(made.shards()) == 4
    return tmp_path / "t"


def write_all(out: Path, spec: CacheSpec) -> LogitCache:
    """The same records in all views, so that a swap is no change of values."""
    made = LogitCache.create(out, spec, {"teacher": "somebody"})
    torch.manual_seed(0)
    logits = torch.randn(made.manifest.layout.shard_rows, spec.num_classes)
    for view, shard in made.shards():
        rows = logits[: made.num_rows(shard)]
        made.write(view, shard, spec.codec.encode(rows, spec.rows(view, np.arange(len(rows)))))
    return made


@contextmanager
def changed(file: Path, data: bytes) -> Iterator[None]:
    whole = file.read_bytes()
    file.write_bytes(data)
    yield
    file.write_bytes(whole)


def changes(cache: Path, count: int, seed: int) -> Iterator[tuple[Path, bytes]]:
    """Files with one random byte of the whole cache changed, metadata included."""
    dice = random.Random(seed)
    files = sorted(f for f in cache.rglob("*") if f.is_file())
    places = [(f, i) for f in files for i in range(f.stat().st_size)]
    for file, i in dice.sample(places, count):
        data = bytearray(file.read_bytes())
        data[i] ^= dice.randrange(1, 256)
        yield file, bytes(data)


def read_all(cache: Path) -> None:
    """What training does with a cache."""
    found = LogitCache.open(cache)
    for _, _, records in found:
        found.decode(records)


# --- bytes -----------------------------------------------------------------------------------


def test_500_changed_bytes_are_noticed_by_reading(cache: Path) -> None:
    files = set()
    for file, data in changes(cache, 500, seed=0):
        with changed(file, data), pytest.raises((CacheCorrupt, UsageError)) as caught:
            read_all(cache)
        files.add(file)
        at = re.fullmatch(r".*/c/(\d)/(\d)/0(/0)?", str(file))
        if at:
            assert f"{cache}: view {at[1]} shard {at[2]} (positions " in str(caught.value)
        else:
            assert str(cache) in str(caught.value)
    assert len(files) > 15
    read_all(cache)


@pytest.mark.parametrize("count", [50, pytest.param(500, marks=pytest.mark.slow)])
def test_changed_bytes_are_noticed_by_verify(
    cache: Path, kdcache: Callable[..., Result], count: int
) -> None:
    for file, data in changes(cache, count, seed=1):
        with changed(file, data):
            result = kdcache("verify", cache)
        # A byte of the name "kdcache" in the manifest makes it no cache of ours.
        assert result.code == 1 or "is not a cache" in result.err, (file, result)
    assert kdcache("verify", cache).code == 0


# --- shards ----------------------------------------------------------------------------------


def _faults(cache: Path) -> list[tuple[int, int, str]]:
    faults, _ = verify.read(LogitCache.open(cache), {})
    return [(fault.view, fault.shard, fault.kind) for fault in faults]


def test_every_truncated_object_is_noticed(cache: Path) -> None:
    for file in cache.rglob("0"):
        if file.is_dir():
            continue
        view, shard = (int(x) for x in file.relative_to(cache).parts[2:4])
        whole = file.read_bytes()
        for keep in (1, len(whole) // 2, len(whole) - 1):
            with changed(file, whole[:keep]):
                with pytest.raises(CacheCorrupt, match=rf"view {view} shard {shard} \(positions"):
                    read_all(cache)
                assert _faults(cache) == [(view, shard, "damaged")]
        with changed(file, whole + b"\0"), pytest.raises(CacheCorrupt, match=f"view {view} shard"):
            read_all(cache)
        with changed(file, b""), pytest.raises(CacheIncomplete, match=f"view {view} shard {shard}"):
            read_all(cache)


def test_every_missing_object_is_noticed(cache: Path) -> None:
    for name, data in contents(cache).items():
        (cache / name).unlink()
        with pytest.raises(KDCacheError) as caught:
            read_all(cache)
        assert isinstance(caught.value, CacheIncomplete) == ("/c/" in name)
        (cache / name).write_bytes(data)
    read_all(cache)


def test_every_two_swapped_shards_are_noticed(cache: Path) -> None:
    """With their seals. All views hold the same records, and yet the place is another."""
    places = LogitCache.open(cache).shards()
    names = ["logits", "classes", "tail", "seals"]

    def swap(a: tuple[int, int], b: tuple[int, int]) -> None:
        for name in names:
            x, y = cache / layout.key(name, *a), cache / layout.key(name, *b)
            one, other = x.read_bytes(), y.read_bytes()
            x.write_bytes(other)
            y.write_bytes(one)

    for a in places:
        for b in places:
            if a < b:
                swap(a, b)
                assert _faults(cache) == [(*a, "damaged"), (*b, "damaged")]
                swap(a, b)
    assert _faults(cache) == []


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("field", ["dataset_hash", "teacher_hash", "seed", "precision"])
def test_every_shard_of_another_cache_is_noticed(cache: Path, tmp_path: Path, field: str) -> None:
    """Of the same records at the same place, with their seals."""
    changes: dict[str, Any] = {
        "dataset_hash": "other",
        "teacher_hash": "other",
        "seed": ViewSpec(8, seed=1),
        "precision": "bfloat16",
    }
    name = "view_spec" if field == "seed" else field
    other = write_all(tmp_path / "other", replace(SPEC, **{name: changes[field]}))
    for at in other.shards():
        kept = {}
        for name in ("logits", "classes", "tail", "seals"):
            key = layout.key(name, *at)
            kept[cache / key] = (cache / key).read_bytes()
            (cache / key).write_bytes((tmp_path / "other" / key).read_bytes())
        assert _faults(cache) == [(*at, "damaged")]
        for file, data in kept.items():
            file.write_bytes(data)


# --- training --------------------------------------------------------------------------------


def test_training_stops_before_a_wrong_target_reaches_the_loss(
    digits_test: Dataset,
    tmp_path: Path,
    kdcache: Callable[..., Result],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The targets of a run from a damaged cache are the first of those of an undamaged one."""
    torch.set_num_threads(1)
    job = Job(digits_test.path, tmp_path / "t", tmp_path / "log")
    job.run()
    seen: list[torch.Tensor] = []
    real = losses.distillation_loss

    def watched(logits: torch.Tensor, target: Any, **options: Any) -> torch.Tensor:
        seen.append(target.logits_BK.clone())
        return real(logits, target, **options)

    monkeypatch.setattr(losses, "distillation_loss", watched)
    line = ["train", "--mode", "cached", "--data", digits_test.path, "--cache", tmp_path / "t"]
    line += ["--student", STUDENT, "--batch-size", 32, "--epochs", 3, "--workers", 1]
    assert kdcache(*line, "--out", tmp_path / "right").code == 0
    right = list(seen)
    rows = LogitCache.open(tmp_path / "t").manifest.layout.shard_rows
    for view, shard in ((0, 0), (1, 3), (2, 5)):
        seen.clear()
        file = tmp_path / "t" / layout.key("logits", view, shard)
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        with changed(file, bytes(data)):
            result = kdcache(*line, "--out", tmp_path / "wrong")
        assert (result.code, len(result.err.splitlines())) == (2, 1), result.err
        assert f"view {view} shard {shard} (positions" in result.err
        assert "kdcache verify --delete-damaged" in result.err
        # Nine whole batches of a view are used; those that end before the shard are right.
        assert len(seen) == 9 * view + shard * rows // 32 < len(right)
        assert all(map(torch.equal, seen, right))
        assert not (tmp_path / "wrong" / "run.json").exists()
        shutil.rmtree(tmp_path / "wrong", ignore_errors=True)
