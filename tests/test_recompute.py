"""Records computed again: who made the cache passes, whatever the machine; anybody else fails."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from kdcache.cache.cache import LogitCache
from kdcache.cache.codecs import Rows, Sampled, TopK
from kdcache.cache.records import Records
from kdcache.cache.spec import CacheSpec
from kdcache.cache.verify import read, sample
from kdcache.data import render
from kdcache.data.beton import Dataset
from kdcache.data.convert import convert
from kdcache.errors import UsageError
from kdcache.models import load
from kdcache.models.classifier import Classifier
from kdcache.spec import Precision
from kdcache.teacher import recompute
from kdcache.teacher.precompute import precompute
from kdcache.teacher.recompute import Measure, identify, require_recomputable
from kdcache.views.spec import ViewSpec
from tests.conftest import TEACHER, Result, cache_spec, linear_teacher, photo_source

Run = Callable[..., Result]
VIEW = ViewSpec(8, min_scale=0.3, seed=5)
PLAIN = replace(VIEW, mixup=0.0)
KINDS: dict[str, dict[str, Any]] = {
    "uint8, top 3": {"top_k": 3, "dtype": "uint8"},
    "float16, top 3": {"top_k": 3, "dtype": "float16"},
    "float32, top 3": {"top_k": 3, "dtype": "float32"},
    "uint8, all": {"top_k": None, "dtype": "uint8"},
    "float32, all": {"top_k": None, "dtype": "float32"},
    "unmixed": {"view": PLAIN, "top_k": 3},
    "sample order": {"view": PLAIN, "top_k": 3, "row_order": "dataset"},
    "averaged": {
        "view": PLAIN,
        "top_k": 3,
        "row_order": "dataset",
        "num_averaged_views": 3,
        "num_views": 1,
    },
    "draws": {"num_draws": 20},
    "draws at T = 2": {"num_draws": 20, "temperature": 2.0},
}


def linear_of(seed: int, **norm: Any) -> Classifier:
    """`linear_teacher` with weights of another seed, or another normalisation."""
    network = linear_teacher(10)
    if seed != 7:
        torch.manual_seed(seed)
        with torch.no_grad():
            network[1].reset_parameters()
            network[1].weight.mul_(4)
    mean = norm.get("mean", load.IMAGENET_MEAN)
    teacher = Classifier(network, "linear", mean, norm.get("std", load.IMAGENET_STD))
    return teacher.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def teacher() -> Classifier:
    return load.load_model(TEACHER, "teacher", num_classes=10, size_px=8)


def recorded(
    dataset: Dataset, teacher: Classifier, out: Path, *, view: ViewSpec = VIEW, **kind: Any
) -> LogitCache:
    spec = cache_spec(dataset, teacher, view, **{"num_views": 2, **kind})
    return precompute(dataset, teacher, spec, out)


@pytest.fixture(scope="module")
def caches(
    digits_test: Dataset, teacher: Classifier, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], LogitCache]:
    """The cache of each kind, made when it is first asked for."""
    folder, made = tmp_path_factory.mktemp("caches"), {}

    def cache(kind: str) -> LogitCache:
        if kind not in made:
            made[kind] = recorded(digits_test, teacher, folder / str(len(made)), **KINDS[kind])
        return made[kind]

    return cache


def judged(
    cache: LogitCache,
    dataset: Dataset,
    teacher: Classifier,
    *,
    count: int = 100,
    batch_size: int = 64,
) -> dict[str, Measure]:
    faults, picked = read(cache, sample(cache.spec, count))
    assert faults == []
    seen: list[int] = []
    found = recompute.recompute(
        cache, dataset, teacher, picked, batch_size=batch_size, workers=1, progress=seen.append
    )
    assert seen[-1] == sum(len(some.rows_B) for some in picked)
    return {measure.name: measure for measure in found}


def failed(found: dict[str, Measure]) -> set[str]:
    return {name for name, measure in found.items() if not measure.ok}


def under(cache: LogitCache, out: Path, **spec: Any) -> LogitCache:
    """The same records on a cache that says another spec."""
    other = LogitCache.create(out, replace(cache.spec, **spec), cache.metadata, None)
    for view, shard in other.shards():
        other.write(view, shard, cache.read_shard(view, shard))
    return other


# --- who passes ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_the_teacher_of_the_cache_passes(
    caches: Callable[[str], LogitCache], digits_test: Dataset, kind: str, precision: Precision
) -> None:
    here = linear_of(7)
    here.precision = precision
    found = judged(caches(kind), digits_test, here)
    assert failed(found) == set(), found
    assert list(found) == (
        ["drawn", "distance", "reach"] if "draws" in kind else ["top1", "kl", "gap"]
    )
    assert all(measure.ok for measure in identify(caches(kind), digits_test, here))


@pytest.mark.parametrize("batch_size", [1, 7, 297])
@pytest.mark.parametrize("threads", [1, 2])
def test_batches_and_threads_do_not_matter(
    caches: Callable[[str], LogitCache], digits_test: Dataset, batch_size: int, threads: int
) -> None:
    torch.set_num_threads(threads)
    cache = caches("uint8, top 3")
    assert failed(judged(cache, digits_test, linear_of(7), batch_size=batch_size)) == set()


@pytest.mark.parametrize("kind", ["float32, all", "draws"])
def test_a_cache_made_in_bfloat16_passes_in_float32(
    digits_test: Dataset, tmp_path: Path, kind: str
) -> None:
    here = linear_of(7)
    here.precision = "bfloat16"
    cache = recorded(digits_test, here, tmp_path / "t", **KINDS[kind])
    assert failed(judged(cache, digits_test, linear_of(7))) == set()


class Half(nn.Module):
    """A network whose weights are rounded, as a checkpoint in a smaller type holds them."""

    def __init__(self, network: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.network = network.to(dtype)
        self.dtype = dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.network(x.to(self.dtype))
        return logits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_smaller_copy_passes_on_the_records_and_is_named(
    caches: Callable[[str], LogitCache], digits_test: Dataset, dtype: torch.dtype
) -> None:
    copy = linear_of(7)
    copy.network = Half(copy.network, dtype).requires_grad_(False)
    assert failed(judged(caches("float16, top 3"), digits_test, copy)) == set()
    named = {m.name: m for m in identify(caches("float16, top 3"), digits_test, copy)}
    assert failed(named) == {"teacher"}
    assert "another type" in named["teacher"].note


@pytest.mark.parametrize("mixup", [0.0, 1.0])
def test_photos_of_an_odd_count_pass(photos: Dataset, tmp_path: Path, mixup: float) -> None:
    here = load.load_model(TEACHER, "teacher", num_classes=2, size_px=8)
    cache = recorded(photos, here, tmp_path / "t", view=ViewSpec(8, mixup=mixup), top_k=None)
    assert failed(judged(cache, photos, here, count=1000)) == set()
    assert all(measure.ok for measure in identify(cache, photos, here))


def test_a_peaked_teacher_passes(digits_test: Dataset, tmp_path: Path) -> None:
    """Gaps far beyond what uint8 holds."""
    here = linear_of(7)
    here.network[1].weight.mul_(20)
    for kind in ("uint8, top 3", "uint8, all", "averaged", "draws"):
        cache = recorded(digits_test, here, tmp_path / kind, **KINDS[kind])
        assert failed(judged(cache, digits_test, here)) == set(), kind


def restless(seed: int) -> Classifier:
    """A network that makes much of every rounding: 12 layers that each amplify differences."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = [nn.Flatten()]
    for _ in range(12):
        layers += [nn.Linear(192, 192), nn.Tanh()]
        nn.init.normal_(layers[-2].weight, std=2 / 192**0.5)
    network = nn.Sequential(*layers, nn.Linear(192, 10))
    norm = load.IMAGENET_MEAN, load.IMAGENET_STD
    return Classifier(network, "restless", *norm).eval().requires_grad_(False)


@pytest.mark.parametrize("kind", ["float32, all", "draws"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_a_teacher_with_noisy_arithmetic_passes_and_another_does_not(
    digits_test: Dataset,
    tmp_path: Path,
    kind: str,
    precision: Precision,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cache = recorded(digits_test, restless(3), tmp_path / "t", **KINDS[kind])
    here, other = restless(3), restless(4)
    here.precision = other.precision = precision
    assert failed(judged(cache, digits_test, here)) == set()
    assert failed(judged(cache, digits_test, other)) != set()
    if precision == "bfloat16" and kind != "draws":
        monkeypatch.setattr(recompute, "LARGEST_NOISE", 0)
        monkeypatch.setattr(recompute, "TYPICAL_NOISE", 0)
        assert failed(judged(cache, digits_test, here)) != set()


# --- who fails -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_another_teacher_fails(
    caches: Callable[[str], LogitCache], digits_test: Dataset, kind: str
) -> None:
    found = judged(caches(kind), digits_test, linear_of(8))
    assert failed(found) == set(found)
    named = {m.name: m for m in identify(caches(kind), digits_test, linear_of(8))}
    assert failed(named) == {"teacher"}


@pytest.mark.parametrize("kind", KINDS)
def test_another_normalisation_fails(
    caches: Callable[[str], LogitCache], digits_test: Dataset, kind: str
) -> None:
    other = linear_of(7, mean=load.OWN_MEAN, std=load.OWN_STD)
    found = judged(caches(kind), digits_test, other)
    assert failed(found) & {"gap", "reach"}, found
    assert failed(found) & {"kl", "drawn"}, found
    assert not identify(caches(kind), digits_test, other)[1].ok


@pytest.mark.parametrize("kind", KINDS)
def test_another_crop_range_fails(
    caches: Callable[[str], LogitCache], digits_test: Dataset, tmp_path: Path, kind: str
) -> None:
    """All fingerprints agree: only the records can tell."""
    cache = caches(kind)
    assert cache.spec.view_spec is not None
    stated = under(cache, tmp_path / "t", view_spec=replace(cache.spec.view_spec, min_scale=0.5))
    found = judged(stated, digits_test, linear_of(7))
    assert failed(found) == set(found)
    assert all(measure.ok for measure in identify(stated, digits_test, linear_of(7)))


def test_one_wrong_view_fails_and_is_named(
    caches: Callable[[str], LogitCache], digits_test: Dataset, tmp_path: Path
) -> None:
    cache = caches("uint8, top 3")
    other = under(cache, tmp_path / "t", num_views=2, teacher_hash="0" * 16)
    other.delete_shard(1, 0)
    other.write(1, 0, cache.read_shard(0, 0))
    found = judged(other, digits_test, linear_of(7))
    assert failed(found) == {"top1", "kl", "gap"}
    assert "view 1 row" in found["gap"].note


@pytest.mark.parametrize("top_k", [3, None])
def test_a_wrong_tail_or_logit_fails(
    digits_test: Dataset, tmp_path: Path, top_k: int | None
) -> None:
    """A single number of a single record, among those that are sampled."""
    here = linear_of(7)
    cache = recorded(digits_test, here, tmp_path / "t", top_k=top_k, dtype="float32", num_views=1)
    records = cache.read_shard(0, 0)
    row = int(sample(cache.spec, 100)[0][9])
    wrong = {name: array.copy() for name, array in records.columns.items()}
    if top_k is None:
        wrong["logits"][row, wrong["logits"][row].argmin()] -= 0.5
    else:
        wrong["tail"][row, 1] -= 0.5
    cache.delete_shard(0, 0)
    cache.write(0, 0, Records(wrong))
    found = judged(cache, digits_test, here)
    assert failed(found) == {"gap"}
    assert f"view 0 row {row}" in found["gap"].note


def test_another_decoder_fails(
    photos: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It differs by one level in some pixels: too little for the teacher, enough for the digest."""
    here = load.load_model(TEACHER, "teacher", num_classes=2, size_px=8)
    cache = recorded(photos, here, tmp_path / "t", top_k=None)
    real = render.split_rows

    def other_rounding(rows: Any, size_px: int) -> Any:
        images, *rest = real(rows, size_px)
        images = images.copy()
        images[..., ::3, ::3, 0] ^= 1
        return images, *rest

    monkeypatch.setattr(render, "split_rows", other_rounding)
    found = {measure.name: measure for measure in identify(cache, photos, here)}
    assert failed(found) == {"pixels"}
    assert (
        found["pixels"].note == "the decoder or the view code differs from where the cache was made"
    )


def test_data_encoded_again_fails(photos: Dataset, tmp_path: Path) -> None:
    here = load.load_model(TEACHER, "teacher", num_classes=2, size_px=8)
    cache = recorded(photos, here, tmp_path / "t", top_k=None)
    again = convert(photo_source(), tmp_path / "p.beton", quality=80)[0]
    found = {measure.name: measure for measure in identify(cache, again, here)}
    assert failed(found) == {"data", "pixels"}
    assert found["pixels"].note == "other data look otherwise"


def test_other_data_is_not_compared_row_by_row(
    caches: Callable[[str], LogitCache], digits: Dataset, teacher: Classifier
) -> None:
    with pytest.raises(UsageError, match=r"has 1500 samples, .* was made from 297"):
        judged(caches("unmixed"), digits, teacher)


def test_an_imported_cache_cannot_be_recomputed(tmp_path: Path) -> None:
    spec = CacheSpec(1, 20, 4, TopK(2), "0" * 16, "0" * 16, None, row_order="dataset")
    cache = LogitCache.create(tmp_path / "t", spec, {"teacher": "someone's"})
    with pytest.raises(UsageError, match="was imported, and its views are not of kdcache's making"):
        require_recomputable(cache)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_a_draw_lies_on_its_class_or_as_far_from_it_as_the_logits_moved(temperature: float) -> None:
    random = torch.Generator().manual_seed(2)
    logits = 3 * torch.randn(50, 40, generator=random)
    rows = Rows(seed=4, view=1, row_ids=np.arange(50) * 3)
    codec = Sampled(30, temperature)
    records = codec.encode(logits, rows)
    own = codec.distances(records, logits, rows)
    assert own.shape == (50, 30)
    assert float(own.max()) < 1e-9
    for error in (1e-3, 1e-2, 1e-1):
        moved = logits + error * (2 * torch.rand(50, 40, generator=random) - 1)
        found = codec.distances(records, moved, rows)
        assert float(found.max()) <= error / temperature / 2
    assert float(found.max()) > 0
    other = codec.distances(records, logits.flip(1), rows)
    assert float(other.mean()) > 0.1


# --- the command -----------------------------------------------------------------------------


def verified(kdcache: Run, cache: LogitCache, data: Dataset, *options: object) -> Result:
    return kdcache(
        "verify", cache.url, "--data", data.path, "--teacher", TEACHER, "--samples", 60, *options
    )


def test_verify_shows_each_measure(
    kdcache: Run, caches: Callable[[str], LogitCache], digits_test: Dataset
) -> None:
    result = verified(kdcache, caches("float16, top 3"), digits_test)
    assert (result.code, result.err) == (0, "")
    lines = [" ".join(line.split()) for line in result.out.splitlines()]
    assert lines[1] == "shards 2 of 2 are complete and valid"
    assert lines[2] == "measure found allowed verdict"
    content_hash = digits_test.content_hash
    assert lines[3] == f"data {content_hash} {content_hash} ok"
    assert lines[6] == "top-1 agreement, near ties aside 100.00% 100.00% ok"
    assert lines[7].startswith("mean KL(cache || live), nats ")
    assert lines[8].startswith("largest gap, of what is allowed 0.")
    assert "FAIL" not in result.out


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_verify_takes_a_precision(
    kdcache: Run, caches: Callable[[str], LogitCache], digits_test: Dataset, precision: str
) -> None:
    cache = caches("draws")
    result = verified(kdcache, cache, digits_test, "--precision", precision, "--batch-size", 5)
    assert (result.code, result.err) == (0, "")


def test_verify_in_json(
    kdcache: Run, caches: Callable[[str], LogitCache], digits_test: Dataset
) -> None:
    result = verified(kdcache, caches("averaged"), digits_test, "--json")
    assert (result.code, result.err) == (0, "")
    found = json.loads(result.out)
    assert (found["ok"], found["records"]) == (True, 60)
    names = [measure["name"] for measure in found["measures"]]
    assert names == ["data", "teacher", "pixels", "top1", "kl", "gap"]
    assert all(measure["ok"] for measure in found["measures"])
    assert found["measures"][4]["found"] <= found["measures"][4]["tolerance"]


def another_teacher(num_classes: int) -> nn.Module:
    network = linear_teacher(num_classes)
    with torch.no_grad():
        network[1].weight.neg_()
    return network


def test_verify_of_another_teacher_exits_with_1(
    kdcache: Run, caches: Callable[[str], LogitCache], digits_test: Dataset
) -> None:
    line = ("--teacher", "python:tests.test_recompute:another_teacher")
    result = verified(kdcache, caches("uint8, all"), digits_test, *line)
    assert (result.code, result.err) == (1, "")
    assert result.out.count("FAIL") == 4
    assert "teacher: other weights, another type of them, another normalisation, or " in result.out
    assert "another number or order of teachers" in result.out
    assert "worst in view" in result.out


@pytest.mark.parametrize("kind", ["averaged", "draws", "sample order"])
def test_every_kind_of_record_is_drawn(
    kdcache: Run,
    caches: Callable[[str], LogitCache],
    digits_test: Dataset,
    tmp_path: Path,
    kind: str,
) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "v.png"
    line = ("inspect", caches(kind).url, "--data", digits_test.path, "--sample", 5, "--draw", out)
    result = kdcache(*line)
    assert (result.code, result.err) == (0, "")
    assert out.exists()


def test_verify_with_other_data_exits_with_1(
    kdcache: Run, caches: Callable[[str], LogitCache], digits: Dataset
) -> None:
    result = verified(kdcache, caches("unmixed"), digits)
    assert (result.code, result.err) == (1, "")
    assert "data: other images or labels than the cache was made from" in result.out
    assert "top-1" not in result.out


def test_verify_of_an_imported_cache_with_data_is_refused(
    kdcache: Run, digits_test: Dataset, tmp_path: Path
) -> None:
    spec = CacheSpec(1, 297, 10, TopK(2), "0" * 16, "0" * 16, None, row_order="dataset")
    cache = LogitCache.create(tmp_path / "t", spec, {"teacher": "someone's"})
    result = verified(kdcache, cache, digits_test)
    assert (result.code, result.out) == (2, "")
    assert "leave out --data and --teacher to check its shards" in result.err


def test_what_is_there_of_an_incomplete_cache_is_judged(
    kdcache: Run, digits_test: Dataset, teacher: Classifier, tmp_path: Path
) -> None:
    cache = recorded(digits_test, teacher, tmp_path / "t", top_k=None)
    cache.delete_shard(1, 0)
    found = json.loads(verified(kdcache, cache, digits_test, "--json").out)
    assert (found["ok"], found["records"]) == (False, 30)
    assert all(measure["ok"] for measure in found["measures"])
