"""`train_step`: target, forward, loss, backward, optimizer. Every training step of kdcache is this
one: `loop.train`, `planning` and `recipes` call it. It needs no loader, and so no FFCV."""

from __future__ import annotations

import torch
from torch import nn
from torch.profiler import record_function

from kdcache.batch import Batch, TargetSource
from kdcache.losses.loss import Loss
from kdcache.training.optim import GRADIENT_NORM
from kdcache.training.state import State


def train_step(
    state: State, model: nn.Module, batch: Batch, targets: TargetSource, loss: Loss, lr: float
) -> torch.Tensor:
    """One step of the student; its loss, on the device. No value goes to the host.

    model   the student as it is called: itself, or in `ProcessGroup.data_parallel`
    """
    with record_function("target"):
        target = targets(batch)
    with record_function("forward"):
        logits_BC = model(batch.images_BCHW)
    with record_function("loss"):
        value = loss(logits_BC, target, batch)
    with record_function("backward"):
        # None rather than 0: the backward pass then writes a gradient, and has none to add to.
        state.optimizer.zero_grad(set_to_none=True)
        state.scaler.scale(value).backward()  # type: ignore[no-untyped-call]
    with record_function("optimizer"):
        # The norm is clipped at its true size, not multiplied by the loss scale.
        state.scaler.unscale_(state.optimizer)
        nn.utils.clip_grad_norm_(state.params, GRADIENT_NORM)
        for group in state.optimizer.param_groups:
            # Set at each step, as the rate is a function of the step's number and no state of a
            # scheduler.
            group["lr"] = lr
        state.scaler.step(state.optimizer)
        state.scaler.update()
        state.ema.update()
    state.step += 1
    state.meter.add(state.step, value, logits_BC, target)
    return value.detach()
