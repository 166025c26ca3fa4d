"""Batch normalisation over the batches of all processes, as one process would do it.

PyTorch's own SyncBatchNorm is for GPUs; on the CPU `SyncedBatchNorm` stands in its place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import distributed, nn
from torch.autograd import Function
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from kdcache.errors import UsageError


def synchronize(network: nn.Module) -> None:
    """Replace every batch normalisation in `network`; parameters, buffers and names stay.

    Raises UsageError for a layer that does more than batch normalisation.
    """
    for name, layer in list(network.named_children()):
        if not isinstance(layer, _BatchNorm):
            synchronize(layer)
        elif type(layer).__module__ != nn.BatchNorm2d.__module__ or layer.running_mean is None:
            raise UsageError(
                f"the layer {name!r} is a {type(layer).__name__}, which is not known to "
                "synchronise: train this student in one process"
            )
        elif layer.running_mean.is_cuda:
            convert = nn.SyncBatchNorm.convert_sync_batchnorm
            setattr(network, name, convert(layer))  # type: ignore[no-untyped-call]
        else:
            setattr(network, name, SyncedBatchNorm(layer))


class SyncedBatchNorm(nn.Module):
    """A batch normalisation whose mean and variance are of the images of all processes."""

    def __init__(self, layer: _BatchNorm) -> None:
        super().__init__()
        self.eps, self.momentum = layer.eps, layer.momentum
        self.weight, self.bias = layer.weight, layer.bias
        for name, buffer in layer.named_buffers():
            self.register_buffer(name, buffer)

    running_mean: torch.Tensor
    running_var: torch.Tensor
    num_batches_tracked: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return functional.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
            )
        dims, shape = [0, *range(2, x.ndim)], [1, -1, *[1] * (x.ndim - 2)]
        count = x.numel() // x.shape[1] * distributed.get_world_size()
        mean_C: torch.Tensor = _Sum.apply(x.sum(dims)) / count
        centred = x - mean_C.view(shape)
        variance_C: torch.Tensor = _Sum.apply(centred.square().sum(dims)) / count
        self._remember(mean_C.detach(), variance_C.detach() * count / (count - 1))
        scale_C = (variance_C + self.eps).rsqrt()
        if self.weight is not None:
            return centred * (scale_C * self.weight).view(shape) + self.bias.view(shape)
        return centred * scale_C.view(shape)

    def _remember(self, mean_C: torch.Tensor, variance_C: torch.Tensor) -> None:
        self.num_batches_tracked.add_(1)
        share = self.momentum or 1.0 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean_C, share)
        self.running_var.lerp_(variance_C, share)


class _Sum(Function):
    """The sum over all processes; so is its gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return _summed(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return _summed(gradient)


def _summed(x: torch.Tensor) -> torch.Tensor:
    x = x.clone(memory_format=torch.contiguous_format)
    distributed.all_reduce(x)
    return x
