"""Caches of released versions stay readable: by kdcache, and by the reader in docs/cache-format.md.

`python -m tests.test_golden` makes those of the current version that are not there.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kdcache.cache import verify
from kdcache.cache.cache import LogitCache
from kdcache.cache.codecs import Dense, Sampled, TopK, Transformed
from kdcache.cache.records import Tables
from kdcache.cache.spec import CACHE_VERSION, CacheSpec
from kdcache.views.spec import ViewSpec
from tests.processes import contents

GOLDEN = Path(__file__).parent / "golden"
PAGE = Path(__file__).parents[1] / "docs" / "cache-format.md"
VIEWS, SAMPLES, CLASSES = 2, 7, 20
KINDS: dict[str, dict[str, Any]] = {
    "top-uint8": {"codec": TopK(4, "uint8")},
    "top-float16": {"codec": TopK(4)},
    "top-float32": {"codec": TopK(4, "float32")},
    "dense-uint8": {"codec": Dense("uint8")},
    "dense-float16": {"codec": Dense()},
    "draws": {"codec": Sampled(6, 2.0)},
    "average": {
        "num_views": 1,
        "codec": TopK(4),
        "row_order": "dataset",
        "num_averaged_views": 3,
        "view_spec": ViewSpec(8, mixup=0),
    },
    "transformed": {"codec": Transformed(0.2, k=3)},
    # A basis of 12 directions for 20 classes.
    "transformed-cut": {"codec": Transformed(0.02, k=3, max_basis_bytes=12 * 20 * 2)},
    "foreign": {"codec": TopK(4), "row_order": "dataset", "view_spec": None, "precision": None},
}
CACHES = sorted(GOLDEN.glob("v*/*.zarr"))
# Over every file of the caches of version 1. A released cache never changes.
VERSION_1 = "df979a4740851975a56d6da41c2fd1341d2de4d0ecf6e4ae77eda6e174468664"


def logits() -> torch.Tensor:
    """[V, N, C], spelled out: no generator of random numbers stays as it is for ever."""
    i = torch.arange(VIEWS * SAMPLES * CLASSES, dtype=torch.float64)
    return (torch.sin(i * 12.9898) * 4.0).float().reshape(VIEWS, SAMPLES, CLASSES)


def tables(codec: Transformed) -> Tables:
    """Cosines, spelled out: LAPACK's directions differ in their last bits by version."""
    i, j = np.mgrid[:CLASSES, :CLASSES]
    basis = np.cos(np.pi * (2 * j + 1) * i / (2 * CLASSES)) * np.where(i, 2, 1) ** 0.5
    return {
        "basis": (basis / CLASSES**0.5)[: codec.rank(CLASSES)].astype(np.float16),
        "mean": np.linspace(-0.5, 0.5, CLASSES, dtype=np.float32),
        "shrink": np.linspace(0, 0.3, codec.rank(CLASSES), dtype=np.float32),
    }


def make(folder: Path, names: Iterable[str] = KINDS) -> None:
    for name, fields in ((name, KINDS[name]) for name in names):
        base: dict[str, Any] = {
            "num_views": VIEWS,
            "num_samples": SAMPLES,
            "num_classes": CLASSES,
            "dataset_hash": "0123456789abcdef",
            "teacher_hash": "fedcba9876543210",
            "view_spec": ViewSpec(8),
        }
        spec = CacheSpec(**{**base, **fields})
        made = tables(spec.codec) if isinstance(spec.codec, Transformed) else {}
        path = folder / f"{name}.zarr"
        cache = LogitCache.create(path, spec, {"teacher": "golden"}, tables=made)
        for view, shard in cache.missing():
            rows = spec.rows(view, np.arange(SAMPLES))
            cache.write(view, shard, cache.coder().encode(logits()[view], rows))


def blocks() -> str:
    """The readers in the page, without the lines that use them."""
    found = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    return "\n\n\n".join(block[: block.rstrip().rindex("\n")] for block in found)


def reader() -> Any:
    """The function in the page that reads the records of a cache."""
    space: dict[str, Any] = {}
    exec(blocks(), space)

    def read(path: Path, view: int, T: float = 1.0) -> Any:
        if "transformed" in path.name or (path / "coefficients").exists():
            return None, space["read_transformed"](path, view, T), None
        return space["read"](path, view, T)

    return read


@pytest.mark.parametrize("path", CACHES, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_a_cache_of_each_version_is_read(path: Path) -> None:
    """By us, and the truth comes out within what the record's type can keep."""
    cache = LogitCache.open(path)
    assert cache.missing() == []
    codec = cache.spec.codec
    if isinstance(codec, Transformed):
        wide = 2.5 * codec.step  # the root mean square over classes is at most a step
    else:
        dtype = "float32" if isinstance(codec, Sampled) else codec.dtype
        wide = {"uint8": 0.15, "float16": 0.005, "float32": 1e-4}[dtype]
    for view in range(cache.spec.num_views):
        for T in (1.0, 4.0) if not isinstance(codec, Sampled) else (2.0,):
            found = cache.target(view, np.arange(SAMPLES), T)
            truth = torch.log_softmax(logits()[view] / T, 1).gather(1, found.class_ids_BK)
            if isinstance(codec, Sampled):
                assert found.log_p_BK.exp().sum(1).allclose(torch.ones(SAMPLES))
                assert truth.exp()[found.log_p_BK > -9].mean() > 1.5 / CLASSES
            else:
                cubic = 0.05 if T > 1 else 0.0  # what the tail's mass may be off by
                torch.testing.assert_close(found.log_p_BK, truth, rtol=0, atol=wide + cubic)


@pytest.mark.parametrize("path", CACHES, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_the_reader_in_the_docs_reads_the_same(path: Path) -> None:
    read, cache = reader(), LogitCache.open(path)
    for view in range(cache.spec.num_views):
        for T in (1.0, 3.0) if not isinstance(cache.spec.codec, Sampled) else (2.0,):
            ours = cache.target(view, np.arange(SAMPLES), T)
            classes, log_p, log_tail = read(path, view, T)
            np.testing.assert_allclose(ours.log_p_BK, log_p, rtol=1e-5, atol=1e-5)
            if classes is not None:
                np.testing.assert_array_equal(ours.class_ids_BK, classes)
            if log_tail is not None:
                np.testing.assert_allclose(ours.log_tail_B, log_tail, rtol=1e-5, atol=2e-5)
            assert (ours.log_tail_B is None) == (log_tail is None)


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_the_reader_in_the_docs_notices(tmp_path: Path, version: str) -> None:
    for place in ("zarr.json", "tail/zarr.json", "tail/c/0/0/0", "seals/c/0/0/0/0"):
        shutil.copytree(GOLDEN / version / "top-float16.zarr", tmp_path / "t", dirs_exist_ok=True)
        file = tmp_path / "t" / place
        whole = file.read_bytes()
        file.write_bytes(whole[:40] + bytes([whole[40] ^ 4]) + whole[41:])
        with pytest.raises((AssertionError, json.JSONDecodeError)):
            reader()(tmp_path / "t", 0)


def test_the_reader_in_the_docs_needs_nothing_of_kdcache(tmp_path: Path) -> None:
    script = f"""{blocks()}
import sys
np.save(sys.argv[2], read_transformed(sys.argv[1], 1, 2.0))
assert not [name for name in sys.modules if name.startswith("kdcache.")]
"""
    path = GOLDEN / "v2" / "transformed-cut.zarr"
    subprocess.run([sys.executable, "-c", script, path, tmp_path / "p.npy"], check=True)
    ours = LogitCache.open(path).target(1, np.arange(SAMPLES), 2.0)
    np.testing.assert_allclose(ours.log_p_BK, np.load(tmp_path / "p.npy"), rtol=1e-5, atol=1e-5)


def test_caches_of_version_1_are_as_they_were() -> None:
    """Byte for byte, and reading them writes nothing."""
    for path in GOLDEN.glob("v1/*.zarr"):
        cache = LogitCache.open(path)
        LogitCache.create(path, cache.spec, {"teacher": "another"}, "0" * 16)
        assert len(list(cache)) == cache.spec.num_views
    found = hashlib.sha256()
    for name, data in sorted(contents(GOLDEN / "v1").items()):
        if ".zarr/" in name:
            found.update(f"{name} {hashlib.sha256(data).hexdigest()}\n".encode())
    assert found.hexdigest() == VERSION_1


@pytest.mark.parametrize(
    "path",
    [path for path in CACHES if path.stem != "average"],  # which has one view
    ids=lambda p: f"{p.parent.name}-{p.stem}",
)
def test_a_cache_of_each_version_grows(path: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(path, tmp_path / "t")
    before, old = contents(copy), LogitCache.open(copy)
    new = replace(old.spec, num_views=VIEWS + 1)
    cache = LogitCache.create(copy, new, {"teacher": "golden"})
    for view, shard in cache.missing():
        rows = new.rows(view, np.arange(SAMPLES))
        cache.write(view, shard, cache.coder().encode(logits()[1], rows))
    cache.add_views()
    grown = LogitCache.open(copy)
    assert grown.spec == new
    assert grown.manifest.version == CACHE_VERSION
    assert grown.manifest.identity == old.manifest.identity
    assert verify.read(grown, {}) == ([], [])
    after = contents(copy)
    assert {name: after[name] for name in before if "/c/" in name} == {
        name: data for name, data in before.items() if "/c/" in name
    }
    if not isinstance(new.codec, Sampled):  # the draws of another view are others
        for name, column in grown[VIEWS].columns.items():
            np.testing.assert_array_equal(column, grown[1].columns[name])
    T = 2.0
    classes, log_p, _ = reader()(copy, VIEWS, T)
    found = grown.target(VIEWS, np.arange(SAMPLES), T)
    np.testing.assert_allclose(found.log_p_BK, log_p, rtol=1e-5, atol=1e-5)
    assert classes is None or (found.class_ids_BK.numpy() == classes).all()


def test_there_is_a_golden_cache_of_each_kind_and_version() -> None:
    wanted = {f"v{version}" for version in range(1, CACHE_VERSION + 1)}
    assert {path.parent.name for path in CACHES} == wanted
    assert {path.stem for path in CACHES if path.parent.name == f"v{CACHE_VERSION}"} == set(KINDS)


@pytest.mark.parametrize("path", CACHES, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_records_are_written_as_they_were(path: Path, tmp_path: Path) -> None:
    """The same logits give the same numbers; compressed bytes may change with the libraries."""
    make(tmp_path)
    ours, theirs = LogitCache.open(tmp_path / path.name), LogitCache.open(path)
    # Version 1 had the precision in what may differ between equal caches.
    assert replace(ours.spec, precision=theirs.spec.precision) == theirs.spec
    assert (ours.manifest.identity == theirs.manifest.identity) == (path.parent.name != "v1")
    for view in range(theirs.spec.num_views):
        a, b = ours[view].columns, theirs[view].columns
        for name in b:
            np.testing.assert_allclose(a[name].astype(float), b[name].astype(float), rtol=1e-6)


if __name__ == "__main__":
    folder = GOLDEN / f"v{CACHE_VERSION}"
    make(folder, [name for name in KINDS if not (folder / f"{name}.zarr").exists()])
