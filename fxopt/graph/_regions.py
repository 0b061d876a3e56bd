"""Regions that torch.export wraps into graphs of their own, written out in the graph.

Such are regions under ``torch.no_grad()``, and under ``torch.autocast(enabled=False)``. What runs under autocast stays
wrapped: its operators' types are decided while it runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

__all__ = ["inline_regions"]

_higher_order = torch.ops.higher_order
# The region and the inputs of a call, and whether gradients flow out of it; None where it has to stay.
_Reader = Callable[[tuple[Any, ...]], tuple[Any, list[Any], bool] | None]


def inline_regions(gm: fx.GraphModule) -> None:
    """Replace calls of regions by their nodes; what leaves a ``no_grad`` region is detached."""
    pending = True
    while pending:
        pending = False
        for target, read in _READERS.items():
            for call in gm.graph.find_nodes(op="call_function", target=target):
                found = read(call.args)
                if found is not None and isinstance(found[0], fx.Node):
                    _inline(gm, call, *found)
                    pending = True


def _with_grad(args: tuple[Any, ...]) -> tuple[Any, list[Any], bool]:
    enabled, region, *inputs = args
    return region, inputs, bool(enabled)


def _without_autocast(args: tuple[Any, ...]) -> tuple[Any, list[Any], bool] | None:
    _, _, enabled, _, region, *inputs = args
    return None if enabled else (region, inputs, True)


_READERS: dict[Any, _Reader] = {
    _higher_order.wrap_with_set_grad_enabled: _with_grad,
    _higher_order.wrap_with_autocast: _without_autocast,
}


def _inline(gm: fx.GraphModule, call: fx.Node, region: fx.Node, inputs: list[Any], differentiable: bool) -> None:
    path = str(region.target)
    inner: Any = gm.get_submodule(path)
    known: dict[fx.Node, Any] = {}
    results: Any = ()
    with gm.graph.inserting_before(call):
        for node in inner.graph.nodes:
            if node.op == "placeholder":
                known[node] = inputs[len(known)]
            elif node.op == "output":
                results = fx.map_arg(node.args[0], known.__getitem__)
            else:
                known[node] = gm.graph.node_copy(node, known.__getitem__)
                if node.op == "get_attr":
                    known[node].target = f"{path}.{node.target}"
        if not differentiable:
            results = fx.map_arg(results, lambda node: _detach(gm, node))
    for user in list(call.users):
        index: Any = user.args[1]
        user.replace_all_uses_with(results[index])
        gm.graph.erase_node(user)
    gm.graph.erase_node(call)


def _detach(gm: fx.GraphModule, node: fx.Node) -> fx.Node:
    detached = gm.graph.call_function(torch.ops.aten.detach.default, (node,))
    detached.meta = dict(node.meta)
    return detached
