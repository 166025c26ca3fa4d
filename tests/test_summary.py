"""Figures of a cache whose answers are known, and a picture that is a picture."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from kdcache.cache import layout, summary
from kdcache.cache.cache import LogitCache
from kdcache.cache.codecs import Dense, Sampled
from kdcache.cache.spec import CacheSpec
from kdcache.cache.summary import (
    Accuracy,
    Distribution,
    Gap,
    coverage,
    entry,
    gaps,
    spans,
    summarise,
)
from kdcache.cli.plots import draw_views
from kdcache.data.beton import Dataset
from kdcache.errors import CacheCorrupt, MissingDependency, UsageError
from kdcache.models import load
from kdcache.teacher.precompute import precompute
from kdcache.views.mixing import pair_mix_weights
from kdcache.views.order import view_order, view_positions
from kdcache.views.spec import ViewSpec
from tests.conftest import TEACHER, cache_spec, synthetic_cache


def logits_of(
    probabilities: list[float], num_views: int = 2, num_samples: int = 20
) -> torch.Tensor:
    return torch.tensor(probabilities).log().expand(num_views, num_samples, -1)


def mean(found: Distribution | None) -> float:
    assert found is not None
    return found.mean


def test_figures_of_a_dense_cache(tmp_path: Path) -> None:
    cache = synthetic_cache(tmp_path / "t", logits_of([0.5, 0.25, 0.125, 0.125]), top_k=4)
    found = summarise(cache)
    assert (found.views_complete, found.shards, found.shards_missing, found.rows) == (2, 2, 0, 40)
    assert mean(found.entropy) == pytest.approx(1.75 * math.log(2), rel=1e-5)
    assert mean(found.largest_probability) == pytest.approx(0.5, rel=1e-5)
    assert mean(found.tail_mass) == 0
    assert found.stored_bytes == cache.stored_bytes()
    assert found.bytes_per_record == pytest.approx(cache.stored_bytes() / 40)


def test_figures_of_a_sparse_cache(tmp_path: Path) -> None:
    """The tail is one half in four even parts, so its entropy is exact too."""
    cache = synthetic_cache(tmp_path / "t", logits_of([0.3, 0.2, *[0.125] * 4]), top_k=2)
    found = summarise(cache)
    entropy = -(0.3 * math.log(0.3) + 0.2 * math.log(0.2) + 0.5 * math.log(0.125))
    assert mean(found.entropy) == pytest.approx(entropy, rel=1e-5)
    assert mean(found.largest_probability) == pytest.approx(0.3, rel=1e-5)
    assert mean(found.tail_mass) == pytest.approx(0.5, rel=1e-5)


def test_figures_are_means_over_views(tmp_path: Path) -> None:
    logits = torch.cat([logits_of([0.5, 0.5], num_views=1), logits_of([0.9, 0.1], num_views=1)])
    found = summarise(synthetic_cache(tmp_path / "t", logits, top_k=2))
    assert mean(found.largest_probability) == pytest.approx(0.7, rel=1e-5)


def test_only_complete_views_count(tmp_path: Path) -> None:
    logits = torch.cat([logits_of([0.5, 0.5], num_views=1), logits_of([0.9, 0.1], num_views=1)])
    cache = synthetic_cache(tmp_path / "t", logits, top_k=2)
    (tmp_path / "t" / "logits/c/1/0/0").unlink()
    found = summarise(cache)
    assert (found.views_complete, found.shards_missing, found.rows) == (1, 1, 20)
    assert mean(found.largest_probability) == pytest.approx(0.5)
    (tmp_path / "t" / "logits/c/0/0/0").unlink()
    found = summarise(cache)
    assert (found.views_complete, found.shards_missing, found.rows) == (0, 2, 0)
    assert found.entropy is found.largest_probability is found.tail_mass is None


def test_few_rows_of_a_long_view_are_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(summary, "SUMMARY_ROWS", 5)
    found = summarise(synthetic_cache(tmp_path / "t", logits_of([0.5, 0.5]), top_k=2))
    assert found.rows == 4
    assert mean(found.largest_probability) == pytest.approx(0.5)


@pytest.mark.parametrize("dtype", ["float16", "uint8"])
def test_other_types_come_close(tmp_path: Path, dtype: str) -> None:
    logits = logits_of([0.3, 0.2, *[0.125] * 4])
    found = summarise(synthetic_cache(tmp_path / "t", logits, top_k=2, dtype=dtype))
    assert mean(found.largest_probability) == pytest.approx(0.3, rel=1e-2)
    assert mean(found.tail_mass) == pytest.approx(0.5, rel=1e-2)


def test_a_damaged_cache_has_no_figures(tmp_path: Path) -> None:
    cache = synthetic_cache(tmp_path / "t", logits_of([0.5, 0.5]), top_k=2)
    (tmp_path / "t" / "logits/c/1/0/0").write_bytes(b"?" * 100)
    with pytest.raises(CacheCorrupt, match="view 1"):
        summarise(cache)


def test_quantiles_are_those_of_the_records(tmp_path: Path) -> None:
    p = torch.linspace(0.5, 0.99, 101)
    logits = torch.stack([p, 1 - p], 1).log()[None]
    found = summarise(synthetic_cache(tmp_path / "t", logits, top_k=2)).largest_probability
    assert found is not None
    shares = [found.p5, found.p25, found.p50, found.p75, found.p95]
    assert shares == pytest.approx([0.5 + 0.49 * q for q in (0.05, 0.25, 0.5, 0.75, 0.95)])
    assert found.mean == pytest.approx(0.745)


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "CHUNK_BYTES", 16)
    monkeypatch.setattr(layout, "SHARD_BYTES", 32)


@pytest.mark.usefixtures("small_shards")
def test_figures_come_from_all_over_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache in sample order may be sorted by class."""
    logits = torch.cat([logits_of([0.9, 0.1], 1, 10), logits_of([0.6, 0.4], 1, 10)], 1)
    cache = synthetic_cache(tmp_path / "t", logits, top_k=2)
    assert cache.shards_per_view > 4
    monkeypatch.setattr(summary, "SUMMARY_SHARDS", 4)
    found = summarise(cache)
    assert found.rows == 4 * cache.manifest.layout.shard_rows
    assert mean(found.largest_probability) == pytest.approx(0.75, abs=0.08)


# --- coverage --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("numbers", "text"),
    [([], ""), ([4], "4"), ([0, 1], "0-1"), ([0, 1, 2, 5, 7, 8], "0-2, 5, 7-8")],
)
def test_spans(numbers: list[int], text: str) -> None:
    assert spans(numbers) == text


@pytest.mark.usefixtures("small_shards")
def test_coverage_is_said_in_few_words(tmp_path: Path) -> None:
    cache = synthetic_cache(tmp_path / "t", logits_of([0.5, 0.5], num_views=9), top_k=2)
    assert cache.shards_per_view == 5
    assert coverage(cache, gaps(cache.missing())) == "views 0-8 whole"
    for view, shard in [(4, 1), (4, 3), (6, 2), (7, 2), *((8, s) for s in range(5))]:
        cache.delete_shard(view, shard)
    found = summarise(cache)
    assert found.missing == (Gap(4, (1, 3)), Gap(6, (2,)), Gap(7, (2,)), Gap(8, (0, 1, 2, 3, 4)))
    assert (found.views_complete, found.shards_missing) == (5, 9)
    assert coverage(cache, found.missing) == (
        "views 0-3, 5 whole; view 4 lacks shards 1, 3; views 6-7 lack shard 2; view 8 lacks all"
    )


# --- accuracy --------------------------------------------------------------------------------


def test_accuracy_of_plain_views(tmp_path: Path) -> None:
    """The teacher names class `sample % 3` for every sample, whatever the view's order."""
    view = ViewSpec(8, mixup=0)
    order = view_order(view, 0, 30)
    logits = 5.0 * torch.nn.functional.one_hot(torch.from_numpy(order % 3))[None].float()
    cache = synthetic_cache(tmp_path / "t", logits, top_k=3, view=view)
    labels = np.arange(30) % 3
    assert summarise(cache, labels).accuracy == Accuracy(1.0, None)
    labels[:6] = 9
    assert summarise(cache, labels).accuracy == Accuracy(pytest.approx(0.8), None)
    assert summarise(cache).accuracy is None


def test_accuracy_of_mixed_views_tells_own_class_from_the_partners(tmp_path: Path) -> None:
    """The teacher always names the partner, and the last sample, which has none."""
    view = ViewSpec(8, mixup=1)
    order = view_order(view, 0, 31)
    place = np.arange(31)
    said = order[np.minimum(place ^ 1, 30)]
    logits = 5.0 * torch.nn.functional.one_hot(torch.from_numpy(said), 31)[None].float()
    cache = synthetic_cache(tmp_path / "t", logits, top_k=3, view=view)
    mixed = pair_mix_weights(view, 0, place, 31) > 0
    found = summarise(cache, np.arange(31)).accuracy
    assert found == Accuracy(pytest.approx(1 / 31), pytest.approx(mixed.mean()))


def test_accuracy_in_sample_order(tmp_path: Path) -> None:
    logits = 5.0 * torch.eye(4)[None]
    codec = Dense("float32")
    spec = CacheSpec(1, 4, 4, codec, "0" * 16, "0" * 16, None, row_order="dataset")
    cache = LogitCache.create(tmp_path / "t", spec, {"teacher": "someone's"})
    cache.write(0, 0, codec.encode(logits[0]))
    assert summarise(cache, np.array([0, 1, 2, 0])).accuracy == Accuracy(0.75, None)


# --- one record ------------------------------------------------------------------------------


def test_a_record_as_classes_with_names(tmp_path: Path) -> None:
    view = ViewSpec(8)
    p = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15])
    cache = synthetic_cache(tmp_path / "t", p.log().expand(2, 21, 5), top_k=2, view=view)
    place = int(view_positions(view, 1, 21)[7])
    found = entry(cache, 7, 1, ["a", "b", "c", "d", "e"])
    assert (found.view, found.position, found.sample) == (1, place, 7)
    assert (found.classes, found.names) == ([1, 3], ["b", "d"])
    assert found.probabilities == pytest.approx([0.4, 0.3], rel=1e-4)
    assert found.tail == pytest.approx(0.3, rel=1e-4)
    assert found.temperature == 1
    weight = int(pair_mix_weights(view, 1, place, 21))
    assert found.weight == weight / 256
    assert found.partner == (int(view_order(view, 1, 21)[place ^ 1]) if weight else None)
    assert entry(cache, 7, 1).names == ["1", "3"]


def test_the_last_of_an_odd_count_has_no_partner(tmp_path: Path) -> None:
    view = ViewSpec(8)
    cache = synthetic_cache(tmp_path / "t", logits_of([0.5, 0.5], 1, 21), top_k=2, view=view)
    found = entry(cache, int(view_order(view, 0, 21)[20]), 0)
    assert (found.position, found.partner, found.weight) == (20, None, 0)


def test_a_record_of_draws_names_what_was_drawn(tmp_path: Path) -> None:
    spec = CacheSpec(1, 4, 6, Sampled(5, 2.0), "0" * 16, "0" * 16, ViewSpec(8))
    cache = LogitCache.create(tmp_path / "t", spec, {"teacher": "t", "class_names": list("abcdef")})
    p = torch.tensor([0.0, 0.7, 0.0, 0.0, 0.3, 0.0]).log().clamp(min=-900).expand(4, 6)
    cache.write(0, 0, spec.codec.encode(p, spec.rows(0, np.arange(4))))
    found = entry(cache, 2, 0)
    assert set(found.names) <= {"b", "e"}
    assert sum(found.probabilities) == pytest.approx(1)
    assert sorted(found.probabilities, reverse=True) == found.probabilities
    assert (found.tail, found.temperature) == (0, 2)


@pytest.mark.parametrize(
    ("sample", "view", "words"),
    [(20, 0, "sample must be 0 to 19"), (-1, 0, "sample must"), (0, 2, "view must be 0 to 1")],
)
def test_a_record_that_the_cache_has_not(
    tmp_path: Path, sample: int, view: int, words: str
) -> None:
    cache = synthetic_cache(tmp_path / "t", logits_of([0.5, 0.5]), top_k=2)
    with pytest.raises(UsageError, match=words):
        entry(cache, sample, view)


# --- the picture -----------------------------------------------------------------------------


def recorded(dataset: Dataset, view: ViewSpec, out: Path, top_k: int | None = None) -> LogitCache:
    classes = len(dataset.class_names)
    teacher = load.load_model(TEACHER, "teacher", num_classes=classes, size_px=8)
    spec = cache_spec(dataset, teacher, view, num_views=2, top_k=top_k, dtype="float32")
    return precompute(dataset, teacher, spec, out)


def assert_picture(path: Path, num_samples: int, num_views: int) -> None:
    with PIL.Image.open(path) as picture:
        picture.load()
        assert picture.format == "PNG"
        wanted = 130 * (1.9 + 4.1 * num_views), 130 * (1.75 * num_samples + 0.5)
        assert picture.size == pytest.approx(wanted, abs=2)
        assert np.asarray(picture.convert("L")).std() > 5


@pytest.mark.parametrize(("mixup", "top_k"), [(1.0, None), (0.0, None), (1.0, 2)])
def test_views_are_drawn(
    digits_test: Dataset, tmp_path: Path, mixup: float, top_k: int | None
) -> None:
    pytest.importorskip("matplotlib")
    cache = recorded(digits_test, ViewSpec(8, mixup=mixup), tmp_path / "t", top_k)
    draw_views(cache, digits_test, tmp_path / "v.png", samples=[0, 296], views=[0, 1])
    assert_picture(tmp_path / "v.png", 2, 2)


def test_views_of_an_odd_dataset_are_drawn(photos: Dataset, tmp_path: Path) -> None:
    """Among them the sample that has no partner; two classes, of which three cannot be shown."""
    pytest.importorskip("matplotlib")
    view = ViewSpec(8)
    alone = int(view_order(view, 1, 41)[40])
    cache = recorded(photos, view, tmp_path / "t")
    draw_views(cache, photos, tmp_path / "v.png", samples=[alone], views=[1])
    assert_picture(tmp_path / "v.png", 1, 1)


def test_without_matplotlib_the_message_says_how_to_get_it(
    digits_test: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = synthetic_cache(tmp_path / "t", logits_of([0.5, 0.5]), top_k=2)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingDependency, match=r"pip install 'kdcache\[plot\]'"):
        draw_views(cache, digits_test, tmp_path / "v.png", samples=[0], views=[0])
