"""How channels flow through copies that rearrange: repeats, stacks, indexing, shuffles of pixels and channels."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import fx

from fxopt.graph import ops
from fxopt.graph._flow import Atoms, Flow, Labels, barrier, first, replaced, size_of, tie_rows

__all__ = [
    "channel_shuffle",
    "flip",
    "fold",
    "index",
    "index_select",
    "last_two",
    "pixel_shuffle",
    "pixel_unshuffle",
    "repeat",
    "repeat_interleave",
    "roll",
    "sample",
    "stack",
    "unfold",
    "windows",
]


def repeat(flow: Flow, gm: fx.GraphModule, node: fx.Node, reason: str) -> Any:
    """Copies side by side: each index of a copy falls with that of the original."""
    source = first(node)
    times: Any = node.args[1] if len(node.args) > 1 else None
    if source is None or not isinstance(times, (list, tuple)):
        return barrier(flow, gm, node, reason)
    times = [1] * (len(size_of(node)) - len(times)) + list(times)
    old = [None] * (len(times) - len(size_of(source))) + list(flow.labels[source])
    result: Labels = []
    for atoms, count in zip(old, times, strict=True):
        if atoms is not None and not isinstance(count, int):
            flow.freeze(atoms, reason)
            atoms = None
        result.append(None if atoms is None else np.tile(atoms, count))
    return result


def repeat_interleave(flow: Flow, gm: fx.GraphModule, node: fx.Node, reason: str) -> Any:
    """Each index several times in a row: the copies fall with the original."""
    source, given = first(node), ops.arguments(node)
    dim, times = given.get("dim"), given.get("repeats")
    if source is None or not isinstance(dim, int) or not isinstance(times, int):
        return barrier(flow, gm, node, reason)
    labels = flow.labels[source]
    if given.get("output_size") is not None:
        flow.freeze(labels[dim], reason)
        return replaced(labels, dim, None)
    return replaced(labels, dim, None if labels[dim] is None else np.repeat(labels[dim], times))


def stack(flow: Flow, gm: fx.GraphModule, node: fx.Node, reason: str) -> Any:
    """Tensors along a new dimension: they fall together index by index."""
    sources = node.args[0]
    if not isinstance(sources, (list, tuple)) or not all(isinstance(source, fx.Node) for source in sources):
        return barrier(flow, gm, node, reason)
    held = [flow.labels[source] for source in sources]  # type: ignore[index]
    result: Labels = []
    for labels in zip(*held, strict=True):
        for atoms in labels[1:]:
            flow.link(labels[0], atoms, reason)
        result.append(labels[0] if all(atoms is not None for atoms in labels) else None)
    result.insert(int(ops.arguments(node)["dim"]) % (len(result) + 1), None)
    return result


def roll(flow: Flow, gm: fx.GraphModule, node: fx.Node, reason: str) -> Any:
    """A rotation: the dimensions that it turns are frozen, the others pass."""
    source = first(node)
    dims = ops.arguments(node).get("dims")
    if source is None or not isinstance(dims, (list, tuple)) or not dims:
        return barrier(flow, gm, node, reason)
    labels = list(flow.labels[source])
    for dim in dims:
        flow.freeze(labels[dim], reason)
        labels[dim] = None
    return labels


def flip(flow: Flow, gm: fx.GraphModule, node: fx.Node, reason: str) -> Any:
    """Dimensions the other way round."""
    source = first(node)
    if source is None:
        return barrier(flow, gm, node, reason)
    turned = {dim % len(size_of(source)) for dim in ops.arguments(node)["dims"]}
    return [
        atoms[::-1] if dim in turned and atoms is not None else atoms for dim, atoms in enumerate(flow.labels[source])
    ]


def index(flow: Flow, gm: fx.GraphModule, node: fx.Node, reason: str) -> Any:
    """Indexing by tensors, side by side: the dimensions that they index are frozen, the others pass."""
    source = first(node)
    indices: Any = node.args[1] if len(node.args) > 1 else None
    if source is None or not isinstance(indices, (list, tuple)):
        return barrier(flow, gm, node, reason)
    given = [dim for dim, one in enumerate(indices) if one is not None]
    if not given or given != list(range(given[0], given[-1] + 1)):
        return barrier(flow, gm, node, reason)
    tensors = [indices[dim] for dim in given]
    if any(one.meta["val"].dtype in (torch.bool, torch.uint8) for one in tensors):
        return barrier(flow, gm, node, reason)
    labels = list(flow.labels[source])
    for one in tensors:
        flow.freeze_all(flow.labels[one], reason)
    flow.freeze_all([labels[dim] for dim in given], reason)
    rank = max(len(size_of(one)) for one in tensors)
    return [*labels[: given[0]], *[None] * rank, *labels[given[-1] + 1 :]]


def index_select(flow: Flow, gm: fx.GraphModule, node: fx.Node, reason: str) -> Any:
    """Some indices of one dimension: that one is frozen, the others pass."""
    source, dim = first(node), ops.arguments(node)["dim"]
    if source is None or not isinstance(dim, int) or not size_of(source):
        return barrier(flow, gm, node, reason)
    flow.freeze(flow.labels[source][dim], reason)
    return replaced(flow.labels[source], dim, None)


def last_two(flow: Flow, gm: fx.GraphModule, node: fx.Node, reason: str) -> Any:
    """What works on the matrices of the last two dimensions: those are frozen, the others pass."""
    source = first(node)
    if source is None:
        return barrier(flow, gm, node, reason)
    labels = flow.labels[source]
    flow.freeze_all(labels[-2:], reason)
    return [*labels[:-2], None, None]


def windows(flow: Flow, gm: fx.GraphModule, node: fx.Node, reason: str) -> Any:
    """Overlapping pieces of one dimension, side by side in a new last one: that one is frozen, the others pass."""
    source, dim = first(node), ops.arguments(node)["dimension"]
    if source is None or not isinstance(dim, int) or not size_of(source):
        return barrier(flow, gm, node, reason)
    flow.freeze(flow.labels[source][dim], reason)
    return [*replaced(flow.labels[source], dim, None), None]


def sample(flow: Flow, gm: fx.GraphModule, node: fx.Node, reason: str) -> Any:
    """Pixels read at the places that a grid tells: channels pass."""
    source = first(node)
    if source is None or len(size_of(source)) != len(size_of(node)):
        return barrier(flow, gm, node, reason)
    labels = flow.labels[source]
    flow.freeze_all([labels[0], *labels[2:]], reason)
    for other in node.all_input_nodes:
        if other is not source:
            flow.freeze_all(flow.labels[other], reason)
    return [None, labels[1], *[None] * (len(labels) - 2)]


def pixel_shuffle(flow: Flow, gm: fx.GraphModule, node: fx.Node, reason: str) -> Any:
    """Every r x r input channels make one output channel."""
    source = first(node)
    if source is None or len(size_of(source)) < 3:
        return barrier(flow, gm, node, reason)
    labels = list(flow.labels[source])
    flow.freeze_all(labels[-2:], reason)
    atoms: Atoms | None = labels[-3]
    if atoms is not None:
        rows = atoms.reshape(size_of(node)[-3], -1).T
        tie_rows(flow, rows, reason)
        atoms = rows[0]
    return [*labels[:-3], atoms, None, None]


def pixel_unshuffle(flow: Flow, gm: fx.GraphModule, node: fx.Node, reason: str) -> Any:
    """Every input channel makes r x r output channels."""
    source = first(node)
    if source is None or len(size_of(source)) < 3:
        return barrier(flow, gm, node, reason)
    labels = list(flow.labels[source])
    flow.freeze_all(labels[-2:], reason)
    atoms: Atoms | None = labels[-3]
    if atoms is not None:
        atoms = np.repeat(atoms, size_of(node)[-3] // len(atoms))
    return [*labels[:-3], atoms, None, None]


def unfold(flow: Flow, gm: fx.GraphModule, node: fx.Node, reason: str) -> Any:
    """Patches of an image as columns: every channel makes one row for each pixel of a patch."""
    source = first(node)
    if source is None or len(size_of(source)) != 4 or len(size_of(node)) != 3:
        return barrier(flow, gm, node, reason)
    labels = flow.labels[source]
    flow.freeze_all([labels[0], *labels[2:]], reason)
    atoms = labels[1]
    return [None, None if atoms is None else np.repeat(atoms, size_of(node)[1] // len(atoms)), None]


def fold(flow: Flow, gm: fx.GraphModule, node: fx.Node, reason: str) -> Any:
    """Columns of patches back to an image: the rows of one channel's pixels fall together."""
    source = first(node)
    if source is None or len(size_of(source)) != 3 or len(size_of(node)) != 4:
        return barrier(flow, gm, node, reason)
    labels = flow.labels[source]
    flow.freeze_all([labels[0], labels[2]], reason)
    if labels[1] is None:
        return [None] * 4
    rows = labels[1].reshape(size_of(node)[1], -1).T
    tie_rows(flow, rows, reason)
    return [None, rows[0], None, None]


def channel_shuffle(flow: Flow, gm: fx.GraphModule, node: fx.Node, reason: str) -> Any:
    """Channels of several groups take turns; the same channel of every group goes."""
    source = first(node)
    groups = _groups(gm, node)
    if source is None or len(size_of(source)) < 3 or math.prod(size_of(source)) == 0:
        return barrier(flow, gm, node, reason)
    labels = list(flow.labels[source])
    if labels[1] is None:
        return labels
    rows = labels[1].reshape(groups, -1)
    tie_rows(flow, rows, reason)
    return replaced(labels, 1, rows.T.reshape(-1))


def _groups(gm: fx.GraphModule, node: fx.Node) -> int:
    if node.op == "call_module":
        return int(gm.get_submodule(str(node.target)).groups)  # type: ignore[arg-type]
    return int(ops.arguments(node)["groups"])
