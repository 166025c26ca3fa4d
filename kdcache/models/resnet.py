"""`kdcache:small`, `medium` and `large`: residual networks for images of 28 to 64 pixels.

Pre-activation ResNets (He et al. 2016, "Identity mappings") with three stages, each half as wide
in pixels and twice as deep in channels as the one before; the first convolution already halves
the image, because at these sizes a full-resolution stage costs most and adds least.
"""

from __future__ import annotations

import torch
from torch import nn

SIZES = {"small": (16, 1), "medium": (32, 1), "large": (64, 2)}


class Block(nn.Module):
    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        same = stride == 1 and channels_in == channels
        self.skip = None if same else nn.Conv2d(channels_in, channels, 1, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.norm1(x))
        skip = x if self.skip is None else self.skip(y)
        y = self.conv1(y)
        out: torch.Tensor = skip + self.conv2(torch.relu(self.norm2(y)))
        return out


class SmallResNet(nn.Module):
    """Images [B, 3, H, W] to logits [B, C]."""

    def __init__(self, width: int, depth: int, num_classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, 2, 1, bias=False)
        blocks, channels = [], width
        for stage in range(3):
            for i in range(depth):
                stride = 2 if i == 0 and stage > 0 else 1
                blocks.append(Block(channels, width << stage, stride))
                channels = width << stage
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.BatchNorm2d(channels)
        self.head = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.blocks(self.stem(x))))
        out: torch.Tensor = self.head(x.mean((2, 3)))
        return out


def build(name: str, num_classes: int) -> SmallResNet:
    """The network called `name`. Raises KeyError for another name."""
    width, depth = SIZES[name]
    return SmallResNet(width, depth, num_classes)
