"""Where two graphs can be compared: values that teacher and student share by name."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from fxopt.errors import DataError, UnknownNameError
from fxopt.graph import ops

__all__ = ["Place", "shared_places"]

_IN_DIMENSION_1 = ("conv", "conv_transpose", "functional_conv", "norm_channels", "functional_norm", "norm_groups")
_IN_THE_LAST = ("linear", "functional_linear", "embedding", "functional_embedding", "norm_across")
_SAME_LAYOUT = ("unary", "broadcast", "spatial", "cat")


@dataclass(frozen=True)
class Place:
    """A value that two graphs have.

    Attributes:
        name: What it is called: the path of the module it comes from, or the node's name.
        student: The student's node.
        teacher: The teacher's node.
        channels: The dimension of the channels.
        equal: Whether the shapes are equal, channels included.
    """

    name: str
    student: str
    teacher: str
    channels: int
    equal: bool


def shared_places(student: nn.Module, teacher: nn.Module, patterns: tuple[str, ...] | None) -> list[Place]:
    """Values with channels and positions, whose positions agree in both graphs, in the order of the student's graph.

    Args:
        student: A graph.
        teacher: Another.
        patterns: Patterns of module paths and names of nodes; None for the outputs of blocks.

    Raises:
        DataError: If one of them is no graph.
        UnknownNameError: If a pattern matches nothing that both have.
    """
    mine, other = _graph(student, "The model"), _graph(teacher, "The teacher")
    found, theirs = _named(mine), _named(other)
    shared = {name: node for name, node in found.items() if name in theirs}
    chosen = _blocks(mine, theirs) if patterns is None else _matching(shared, patterns)
    places: dict[fx.Node, Place] = {}
    for name, node in chosen.items():
        place = _place(name, mine, node, theirs[name])
        if place is not None:
            places.setdefault(node, place)
    return list(places.values())


def _graph(model: nn.Module, what: str) -> fx.GraphModule:
    if isinstance(model, fx.GraphModule) and all("val" in n.meta for n in model.graph.find_nodes(op="placeholder")):
        return model
    raise DataError(
        f"{what} is a {type(model).__name__}; feature and attention maps are compared in graphs, so give what "
        "fxopt.trace makes of it."
    )


def _named(gm: fx.GraphModule) -> dict[str, fx.Node]:
    """Nodes by the path of the module whose last value they are, and by their own name."""
    paths: dict[str, fx.Node] = {}
    names: dict[str, fx.Node] = {}
    for node in gm.graph.nodes:
        if not _is_value(node):
            continue
        if node.op == "call_module":
            paths[str(node.target)] = node
        for path, _ in (node.meta.get("nn_module_stack") or {}).values():
            if path:
                paths[str(path)] = node
        names[node.name] = node
    return paths | {name: node for name, node in names.items() if name not in paths}


def _is_value(node: fx.Node) -> bool:
    value = node.meta.get("val")
    computed = node.op in ("call_module", "call_function")
    return computed and isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() >= 3


def _matching(shared: dict[str, fx.Node], patterns: tuple[str, ...]) -> dict[str, fx.Node]:
    chosen: dict[str, fx.Node] = {}
    for pattern in patterns:
        hits = {name: node for name, node in shared.items() if fnmatch.fnmatchcase(name, pattern)}
        if not hits:
            raise UnknownNameError("place to distill at, among those that both graphs have,", pattern, shared)
        chosen |= hits
    order = {node: index for index, node in enumerate(shared.values())}
    return dict(sorted(chosen.items(), key=lambda item: order[item[1]]))


def _blocks(gm: fx.GraphModule, theirs: dict[str, fx.Node]) -> dict[str, fx.Node]:
    """Sums of a residual stream, and the last value of each spatial size."""
    last: dict[tuple[int, ...], fx.Node] = {}
    sums = []
    for node in gm.graph.nodes:
        if not _is_value(node) or node.name not in theirs:
            continue
        channels = _channels(gm, node)
        if channels is None:
            continue
        if _is_sum(gm, node):
            sums.append(node)
        if node.meta["val"].dim() >= 4:
            last[_positions(node, channels)] = node
    wanted = {*sums, *last.values()}
    return {node.name: node for node in gm.graph.nodes if node in wanted}


def _is_sum(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node adds two values of the same shape that were both computed."""
    sources = node.all_input_nodes
    if ops.semantics(gm, node).name != "add" or len(sources) != 2 or not all(_is_value(one) for one in sources):
        return False
    return all(one.meta["val"].shape == node.meta["val"].shape for one in sources)


def _place(name: str, gm: fx.GraphModule, mine: fx.Node, other: fx.Node) -> Place | None:
    """Where the positions of two values agree; None if they do not, or if there is but one position."""
    value, wanted = mine.meta["val"], other.meta["val"]
    if value.dim() != wanted.dim():
        return None
    channels = _channels(gm, mine)
    if channels is None:
        differing = [index for index in range(1, value.dim()) if value.shape[index] != wanted.shape[index]]
        channels = differing[0] if len(differing) == 1 else value.dim() - 1 if value.dim() == 3 else 1
    positions = _positions(mine, channels)
    if positions != _positions(other, channels) or all(size == 1 for size in positions):
        return None
    return Place(name, mine.name, other.name, channels, bool(value.shape[1:] == wanted.shape[1:]))


def _positions(node: fx.Node, channels: int) -> tuple[int, ...]:
    sizes: Any = node.meta["val"].shape
    return tuple(int(size) for index, size in enumerate(sizes) if index not in (0, channels))


def _channels(gm: fx.GraphModule, node: fx.Node) -> int | None:
    """The dimension of a value's channels, told by a layer that makes or reads it; None if none does."""
    rank = int(node.meta["val"].dim())
    pending, seen = [node], {node}
    while pending:
        one = pending.pop()
        flow = ops.semantics(gm, one).flow
        told = _told(flow, rank)
        if told is not None:
            return told
        if flow in _SAME_LAYOUT:
            sources = [source for source in one.all_input_nodes if source not in seen and _is_value(source)]
            sources = [source for source in sources if source.meta["val"].dim() == rank]
            seen.update(sources)
            pending.extend(reversed(sources))
    readers = (_told(ops.semantics(gm, user).flow, rank) for user in node.users)
    return next((told for told in readers if told is not None), None)


def _told(flow: str, rank: int) -> int | None:
    if flow in _IN_DIMENSION_1:
        return 1
    return rank - 1 if flow in _IN_THE_LAST else None
