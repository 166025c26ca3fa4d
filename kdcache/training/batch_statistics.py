"""Statistics of batch normalisation for weights that no step has used.

In: a network and images. Out: the same network, whose layers of batch normalisation have the mean
and the variance of what these images give them. An average of weights has other activations than
any of the weights that it is of, so what training has gathered fits it badly (Izmailov et al. 2018,
arXiv 1803.05407, section 3.2).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from kdcache.training.sync_batchnorm import SyncedBatchNorm


def _layers(network: nn.Module) -> list[_BatchNorm | SyncedBatchNorm]:
    found = (x for x in network.modules() if isinstance(x, _BatchNorm | SyncedBatchNorm))
    return [x for x in found if x.running_mean is not None]


@torch.no_grad()
def estimate(network: nn.Module, batches: Iterable[torch.Tensor]) -> None:
    """Set the statistics to the mean over these batches of images, as the network takes them.

    All else is as at evaluation: what dropout draws would change the variance.
    """
    layers, was_training = _layers(network), network.training
    if not layers:
        return
    momenta = [layer.momentum for layer in layers]
    network.eval()
    for layer in layers:
        layer.num_batches_tracked.zero_()  # type: ignore[union-attr]
        # The mean of all batches, each with the same weight: the first one replaces what is there.
        layer.momentum = None
        layer.train()
    try:
        for images_BCHW in batches:
            network(images_BCHW)
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
        network.train(was_training)


@contextmanager
def kept(network: nn.Module) -> Iterator[None]:
    """At the end the network has the statistics that it has now."""
    names = ("running_mean", "running_var", "num_batches_tracked")
    buffers = [getattr(layer, name) for layer in _layers(network) for name in names]
    values = [x.clone() for x in buffers]
    try:
        yield
    finally:
        for buffer, value in zip(buffers, values, strict=True):
            buffer.copy_(value)
