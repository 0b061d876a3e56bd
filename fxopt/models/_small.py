"""A small network for demonstrations and tests."""

from __future__ import annotations

import torch
from torch import nn

from fxopt._seeding import seeded
from fxopt.models._blocks import InvertedResidual, conv_norm

__all__ = ["SmallMobileNetV2", "small_mobilenet_v2"]


class SmallMobileNetV2(nn.Module):
    """A MobileNetV2 for small images.

    Args:
        channels: Input channels.
        classes: Number of classes.
        width: Channels of the first stage; the others are multiples of it.
    """

    def __init__(self, channels: int = 1, classes: int = 10, width: int = 16) -> None:
        super().__init__()
        self.stem = conv_norm(channels, width, 3)
        self.blocks = nn.Sequential(
            InvertedResidual(width, width, 1, 3),
            InvertedResidual(width, 2 * width, 2, 3),
            InvertedResidual(2 * width, 2 * width, 1, 3),
            InvertedResidual(2 * width, 3 * width, 2, 3),
            InvertedResidual(3 * width, 3 * width, 1, 3),
        )
        self.head = conv_norm(3 * width, 8 * width, 1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(8 * width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images (batch, channels, height, width) to class scores (batch, classes)."""
        x = self.pool(self.head(self.blocks(self.stem(x))))
        scores: torch.Tensor = self.classifier(torch.flatten(x, 1))
        return scores


def small_mobilenet_v2(seed: int = 0, **options: int) -> SmallMobileNetV2:
    """A :class:`SmallMobileNetV2` with weights drawn from one seed, in eval mode."""
    with seeded(seed):
        model = SmallMobileNetV2(**options)
    model.eval()
    return model
