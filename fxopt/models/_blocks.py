"""What networks are built of."""

from __future__ import annotations

import torch
from torch import nn

__all__ = [
    "BasicBlock",
    "Bottleneck",
    "DepthwiseSeparable",
    "InvertedResidual",
    "SqueezeExcite",
    "conv_norm",
    "divisible",
]


def conv_norm(
    inputs: int,
    outputs: int,
    kernel: int,
    stride: int = 1,
    groups: int = 1,
    activation: type[nn.Module] | None = nn.ReLU6,
) -> nn.Sequential:
    """A convolution padded to keep its input's size, batch norm and, if there is one, an activation in place."""
    layers: list[nn.Module] = [
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    ]
    if activation is not None:
        layers.append(activation(inplace=True))
    return nn.Sequential(*layers)


def divisible(channels: float, by: int = 8) -> int:
    """Channels rounded to a multiple of ``by``, not by more than a tenth down (Sandler et al. 2018)."""
    rounded = max(by, int(channels + by / 2) // by * by)
    return rounded + by if rounded < 0.9 * channels else rounded


class SqueezeExcite(nn.Module):
    """Weigh channels by what all pixels say (Hu et al. 2018).

    Args:
        channels: Channels of input and output.
        reduced: Channels between the two layers of the gate.
        activation: The activation between them.
    """

    def __init__(self, channels: int, reduced: int, activation: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.reduce = nn.Conv2d(channels, reduced, 1)
        self.activation = activation(inplace=True)
        self.expand = nn.Conv2d(reduced, channels, 1)
        self.gate = nn.Sigmoid()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (batch, channels, height, width) to the same shape."""
        weights: torch.Tensor = self.gate(self.expand(self.activation(self.reduce(self.pool(x)))))
        return x * weights


class InvertedResidual(nn.Module):
    """Expand, filter by depth, project (Sandler et al. 2018, figure 3), with a shortcut where shapes allow.

    Args:
        inputs: Input channels.
        outputs: Output channels.
        stride: Stride of the depthwise convolution.
        expansion: Ratio of the expanded channels to the input channels; at 1 nothing is expanded.
        kernel: Kernel of the depthwise convolution.
        squeeze: Channels of a squeeze-and-excite gate behind the depthwise convolution; 0 for none.
        activation: The activations.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        stride: int,
        expansion: int,
        kernel: int = 3,
        squeeze: int = 0,
        activation: type[nn.Module] = nn.ReLU6,
    ) -> None:
        super().__init__()
        wide = inputs * expansion
        if expansion > 1:
            self.expand = conv_norm(inputs, wide, 1, activation=activation)
        self.depthwise = conv_norm(wide, wide, kernel, stride, groups=wide, activation=activation)
        if squeeze:
            self.squeeze = SqueezeExcite(wide, squeeze, activation)
        self.project = conv_norm(wide, outputs, 1, activation=None)
        self._expands, self._squeezes = expansion > 1, squeeze > 0
        self.shortcut = stride == 1 and inputs == outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (batch, inputs, height, width) to (batch, outputs, height / stride, width / stride)."""
        y: torch.Tensor = self.depthwise(self.expand(x) if self._expands else x)
        y = self.project(self.squeeze(y) if self._squeezes else y)
        return x + y if self.shortcut else y


class DepthwiseSeparable(nn.Sequential):
    """Filter by depth, then mix channels, each with batch norm and ReLU (Howard et al. 2017, figure 3)."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, kernel: int = 3) -> None:
        super().__init__(
            conv_norm(inputs, inputs, kernel, stride, groups=inputs, activation=nn.ReLU),
            conv_norm(inputs, outputs, 1, activation=nn.ReLU),
        )


class _Residual(nn.Module):
    """A body and a shortcut, which is a convolution where sizes differ, added and rectified."""

    def __init__(self, body: nn.Module, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = body
        fits = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if fits else conv_norm(inputs, outputs, 1, stride, activation=None)
        self.activation = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (batch, inputs, height, width) to (batch, outputs, height / stride, width / stride)."""
        found: torch.Tensor = self.activation(self.body(x) + self.shortcut(x))
        return found


class BasicBlock(_Residual):
    """Two 3 x 3 convolutions (He et al. 2016, figure 5, left)."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        body = nn.Sequential(
            conv_norm(inputs, outputs, 3, stride, activation=nn.ReLU), conv_norm(outputs, outputs, 3, activation=None)
        )
        super().__init__(body, inputs, outputs, stride)


class Bottleneck(_Residual):
    """A 3 x 3 convolution between two of 1 x 1, on a quarter of the channels (He et al. 2016, figure 5, right)."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        narrow = outputs // 4
        body = nn.Sequential(
            conv_norm(inputs, narrow, 1, activation=nn.ReLU),
            conv_norm(narrow, narrow, 3, stride, activation=nn.ReLU),
            conv_norm(narrow, outputs, 1, activation=None),
        )
        super().__init__(body, inputs, outputs, stride)
