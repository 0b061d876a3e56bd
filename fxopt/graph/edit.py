"""The only mutators of a canonical graph.

A sequence of edits ends with :func:`finish`, which removes what became dead, lints, recompiles and recomputes shapes.
Modules are never changed in place, for they may be the user's own: a changed copy takes their place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from fxopt.errors import VerifyError
from fxopt.graph._copies import clone_module, fork, own_copy
from fxopt.graph._resizing import propagate_sizes
from fxopt.graph.shapes import propagate, shape

__all__ = [
    "clone_module",
    "erase",
    "finish",
    "fork",
    "free_path",
    "insert_function",
    "insert_get_attr",
    "insert_module",
    "own_copy",
    "replace_module",
    "replace_tensor",
    "replace_uses",
    "set_argument",
    "shape",
]


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
    """Put ``tensor`` in the place of the parameter, buffer or constant at ``path``, keeping its kind.

    A copy of the module that holds it takes that module's place in the graph; the module itself is left alone.

    Raises:
        VerifyError: If no tensor stands at ``path``.
    """
    owner_path, name, held = _held_tensor(gm, path)
    owner: nn.Module = gm
    if owner_path:
        owner = clone_module(gm.get_submodule(owner_path))
        replace_module(gm, owner_path, owner)
    if name in owner._parameters:
        owner._parameters[name] = (
            tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, held.requires_grad)
        )
    elif name in owner._buffers:
        owner._buffers[name] = tensor
    else:
        setattr(owner, name, tensor)


def insert_get_attr(gm: fx.GraphModule, path: str, tensor: torch.Tensor | None = None) -> fx.Node:
    """Read the parameter or buffer at ``path`` ahead of all other nodes.

    Args:
        gm: The graph.
        path: Where the tensor stands, or is to stand.
        tensor: A new tensor to put there first, as a buffer of the graph that its state_dict leaves out; ``path`` is
            then a free name without dots.

    Raises:
        VerifyError: If no tensor stands at ``path``, or if one is to be put where something is already.
    """
    if tensor is not None:
        if "." in path or _is_taken(gm, path):
            raise VerifyError(f"{path!r} is no free name for a buffer of the graph; choose another one.")
        gm.register_buffer(path, tensor, persistent=False)
    _held_tensor(gm, path)
    with gm.graph.inserting_before(next(iter(gm.graph.nodes))):
        return gm.graph.get_attr(path)


def _held_tensor(gm: fx.GraphModule, path: str) -> tuple[str, str, torch.Tensor]:
    """Path of the owner, name in it, and the tensor at ``path``."""
    owner_path, _, name = path.rpartition(".")
    try:
        held = getattr(gm.get_submodule(owner_path), name)
    except AttributeError:
        held = None
    if not isinstance(held, torch.Tensor):
        raise VerifyError(f"No tensor {path!r} in the graph; name one by its path in the state_dict.")
    return owner_path, name, held


def insert_module(gm: fx.GraphModule, path: str, module: nn.Module, after: fx.Node, args: Sequence[Any]) -> fx.Node:
    """Add ``module`` at the free ``path`` and call it with ``args`` right after the node ``after``.

    Raises:
        VerifyError: If something stands at ``path`` already.
    """
    if _is_taken(gm, path):
        raise VerifyError(f"Something stands at {path!r} already; take fxopt.graph.edit.free_path(gm, {path!r}).")
    gm.add_submodule(path, module)
    with gm.graph.inserting_after(_last_input(gm, after)):
        node = gm.graph.call_module(path, tuple(args))
    node.meta["nn_module_stack"] = after.meta.get("nn_module_stack", {})
    return node


def insert_function(
    gm: fx.GraphModule,
    target: Callable[..., Any],
    after: fx.Node,
    args: Sequence[Any],
    name: str | None = None,
    kwargs: Mapping[str, Any] | None = None,
) -> fx.Node:
    """Call the ATen operator ``target`` right after ``after``, by ``name`` if that is free."""
    with gm.graph.inserting_after(_last_input(gm, after)):
        return gm.graph.create_node("call_function", target, tuple(args), dict(kwargs or {}), name=name)


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
    """``stem``, or ``stem_1``, ``stem_2`` ... if a module, a tensor or another attribute stands there already."""
    path, count = stem, 0
    while _is_taken(gm, path):
        count += 1
        path = f"{stem}_{count}"
    return path


def _is_taken(gm: fx.GraphModule, path: str) -> bool:
    owner, _, name = path.rpartition(".")
    try:
        return hasattr(gm.get_submodule(owner), name)
    except AttributeError:
        return False


def finish(gm: fx.GraphModule, resized: bool = False) -> None:
    """End a sequence of edits: remove dead nodes, lint, recompile, recompute shapes.

    Args:
        gm: The edited graph.
        resized: Whether the edits changed numbers of channels and nothing else: parameters are smaller, and attributes
            and arguments tell their new sizes. Shapes are found a good deal faster then.

    Raises:
        VerifyError: If the edited graph is malformed or its shapes do not fit; the message names the node.
    """
    try:
        # It lints before it looks for dead nodes.
        if gm.graph.eliminate_dead_code():
            gm.graph.lint()
    except (RuntimeError, ValueError) as failure:
        raise VerifyError(f"The edited graph is malformed: {failure}") from failure
    gm.recompile()
    (propagate_sizes if resized else propagate)(gm)


def _last_input(gm: fx.GraphModule, after: fx.Node) -> fx.Node:
    """The node to insert behind: behind an input of the graph, that is the last of the inputs at its head."""
    last = after
    leading = False
    for candidate in gm.graph.nodes:
        if candidate.op not in ("placeholder", "get_attr"):
            break
        last = candidate
        leading = leading or candidate is after
    return last if leading else after
