"""Recording: done once, finished when interrupted, independent of how it is batched."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from kdcache.batch import dense_target
from kdcache.cache import layout
from kdcache.cache.cache import LogitCache
from kdcache.cache.codecs import Dense, TopK
from kdcache.cache.spec import CacheSpec
from kdcache.data.beton import Dataset
from kdcache.data.loader import Loader
from kdcache.errors import CacheMismatch, NonFinite, StorageError, UsageError
from kdcache.files import create_file
from kdcache.models import load
from kdcache.models.classifier import Classifier
from kdcache.teacher import logits as live
from kdcache.teacher.precompute import precompute
from kdcache.views.spec import ViewSpec
from tests import processes
from tests.conftest import TEACHER, cache_spec, linear_teacher

VIEW = ViewSpec(8, min_scale=0.5, seed=3)


@pytest.fixture
def teacher() -> Classifier:
    return load.load_model(TEACHER, "teacher", num_classes=10, size_px=8)


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "CHUNK_BYTES", 512)
    monkeypatch.setattr(layout, "SHARD_BYTES", 2048)


def spec_of(dataset: Dataset, teacher: Classifier, top_k: int | None = None) -> CacheSpec:
    return cache_spec(dataset, teacher, VIEW, num_views=2, top_k=top_k, dtype="float32")


def contents(path: Path) -> dict[str, bytes]:
    return {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file()}


class Spoilt(nn.Module):
    """Gives NaN for one image that it has seen before."""

    def __init__(self, image_CHW: torch.Tensor) -> None:
        super().__init__()
        self.network = linear_teacher(10)
        self.register_buffer("image", image_CHW)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.network(x.contiguous())
        hit = (x == self.image).flatten(1).all(1)
        return logits.masked_fill(hit[:, None], torch.nan)


def test_the_cache_holds_the_teachers_answer_to_every_position(
    digits_test: Dataset, teacher: Classifier, tmp_path: Path
) -> None:
    made = precompute(digits_test, teacher, spec_of(digits_test, teacher), tmp_path / "t")
    assert made.missing() == []
    with Loader(digits_test, VIEW, 32) as loader:
        for batch in loader.batches(1):
            start, stop = int(batch.positions_B[0]), int(batch.positions_B[-1]) + 1
            found = made.decode(made.read(1, start, stop)).logits_BK
            live = dense_target(teacher(batch.images_BCHW)).logits_BK
            torch.testing.assert_close(found, live, rtol=1e-5, atol=1e-4)


@pytest.mark.usefixtures("small_shards")
def test_a_second_run_does_nothing(
    digits_test: Dataset, teacher: Classifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = spec_of(digits_test, teacher)
    precompute(digits_test, teacher, spec, tmp_path / "t")
    before = contents(tmp_path / "t")

    def refuse(*_: object) -> torch.Tensor:
        raise AssertionError("the teacher was asked")

    monkeypatch.setattr(live, "teacher_logits", refuse)
    seen: list[int] = []
    precompute(digits_test, teacher, spec, tmp_path / "t", progress=seen.append)
    assert contents(tmp_path / "t") == before
    assert seen == [2 * 297]


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("top_k", [None, 1])
def test_deleted_shards_are_finished_to_the_same_bytes(
    digits_test: Dataset, teacher: Classifier, tmp_path: Path, top_k: int | None
) -> None:
    spec = spec_of(digits_test, teacher, top_k)
    made = precompute(digits_test, teacher, spec, tmp_path / "t", batch_size=32, workers=1)
    assert made.shards_per_view > 3
    before = contents(tmp_path / "t")
    for view, shard in ((0, 1), (1, made.shards_per_view - 1)):
        (tmp_path / "t" / f"logits/c/{view}/{shard}/0").unlink()
    seen: list[int] = []
    again = precompute(
        digits_test, teacher, spec, tmp_path / "t", batch_size=32, workers=1, progress=seen.append
    )
    assert again.missing() == []
    assert contents(tmp_path / "t") == before
    last = 297 - (made.shards_per_view - 1) * made.manifest.layout.shard_rows
    assert seen[0] == 2 * 297 - made.manifest.layout.shard_rows - last
    assert seen[-1] == 2 * 297


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("batch_size", [1, 33, 100, 1000])
def test_the_batch_size_changes_nothing_but_rounding(
    digits_test: Dataset, teacher: Classifier, tmp_path: Path, batch_size: int
) -> None:
    spec = replace(spec_of(digits_test, teacher), num_views=1)
    a = precompute(digits_test, teacher, spec, tmp_path / "a", batch_size=64)
    b = precompute(digits_test, teacher, spec, tmp_path / "b", batch_size=batch_size)
    np.testing.assert_allclose(
        a.read(0, 0, 297).columns["logits"],
        b.read(0, 0, 297).columns["logits"],
        rtol=1e-5,
        atol=1e-4,
    )


def test_a_k_that_saves_nothing_becomes_all(digits: Dataset, teacher: Classifier) -> None:
    assert spec_of(digits, teacher, 9).codec == Dense("float32")
    assert spec_of(digits, teacher, 3).codec == TopK(3, "float32")
    assert spec_of(digits, teacher, None).codec == Dense("float32")
    with pytest.raises(UsageError, match="top-k must be 1 to 10"):
        spec_of(digits, teacher, 11)


def test_the_spec_names_data_and_teacher(digits: Dataset, teacher: Classifier) -> None:
    spec = spec_of(digits, teacher)
    assert (spec.num_samples, spec.num_classes, spec.view_spec) == (1500, 10, VIEW)
    assert spec.dataset_hash == digits.content_hash
    assert spec.teacher_hash == teacher.content_hash()


def test_another_teacher_does_not_write_on_the_cache(
    digits_test: Dataset, teacher: Classifier, tmp_path: Path
) -> None:
    precompute(digits_test, teacher, spec_of(digits_test, teacher), tmp_path / "t")
    with torch.no_grad():
        teacher.network[1].bias[0] += 1e-3
    with pytest.raises(
        CacheMismatch, match=r"different cache \(teacher_hash: \w{16} here, \w{16} there\)"
    ):
        precompute(digits_test, teacher, spec_of(digits_test, teacher), tmp_path / "t")


@pytest.mark.usefixtures("small_shards")
def test_nan_names_its_sample_and_its_view_and_is_not_recorded(
    digits_test: Dataset, teacher: Classifier, tmp_path: Path
) -> None:
    with Loader(digits_test, VIEW, 2) as loader:
        batch = next(loader.batches(1, np.array([200, 201])))
    image = batch.images_BCHW[1].float() / 255
    mean = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    norm = [torch.tensor(x).view(3, 1, 1) for x in mean]
    spoilt = Classifier(Spoilt((image - norm[0]) / norm[1]), "spoilt", *mean)
    spoilt.eval().requires_grad_(False)
    spec = spec_of(digits_test, spoilt)
    expected = (
        rf"spoilt gave NaN or infinity for sample {batch.sample_ids_B[1]} in view 1: a teacher"
    )
    with pytest.raises(NonFinite, match=expected):
        precompute(digits_test, spoilt, spec, tmp_path / "t", batch_size=32)
    made = LogitCache.open(tmp_path / "t")
    bad = 201 // made.manifest.layout.shard_rows
    assert made.missing()[0] == (1, bad)


def test_a_write_that_fails_is_one_line_and_the_next_run_finishes(
    digits_test: Dataset,
    teacher: Classifier,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    small_shards: None,
) -> None:
    spec = spec_of(digits_test, teacher)
    whole = precompute(digits_test, teacher, spec, tmp_path / "whole", batch_size=32, workers=1)
    real, calls = create_file, []

    def full(path: Path, data: bytes) -> bool:
        calls.append(path)
        if len(calls) > 6:
            raise OSError(28, "No space left on device")
        return real(path, data)

    with monkeypatch.context() as patch:
        patch.setattr("kdcache.files.create_file", full)
        with pytest.raises(StorageError, match=r"view 0 shard \d: .*No space left") as caught:
            precompute(digits_test, teacher, spec, tmp_path / "t", batch_size=32, workers=1)
    assert "\n" not in str(caught.value)
    assert 0 < len(LogitCache.open(tmp_path / "t").missing()) < 2 * whole.shards_per_view
    precompute(digits_test, teacher, spec, tmp_path / "t", batch_size=32, workers=1)
    assert contents(tmp_path / "t") == contents(tmp_path / "whole")


@pytest.mark.usefixtures("small_shards")
def test_a_write_that_fails_stops_the_teacher_at_once_and_frees_the_shards(
    digits_test: Dataset, teacher: Classifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, ask, asked = create_file, live.teacher_logits, []

    def full(path: Path, data: bytes) -> bool:
        if "seals" in path.parts and path.name != "zarr.json":
            raise OSError(28, "No space left on device")
        return real(path, data)

    def slowly(*args: Any) -> torch.Tensor:
        asked.append(1)
        time.sleep(0.01)
        return ask(*args)

    monkeypatch.setattr("kdcache.files.create_file", full)
    monkeypatch.setattr(live, "teacher_logits", slowly)
    spec = spec_of(digits_test, teacher)
    with pytest.raises(StorageError, match=r"view 0 shard 0: .*No space left"):
        precompute(digits_test, teacher, spec, tmp_path / "t", batch_size=1, workers=1)
    rows = LogitCache.open(tmp_path / "t").manifest.layout.shard_rows
    assert rows <= len(asked) < 2 * rows - 5
    assert processes.run(_claim_all, tmp_path / "t") == 0


def _claim_all(path: Path) -> None:
    cache = LogitCache.open(path)
    assert all(cache.lock_shard(*place) for place in cache.shards())


def test_info_says_how_the_cache_was_made(
    digits_test: Dataset, teacher: Classifier, tmp_path: Path
) -> None:
    made = precompute(digits_test, teacher, spec_of(digits_test, teacher), tmp_path / "t")
    assert made.metadata["teacher"] == TEACHER
    assert made.metadata["class_names"] == list(digits_test.class_names)
    assert made.metadata["batch_size"] == 256
    assert made.metadata["device"].startswith("cpu")
    assert made.metadata["torch"] == torch.__version__
