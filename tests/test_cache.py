"""The cache: what is written comes back, or an error says what and where."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr

from kdcache.cache import layout as layouts
from kdcache.cache.cache import LogitCache
from kdcache.cache.codecs import Dense, TopK, ValueType
from kdcache.cache.folder_store import FolderStore
from kdcache.cache.layout import Layout
from kdcache.cache.manifest import NO_DIGEST
from kdcache.cache.records import Records
from kdcache.cache.spec import CacheSpec
from kdcache.errors import (
    CacheCorrupt,
    CacheIncomplete,
    CacheMismatch,
    KDCacheError,
    StorageError,
    UsageError,
)
from kdcache.files import create_file
from kdcache.views.spec import ViewSpec
from tests.conftest import codec_for, overwrite, synthetic_cache

VIEWS, SAMPLES, CLASSES = 2, 150, 30
SPEC = CacheSpec(VIEWS, SAMPLES, CLASSES, TopK(4), "data", "teacher", ViewSpec(8))
KINDS: list[tuple[int, ValueType]] = [
    (4, "float16"),
    (4, "float32"),
    (4, "uint8"),
    (CLASSES, "float16"),
    (CLASSES, "float32"),
]


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks in a shard and several shards in a view, for caches of a few hundred rows."""
    monkeypatch.setattr(layouts, "CHUNK_BYTES", 256)
    monkeypatch.setattr(layouts, "SHARD_BYTES", 1024)


@pytest.fixture
def logits() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(VIEWS, SAMPLES, CLASSES)


def encode(logits_BC: torch.Tensor, top_k: int = 4, dtype: ValueType = "float16") -> Records:
    return codec_for(logits_BC.shape[1], top_k, dtype).encode(logits_BC)


def equal(a: Records, b: Records) -> bool:
    x, y = a.columns, b.columns
    return x.keys() == y.keys() and all(
        x[n].dtype == y[n].dtype and x[n].tobytes() == y[n].tobytes() for n in x
    )


def read_all(path: Path) -> list[Records]:
    """Every record as a user gets it: opened, read, decoded."""
    found = LogitCache.open(path)
    records = [found.read(v, 0, found.spec.num_samples) for v in range(found.spec.num_views)]
    for part in records:
        found.decode(part)
    return records


def contents(path: Path) -> dict[str, bytes]:
    return {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file()}


def shard_files(path: Path) -> list[Path]:
    return sorted(f for f in path.rglob("*") if f.is_file() and f.name != "zarr.json")


# --- write and read --------------------------------------------------------------------------


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize(("top_k", "dtype"), KINDS)
def test_what_is_written_comes_back(
    tmp_path: Path, logits: torch.Tensor, top_k: int, dtype: ValueType
) -> None:
    made = synthetic_cache(tmp_path / "t", logits, top_k=top_k, dtype=dtype)
    assert made.shards_per_view > 2
    found = LogitCache.open(tmp_path / "t")
    rows = made.manifest.layout.shard_rows
    for view in range(VIEWS):
        truth = encode(logits[view], top_k, dtype)
        for start, stop in ((0, SAMPLES), (0, 1), (149, 150), (rows - 1, rows + 1), (3, 97)):
            assert equal(found.read(view, start, stop), truth[start:stop])


@pytest.mark.parametrize(("top_k", "dtype"), KINDS)
def test_plain_zarr_reads_the_arrays_as_documented(
    tmp_path: Path, logits: torch.Tensor, top_k: int, dtype: ValueType
) -> None:
    synthetic_cache(tmp_path / "t", logits, top_k=top_k, dtype=dtype)
    group = zarr.open(tmp_path / "t", mode="r")
    assert isinstance(group, zarr.Group)
    wanted: dict[str, tuple[tuple[int, ...], str]] = {"logits": ((VIEWS, SAMPLES, top_k), dtype)}
    if top_k < CLASSES:
        wanted |= {"classes": ((VIEWS, SAMPLES, top_k), "uint16")}
        wanted |= {"tail": ((VIEWS, SAMPLES, 3), dtype)}
    wanted["seals"] = (VIEWS, 1, len(wanted), 32), "uint8"
    found = {name: (array.shape, str(array.dtype)) for name, array in group.arrays()}
    assert found == wanted
    truth = encode(logits[1], top_k, dtype)
    np.testing.assert_array_equal(group["logits"][1], truth.columns["logits"])


def test_the_manifest_comes_first_and_says_what_the_cache_is(tmp_path: Path) -> None:
    made = LogitCache.create(tmp_path / "t", SPEC, {"teacher": "somebody"}, "0123")
    text = (tmp_path / "t" / "zarr.json").read_text()
    manifest = json.loads(text)["attributes"]["kdcache"]
    arrays = {
        name: hashlib.sha256((tmp_path / "t" / name / "zarr.json").read_bytes()).hexdigest()
        for name in ("logits", "classes", "tail", "seals")
    }
    layout = Layout.of(SPEC)
    digest = manifest.pop("digest")
    assert manifest == {
        "identity": SPEC.identity,
        "spec": SPEC.to_json(),
        "layout": {"chunk_rows": layout.chunk_rows, "shard_rows": layout.shard_rows},
        "arrays": arrays,
        "render_digest": "0123",
        "metadata": {"teacher": "somebody"},
    }
    assert digest == hashlib.sha256(text.replace(digest, NO_DIGEST).encode()).hexdigest()
    assert shard_files(tmp_path / "t") == []
    assert made.missing() == [(0, 0), (1, 0)]
    assert [f.name for f in tmp_path.iterdir()] == ["t"]


def test_a_cache_is_made_in_folders_that_do_not_exist_yet(tmp_path: Path) -> None:
    assert LogitCache.create(tmp_path / "a" / "b" / "t", SPEC, {}).spec == SPEC
    (tmp_path / "empty").mkdir()
    assert LogitCache.create(tmp_path / "empty", SPEC, {}).spec == SPEC


def test_what_a_killed_creation_left_does_not_matter(tmp_path: Path) -> None:
    """Whichever files it had come to."""
    LogitCache.create(tmp_path / "whole", SPEC, {})
    names = sorted(FolderStore(tmp_path / "whole").sizes())
    for count in range(len(names) - 1):
        left = tmp_path / str(count)
        for name in names[:count]:
            (left / name).parent.mkdir(parents=True)
            (left / name).write_text("{")
        (left / "zarr.json.partial").write_text("{") if count else left.mkdir()
        (left / ".creating").touch()
        assert LogitCache.create(left, SPEC, {}).spec == SPEC
        assert contents(left) == contents(tmp_path / "whole")


@pytest.mark.usefixtures("small_shards")
def test_missing_and_has_follow_the_shards(tmp_path: Path, logits: torch.Tensor) -> None:
    made = LogitCache.create(tmp_path / "t", SPEC, {})
    everything = [(v, s) for v in range(VIEWS) for s in range(made.shards_per_view)]
    assert made.missing() == everything
    start, stop = made.shard_range(1)
    made.write(1, 1, encode(logits[1, start:stop]))
    assert made.has_shard(1, 1)
    assert not made.has_shard(0, 1)
    assert made.missing() == [s for s in everything if s != (1, 1)]
    with pytest.raises(CacheIncomplete, match=r"lacks 9 of 10 shards, the first is view 0 shard 0"):
        made.require_complete()


def test_an_incomplete_cache_reads_what_it_has(tmp_path: Path, logits: torch.Tensor) -> None:
    made = LogitCache.create(tmp_path / "t", SPEC, {})
    truth = encode(logits[0])
    made.write(0, 0, truth)
    assert equal(made.read(0, 10, 20), truth[10:20])
    with pytest.raises(CacheIncomplete, match="lacks view 1 shard 0"):
        made.read(1, 0, 1)
    with pytest.raises(CacheIncomplete, match="lacks view 2 shard 0"):
        made.read(2, 0, 1)


@pytest.mark.parametrize("name", ["logits", "classes", "tail", "seals"])
def test_a_deleted_object_is_a_missing_shard(
    tmp_path: Path, logits: torch.Tensor, name: str
) -> None:
    synthetic_cache(tmp_path / "t", logits, top_k=4, dtype="float16")
    (tmp_path / "t" / layouts.key(name, 1, 0)).unlink()
    found = LogitCache.open(tmp_path / "t")
    assert found.missing() == [(1, 0)]
    with pytest.raises(CacheIncomplete, match=r"view 1 shard 0.*run the same `kdcache precompute`"):
        found.require_complete()
    with pytest.raises(CacheIncomplete, match="lacks view 1 shard 0"):
        found.read(1, 0, 5)


@pytest.mark.usefixtures("small_shards")
def test_writing_again_gives_the_same_bytes(tmp_path: Path, logits: torch.Tensor) -> None:
    """Also over a shard that was damaged or left in part."""
    made = synthetic_cache(tmp_path / "t", logits, top_k=4, dtype="float16")
    files = shard_files(tmp_path / "t")
    before = [f.read_bytes() for f in files]
    for f in files:
        f.write_bytes(b"not a shard")
    for view in range(VIEWS):
        for shard in range(made.shards_per_view):
            rows = logits[view, slice(*made.shard_range(shard))]
            made.delete_shard(view, shard)
            made.write(view, shard, encode(rows))
    assert [f.read_bytes() for f in files] == before


# --- what else may lie at the path -----------------------------------------------------------


def test_opening_another_spec_names_every_difference(tmp_path: Path) -> None:
    LogitCache.create(tmp_path / "t", SPEC, {})
    view_spec = replace(ViewSpec(8), seed=3, mixup=0.5)
    other = replace(SPEC, codec=TopK(4, "uint8"), view_spec=view_spec, teacher_hash="another")
    before = contents(tmp_path / "t")
    with pytest.raises(CacheMismatch, match="is a different cache") as caught:
        LogitCache.create(tmp_path / "t", other, {})
    assert "dtype: uint8 here, float16 there" in str(caught.value)
    assert "mixup: 0.5 here, 1 there" in str(caught.value)
    assert "seed: 3 here, 0 there" in str(caught.value)
    assert "teacher_hash: another here, teacher there" in str(caught.value)
    assert "choose another path" in str(caught.value)
    with pytest.raises(CacheMismatch, match=r"codec: .*Dense.* here, .*TopK.* there"):
        LogitCache.create(tmp_path / "t", replace(SPEC, codec=Dense()), {})
    assert contents(tmp_path / "t") == before
    assert LogitCache.open(tmp_path / "t").spec == SPEC


def test_views_that_were_rendered_otherwise_are_refused(tmp_path: Path) -> None:
    LogitCache.create(tmp_path / "t", SPEC, {}, "0123")
    assert LogitCache.create(tmp_path / "t", SPEC, {}, "0123").render_digest == "0123"
    with pytest.raises(
        CacheMismatch, match=r"rendered differently \(0123\) than .* here .*\(4567\)"
    ):
        LogitCache.create(tmp_path / "t", SPEC, {}, "4567")


def test_the_same_spec_opens_what_is_there(tmp_path: Path, logits: torch.Tensor) -> None:
    synthetic_cache(tmp_path / "t", logits, top_k=4, dtype="float16", dataset="data")
    spec = LogitCache.open(tmp_path / "t").spec
    assert LogitCache.create(tmp_path / "t", spec, {"teacher": "renamed"}).missing() == []


def test_no_cache(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no cache at .*: make one with `kdcache precompute`"):
        LogitCache.open(tmp_path / "none")


def _a_file(path: Path) -> None:
    path.write_text("hello")


def _a_folder_with_a_file(path: Path) -> None:
    path.mkdir()
    (path / "thesis.txt").write_text("two years of work")


def _another_zarr_group(path: Path) -> None:
    zarr.create_group(path).attrs["mine"] = 1


def _a_zarr_array(path: Path) -> None:
    zarr.create_array(path, shape=(3,), dtype="int8")


@pytest.mark.parametrize(
    "make", [_a_file, _a_folder_with_a_file, _another_zarr_group, _a_zarr_array]
)
def test_something_else_at_the_path_is_left_alone(tmp_path: Path, make: Any) -> None:
    make(tmp_path / "t")
    before = {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()}
    with pytest.raises(UsageError, match=r"exists and is not a cache; choose another path$"):
        LogitCache.create(tmp_path / "t", SPEC, {})
    words = "exists and is not a cache; a cache is the folder that `kdcache precompute --out` or "
    with pytest.raises(UsageError, match=words):
        LogitCache.open(tmp_path / "t")
    assert {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()} == before


def test_a_cache_cannot_be_made_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match=r"cannot write .*File exists"):
        LogitCache.create(tmp_path / "file" / "t", SPEC, {})


# --- damage ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize(("top_k", "dtype"), KINDS)
def test_no_flipped_byte_of_a_shard_passes_in_silence(
    tmp_path: Path, logits: torch.Tensor, top_k: int, dtype: ValueType
) -> None:
    synthetic_cache(tmp_path / "t", logits, top_k=top_k, dtype=dtype)
    truth = read_all(tmp_path / "t")
    dice = random.Random(0)
    for _ in range(20):
        file = dice.choice(shard_files(tmp_path / "t"))
        whole = file.read_bytes()
        place, value = dice.randrange(len(whole)), dice.randrange(1, 256)
        file.write_bytes(whole[:place] + bytes([whole[place] ^ value]) + whole[place + 1 :])
        with pytest.raises(CacheCorrupt, match=r"\(positions \d+ to \d+\) is damaged") as caught:
            read_all(tmp_path / "t")
        view, shard = file.relative_to(tmp_path / "t").parts[2:4]
        assert f"{tmp_path / 't'}: view {view} shard {shard} (" in str(caught.value)
        file.write_bytes(whole)
    assert all(map(equal, read_all(tmp_path / "t"), truth))


def test_an_empty_object_is_a_missing_shard(tmp_path: Path, logits: torch.Tensor) -> None:
    """Zarr would read fill values."""
    made = synthetic_cache(tmp_path / "t", logits, top_k=4, dtype="float16")
    (tmp_path / "t" / "tail" / "c" / "0" / "0" / "0").write_bytes(b"")
    assert made.missing() == [(0, 0)]
    with pytest.raises(CacheIncomplete, match="lacks view 0 shard 0"):
        made.read(0, 0, 5)


@pytest.mark.parametrize("keep", [0.01, 0.5, 0.99])
def test_a_truncated_shard_is_corrupt(tmp_path: Path, logits: torch.Tensor, keep: float) -> None:
    synthetic_cache(tmp_path / "t", logits, top_k=4, dtype="float16")
    file = tmp_path / "t" / "classes" / "c" / "0" / "0" / "0"
    file.write_bytes(file.read_bytes()[: int(keep * file.stat().st_size)])
    with pytest.raises(CacheCorrupt, match=r"view 0 shard 0 \(positions 0 to 149\) is damaged"):
        LogitCache.open(tmp_path / "t").read(0, 5, 10)


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("name", [".", "logits", "classes", "tail", "seals"])
def test_no_flipped_byte_of_the_metadata_passes_in_silence(
    tmp_path: Path, logits: torch.Tensor, name: str
) -> None:
    synthetic_cache(tmp_path / "t", logits, top_k=4, dtype="float16")
    file = tmp_path / "t" / name / "zarr.json"
    whole = file.read_bytes()
    dice = random.Random(1)
    for place in dice.sample(range(len(whole)), 60):
        flipped = whole[place] ^ dice.randrange(1, 256)
        file.write_bytes(whole[:place] + bytes([flipped]) + whole[place + 1 :])
        with pytest.raises((CacheCorrupt, UsageError)):
            LogitCache.open(tmp_path / "t")
        file.write_bytes(whole)


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize(("top_k", "dtype"), KINDS)
def test_a_shard_of_another_place_is_refused(
    tmp_path: Path, logits: torch.Tensor, top_k: int, dtype: ValueType
) -> None:
    """Swapped, copied, or of another cache: with its seal or without."""
    same = logits.clone()
    same[1] = same[0]
    made = synthetic_cache(tmp_path / "t", same, top_k=top_k, dtype=dtype)
    other = synthetic_cache(tmp_path / "o", same, top_k=top_k, dtype=dtype, teacher="another")
    for source, at in ((made, (0, 1)), (made, (1, 0)), (other, (1, 1))):
        for names in (made._names, (*made._names, "seals")):
            whole = {n: made.store.read(layouts.key(n, 1, 1)) for n in (*made._names, "seals")}
            for name in names:
                data = source.store.read(layouts.key(name, *at))
                assert data is not None
                overwrite(made.store, layouts.key(name, 1, 1), data)
            # The records of view 0 shard 1 are equal: only their place is another.
            if names == made._names and (source, at) in ((made, (0, 1)), (other, (1, 1))):
                assert equal(
                    LogitCache.open(tmp_path / "t").read_shard(1, 1), made.read_shard(0, 1)
                )
            else:
                with pytest.raises(CacheCorrupt, match=r"view 1 shard 1 .* or is of another place"):
                    made.read_shard(1, 1)
            for name, data in whole.items():
                assert data is not None
                overwrite(made.store, layouts.key(name, 1, 1), data)


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("logits", "150,", "140,"),  # plain zarr would read 140 rows without a word
        ("tail", "    3\n", "    2\n"),
        ("seals", '"fill_value": 0', '"fill_value": 1'),
        ("classes", '"separator": "/"', '"separator": "."'),
        ("logits", '"separator": "/"', '"separator": "."'),
        ("tail", '"separator": "/"', '"separator": "."'),
        ("classes", '"fill_value": 65535', '"fill_value": 67535'),
        (".", '"num_samples": 150', '"num_samples": 158'),
        (".", '"size_px": 8', '"size_px": 9'),
        (".", '"version": 1', '"version": 2'),
        (".", '"version": 2', '"version": 1'),
        (".", '"num_views": 2', '"num_views": 3'),
    ],
)
def test_these_flips_of_metadata_are_noticed(
    tmp_path: Path, logits: torch.Tensor, name: str, old: str, new: str
) -> None:
    synthetic_cache(tmp_path / "t", logits, top_k=4, dtype="float16")
    file = tmp_path / "t" / name / "zarr.json"
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))
    with pytest.raises(KDCacheError):
        read_all(tmp_path / "t")


def test_a_missing_array_is_a_damaged_manifest(tmp_path: Path, logits: torch.Tensor) -> None:
    synthetic_cache(tmp_path / "t", logits, top_k=4, dtype="float16")
    shutil.rmtree(tmp_path / "t" / "tail")
    with pytest.raises(CacheCorrupt, match=r"the manifest of .* is damaged .*recreate the cache"):
        LogitCache.open(tmp_path / "t")


def test_a_cache_of_a_later_version_says_so(tmp_path: Path) -> None:
    LogitCache.create(tmp_path / "t", SPEC, {})
    file = tmp_path / "t" / "zarr.json"
    manifest = json.loads(file.read_text())
    manifest["attributes"]["kdcache"]["spec"] |= {"version": 3, "a field of then": True}
    file.write_text(json.dumps(manifest))
    with pytest.raises(UsageError, match="reads caches of versions 1 to 2, found version 3"):
        LogitCache.open(tmp_path / "t")


def test_a_full_disk_leaves_no_part_of_a_shard(
    tmp_path: Path, logits: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = LogitCache.create(tmp_path / "t", SPEC, {})
    whole = create_file

    def full(path: Path, data: bytes) -> bool:
        if "tail" in path.parts:
            raise OSError(28, "No space left on device")
        return whole(path, data)

    records = encode(logits[0])
    with monkeypatch.context() as patch:
        patch.setattr("kdcache.files.create_file", full)
        with pytest.raises(StorageError, match=r"view 0 shard 0: .*No space left on device; fix"):
            made.write(0, 0, records)
    assert shard_files(tmp_path / "t") == []
    made.write(0, 0, records)
    assert equal(made.read(0, 0, SAMPLES), records)


def test_a_discarded_shard_is_missing(tmp_path: Path, logits: torch.Tensor) -> None:
    made = synthetic_cache(tmp_path / "t", logits, top_k=4, dtype="float16")
    made.delete_shard(1, 0)
    assert made.missing() == [(1, 0)]
    assert not [f for f in shard_files(tmp_path / "t") if "/1/" in str(f.relative_to(tmp_path))]


def test_the_layout_of_a_cache_outlives_our_taste(
    tmp_path: Path, logits: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache begun with other shard sizes is read and finished with its own."""
    with monkeypatch.context() as patch:
        patch.setattr(layouts, "CHUNK_BYTES", 256)
        patch.setattr(layouts, "SHARD_BYTES", 1024)
        made = synthetic_cache(tmp_path / "t", logits, top_k=4, dtype="float16")
        before = [f.read_bytes() for f in shard_files(tmp_path / "t")]
    made.delete_shard(1, 2)
    again = LogitCache.create(tmp_path / "t", made.spec, {})
    assert again.manifest.layout == made.manifest.layout != Layout.of(made.spec)
    rows = logits[1, slice(*again.shard_range(2))]
    again.write(1, 2, encode(rows))
    assert [f.read_bytes() for f in shard_files(tmp_path / "t")] == before


# --- the cache in Python ----------------------------------------------------------------------


@pytest.mark.usefixtures("small_shards")
def test_slices_and_iteration(tmp_path: Path, logits: torch.Tensor) -> None:
    made = synthetic_cache(tmp_path / "t", logits, top_k=4, dtype="float16")
    truth = [encode(logits[v]) for v in range(VIEWS)]
    assert equal(made[1], truth[1])
    assert equal(made[-1], truth[1])
    assert equal(made[0, 30:95], truth[0][30:95])
    assert equal(made[0, -5:], truth[0][145:])
    assert equal(made[1, 149], truth[1][149:])
    assert len(made[0, 20:10]) == 0
    for place in (2, -3, (0, 150)):
        with pytest.raises(IndexError):
            made[place]
    with pytest.raises(IndexError, match="the step must be 1"):
        made[0, ::2]
    seen = {(v, start): records for v, start, records in made}
    assert list(seen) == [(v, made.shard_range(s)[0]) for v, s in made.shards()]
    assert all(equal(x, truth[v][start : start + len(x)]) for (v, start), x in seen.items())


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize(("top_k", "dtype"), KINDS)
def test_targets_of_any_positions_at_any_temperature(
    tmp_path: Path, logits: torch.Tensor, top_k: int, dtype: ValueType
) -> None:
    made = synthetic_cache(tmp_path / "t", logits, top_k=top_k, dtype=dtype)
    positions = [149, 3, 70, 3]
    for T in (1.0, 4.0):
        found = made.target(1, positions, T)
        dense = torch.log_softmax(logits[1, positions] / T, 1)
        wide = 0.2 if dtype == "uint8" else 0.05
        torch.testing.assert_close(
            found.log_p_BK, dense.gather(1, found.class_ids_BK), rtol=0, atol=wide
        )
        mass = found.log_p_BK.exp().sum(1)
        if found.log_tail_B is not None:
            mass = mass + found.log_tail_B.exp()
        torch.testing.assert_close(mass, torch.ones(4), rtol=0, atol=1e-5)
        assert (found.temperature, found.num_classes) == (T, CLASSES)
    assert len(made.target(0, []).log_p_BK) == 0
    if top_k < CLASSES:
        with pytest.raises(UsageError, match="temperature must be at least 1"):
            made.target(0, [0], 0.5)


# --- layout ----------------------------------------------------------------------------------


@pytest.mark.parametrize("num_samples", [1, 2, 3, 999, 1500, 60_000, 1_281_167])
@pytest.mark.parametrize("num_classes", [10, 100, 1000, 21_841])
@pytest.mark.parametrize("dense", [True, False])
def test_layouts_are_whole_pairs_of_sane_size(
    num_samples: int, num_classes: int, dense: bool
) -> None:
    codec = Dense() if dense else TopK(min(16, num_classes - 1))
    spec = CacheSpec(3, num_samples, num_classes, codec, "d", "t", ViewSpec(8))
    layout = Layout.of(spec)
    row = spec.record_bytes
    assert layout.chunk_rows % 2 == 0
    assert layout.shard_rows % layout.chunk_rows == 0
    assert layout.chunk_rows == 2 or layout.chunk_rows < 2 * num_samples
    assert layout.chunk_rows * row < 2 * layouts.CHUNK_BYTES
    assert layout.shard_rows * row <= layouts.SHARD_BYTES
    assert layout.shard_rows < num_samples + layout.chunk_rows
    if num_samples * row > 2 * layouts.SHARD_BYTES:
        assert layout.shard_rows * row > layouts.SHARD_BYTES // 2


def test_shards_cover_every_position_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(layouts, "CHUNK_BYTES", 256)
    monkeypatch.setattr(layouts, "SHARD_BYTES", 1024)
    for samples in (1, 2, 31, 64, 65, 150):
        made = LogitCache.create(tmp_path / str(samples), replace(SPEC, num_samples=samples), {})
        ranges = [range(*made.shard_range(s)) for s in range(made.shards_per_view)]
        assert [p for r in ranges for p in r] == list(range(samples))


def test_stored_bytes_are_those_of_the_files(tmp_path: Path, logits: torch.Tensor) -> None:
    made = synthetic_cache(tmp_path / "t", logits, top_k=4, dtype="float16")
    assert made.stored_bytes() == sum(
        f.stat().st_size for f in (tmp_path / "t").rglob("*") if f.is_file()
    )
