"""A training step lets the host run ahead: no number of a device's is asked for between log lines.

Counted on the CPU, in the operators that would make a GPU's host wait. What is the CPU's alone is
left out: the check of a live teacher's logits, and records, which are decoded on the host
for any device, and numba's form of the loss (Triton's has a test of its own).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from kdcache.batch import Batch, Target, TargetSource, TemperedTarget
from kdcache.cache.codecs import Dense
from kdcache.data.beton import Dataset
from kdcache.kernels import ops
from kdcache.models import load
from kdcache.models.classifier import Classifier
from kdcache.teacher.precompute import precompute
from kdcache.teacher.targets import CachedTargets, LabelTargets, OnlineTargets
from kdcache.training.loop import Progress, train
from kdcache.training.options import RunOptions
from kdcache.training.run import TrainingRun
from kdcache.training.spec import TrainSpec
from kdcache.views.spec import ViewSpec
from tests.conftest import TEACHER, cache_spec

VIEW = ViewSpec(8, min_scale=0.5)
SPEC = TrainSpec("labels", VIEW, epochs=2, batch_size=32)
STEPS = 18
WAITS = ("_local_scalar_dense", "nonzero", "unique", "masked_select", "equal", "is_nonzero")


class Waits(TorchDispatchMode):
    """The names of the operators that make the host wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if name in WAITS or (name == "index" and any(_is_mask(x) for x in args[1])):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def _is_mask(x: torch.Tensor | None) -> bool:
    return x is not None and x.dtype in (torch.bool, torch.uint8)


class OnTheHost:
    """Asks a cache where nothing is counted."""

    def __init__(self, source: CachedTargets) -> None:
        self.source = source

    def __call__(self, batch: Batch) -> Target | TemperedTarget:
        with _disable_current_modes():
            return self.source(batch)


def student() -> Classifier:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.1),
        nn.Linear(4 * 36, 10),
    )
    return Classifier(network, "small", (0.5,) * 3, (0.25,) * 3)


@pytest.fixture(params=["labels", "online", "dense", "top 1", "draws"])
def source(request: pytest.FixtureRequest, digits_test: Dataset, tmp_path: Path) -> TargetSource:
    if request.param == "labels":
        return LabelTargets(10)
    teacher = load.load_model(TEACHER, "teacher", num_classes=10, size_px=8)
    if request.param == "online":
        online = OnlineTargets(teacher)
        online._wait = False  # as on a GPU
        return online
    kept = {
        "dense": {"top_k": None, "dtype": "float32"},
        "top 1": {"top_k": 1, "dtype": "float16"},
        "draws": {"num_draws": 5},
    }[request.param]
    spec = cache_spec(digits_test, teacher, VIEW, num_views=2, **kept)
    assert isinstance(spec.codec, Dense) == (request.param == "dense")
    cache = precompute(digits_test, teacher, spec, tmp_path / "t", batch_size=64)
    return OnTheHost(CachedTargets(cache, digits_test.content_hash, VIEW))


def waits(
    dataset: Dataset, source: TargetSource, log_every: int, **changes: Any
) -> list[list[str]]:
    """What each step waited for."""
    spec = replace(SPEC, **changes)
    found: list[list[str]] = []
    learner = student()
    with Waits() as all_waits:

        def report(progress: Progress) -> None:
            if progress.step:
                found.append(all_waits.found)
            all_waits.found = []

        run = TrainingRun(spec, dataset, learner, source)
        train(run, options=RunOptions(log_every=log_every, workers=1), report=report)
    assert len(found) == STEPS
    return found


@pytest.fixture(autouse=True)
def _plain_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "backend", lambda student_BC, class_ids_BK: "reference")


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"label_weight": 0.3, "ema_decay": 0.9},
        {"precision": "bfloat16"},
        {"precision": "float16"},
    ],
    ids=["plain", "labels and average", "bfloat16", "float16"],
)
def test_a_step_waits_for_nothing_between_log_lines(
    digits_test: Dataset, source: TargetSource, optimizer: str, changes: dict[str, Any]
) -> None:
    found = waits(digits_test, source, 6, optimizer=optimizer, **changes)
    logs = [bool(names) for names in found]
    assert logs == [step % 6 == 0 for step in range(1, STEPS + 1)], found


def test_a_step_that_waits_is_noticed(digits_test: Dataset) -> None:
    class Waiting(LabelTargets):
        def __call__(self, batch: Batch) -> Target:
            assert int(batch.labels_B[0]) >= 0
            return super().__call__(batch)

    assert all(waits(digits_test, Waiting(10), 6))
