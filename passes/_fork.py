"""A private copy of a graph to work on: the tensors are shared, everything that holds them is not."""

from __future__ import annotations

import copy
from typing import Any

from torch import fx, nn

__all__ = ["fork", "own_copy"]

_OWN_TO_A_GRAPH_MODULE = frozenset(("_graph", "_code", "_lineno_map", "_prologue_start", "_graphmodule_cls_name"))


def fork(gm: fx.GraphModule) -> fx.GraphModule:
    """Copy a graph and its tree of modules, but none of its parameters and buffers.

    Edits of the copy (nodes, submodules, a module's attributes, which tensors it holds, its mode and hooks) leave the
    original alone. Writing into a tensor would not.

    Args:
        gm: Any GraphModule.

    Returns:
        A GraphModule that computes the same from the very same tensors.
    """
    twin = fx.GraphModule(nn.Module(), fx.Graph(), type(gm).__name__)
    clones: dict[int, nn.Module] = {id(gm): twin}
    state = {name: value for name, value in gm.__dict__.items() if name not in _OWN_TO_A_GRAPH_MODULE}
    twin.__dict__.update(_own_containers(state))
    pending: list[nn.Module] = [twin]
    while pending:
        module = pending.pop()
        for name, child in module._modules.items():
            if child is None:
                continue
            if id(child) not in clones:
                clones[id(child)] = _clone(child)
                pending.append(clones[id(child)])
            module._modules[name] = clones[id(child)]
    twin.graph = _copy_graph(gm.graph)
    return twin


def own_copy(gm: fx.GraphModule) -> fx.GraphModule:
    """Copy a graph with all its tensors; tensors that are tied stay so."""
    twin = fork(gm)
    clones: dict[int, Any] = {}
    for module in twin.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                fresh = clones.get(id(parameter))
                if fresh is None:
                    fresh = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
                module._parameters[name] = clones.setdefault(id(parameter), fresh)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = clones.setdefault(id(buffer), buffer.detach().clone())
    return twin


def _copy_graph(graph: fx.Graph) -> fx.Graph:
    """The nodes and how arguments are packed and unpacked; copy.deepcopy would rebuild the latter and warn."""
    twin = fx.Graph(tracer_cls=graph._tracer_cls)
    nodes: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        nodes[node] = twin.node_copy(node, nodes.__getitem__)
    twin.set_codegen(copy.copy(graph._codegen))
    return twin


def _clone(module: nn.Module) -> nn.Module:
    """A module of the same class and state; made without its constructor, and without its pickling rules."""
    if isinstance(module, fx.GraphModule):
        return copy.copy(module)
    clone = module.__class__.__new__(module.__class__)
    clone.__dict__.update(_own_containers(module.__dict__))
    return clone


def _own_containers(state: dict[str, Any]) -> dict[str, Any]:
    return {name: copy.copy(value) if isinstance(value, (dict, list, set)) else value for name, value in state.items()}
