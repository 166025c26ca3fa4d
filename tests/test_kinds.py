"""Caches of other kinds, from teacher to student: dataset order, averages, draws."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from kdcache.batch import Batch, dense_target
from kdcache.cache import layout
from kdcache.cache.cache import LogitCache
from kdcache.cache.codecs import Rows, Sampled
from kdcache.data.beton import Dataset
from kdcache.data.loader import Loader
from kdcache.errors import UsageError
from kdcache.models import load
from kdcache.models.classifier import Classifier
from kdcache.teacher.precompute import precompute
from kdcache.teacher.targets import CachedTargets, FixedTargets
from kdcache.views.spec import ViewSpec
from tests.conftest import TEACHER, Result, cache_spec
from tests.test_cache import equal

Run = Callable[..., Result]
VIEW = ViewSpec(8, min_scale=0.4, mixup=0, seed=3)
STUDENT = "python:tests.conftest:convolutional_student"


@pytest.fixture
def teacher() -> Classifier:
    return load.load_model(TEACHER, "teacher", num_classes=10, size_px=8)


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "CHUNK_BYTES", 512)
    monkeypatch.setattr(layout, "SHARD_BYTES", 2048)


def live(dataset: Dataset, teacher: Classifier, view: int) -> torch.Tensor:
    """The teacher's logits [N, C] for a view, in dataset order."""
    out = torch.zeros(len(dataset), 10)
    with Loader(dataset, VIEW, 100) as loader, torch.inference_mode():
        for batch in loader.batches(view):
            out[torch.from_numpy(batch.sample_ids_B)] = teacher(batch.images_BCHW)
    return out


def batches(dataset: Dataset, spec: ViewSpec, view: int) -> list[Batch]:
    with Loader(dataset, spec, 64) as loader:
        return list(loader.batches(view))


def test_sample_order(digits_test: Dataset, teacher: Classifier, tmp_path: Path) -> None:
    spec = cache_spec(digits_test, teacher, VIEW, num_views=2, dtype="float32", row_order="dataset")
    cache = precompute(digits_test, teacher, spec, tmp_path / "t", batch_size=50)
    assert cache.shards_per_view > 2
    for view in (0, 1):
        found = cache.decode(cache[view]).logits_BK
        torch.testing.assert_close(
            found, dense_target(live(digits_test, teacher, view)).logits_BK, rtol=1e-5, atol=1e-4
        )


def test_an_average_is_of_probabilities(
    digits_test: Dataset, teacher: Classifier, tmp_path: Path
) -> None:
    spec = cache_spec(
        digits_test, teacher, VIEW, dtype="float32", row_order="dataset", num_averaged_views=3
    )
    cache = precompute(digits_test, teacher, spec, tmp_path / "t", batch_size=50)
    mean = sum(torch.softmax(live(digits_test, teacher, v), 1) for v in range(3)) / 3
    found = cache.target(0, np.arange(len(digits_test))).log_p_BK.exp()
    torch.testing.assert_close(found, mean, rtol=1e-4, atol=1e-6)
    for deleted in ((0, 1), (0, cache.shards_per_view - 1)):
        before = cache.read_shard(*deleted)
        cache.delete_shard(*deleted)
        precompute(digits_test, teacher, spec, tmp_path / "t", batch_size=50)
        assert equal(cache.read_shard(*deleted), before)


def test_draws(digits_test: Dataset, teacher: Classifier, tmp_path: Path) -> None:
    spec = cache_spec(
        digits_test, teacher, VIEW, num_views=2, dtype="uint8", num_draws=12, temperature=2.0
    )
    cache = precompute(digits_test, teacher, spec, tmp_path / "t", batch_size=50)
    assert set(cache[0].columns) == {"classes", "counts"}
    with Loader(digits_test, VIEW, 50) as loader:
        logits = torch.cat([teacher(b.images_BCHW) for b in loader.batches(1)])
    again = Sampled(12, 2.0).encode(logits, Rows(3, 1, np.arange(len(digits_test))))
    differ = [(cache[1].columns[n] != again.columns[n]).any(1).sum() for n in ("classes", "counts")]
    assert max(differ) <= 2  # a draw on the edge of two classes may fall either way
    target = cache.target(1, [5, 3])
    assert (target.temperature, target.log_tail_B) == (2.0, None)
    with pytest.raises(UsageError, match="holds draws at T = 2, not 1"):
        cache.target(1, [5], 1.0)


def test_fixed_targets_follow_the_sample(
    digits_test: Dataset, teacher: Classifier, tmp_path: Path
) -> None:
    """Whatever view the student sees: other crops, another seed, any batch."""
    spec = cache_spec(digits_test, teacher, VIEW, num_views=2, dtype="float32", row_order="dataset")
    cache = precompute(digits_test, teacher, spec, tmp_path / "t")
    other = ViewSpec(8, "center", 1.0, mixup=0, seed=99)
    targets = FixedTargets(cache, digits_test.content_hash, other)
    for view in (0, 1, 5):
        answers = cache.decode(cache[view % 2]).logits_BK
        for batch in batches(digits_test, other, view)[:3]:
            found = targets(batch)
            assert torch.equal(found.logits_BK, answers[torch.from_numpy(batch.sample_ids_B)])


def test_what_does_not_go_together(
    digits_test: Dataset, digits: Dataset, teacher: Classifier, tmp_path: Path
) -> None:
    spec = cache_spec(digits_test, teacher, VIEW, dtype="float32", row_order="dataset")
    cache = precompute(digits_test, teacher, spec, tmp_path / "t")
    with pytest.raises(UsageError, match="is in dataset order: use FixedTargets"):
        CachedTargets(cache, digits_test.content_hash, VIEW)
    with pytest.raises(UsageError, match="holds records of single images: train with --mixup 0"):
        FixedTargets(cache, digits_test.content_hash, ViewSpec(8))
    with pytest.raises(Exception, match="was made from other data"):
        FixedTargets(cache, digits.content_hash, VIEW)


# --- the command line ------------------------------------------------------------------------


def made(kdcache: Run, dataset: Dataset, out: Path, *options: object) -> LogitCache:
    line = ("--data", dataset.path, "--teacher", TEACHER, "--out", out, *options)
    result = kdcache("precompute", *line)
    assert result.code == 0, result.err
    return LogitCache.open(out)


def trained(kdcache: Run, dataset: Dataset, out: Path, *options: object) -> Result:
    return kdcache(
        "train",
        "--mode",
        "cached",
        "--data",
        dataset.path,
        "--student",
        STUDENT,
        "--out",
        out,
        "--epochs",
        2,
        "--batch-size",
        64,
        *options,
    )


@pytest.mark.parametrize(
    ("options", "training", "kind"),
    [
        (
            ["--average-views", 3],
            [],
            {"num_averaged_views": 3, "row_order": "dataset", "num_views": 1},
        ),
        (["--row-order", "dataset", "--views", 2], ["--crop", "center"], {"row_order": "dataset"}),
        (["--num-draws", 12, "--views", 2], [], {"codec": Sampled(12), "row_order": "view"}),
        (
            ["--num-draws", 9, "--temperature", 3, "--row-order", "dataset"],
            ["--temperature", 3],
            {"codec": Sampled(9, 3.0), "row_order": "dataset"},
        ),
    ],
)
def test_recorded_and_trained_from(
    kdcache: Run,
    digits_test: Dataset,
    tmp_path: Path,
    options: list[object],
    training: list[object],
    kind: dict[str, object],
) -> None:
    cache = made(kdcache, digits_test, tmp_path / "t", *options)
    assert kind.items() <= vars(cache.spec).items()
    assert kdcache("inspect", tmp_path / "t").code == 0
    result = trained(kdcache, digits_test, tmp_path / "r", "--cache", tmp_path / "t", *training)
    assert result.code == 0, result.err
    assert json.loads((tmp_path / "r" / "run.json").read_text())["spec"]["mode"] == "cached"


def test_refusals_are_one_line(kdcache: Run, digits_test: Dataset, tmp_path: Path) -> None:
    made(kdcache, digits_test, tmp_path / "average", "--average-views", 2)
    made(kdcache, digits_test, tmp_path / "draws", "--num-draws", 5, "--temperature", 2)
    line = ("--data", digits_test.path, "--teacher", TEACHER, "--out", tmp_path / "new")
    cache = {name: ("--cache", tmp_path / name) for name in ("average", "draws")}

    def train(*options: object) -> Result:
        return trained(kdcache, digits_test, tmp_path / "r", *options)

    for result, words in (
        (
            train(*cache["average"], "--mixup", 1),
            "holds records of single images: train with --mixup 0",
        ),
        (train(*cache["draws"]), "holds draws at T = 2: train with --temperature 2"),
        (kdcache("precompute", *line, "--average-views", 2, "--mixup", 1), "it needs --mixup 0"),
        (
            kdcache("precompute", *line, "--average-views", 2, "--views", 2),
            "averaged views has one view",
        ),
        (
            kdcache("precompute", *line, "--num-draws", 5, "--top-k", 3),
            "--top-k goes with --record dense or transformed or top-k, not with draws",
        ),
        (kdcache("precompute", *line, "--num-draws", 256), "1 to 255 draws, not 256"),
        (
            kdcache("precompute", *line, "--top-k", 3, "--temperature", 2),
            "--temperature goes with --record auto or draws, not with top-k",
        ),
        (kdcache("precompute", *line, "--part", "3/2"), "--part is i/n with i from 1 to n"),
    ):
        assert result.code == 2
        assert words in result.err
        assert result.err.count("\n") == 1
    assert not (tmp_path / "new").exists()
