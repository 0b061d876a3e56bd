"""How channels flow through views, copies and reductions: by indexing the labels as the operator indexes the tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import fx

from fxopt.graph._flow import FROZEN, Atoms, Constant, Flow, Labels, barrier, first, frozen_output, size_of

__all__ = ["cat", "expand", "getitem", "pad", "permute", "reduce", "reshape", "select", "slice_", "split"]

_aten = torch.ops.aten
_SIZED_VIEWS = (_aten.view, _aten.reshape, _aten._unsafe_view)


def permute(flow: Flow, gm: fx.GraphModule, node: fx.Node, reason: str) -> Any:
    source = first(node)
    if source is None:
        return barrier(flow, gm, node, reason)
    order = list(range(len(size_of(source))))
    if len(node.args) == 2 and isinstance(node.args[1], (list, tuple)):
        order = [int(dim) for dim in node.args[1]]
    else:
        one, other = (0, 1) if len(node.args) == 1 else (int(node.args[1]), int(node.args[2]))  # type: ignore[arg-type]
        order[one], order[other] = order[other], order[one]
    return [flow.labels[source][dim] for dim in order]


def cat(flow: Flow, gm: fx.GraphModule, node: fx.Node, reason: str) -> Any:
    sources = node.args[0]
    if not isinstance(sources, (list, tuple)) or not all(isinstance(source, fx.Node) for source in sources):
        return barrier(flow, gm, node, reason)
    nodes: list[fx.Node] = [source for source in sources if isinstance(source, fx.Node)]
    rank = len(size_of(node))
    dim = int(node.args[1]) % rank if len(node.args) > 1 else 0  # type: ignore[arg-type]
    result: Labels = []
    for axis in range(rank):
        parts = [(flow.labels[source][axis], size_of(source)[axis]) for source in nodes]
        if axis == dim:
            loose = any(atoms is not None for atoms, _ in parts)
            filled = [np.full(size, FROZEN) if atoms is None else atoms for atoms, size in parts]
            result.append(np.concatenate(filled) if loose else None)
            continue
        for atoms, _ in parts[1:]:
            flow.link(parts[0][0], atoms, reason)
        result.append(parts[0][0] if all(atoms is not None for atoms, _ in parts) else None)
    return result


def split(flow: Flow, gm: fx.GraphModule, node: fx.Node, reason: str) -> Any:
    source = first(node)
    values = node.meta.get("val")
    if source is None or not isinstance(values, (list, tuple)):
        return barrier(flow, gm, node, reason)
    rank = len(size_of(source))
    dim = int(node.args[2]) % rank if len(node.args) > 2 else 0  # type: ignore[arg-type]
    labels = flow.labels[source]
    sizes = [int(value.shape[dim]) for value in values]
    atoms = labels[dim]
    if atoms is None:
        return [list(labels) for _ in sizes]
    parts = np.split(atoms, np.cumsum(sizes)[:-1])
    if isinstance(node.args[1], (list, tuple)):
        flow.constants += [Constant(node, 1, position, part) for position, part in enumerate(parts)]
    elif len(set(sizes)) > 1:
        flow.freeze(atoms, reason)
    else:
        for part in parts[1:]:
            flow.link(parts[0], part, reason)
        if getattr(node.target, "overloadpacket", None) is not torch.ops.aten.chunk:
            flow.constants.append(Constant(node, 1, None, parts[0]))
    return [[*labels[:dim], part, *labels[dim + 1 :]] for part in parts]


def getitem(flow: Flow, gm: fx.GraphModule, node: fx.Node, reason: str) -> Any:
    source, index = node.args[0], node.args[1]
    if isinstance(source, fx.Node) and isinstance(index, int) and not isinstance(source.meta.get("val"), torch.Tensor):
        return flow.labels[source][index] if flow.labels[source] else frozen_output(node)
    return barrier(flow, gm, node, reason)


def slice_(flow: Flow, gm: fx.GraphModule, node: fx.Node, reason: str) -> Any:
    source = first(node)
    arguments = [*node.args[1:], *([0, None, None, 1][len(node.args) - 1 :])]
    if source is None or any(isinstance(value, fx.Node) for value in arguments):
        return _slice_unknown(flow, node, source, reason)
    dim, start, end, step = cast("tuple[int, int | None, int | None, int]", tuple(arguments))
    labels = list(flow.labels[source])
    dim = dim % len(labels)
    atoms = labels[dim]
    if atoms is None:
        return labels
    size = len(atoms)
    begin, stop, stride = slice(start, end, step).indices(size)
    if stride != 1:
        flow.freeze(atoms, reason)
        return frozen_output(node)
    if begin > 0:
        flow.constants.append(Constant(node, 2, None, atoms[:begin]))
    if stop < size:
        flow.constants.append(Constant(node, 3, None, atoms[:stop]))
    labels[dim] = atoms[begin:stop]
    return labels


def _slice_unknown(flow: Flow, node: fx.Node, source: fx.Node | None, reason: str) -> Any:
    """A slice whose bounds are computed: its own dimension is frozen, the others pass."""
    dim = node.args[1] if len(node.args) > 1 else 0
    if source is None or not isinstance(dim, int):
        return frozen_output(node)
    labels = list(flow.labels[source])
    flow.freeze(labels[dim], reason)
    labels[dim] = None
    return labels


def select(flow: Flow, gm: fx.GraphModule, node: fx.Node, reason: str) -> Any:
    source = first(node)
    dim = node.args[1] if len(node.args) > 1 else None
    if source is None or not isinstance(dim, int):
        return barrier(flow, gm, node, reason)
    labels = list(flow.labels[source])
    flow.freeze(labels.pop(dim), reason)
    return labels


def pad(flow: Flow, gm: fx.GraphModule, node: fx.Node, reason: str) -> Any:
    source = first(node)
    widths = node.args[1] if len(node.args) > 1 else None
    if source is None or not isinstance(widths, (list, tuple)):
        return barrier(flow, gm, node, reason)
    labels = list(flow.labels[source])
    for offset in range(len(widths) // 2):
        dim = len(labels) - 1 - offset
        flow.freeze(labels[dim], reason)
        labels[dim] = None
    return labels


def reduce(flow: Flow, gm: fx.GraphModule, node: fx.Node, reason: str) -> Any:
    """A mean or a sum over some dimensions; what is summed over is frozen."""
    source = first(node)
    rank = len(size_of(source)) if source is not None else 0
    dims = node.args[1] if len(node.args) > 1 else None
    if source is None or not isinstance(dims, (list, tuple)) or not all(isinstance(dim, int) for dim in dims):
        return barrier(flow, gm, node, reason)
    gone = {int(dim) % rank for dim in dims} or set(range(rank))
    kept = len(size_of(node)) == rank
    result: Labels = []
    for dim, atoms in enumerate(flow.labels[source]):
        if dim not in gone:
            result.append(atoms)
            continue
        flow.freeze(atoms, reason)
        if kept:
            result.append(None)
    return result


def expand(flow: Flow, gm: fx.GraphModule, node: fx.Node, reason: str) -> Any:
    source = first(node)
    if source is None:
        return barrier(flow, gm, node, reason)
    size, extent = size_of(node), size_of(source)
    labels: Labels = [None] * (len(size) - len(extent)) + list(flow.labels[source])
    if len(node.args) > 1 and isinstance(node.args[1], (list, tuple)):
        _count_sizes(flow, node, labels, reason)
    return labels


def _count_sizes(flow: Flow, node: fx.Node, labels: Labels, reason: str) -> None:
    """Remember the sizes in a call's second argument that count atoms; computed ones freeze them."""
    sizes: Any = node.args[1]
    for dim, atoms in enumerate(labels):
        if atoms is None or sizes[dim] == -1:
            continue
        if isinstance(sizes[dim], int):
            flow.constants.append(Constant(node, 1, dim, atoms))
            continue
        flow.freeze(atoms, reason)
        labels[dim] = None


def reshape(flow: Flow, gm: fx.GraphModule, node: fx.Node, reason: str) -> Any:
    """Views: a labelled dimension may keep its place or be merged with plain ones; anything else is frozen."""
    source = first(node)
    if source is None:
        return barrier(flow, gm, node, reason)
    labels, old, new = flow.labels[source], size_of(source), size_of(node)
    result: Labels = [None] * len(new)
    for ins, outs in _blocks(old, new):
        loose = [dim for dim in ins if labels[dim] is not None]
        wide = [dim for dim in outs if new[dim] != 1]
        crosses_batch = 0 in ins and len(ins) > 1
        if len(loose) == 1 and len(wide) == 1 and not crosses_batch:
            extent = [old[dim] for dim in ins]
            result[wide[0]] = _merged(labels[loose[0]], extent, list(ins).index(loose[0]))
        else:
            flow.freeze_all([labels[dim] for dim in loose], reason)
    if getattr(node.target, "overloadpacket", None) in _SIZED_VIEWS:
        _count_sizes(flow, node, result, reason)
    return result


def _merged(atoms: Any, extent: list[int], axis: int) -> Atoms:
    """Labels of a merged dimension of which only ``axis`` is labelled."""
    shape = [1] * len(extent)
    shape[axis] = extent[axis]
    full: Atoms = np.broadcast_to(np.asarray(atoms).reshape(shape), extent).reshape(-1)
    return full


def _blocks(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The finest matching of old to new dimensions with equal products, in order."""
    blocks: list[tuple[list[int], list[int]]] = []
    left, right = 0, 0
    while left < len(old) or right < len(new):
        ins, outs = [], []
        if left < len(old):
            ins.append(left)
            left += 1
        if right < len(new):
            outs.append(right)
            right += 1
        while math.prod(old[dim] for dim in ins) != math.prod(new[dim] for dim in outs):
            if math.prod(old[dim] for dim in ins) < math.prod(new[dim] for dim in outs):
                ins.append(left)
                left += 1
            else:
                outs.append(right)
                right += 1
        blocks.append((ins, outs))
    return blocks
