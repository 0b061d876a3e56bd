"""Candidate operators: what can stand in the place of a block, as data and builders."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import nn

from fxopt.errors import PassError, UnknownNameError

__all__ = [
    "IDENTITY",
    "ORIGINAL",
    "ZERO",
    "Shape",
    "SqueezeGate",
    "Style",
    "build",
    "fits",
    "known",
    "register_candidate",
]

ORIGINAL = "original"
"""What a block computes now, where that is none of the candidates."""
IDENTITY = "identity"
"""Nothing, where input and output have one shape."""
ZERO = "zero"
"""Nothing beside a shortcut: the ZeroOp of papers on architecture search."""


@dataclass(frozen=True)
class Shape:
    """What a candidate has to keep.

    Attributes:
        inputs: Input channels.
        outputs: Output channels.
        stride: Ratio of the input's height and width to the output's.
        shortcut: Whether something is added to what the block gives.
    """

    inputs: int
    outputs: int
    stride: int
    shortcut: bool


@dataclass(frozen=True)
class SqueezeGate:
    """The squeeze-and-excite gate of a block.

    Attributes:
        reduced: Channels between its two layers.
        activation: Makes the activation between them.
        gate: Makes the function that weights come from, such as a sigmoid.
    """

    reduced: int
    activation: Callable[[], nn.Module]
    gate: Callable[[], nn.Module]


@dataclass(frozen=True)
class Style:
    """How the block's layers are made, which candidates imitate.

    Attributes:
        norm: Makes the norm behind a convolution of so many channels; None where convolutions have a bias instead.
        activation: Makes an activation between layers, or None.
        end: Makes the activation behind the last layer, or None.
        squeeze: The block's gate, or None.
    """

    norm: Callable[[int], nn.Module] | None
    activation: Callable[[], nn.Module] | None
    end: Callable[[], nn.Module] | None
    squeeze: SqueezeGate | None = None


Builder: TypeAlias = Callable[[Shape, Style], nn.Module]


class SqueezeExcite(nn.Module):
    """Weigh channels by what all pixels say (Hu et al. 2018)."""

    def __init__(self, channels: int, style: SqueezeGate) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.reduce = conv(channels, style.reduced, 1, bias=True)
        self.activation = style.activation()
        self.expand = conv(style.reduced, channels, 1, bias=True)
        self.gate = style.gate()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (batch, channels, height, width) to the same shape."""
        weights: torch.Tensor = self.gate(self.expand(self.activation(self.reduce(self.pool(x)))))
        return x * weights


def conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, bias: bool = False) -> nn.Conv2d:
    """A padded convolution whose weights nobody has set yet, which costs no time."""
    made: nn.Conv2d = nn.Conv2d(
        inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=bias, device="meta"
    ).to_empty(device="cpu")
    return made


def unit(
    style: Style, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, *, last: bool = False
) -> nn.Sequential:
    """A convolution with the norm and the activation of a style."""
    found = nn.Sequential()
    found.add_module("conv", conv(inputs, outputs, kernel, stride, groups, bias=style.norm is None))
    if style.norm is not None:
        found.add_module("norm", style.norm(outputs))
    activation = style.end if last else style.activation
    if activation is not None:
        found.add_module("activation", activation())
    return found


def _inverted(shape: Shape, style: Style, expansion: int, kernel: int) -> nn.Module:
    wide = shape.inputs * expansion
    found = nn.Sequential()
    found.add_module("expand", unit(style, shape.inputs, wide, 1))
    found.add_module("depthwise", unit(style, wide, wide, kernel, shape.stride, wide))
    if style.squeeze is not None:
        found.add_module("squeeze", SqueezeExcite(wide, style.squeeze))
    found.add_module("project", unit(style, wide, shape.outputs, 1, last=True))
    return found


def _separable(shape: Shape, style: Style, _: int, kernel: int) -> nn.Module:
    found = nn.Sequential()
    found.add_module("depthwise", unit(style, shape.inputs, shape.inputs, kernel, shape.stride, shape.inputs))
    if style.squeeze is not None:
        found.add_module("squeeze", SqueezeExcite(shape.inputs, style.squeeze))
    found.add_module("project", unit(style, shape.inputs, shape.outputs, 1, last=True))
    return found


def _dense(shape: Shape, style: Style, groups: int, kernel: int) -> nn.Module:
    found = nn.Sequential()
    found.add_module("only", unit(style, shape.inputs, shape.outputs, kernel, shape.stride, max(1, groups), last=True))
    return found


def _basic(shape: Shape, style: Style, _: int, kernel: int) -> nn.Module:
    found = nn.Sequential()
    found.add_module("first", unit(style, shape.inputs, shape.outputs, kernel, shape.stride))
    found.add_module("last", unit(style, shape.outputs, shape.outputs, kernel, last=True))
    return found


def _bottleneck(shape: Shape, style: Style, _: int, kernel: int) -> nn.Module:
    narrow = shape.outputs // 4
    found = nn.Sequential()
    found.add_module("reduce", unit(style, shape.inputs, narrow, 1))
    found.add_module("middle", unit(style, narrow, narrow, kernel, shape.stride))
    found.add_module("expand", unit(style, narrow, shape.outputs, 1, last=True))
    return found


def _pool(kind: type[nn.Module]) -> Callable[[Shape, Style, int, int], nn.Module]:
    def make(shape: Shape, style: Style, _: int, kernel: int) -> nn.Module:
        found = nn.Sequential()
        found.add_module("pool", kind(kernel, shape.stride, kernel // 2))
        if style.norm is not None:
            found.add_module("norm", style.norm(shape.outputs))
        return found

    return make


@dataclass(frozen=True)
class _Family:
    """Candidates that are written as a word, perhaps a number, and a kernel: ``mb6-k3``.

    Attributes:
        build: Makes one, from shape, style, number and kernel.
        fits: Whether one can be made for a shape with a number.
        numbered: Whether there is a number.
    """

    build: Callable[[Shape, Style, int, int], nn.Module]
    fits: Callable[[Shape, int], bool]
    numbered: bool = False


def _always(shape: Shape, number: int) -> bool:
    return True


def _has_one_width(shape: Shape, number: int) -> bool:
    return shape.inputs == shape.outputs


_FAMILIES: Mapping[str, _Family] = {
    "mb": _Family(_inverted, lambda shape, number: number >= 1, numbered=True),
    "separable": _Family(_separable, _always),
    "conv": _Family(_dense, _always),
    "grouped": _Family(
        _dense, lambda s, number: number > 1 and s.inputs % number == 0 and s.outputs % number == 0, numbered=True
    ),
    "basic": _Family(_basic, _always),
    "bottleneck": _Family(_bottleneck, lambda shape, number: shape.outputs % 4 == 0),
    "avgpool": _Family(_pool(nn.AvgPool2d), _has_one_width),
    "maxpool": _Family(_pool(nn.MaxPool2d), _has_one_width),
}
_NAME = re.compile(r"([a-z]+)(\d*)-k(\d+)")
_CUSTOM: dict[str, tuple[Builder, Callable[[Shape], bool]]] = {}


def register_candidate(name: str, build: Builder, fits: Callable[[Shape], bool] | None = None) -> None:
    """Add a candidate operator of your own, which ``SelectOperators(candidates=(..., name))`` then offers.

    Args:
        name: Its name in policies. Who replays such a policy has to register the same candidate first.
        build: Makes the operator from the block's shape and style, a module of one input and one output; convolutions
            and norms in it get their weights from the pass's seed. It may be anything that ``fxopt.trace`` accepts.
        fits: Whether it can stand in the place of a block; by default wherever it keeps the block's shape.

    Raises:
        PassError: If the name is one of fxopt's own, or of a candidate that was registered before.
    """
    if name in (ORIGINAL, IDENTITY, ZERO) or _parsed(name) is not None or name in _CUSTOM or not name:
        raise PassError(f"There is a candidate {name!r} already; choose another name.")
    _CUSTOM[name] = (build, fits or (lambda shape: True))


def known(name: str) -> bool:
    """Whether there is a candidate of a name."""
    return name in (IDENTITY, ZERO) or name in _CUSTOM or _parsed(name) is not None


def fits(name: str, shape: Shape) -> bool:
    """Whether a candidate can keep a shape.

    Raises:
        UnknownNameError: If there is no such candidate.
    """
    if name == ZERO:
        return shape.shortcut
    if name == IDENTITY:
        return not shape.shortcut and shape.stride == 1 and shape.inputs == shape.outputs
    if name in _CUSTOM:
        return bool(_CUSTOM[name][1](shape))
    family, number, _ = _found(name)
    return family.fits(shape, number)


def build(name: str, shape: Shape, style: Style) -> nn.Module:
    """A candidate for a block; its weights are yet to be set.

    Raises:
        UnknownNameError: If there is no such candidate.
    """
    if name in _CUSTOM:
        return _CUSTOM[name][0](shape, style)
    family, number, kernel = _found(name)
    return family.build(shape, style, number, kernel)


def is_custom(name: str) -> bool:
    """Whether a candidate was registered by a user."""
    return name in _CUSTOM


def _found(name: str) -> tuple[_Family, int, int]:
    parsed = _parsed(name)
    if parsed is None:
        raise UnknownNameError("candidate", name, ["mb6-k3", "conv-k3", "separable-k3", IDENTITY, ZERO, *_CUSTOM])
    return parsed


def _parsed(name: str) -> tuple[_Family, int, int] | None:
    match = _NAME.fullmatch(name)
    family = _FAMILIES.get(match[1]) if match else None
    if match is None or family is None or bool(match[2]) != family.numbered or int(match[3]) % 2 == 0:
        return None
    return family, int(match[2] or 0), int(match[3])
