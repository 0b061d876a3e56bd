"""Put candidates in the place of blocks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import fx, nn

from fxopt.errors import PassError, TraceError
from fxopt.graph import edit, ops, propagate
from fxopt.graph import trace as trace_graph
from fxopt.graph.shapes import eval_mode
from fxopt.passes._operator_patterns import Block, blaming
from fxopt.passes._operators import IDENTITY, ORIGINAL, OWN, ZERO, SqueezeExcite, build, fits, is_custom

__all__ = ["SITE_META", "Chosen", "check_custom", "offered", "replace_blocks"]

SITE_META = "fxopt_operator_site"
"""Key of ``node.meta`` under which a node tells the block whose choice it depends on."""

_aten = torch.ops.aten
_EXAMPLE_BATCH = 2


@dataclass(frozen=True, eq=False)
class Chosen:
    """A candidate that is to stand in the place of a block.

    Attributes:
        block: The block.
        name: The candidate's name.
        module: The candidate, or None where it has no layers.
    """

    block: Block
    name: str
    module: nn.Module | None


def offered(gm: fx.GraphModule, block: Block, name: str) -> bool:
    """Whether a candidate can stand in the place of a block.

    Candidates without layers also have to leave the cost of everything else as it is: what the block reads must be
    read by the block alone and still be needed without it, what remains must not share its memory with anything else,
    and must not be computed together with what comes before.

    Raises:
        PassError: If a user's own ``fits`` raises.
    """
    with blaming(f"fits of candidate {name!r}", block.site):
        fitting = fits(name, block.shape)
    if not fitting:
        return False
    if name.startswith(f"{OWN}-"):
        return block.operator == ORIGINAL and _changes_kernel(block, int(name.rpartition("k")[2]))
    if name not in (IDENTITY, ZERO):
        return True
    if not set(block.entry.users) <= set(block.span):
        return False
    partner = block.partner
    if name == IDENTITY or block.join is None or partner is None:
        return _has_own_memory(gm, block.entry)
    if set(block.entry.users) <= set(block.body) or not _has_own_memory(gm, partner):
        return False
    if block.tail is None and _makes_fusable(gm, partner) and any(_fuses(gm, user) for user in block.join.users):
        return False
    if partner is not block.entry:
        return partner in block.span
    if block.tail is None or _drops_tail(gm, block):
        return True
    return not _makes_fusable(gm, block.entry)


def _has_own_memory(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a value is no view of one that something else reads."""
    while node.op.startswith("call_") and ops.semantics(gm, node).is_view:
        sources = node.all_input_nodes
        if len(sources) != 1 or len(sources[0].users) != 1:
            return False
        node = sources[0]
    return True


def _changes_kernel(block: Block, kernel: int) -> bool:
    return any(one.kernel not in (1, kernel) for one in block.units)


def _makes_fusable(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a fusing runtime may compute what follows together with a node."""
    before = ops.semantics(gm, node)
    return before.kind in ("conv", "linear") or before.fuses


def _fuses(gm: fx.GraphModule, node: fx.Node) -> bool:
    return ops.semantics(gm, node).fuses


def replace_blocks(gm: fx.GraphModule, chosen: Mapping[str, Chosen]) -> None:
    """Replace the blocks at some sites, and end the edit."""
    for site, one in chosen.items():
        block = one.block
        if one.name == ZERO:
            _bypass(gm, block)
        elif one.name == IDENTITY:
            edit.replace_uses(block.exit, block.entry)
        else:
            _put(gm, site, one)
        for node in sorted(block.span, key=list(gm.graph.nodes).index, reverse=True):
            gone = node in block.body or node is block.tail or node is block.join
            if gone and not node.users:
                edit.erase(gm, node)
    edit.finish(gm)


def _drops_tail(gm: fx.GraphModule, block: Block) -> bool:
    """Whether the activation behind the addition gives its input back if nothing is added: it has been applied."""
    if block.tail is None or block.partner is not block.entry:
        return False
    one, other = ops.semantics(gm, block.tail), ops.semantics(gm, block.entry)
    return one.name.rstrip("_").lower() == other.name.rstrip("_").lower() in ("relu", "relu6")


def _bypass(gm: fx.GraphModule, block: Block) -> None:
    partner = block.partner
    if block.join is None or partner is None:
        raise PassError(f"{block.site!r} has no shortcut, so that nothing would be left of it.")
    drops = _drops_tail(gm, block)
    edit.replace_uses(block.tail if drops and block.tail is not None else block.join, partner)


def _put(gm: fx.GraphModule, site: str, one: Chosen) -> None:
    block, module = one.block, one.module
    if module is None:
        raise PassError(f"{one.name!r} at {site!r} has no layers to put there.")
    stem = one.name.replace("-", "_")
    is_layer = bool(gm.graph.find_nodes(op="call_module", target=site))
    path = edit.free_path(gm, f"{site}_{stem}" if is_layer else f"{site}.{stem}")
    before = set(gm.graph.nodes)
    new = _inline(gm, path, module, block.entry, block.exit)
    edit.replace_uses(block.exit, new)
    for node in gm.graph.nodes:
        if node not in before:
            node.meta[SITE_META] = site


def _inline(gm: fx.GraphModule, path: str, module: nn.Module, value: fx.Node, after: fx.Node) -> fx.Node:
    """Compute ``module(value)`` behind the node ``after``, in canonical form."""
    if isinstance(module, nn.Sequential):
        for name, child in module.named_children():
            new = _inline(gm, f"{path}.{name}", child, value, after)
            value, after = new, new if new is not value else after
        return value
    if isinstance(module, nn.Identity):
        return value
    if isinstance(module, SqueezeExcite):
        gate, last = value, after
        for name, child in module.steps():
            gate = last = edit.insert_module(gm, f"{path}.{name}", child, last, (gate,))
        product = edit.insert_function(gm, _aten.mul.Tensor, last, (value, gate))
        return product if module.end is None else edit.insert_module(gm, f"{path}.end", module.end, product, (product,))
    if ops.is_known(module):
        return edit.insert_module(gm, path, module, after, (value,))
    return _inline_traced(gm, path, module, value, after)


def _inline_traced(gm: fx.GraphModule, path: str, module: nn.Module, value: fx.Node, after: fx.Node) -> fx.Node:
    """Copy the nodes of any module's own graph."""
    if "val" not in value.meta:
        propagate(gm)
    sizes = (_EXAMPLE_BATCH, *edit.shape(value)[1:])
    like = next(module.parameters(), torch.zeros(()))
    with blaming("A candidate of your own", path), eval_mode(module):
        try:
            inner = trace_graph(module, torch.zeros(sizes, dtype=like.dtype, device=like.device))
        except TraceError as failure:
            raise PassError(f"The candidate for {path!r} cannot be traced: {failure}") from failure
    names: dict[fx.Node, fx.Node] = {}
    for node in inner.graph.nodes:
        if node.op == "placeholder":
            names[node] = value
        elif node.op == "call_module":
            if node.target in (other.target for other in names if other.op == "call_module"):
                raise PassError(f"The candidate for {path!r} uses {node.target!r} twice; give each use its own layer.")
            args = fx.map_arg(node.args, names.__getitem__)
            part = inner.get_submodule(str(node.target))
            after = names[node] = edit.insert_module(gm, f"{path}.{node.target}", part, after, args)
        elif node.op == "call_function":
            args, kwargs = fx.map_arg((node.args, node.kwargs), names.__getitem__)
            after = names[node] = edit.insert_function(gm, node.target, after, args, kwargs=kwargs)
        elif node.op == "get_attr" and not isinstance(tensor := attrgetter(str(node.target))(inner), nn.Parameter):
            free = edit.free_path(gm, f"{path}.{node.target}".replace(".", "_"))
            names[node] = edit.insert_get_attr(gm, free, tensor)
        elif node.op == "output":
            found = [names[source] for source in node.all_input_nodes]
            if len(found) == 1:
                return found[0]
            raise PassError(f"The candidate for {path!r} gives {len(found)} values; it has to give one.")
        else:
            raise PassError(f"The candidate for {path!r} holds a parameter by itself; put it into a module of its own.")
    raise PassError(f"The candidate for {path!r} gives nothing.")


def check_custom(name: str, module: nn.Module, block: Block) -> None:
    """See that a user's candidate keeps the shape of its block, in both modes, and leaves its input as it is.

    Raises:
        PassError: If it is no module, does not keep the shape, fails on an input of the block's size, or writes to it.
    """
    if not is_custom(name):
        return
    given: Any = module
    if not isinstance(given, nn.Module):
        raise PassError(
            f"Candidate {name!r} at {block.site!r} is a {type(given).__name__}; let what register_candidate was given "
            "return a torch.nn.Module."
        )
    if any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers())):
        raise PassError(
            f"Candidate {name!r} at {block.site!r} is on the meta device, without values; let what register_candidate "
            "was given make it on a real one."
        )
    shape, size = block.shape, edit.shape(block.entry)[2:]
    x = torch.linspace(-1.0, 1.0, _EXAMPLE_BATCH * shape.inputs * math.prod(size))
    x = x.reshape(_EXAMPLE_BATCH, shape.inputs, *size)
    given_x = x.clone()
    wanted = (_EXAMPLE_BATCH, shape.outputs, *(-(-one // shape.stride) for one in size))
    modes = [(part, part.training) for part in module.modules()]
    buffers = [
        (part, name, buffer.clone()) for part in module.modules() for name, buffer in part.named_buffers("", False)
    ]
    try:
        for mode, words in ((False, ""), (True, " in training")):
            with (
                torch.no_grad(),
                blaming(f"Candidate {name!r}, given an input of {tuple(x.shape)}{words},", block.site),
            ):
                found = module.train(mode)(x)
            if not isinstance(found, torch.Tensor) or tuple(found.shape) != wanted:
                shown = tuple(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
                raise PassError(
                    f"Candidate {name!r} makes {shown} of an input of {tuple(x.shape)}{words}, and the block "
                    f"{block.site!r} that it would stand in for makes {wanted}. Correct it, or tell "
                    "register_candidate(fits=...) where it can stand."
                )
            if found.dtype != x.dtype:
                raise PassError(
                    f"Candidate {name!r} at {block.site!r} makes {found.dtype} of an input of {x.dtype}{words}; let it "
                    "keep its input's type."
                )
            if not torch.equal(x, given_x):
                raise PassError(
                    f"Candidate {name!r} at {block.site!r} writes to its input, which the block's shortcut may read as "
                    "well. Begin with a copy, such as nn.ReLU(inplace=False)."
                )
    finally:
        for part, training in modes:
            part.training = training
        for part, key, buffer in buffers:
            part._buffers[key] = buffer


def make(name: str, block: Block, builder: Callable[[], nn.Module] | None = None) -> nn.Module:
    """A candidate for a block, its weights unset; checked if it is a user's own.

    Raises:
        PassError: If a user's own cannot be built or does not keep the block's shape.
    """
    with blaming(f"The builder of candidate {name!r}", block.site):
        module = builder() if builder is not None else build(name, block.shape, block.style)
    check_custom(name, module, block)
    return module
