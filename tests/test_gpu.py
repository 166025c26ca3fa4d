"""kdcache as a whole on a GPU: its views, records, targets and steps are those of the CPU, and no
step waits for the device."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from kdcache.batch import TargetSource
from kdcache.cache.cache import LogitCache
from kdcache.cache.codecs import CodecSpec, Dense, Sampled, TopK, Transformed
from kdcache.cache.verify import Picked, sample
from kdcache.choices import Precision
from kdcache.data.beton import Dataset
from kdcache.data.loader import Loader
from kdcache.errors import Stopped
from kdcache.models.classifier import Classifier
from kdcache.models.load import load_model
from kdcache.teacher.precompute import make_cache_spec, precompute
from kdcache.teacher.recompute import recompute
from kdcache.teacher.targets import CachedTargets, LabelTargets, OnlineTargets
from kdcache.training.loop import open_loader, set_determinism, train
from kdcache.training.options import RunOptions
from kdcache.training.run import TrainingRun
from kdcache.training.spec import Mode, TrainSpec
from kdcache.training.state import State
from kdcache.training.step import train_step
from kdcache.views.spec import ViewSpec
from tests.conftest import TEACHER, Result

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
CUDA = "cuda"
STUDENT = "python:tests.conftest:convolutional_student"
VIEW = ViewSpec(8, min_scale=0.5, mixup=1.0)
SPEC = TrainSpec("labels", VIEW, 4, 100, num_views=2, temperature=2.0)
CODECS: list[CodecSpec] = [
    Dense("float32"),
    Dense("uint8"),
    TopK(3, "float16"),
    Transformed(0.05, k=3, num_calibration_records=500),
    Sampled(4, 2.0),
]


@pytest.fixture(autouse=True)
def _float32_as_on_the_cpu() -> Iterator[None]:
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def teacher(device: str = CUDA) -> Classifier:
    return load_model(TEACHER, "teacher", num_classes=10, size_px=8, device=device)


def student(device: str = CUDA) -> Classifier:
    torch.manual_seed(0)
    return load_model(STUDENT, "student", num_classes=10, size_px=8, device=device)


def record(data: Dataset, codec: CodecSpec, out: Path, device: str = CUDA) -> LogitCache:
    spec = make_cache_spec(data, teacher(device), VIEW, codec, num_views=2)
    return precompute(data, teacher(device), spec, out, batch_size=128)


@pytest.fixture(scope="module")
def dense(digits: Dataset, tmp_path_factory: pytest.TempPathFactory) -> LogitCache:
    return record(digits, Dense("float32"), tmp_path_factory.mktemp("gpu") / "dense.zarr")


def source(mode: Mode, data: Dataset, cache: LogitCache) -> TargetSource:
    if mode == "labels":
        return LabelTargets(len(data.class_names))
    if mode == "online":
        return OnlineTargets(teacher())
    return CachedTargets(cache, data.content_hash, VIEW)


@pytest.mark.parametrize("mixup", [0.0, 1.0])
def test_views_are_those_of_the_cpu(photos: Dataset, mixup: float) -> None:
    """Also where the device lags behind, so that memory which is reused too early shows."""
    view = ViewSpec(32, min_scale=0.2, mixup=mixup)
    loaders = [Loader(photos, view, 4, device=torch.device(name)) for name in ("cpu", CUDA)]
    busy = torch.randn(4096, 4096, device=CUDA)
    for epoch in range(3):
        here, there = (loader.batches(epoch) for loader in loaders)
        kept = []
        for batch in there:
            for _ in range(3):
                busy = (busy @ busy).clamp(-1, 1)
            kept.append((batch, batch.images_BCHW.clone()))
        for ours, (batch, images) in zip(here, kept, strict=True):
            assert np.array_equal(ours.positions_B, batch.positions_B)
            torch.testing.assert_close(images.cpu(), ours.images_BCHW, rtol=0, atol=1e-6)
    for loader in loaders:
        loader.close()


@pytest.mark.parametrize("codec", CODECS, ids=lambda c: c.name)
def test_records_are_those_of_the_cpu(codec: CodecSpec, digits: Dataset, tmp_path: Path) -> None:
    """A cache that one device made holds against the teacher on the other."""
    for made_on, checked_on in ((CUDA, "cpu"), ("cpu", CUDA)):
        cache = record(digits, codec, tmp_path / made_on, made_on)
        rows = sample(cache.spec, 500).items()
        picked = [Picked(view, rows_B, cache[view][rows_B]) for view, rows_B in rows]
        measures = recompute(cache, digits, teacher(checked_on), picked)
        assert measures
        assert all(m.ok for m in measures), (made_on, measures)


@pytest.mark.parametrize("codec", CODECS, ids=lambda c: c.name)
def test_targets_are_those_of_the_cpu(codec: CodecSpec, digits: Dataset, tmp_path: Path) -> None:
    cache = record(digits, codec, tmp_path / "c", "cpu")
    here, there = (cache.decode(cache[0, :100], device) for device in ("cpu", CUDA))
    for name, ours in vars(here).items():
        if isinstance(ours, torch.Tensor):
            other = getattr(there, name)
            assert other.is_cuda
            torch.testing.assert_close(other.cpu(), ours, rtol=0, atol=1e-4)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("mode", ["labels", "cached", "online"])
def test_training_is_that_of_the_cpu(
    mode: Mode, precision: Precision, digits: Dataset, dense: LogitCache
) -> None:
    spec = replace(SPEC, mode=mode, precision=precision, ema_decay=0.9)
    weights = {}
    for device in ("cpu", CUDA):
        net = student(device)
        # Dropout draws other numbers on another device.
        for layer in net.network.modules():
            if isinstance(layer, torch.nn.Dropout):
                layer.p = 0.0
        targets = source(mode, digits, dense)
        if isinstance(targets, OnlineTargets):
            targets = OnlineTargets(teacher(device))
        run = TrainingRun(
            replace(spec, precision="float32" if device == "cpu" else precision),
            digits,
            net,
            targets,
        )
        train(run)
        weights[device] = {k: v.cpu().double() for k, v in net.network.state_dict().items()}
    limit = {"float32": 0.02, "bfloat16": 0.2, "float16": 0.1}[precision]
    for name, ours in weights["cpu"].items():
        distance = (weights[CUDA][name] - ours).norm() / ours.norm().clamp(min=1e-3)
        assert distance < limit, (name, float(distance))


def test_cached_is_online(digits: Dataset, dense: LogitCache) -> None:
    found = []
    for mode in ("cached", "online"):
        spec = replace(SPEC, mode=mode, deterministic=True)
        set_determinism(spec)
        net = student()
        train(TrainingRun(spec, digits, net, source(mode, digits, dense)))
        found.append(net.network.state_dict())
    for name, ours in found[0].items():
        torch.testing.assert_close(found[1][name], ours, rtol=1e-3, atol=1e-4)


def test_a_resumed_run_ends_with_the_same_weights(
    digits: Dataset, dense: LogitCache, tmp_path: Path
) -> None:
    spec = replace(SPEC, mode="cached", precision="float16", ema_decay=0.9, deterministic=True)
    set_determinism(spec)

    def run(out: Path, stop: Callable[[], int] = lambda: 0) -> dict[str, torch.Tensor]:
        net, options = student(), RunOptions(resume=True)
        run = TrainingRun(spec, digits, net, source("cached", digits, dense))
        train(run, out, options=options, stop=stop)
        return dict(net.network.state_dict())

    whole, calls = run(tmp_path / "whole"), iter([0] * 30 + [15] * 100)
    with pytest.raises(Stopped):
        run(tmp_path / "cut", lambda: next(calls))
    for name, ours in run(tmp_path / "cut").items():
        assert torch.equal(ours, whole[name]), name


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["labels", "online", *(c.name for c in CODECS)])
def test_a_step_does_not_wait_for_the_device(
    kind: str, precision: Precision, digits: Dataset, tmp_path: Path
) -> None:
    codec = next((c for c in CODECS if c.name == kind), Dense("float32"))
    mode: Mode = kind if kind in ("labels", "online") else "cached"  # type: ignore[assignment]
    cache = record(digits, codec, tmp_path / "c")
    spec = replace(SPEC, mode=mode, precision=precision, ema_decay=0.9)
    run = TrainingRun(spec, digits, student(), source(mode, digits, cache))
    state, loss = State(spec, run.student), run.make_loss()
    run.student.train()
    with open_loader(run) as loader:
        for number, batch in enumerate(loader.batches(0)):
            # The first steps compile, and make the optimizer's state.
            torch.cuda.set_sync_debug_mode("error" if number > 3 else "default")
            try:
                train_step(state, run.student, batch, run.targets, loss, 1e-3)
            finally:
                torch.cuda.set_sync_debug_mode("default")
    assert state.step == 15
    assert torch.stack([w.isfinite().all() for w in run.student.parameters()]).all()


@pytest.mark.parametrize("mode", ["labels", "cached", "online"])
def test_the_commands(
    mode: str, digits: Dataset, digits_test: Dataset, tmp_path: Path, kdcache: Callable[..., Result]
) -> None:
    """precompute, verify, train and eval, as a user types them."""
    line = ["train", "--mode", mode, "--data", digits.path, "--batch-size", 100]
    line += ["--student", "kdcache:small", "--epochs", 8, "--precision", "bfloat16"]
    teaching = ["--data", digits.path, "--teacher", TEACHER]
    if mode == "cached":
        out = tmp_path / "c.zarr"
        made = kdcache("precompute", *teaching, "--out", out, "--views", 4, "--min-scale", 0.5)
        assert made.code == 0, made.err
        assert kdcache("verify", out, *teaching).code == 0
        line += ["--cache", out]
    else:
        line += ["--min-scale", 0.5]
    if mode == "online":
        line += ["--teacher", TEACHER]
    trained = kdcache(*line, "--out", tmp_path / "run", "--val", digits_test.path)
    assert trained.code == 0, trained.err
    found = kdcache("eval", tmp_path / "run", "--data", digits_test.path, *teaching[2:], "--json")
    assert found.code == 0, found.err
    assert json.loads(found.out)["top1" if mode == "labels" else "agreement"] > 0.5
