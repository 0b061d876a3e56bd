"""MobileNetV1 and ResNets."""

from __future__ import annotations

import torch
from torch import nn

from fxopt.models._blocks import BasicBlock, Bottleneck, DepthwiseSeparable, conv_norm, divisible

__all__ = ["MobileNetV1", "ResNet"]

_V1_STAGES = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *((512, 1),) * 5, (1024, 2), (1024, 1))


class MobileNetV1(nn.Module):
    """Depthwise separable convolutions one after the other (Howard et al. 2017, table 1).

    Args:
        width: Factor of all channels, which are rounded to multiples of 8.
        classes: Number of classes.
        channels: Input channels.
    """

    def __init__(self, width: float = 1.0, classes: int = 1000, channels: int = 3) -> None:
        super().__init__()
        found = divisible(32 * width)
        self.stem = conv_norm(channels, found, 3, 2, activation=nn.ReLU)
        blocks = []
        for outputs, stride in _V1_STAGES:
            blocks.append(DepthwiseSeparable(found, divisible(outputs * width), stride))
            found = divisible(outputs * width)
        self.blocks = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(found, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images (batch, channels, height, width) to class scores (batch, classes)."""
        scores: torch.Tensor = self.classifier(torch.flatten(self.pool(self.blocks(self.stem(x))), 1))
        return scores


class ResNet(nn.Module):
    """Residual blocks in four stages (He et al. 2016, table 1); the stride of a bottleneck is in its 3 x 3 convolution.

    Args:
        block: :class:`BasicBlock` or :class:`Bottleneck`.
        counts: Blocks of each stage.
        classes: Number of classes.
        channels: Input channels.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        counts: tuple[int, int, int, int],
        classes: int = 1000,
        channels: int = 3,
    ) -> None:
        super().__init__()
        self.stem = conv_norm(channels, 64, 7, 2, activation=nn.ReLU)
        self.stem_pool = nn.MaxPool2d(3, 2, 1)
        width, blocks = 64, []
        for stage, count in enumerate(counts):
            outputs = 64 * 2**stage * (4 if block is Bottleneck else 1)
            for number in range(count):
                blocks.append(block(width, outputs, 2 if stage > 0 and number == 0 else 1))
                width = outputs
        self.blocks = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images (batch, channels, height, width) to class scores (batch, classes)."""
        x = self.pool(self.blocks(self.stem_pool(self.stem(x))))
        scores: torch.Tensor = self.classifier(torch.flatten(x, 1))
        return scores
