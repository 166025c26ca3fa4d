"""An exponential moving average of a network's parameters.

The decay of update n is min(decay, (1 + n) / (10 + n)), so that the first weights are soon
forgotten (as in TensorFlow's tf.train.ExponentialMovingAverage). Buffers, such as the statistics
of batch normalisation, are averages already and are taken as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class EMA:
    """The moving average of the parameters of `network`; decay 0 keeps none."""

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self._live = [w.detach() for w in network.parameters()] if decay else []
        self._kept = [w.clone() for w in self._live]

    def update(self) -> None:
        """To be called after each step; no value goes to the host."""
        if self._live:
            self.updates += 1
            decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
            torch._foreach_lerp_(self._kept, self._live, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within, the network has the averaged weights."""
        own = [w.clone() for w in self._live]
        _copy(self._live, self._kept)
        try:
            yield
        finally:
            _copy(self._live, own)

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "weights": self._kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates = state["updates"]
        _copy(self._kept, state["weights"])


def _copy(to: list[torch.Tensor], new: list[torch.Tensor]) -> None:
    with torch.no_grad():
        for tensor, value in zip(to, new, strict=True):
            tensor.copy_(value)
