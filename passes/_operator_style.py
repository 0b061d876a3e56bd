"""What a block's layers are made of besides convolutions: norms, activations and gates that candidates take over."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import fx, nn

from fxopt.graph import ops
from fxopt.passes._operators import SqueezeGate, Style

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
    norms = [unit.norm for unit in units]
    if any(norms) and not all(norms):
        raise NotHereError("some of its convolutions have a norm and others not")
    inner = next((unit.activation for unit in units[:-1] if unit.activation is not None), None)
    end = units[-1].activation
    between = _activation(gm, inner if inner is not None else end)
    gate = None
    if squeeze is not None:
        reduced, middle = squeeze.reduce.module.out_channels, _activation(gm, squeeze.reduce.activation)
        outer = _activation(gm, squeeze.gate)
        if middle is None or outer is None:
            raise NotHereError("its gate has no activation between its layers")
        gate = SqueezeGate(reduced, middle, outer)
    return Style(_norm(gm, norms[0]), between, _activation(gm, end), gate)


def _norm(gm: fx.GraphModule, node: fx.Node | None) -> Callable[[int], nn.Module] | None:
    if node is None:
        return None
    like: Any = gm.get_submodule(str(node.target))
    if like.running_mean is None or like.weight is None:
        raise NotHereError("its norm keeps no statistics or has no weights")
    return lambda channels: nn.BatchNorm2d(channels, like.eps, like.momentum)


_ATEN: Mapping[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "silu": nn.SiLU,
    "hardswish": nn.Hardswish,
    "hardsigmoid": nn.Hardsigmoid,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "elu": nn.ELU,
    "mish": nn.Mish,
    "leaky_relu": nn.LeakyReLU,
}


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
    if name == "hardtanh":
        low, high = float(bound["min_val"]), float(bound["max_val"])
        return nn.ReLU6 if (low, high) == (0.0, 6.0) else lambda: nn.Hardtanh(low, high)
    if name == "gelu":
        return lambda: nn.GELU(str(bound["approximate"]))
    plain = name in _ATEN and all(not isinstance(value, float) or value in (1.0, 0.01) for value in bound.values())
    if not plain:
        raise NotHereError(f"its activation {name!r} is none that candidates could imitate")
    return _ATEN[name]


def _like(kind: type[nn.Module], options: Mapping[str, Any]) -> nn.Module:
    module = kind.__new__(kind)
    nn.Module.__init__(module)
    module.__dict__.update({name: value for name, value in options.items() if not name.startswith("_")})
    return module
