"""How channels flow through products: matrix products, attention, and layers called as functions of their weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from fxopt.graph import ops
from fxopt.graph._flow import (
    Atoms,
    Constant,
    Flow,
    Labels,
    Mixing,
    ParameterUse,
    barrier,
    first,
    frozen_output,
    size_of,
    tie_rows,
)

__all__ = ["addmm", "attention", "conv", "embedding", "linear", "matmul"]


_STEPS = 16
"""How many operators to look back from a weight to its parameter."""

_GROUPS = 6
"""Which argument of a convolution tells its groups."""


def matmul(flow: Flow, gm: fx.GraphModule, node: fx.Node, reason: str) -> Any:
    """A product of two tensors of at least two dimensions: leading dimensions fall together, so does the inner one."""
    operands = [source for source in node.args if isinstance(source, fx.Node)]
    if len(operands) != 2 or len(node.args) != 2 or min(len(size_of(one)) for one in operands) < 2:
        return barrier(flow, gm, node, reason)
    left, right = operands
    one, other = flow.labels[left], flow.labels[right]
    _contract(flow, node, (one[-1], 0, -1), (other[-2], 1, -2), reason)
    lead = _leading(flow, [left, right], size_of(node)[:-2], reason)
    return [*lead, one[-2], other[-1]]


def attention(flow: Flow, gm: fx.GraphModule, node: fx.Node, reason: str) -> Any:
    """Scaled dot-product attention: whole heads may go, or the width of all heads."""
    given = ops.arguments(node)
    query, key, value = (given[name] for name in ("query", "key", "value"))
    sizes = [size_of(source) for source in (query, key, value)]
    if len(sizes[0]) < 3 or any(len(size) != len(sizes[0]) for size in sizes):
        return barrier(flow, gm, node, reason)
    q, k, v = (flow.labels[source] for source in (query, key, value))
    flow.freeze_all([k[-2], v[-2]], reason)
    _contract(flow, node, (q[-1], 0, -1), (k[-1], 1, -1), reason)
    mask = given.get("attn_mask")
    if isinstance(mask, fx.Node):
        flow.freeze(flow.labels[mask][-1], reason)
        if len(size_of(mask)) > 1 and size_of(mask)[-2] > 1:
            flow.link(q[-2], flow.labels[mask][-2], reason)
    if given.get("enable_gqa") and sizes[0][-3] != sizes[1][-3]:
        lead = _grouped_heads(flow, (q, k, v), sizes[0][-3] // sizes[1][-3], reason)
    else:
        masks = [mask] if isinstance(mask, fx.Node) else []
        lead = _leading(flow, [query, key, value, *masks], size_of(node)[:-2], reason)
    return [*lead, q[-2], v[-1]]


def _grouped_heads(flow: Flow, labels: Sequence[Labels], repeats: int, reason: str) -> Labels:
    """Several query heads for each head of keys and values."""
    q, k, v = labels
    flow.link(k[-3], v[-3], reason)
    shared = None if k[-3] is None else np.repeat(k[-3], repeats)
    flow.link(q[-3], shared, reason)
    for one in labels:
        flow.freeze_all(one[:-3], reason)
    if q[-3] is not None:
        flow.heads.append(q[-3])
    return [*[None] * (len(q) - 3), q[-3]]


def _contract(
    flow: Flow, node: fx.Node, one: tuple[Atoms | None, int, int], other: tuple[Atoms | None, int, int], reason: str
) -> None:
    """A dimension of each of two operands, given as (atoms, argument, dimension), that is summed over."""
    flow.link(one[0], other[0], reason)
    for atoms, argument, dim in (one, other):
        if atoms is not None:
            flow.mixings.append(Mixing(node, argument, dim, atoms))


def _leading(flow: Flow, sources: Sequence[fx.Node], size: Sequence[int], reason: str) -> Labels:
    """Labels of the leading dimensions of a product; the last of them are heads, the others are of the batch."""
    result: Labels = [None] * len(size)
    for dim in range(-len(size), 0):
        held: list[Atoms | None] = []
        for source in sources:
            extent = size_of(source)[:-2]
            if len(extent) < -dim:
                continue
            atoms = flow.labels[source][dim - 2]
            if extent[dim] == size[dim] and (size[dim] != 1 or atoms is not None):
                held.append(atoms)
            else:
                flow.freeze(atoms, reason)
        if dim < -1:
            flow.freeze_all(held, reason)
            continue
        for atoms in held[1:]:
            flow.link(held[0], atoms, reason)
        if held and all(atoms is not None for atoms in held):
            result[dim] = held[0]
            flow.heads.extend(held[:1])  # type: ignore[arg-type]
    return result


def linear(flow: Flow, gm: fx.GraphModule, node: fx.Node, reason: str) -> Any:
    """A linear layer called as a function of its weight."""
    given = ops.arguments(node)
    source, weight, bias = first(node), given["weight"], given.get("bias")
    if source is None or not isinstance(weight, fx.Node) or len(size_of(weight)) != 2:
        return barrier(flow, gm, node, reason)
    labels, held = flow.labels[source], flow.labels[weight]
    _contract(flow, node, (labels[-1], 0, -1), (held[1], 1, 1), reason)
    _hold(flow, gm, weight, ("out", "in"))
    if isinstance(bias, fx.Node):
        flow.link(held[0], flow.labels[bias][0], reason)
    return [*labels[:-1], held[0]]


def addmm(flow: Flow, gm: fx.GraphModule, node: fx.Node, reason: str) -> Any:
    """A summand and a product of two matrices: a linear layer whose weight is stored the other way round."""
    operands = [source for source in node.args if isinstance(source, fx.Node)]
    if len(operands) != 3 or len(node.args) != 3:
        return barrier(flow, gm, node, reason)
    bias, left, right = operands
    labels, held = flow.labels[left], flow.labels[right]
    _contract(flow, node, (labels[-1], 1, -1), (held[0], 2, 0), reason)
    _hold(flow, gm, right, ("in", "out"))
    added = flow.labels[bias]
    flow.freeze_all(added[:-1], reason)
    if size_of(bias)[-1:] == size_of(node)[-1:]:
        flow.link(held[1], added[-1], reason)
    return [labels[0], held[1]]


def conv(flow: Flow, gm: fx.GraphModule, node: fx.Node, reason: str) -> Any:
    """A convolution called as a function of its weight, plain, grouped or depthwise."""
    given = ops.arguments(node)
    source, weight, bias = first(node), given["weight"], given.get("bias")
    transposed = "transpose" in ops.semantics(gm, node).name
    if source is None or not isinstance(weight, fx.Node) or len(size_of(source)) != len(size_of(weight)):
        return barrier(flow, gm, node, reason)
    labels, held, groups = flow.labels[source], flow.labels[weight], given["groups"]
    flow.freeze_all([labels[0], *labels[2:], *held[2:]], reason)
    out: Atoms | None
    if groups == 1:
        made, read = (1, 0) if transposed else (0, 1)
        out = held[made]
        _contract(flow, node, (labels[1], 0, 1), (held[read], 1, read), reason)
        _hold(flow, gm, weight, ("in", "out") if transposed else ("out", "in"))
    elif not transposed and 1 < groups < size_of(source)[1]:
        out = held[0]
        if labels[1] is not None:
            tie_rows(flow, labels[1].reshape(groups, -1), reason)
        if out is not None:
            tie_rows(flow, out.reshape(groups, -1), reason)
        inside = None if labels[1] is None else labels[1].reshape(groups, -1)[0]
        flow.link(inside, held[1], reason)
        _mask_input(flow, node, labels[1])
        _hold(flow, gm, weight, ("out", "in"))
    elif not transposed and groups == size_of(source)[1] and len(node.args) > _GROUPS:
        out = None if labels[1] is None else np.repeat(labels[1], size_of(node)[1] // groups)
        flow.link(out, held[0], reason)
        _hold(flow, gm, weight, ("along",))
        if labels[1] is not None:
            flow.constants.append(Constant(node, _GROUPS, None, labels[1]))
    else:
        return barrier(flow, gm, node, reason)
    if isinstance(bias, fx.Node):
        flow.link(out, flow.labels[bias][0], reason)
    return [None, out, *[None] * (len(labels) - 2)]


def _mask_input(flow: Flow, node: fx.Node, atoms: Atoms | None) -> None:
    if atoms is not None:
        flow.mixings.append(Mixing(node, 0, 1, atoms))


def embedding(flow: Flow, gm: fx.GraphModule, node: fx.Node, reason: str) -> Any:
    """A table read as a function: its rows stay, its columns are the channels."""
    table = first(node)
    if table is None or len(size_of(table)) != 2:
        return barrier(flow, gm, node, reason)
    labels = flow.labels[table]
    flow.freeze(labels[0], reason)
    _hold(flow, gm, table, ("along", "out"))
    return [*frozen_output(node)[:-1], labels[1]]


def _hold(flow: Flow, gm: fx.GraphModule, weight: fx.Node, roles: Sequence[str]) -> None:
    """Say which dimension of a weight's parameter makes channels and which reads them.

    A weight may be computed from its parameter (scaled, standardized, rounded), as long as that has the same shape.
    """
    held = weight
    for _ in range(_STEPS):
        if held.op == "get_attr" or first(held) is None:
            break
        held = first(held)  # type: ignore[assignment]
    path, _, name = str(held.target).rpartition(".")
    if held.op != "get_attr" or size_of(held) != size_of(weight):
        return
    if not isinstance(getattr(gm.get_submodule(path), name), torch.nn.Parameter):
        return
    for dim, role in enumerate(roles):
        atoms = flow.labels[held][dim]
        if atoms is not None:
            flow.uses.append(ParameterUse(path, name, dim, role, atoms))
