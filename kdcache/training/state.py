"""`State`: all that a training step changes, and `Meter`: sums for the log."""

from __future__ import annotations

import math
from typing import Any

import torch

from kdcache.batch import Target, TemperedTarget
from kdcache.errors import NonFinite
from kdcache.models.classifier import Classifier
from kdcache.training.distributed import SINGLE_PROCESS, ProcessGroup
from kdcache.training.ema import EMA
from kdcache.training.optim import make_optimizer
from kdcache.training.spec import TrainSpec


class State:
    """The student, its optimizer, loss scale and moving average, the number of steps made, and the
    sums since the last log line. `state_dict` and `load_state_dict` save and restore all of it."""

    def __init__(self, spec: TrainSpec, student: Classifier) -> None:
        student.precision = spec.precision
        self.student = student
        self.params = list(student.parameters())
        self.optimizer = make_optimizer(student, spec)
        device = student.device
        # Only float16 has so small a range that gradients vanish without a scaled loss.
        self.scaler = torch.amp.GradScaler(device.type, enabled=spec.precision == "float16")
        self.ema = EMA(student, spec.ema_decay)
        self.step = 0
        self.meter = Meter(device)

    def state_dict(self, process_group: ProcessGroup = SINGLE_PROCESS) -> dict[str, Any]:
        """Equal in every process; all processes must call it."""
        return {
            "step": self.step,
            "student": dict(self.student.network.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            # The name of the moving average since version 1.
            "average": self.ema.state_dict(),
            "meter": self.meter.state_dict(process_group),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.student.network.load_state_dict(state["student"])
        self.optimizer.load_state_dict(state["optimizer"])
        _restore_strides(self.optimizer)
        self.scaler.load_state_dict(state["scaler"])
        self.ema.load_state_dict(state["average"])
        self.meter.load_state_dict(state["meter"])

    def require_finite(self, process_group: ProcessGroup) -> None:
        """Raise NonFinite where a loss since the last log line, or a weight, is not finite."""
        self.meter.require_finite(process_group)
        # One transfer to the host, not one for each weight.
        if not bool(torch.stack([w.isfinite().all() for w in self.params]).all()):
            raise NonFinite(f"step {self.step} made a weight NaN or infinite: lower --lr")


def _restore_strides(optimizer: torch.optim.Optimizer) -> None:
    """Lay the optimizer's tensors out in memory as their weights: fused optimizers require it, and
    a checkpoint holds contiguous tensors."""
    for weight, values in optimizer.state.items():
        for name, value in values.items():
            if isinstance(value, torch.Tensor) and value.shape == weight.shape:
                values[name] = torch.empty_like(weight, dtype=value.dtype).copy_(value)


class Meter:
    """Sums since the last log line, on the student's device."""

    def __init__(self, device: torch.device) -> None:
        # On the device and in float64: a step transfers no value, and a run may log after many
        # steps.
        self._sums = torch.zeros(2, dtype=torch.float64, device=device)
        # The first step whose loss is not finite; infinity while there is none.
        self._first_bad_step = torch.full((), torch.inf, dtype=torch.float64, device=device)
        self.steps = self.images = 0

    def add(
        self,
        step: int,
        loss: torch.Tensor,
        logits_BC: torch.Tensor,
        target: Target | TemperedTarget,
    ) -> None:
        loss = loss.detach()
        agreed_B = logits_BC.detach().argmax(1) == target.top_class()
        self._sums += torch.stack([loss.double(), agreed_B.double().mean()])
        bad = self._first_bad_step
        # Decided on the device, so that the host waits for no step, and still the error names the
        # step.
        self._first_bad_step = torch.where(loss.isfinite(), bad, bad.clamp(max=step))
        self.steps += 1
        self.images += len(logits_BC)

    def pop_means(self, process_group: ProcessGroup) -> tuple[float, float, int]:
        """Mean loss and mean agreement, and the number of images, of all processes since the last
        call."""
        sums = process_group.all_reduce_sum(self._sums)
        loss, agreement = (sums / (self.steps * process_group.size)).tolist()
        images = self.images * process_group.size
        self._sums.zero_()
        self.steps = self.images = 0
        return loss, agreement, images

    def require_finite(self, process_group: ProcessGroup) -> None:
        step = float(process_group.all_reduce_min(self._first_bad_step.clone()))
        if step < math.inf:
            raise NonFinite(
                f"the loss is not finite at step {step:.0f}: lower --lr or raise --warmup"
            )

    def state_dict(self, process_group: ProcessGroup) -> dict[str, Any]:
        # The mean of all processes, as the main process alone writes it. A clone: the sums go on.
        sums = process_group.all_reduce_sum(self._sums.clone()) / process_group.size
        return {"sums": sums, "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._sums.copy_(state["sums"])
        self.steps = state["steps"]
