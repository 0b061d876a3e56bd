"""Activation functions that are spelled out in arithmetic, found by what they compute."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx, nn

from fxopt.graph import edit, ops

__all__ = ["join_activations"]

_aten = torch.ops.aten
_MOST_NODES = 10
_TOLERANCE = 2e-6
"""Spellings differ from each other by their rounded constants, such as 0.70710678 for the root of a half."""
_NOISE = 1e-15
"""Far out and next to zero they differ by the rounding of doubles alone. Whoever adds or clamps at 1e-12 there does so
because a logarithm or a quotient follows."""
_NOTHING = 1e-100
"""What counts as zero where a function is zero: less than anybody adds, and more than ``erfc`` leaves of GELU."""
_SPECIAL = (1e-7, 1e-4, 30.0, 100.0, 1e3, 1e4, 1e6, 1e30, 3e38)

_KNOWN: Mapping[str, tuple[Any, Callable[[torch.Tensor], torch.Tensor]]] = {
    "relu": (_aten.relu.default, nn.functional.relu),
    "relu6": (_aten.relu6.default, nn.functional.relu6),
    "silu": (_aten.silu.default, nn.functional.silu),
    "hardswish": (_aten.hardswish.default, nn.functional.hardswish),
    "hardsigmoid": (_aten.hardsigmoid.default, nn.functional.hardsigmoid),
    "sigmoid": (_aten.sigmoid.default, torch.sigmoid),
    "gelu": (_aten.gelu.default, nn.functional.gelu),
    "mish": (_aten.mish.default, nn.functional.mish),
}


def join_activations(gm: fx.GraphModule) -> bool:
    """Put one operator in the place of arithmetic that computes an activation function; whether there was some.

    Nodes are gathered backwards from a pointwise operator until all of them depend on a single value; what they make
    of a grid of numbers is compared with the functions that fxopt knows. So ``x * relu6(x + 3) / 6`` becomes
    ``hardswish(x)``, however it is written. What something else reads in between stays, and so does what differs next
    to zero, far out or at NaN: ``x.clamp(min=1e-12)``, ``x.clamp(0, 65504)`` and ``relu(x) + 1e-6`` are no ReLU.
    """
    order = {node: index for index, node in enumerate(gm.graph.nodes)}
    found = False
    for node in list(gm.graph.nodes):
        if not node.users or not _is_arithmetic(gm, node) or ops.is_activation(gm, node):
            continue
        region, source = _function_at(gm, node, order)
        if source is None:
            continue
        target = _KNOWN[_name_of(gm, tuple(region), source, node)][0]  # type: ignore[index]
        new = edit.insert_function(gm, target, node, (source,))
        new.meta.update(node.meta)
        order[new] = order[node]
        edit.replace_uses(node, new)
        for gone in sorted(region, key=order.__getitem__, reverse=True):
            edit.erase(gm, gone)
        found = True
    return found


def _function_at(
    gm: fx.GraphModule, end: fx.Node, order: Mapping[fx.Node, int]
) -> tuple[list[fx.Node], fx.Node | None]:
    """The nodes that make a known function of one value and end at ``end``, and that value."""
    region, sources = [end], set(end.all_input_nodes)
    while len(region) <= _MOST_NODES and sources:
        if len(sources) == 1:
            (source,) = sources
            if _name_of(gm, tuple(region), source, end) is not None:
                return region, source
        latest = max(sources, key=lambda one: order.get(one, -1))
        if not _is_arithmetic(gm, latest) or not set(latest.users) <= set(region):
            break
        region.append(latest)
        sources = (sources - {latest}) | set(latest.all_input_nodes)
    return region, None


def _is_arithmetic(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node is a pointwise function of tensors and numbers, in floating point and without parameters."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or not value.is_floating_point() or not node.all_input_nodes:
        return False
    if ops.semantics(gm, node).kind != "elementwise":
        return False
    if any(_shape(source) != tuple(value.shape) for source in node.all_input_nodes):
        return False
    if node.op == "call_function":
        tags = getattr(node.target, "tags", ())
        return torch.Tag.nondeterministic_seeded not in tags
    if node.op != "call_module":
        return False
    module = gm.get_submodule(str(node.target))
    hooked = bool(module._forward_hooks or module._forward_pre_hooks)
    return not hooked and ops.is_activation(gm, node) and not any(True for _ in module.parameters())


def _name_of(gm: fx.GraphModule, region: tuple[fx.Node, ...], source: fx.Node, end: fx.Node) -> str | None:
    """The known function that the nodes of a region compute of ``source``."""
    if source in region or _shape(source) != _shape(end) or _type(source) != _type(end):
        return None
    values: dict[fx.Node, Any] = {source: _grid().clone()}
    try:
        for node in reversed(_in_order(region)):
            values[node] = _computed(gm, node, values)
    except (IndexError, RuntimeError, TypeError, ValueError):
        return None
    got = values[end]
    if got.shape != _grid().shape or got.dtype != _grid().dtype:
        return None
    for name, (wanted, allowed) in _values().items():
        if bool(torch.where(wanted.isnan(), got.isnan(), (got - wanted).abs() <= allowed).all()):
            return name
    return None


def _in_order(region: tuple[fx.Node, ...]) -> list[fx.Node]:
    """The nodes of a region, readers before what they read."""
    left, found = list(region), []
    while left:
        free = next(node for node in left if not any(user in left for user in node.users))
        left.remove(free)
        found.append(free)
    return found


def _computed(gm: fx.GraphModule, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda one: values[one].clone())
    if node.op == "call_module":
        return copy.copy(gm.get_submodule(str(node.target)))(*args, **kwargs)
    function: Callable[..., Any] = node.target  # type: ignore[assignment]
    return function(*args, **kwargs)


@functools.cache
def _grid() -> torch.Tensor:
    special = torch.tensor([*_SPECIAL, *(-one for one in _SPECIAL), math.nan], dtype=torch.float64)
    return torch.cat([torch.linspace(-12.0, 12.0, 481, dtype=torch.float64), special])


@functools.cache
def _values() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """What the known functions make of the grid, and how far from it a spelling may be."""
    return {name: (wanted := function(_grid()), _allowed(wanted)) for name, (_, function) in _KNOWN.items()}


def _allowed(wanted: torch.Tensor) -> torch.Tensor:
    """The rounding of constants; at special numbers only relative to the value."""
    x = _grid()
    special = torch.arange(len(x)) >= len(x) - 2 * len(_SPECIAL) - 1
    noise = torch.where(wanted == 0.0, _NOTHING, _NOISE * x.abs().clamp(min=1.0))
    return _TOLERANCE * wanted.abs() + torch.where(special, noise, _TOLERANCE)


def _shape(node: fx.Node) -> tuple[int, ...] | None:
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, torch.Tensor) else None


def _type(node: fx.Node) -> object:
    value = node.meta.get("val")
    return value.dtype if isinstance(value, torch.Tensor) else None
