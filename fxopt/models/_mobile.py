"""Networks of inverted residual blocks: the published ones, and the space that ProxylessNAS searches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from fxopt._numbers import check_positive, check_whole
from fxopt.errors import FxoptError
from fxopt.models._blocks import InvertedResidual, conv_norm, divisible

__all__ = ["MOBILE_NETWORKS", "Block", "MobileNetwork", "Plan", "mobile_network", "proxyless_space"]

_SPACE_STAGES = ((24, 4, 2), (40, 4, 2), (80, 4, 2), (96, 4, 1), (192, 4, 2), (320, 1, 1))
_LEAST_PIXELS = 4


@dataclass(frozen=True)
class Block:
    """An inverted residual block.

    Attributes:
        outputs: Output channels.
        kernel: Kernel of the depthwise convolution.
        expansion: Ratio of the expanded channels to the input channels.
        stride: Stride.
        squeeze: Whether there is a squeeze-and-excite gate, of a quarter of the input channels.
    """

    outputs: int
    kernel: int
    expansion: int
    stride: int = 1
    squeeze: bool = False


@dataclass(frozen=True)
class Plan:
    """A network of inverted residual blocks.

    Attributes:
        stem: Channels of the first convolution.
        blocks: The blocks in order.
        last: Channels of the last convolution.
        stem_stride: Stride of the first convolution.
        activation: The activations.
    """

    stem: int
    blocks: tuple[Block, ...]
    last: int
    stem_stride: int = 2
    activation: type[nn.Module] = nn.ReLU6


class MobileNetwork(nn.Module):
    """A stem, inverted residual blocks, a last 1 x 1 convolution, pooling and a classifier.

    Args:
        plan: Sizes of everything.
        classes: Number of classes.
        channels: Input channels.
    """

    def __init__(self, plan: Plan, classes: int = 1000, channels: int = 3) -> None:
        super().__init__()
        self.stem = conv_norm(channels, plan.stem, 3, plan.stem_stride, activation=plan.activation)
        width, blocks = plan.stem, []
        for block in plan.blocks:
            squeeze = max(1, width // 4) if block.squeeze else 0
            blocks.append(
                InvertedResidual(
                    width, block.outputs, block.stride, block.expansion, block.kernel, squeeze, plan.activation
                )
            )
            width = block.outputs
        self.blocks = nn.Sequential(*blocks)
        self.head = conv_norm(width, plan.last, 1, activation=plan.activation)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(plan.last, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images (batch, channels, height, width) to class scores (batch, classes)."""
        x = self.pool(self.head(self.blocks(self.stem(x))))
        scores: torch.Tensor = self.classifier(torch.flatten(x, 1))
        return scores


def proxyless_space(
    width: float = 1.0,
    resolution: int = 224,
    classes: int = 1000,
    channels: int = 3,
    *,
    kernel: int = 3,
    expansion: int = 6,
) -> MobileNetwork:
    """The macro architecture that ProxylessNAS searches (Cai et al. 2019): 21 blocks behind a fixed first one.

    Every block is here an inverted residual of one ``kernel`` and one ``expansion``;
    ``SelectOperators(patterns=("inverted-residual",))`` finds the 21 and offers kernels 3, 5, 7 and expansions 3, 6,
    and to leave out each of the 15 that have a shortcut: 6^6 x 7^15 networks. Where rounding makes stages equally
    wide, or a stride is left out between them, more have one: 16 at a width of 0.35, 17 of it at 32 pixels.

    Args:
        width: Factor of all channels, which are rounded to multiples of 8.
        resolution: Height and width of the images. Below 128 strides are left out, the first ones first, until the last
            block sees at least 4 x 4 pixels; at 32 three of five stay.
        classes: Number of classes.
        channels: Input channels.
        kernel: Kernel of every block.
        expansion: Expansion of every block.

    Raises:
        FxoptError: If a size is out of range.
    """
    check_positive(width=width)
    check_whole(1, resolution=resolution, classes=classes, channels=channels, kernel=kernel, expansion=expansion)
    if kernel % 2 == 0:
        raise FxoptError(f"kernel has to be odd, got {kernel}.")
    left = 0
    while left < 5 and resolution >> (left + 1) >= _LEAST_PIXELS:
        left += 1
    strides = [2, *(stride for _, _, stride in _SPACE_STAGES)]
    for index, stride in enumerate(strides):
        if stride == 2 and sum(one == 2 for one in strides[index:]) > left:
            strides[index] = 1
    blocks = [Block(divisible(16 * width), 3, 1)]
    for (outputs, count, _), stride in zip(_SPACE_STAGES, strides[1:], strict=True):
        for number in range(count):
            blocks.append(Block(divisible(outputs * width), kernel, expansion, stride if number == 0 else 1))
    last = max(1280, divisible(1280 * width)) if resolution >= 128 else divisible(1280 * width)
    return MobileNetwork(Plan(divisible(32 * width), tuple(blocks), last, strides[0]), classes, channels)


def mobile_network(name: str, classes: int = 1000, channels: int = 3) -> MobileNetwork:
    """A published network of inverted residual blocks, one of :data:`MOBILE_NETWORKS`."""
    return MobileNetwork(MOBILE_NETWORKS[name], classes, channels)


def _stages(*stages: tuple[int, int, str], first: int = 16) -> tuple[Block, ...]:
    """Blocks from stages of (outputs, stride, blocks), each block written as its expansion, kernel and an s for SE."""
    blocks = [Block(first, 3, 1)]
    for outputs, stride, text in stages:
        for number, word in enumerate(text.split()):
            step = stride if number == 0 else 1
            blocks.append(Block(outputs, int(word[1]), int(word[0]), step, word.endswith("s")))
    return tuple(blocks)


def _repeated(stages: Sequence[tuple[int, int, int, int, int]]) -> tuple[tuple[int, int, str], ...]:
    """Stages of (outputs, blocks, stride, kernel, expansion)."""
    return tuple((outputs, stride, f"{e}{k} " * count) for outputs, count, stride, k, e in stages)


# Cai et al. 2019, figure 4, and their published configurations; MobileNetV2: Sandler et al. 2018, table 2; MnasNet:
# Tan et al. 2019, figure 7 and the published B1.
MOBILE_NETWORKS: Mapping[str, Plan] = {
    "mobilenet-v2": Plan(
        32,
        _stages(
            *_repeated(((24, 2, 2, 3, 6), (32, 3, 2, 3, 6), (64, 4, 2, 3, 6))),
            *_repeated(((96, 3, 1, 3, 6), (160, 3, 2, 3, 6), (320, 1, 1, 3, 6))),
        ),
        1280,
    ),
    "mnasnet-a1": Plan(
        32,
        _stages(
            *((24, 2, "63 63"), (40, 2, "35s 35s 35s"), (80, 2, "63 63 63 63")),
            *((112, 1, "63s 63s"), (160, 2, "65s 65s 65s"), (320, 1, "63")),
        ),
        1280,
        activation=nn.ReLU,
    ),
    "mnasnet-b1": Plan(
        32,
        _stages(
            *((24, 2, "33 33 33"), (40, 2, "35 35 35"), (80, 2, "65 65 65")),
            *((96, 1, "63 63"), (192, 2, "65 65 65 65"), (320, 1, "63")),
        ),
        1280,
        activation=nn.ReLU,
    ),
    "proxyless-mobile": Plan(
        32,
        _stages(
            *((32, 2, "35 33"), (40, 2, "37 33 35 35"), (80, 2, "67 35 35 35")),
            *((96, 1, "65 35 35 35"), (192, 2, "67 67 37 37"), (320, 1, "67")),
        ),
        1280,
    ),
    "proxyless-cpu": Plan(
        40,
        _stages(
            *((32, 2, "63 33 33 33"), (48, 2, "63 33 33 35"), (88, 2, "63 33")),
            *((104, 1, "65 33 33 33"), (216, 2, "65 35 35 33"), (360, 1, "65")),
            first=24,
        ),
        1432,
    ),
    "proxyless-gpu": Plan(
        40,
        _stages(
            *((32, 2, "35"), (56, 2, "37 33"), (112, 2, "67 35")),
            *((128, 1, "65 33 35"), (256, 2, "67 67 67 65"), (432, 1, "67")),
            first=24,
        ),
        1728,
    ),
    "proxyless-mobile-1.4": Plan(
        48,
        _stages(
            *((40, 2, "35 33"), (56, 2, "37 33 35 35"), (112, 2, "67 35 35 35")),
            *((136, 1, "65 35 35 35"), (256, 2, "67 67 37 37"), (448, 1, "67")),
            first=24,
        ),
        1792,
    ),
}
