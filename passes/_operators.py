"""Candidate operators: what can stand in the place of a block, as data and builders."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import nn

from fxopt.errors import PassError, UnknownNameError

__all__ = [
    "IDENTITY",
    "ORIGINAL",
    "OWN",
    "ZERO",
    "Layer",
    "Shape",
    "SqueezeGate",
    "Style",
    "build",
    "check_names",
    "fits",
    "known",
    "register_candidate",
]

ORIGINAL = "original"
"""What a block computes now, where that is none of the candidates."""
IDENTITY = "identity"
"""Nothing, where input and output have one shape."""
OWN = "own"
"""The block's own layers with another kernel, where no other name says what the block computes."""
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
        shift: By how much less the layer of the stride pads above and at the left than below and at the right: 1 for
            TensorFlow's "same" padding of an even size, else 0.
    """

    inputs: int
    outputs: int
    stride: int
    shortcut: bool
    shift: int = 0


@dataclass(frozen=True)
class SqueezeGate:
    """The squeeze-and-excite gate of a block.

    Attributes:
        reduced: Channels between its two layers.
        activation: Makes the activation between them.
        gate: Makes the function that weights come from, such as a sigmoid.
        norm: Makes the norm between its layers, or None.
        end: Makes the activation behind the product, or None.
        behind: Index of the layer of the block whose outputs it weighs.
    """

    reduced: int
    activation: Callable[[], nn.Module]
    gate: Callable[[], nn.Module]
    norm: Callable[[int], nn.Module] | None = None
    end: Callable[[], nn.Module] | None = None
    behind: int = 0


@dataclass(frozen=True)
class Layer:
    """A layer of a block.

    Attributes:
        outputs: Output channels.
        kernel: Height and width of its kernel.
        stride: Stride.
        groups: Groups.
        bias: Whether the convolution has a bias.
        norm: Makes the norm behind a convolution of so many channels, or None.
        activation: Makes the activation behind it, or None.
        shift: By how much less it pads above and at the left than below and at the right.
    """

    outputs: int
    kernel: int
    stride: int
    groups: int
    bias: bool
    norm: Callable[[int], nn.Module] | None
    activation: Callable[[], nn.Module] | None
    shift: int = 0


@dataclass(frozen=True)
class Style:
    """How the block's layers are made, which candidates imitate.

    Attributes:
        norm: Makes the norm behind a convolution of so many channels; None where convolutions have a bias instead.
        activation: Makes an activation between layers, or None.
        end: Makes the activation behind the last layer, or None.
        squeeze: The block's gate, or None.
        layers: The block's layers. A candidate of as many has norm and activation where they have; the last layer of
            any other is like the last of them.
    """

    norm: Callable[[int], nn.Module] | None
    activation: Callable[[], nn.Module] | None
    end: Callable[[], nn.Module] | None
    squeeze: SqueezeGate | None = None
    layers: tuple[Layer, ...] = ()


Builder: TypeAlias = Callable[[Shape, Style], nn.Module]


class SqueezeExcite(nn.Module):
    """Weigh channels by what all pixels say (Hu et al. 2018)."""

    def __init__(self, channels: int, style: SqueezeGate) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.reduce = conv(channels, style.reduced, 1, bias=style.norm is None)
        self.norm = None if style.norm is None else style.norm(style.reduced)
        self.activation = style.activation()
        self.expand = conv(style.reduced, channels, 1, bias=True)
        self.gate = style.gate()
        self.end = None if style.end is None else style.end()

    def steps(self) -> list[tuple[str, nn.Module]]:
        """Names and modules that make the weights, in order."""
        names = ("pool", "reduce", "norm", "activation", "expand", "gate")
        return [(name, module) for name in names if (module := getattr(self, name)) is not None]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (batch, channels, height, width) to the same shape."""
        weights = x
        for _, module in self.steps():
            weights = module(weights)
        product = x * weights
        return product if self.end is None else self.end(product)


def conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, bias: bool = False) -> nn.Conv2d:
    """A padded convolution whose weights nobody has set yet, which costs no time."""
    made: nn.Conv2d = nn.Conv2d(
        inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=bias, device="meta"
    ).to_empty(device="cpu")
    return made


def _unit(inputs: int, layer: Layer) -> nn.Sequential:
    """A convolution with its norm and its activation."""
    found = nn.Sequential()
    made = conv(inputs, layer.outputs, layer.kernel, layer.stride, layer.groups, bias=layer.bias)
    if layer.shift:
        margin = layer.kernel // 2
        found.add_module("padding", nn.ZeroPad2d((margin - layer.shift, margin) * 2))
        made.padding = (0, 0)
    found.add_module("conv", made)
    if layer.norm is not None:
        found.add_module("norm", layer.norm(layer.outputs))
    if layer.activation is not None:
        found.add_module("activation", layer.activation())
    return found


@dataclass(frozen=True)
class _Spec:
    """A layer of a candidate: its name and sizes."""

    name: str
    outputs: int
    kernel: int
    stride: int = 1
    groups: int = 1


def _chain(shape: Shape, style: Style, specs: Sequence[_Spec], gate_behind: int | None = None) -> nn.Module:
    """Layers one after the other, in the style of a block; a gate behind one of them if the block has one."""
    alike = len(style.layers) == len(specs)
    behind = style.squeeze.behind if style.squeeze is not None and alike else gate_behind
    found = nn.Sequential()
    inputs = shape.inputs
    for index, spec in enumerate(specs):
        layer = Layer(
            spec.outputs,
            spec.kernel,
            spec.stride,
            spec.groups,
            style.norm is None,
            style.norm,
            style.activation,
            shape.shift if spec.stride > 1 else 0,
        )
        like = style.layers[index] if alike else None
        if index == len(specs) - 1:
            like = style.layers[-1] if style.layers else replace(layer, activation=style.end)
        if like is not None:
            bias = like.bias and like.norm is None
            layer = replace(layer, bias=bias, norm=like.norm, activation=like.activation)
        found.add_module(spec.name, _unit(inputs, layer))
        if style.squeeze is not None and index == behind:
            found.add_module("squeeze", SqueezeExcite(spec.outputs, style.squeeze))
        inputs = spec.outputs
    return found


def _inverted(shape: Shape, style: Style, expansion: int, kernel: int) -> nn.Module:
    wide = shape.inputs * expansion
    middle = _Spec("depthwise", wide, kernel, shape.stride, wide)
    return _chain(shape, style, (_Spec("expand", wide, 1), middle, _Spec("project", shape.outputs, 1)), 1)


def _fused(shape: Shape, style: Style, expansion: int, kernel: int) -> nn.Module:
    wide = _Spec("expand", shape.inputs * expansion, kernel, shape.stride)
    return _chain(shape, style, (wide, _Spec("project", shape.outputs, 1)), 0)


def _separable(shape: Shape, style: Style, _: int, kernel: int) -> nn.Module:
    first = _Spec("depthwise", shape.inputs, kernel, shape.stride, shape.inputs)
    return _chain(shape, style, (first, _Spec("project", shape.outputs, 1)), 0)


def _dense(shape: Shape, style: Style, groups: int, kernel: int) -> nn.Module:
    return _chain(shape, style, (_Spec("only", shape.outputs, kernel, shape.stride, max(1, groups)),), 0)


def _basic(shape: Shape, style: Style, _: int, kernel: int) -> nn.Module:
    first = _Spec("first", shape.outputs, kernel, shape.stride)
    return _chain(shape, style, (first, _Spec("last", shape.outputs, kernel)), 1)


def _narrow(depthwise: bool) -> Callable[[Shape, Style, int, int], nn.Module]:
    """Bottlenecks, whose middle is dense or depthwise."""

    def make(shape: Shape, style: Style, _: int, kernel: int) -> nn.Module:
        narrow = shape.outputs // 4
        middle = _Spec("middle", narrow, kernel, shape.stride, narrow if depthwise else 1)
        return _chain(shape, style, (_Spec("reduce", narrow, 1), middle, _Spec("expand", shape.outputs, 1)), 2)

    return make


def _own(shape: Shape, style: Style, _: int, kernel: int) -> nn.Module:
    """The block's own layers with another kernel."""
    specs = [
        _Spec(f"layer{index}", one.outputs, kernel if one.kernel > 1 else 1, one.stride, one.groups)
        for index, one in enumerate(style.layers)
    ]
    return _chain(shape, style, specs)


def _pool(kind: type[nn.Module]) -> Callable[[Shape, Style, int, int], nn.Module]:
    def make(shape: Shape, style: Style, _: int, kernel: int) -> nn.Module:
        found = nn.Sequential()
        found.add_module("pool", kind(kernel, shape.stride, kernel // 2))
        if style.norm is not None:
            found.add_module("norm", style.norm(shape.outputs))
        if style.end is not None:
            found.add_module("activation", style.end())
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


def _can_pool(shape: Shape, number: int) -> bool:
    return shape.inputs == shape.outputs and not shape.shift


_FAMILIES: Mapping[str, _Family] = {
    "mb": _Family(_inverted, lambda shape, number: number >= 1, numbered=True),
    "fused": _Family(_fused, lambda shape, number: number >= 1, numbered=True),
    "separable": _Family(_separable, _always),
    "conv": _Family(_dense, _always),
    "grouped": _Family(
        _dense, lambda s, number: number > 1 and s.inputs % number == 0 and s.outputs % number == 0, numbered=True
    ),
    "basic": _Family(_basic, _always),
    "bottleneck": _Family(_narrow(depthwise=False), lambda shape, number: shape.outputs % 4 == 0),
    "thin": _Family(_narrow(depthwise=True), lambda shape, number: shape.outputs % 4 == 0),
    OWN: _Family(_own, _always),
    "avgpool": _Family(_pool(nn.AvgPool2d), _can_pool),
    "maxpool": _Family(_pool(nn.MaxPool2d), _can_pool),
}
_NAME = re.compile(r"([a-z]+)(\d*)-k(\d+)")
_CUSTOM: dict[str, tuple[Builder, Callable[[Shape], bool]]] = {}
_EXAMPLES = ("mb6-k3", "fused6-k3", "conv-k3", "separable-k3", "grouped4-k3", "basic-k3", "bottleneck-k3", "own-k3")


def register_candidate(name: str, build: Builder, fits: Callable[[Shape], bool] | None = None) -> None:
    """Add a candidate operator of your own, which ``SelectOperators(candidates=(..., name))`` then offers.

    Args:
        name: Its name in policies, without braces. Who replays such a policy has to register the same candidate first.
        build: Makes the operator from the block's shape and style, a module of one input and one output; convolutions
            and norms in it get their weights from the pass's seed, and what it draws itself comes from that, too. It
            may be anything that ``fxopt.trace`` accepts and that uses each of its layers once, parameters being those
            of layers.
        fits: Whether it can stand in the place of a block; by default of every one, and one that does not keep the
            block's shape is refused.

    Raises:
        PassError: If the name is one of fxopt's own, or of a candidate that was registered before; if it is no name, or
            what builds the candidate or tells where it fits no function.
    """
    given: Any = name
    if not isinstance(given, str) or not given or set("{}") & set(given):
        raise PassError(f"The name of a candidate is a word without braces, got {given!r}.")
    for what, function in (("build", build), ("fits", fits or _anywhere)):
        if not callable(function):
            raise PassError(f"{what} of the candidate {name!r} is a {type(function).__name__}; give a function.")
    if name in (ORIGINAL, IDENTITY, ZERO) or _parsed(name) is not None or name in _CUSTOM:
        raise PassError(f"There is a candidate {name!r} already; choose another name.")
    _CUSTOM[name] = (build, fits or _anywhere)


def _anywhere(shape: Shape) -> bool:
    return True


def check_names(names: Iterable[str], where: str = "") -> None:
    """Candidates are known, whatever ``{k}`` and ``{e}`` in their names stand for.

    Raises:
        UnknownNameError: If one is not; says where it was given.
    """
    for name in names:
        if not known(name.replace("{k}", "3").replace("{e}", "6")):
            raise _unknown(name, where)


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
        raise _unknown(name)
    return parsed


def _unknown(name: str, where: str = "") -> UnknownNameError:
    remedy = "One of your own has to be registered first: import the module that calls register_candidate."
    return UnknownNameError(f"candidate{where}", name, [*_EXAMPLES, IDENTITY, ZERO, *_CUSTOM], remedy)


def _parsed(name: str) -> tuple[_Family, int, int] | None:
    match = _NAME.fullmatch(name)
    family = _FAMILIES.get(match[1]) if match else None
    if match is None or family is None or bool(match[2]) != family.numbered or int(match[3]) % 2 == 0:
        return None
    return family, int(match[2] or 0), int(match[3])
