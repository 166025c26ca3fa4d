"""The public names: lazy, complete, and enough for a training loop of one's own."""

from __future__ import annotations

import builtins
import inspect
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import kdcache
from kdcache import (
    CachedLoader,
    Dense,
    Loader,
    ViewSpec,
    distillation_loss,
    errors,
    load_student,
    load_teacher,
    make_cache_spec,
    open_dataset,
    precompute,
)
from kdcache.cache.codecs import CalibratedCodec, RecordCodec
from kdcache.data.beton import Dataset
from kdcache.errors import CacheIncomplete, CacheMismatch, UsageError
from tests.conftest import TEACHER, synthetic_cache

VIEWS = ViewSpec(8, min_scale=0.5)
STUDENT = "python:tests.conftest:any_size"
PROTOCOL = {*dir(RecordCodec), *dir(CalibratedCodec)}


def test_every_public_name_can_be_imported_and_says_what_it_is() -> None:
    assert len(kdcache.__all__) == len(set(kdcache.__all__))
    for name in kdcache.__all__:
        assert getattr(kdcache, name).__doc__, name
    assert set(kdcache.__all__) <= set(dir(kdcache))
    with pytest.raises(AttributeError, match="nothing"):
        _ = kdcache.nothing


def _documented() -> Iterator[tuple[str, Callable[..., Any], str]]:
    """(name, function, docstrings that may explain its parameters) of all public callables."""
    for name in kdcache.__all__:
        thing = getattr(kdcache, name)
        yield name, thing, thing.__doc__ or ""
        if not inspect.isclass(thing):
            continue
        for method, function in vars(thing).items():
            function = getattr(function, "__func__", function)
            # A record codec's methods are explained once, in the protocol.
            of_protocol = hasattr(thing, "measures") and method in PROTOCOL
            if inspect.isfunction(function) and not method.startswith("_") and not of_protocol:
                about = f"{function.__doc__} {thing.__doc__}" if function.__doc__ else ""
                yield f"{name}.{method}", function, about


def test_every_parameter_of_a_public_function_is_explained() -> None:
    missing = []
    for name, function, about in _documented():
        parameters = set(inspect.signature(function).parameters) - {"self", "cls"}
        missing += [f"{name}: {p}" for p in sorted(parameters) if not re.search(rf"\b{p}\b", about)]
        missing += [f"{name} has no docstring"] * (not about)
    assert missing == []


def test_every_error_that_a_docstring_names_exists() -> None:
    root = Path(kdcache.__file__).parent
    known = {n for n, x in (vars(errors) | vars(builtins)).items() if inspect.isclass(x)}
    named = set()
    for path in (*root.rglob("*.py"), *(root.parent / "kernels").rglob("*.py")):
        for sentence in re.findall(r"Raises\s[^.;]*", path.read_text()):
            named |= set(re.findall(r"\b[A-Z][a-z]+[A-Z]\w+", sentence))
    assert {"CacheCorrupt", "UsageError"} <= named
    assert named - known - set(kdcache.__all__) == {"TinyViT"}


def test_importing_the_package_loads_nothing() -> None:
    code = (
        "import sys, json\nbefore = set(sys.modules)\nimport kdcache\n"
        "print(json.dumps(sorted({m.split('.')[0] for m in set(sys.modules) - before})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    loaded = set(json.loads(done.stdout))
    assert "kdcache" in loaded
    assert not loaded & {"torch", "numpy", "numba", "zarr", "ffcv", "typer", "rich", "torchvision"}


def test_paths_may_be_text(digits_test: Dataset) -> None:
    assert open_dataset(str(digits_test.path)).content_hash == digits_test.content_hash


def test_a_loader_has_a_length_and_iterates_over_its_view(digits_test: Dataset) -> None:
    with Loader(digits_test, VIEWS, 64) as loader:
        assert len(loader) == 5
        for view in (0, 3):
            loader.view = view
            batches = list(loader)
            assert [batch.view for batch in batches] == [view] * 5
            assert [len(batch) for batch in batches] == [64, 64, 64, 64, 41]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, digits_test: Dataset) -> str:
    teacher = load_teacher(TEACHER, num_classes=10, size_px=8)
    spec = make_cache_spec(digits_test, teacher, VIEWS, Dense("float32"), num_views=2)
    out = tmp_path_factory.mktemp("cache") / "c.zarr"
    return precompute(digits_test, teacher, spec, out).url


def test_a_loop_of_ones_own_trains_from_a_cache(made: str, digits_test: Dataset) -> None:
    cache = kdcache.LogitCache.open(made)
    teacher = load_teacher(TEACHER, num_classes=10, size_px=8)
    student = load_student(STUDENT, num_classes=10, size_px=8)
    optimizer = torch.optim.SGD(student.parameters(), 0.1)
    with Loader(digits_test, VIEWS, 128) as loader:
        batches = CachedLoader(loader, cache)
        assert len(batches) == len(loader) == 3
        for epoch in range(3):
            loader.view = epoch
            for batch, target in batches:
                assert batch.view == epoch % 2
                live = torch.log_softmax(teacher(batch.images_BCHW), 1)
                stored = torch.log_softmax(target.logits_BK, 1)
                torch.testing.assert_close(stored, live, rtol=0, atol=1e-4)
                loss = distillation_loss(student(batch.images_BCHW), target)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        assert torch.isfinite(loss)


@pytest.mark.parametrize(
    ("change", "named"),
    [({"seed": 1}, "seed"), ({"min_scale": 0.25}, "min_scale"), ({"size_px": 16}, "size_px")],
)
def test_a_cache_of_other_views_is_refused(
    made: str, digits_test: Dataset, change: dict[str, float], named: str
) -> None:
    with Loader(digits_test, replace(VIEWS, **change), 64) as loader:
        with pytest.raises(CacheMismatch, match=named):
            CachedLoader(loader, kdcache.LogitCache.open(made))


def test_a_cache_of_other_data_is_refused(made: str, digits: Dataset) -> None:
    with Loader(digits, VIEWS, 64) as loader:
        with pytest.raises(CacheMismatch, match="other data"):
            CachedLoader(loader, kdcache.LogitCache.open(made))


def test_a_cache_in_dataset_order_needs_views_that_are_not_mixed(
    tmp_path: Path, digits_test: Dataset
) -> None:
    teacher = load_teacher(TEACHER, num_classes=10, size_px=8)
    plain = ViewSpec(8, crop="center", min_scale=1, flip=False, mixup=0)
    spec = make_cache_spec(digits_test, teacher, plain, Dense(), row_order="dataset")
    cache = precompute(digits_test, teacher, spec, tmp_path / "c.zarr")
    with Loader(digits_test, VIEWS, 64) as loader, pytest.raises(UsageError, match="mixup"):
        CachedLoader(loader, cache)
    with Loader(digits_test, replace(VIEWS, mixup=0), 64) as loader:
        loader.view = 7
        batch, target = next(iter(CachedLoader(loader, cache)))
        assert (batch.view, len(target.logits_BK)) == (7, 64)


def test_an_incomplete_cache_is_refused(tmp_path: Path, digits_test: Dataset) -> None:
    logits = torch.randn(1, len(digits_test), 10)
    whole = synthetic_cache(
        tmp_path / "c.zarr", logits, top_k=10, view=VIEWS, dataset=digits_test.content_hash
    )
    whole.delete_shard(0, 0)
    with Loader(digits_test, VIEWS, 64) as loader, pytest.raises(CacheIncomplete, match="shard 0"):
        CachedLoader(loader, whole)


def test_batches_and_targets_can_be_moved(made: str, digits_test: Dataset) -> None:
    """Lightning moves what has `to(device)`, and so does accelerate, with non_blocking."""
    with Loader(digits_test, VIEWS, 64) as loader:
        batch, target = next(iter(CachedLoader(loader, kdcache.LogitCache.open(made))))
    for value in (batch, target):
        moved = value.to("meta", non_blocking=True)
        assert type(moved) is type(value)
        tensors = [x for x in vars(moved).values() if isinstance(x, torch.Tensor)]
        assert tensors
        assert {x.device.type for x in tensors} == {"meta"}
        assert value.to(torch.device("cpu")) is not value
