"""What flows between the parts: `Batch`, `Target`, and the seam `TargetSource`.

Shape legend, used as name suffixes everywhere:

    B  rows of a batch          C  classes
    K  kept classes of a record H, W  height and width in pixels
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray


@dataclass(frozen=True)
class Batch:
    """Rows of one view, in position order.

    images_BCHW     uint8, mixed; on the loader's device, in channels-last memory
    labels_B        int64, the sample's own class
    partners_B      int64, the class of its partner (its own where nothing is mixed)
    weights_B       int16, the partner's weight in 1/256
    positions_B, samples_B   int64 NumPy arrays
    teacher_images_BCHW      what the teacher sees of the same samples, where that is other pixels
    """

    view: int
    positions_B: NDArray[np.int64]
    samples_B: NDArray[np.int64]
    images_BCHW: torch.Tensor
    labels_B: torch.Tensor
    partners_B: torch.Tensor
    weights_B: torch.Tensor
    teacher_images_BCHW: torch.Tensor | None = None

    @property
    def for_teacher(self) -> torch.Tensor:
        """What the teacher sees: uint8 [B, 3, H, W]."""
        return self.images_BCHW if self.teacher_images_BCHW is None else self.teacher_images_BCHW

    def __len__(self) -> int:
        return len(self.positions_B)


@dataclass(frozen=True)
class Target:
    """A target distribution for each row, at any temperature.

    logits_BK    float32, relative to the row's largest, so at most 0
    classes_BK   int64, the classes of these logits; None when K = C, in class order
    tail_B3      float32 summary of the C-K classes that are not named: log-sum-exp at T = 1, mean
                 and variance of their relative logits; None when no mass is left for them
    num_classes  C
    """

    logits_BK: torch.Tensor
    classes_BK: torch.Tensor | None
    tail_B3: torch.Tensor | None
    num_classes: int

    def to(self, device: torch.device) -> Target:
        classes, tail = self.classes_BK, self.tail_B3
        return Target(
            _moved(self.logits_BK, device),
            None if classes is None else _moved(classes, device),
            None if tail is None else _moved(tail, device),
            self.num_classes,
        )


@dataclass(frozen=True)
class TemperedTarget:
    """A target at one temperature, of a user's own making; it need not sum to 1.

    log_p_BK     log-probabilities at `temperature` of the named classes; -inf names none
    classes_BK   uint16, int32 or int64, no class twice in a row
    log_tail_B   log of the mass of all other classes; None when there is none
    num_classes  C
    """

    log_p_BK: torch.Tensor
    classes_BK: torch.Tensor
    log_tail_B: torch.Tensor | None
    temperature: float
    num_classes: int

    def to(self, device: torch.device) -> TemperedTarget:
        tail = self.log_tail_B
        return TemperedTarget(
            _moved(self.log_p_BK, device),
            _moved(self.classes_BK, device),
            None if tail is None else _moved(tail, device),
            self.temperature,
            self.num_classes,
        )


def _moved(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """By way of pinned memory, from which a copy to a GPU does not hold the host up."""
    if device.type == "cuda" and x.device.type == "cpu":
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


class TargetSource(Protocol):
    """Gives the targets of a batch; the training loop does not know which kind it has."""

    def __call__(self, batch: Batch) -> Target | TemperedTarget: ...
