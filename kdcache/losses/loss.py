"""The seam `Loss`: what training minimises, `(logits, target, batch) -> scalar`.

    loss = Distillation(temperature=2.0, label_weight=0.1)
    loss(student(batch.images_BCHW), target, batch).backward()

A loss is a frozen dataclass that is its own metadata: its name and its fields are part of what a
run is. To add one, write such a class and put it into `LOSSES`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch

from kdcache.batch import Batch, Target, TemperedTarget
from kdcache.errors import UsageError
from kdcache.kernels.problem import Tail
from kdcache.losses.distillation import TAILS, check_temperature, distillation_loss
from kdcache.losses.labels import label_target
from kdcache.spec import require, require_known_fields, spec_to_json


class Loss(Protocol):
    """What training minimises.

    A call gets the student's logits [B, C] with their gradient, the target of the batch and the
    batch itself, for its labels. It gives one number on the logits' device, the mean over the rows,
    and transfers no value to the host.
    """

    name: ClassVar[str]

    def __call__(
        self, logits_BC: torch.Tensor, target: Target | TemperedTarget, batch: Batch
    ) -> torch.Tensor: ...


@dataclass(frozen=True)
class Distillation:
    """(1 - w) T^2 KL(target || student at T) + w CE(labels mixed as the pixels, student at 1).

    temperature   T
    tail          what is assumed of the classes that a target does not name
                  (`losses.distillation.distillation_loss`)
    label_weight  w
    """

    temperature: float = 1.0
    tail: Tail = "bucket"
    label_weight: float = 0.0
    name: ClassVar[str] = "distillation"

    def __post_init__(self) -> None:
        check_temperature(self.temperature, sparse=False)
        require(self.tail in TAILS, "tail", f"one of {', '.join(TAILS)}", self.tail)
        require(0 <= self.label_weight <= 1, "label weight", "in [0, 1]", self.label_weight)

    def __call__(
        self, logits_BC: torch.Tensor, target: Target | TemperedTarget, batch: Batch
    ) -> torch.Tensor:
        """Raises UsageError where target and logits do not fit, as `distillation_loss` does."""
        loss = distillation_loss(logits_BC, target, temperature=self.temperature, tail=self.tail)
        if self.label_weight:
            labels = label_target(batch, logits_BC.shape[1])
            # Two calls of the fused loss: the labels are mixed as the pixels, so they are a target
            # with up to two classes.
            loss = torch.lerp(loss, distillation_loss(logits_BC, labels), self.label_weight)
        return loss


LOSSES: dict[str, type[Any]] = {loss.name: loss for loss in (Distillation,)}


def loss_to_json(loss: Loss) -> dict[str, Any]:
    """Raises UsageError for a loss that `LOSSES` lacks: nothing could read the JSON."""
    if LOSSES.get(loss.name) is not type(loss):
        raise UsageError(
            f"the loss {loss.name!r} is not in kdcache.losses.loss.LOSSES: add its class there"
        )
    return {"name": loss.name, **spec_to_json(loss)}


def loss_from_json(value: Mapping[str, Any]) -> Loss:
    """Raises UsageError for a name that `LOSSES` lacks, or parameters that its loss lacks."""
    parameters = dict(value)
    name = parameters.pop("name")
    if name not in LOSSES:
        raise UsageError(
            f"unknown loss {name!r}, known are {', '.join(LOSSES)}: install the kdcache that wrote "
            "it, or import the module that adds it to kdcache.losses.loss.LOSSES"
        )
    require_known_fields(LOSSES[name], parameters, f"the loss {name!r}")
    loss: Loss = LOSSES[name](**parameters)
    return loss
