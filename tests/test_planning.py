"""The plan comes true: bytes and objects of the cache that is then made, hours by its formula."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kdcache.cache import layout
from kdcache.cache.codecs import TopK, bind
from kdcache.cache.spec import CacheSpec
from kdcache.data.beton import Dataset
from kdcache.models import load
from kdcache.models.classifier import Classifier
from kdcache.teacher.precompute import precompute
from kdcache.training import planning
from kdcache.training.planning import Recording, Steps
from kdcache.views.spec import ViewSpec
from tests.conftest import TEACHER, Result, cache_spec

STUDENT = "python:tests.conftest:convolutional_student"
KINDS = {
    "dense": {},
    "top 2": {"top_k": 2},
    "8 bits": {"top_k": 2, "dtype": "uint8"},
    "draws": {"num_draws": 6},
    "by sample": {"top_k": 2, "row_order": "dataset"},
    "averaged": {"top_k": 2, "row_order": "dataset", "num_averaged_views": 5},
}


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "BLOCK_S", 0.01)


@pytest.fixture
def teacher() -> Classifier:
    return load.load_model(TEACHER, "teacher", num_classes=10, size_px=8)


@pytest.mark.parametrize("kind", KINDS)
def test_the_cache_is_as_large_as_planned(
    digits: Dataset, teacher: Classifier, tmp_path: Path, kind: str
) -> None:
    options = KINDS[kind]
    views = 1 if "num_averaged_views" in options else 3
    spec = cache_spec(digits, teacher, ViewSpec(8, mixup=0), num_views=views, **options)
    recording = planning.record_some(
        digits, teacher, spec, bind(spec.codec), batch_size=128, workers=1
    )
    found = planning.make_plan(spec, recording)
    cache = precompute(digits, teacher, spec, tmp_path / "t", batch_size=128)
    sizes = {key: n for key, n in cache.store.sizes().items() if not key.startswith(".")}
    assert found.shards == len(cache.shards())
    assert found.objects == len(sizes)
    # The manifest says more; an averaged cache is judged by fewer views than it averages.
    close = 0.1 if "num_averaged_views" in options else 0.03
    assert found.bytes + 1000 == pytest.approx(sum(sizes.values()), rel=close)
    assert found.bytes_per_record == found.bytes / (views * 1500)
    assert 0 < found.packing_hours <= found.hours < 1


def test_bytes_come_from_whole_chunks_where_a_shard_is_large(
    digits: Dataset, teacher: Classifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "CHUNK_BYTES", 1024)
    monkeypatch.setattr(layout, "SHARD_BYTES", 4096)
    spec = cache_spec(digits, teacher, ViewSpec(8), num_views=2, top_k=2)
    recording = planning.record_some(
        digits, teacher, spec, bind(spec.codec), batch_size=200, workers=1
    )
    assert len(recording.records) < 1500
    found = planning.make_plan(spec, recording)
    cache = precompute(digits, teacher, spec, tmp_path / "t")
    assert found.shards == len(cache.shards()) > 2
    assert found.bytes + 1000 == pytest.approx(cache.stored_bytes(), rel=0.1)


def test_hours_are_those_of_every_pass_of_the_teacher(
    digits: Dataset, teacher: Classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[int] = []  # each takes a second
    teacher.register_forward_hook(lambda *_: passes.append(1))
    monkeypatch.setattr(planning.time, "perf_counter", lambda: float(len(passes)))
    monkeypatch.setattr(layout, "pack", lambda spec, records: (len(records), 1.0))
    for num_averaged_views in (0, 2, 200):
        spec = cache_spec(
            digits,
            teacher,
            ViewSpec(8, mixup=0),
            top_k=2,
            row_order="dataset",
            num_averaged_views=num_averaged_views,
        )
        recording = planning.record_some(
            digits, teacher, spec, bind(spec.codec), batch_size=125, workers=1
        )
        assert recording.seconds == pytest.approx((num_averaged_views or 1) / 125)


def record_some(data: Dataset, teacher: Classifier, spec: CacheSpec, batch_size: int) -> Recording:
    coder = bind(spec.codec)
    return planning.record_some(data, teacher, spec, coder, batch_size=batch_size, workers=1)


def of(spec: CacheSpec, seconds: float, packed_s: float = 0.0) -> Recording:
    return Recording(TopK(5).encode(torch.zeros(2, 100)), seconds, packed_s, 30.0)


SPEC = CacheSpec(36, 1000, 100, TopK(5), "d", "t", ViewSpec(8))


def test_the_formula() -> None:
    found = planning.make_plan(SPEC, of(SPEC, 0.1))
    assert found.hours == pytest.approx(1.0)
    steps = Steps(online_s=0.3, cached_s=0.2)
    assert planning.break_even(SPEC, of(SPEC, 0.1), steps) == pytest.approx(36)
    for students, wins in ((1, False), (2, True)):
        row = planning.compare(SPEC, found, steps, students=students, epochs=30)
        assert row.online == pytest.approx(students * 2.5)
        assert row.cached == pytest.approx(1 + students * 30 * 1000 * 0.2 / 3600)
        assert (row.cached < row.online) is wins
    assert planning.break_even(SPEC, of(SPEC, 0.1), Steps(0.2, 0.2)) == math.inf
    assert planning.break_even(SPEC, of(SPEC, 0.1), Steps(0.1, 0.2)) == math.inf


def test_packing_counts_where_it_takes_longer() -> None:
    found = planning.make_plan(SPEC, of(SPEC, 0.1, packed_s=0.2))
    assert (found.hours, found.packing_hours) == (pytest.approx(2), pytest.approx(2))


def test_room_on_the_disk(tmp_path: Path) -> None:
    assert (planning.free_bytes(str(tmp_path / "none" / "t.zarr")) or 0) > 0
    assert planning.free_bytes("s3://bucket/t.zarr") is None


# --- the command -----------------------------------------------------------------------------

Command = Callable[..., Result]


def test_plan_in_json(kdcache: Command, digits: Dataset, tmp_path: Path) -> None:
    result = kdcache(
        "plan",
        "--data",
        digits.path,
        "--teacher",
        TEACHER,
        "--views",
        4,
        "--top-k",
        2,
        "--batch-size",
        100,
        "--student",
        STUDENT,
        "--epochs",
        7,
        "--out",
        tmp_path / "t",
        "--json",
    )
    assert (result.code, result.err) == (0, "")
    found = json.loads(result.out)
    assert (found["spec"]["num_views"], found["epochs"]) == (4, 7)
    assert found["spec"]["codec"] == {"name": "top_k", "k": 2}
    assert [row["students"] for row in found["hours_of_students"]] == [1, 2, 5, 10, 50]
    assert all(row["cached"] > 0 and row["online"] > 0 for row in found["hours_of_students"])
    assert found["bytes"] > 6000 * 2
    assert found["free_bytes"] > 0
    assert not (tmp_path / "t").exists()


def test_plan_in_words(kdcache: Command, digits: Dataset) -> None:
    line = ("plan", "--data", digits.path, "--teacher", TEACHER, "--batch-size", 100)
    result = kdcache(*line, "--views", 2)
    assert (result.code, result.err) == (0, "")
    text = " ".join(result.out.split())
    for words in ("2 views of 1500 samples", "in 2 shards", "records/s", "estimates"):
        assert words in text
    assert "online" not in text
    text = " ".join(kdcache(*line, "--student", STUDENT, "--students", 3).out.split())
    assert "students of 1 epochs" in text
    assert " ms online" in text


def test_too_small_a_disk_is_said(
    kdcache: Command, digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "free_bytes", lambda out: 1000)
    result = kdcache("plan", "--data", digits.path, "--teacher", TEACHER, "--out", tmp_path / "t")
    assert result.code == 0
    assert f"{tmp_path / 't'} has 1 kB free, the cache takes" in result.err
    assert len(result.err.splitlines()) == 1


@pytest.mark.parametrize("option", ["--students", "--epochs"])
def test_students_need_a_student(kdcache: Command, digits: Dataset, option: str) -> None:
    result = kdcache("plan", "--data", digits.path, "--teacher", TEACHER, option, 2)
    assert (result.code, len(result.err.splitlines())) == (2, 1)
    assert "go with --student MODEL" in result.err
