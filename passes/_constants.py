"""Constants of a graph: compute now what depends on nothing else, and keep one of each."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn

from fxopt.graph import edit, eval_mode, ops

__all__ = ["fold_constants", "merge_constants"]

_STEM = "folded_constant"


def fold_constants(gm: fx.GraphModule, *, parameters: bool, max_elements: int) -> bool:
    """Replace computations on constants alone by buffers that hold their results; the caller finishes the edit.

    Args:
        gm: A graph that writes nothing in place.
        parameters: Whether parameters, and modules that hold state, count as constants.
        max_elements: Results larger than this stay computed.

    Returns:
        Whether anything was folded.
    """
    constants = _constant_nodes(gm, parameters, max_elements)
    values: dict[fx.Node, Any] = {}
    folded = False
    for node in constants:
        if node.op == "get_attr" or all(user in constants for user in node.users):
            continue
        value = _compute(gm, node, values)
        if value is not None:
            _replace_by_buffer(gm, node, value)
            folded = True
    return folded


def merge_constants(gm: fx.GraphModule) -> bool:
    """Read every constant once, and keep one of the folded constants that are equal; unused ones are deleted."""
    first: dict[object, fx.Node] = {}
    merged = False
    for node in list(gm.graph.find_nodes(op="get_attr")):
        key = _identity(gm, node)
        keep = first.setdefault(key, node)
        if keep is not node:
            edit.replace_uses(node, keep)
            edit.erase(gm, node)
            merged = True
    read = {str(node.target) for node in gm.graph.find_nodes(op="get_attr") if node.users}
    for name in [name for name in gm._buffers if _is_folded(name) and name not in read]:
        for node in [node for node in gm.graph.find_nodes(op="get_attr") if node.target == name]:
            edit.erase(gm, node)
        delattr(gm, name)
        merged = True
    return merged


def _constant_nodes(gm: fx.GraphModule, parameters: bool, max_elements: int) -> dict[fx.Node, None]:
    """The constant nodes, in graph order."""
    called = {str(node.target) for node in gm.graph.find_nodes(op="call_module")}
    found: dict[fx.Node, None] = {}
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            constant = _is_constant_attribute(gm, str(node.target), called, parameters)
        else:
            inputs = node.all_input_nodes
            constant = all(source in found for source in inputs) and _is_foldable(gm, node, parameters)
            constant = constant and _elements(node) <= max_elements
            constant = constant and all(user.op != "output" for user in node.users)
        if constant:
            found[node] = None
    return found


def _is_constant_attribute(gm: fx.GraphModule, path: str, called: set[str], parameters: bool) -> bool:
    owner = path.rpartition(".")[0]
    if not isinstance(operator.attrgetter(path)(gm), torch.Tensor):
        return False
    if parameters:
        return True
    # A module that is called may write into its own buffers, as batch norm does.
    return not isinstance(operator.attrgetter(path)(gm), nn.Parameter) and owner not in called


def _is_foldable(gm: fx.GraphModule, node: fx.Node, parameters: bool) -> bool:
    if node.op == "call_module":
        stateless = not gm.get_submodule(str(node.target)).state_dict()
        return parameters or (stateless and ops.is_activation(gm, node))
    if node.op != "call_function":
        return False
    if node.target is operator.getitem:
        return True
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    tags = node.target.tags
    return not (node.target._schema.is_mutable or torch.Tag.nondeterministic_seeded in tags)


def _elements(node: fx.Node) -> int:
    value = node.meta.get("val")
    return value.numel() if isinstance(value, torch.Tensor) else 0


def _compute(gm: fx.GraphModule, node: fx.Node, values: dict[fx.Node, Any]) -> torch.Tensor | None:
    """The value of a constant node, or None if it cannot be had now or is not what the graph says."""
    try:
        with torch.no_grad(), eval_mode(gm):
            value = _evaluate(gm, node, values)
    except Exception:
        return None
    expected = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or not isinstance(expected, torch.Tensor):
        return None
    if value.dtype != expected.dtype or value.shape != expected.shape or value.device != expected.device:
        return None
    return value.detach().clone(memory_format=torch.contiguous_format)


def _evaluate(gm: fx.GraphModule, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    pending = [node]
    while pending:
        current = pending[-1]
        missing = [source for source in current.all_input_nodes if source not in values]
        if missing:
            pending += missing
            continue
        values[pending.pop()] = _call(gm, current, values)
    return values[node]


def _call(gm: fx.GraphModule, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    if node.op == "get_attr":
        return operator.attrgetter(str(node.target))(gm)
    args = fx.node.map_arg(node.args, values.__getitem__)
    kwargs = fx.node.map_arg(node.kwargs, values.__getitem__)
    function: Any = gm.get_submodule(str(node.target)) if node.op == "call_module" else node.target
    return function(*args, **kwargs)


def _replace_by_buffer(gm: fx.GraphModule, node: fx.Node, value: torch.Tensor) -> None:
    number = 0
    while hasattr(gm, f"{_STEM}_{number}"):
        number += 1
    name = f"{_STEM}_{number}"
    constant = edit.insert_get_attr(gm, name, value)
    constant.meta["val"] = node.meta["val"]
    edit.replace_uses(node, constant)


def _is_folded(path: str) -> bool:
    stem, _, number = path.rpartition("_")
    return stem == _STEM and number.isdigit()


def _identity(gm: fx.GraphModule, node: fx.Node) -> object:
    """What makes two reads the same constant: the attribute, or for a folded one its value."""
    path = str(node.target)
    if not _is_folded(path):
        return path
    value = gm.get_buffer(path)
    data = value.cpu().reshape(-1).view(torch.uint8).numpy().tobytes()
    return (value.dtype, tuple(value.shape), str(value.device), data)
