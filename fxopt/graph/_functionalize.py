"""In-place operators to out-of-place ones, where no other name of the same memory is read afterwards."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import fx, nn

__all__ = ["functional_form", "functionalize"]


_ABOUT_MEMORY = frozenset(("copy_", "set_", "resize_"))
"""In-place operators whose out-of-place forms have no derivative."""


def functionalize(gm: fx.GraphModule) -> None:
    """Replace in-place calls and in-place modules of ``gm`` by their out-of-place forms.

    An in-place call whose memory is read later under another name than the call's own input (a view, a buffer) is
    left as it is: the operator table calls it a barrier.
    """
    roots: dict[fx.Node, fx.Node] = {}
    aliases: dict[fx.Node, list[fx.Node]] = {}
    order = {node: index for index, node in enumerate(gm.graph.nodes)}
    copies: dict[str, nn.Module] = {}
    for node in list(gm.graph.nodes):
        root = roots.get(_aliased_input(gm, node) or node, node)
        roots[node] = root
        source = _inplace_input(gm, node)
        if source is not None and _replace_later_uses(node, source, aliases.get(root, [source]), order):
            _make_functional(gm, node, copies)
            roots[node] = node
            root = node
        aliases.setdefault(root, []).append(node)


def _replace_later_uses(node: fx.Node, source: fx.Node, names: list[fx.Node], order: dict[fx.Node, int]) -> bool:
    """Let what reads ``source`` after ``node`` read ``node``; False if other memory names are read later."""
    if source.op == "get_attr":
        return False
    same = [name for name in names if name is source or _is_pass_through(name, source)]
    for name in names:
        if name not in same and any(order[user] > order[node] for user in name.users):
            return False
    for name in same:
        name.replace_all_uses_with(node, delete_user_cb=lambda user: order[user] > order[node])
    return True


def _is_pass_through(name: fx.Node, source: fx.Node) -> bool:
    """Whether two names of one memory are the same tensor (dropout in eval mode gives its input back)."""
    if any(node.target is torch.ops.aten.detach.default for node in (name, source)):
        return False
    mine, other = name.meta.get("val"), source.meta.get("val")
    if not isinstance(mine, torch.Tensor) or not isinstance(other, torch.Tensor):
        return False
    return mine.shape == other.shape and mine.stride() == other.stride()


def _inplace_input(gm: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        source = node.args[0] if getattr(module, "inplace", False) else None
    elif functional_form(node.target) is not None:
        source = node.args[0]
    else:
        return None
    return source if isinstance(source, fx.Node) else None


def functional_form(target: object) -> torch._ops.OpOverload | None:
    """The out-of-place overload of an in-place ATen operator, None for anything else."""
    if not isinstance(target, torch._ops.OpOverload):
        return None
    name = target._schema.name.partition("::")[2]
    if not target._schema.is_mutable or not name.endswith("_") or name.startswith("_") or name in _ABOUT_MEMORY:
        return None
    packet = getattr(torch.ops.aten, name[:-1], None)
    return getattr(packet, target._overloadname, None) if packet is not None else None


def _make_functional(gm: fx.GraphModule, node: fx.Node, copies: dict[str, nn.Module]) -> None:
    if node.op == "call_module":
        path = str(node.target)
        if path not in copies:
            module: Any = copy.copy(gm.get_submodule(path))
            module.inplace = False
            copies[path] = module
            gm.add_submodule(path, module)
        return
    form = functional_form(node.target)
    if form is not None:
        node.target = form


def _aliased_input(gm: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """The input whose memory the node's value may share."""
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        shares = isinstance(module, (nn.Identity, nn.Flatten, nn.modules.dropout._DropoutNd))
        shares = shares or getattr(module, "inplace", False)
        source = node.args[0] if shares else None
    elif isinstance(node.target, torch._ops.OpOverload):
        arguments = node.target._schema.arguments
        shares = bool(arguments) and arguments[0].alias_info is not None
        may_share = node.target in (torch.ops.aten.reshape.default, torch.ops.aten.contiguous.default)
        may_share = may_share or node.target.overloadpacket in (torch.ops.aten.to, torch.ops.aten.flatten)
        may_share = may_share or node.target is torch.ops.aten.dropout.default
        source = node.args[0] if (shares or may_share) and node.args else None
    else:
        source = node.args[0] if node.op == "call_function" and node.args else None
    return source if isinstance(source, fx.Node) else None
