"""Batch normalisation over the batches of all processes, as one process would do it.

In: a network. Out: the same network, whose layers of batch normalisation see the whole batch. What
stays true: names, parameters and buffers are the network's own; all processes have equal shares of
a batch. Cost: two sums over the processes in the forward pass, two in the backward pass.

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

# By name, as timm is optional: batch normalisation, and then its children (dropout, activation).
TIMMS = ("timm.layers.norm_act", "BatchNormAct2d")


def synchronize(network: nn.Module) -> None:
    """Replace every batch normalisation in `network`.

    Raises UsageError for a layer that does more than batch normalisation, but for timm's.
    """
    for name, layer in list(network.named_children()):
        if not isinstance(layer, _BatchNorm):
            synchronize(layer)
            continue
        kind = type(layer)
        known = kind.__module__ == nn.BatchNorm2d.__module__
        if not known and (kind.__module__, kind.__name__) != TIMMS:
            raise UsageError(
                f"the layer {name!r} is a {kind.__name__}, which is not known to synchronise: "
                "train this student in one process"
            )
        if layer.running_mean is None:
            raise UsageError(
                f"the layer {name!r} is a {kind.__name__} that keeps no statistics, so what it "
                "gives depends on the batch at evaluation too: train this student in one process"
            )
        setattr(network, name, _native(layer) if layer.running_mean.is_cuda else _own(layer))


def _own(layer: _BatchNorm) -> nn.Module:
    return SyncedBatchNorm(layer)


def _native(layer: _BatchNorm) -> nn.Module:
    convert = nn.SyncBatchNorm.convert_sync_batchnorm
    native: nn.Module = convert(layer)  # type: ignore[no-untyped-call]
    # `convert_sync_batchnorm` keeps timm's children (dropout, activation) and does not run them.
    if list(native.children()):
        native.register_forward_hook(lambda layer, inputs, output: _through(layer, output))
    return native


def _through(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What the children of a layer make of x, one after the other."""
    for child in layer.children():
        x = child(x)
    return x


class SyncedBatchNorm(nn.Module):
    """A batch normalisation whose mean and variance are of the images of all processes.

    Inputs [N, C] or [N, C, ...] of any float type; sums are float32 at least. The children of the
    layer that it replaces come after the normalisation.
    """

    def __init__(self, layer: _BatchNorm) -> None:
        super().__init__()
        self.eps, self.momentum = layer.eps, layer.momentum
        for name, parameter in (("weight", layer.weight), ("bias", layer.bias)):
            self.register_parameter(name, parameter)
        for name, buffer in layer.named_buffers(recurse=False):
            self.register_buffer(name, buffer)
        for name, child in layer.named_children():
            self.add_module(name, child)
        self.train(layer.training)

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    running_mean: torch.Tensor
    running_var: torch.Tensor
    num_batches_tracked: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            return _through(self, self._normalised(x))
        return _through(
            self,
            functional.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
            ),
        )

    def _normalised(self, x: torch.Tensor) -> torch.Tensor:
        dtype = x.dtype
        x = x.to(torch.promote_types(dtype, torch.float32))
        dims, shape = [0, *range(2, x.ndim)], [1, -1, *[1] * (x.ndim - 2)]
        count = x.numel() // x.shape[1] * distributed.get_world_size()
        # The mean first: E[x^2] - E[x]^2 cancels where the mean is large.
        mean_C: torch.Tensor = _Sum.apply(x.sum(dims)) / count
        centred = x - mean_C.view(shape)
        variance_C: torch.Tensor = _Sum.apply(centred.square().sum(dims)) / count
        # The running variance is the unbiased one, as in PyTorch's layers.
        self._remember(mean_C.detach(), variance_C.detach() * count / (count - 1))
        scale_C = (variance_C + self.eps).rsqrt()
        if self.weight is not None:
            scale_C = scale_C * self.weight
        y = centred * scale_C.view(shape)
        if self.bias is not None:
            y = y + self.bias.view(shape)
        return y.to(dtype)

    def _remember(self, mean_C: torch.Tensor, variance_C: torch.Tensor) -> None:
        self.num_batches_tracked.add_(1)
        # A momentum of None means a cumulative average, as in torch.
        share = self.momentum
        if share is None:
            share = 1 / float(self.num_batches_tracked)
        dtype = self.running_mean.dtype
        self.running_mean.lerp_(mean_C.to(dtype), share)
        self.running_var.lerp_(variance_C.to(dtype), share)


class _Sum(Function):
    """The sum over all processes; so is its gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return _summed(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return _summed(gradient)


def _summed(x: torch.Tensor) -> torch.Tensor:
    # all_reduce works in place, and on contiguous memory.
    x = x.clone(memory_format=torch.contiguous_format)
    distributed.all_reduce(x)
    return x
