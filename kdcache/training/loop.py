"""The student's training loop, visible in one place.

In: a `TrainSpec`, a dataset, a student, a `TargetSource`. Out: the student, trained in place. What
stays true: epoch e plays view e mod V; the loop does not know where targets come from; a step is a
function of the state before it and of its number, so a run that goes on from a saved state ends as
one that was never stopped, with `deterministic` to the bit; processes share each batch out, and
make of it what one would, to rounding. Values go to the host at logged steps only.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.profiler import record_function

from kdcache.batch import Batch, Target, TargetSource, TemperedTarget
from kdcache.data.beton import Dataset
from kdcache.data.loader import Loader
from kdcache.errors import NonFinite, UsageError
from kdcache.losses.distillation import check_temperature, distillation_loss
from kdcache.models.classifier import Classifier
from kdcache.training.distributed import SINGLE_PROCESS, World
from kdcache.training.ema import EMA
from kdcache.training.optim import GRADIENT_NORM, learning_rate, make_optimizer
from kdcache.training.spec import TrainSpec
from kdcache.views.philox import Purpose, draw

LOG_EVERY_STEPS = 50


@dataclass(frozen=True)
class Step:
    """What is known after a logged step.

    loss, agreement   means over the steps since the last one: of the loss, and of the share of
                      images for which the student's class is the target's
    lr                of this step; rate: images per second of all processes, since the last one
    """

    step: int
    steps: int
    epoch: int
    loss: float
    agreement: float
    lr: float
    rate: float


def set_determinism(spec: TrainSpec) -> None:
    """Seed torch; with `deterministic` also one thread and deterministic algorithms."""
    torch.manual_seed(spec.seed)
    if spec.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.set_num_threads(1)


class State:
    """All that a step changes. `state_dict` and `load_state_dict` take it elsewhere and back."""

    def __init__(self, spec: TrainSpec, student: Classifier) -> None:
        student.precision = spec.precision
        self.student = student
        self.optimizer = make_optimizer(student, spec)
        device = student.device
        self.scaler = torch.amp.GradScaler(device.type, enabled=spec.precision == "float16")
        self.ema = EMA(student, spec.ema_decay)
        self.step = 0
        self.meter = Meter(device)

    def state_dict(self, world: World = SINGLE_PROCESS) -> dict[str, Any]:
        """The same in every process; all must ask for it."""
        return {
            "step": self.step,
            "student": dict(self.student.network.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "average": self.ema.state_dict(),
            "meter": self.meter.state_dict(world),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.student.network.load_state_dict(state["student"])
        self.optimizer.load_state_dict(state["optimizer"])
        _laid_as_weights(self.optimizer)
        self.scaler.load_state_dict(state["scaler"])
        self.ema.load_state_dict(state["average"])
        self.meter.load_state_dict(state["meter"])

    def require_finite(self, world: World) -> None:
        """Raise NonFinite where a loss since the last logged step, or a weight, is not finite."""
        self.meter.require_finite(world)
        weights = [w.isfinite().all() for w in self.student.parameters()]
        if not bool(torch.stack(weights).all()):
            raise NonFinite(f"step {self.step} made a weight NaN or infinite: lower --lr")


def _laid_as_weights(optimizer: torch.optim.Optimizer) -> None:
    """What the optimizer keeps of a weight lies in memory as the weight does: fused ones need it,
    and a file does not say it."""
    for weight, kept in optimizer.state.items():
        for name, value in kept.items():
            if isinstance(value, torch.Tensor) and value.shape == weight.shape:
                kept[name] = torch.empty_like(weight, dtype=value.dtype).copy_(value)


class Meter:
    """Sums since the last logged step, on the device of the student."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(2, dtype=torch.float64, device=device)
        # The first step whose loss is not finite; infinity while there is none.
        self._bad = torch.full((), torch.inf, dtype=torch.float64, device=device)
        self.steps = self.images = 0

    def add(
        self,
        step: int,
        loss: torch.Tensor,
        logits_BC: torch.Tensor,
        target: Target | TemperedTarget,
    ) -> None:
        loss = loss.detach()
        agreed = logits_BC.detach().argmax(1) == _first_class(target)
        self._sums += torch.stack([loss.double(), agreed.double().mean()])
        self._bad = torch.where(loss.isfinite(), self._bad, self._bad.clamp(max=step))
        self.steps += 1
        self.images += len(logits_BC)

    def means(self, world: World) -> tuple[float, float]:
        """Of the loss and of the agreement, over all processes; and starts anew."""
        loss, agreement = (world.total(self._sums) / (self.steps * world.count)).tolist()
        self._sums.zero_()
        self.steps = self.images = 0
        return loss, agreement

    def require_finite(self, world: World) -> None:
        step = float(world.least(self._bad.clone()))
        if step < math.inf:
            raise NonFinite(
                f"the loss is not finite at step {step:.0f}: lower --lr or raise --warmup"
            )

    def state_dict(self, world: World) -> dict[str, Any]:
        return {"sums": world.total(self._sums.clone()) / world.count, "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._sums.copy_(state["sums"])
        self.steps = state["steps"]


def _first_class(target: Target | TemperedTarget) -> torch.Tensor:
    """The likeliest class of each row [B]."""
    known = target.logits_BK if isinstance(target, Target) else target.log_p_BK
    column_B = known.argmax(1)
    if target.class_ids_BK is None:
        return column_B
    return target.class_ids_BK.gather(1, column_B[:, None])[:, 0].long()


def num_steps(spec: TrainSpec, dataset: Dataset) -> tuple[int, int]:
    """Batches of an epoch, and steps of the run. The last samples, which fill no batch, are left
    out. Raises UsageError where there is no batch."""
    batches = len(dataset) // spec.batch_size
    if batches == 0:
        raise UsageError(
            f"batch size {spec.batch_size} is more than the {len(dataset)} samples of the data"
        )
    return batches, batches * spec.epochs


def train(
    spec: TrainSpec,
    dataset: Dataset,
    student: Classifier,
    targets: TargetSource,
    *,
    labels: TargetSource | None = None,
    state: State | None = None,
    world: World = SINGLE_PROCESS,
    workers: int | None = None,
    log_every: int = LOG_EVERY_STEPS,
    on_step: Callable[[Step], None] = lambda step: None,
    after_step: Callable[[State], None] = lambda state: None,
) -> State:
    """Train the student in place.

    labels      what `label_weight` weighs
    state       of a run that goes on; else it starts
    on_step     is called in every process at every `log_every`-th step
    after_step  is called after every step; what it raises ends the training

    Raises NonFinite when the loss or a weight is NaN or infinite, and what loader and targets
    raise.
    """
    check_temperature(spec.temperature, sparse=False)
    if spec.label_weight and labels is None:
        raise UsageError("a label weight needs labels")
    world.require_shares(spec)
    batches, steps = num_steps(spec, dataset)
    state = state or State(spec, student)
    optimizer, scaler, meter = state.optimizer, state.scaler, state.meter
    parallel = world.parallel(student)
    weights = list(student.parameters())
    student.train()
    since = time.perf_counter()
    with Loader(
        dataset,
        spec.view_spec,
        spec.batch_size // world.count,
        teacher_view_spec=None if spec.num_averaged_views else spec.teacher_view_spec,
        workers=workers,
        device=student.device,
    ) as loader:
        for epoch in range(state.step // batches, spec.epochs):
            view = epoch % spec.num_views if spec.num_views else epoch
            left = range(state.step % batches, batches)
            played = loader.batches(view, world.share(left, spec.batch_size))
            for seed, batch in zip(_seeds(spec, world, epoch, left), _loads(played), strict=True):
                _seed(seed, student.device)
                with record_function("target"):
                    target = targets(batch)
                with record_function("forward"):
                    logits = parallel(batch.images_BCHW)
                with record_function("loss"):
                    loss = distillation_loss(logits, target, temperature=spec.temperature)
                    if labels is not None and spec.label_weight:
                        loss = torch.lerp(
                            loss, distillation_loss(logits, labels(batch)), spec.label_weight
                        )
                with record_function("backward"):
                    optimizer.zero_grad(set_to_none=True)
                    scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
                with record_function("optimizer"):
                    scaler.unscale_(optimizer)
                    nn.utils.clip_grad_norm_(weights, GRADIENT_NORM)
                    rate = learning_rate(spec, state.step, steps)
                    for group in optimizer.param_groups:
                        group["lr"] = rate
                    scaler.step(optimizer)
                    scaler.update()
                    state.ema.update()
                state.step += 1
                meter.add(state.step, loss, logits, target)
                if state.step % log_every == 0 or state.step == steps:
                    meter.require_finite(world)
                    now, images = time.perf_counter(), meter.images * world.count
                    loss_mean, agreement = meter.means(world)
                    on_step(
                        Step(
                            state.step,
                            steps,
                            epoch,
                            loss_mean,
                            agreement,
                            rate,
                            images / (now - since),
                        )
                    )
                    since = now
                after_step(state)
    state.require_finite(world)
    return state


def _loads(batches: Iterator[Batch]) -> Iterator[Batch]:
    """The batches, and a name for the time that it takes to get them."""
    while True:
        with record_function("load"):
            batch = next(batches, None)
        if batch is None:
            return
        yield batch


def _seed(seed: int, device: torch.device) -> None:
    # torch.manual_seed would do it for every device, and keep a stack trace where there is none.
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def _seeds(spec: TrainSpec, world: World, epoch: int, batches: range) -> list[int]:
    """What dropout and the like draw from, for each of these batches of an epoch."""
    low, high, _, _ = draw(spec.seed, epoch, list(batches), Purpose.STEP, attempt=world.rank)
    return [int(a) | int(b) << 32 for a, b in zip(low, high, strict=True)]
