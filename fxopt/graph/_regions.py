"""Regions under ``torch.no_grad()``, which torch.export wraps into graphs of their own, written out in the graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

__all__ = ["inline_grad_regions"]


def inline_grad_regions(gm: fx.GraphModule) -> None:
    """Replace every call of a ``no_grad`` region by its nodes; what leaves the region is detached."""
    target = torch.ops.higher_order.wrap_with_set_grad_enabled
    calls = gm.graph.find_nodes(op="call_function", target=target)
    while calls:
        for call in calls:
            _inline(gm, call)
        calls = gm.graph.find_nodes(op="call_function", target=target)


def _inline(gm: fx.GraphModule, call: fx.Node) -> None:
    enabled, region, *inputs = call.args
    if not isinstance(region, fx.Node):
        return
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
        if not enabled:
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
