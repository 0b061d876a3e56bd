"""Small networks for demonstrations, tests and benchmarks."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["InvertedResidual", "SmallMobileNetV2", "small_mobilenet_v2"]


def _conv_norm(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU6(inplace=True))


class InvertedResidual(nn.Module):
    """Expand, filter by depth, project (Sandler et al. 2018, figure 3), with a shortcut where shapes allow.

    Args:
        inputs: Input channels.
        outputs: Output channels.
        stride: Stride of the depthwise convolution.
        expansion: Ratio of the expanded channels to the input channels.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = inputs * expansion
        self.expand = _conv_norm(inputs, wide, 1)
        self.depthwise = _conv_norm(wide, wide, 3, stride, groups=wide)
        self.project = nn.Sequential(nn.Conv2d(wide, outputs, 1, bias=False), nn.BatchNorm2d(outputs))
        self.shortcut = stride == 1 and inputs == outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (batch, inputs, height, width) to (batch, outputs, height / stride, width / stride)."""
        y: torch.Tensor = self.project(self.depthwise(self.expand(x)))
        return x + y if self.shortcut else y


class SmallMobileNetV2(nn.Module):
    """A MobileNetV2 for small images.

    Args:
        channels: Input channels.
        classes: Number of classes.
        width: Channels of the first stage; the others are multiples of it.
    """

    def __init__(self, channels: int = 1, classes: int = 10, width: int = 16) -> None:
        super().__init__()
        self.stem = _conv_norm(channels, width, 3)
        self.blocks = nn.Sequential(
            InvertedResidual(width, width, 1, 3),
            InvertedResidual(width, 2 * width, 2, 3),
            InvertedResidual(2 * width, 2 * width, 1, 3),
            InvertedResidual(2 * width, 3 * width, 2, 3),
            InvertedResidual(3 * width, 3 * width, 1, 3),
        )
        self.head = _conv_norm(3 * width, 8 * width, 1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(8 * width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images (batch, channels, height, width) to class scores (batch, classes)."""
        x = self.pool(self.head(self.blocks(self.stem(x))))
        scores: torch.Tensor = self.classifier(torch.flatten(x, 1))
        return scores


def small_mobilenet_v2(seed: int = 0, **options: int) -> SmallMobileNetV2:
    """A :class:`SmallMobileNetV2` with weights drawn from one seed, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SmallMobileNetV2(**options)
    model.eval()
    return model
