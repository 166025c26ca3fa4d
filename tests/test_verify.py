"""Reading a whole cache: what is found, that one fault hides no other, and which rows are taken."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from kdcache.cache import layout
from kdcache.cache.cache import LogitCache
from kdcache.cache.codecs import TopK
from kdcache.cache.folder_store import FolderStore
from kdcache.cache.records import Records
from kdcache.cache.spec import CacheSpec
from kdcache.cache.verify import Fault, Picked, read, sample
from kdcache.data.beton import Dataset
from kdcache.errors import StorageError
from kdcache.views.spec import ViewSpec
from tests.conftest import TEACHER, Result, overwrite, synthetic_cache

Run = Callable[..., Result]
CODEC = TopK(2, "float32")
SPEC = CacheSpec(3, 41, 6, CODEC, "0123456789abcdef", "fedcba9876543210", ViewSpec(8))


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "CHUNK_BYTES", 64)
    monkeypatch.setattr(layout, "SHARD_BYTES", 256)


@pytest.fixture
def cache(tmp_path: Path, small_shards: None) -> LogitCache:
    """3 views of 41 samples, in several shards each."""
    made = synthetic_cache(
        tmp_path / "t", torch.randn(3, 41, 6, generator=torch.Generator().manual_seed(0)), top_k=2
    )
    assert made.shards_per_view > 3
    return made


def file_of(cache: LogitCache, view: int, shard: int, name: str = "logits") -> Path:
    return Path(cache.url) / layout.key(name, view, shard)


def kinds(faults: list[Fault]) -> list[tuple[int, int, str]]:
    return [(fault.view, fault.shard, fault.kind) for fault in faults]


# --- which rows ------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 7, 40, 41, 100, 123, 1000])
@pytest.mark.parametrize("mixup", [0.0, 1.0])
def test_samples_are_spread_and_not_drawn_twice(count: int, mixup: float) -> None:
    spec = replace(SPEC, view_spec=ViewSpec(8, mixup=mixup))
    found = sample(spec, count)
    rows = [(view, int(row)) for view, some in found.items() for row in some]
    assert len(set(rows)) == len(rows)
    # The last sample of a view has no partner.
    assert len(rows) in (range(min(count, 123) - 3, count + 2) if mixup else [min(count, 123)])
    assert all(0 <= row < 41 for _, row in rows)
    assert all((np.diff(some) > 0).all() for some in found.values())
    if count >= 7:
        assert list(found) == [0, 1, 2]
        sizes = [len(some) for some in found.values()]
        assert max(sizes) - min(sizes) <= 4
    if mixup:
        assert all((view, row ^ 1) in rows for view, row in rows if row < 40)


def test_samples_are_those_of_the_cache() -> None:
    first, again = sample(SPEC, 20), sample(SPEC, 20)
    assert {view: rows.tolist() for view, rows in first.items()} == {
        view: rows.tolist() for view, rows in again.items()
    }
    other = sample(replace(SPEC, teacher_hash="0" * 16), 20)
    assert any(first[view].tolist() != other[view].tolist() for view in first)


# --- reading ---------------------------------------------------------------------------------


def test_a_whole_cache_has_no_fault_and_gives_the_records_asked_for(cache: LogitCache) -> None:
    seen: list[int] = []
    wanted = {0: np.array([0, 1, 40]), 2: np.array([7, 20])}
    faults, picked = read(cache, wanted, seen.append)
    assert faults == []
    assert seen[-1] == 3 * 41
    assert [some.view for some in picked] == [0, 2]
    for some in picked:
        assert some.rows_B.tolist() == wanted[some.view].tolist()
        for i, row in enumerate(some.rows_B):
            one = cache[some.view, int(row)].columns
            for name, array in some.records.columns.items():
                np.testing.assert_array_equal(array[i], one[name][0])


def test_every_fault_is_found_and_the_rest_is_read(cache: LogitCache) -> None:
    file_of(cache, 0, 1).unlink()
    damaged = file_of(cache, 1, 0, "classes")
    damaged.write_bytes(damaged.read_bytes()[:-1])
    file_of(cache, 2, 3).write_bytes(file_of(cache, 2, 2).read_bytes())
    file_of(cache, 2, 1, "seals").write_bytes(b"")
    faults, picked = read(cache, {v: np.arange(41) for v in range(3)})
    assert kinds(faults) == [
        (0, 1, "missing"),
        (1, 0, "damaged"),
        (2, 1, "missing"),
        (2, 3, "damaged"),
    ]
    rows = cache.manifest.layout.shard_rows
    assert [len(some.rows_B) for some in picked] == [41 - rows, 41 - rows, 41 - 2 * rows]


def test_a_record_that_no_teacher_gave_is_damage(cache: LogitCache) -> None:
    """Its seal is right: what was written was wrong."""
    records = cache.read_shard(1, 2)
    wrong = {**records.columns, "logits": records.columns["logits"] - 1}
    cache.delete_shard(1, 2)
    cache.write(1, 2, Records(wrong))
    faults, _ = read(cache, {})
    assert kinds(faults) == [(1, 2, "damaged")]
    assert "no largest logit" in faults[0].reason


def test_a_store_that_does_not_answer_is_no_damage(
    cache: LogitCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = FolderStore.read

    def refuse(self: FolderStore, key: str) -> bytes | None:
        if key == layout.key("tail", 1, 1):
            raise StorageError("cannot read it: Input/output error")
        return real(self, key)

    monkeypatch.setattr(FolderStore, "read", refuse)
    faults, _ = read(cache, {})
    assert faults == [Fault(1, 1, "unreadable", "cannot read it: Input/output error")]


def test_records_of_a_view_come_together(cache: LogitCache) -> None:
    _, picked = read(cache, {1: np.arange(41)})
    assert [type(some) for some in picked] == [Picked]
    assert isinstance(picked[0].records, Records)
    assert len(picked[0].records) == 41


# --- the command, on shards alone ------------------------------------------------------------


def test_verify_of_a_whole_cache(kdcache: Run, cache: LogitCache) -> None:
    result = kdcache("verify", cache.url)
    assert (result.code, result.err) == (0, "")
    whole = len(cache.shards())
    assert f"{whole} of {whole} are complete and valid" in result.out
    found = json.loads(kdcache("verify", cache.url, "--json").out)
    assert found == {
        "path": cache.url,
        "ok": True,
        "shards": whole,
        "missing": [],
        "faults": [],
        "deleted": 0,
        "records": 0,
        "measures": [],
    }


def test_verify_lists_what_is_wrong_and_how_to_go_on(kdcache: Run, cache: LogitCache) -> None:
    file_of(cache, 0, 1).unlink()
    file_of(cache, 0, 2).unlink()
    file_of(cache, 1, 3, "tail").write_bytes(b"?" * 99)
    result = kdcache("verify", cache.url)
    assert (result.code, result.err) == (1, "")
    text = " ".join(result.out.split())
    assert "views 1-2 whole; view 0 lacks shards 1-2" in text
    assert "view 1 shard 3 is damaged: it is not what was written at this place" in text
    assert "`kdcache verify --delete-damaged` deletes damaged shards" in text
    result = kdcache("verify", cache.url, "--json")
    found = json.loads(result.out)
    assert (result.code, found["ok"], found["deleted"]) == (1, False, 0)
    assert found["missing"] == [{"view": 0, "shards": [1, 2]}]
    assert [(f["view"], f["shard"], f["kind"]) for f in found["faults"]] == [(1, 3, "damaged")]


def test_an_incomplete_cache_says_how_to_go_on(kdcache: Run, cache: LogitCache) -> None:
    file_of(cache, 2, 0).unlink()
    result = kdcache("verify", cache.url)
    assert result.code == 1
    assert "run the same `kdcache precompute` again" in result.out
    assert "--delete-damaged" not in result.out


@pytest.mark.usefixtures("small_shards")
def test_what_is_discarded_is_made_anew(kdcache: Run, digits_test: Dataset, tmp_path: Path) -> None:
    line = (
        "precompute",
        "--data",
        digits_test.path,
        "--teacher",
        TEACHER,
        "--top-k",
        2,
        "--out",
        tmp_path / "t",
        "--workers",
        1,
    )
    assert kdcache(*line).code == 0
    cache = LogitCache.open(tmp_path / "t")
    before = {f: f.read_bytes() for f in (tmp_path / "t").rglob("*") if f.is_file()}
    file_of(cache, 0, 3).write_bytes(b"damage")
    file_of(cache, 0, 5, "seals").write_bytes(b"damage")
    result = kdcache("verify", cache.url, "--delete-damaged")
    assert result.code == 1
    assert "view 0 shard 3 is damaged, and now deleted" in result.out
    assert "run the same `kdcache precompute` again" in result.out
    assert cache.missing() == [(0, 3), (0, 5)]
    assert kdcache(*line).code == 0
    assert {f: f.read_bytes() for f in (tmp_path / "t").rglob("*") if f.is_file()} == before
    assert kdcache("verify", cache.url).code == 0


def test_discard_takes_only_what_is_damaged(
    kdcache: Run, cache: LogitCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: FolderStore, key: str) -> bytes | None:
        if key.startswith("tail/c"):
            raise StorageError("the network is down")
        return (self.root / key).read_bytes()

    with monkeypatch.context() as patch:
        patch.setattr(FolderStore, "read", refuse)
        result = kdcache("verify", cache.url, "--delete-damaged")
    assert result.code == 1
    assert "is unreadable: the network is down" in result.out
    assert kdcache("verify", cache.url).code == 0


def test_every_flipped_byte_fails(kdcache: Run, cache: LogitCache) -> None:
    files = sorted(f for f in Path(cache.url).rglob("*") if f.is_file())
    random = np.random.default_rng(0)
    for _ in range(40):
        file = files[random.integers(len(files))]
        whole = file.read_bytes()
        at, flip = int(random.integers(len(whole))), int(random.integers(1, 256))
        file.write_bytes(whole[:at] + bytes([whole[at] ^ flip]) + whole[at + 1 :])
        assert kdcache("verify", cache.url).code in (1, 2), (file, at)
        file.write_bytes(whole)
    assert kdcache("verify", cache.url).code == 0


def test_a_damaged_manifest_is_not_a_usage_error(kdcache: Run, cache: LogitCache) -> None:
    file = Path(cache.url) / "zarr.json"
    file.write_bytes(file.read_bytes().replace(b'"synthetic"', b'"somebody!"'))
    result = kdcache("verify", cache.url)
    assert (result.code, result.err) == (1, "")
    assert "the manifest of" in result.out
    found = kdcache("verify", cache.url, "--json")
    assert json.loads(found.out)["ok"] is False
    assert found.code == 1


def test_verify_refuses_half_of_a_pair(
    kdcache: Run, cache: LogitCache, digits_test: Dataset
) -> None:
    for options in (("--data", digits_test.path), ("--teacher", TEACHER)):
        result = kdcache("verify", cache.url, *options)
        assert (result.code, result.out) == (2, "")
        assert "--data and --teacher go together" in result.err
    assert kdcache("verify", f"{cache.url}.no").code == 2


def test_a_cache_in_an_object_store(kdcache: Run, small_shards: None) -> None:
    url = "memory://verified/t.zarr"
    made = synthetic_cache(url, torch.randn(2, 20, 6), top_k=2)  # type: ignore[arg-type]
    assert kdcache("verify", url).code == 0
    overwrite(made.store, layout.key("tail", 1, 1), b"?" * 50)
    result = kdcache("verify", url, "--delete-damaged")
    assert (result.code, result.err) == (1, "")
    assert "view 1 shard 1 is damaged, and now deleted" in result.out
    assert made.missing() == [(1, 1)]
    text = " ".join(kdcache("inspect", url).out.split())
    assert "coverage view 0 whole; view 1 lacks shard 1" in text
    assert kdcache("inspect", url, "--sample", 3).code == 0


def test_an_imported_cache(kdcache: Run, tmp_path: Path) -> None:
    """Its views are not ours, and it is made anew by another command."""
    spec = replace(SPEC, num_views=1, view_spec=None, row_order="dataset")
    made = LogitCache.create(tmp_path / "t", spec, {"teacher": "someone's"})
    result = kdcache("verify", made.url)
    assert result.code == 1
    assert "run the same `kdcache import` again" in result.out
    made.write(0, 0, CODEC.encode(torch.randn(41, 6)))
    assert kdcache("verify", made.url).code == 0
    assert "not rendered by kdcache" in kdcache("inspect", made.url).out
    found = json.loads(kdcache("inspect", made.url, "--sample", 9, "--json").out)
    assert (found["position"], found["sample"], found["partner"]) == (9, 9, None)
