"""Targets of a batch: the cache's rows wherever they lie, the labels as they are mixed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import ArrayLike

from kdcache.batch import Batch, Target
from kdcache.cache import layout
from kdcache.cache.cache import LogitCache
from kdcache.cache.codecs import ValueType
from kdcache.data.beton import Dataset
from kdcache.data.loader import Loader
from kdcache.errors import CacheCorrupt, CacheIncomplete, NonFinite
from kdcache.losses.distillation import distillation_loss
from kdcache.models import load
from kdcache.models.classifier import Classifier
from kdcache.teacher.precompute import precompute
from kdcache.teacher.targets import AverageTargets, CachedTargets, LabelTargets, OnlineTargets
from kdcache.views.spec import ViewSpec
from tests.conftest import TEACHER, cache_spec, overwrite, synthetic_cache

VIEWS, SAMPLES, CLASSES = 3, 150, 30


def batch_of(view: int, positions: ArrayLike) -> Batch:
    """A batch of which only view and positions matter."""
    p = np.asarray(positions, np.int64)
    n = len(p)
    empty = torch.zeros(n, dtype=torch.int64)
    return Batch(
        view, p, p, torch.zeros(n, 3, 1, 1, dtype=torch.uint8), empty, empty, empty.short()
    )


def same(a: Target, b: Target) -> bool:
    pairs = ((a.logits_BK, b.logits_BK), (a.class_ids_BK, b.class_ids_BK), (a.tail_B3, b.tail_B3))
    return all(
        (x is None and y is None) or (x is not None and y is not None and torch.equal(x, y))
        for x, y in pairs
    )


@pytest.fixture(params=[(4, "float16"), (4, "uint8"), (CLASSES, "float32")])
def recording(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> LogitCache:
    """A cache of many small blocks."""
    monkeypatch.setattr(layout, "CHUNK_BYTES", 256)
    monkeypatch.setattr(layout, "SHARD_BYTES", 1024)
    torch.manual_seed(0)
    top_k, dtype = request.param
    logits = torch.randn(VIEWS, SAMPLES, CLASSES)
    return synthetic_cache(tmp_path / "t", logits, top_k=top_k, dtype=dtype)


def rows_of(recording: LogitCache, view: int, positions: ArrayLike) -> Target:
    records = recording.read(view, 0, SAMPLES)[np.asarray(positions, np.int64)]
    return recording.decode(records)


PAIRS = np.arange(SAMPLES).reshape(-1, 2)
ORDERS = {
    "contiguous": np.arange(40, 90),
    "all": np.arange(SAMPLES),
    "one": np.array([77]),
    "last": np.array([SAMPLES - 1]),
    "backwards": np.arange(SAMPLES)[::-1],
    "every third pair": PAIRS[1::3].reshape(-1),
    "shuffled": np.random.default_rng(0).permutation(SAMPLES),
    "shuffled pairs": PAIRS[np.random.default_rng(1).permutation(len(PAIRS))].reshape(-1),
    "both ends": np.array([SAMPLES - 1, 0]),
    "with repeats": np.array([5, 149, 5, 80, 5]),
}


@pytest.mark.parametrize("order", ORDERS)
def test_cached_targets_are_the_caches_rows_in_any_order(recording: LogitCache, order: str) -> None:
    assert recording.manifest.layout.chunk_rows < 40
    targets = CachedTargets(recording, recording.spec.dataset_hash, recording.spec.view_spec)
    for view in (0, 2, 1):
        found = targets(batch_of(view, ORDERS[order]))
        assert found.num_classes == CLASSES
        assert same(found, rows_of(recording, view, ORDERS[order]))


@pytest.mark.parametrize("batch_size", [7, 64])
def test_cached_targets_follow_a_training_run(recording: LogitCache, batch_size: int) -> None:
    """Views front to back, around the end to view 0 again."""
    targets = CachedTargets(recording, recording.spec.dataset_hash, recording.spec.view_spec)
    truth = [recording.read(view, 0, SAMPLES) for view in range(VIEWS)]
    for view in (0, 1, 2, 0):
        for start in range(0, SAMPLES, batch_size):
            stop = min(start + batch_size, SAMPLES)
            found = targets(batch_of(view, np.arange(start, stop)))
            assert same(found, recording.decode(truth[view][start:stop]))


def test_reading_ahead_holds_a_bounded_number_of_shards(recording: LogitCache) -> None:
    targets = CachedTargets(recording, recording.spec.dataset_hash, recording.spec.view_spec)
    for start in range(0, SAMPLES, 10):
        targets(batch_of(1, np.arange(start, start + 10)))
        assert len(targets._shards) <= 10 // recording.manifest.layout.shard_rows + 3


def test_an_incomplete_cache_is_refused_at_once(recording: LogitCache) -> None:
    recording.store.delete(layout.key("logits", 1, 0))
    with pytest.raises(CacheIncomplete, match="the first is view 1 shard 0"):
        CachedTargets(recording, recording.spec.dataset_hash, recording.spec.view_spec)


def test_a_damaged_shard_is_an_error_where_it_is_needed(recording: LogitCache) -> None:
    key = layout.key("logits", 2, 0)
    overwrite(recording.store, key, (recording.store.read(key) or b"")[:-1] + b"?")
    targets = CachedTargets(recording, recording.spec.dataset_hash, recording.spec.view_spec)
    targets(batch_of(0, np.arange(10)))
    with pytest.raises(CacheCorrupt, match=r"view 2 shard 0 \(positions 0 to \d+\) is damaged"):
        targets(batch_of(2, np.arange(10)))


# --- cached and online -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "uint8"])
def test_the_cache_says_what_the_live_teacher_says(
    digits_test: Dataset, tmp_path: Path, dtype: ValueType
) -> None:
    """float32 to rounding, the others within the codec's bound."""
    teacher = load.load_model(TEACHER, "teacher", num_classes=10, size_px=8)
    view = ViewSpec(8, min_scale=0.4)
    spec = cache_spec(digits_test, teacher, view, num_views=2, top_k=None, dtype=dtype)
    cache = precompute(digits_test, teacher, spec, tmp_path / "t", batch_size=64)
    cached = CachedTargets(cache, digits_test.content_hash, cache.spec.view_spec)
    online = OnlineTargets(teacher)
    with Loader(digits_test, view, 50) as loader:
        for batch in loader.batches(1):
            live, taped = online(batch).logits_BK, cached(batch).logits_BK
            gap = -live
            bound = {"float32": 0 * gap, "float16": gap / 2048, "uint8": gap.sqrt() / 31.8 + 8e-4}
            assert ((live - taped).abs() <= bound[dtype] + 1e-4).all()


# --- labels ----------------------------------------------------------------------------------


def labelled(labels: list[int], partners: list[int], weights: list[int]) -> Batch:
    n = len(labels)
    p = np.arange(n)
    images = torch.zeros(n, 3, 1, 1, dtype=torch.uint8)
    return Batch(
        0,
        p,
        p,
        images,
        torch.tensor(labels),
        torch.tensor(partners),
        torch.tensor(weights, dtype=torch.int16),
    )


def mass(target: Target) -> torch.Tensor:
    """The distribution [B, C] that a target of labels stands for."""
    assert target.class_ids_BK is not None
    p = torch.softmax(target.logits_BK, 1)
    return torch.zeros(len(p), target.num_classes).scatter_add(1, target.class_ids_BK, p)


def test_labels_are_mixed_as_the_pixels_are() -> None:
    found = LabelTargets(4)(labelled([0, 1, 2, 3], [1, 0, 2, 3], [64, 64, 100, 0]))
    wanted = [[0.75, 0.25, 0, 0], [0.25, 0.75, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    torch.testing.assert_close(mass(found), torch.tensor(wanted))
    assert found.tail_B3 is None
    assert (found.logits_BK.amax(1) == 0).all()


@pytest.mark.parametrize("mixup", [0.0, 0.2, 1.0, 20.0])
def test_labels_of_real_batches_sum_to_one(digits: Dataset, mixup: float) -> None:
    targets = LabelTargets(10)
    with Loader(digits, ViewSpec(8, mixup=mixup), 100) as loader:
        for batch in loader.batches(0, slice(0, 500)):
            p = mass(targets(batch))
            torch.testing.assert_close(p.sum(1), torch.ones(len(batch)))
            own = p.gather(1, batch.labels_B[:, None])[:, 0]
            share = 1 - batch.mix_weights_B.float() / 256
            alone = batch.labels_B == batch.partner_labels_B
            torch.testing.assert_close(own, torch.where(alone, torch.ones_like(own), share))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_label_losses_have_finite_gradients(temperature: float) -> None:
    """At weight 0 the partner's logit is -inf; a same-class pair names one class twice."""
    target = LabelTargets(4)(labelled([0, 1, 2, 3], [1, 0, 2, 0], [0, 0, 128, 1]))
    student = torch.randn(4, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss = distillation_loss(student, target, temperature=temperature)
    loss.backward()
    assert loss.isfinite()
    assert student.grad is not None
    assert student.grad.isfinite().all()


def test_at_temperature_one_mixed_labels_give_mixups_cross_entropy() -> None:
    """Up to the entropy of the labels, which no gradient sees."""
    batch = labelled([0, 1], [1, 0], [64, 64])
    student = torch.tensor([[2.0, -1.0, 0.3], [0.1, 0.7, -2.0]])
    log_q = torch.log_softmax(student, 1)
    cross = -(
        0.75 * log_q.gather(1, batch.labels_B[:, None])
        + 0.25 * log_q.gather(1, batch.partner_labels_B[:, None])
    ).mean()
    entropy = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
    found = distillation_loss(student, LabelTargets(3)(batch))
    torch.testing.assert_close(found, cross - entropy)


# --- a teacher that fails ----------------------------------------------------------------------


class Spoilt(torch.nn.Module):
    """Logits of which one, in row 1, is not a number that a target can have."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = x.flatten(1)[:, :10].clone()
        logits[1, 3] = self.value
        return logits


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_teachers_nan_is_never_a_silent_target(digits_test: Dataset, value: float) -> None:
    """Named at once where that costs nothing; elsewhere the loss becomes NaN, in any arithmetic."""
    teacher = Classifier(Spoilt(value), "spoilt", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    with Loader(digits_test, ViewSpec(8), 6) as loader:
        batch = next(iter(loader.batches(0)))
    source = OnlineTargets(teacher)
    with pytest.raises(
        NonFinite, match=rf"gave NaN or infinity for sample {batch.sample_ids_B[1]} "
    ):
        source(batch)
    source._wait = False  # as on a GPU
    target = source(batch)
    fine = torch.arange(6) != 1
    assert target.logits_BK[1].isnan().all()
    assert target.logits_BK[fine].isfinite().all()
    for dtype in (torch.float32, torch.float64):
        for temperature in (1.0, 3.0):
            logits = torch.randn(6, 10, dtype=dtype)
            assert distillation_loss(logits, target, temperature=temperature).isnan()
            rows = distillation_loss(logits, target, temperature=temperature, reduction="none")
            assert rows.isnan().tolist() == [False, True, False, False, False, False]


def test_an_averaged_teachers_nan_too(digits_test: Dataset) -> None:
    teacher = Classifier(Spoilt(float("inf")), "spoilt", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    view = ViewSpec(8, mixup=0)
    with Loader(digits_test, view, 6) as loader:
        batch = next(iter(loader.batches(0)))
    source = AverageTargets(teacher, digits_test, view, 2, 6)
    with pytest.raises(NonFinite, match="spoilt gave NaN or infinity for sample"):
        source(batch)
    source._wait = False
    assert source(batch).logits_BK.isnan().all(1).tolist() == [i == 1 for i in range(6)]


def test_moving_a_target_keeps_it() -> None:
    target = Target(torch.randn(2, 3), torch.tensor([[0, 1, 2], [3, 4, 5]]), torch.randn(2, 3), 9)
    assert same(target.to(torch.device("cpu")), target)
    moved = target.to(torch.device("meta"))
    assert moved.logits_BK.is_meta
    assert moved.class_ids_BK is not None
    assert moved.class_ids_BK.is_meta
