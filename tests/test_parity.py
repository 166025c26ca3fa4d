"""Invariant 1 of the design: cached and online training are interchangeable."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from kdcache.batch import Batch, Target, TargetSource, TemperedTarget
from kdcache.data.beton import Dataset
from kdcache.errors import CacheMismatch
from kdcache.kernels import ops
from kdcache.losses.loss import Distillation, Loss
from kdcache.models import load
from kdcache.teacher import targets
from kdcache.teacher.precompute import precompute
from kdcache.training import checkpoint
from kdcache.training.loop import Progress, iter_batches, open_loader, set_determinism, train
from kdcache.training.optim import learning_rate
from kdcache.training.options import RunOptions
from kdcache.training.run import TrainingRun
from kdcache.training.spec import Mode, TrainSpec
from kdcache.training.state import State
from kdcache.training.step import train_step
from kdcache.views.spec import ViewSpec
from tests.conftest import TEACHER, cache_spec

VIEW = ViewSpec(8, min_scale=0.4, mixup=1.0, seed=5)
VIEWS = 2


def weights_after(
    dataset: Dataset,
    source: TargetSource,
    mode: Mode,
    temperature: float,
    losses: list[float],
    loss: Loss | None = None,
) -> dict[str, torch.Tensor]:
    spec = TrainSpec(
        mode=mode,
        view_spec=VIEW,
        epochs=3,
        batch_size=128,
        temperature=temperature,
        deterministic=True,
        num_views=VIEWS,
        seed=3,
    )
    set_determinism(spec)
    student = load.load_model(
        "python:tests.conftest:convolutional_student", "student", num_classes=10, size_px=8
    )

    def report(progress: Progress) -> None:
        losses.extend([progress.metrics.loss] if progress.metrics else [])

    run = TrainingRun(spec, dataset, student, source, loss)
    train(run, options=RunOptions(workers=1), report=report)
    return dict(student.network.state_dict())


def test_a_cache_of_other_views_is_refused(digits: Dataset, tmp_path: Path) -> None:
    teacher = load.load_model(TEACHER, "teacher", num_classes=10, size_px=8)
    spec = cache_spec(digits, teacher, VIEW, num_views=1, top_k=None, dtype="float32")
    cache = precompute(digits, teacher, spec, tmp_path / "t.zarr")
    with pytest.raises(CacheMismatch, match="seed: 6 here, 5 there"):
        targets.CachedTargets(cache, digits.content_hash, replace(VIEW, seed=6))
    with pytest.raises(CacheMismatch, match="was made from other data"):
        targets.CachedTargets(cache, "0" * 16, VIEW)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_cached_equals_online_to_the_bit(
    digits: Dataset, tmp_path: Path, temperature: float
) -> None:
    teacher = load.load_model(TEACHER, "teacher", num_classes=10, size_px=8)
    torch.set_num_threads(1)
    spec = cache_spec(digits, teacher, VIEW, num_views=VIEWS, top_k=None, dtype="float32")
    cache = precompute(digits, teacher, spec, tmp_path / "t.zarr", batch_size=128, workers=1)
    losses: tuple[list[float], list[float]] = ([], [])
    online = weights_after(digits, targets.OnlineTargets(teacher), "online", temperature, losses[0])
    replay = targets.CachedTargets(cache, digits.content_hash, VIEW)
    cached = weights_after(digits, replay, "cached", temperature, losses[1])
    assert losses[0] == losses[1]
    assert all(torch.equal(online[name], cached[name]) for name in online)


@pytest.mark.parametrize("label_weight", [0.0, 0.3])
@pytest.mark.parametrize("first", ["online", "cached"])
def test_one_may_go_on_with_what_the_other_began(
    digits: Dataset, tmp_path: Path, first: str, label_weight: float
) -> None:
    """A run that stops in the middle of an epoch and goes on with the other source of targets ends
    with the weights of one that was online from beginning to end."""
    teacher = load.load_model(TEACHER, "teacher", num_classes=10, size_px=8)
    torch.set_num_threads(1)
    cache = precompute(
        digits,
        teacher,
        cache_spec(digits, teacher, VIEW, num_views=VIEWS, dtype="float32"),
        tmp_path / "t.zarr",
        batch_size=128,
        workers=1,
    )
    sources: dict[str, TargetSource] = {
        "online": targets.OnlineTargets(teacher),
        "cached": targets.CachedTargets(cache, digits.content_hash, VIEW),
    }
    spec = TrainSpec(
        "online",
        VIEW,
        epochs=2,
        batch_size=128,
        deterministic=True,
        num_views=VIEWS,
        ema_decay=0.9,
        label_weight=label_weight,
    )

    def fresh() -> State:
        set_determinism(spec)
        name = "python:tests.conftest:convolutional_student"
        return State(spec, load.load_model(name, "student", num_classes=10, size_px=8))

    def play(state: State, source: str, last: int = 22) -> State:
        run = TrainingRun(spec, digits, state.student, sources[source])
        loss = run.make_loss()
        state.student.train()
        with open_loader(run, workers=1) as loader:
            for batch in iter_batches(loader, spec, state.step):
                lr = learning_rate(spec, state.step, 22)
                train_step(state, state.student, batch, run.targets, loss, lr)
                if state.step == last:
                    break
        return state

    whole = play(fresh(), "online")
    checkpoint.save(tmp_path / "c", play(fresh(), first, last=14).state_dict())
    state = fresh()
    state.load_state_dict(checkpoint.load(tmp_path / "c"))
    assert state.step == 14
    assert state.step % (len(digits) // 128)  # mid-epoch
    play(state, {"online": "cached", "cached": "online"}[first])
    assert state.step == whole.step == 22
    assert state.student.content_hash() == whole.student.content_hash()
    averages = [s.ema.state_dict()["weights"] for s in (state, whole)]
    assert all(map(torch.equal, *averages))


def test_the_parity_test_can_fail(digits: Dataset, tmp_path: Path) -> None:
    """With another view seed on the cache, the same comparison must not hold."""
    teacher = load.load_model(TEACHER, "teacher", num_classes=10, size_px=8)
    other = ViewSpec(8, min_scale=0.4, mixup=1.0, seed=6)
    spec = cache_spec(digits, teacher, other, num_views=VIEWS, top_k=None, dtype="float32")
    cache = precompute(digits, teacher, spec, tmp_path / "t.zarr", batch_size=128)
    online = weights_after(digits, targets.OnlineTargets(teacher), "online", 1.0, [])
    replay = targets.CachedTargets(cache, digits.content_hash, other)
    cached = weights_after(digits, replay, "cached", 1.0, [])
    assert not all(torch.equal(online[name], cached[name]) for name in online)


@dataclass(frozen=True)
class Recorded:
    """Distillation that notes every loss."""

    losses: list[float]
    name: ClassVar[str] = "recorded"

    def __call__(
        self, logits_BC: torch.Tensor, target: Target | TemperedTarget, batch: Batch
    ) -> torch.Tensor:
        loss = Distillation(2.0)(logits_BC, target, batch)
        self.losses.append(loss.item())
        return loss


def test_training_with_the_fused_loss_has_the_curve_of_the_reference(
    digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = load.load_model(TEACHER, "teacher", num_classes=10, size_px=8)
    spec = cache_spec(digits, teacher, VIEW, num_views=VIEWS, top_k=3, dtype="float16")
    cache = precompute(digits, teacher, spec, tmp_path / "t.zarr", batch_size=128)
    replay = targets.CachedTargets(cache, digits.content_hash, VIEW)
    curves: dict[bool, list[float]] = {True: [], False: []}

    for fused in (True, False):
        monkeypatch.setattr(ops, "HAS_NUMBA", fused)
        weights_after(digits, replay, "cached", 2.0, [], Recorded(curves[fused]))
    assert len(curves[True]) == 3 * (len(digits) // 128)
    assert curves[True] == pytest.approx(curves[False], rel=1e-4)
    assert curves[True] != curves[False]
