"""The only mutators of a canonical graph.

A sequence of edits ends with :func:`finish`, which removes what became dead, lints, recompiles and recomputes shapes.
Modules are never changed in place, for they may be the user's own: a changed copy takes their place.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn

from fxopt.errors import VerifyError
from fxopt.graph.shapes import propagate, shape

__all__ = [
    "clone_module",
    "erase",
    "finish",
    "free_path",
    "insert_function",
    "insert_module",
    "replace_module",
    "replace_tensor",
    "replace_uses",
    "set_argument",
    "shape",
]


def clone_module(module: nn.Module) -> nn.Module:
    """A shallow copy of a module: same parameters and buffers, its own dictionaries to change them in."""
    clone = copy.copy(module)
    for name in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
        clone.__dict__[name] = copy.copy(module.__dict__[name])
    return clone


def replace_module(gm: fx.GraphModule, path: str, module: nn.Module) -> None:
    """Put ``module`` in the place of the one at ``path``; every call of that path now calls it.

    Raises:
        VerifyError: If there is no module at ``path``.
    """
    try:
        gm.get_submodule(path)
    except AttributeError as failure:
        raise VerifyError(f"No module {path!r} in the graph; name a site by its module path.") from failure
    gm.set_submodule(path, module)


def replace_tensor(gm: fx.GraphModule, path: str, tensor: torch.Tensor) -> None:
    """Put ``tensor`` in the place of the parameter, buffer or constant at ``path``, keeping its kind."""
    owner_path, _, name = path.rpartition(".")
    owner = gm.get_submodule(owner_path)
    if name in owner._parameters:
        owner.register_parameter(name, tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor))
    elif name in owner._buffers:
        owner._buffers[name] = tensor
    else:
        setattr(owner, name, tensor)


def insert_module(gm: fx.GraphModule, path: str, module: nn.Module, after: fx.Node, args: Sequence[Any]) -> fx.Node:
    """Add ``module`` at the free ``path`` and call it with ``args`` right after the node ``after``.

    Raises:
        VerifyError: If something stands at ``path`` already.
    """
    if path in dict(gm.named_modules()):
        raise VerifyError(f"There is a module {path!r} already; take fxopt.graph.edit.free_path(gm, {path!r}).")
    gm.add_submodule(path, module)
    with gm.graph.inserting_after(_last_input(gm, after)):
        node = gm.graph.call_module(path, tuple(args))
    node.meta["nn_module_stack"] = after.meta.get("nn_module_stack", {})
    return node


def insert_function(gm: fx.GraphModule, target: Callable[..., Any], after: fx.Node, args: Sequence[Any]) -> fx.Node:
    """Call the ATen operator ``target`` with ``args`` right after the node ``after``."""
    with gm.graph.inserting_after(_last_input(gm, after)):
        return gm.graph.call_function(target, tuple(args))


def replace_uses(node: fx.Node, new: fx.Node, except_: Sequence[fx.Node] = ()) -> None:
    """Let every user of ``node`` but ``new`` itself and those in ``except_`` read ``new``."""
    kept = {new, *except_}
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user not in kept)


def set_argument(node: fx.Node, index: int, value: Any) -> None:
    """Replace one positional argument of a call."""
    node.update_arg(index, value)


def erase(gm: fx.GraphModule, node: fx.Node) -> None:
    """Erase a node that nobody reads and, with it, its module if no other node calls it.

    Raises:
        VerifyError: If the node is still read.
    """
    if node.users:
        raise VerifyError(f"Cannot erase {node.name!r}: {', '.join(user.name for user in node.users)} still read it.")
    gm.graph.erase_node(node)
    if node.op == "call_module" and not gm.graph.find_nodes(op="call_module", target=node.target):
        gm.delete_submodule(str(node.target))


def free_path(gm: fx.GraphModule, stem: str) -> str:
    """``stem``, or ``stem_1``, ``stem_2`` ... if something stands there already."""
    taken = {name for name, _ in gm.named_modules()}
    path, count = stem, 0
    while path in taken:
        count += 1
        path = f"{stem}_{count}"
    return path


def finish(gm: fx.GraphModule) -> None:
    """End a sequence of edits: remove dead nodes, lint, recompile, recompute shapes.

    Raises:
        VerifyError: If the edited graph is malformed or its shapes do not fit; the message names the node.
    """
    gm.graph.eliminate_dead_code()
    try:
        gm.graph.lint()
    except (RuntimeError, ValueError) as failure:
        raise VerifyError(f"The edited graph is malformed: {failure}") from failure
    gm.recompile()
    propagate(gm)


def _last_input(gm: fx.GraphModule, after: fx.Node) -> fx.Node:
    """A node to insert behind: calls come after all placeholders and parameters."""
    if after.op not in ("placeholder", "get_attr"):
        return after
    node = after
    for candidate in gm.graph.nodes:
        if candidate.op in ("placeholder", "get_attr"):
            node = candidate
        else:
            break
    return node if node.op in ("placeholder", "get_attr") else after
