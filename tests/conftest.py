"""Fixtures: small real data, small networks, and a way to run the command line."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from kdcache.cache.cache import LogitCache
from kdcache.cache.codecs import Dense, RecordCodec, Sampled, TopK, ValueType, choose_codec
from kdcache.cache.spec import CacheSpec
from kdcache.cache.store import Store
from kdcache.cli import app
from kdcache.data.beton import Dataset, open_dataset
from kdcache.data.convert import convert
from kdcache.data.sources import Source, open_source
from kdcache.models.classifier import Teacher
from kdcache.teacher.precompute import make_cache_spec
from kdcache.views.spec import ViewSpec

TEACHER = "python:tests.conftest:linear_teacher"


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """scikit-learn's digits, training part: 1500 images of 8 px, 10 classes."""
    return convert(open_source("digits", "train"), tmp_path_factory.mktemp("data") / "d.beton")[0]


@pytest.fixture(scope="session")
def digits_test(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """scikit-learn's digits, test part: 297 images."""
    return convert(open_source("digits", "test"), tmp_path_factory.mktemp("data") / "t.beton")[0]


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """41 JPEGs (an odd count) of many sizes and shapes, cut from scikit-learn's two photos."""
    return convert(photo_source(), tmp_path_factory.mktemp("data") / "p.beton")[0]


def overwrite(store: Store, key: str, data: bytes) -> None:
    """Damage an object."""
    store.delete(key)
    assert store.write_new(key, data)


def photo_source() -> Source:
    from sklearn.datasets import load_sample_images

    rng = np.random.default_rng(0)
    images, labels = [], []
    for i in range(41):
        photo = load_sample_images().images[i % 2]
        h, w = rng.integers(70, 300, 2)
        y, x = rng.integers(0, photo.shape[0] - h), rng.integers(0, photo.shape[1] - w)
        images.append(np.ascontiguousarray(photo[y : y + h, x : x + w]))
        labels.append(i % 2)
    return Source(("temple", "flower"), images, labels)


def subset(dataset: Dataset, count: int, out: Path) -> Dataset:
    """The first `count` digits as a dataset of their own."""
    whole = open_source("digits", "train")
    return convert(Source(whole.class_names, whole.images[:count], whole.labels[:count]), out)[0]


def linear_teacher(num_classes: int) -> nn.Module:
    """A fixed random linear network: fast, deterministic, moved by every pixel of 8 px views.

    Of many tried, it is one that is right for 44 % of the digits, as no order of classes is by
    chance.
    """
    torch_state = torch.random.get_rng_state()
    torch.manual_seed(2107)
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, num_classes))
    with torch.no_grad():
        network[1].weight.mul_(4)
        if num_classes == 10:
            for weight in network[1].parameters():
                weight.copy_(weight[[6, 0, 8, 3, 2, 7, 9, 5, 1, 4]])
    network.mean, network.std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # type: ignore[assignment]
    torch.random.set_rng_state(torch_state)
    return network


def convolutional_student(num_classes: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.1),
        nn.Linear(8 * 8 * 8, num_classes),
    )


def any_size(num_classes: int) -> nn.Module:
    """A student for views of any size."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, num_classes),
    )


def codec_for(
    num_classes: int,
    top_k: int | None = None,
    dtype: ValueType = "float16",
    *,
    num_draws: int = 0,
    temperature: float = 1.0,
) -> RecordCodec:
    """Draws, or the k largest logits, or all of them, without the rule of `choose_codec`."""
    if num_draws:
        return Sampled(num_draws, temperature)
    return Dense(dtype) if top_k in (None, num_classes) else TopK(top_k, dtype)


def cache_spec(
    dataset: Dataset,
    teacher: Teacher,
    view_spec: ViewSpec,
    *,
    top_k: int | None = None,
    dtype: ValueType = "float16",
    num_draws: int = 0,
    temperature: float = 1.0,
    **fields: Any,
) -> CacheSpec:
    """`make_cache_spec` with the record codec by its parameters, as on the command line."""
    codec: RecordCodec = Sampled(num_draws or 1, temperature)
    if not num_draws:
        codec = choose_codec(teacher.num_classes or len(dataset.class_names), top_k, dtype)
    return make_cache_spec(dataset, teacher, view_spec, codec, **fields)


def synthetic_cache(
    out: Path,
    logits_VNC: torch.Tensor,
    *,
    top_k: int,
    dtype: ValueType = "float32",
    view: ViewSpec = ViewSpec(8),  # noqa: B008
    dataset: str = "0123456789abcdef",
    teacher: str = "fedcba9876543210",
) -> LogitCache:
    """A complete cache of given logits [num_views, num_samples, C], without data or teacher."""
    num_views, num_samples, num_classes = logits_VNC.shape
    codec = codec_for(num_classes, top_k, dtype)
    spec = CacheSpec(num_views, num_samples, num_classes, codec, dataset, teacher, view)
    cache = LogitCache.create(out, spec, {"teacher": "synthetic"})
    for v, shard in cache.missing():
        start, stop = cache.shard_range(shard)
        rows = spec.rows(v, np.arange(start, stop))
        cache.write(v, shard, codec.encode(logits_VNC[v, start:stop], rows))
    return cache


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


@pytest.fixture
def kdcache(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., Result]:
    """Run the command line in this process: kdcache("eval", "x", "--data", path) -> Result."""

    def run(*args: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["kdcache", *map(str, args)])
        capfd.readouterr()
        code = 0
        try:
            app.main()
        except SystemExit as end:
            code = int(end.code or 0)
        out, err = capfd.readouterr()
        return Result(code, out, err)

    return run


@pytest.fixture(autouse=True)
def _torch_as_it_was() -> object:
    """Tests may ask for determinism; the next test shall not notice."""
    threads = torch.get_num_threads()
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


__all__ = ["TEACHER", "open_dataset"]
