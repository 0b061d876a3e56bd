"""How channels flow through views, copies and reductions: by indexing the labels as the operator indexes the tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import fx

from fxopt.graph import ops
from fxopt.graph._flow import (
    FROZEN,
    Atoms,
    Constant,
    Flow,
    Labels,
    Mixing,
    Product,
    barrier,
    first,
    frozen_output,
    replaced,
    size_of,
)

__all__ = [
    "along",
    "cat",
    "expand",
    "getitem",
    "move_dim",
    "narrow",
    "pad",
    "permute",
    "reduce",
    "reshape",
    "reshape_as",
    "select",
    "slice_",
    "split",
    "unbind",
]

_aten = torch.ops.aten
_SIZED_VIEWS = (_aten.view, _aten.reshape, _aten._unsafe_view)
_NEUTRAL = {"sum": 0.0, "mean": 0.0, "amax": -math.inf, "max": -math.inf, "amin": math.inf, "min": math.inf}
"""What leaves the result of a reduction as it is."""
_LARGEST = 1 << 20
"""Dimensions of more indices that a view merges are frozen: images flattened to rows, not channels."""


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


def move_dim(flow: Flow, gm: fx.GraphModule, node: fx.Node, reason: str) -> Any:
    """Some dimensions go to other places; the others keep their order."""
    source = first(node)
    if source is None:
        return barrier(flow, gm, node, reason)
    rank = len(size_of(source))
    given = ops.arguments(node)
    froms, tos = ([value] if isinstance(value, int) else value for value in (given["source"], given["destination"]))
    places = {int(to) % rank: int(dim) % rank for dim, to in zip(froms, tos, strict=True)}
    others = iter([dim for dim in range(rank) if dim not in places.values()])
    return [flow.labels[source][places[to] if to in places else next(others)] for to in range(rank)]


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
        return replaced(labels, dim, None)
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


def unbind(flow: Flow, gm: fx.GraphModule, node: fx.Node, reason: str) -> Any:
    """Slices of one index each: that dimension is frozen, the others pass."""
    source = first(node)
    values = node.meta.get("val")
    if source is None or not isinstance(values, (list, tuple)):
        return barrier(flow, gm, node, reason)
    labels = list(flow.labels[source])
    flow.freeze(labels.pop(int(ops.arguments(node)["dim"])), reason)
    return [list(labels) for _ in values]


def narrow(flow: Flow, gm: fx.GraphModule, node: fx.Node, reason: str) -> Any:
    """A slice given by its start and length."""
    source = first(node)
    if source is None or not all(isinstance(value, int) for value in node.args[1:4]) or len(node.args) < 4:
        return barrier(flow, gm, node, reason)
    dim, start, length = cast("tuple[int, int, int]", tuple(node.args[1:4]))
    labels = list(flow.labels[source])
    atoms = labels[dim]
    if atoms is None:
        return labels
    start %= len(atoms)
    flow.constants += [
        Constant(node, 2, None, atoms[:start]),
        Constant(node, 3, None, atoms[start : start + length]),
    ]
    return replaced(labels, dim, atoms[start : start + length])


def pad(flow: Flow, gm: fx.GraphModule, node: fx.Node, reason: str) -> Any:
    """Zeros beside channels stay; every other way to pad freezes the dimensions that it changes."""
    source = first(node)
    given = ops.arguments(node)
    widths = given.get("pad")
    if source is None or not isinstance(widths, (list, tuple)):
        return barrier(flow, gm, node, reason)
    labels = list(flow.labels[source])
    constant = given.get("mode", "constant") == "constant"
    for offset in range(len(widths) // 2):
        dim = len(labels) - 1 - offset
        left, right = widths[2 * offset], widths[2 * offset + 1]
        atoms = labels[dim]
        if atoms is None or (left, right) == (0, 0):
            continue
        if constant and isinstance(left, int) and isinstance(right, int) and min(left, right) >= 0:
            labels[dim] = np.concatenate([np.full(left, FROZEN), atoms, np.full(right, FROZEN)])
            continue
        flow.freeze(atoms, reason)
        labels[dim] = None
    return labels


def reduce(flow: Flow, gm: fx.GraphModule, node: fx.Node, reason: str) -> Any:
    """A mean, a sum or a maximum over some dimensions: those may shrink; of what else is reduced, they are frozen."""
    source = first(node)
    rank = len(size_of(source)) if source is not None else 0
    dims: Any = ops.arguments(node).get("dim")
    dims = [dims] if isinstance(dims, int) else dims
    if source is None or not isinstance(dims, (list, tuple)) or not all(isinstance(dim, int) for dim in dims):
        return barrier(flow, gm, node, reason)
    gone = {int(dim) % rank for dim in dims} or set(range(rank))
    value = node.meta.get("val")
    several = isinstance(value, (list, tuple))
    shape = value[0].shape if isinstance(value, (list, tuple)) else size_of(node)
    neutral = _neutral(gm, node, source)
    result: Labels = []
    for dim, atoms in enumerate(flow.labels[source]):
        if dim not in gone:
            result.append(atoms)
            continue
        if neutral is None or atoms is None:
            flow.freeze(atoms, reason)
        else:
            average = ops.semantics(gm, node).name == "mean"
            flow.mixings.append(Mixing(node, 0, dim, atoms, neutral=neutral, average=average))
            if average:
                flow.normalized.append((atoms, reason))
        if len(shape) == rank:
            result.append(None)
    return [list(result) for _ in value] if several else result  # type: ignore[union-attr]


def _neutral(gm: fx.GraphModule, node: fx.Node, source: fx.Node) -> float | None:
    """What a reduction passes over; None if there is no such number, or the result tells where something stood."""
    name = ops.semantics(gm, node).name
    if name == "linalg_vector_norm":
        order = ops.arguments(node)["ord"]
        return 0.0 if isinstance(order, (int, float)) and order > 0 else None
    several = isinstance(node.meta.get("val"), (list, tuple))
    if several and any(user.args[1] != 0 for user in node.users):
        return None
    return _NEUTRAL.get(name) if source.meta["val"].is_floating_point() else None


def along(flow: Flow, gm: fx.GraphModule, node: fx.Node, reason: str) -> Any:
    """What works along one dimension, such as a running sum or a sort: that one is frozen, the others pass."""
    source = first(node)
    dim = ops.arguments(node).get("dim")
    value = node.meta.get("val")
    several = isinstance(value, (list, tuple))
    made: Any = value if isinstance(value, (list, tuple)) else [value]
    if source is None or not isinstance(dim, int) or any(one.dim() != len(size_of(source)) for one in made):
        return barrier(flow, gm, node, reason)
    labels = flow.labels[source]
    flow.freeze(labels[dim], reason)
    passed = [replaced(labels, dim, None) for _ in made]
    return passed if several else passed[0]


def expand(flow: Flow, gm: fx.GraphModule, node: fx.Node, reason: str) -> Any:
    source = first(node)
    if source is None:
        return barrier(flow, gm, node, reason)
    size, extent = size_of(node), size_of(source)
    labels: Labels = [None] * (len(size) - len(extent)) + list(flow.labels[source])
    for dim in range(-len(extent), 0):
        if extent[dim] != size[dim]:
            flow.freeze(labels[dim], reason)
            labels[dim] = None
    if len(node.args) > 1 and isinstance(node.args[1], (list, tuple)):
        _count_sizes(flow, node, labels, reason)
    return labels


def _count_sizes(flow: Flow, node: fx.Node, labels: Labels, reason: str, argument: int = 1, ahead: int = 0) -> None:
    """Remember the sizes in a call that count atoms; one that is computed is left to the view to infer, or freezes.

    Args:
        flow: Where to remember them.
        node: The call.
        labels: Labels of its result.
        reason: The operator.
        argument: Which argument holds the sizes.
        ahead: How many dimensions of the result stand before those of the sizes.
    """
    sizes: Any = node.args[argument]
    for dim, atoms in enumerate(labels):
        if atoms is None or not 0 <= dim - ahead < len(sizes) or sizes[dim - ahead] == -1:
            continue
        size = sizes[dim - ahead]
        infers = getattr(node.target, "overloadpacket", None) in _SIZED_VIEWS
        if isinstance(size, int) or (infers and -1 not in sizes and sum(isinstance(s, fx.Node) for s in sizes) == 1):
            flow.constants.append(Constant(node, argument, dim - ahead, atoms))
            continue
        flow.freeze(atoms, reason)
        labels[dim] = None


def reshape(flow: Flow, gm: fx.GraphModule, node: fx.Node, reason: str) -> Any:
    """Views: a dimension keeps its place, is split into factors, or is merged from some."""
    source = first(node)
    if source is None:
        return barrier(flow, gm, node, reason)
    labels, old, new = flow.labels[source], size_of(source), size_of(node)
    if math.prod(old) != math.prod(new) or 0 in old:
        return barrier(flow, gm, node, reason)
    result: Labels = [None] * len(new)
    packet = getattr(node.target, "overloadpacket", None)
    for ins, outs in _blocks(old, new):
        whole = _merge(flow, [labels[dim] for dim in ins], [old[dim] for dim in ins], reason)
        if whole is None:
            continue
        single = len(new) > 3 and packet in (*_SIZED_VIEWS, _aten.unflatten)
        for dim, atoms in zip(outs, _split(flow, whole, [new[dim] for dim in outs], reason, single), strict=True):
            result[dim] = atoms
    if packet in _SIZED_VIEWS:
        _count_sizes(flow, node, result, reason)
    elif packet is _aten.unflatten:
        _count_sizes(flow, node, result, reason, 2, int(node.args[1]) % len(old))  # type: ignore[arg-type]
    return result


def reshape_as(flow: Flow, gm: fx.GraphModule, node: fx.Node, reason: str) -> Any:
    """A view that takes the sizes of another tensor: the two shrink together."""
    result = reshape(flow, gm, node, reason)
    like = node.args[1] if len(node.args) > 1 else None
    if not isinstance(like, fx.Node):
        return barrier(flow, gm, node, reason)
    for atoms, others in zip(result, flow.labels[like], strict=True):
        flow.link(atoms, others, reason)
    return [None if others is None else atoms for atoms, others in zip(result, flow.labels[like], strict=True)]


def _merge(flow: Flow, labels: Labels, extent: list[int], reason: str) -> Atoms | None:
    """Labels of one dimension made of several."""
    loose = [axis for axis, atoms in enumerate(labels) if atoms is not None]
    if not loose:
        return None
    if math.prod(extent) > _LARGEST:
        flow.freeze_all(labels, reason)
        return None
    if len(loose) == 1:
        return _merged(labels[loose[0]], extent, loose[0])
    whole = flow.fresh(math.prod(extent))
    flow.products.append(Product(whole.reshape(extent), tuple(labels), reason))
    return whole


def _split(flow: Flow, whole: Atoms, extent: list[int], reason: str, single: bool) -> Labels:
    """Labels of several dimensions that one is split into; with ``single``, a head that is left alone is one, too."""
    wide = [axis for axis, size in enumerate(extent) if size != 1]
    if single and len(wide) == 1:
        wide = list(range(wide[0] + 1))
    if len(wide) == 1:
        return [whole if axis == wide[0] else None for axis in range(len(extent))]
    if not wide:
        flow.freeze(whole, reason)
        return [None] * len(extent)
    factors = [flow.fresh(size) if axis in wide else None for axis, size in enumerate(extent)]
    flow.products.append(Product(whole.reshape(extent), tuple(factors), reason))
    return list(factors)


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
