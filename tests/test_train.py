"""The loop: its determinism, the views that it plays, what it reports, and how it ends early."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from kdcache.batch import Batch, Target, TargetSource, TemperedTarget
from kdcache.data.beton import Dataset
from kdcache.data.loader import Loader
from kdcache.errors import DatasetCorrupt, NonFinite, UsageError
from kdcache.evaluation.evaluate import evaluate
from kdcache.losses.loss import Distillation, Loss
from kdcache.models import load
from kdcache.models.classifier import Classifier
from kdcache.teacher.targets import LabelTargets, OnlineTargets
from kdcache.training.distributed import SINGLE_PROCESS
from kdcache.training.loop import (
    Progress,
    Report,
    StepMetrics,
    iter_batches,
    open_loader,
    set_determinism,
    silent,
    train,
)
from kdcache.training.optim import learning_rate
from kdcache.training.options import RunOptions
from kdcache.training.run import TrainingRun
from kdcache.training.spec import TrainSpec
from kdcache.training.state import Meter, State
from kdcache.training.step import train_step
from kdcache.views.spec import ViewSpec
from tests.conftest import TEACHER

STUDENT = "python:tests.conftest:convolutional_student"
SPEC = TrainSpec("labels", ViewSpec(8, min_scale=0.5), epochs=2, batch_size=64, deterministic=True)
UNMIXED = replace(SPEC, view_spec=replace(SPEC.view_spec, mixup=0))


def fresh(spec: TrainSpec = SPEC) -> Classifier:
    set_determinism(spec)
    return load.load_model(STUDENT, "student", num_classes=10, size_px=8)


def fit(
    spec: TrainSpec,
    dataset: Dataset,
    student: Classifier,
    targets: TargetSource,
    *,
    loss: Loss | None = None,
    log_every: int = 50,
    report: Report = silent,
) -> list[StepMetrics]:
    """Train in memory; what was logged."""
    logged: list[StepMetrics] = []

    def note(progress: Progress) -> None:
        logged.extend([progress.metrics] if progress.metrics else [])
        report(progress)

    run = TrainingRun(spec, dataset, student, targets, loss)
    train(run, options=RunOptions(log_every=log_every, workers=1), report=note)
    return logged


def trained(dataset: Dataset, spec: TrainSpec = SPEC) -> tuple[Classifier, list[StepMetrics]]:
    student = fresh(spec)
    return student, fit(spec, dataset, student, LabelTargets(10), log_every=4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1, not 0"),
        ({"epochs": 1 << 25}, "epochs must be at most 16777216, not 33554432"),
        ({"batch_size": 0}, "batch size must be at least 1, not 0"),
        ({"lr": 0.0}, "lr must be above 0, not 0.0"),
        ({"lr": -1e-3}, "lr must be above 0, not -0.001"),
        ({"lr": float("nan")}, "lr must be above 0, not nan"),
        ({"weight_decay": -1.0}, "weight decay must be at least 0, not -1.0"),
        ({"warmup": 1.5}, r"warmup must be a share in \[0, 1\) or a number of steps, not 1.5"),
        ({"warmup": -0.1}, r"warmup must be a share in \[0, 1\) or a number of steps, not -0.1"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\), not 1.0"),
        ({"label_weight": 1.1}, r"label weight must be in \[0, 1\], not 1.1"),
        ({"ema_decay": 1.0}, r"ema decay must be a decay in \[0, 1\), not 1.0"),
        ({"optimizer": "adam"}, "optimizer must be one of adamw, sgd, soap, not 'adam'"),
        ({"precision": "float64"}, "precision must be one of float32, .*, not 'float64'"),
        ({"temperature": 0.0}, "temperature must be above 0, not 0.0"),
        ({"tail": "flat"}, "tail must be one of bucket, .*, not 'flat'"),
    ],
)
def test_a_spec_says_what_is_wrong(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        replace(SPEC, **change)


@pytest.mark.parametrize("steps", [1, 2, 10, 1000])
@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.5, 0.999])
def test_the_rate_rises_to_its_peak_and_falls_towards_zero(warmup: float, steps: int) -> None:
    spec = replace(SPEC, warmup=warmup, lr=0.5)
    rates = np.array([learning_rate(spec, step, steps) for step in range(steps)])
    rise = round(warmup * steps)
    assert (rates > 0).all()
    assert rates.max() == (0.5 if steps else 0)
    assert (np.diff(rates[:rise]) > 0).all()
    assert (np.diff(rates[rise:]) < 0).all()
    if rise:
        np.testing.assert_allclose(rates[0], 0.5 / rise)
        np.testing.assert_allclose(rates[rise - 1], 0.5)


def test_the_rate_at_known_steps() -> None:
    spec = replace(SPEC, warmup=0.2, lr=1.0)
    found = [learning_rate(spec, step, 10) for step in (0, 1, 2, 6, 10)]
    np.testing.assert_allclose(found, [0.5, 1.0, 1.0, 0.5, 0.0], atol=1e-12)


def test_the_logged_rate_is_the_schedules(digits_test: Dataset) -> None:
    _, steps = trained(digits_test)
    assert [(s.step, s.steps, s.epoch) for s in steps] == [(4, 8, 0), (8, 8, 1)]
    assert steps[-1].lr == learning_rate(SPEC, 7, 8)
    assert steps[-1].rate > 0


# --- determinism -----------------------------------------------------------------------------


def test_equal_runs_give_equal_weights_and_other_seeds_others(digits_test: Dataset) -> None:
    first, second = trained(digits_test)[0], trained(digits_test)[0]
    assert first.content_hash() == second.content_hash()
    assert first.content_hash() != fresh().content_hash()
    other_student = trained(digits_test, replace(SPEC, seed=1))[0]
    other_views = trained(digits_test, replace(SPEC, view_spec=replace(SPEC.view_spec, seed=1)))[0]
    different = {s.content_hash() for s in (first, other_student, other_views)}
    assert len(different) == 3


def test_training_lowers_the_loss(digits: Dataset) -> None:
    view = ViewSpec(8, crop="center", min_scale=1.0, flip=False, mixup=0)
    spec = replace(SPEC, view_spec=view, epochs=5)
    student, steps = trained(digits, spec)
    assert steps[-1].loss < 0.5
    assert evaluate(student, digits, size_px=8).top1 > 0.85
    assert student.training


# --- what it plays ---------------------------------------------------------------------------


class Spy:
    """Labels, and a note of the batches that asked for them."""

    def __init__(self) -> None:
        self.batches: list[Batch] = []

    def __call__(self, batch: Batch) -> Target:
        self.batches.append(batch)
        return LabelTargets(10)(batch)


@pytest.mark.parametrize(
    ("num_views", "played"), [(None, [0, 1, 2, 3, 4]), (2, [0, 1, 0, 1, 0]), (1, [0] * 5)]
)
def test_epochs_cycle_through_the_views(
    digits_test: Dataset, num_views: int | None, played: list[int]
) -> None:
    spy = Spy()
    spec = replace(SPEC, epochs=5, batch_size=100, num_views=num_views)
    assert spec.view_spec.mixup
    fit(spec, digits_test, fresh(), spy)
    assert [b.view for b in spy.batches] == [v for v in played for _ in range(2)]
    assert [b.positions_B.tolist() for b in spy.batches] == 5 * [
        list(range(100)),
        list(range(100, 200)),
    ]


def test_one_batch_may_hold_all_samples(digits_test: Dataset) -> None:
    spy = Spy()
    fit(replace(UNMIXED, epochs=1, batch_size=297), digits_test, fresh(), spy)
    assert [len(b) for b in spy.batches] == [297]


def test_a_batch_above_the_data_is_refused(digits_test: Dataset) -> None:
    with pytest.raises(UsageError, match="batch size 298 is more than the 297 samples of the data"):
        fit(replace(SPEC, batch_size=298), digits_test, fresh(), LabelTargets(10))


# --- errors ----------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [1, 3, 4, 5, 8])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_loss_that_is_not_finite_ends_the_run_with_its_own_step(
    digits_test: Dataset, bad: int, value: float
) -> None:
    """Also where later losses are finite again, as they are for a target that was bad once."""
    asked = 0

    def targets(batch: Batch) -> Target:
        nonlocal asked
        asked += 1
        logits_BC = nn.functional.one_hot(batch.labels_B, 10).float() - 1
        if asked == bad:
            logits_BC[7, 3] = value
        return Target(logits_BC, None, None, 10)

    student = fresh()
    before = [w.clone() for w in student.parameters()]
    logged: list[int] = []

    def report(progress: Progress) -> None:
        logged.extend([progress.step] if progress.metrics else [])

    words = f"the loss is not finite at step {bad}: lower --lr or raise --warmup"
    with pytest.raises(NonFinite, match=words):
        fit(SPEC, digits_test, student, targets, log_every=4, report=report)
    assert logged == [4] * (bad > 4)
    assert not all(map(torch.equal, before, student.parameters()))


def test_a_weight_that_is_not_finite_is_not_kept(digits_test: Dataset) -> None:
    """The loss of a step says nothing of the weights that the step leaves."""
    student = fresh()
    student.network.unused = torch.nn.Parameter(torch.full((1,), torch.nan))
    with pytest.raises(NonFinite, match="a weight NaN or infinite"):
        fit(SPEC, digits_test, student, LabelTargets(10))


def test_a_damaged_sample_ends_the_run(digits_test: Dataset) -> None:
    checksums = digits_test.checksums.copy()
    checksums[123] ^= 1
    damaged = replace(digits_test, checksums=checksums)
    with pytest.raises(DatasetCorrupt, match="sample 123 is damaged"):
        fit(replace(UNMIXED, batch_size=297), damaged, fresh(), LabelTargets(10))


def test_the_loader_is_closed_when_the_run_ends_early(
    digits_test: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[Loader] = []
    close = Loader.close

    def spy(self: Loader) -> None:
        closed.append(self)
        close(self)

    def broken(batch: Batch) -> Target:
        raise RuntimeError("no answer")

    monkeypatch.setattr(Loader, "close", spy)
    with pytest.raises(RuntimeError, match="no answer"):
        fit(SPEC, digits_test, fresh(), broken)
    assert len(closed) == 1
    assert not closed[0]._passes


# --- state -----------------------------------------------------------------------------------


def test_a_report_gets_every_step_and_may_end_the_training(digits_test: Dataset) -> None:
    seen: list[tuple[int, int, bool]] = []

    def report(progress: Progress) -> None:
        seen.append((progress.step, progress.num_steps, progress.metrics is not None))
        if progress.step == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(SPEC, digits_test, fresh(), LabelTargets(10), log_every=4, report=report)
    assert seen == [(step, 8, step == 4) for step in range(7)]


def test_what_dropout_draws_depends_on_the_step_alone(digits_test: Dataset) -> None:
    """Not on earlier draws: a resumed run draws as an uninterrupted one."""
    weights = set()
    for extra in (0, 3):
        student = fresh()

        def report(progress: Progress, extra: int = extra) -> None:
            torch.rand(extra)

        fit(SPEC, digits_test, student, LabelTargets(10), report=report)
        weights.add(student.content_hash())
    assert len(weights) == 1


def test_dropout_draws_anew_at_every_step_and_for_every_seed(digits_test: Dataset) -> None:
    drawn = []
    for seed in (0, 1):
        spec = replace(SPEC, seed=seed)
        run = TrainingRun(spec, digits_test, fresh(), LabelTargets(10))
        with open_loader(run, workers=1) as loader:
            drawn += [float(torch.rand(1)) for _ in iter_batches(loader, spec)]
    assert len(set(drawn)) == len(drawn) == 16


def test_batches_begin_after_any_step(digits_test: Dataset) -> None:
    """With the positions, views and draws that they have from the start."""
    run = TrainingRun(SPEC, digits_test, fresh(), LabelTargets(10))
    with open_loader(run, workers=1) as loader:

        def after(step: int) -> list[tuple[int, list[int], float]]:
            batches = iter_batches(loader, SPEC, step)
            return [(b.view, b.positions_B.tolist(), float(torch.rand(1))) for b in batches]

        everything = after(0)
        assert len(everything) == 8
        assert all(after(step) == everything[step:] for step in (1, 4, 7, 8))


def test_after_the_training_the_student_has_the_average(digits_test: Dataset) -> None:
    """What is logged is of the weights as they are trained."""
    losses, hashes = [], []
    for decay in (0.0, 0.9):
        student = fresh()
        spec = replace(SPEC, ema_decay=decay)
        losses.append([m.loss for m in fit(spec, digits_test, student, LabelTargets(10))])
        hashes.append(student.content_hash())
    assert losses[0] == losses[1]
    assert hashes[0] != hashes[1]


# --- what it reports ---------------------------------------------------------------------------


def test_agreement_is_the_share_of_the_targets_own_classes() -> None:
    meter = Meter(torch.device("cpu"))
    logits_BC = torch.tensor([[0.0, 2.0, 1.0], [5.0, 2.0, 1.0], [0.0, 2.0, 3.0]])
    dense = Target(torch.tensor([[-1.0, 0, -2], [-1, 0, -2], [-9, -9, 0]]), None, None, 3)
    meter.add(1, torch.tensor(3.0), logits_BC, dense)
    class_ids_BK = torch.tensor([[2, 1], [1, 0], [0, 2]])
    top = Target(torch.tensor([[-1.0, 0], [0, -1], [-1, 0]]), class_ids_BK, None, 3)
    meter.add(2, torch.tensor(1.0), logits_BC, top)
    mine = TemperedTarget(
        torch.tensor([[-1.0, -2], [-2, -1], [-2, -1]]), class_ids_BK, None, 2.0, 3
    )
    meter.add(3, torch.tensor(2.0), logits_BC, mine)
    assert meter.images == 9
    assert meter.state_dict(SINGLE_PROCESS)["sums"].tolist() == pytest.approx(
        [6, 2 / 3 + 2 / 3 + 2 / 3]
    )
    assert meter.pop_means(SINGLE_PROCESS) == pytest.approx((2.0, 2 / 3, 9))
    assert (meter.steps, meter.images) == (0, 0)


@dataclass(frozen=True)
class Recorded:
    """A loss that notes what it gives."""

    losses: list[float]
    name: ClassVar[str] = "recorded"

    def __call__(
        self, logits_BC: torch.Tensor, target: Target | TemperedTarget, batch: Batch
    ) -> torch.Tensor:
        loss = Distillation()(logits_BC, target, batch)
        self.losses.append(loss.item())
        return loss


def test_a_logged_loss_is_the_mean_since_the_last_one(digits_test: Dataset) -> None:
    losses: list[float] = []
    steps = fit(SPEC, digits_test, fresh(), LabelTargets(10), loss=Recorded(losses), log_every=4)
    assert [s.loss for s in steps] == pytest.approx([np.mean(losses[:4]), np.mean(losses[4:])])


# --- the loss --------------------------------------------------------------------------------


def test_a_label_weight_mixes_two_losses(digits_test: Dataset) -> None:
    """0 is the teacher alone and 1 the labels alone, to the bit; between them it is neither."""
    teacher = OnlineTargets(load.load_model(TEACHER, "teacher", num_classes=10, size_px=8))

    def weights(label_weight: float, source: TargetSource) -> str:
        student = fresh()
        fit(replace(SPEC, label_weight=label_weight), digits_test, student, source)
        return student.content_hash()

    assert weights(1, teacher) == weights(0, LabelTargets(10))
    assert len({weights(w, teacher) for w in (0, 0.5, 1)}) == 3


def test_the_labels_share_of_the_loss(
    digits_test: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One step of plain descent goes the weighted mean of the ways that either goes."""
    teacher = OnlineTargets(load.load_model(TEACHER, "teacher", num_classes=10, size_px=8))
    spec = TrainSpec(
        "online",
        SPEC.view_spec,
        epochs=1,
        batch_size=296,
        optimizer="sgd",
        momentum=0.0,
        weight_decay=0.0,
        warmup=0.0,
        lr=1e-3,
        deterministic=True,
    )
    monkeypatch.setattr("kdcache.training.step.GRADIENT_NORM", 1e9)
    start = dict(fresh(spec).named_parameters())
    moved = {}
    for weight in (0.0, 0.25, 1.0):
        student = fresh(spec)
        fit(replace(spec, label_weight=weight), digits_test, student, teacher)
        moved[weight] = (student.network[5].bias - start["network.5.bias"]).detach()
    mean = 0.75 * moved[0.0] + 0.25 * moved[1.0]
    torch.testing.assert_close(moved[0.25], mean, rtol=1e-3, atol=1e-7)


@dataclass(frozen=True)
class ReverseKL:
    """KL(student || target), for dense targets: a loss of a user's own."""

    name: ClassVar[str] = "reverse-kl"

    def __call__(
        self, logits_BC: torch.Tensor, target: Target | TemperedTarget, batch: Batch
    ) -> torch.Tensor:
        assert isinstance(target, Target)
        log_q_BC, log_p_BC = logits_BC.log_softmax(1), target.logits_BK.log_softmax(1)
        return (log_q_BC.exp() * (log_q_BC - log_p_BC)).sum(1).mean()


def test_a_loss_of_a_users_own_trains(digits_test: Dataset) -> None:
    teacher = OnlineTargets(load.load_model(TEACHER, "teacher", num_classes=10, size_px=8))
    spec = replace(SPEC, mode="online", epochs=5)
    student = fresh(spec)
    steps = fit(spec, digits_test, student, teacher, loss=ReverseKL(), log_every=4)
    assert steps[-1].loss < 0.7 * steps[0].loss
    assert steps[-1].agreement > steps[0].agreement


def test_a_mixed_batch_is_of_whole_pairs(digits_test: Dataset) -> None:
    with pytest.raises(UsageError, match="batch size must be even with mixing, not 99"):
        fit(replace(SPEC, batch_size=99), digits_test, fresh(), LabelTargets(10))
    fit(replace(UNMIXED, batch_size=99), digits_test, fresh(), LabelTargets(10))


# --- forms of the arithmetic -----------------------------------------------------------------


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_trains(digits_test: Dataset, precision: Any) -> None:
    spec = replace(UNMIXED, epochs=4, precision=precision)
    student, steps = trained(digits_test, spec)
    assert student.precision == precision
    assert all(w.dtype == torch.float32 for w in student.parameters())
    assert steps[-1].loss < 0.8 * steps[0].loss
    whole, _ = trained(digits_test, replace(spec, precision="float32"))
    assert student.content_hash() != whole.content_hash()


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "soap"])
def test_float16_scales_the_loss_and_skips_a_step_that_overflows(
    digits_test: Dataset, optimizer: Any
) -> None:
    """All of it: the decay of the weights too."""
    if optimizer == "soap":
        pytest.importorskip("pytorch_optimizer")
    student = fresh()
    spec = replace(UNMIXED, epochs=1, precision="float16", optimizer=optimizer)
    state, run = State(spec, student), TrainingRun(spec, digits_test, student, LabelTargets(10))
    assert not State(SPEC, fresh()).scaler.is_enabled()
    scaled = state.state_dict()["scaler"]
    state.scaler.load_state_dict({**scaled, "scale": 1e30})
    start = [w.clone() for w in student.parameters()]
    student.train()
    with open_loader(run, workers=1) as loader:
        batches = iter_batches(loader, spec)
        for _ in range(2):
            train_step(state, student, next(batches), run.targets, run.make_loss(), spec.lr)
    assert all(map(torch.equal, start, student.parameters()))
    assert state.scaler.get_scale() == pytest.approx(1e30 / 4)


@pytest.mark.slow  # the compiler takes its time
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_student_trains_and_keeps_the_names_of_its_weights(digits_test: Dataset) -> None:
    plain, _ = trained(digits_test, UNMIXED)
    student = fresh(UNMIXED)
    student.network.compile()
    fit(UNMIXED, digits_test, student, LabelTargets(10))
    assert student.network.state_dict().keys() == plain.network.state_dict().keys()
    assert evaluate(student, digits_test, size_px=8).top1 > 0.3
