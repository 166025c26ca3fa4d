"""An exponential moving average (EMA) of a network's parameters.

The decay of update n is min(decay, (1 + n) / (10 + n)), so that the initial weights soon have no
influence (as in TensorFlow's tf.train.ExponentialMovingAverage). Buffers, such as the statistics of
batch normalisation, are averages already and are not averaged again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class EMA:
    """The moving average of the parameters of `network`; with decay 0 it holds none."""

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self._params = [w.detach() for w in network.parameters()] if decay else []
        self._averages = [w.clone() for w in self._params]

    def update(self) -> None:
        """Call it after each step; no value goes to the host."""
        if self._params:
            self.updates += 1
            decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
            torch._foreach_lerp_(self._averages, self._params, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within, the network has the averaged parameters."""
        trained = [w.clone() for w in self._params]
        _copy(self._params, self._averages)
        try:
            yield
        finally:
            _copy(self._params, trained)

    def copy_to_network(self) -> None:
        """The network has the averaged parameters from now on."""
        _copy(self._params, self._averages)

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "weights": self._averages}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates = state["updates"]
        _copy(self._averages, state["weights"])


def _copy(to: list[torch.Tensor], values: list[torch.Tensor]) -> None:
    with torch.no_grad():
        for tensor, value in zip(to, values, strict=True):
            tensor.copy_(value)
