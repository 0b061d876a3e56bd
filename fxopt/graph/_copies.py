"""Copies of modules and graphs, in depth as asked: holders only, or with their tensors."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

from torch import fx, nn

__all__ = ["CanonicalGraph", "clone_module", "clone_tree", "fork", "own_copy", "same_modules"]

_OWN_TO_A_GRAPH_MODULE = frozenset(
    ("_graph", "_code", "_lineno_map", "_prologue_start", "_graphmodule_cls_name", "_in_spec", "_out_spec")
)


class CanonicalGraph(fx.GraphModule):
    """The GraphModule of a traced model; its deep copies keep every node's value and are made without warnings.

    torch's own deep copy rebuilds the description of how arguments are packed, which is deprecated and warns.
    """

    def get_submodule(self, target: str) -> nn.Module:
        """The module at a path; torch's own looks up every name of it three times over."""
        module: nn.Module | None = self
        for name in target.split(".") if target else ():
            module = None if module is None else module._modules.get(name)
        return super().get_submodule(target) if module is None else module

    def __deepcopy__(self, memo: dict[int, Any]) -> fx.GraphModule:
        twin = _empty_twin(self)
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(_state(self), memo))
        twin.graph = _copy_graph(self.graph)
        return twin


def clone_module(module: nn.Module) -> nn.Module:
    """A shallow copy of a module: same tensors and children, its own dictionaries to change them in.

    It is made without the module's constructor and without its rules of pickling.
    """
    if isinstance(module, fx.GraphModule):
        return copy.copy(module)
    clone: nn.Module = module.__class__.__new__(module.__class__)
    clone.__dict__.update(_own_containers(module.__dict__))
    return clone


def clone_tree(module: nn.Module) -> nn.Module:
    """A copy of a module and of everything below it, but of none of their tensors."""
    clone = clone_module(module)
    _clone_children(module, clone)
    return clone


def fork(gm: fx.GraphModule) -> fx.GraphModule:
    """Copy a graph and its tree of modules, but none of its parameters and buffers.

    Edits of the copy (nodes, submodules, a module's attributes, which tensors it holds, its mode and hooks) leave the
    original alone. Writing into a tensor would not.

    Args:
        gm: Any GraphModule.

    Returns:
        A GraphModule that computes the same from the very same tensors.
    """
    twin = same_modules(gm)
    _clone_children(gm, twin)
    return twin


def same_modules(gm: fx.GraphModule) -> fx.GraphModule:
    """Copy the nodes of a graph alone; the copy calls the very same modules, and another may be added to it."""
    twin = _empty_twin(gm)
    twin.__dict__.update(_own_containers(_state(gm)))
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


def _clone_children(module: nn.Module, clone: nn.Module) -> None:
    """Replace all modules below ``clone`` by copies; a module under several names stays one module."""
    clones: dict[int, nn.Module] = {id(module): clone}
    pending = [clone]
    while pending:
        holder = pending.pop()
        for name, child in holder._modules.items():
            if child is None:
                continue
            if id(child) not in clones:
                clones[id(child)] = clone_module(child)
                pending.append(clones[id(child)])
            holder._modules[name] = clones[id(child)]


def _empty_twin(gm: fx.GraphModule) -> fx.GraphModule:
    return CanonicalGraph(nn.Module(), fx.Graph(), type(gm).__name__)


def _state(gm: fx.GraphModule) -> dict[str, Any]:
    """What a GraphModule holds besides its graph and what is made from it."""
    return {name: value for name, value in gm.__dict__.items() if name not in _OWN_TO_A_GRAPH_MODULE}


def _copy_graph(graph: fx.Graph) -> fx.Graph:
    """The nodes and how arguments are packed and unpacked; the latter is shared, for nobody changes it."""
    twin = fx.Graph(tracer_cls=graph._tracer_cls)
    nodes: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        nodes[node] = twin.node_copy(node, nodes.__getitem__)
    twin.set_codegen(copy.copy(graph._codegen))
    return twin


def _own_containers(state: dict[str, Any]) -> dict[str, Any]:
    found = dict(state)
    for name, value in state.items():
        if type(value) in _PLAIN:
            found[name] = value.copy()
        elif isinstance(value, _CONTAINERS):
            found[name] = copy.copy(value)
    return found


_PLAIN = frozenset((dict, list, set, OrderedDict))
_CONTAINERS = (dict, list, set)
