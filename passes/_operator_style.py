"""What a block's layers are made of besides convolutions: norms, activations and gates that candidates take over."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import fx, nn

from fxopt.graph import ops
from fxopt.passes._operators import Layer, SqueezeGate, Style

if TYPE_CHECKING:
    from fxopt.passes._operator_patterns import Squeeze, Unit

__all__ = ["NotHereError", "style_of"]


class NotHereError(Exception):
    """A pattern fits, and yet the block cannot be replaced."""


def style_of(gm: fx.GraphModule, units: Sequence[Unit], squeeze: Squeeze | None) -> Style:
    """How a block's layers are made.

    Raises:
        NotHereError: If layers of candidates could not be made alike.
    """
    norms = [_norm(gm, unit.norm) for unit in units]
    activations = [_activation(gm, unit.activation) for unit in units]
    layers = tuple(
        Layer(
            outputs=unit.module.out_channels,
            kernel=unit.kernel,
            stride=int(unit.module.stride[0]),
            groups=unit.module.groups,
            bias=unit.module.bias is not None,
            norm=norm,
            activation=activation,
            shift=unit.shift,
        )
        for unit, norm, activation in zip(units, norms, activations, strict=True)
    )
    late = None if squeeze is None else _activation(gm, squeeze.after)
    inner = next((one for one in (*activations[:-1], late) if one is not None), activations[-1])
    norm = next((one for one in norms if one is not None), None)
    return Style(norm, inner, activations[-1], None if squeeze is None else _gate_of(gm, squeeze, late), layers)


def _gate_of(gm: fx.GraphModule, squeeze: Squeeze, late: Callable[[], nn.Module] | None) -> SqueezeGate:
    layer: Any = gm.get_submodule(str(squeeze.reduce.target))
    middle, outer = _activation(gm, squeeze.activation), _activation(gm, squeeze.gate)
    if middle is None or outer is None:
        raise NotHereError("its gate has no activation between its layers")
    reduced = int(layer.weight.shape[0])
    return SqueezeGate(reduced, middle, outer, _norm(gm, squeeze.norm), late, squeeze.behind)


def _norm(gm: fx.GraphModule, node: fx.Node | None) -> Callable[[int], nn.Module] | None:
    if node is None:
        return None
    like: Any = gm.get_submodule(str(node.target))
    if like.running_mean is None or like.weight is None:
        raise NotHereError("its norm keeps no statistics or has no weights")
    return lambda channels: nn.BatchNorm2d(channels, like.eps, like.momentum)


_ATEN: Mapping[str, tuple[Callable[..., nn.Module], tuple[str, ...]]] = {
    "relu": (nn.ReLU, ()),
    "relu6": (nn.ReLU6, ()),
    "silu": (nn.SiLU, ()),
    "hardswish": (nn.Hardswish, ()),
    "hardsigmoid": (nn.Hardsigmoid, ()),
    "hardtanh": (nn.Hardtanh, ("min_val", "max_val")),
    "sigmoid": (nn.Sigmoid, ()),
    "tanh": (nn.Tanh, ()),
    "elu": (nn.ELU, ("alpha",)),
    "selu": (nn.SELU, ()),
    "celu": (nn.CELU, ("alpha",)),
    "softplus": (nn.Softplus, ("beta", "threshold")),
    "gelu": (nn.GELU, ("approximate",)),
    "mish": (nn.Mish, ()),
    "leaky_relu": (nn.LeakyReLU, ("negative_slope",)),
}
"""The module of each function, and the function's arguments that it takes; all others have to be 1."""


def _activation(gm: fx.GraphModule, node: fx.Node | None) -> Callable[[], nn.Module] | None:
    """Makes modules that compute what an activation computes."""
    if node is None:
        return None
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        if any(True for _ in module.parameters()):
            raise NotHereError(f"its activation {type(module).__name__} has weights")
        kind, options = type(module), dict(module.__dict__)
        return lambda: _like(kind, options)
    bound = ops.arguments(node)
    name = ops.semantics(gm, node).name.rstrip("_")
    made = _ATEN.get(name)
    taken = () if made is None else made[1]
    options = {argument: bound[argument] for argument in taken}
    others = (value for argument, value in bound.items() if argument not in taken)
    if made is None or any(isinstance(value, (int, float)) and value != 1 for value in others):
        raise NotHereError(f"its activation {name!r} is none that candidates could imitate")
    if name == "hardtanh" and tuple(options.values()) == (0, 6):
        return nn.ReLU6
    return functools.partial(made[0], **options)


def _like(kind: type[nn.Module], options: Mapping[str, Any]) -> nn.Module:
    module = kind.__new__(kind)
    nn.Module.__init__(module)
    module.__dict__.update({name: value for name, value in options.items() if not name.startswith("_")})
    return module
