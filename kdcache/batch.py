"""What flows between the parts: `Batch`, `Target`, and the seam `TargetSource`.

Shape legend, used as name suffixes everywhere:

    B  rows of a batch          C  classes
    K  kept classes of a record H, W  height and width in pixels
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray


@dataclass(frozen=True)
class Batch:
    """Rows of one view, in position order.

    view                 its number
    positions_B          int64 NumPy array: places in the view's order
    sample_ids_B         int64 NumPy array: places in the dataset
    images_BCHW          uint8, mixed; on the loader's device, in channels-last memory
    labels_B             int64, the sample's own class
    partner_labels_B     int64, the class of its partner (its own where nothing is mixed)
    mix_weights_B        int16, the partner's weight in 1/256
    teacher_images_BCHW  what the teacher sees of the same samples; None where that is images_BCHW
    """

    view: int
    positions_B: NDArray[np.int64]
    sample_ids_B: NDArray[np.int64]
    images_BCHW: torch.Tensor
    labels_B: torch.Tensor
    partner_labels_B: torch.Tensor
    mix_weights_B: torch.Tensor
    teacher_images_BCHW: torch.Tensor | None = None

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Batch:
        """The batch with its tensors on a device.

        non_blocking   taken because Lightning and accelerate give it; a copy out of pinned memory
                       to a GPU never blocks
        """
        tensors = {n: x for n, x in vars(self).items() if isinstance(x, torch.Tensor)}
        moved: dict[str, Any] = {name: move(x, device) for name, x in tensors.items()}
        return replace(self, **moved)

    @property
    def for_teacher(self) -> torch.Tensor:
        """What the teacher sees: uint8 [B, 3, H, W]."""
        return self.images_BCHW if self.teacher_images_BCHW is None else self.teacher_images_BCHW

    def __len__(self) -> int:
        return len(self.positions_B)


@dataclass(frozen=True)
class Target:
    """A target distribution for each row, at any temperature.

    logits_BK     float32, relative to the row's largest, so at most 0
    class_ids_BK  int64, the classes of these logits; None where K = C, in class order
    tail_B3       float32, of the C - K classes that are not named: log-sum-exp at T = 1, mean and
                  variance of their relative logits; None where no mass is left for them
    num_classes   C
    """

    logits_BK: torch.Tensor
    class_ids_BK: torch.Tensor | None
    tail_B3: torch.Tensor | None
    num_classes: int

    def top_class(self) -> torch.Tensor:
        """The class of the largest logit [B], int64."""
        return _top_class(self.logits_BK, self.class_ids_BK)

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Target:
        """The target with its tensors on a device; `non_blocking` is as in `Batch.to`."""
        classes, tail = self.class_ids_BK, self.tail_B3
        return Target(
            move(self.logits_BK, device),
            None if classes is None else move(classes, device),
            None if tail is None else move(tail, device),
            self.num_classes,
        )


@dataclass(frozen=True)
class TemperedTarget:
    """A target at one temperature; it need not sum to 1.

    log_p_BK      log-probabilities at `temperature` of the named classes; -inf names none
    class_ids_BK  uint16, int32 or int64, no class twice in a row
    log_tail_B    log of the mass of all other classes; None where there is none
    temperature   T
    num_classes   C
    """

    log_p_BK: torch.Tensor
    class_ids_BK: torch.Tensor
    log_tail_B: torch.Tensor | None
    temperature: float
    num_classes: int

    def top_class(self) -> torch.Tensor:
        """The class of the largest probability [B], int64."""
        return _top_class(self.log_p_BK, self.class_ids_BK)

    def to(self, device: torch.device | str, non_blocking: bool = True) -> TemperedTarget:
        """The target with its tensors on a device; `non_blocking` is as in `Batch.to`."""
        tail = self.log_tail_B
        return TemperedTarget(
            move(self.log_p_BK, device),
            move(self.class_ids_BK, device),
            None if tail is None else move(tail, device),
            self.temperature,
            self.num_classes,
        )


def dense_target(logits_BC: torch.Tensor) -> Target:
    """The target of live teacher logits [B, C]: what a dense float32 record of them decodes to."""
    z = logits_BC.float()
    return Target(z - z.amax(1, keepdim=True), None, None, z.shape[1])


def _top_class(values_BK: torch.Tensor, class_ids_BK: torch.Tensor | None) -> torch.Tensor:
    column_B = values_BK.argmax(1)
    if class_ids_BK is None:
        return column_B
    return class_ids_BK.gather(1, column_B[:, None])[:, 0].long()


def move(x: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """By way of pinned memory, from which a copy to a GPU does not hold the host up."""
    if torch.device(device).type == "cuda" and x.device.type == "cpu":
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


class TargetSource(Protocol):
    """Gives the targets of a batch; the training loop does not know which kind it has."""

    def __call__(self, batch: Batch) -> Target | TemperedTarget: ...
