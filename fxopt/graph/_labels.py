"""How channels flow through operators: an array of atoms for every dimension of every tensor.

Rules carry atoms through the graph by indexing alone, and *link* two atoms that can only be cut together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
from torch import fx, nn

from fxopt.graph import _copy_rules as copies
from fxopt.graph import _norm_rules as norms
from fxopt.graph import _product_rules as products
from fxopt.graph import _view_rules as views
from fxopt.graph import ops
from fxopt.graph._flow import (
    FROZEN,
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
    tensor_inputs,
    tie_rows,
)

__all__ = ["FROZEN", "Constant", "Flow", "Labels", "Mixing", "ParameterUse", "flow_labels"]


def flow_labels(gm: fx.GraphModule) -> Flow:
    """Walk the graph once and label every dimension of every tensor."""
    flow = Flow()
    for node in gm.graph.nodes:
        meaning = ops.semantics(gm, node)
        rule = _RULES.get(meaning.flow, barrier)
        flow.labels[node] = rule(flow, gm, node, f"{meaning.name} ({node.name})")
    return flow


def _plain(flow: Flow, gm: fx.GraphModule, node: fx.Node, reason: str) -> Any:
    return frozen_output(node)


def _parameter(flow: Flow, gm: fx.GraphModule, node: fx.Node, reason: str) -> Any:
    """A parameter read directly follows the channels it is combined with."""
    path, _, name = str(node.target).rpartition(".")
    key = str(node.target)
    owner = gm.get_submodule(path)
    if name not in owner._parameters and name not in owner._buffers:
        return frozen_output(node)
    labels: Labels = []
    for dim, size in enumerate(size_of(node)):
        if size == 1:
            labels.append(None)
            continue
        known = flow.outs.get(f"{key}:{dim}")
        atoms = flow.fresh(size) if known is None else known
        if known is None:
            flow.outs[f"{key}:{dim}"] = atoms
            flow.uses.append(ParameterUse(path, name, dim, "along", atoms))
        labels.append(atoms)
    return labels


def _unary(flow: Flow, gm: fx.GraphModule, node: fx.Node, reason: str) -> Any:
    source = first(node)
    if source is None or size_of(source) != size_of(node):
        return barrier(flow, gm, node, reason)
    return list(flow.labels[source])


def _broadcast(flow: Flow, gm: fx.GraphModule, node: fx.Node, reason: str) -> Any:
    size = size_of(node)
    result: Labels = [None] * len(size)
    # The labels of what is computed come first: those of two sums of one layer's channels are then one array.
    sources = sorted(tensor_inputs(node), key=lambda source: source.op == "get_attr")
    sums = len(sources) > 1 and ops.semantics(gm, node).name == "add" and all(s.op != "get_attr" for s in sources)
    for dim in range(-len(size), 0):
        found: list[Atoms | None] = []
        for source in sources:
            extent = size_of(source)
            if len(extent) < -dim:
                continue
            atoms = flow.labels[source][dim]
            if extent[dim] == size[dim] and (size[dim] != 1 or atoms is not None):
                found.append(atoms)
            else:
                flow.freeze(atoms, reason)
        for atoms in found[1:]:
            flow.link(found[0], atoms, reason)
            if sums and atoms is not None and atoms is not found[0]:
                flow.added.append(atoms)
        if found and all(atoms is not None for atoms in found):
            result[dim] = found[0]
    return result


def _layer_out(flow: Flow, path: str, size: int) -> Atoms:
    """Atoms of a layer's output channels, the same at every call of the layer."""
    if path not in flow.outs:
        flow.outs[path] = flow.fresh(size)
    return flow.outs[path]


def _hold(flow: Flow, module: nn.Module, path: str, uses: Sequence[tuple[str, int, str, Atoms | None]]) -> None:
    for name, dim, role, atoms in uses:
        if atoms is not None and getattr(module, name, None) is not None:
            flow.uses.append(ParameterUse(path, name, dim, role, atoms))


def _conv(flow: Flow, gm: fx.GraphModule, node: fx.Node, reason: str) -> Any:
    path, source = str(node.target), first(node)
    module: Any = gm.get_submodule(path)
    if source is None or len(size_of(source)) != module.weight.dim():
        return barrier(flow, gm, node, reason)
    labels = flow.labels[source]
    flow.freeze_all([labels[0], *labels[2:]], reason)
    inputs, groups = labels[1], module.groups
    transposed = bool(getattr(module, "transposed", False))
    out: Atoms | None
    if groups == 1:
        out, held = _layer_out(flow, path, module.out_channels), inputs
        uses = [("weight", 1 if transposed else 0, "out", out), ("weight", 0 if transposed else 1, "in", held)]
    elif groups == module.in_channels:
        out = None if inputs is None else np.repeat(inputs, module.out_channels // groups)
        uses = [("weight", 0, "along", inputs if transposed else out)]
    else:
        out = _layer_out(flow, path, module.out_channels)
        tie_rows(flow, out.reshape(groups, -1), reason)
        if inputs is not None:
            tie_rows(flow, inputs.reshape(groups, -1), reason)
        per_group = None if inputs is None else inputs[: module.in_channels // groups]
        if transposed:
            uses = [("weight", 0, "in", inputs), ("weight", 1, "out", out[: module.out_channels // groups])]
        else:
            uses = [("weight", 0, "out", out), ("weight", 1, "in", per_group)]
    _hold(flow, module, path, [*uses, ("bias", 0, "along", out)])
    return [labels[0], out, *[None] * (len(size_of(node)) - 2)]


def _linear(flow: Flow, gm: fx.GraphModule, node: fx.Node, reason: str) -> Any:
    path, source = str(node.target), first(node)
    if source is None:
        return barrier(flow, gm, node, reason)
    module: Any = gm.get_submodule(path)
    labels = flow.labels[source]
    out = _layer_out(flow, path, module.out_features)
    uses = [("weight", 0, "out", out), ("weight", 1, "in", labels[-1]), ("bias", 0, "along", out)]
    _hold(flow, module, path, uses)
    return [*labels[:-1], out]


def _embedding(flow: Flow, gm: fx.GraphModule, node: fx.Node, reason: str) -> Any:
    path = str(node.target)
    module: Any = gm.get_submodule(path)
    out = _layer_out(flow, path, module.embedding_dim)
    _hold(flow, module, path, [("weight", 1, "out", out)])
    return [*frozen_output(node)[:-1], out]


def _norm_channels(flow: Flow, gm: fx.GraphModule, node: fx.Node, reason: str) -> Any:
    path, source = str(node.target), first(node)
    if source is None or len(size_of(source)) < 2:
        return barrier(flow, gm, node, reason)
    module = gm.get_submodule(path)
    labels = flow.labels[source]
    channels = size_of(source)[1]
    for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
        if tensor is not None and tensor.dim() == 1 and tensor.shape[0] == channels and channels > 1:
            _hold(flow, module, path, [(name, 0, "along", labels[1])])
    return list(labels)


def _prelu(flow: Flow, gm: fx.GraphModule, node: fx.Node, reason: str) -> Any:
    """PReLU as a function: its slopes, if there are several, follow the channels."""
    source, slopes = first(node), node.args[1]
    if source is None or not isinstance(slopes, fx.Node) or len(size_of(source)) < 2:
        return barrier(flow, gm, node, reason)
    if math.prod(size_of(slopes)) > 1:
        flow.link(flow.labels[source][1], flow.labels[slopes][0], reason)
    return list(flow.labels[source])


def _softmax(flow: Flow, gm: fx.GraphModule, node: fx.Node, reason: str) -> Any:
    source = first(node)
    dim = getattr(gm.get_submodule(str(node.target)), "dim", None) if node.op == "call_module" else node.args[1]
    if source is None or not isinstance(dim, int):
        return barrier(flow, gm, node, reason)
    labels = list(flow.labels[source])
    flow.freeze(labels[dim], reason)
    return labels


def _spatial(flow: Flow, gm: fx.GraphModule, node: fx.Node, reason: str) -> Any:
    source = first(node)
    values = node.meta.get("val")
    if isinstance(values, (tuple, list)):
        # Max-pooling with indices: those are of the same channels.
        one = _pooled(flow, node, source, tuple(values[0].shape), reason)
        return barrier(flow, gm, node, reason) if one is None else [list(one) for _ in values]
    found = _pooled(flow, node, source, size_of(node), reason)
    return barrier(flow, gm, node, reason) if found is None else found


def _pooled(flow: Flow, node: fx.Node, source: fx.Node | None, size: Sequence[int], reason: str) -> Labels | None:
    if source is None or not size or len(size_of(source)) != len(size) or len(size) < 3:
        return None
    labels: Labels = flow.labels[source]
    flow.freeze_all(labels[2:], reason)
    return [*labels[:2], *[None] * (len(size) - 2)]


def _unpool(flow: Flow, gm: fx.GraphModule, node: fx.Node, reason: str) -> Any:
    """Max-unpooling reads indices that another pooling made: they are of the same channels."""
    sources = [source for source in node.args[:2] if isinstance(source, fx.Node)]
    if len(sources) != 2 or len(size_of(sources[0])) != len(size_of(sources[1])):
        return barrier(flow, gm, node, reason)
    flow.link(flow.labels[sources[0]][1], flow.labels[sources[1]][1], reason)
    return _spatial(flow, gm, node, reason)


_Rule: TypeAlias = Callable[[Flow, fx.GraphModule, fx.Node, str], Any]
_RULES: dict[str, _Rule] = {
    "input": _plain,
    "constant": _plain,
    "scalar": _plain,
    "parameter": _parameter,
    "output": barrier,
    "barrier": barrier,
    "unary": _unary,
    "broadcast": _broadcast,
    "conv": _conv,
    "conv_transpose": _conv,
    "linear": _linear,
    "embedding": _embedding,
    "norm_channels": _norm_channels,
    "norm_across": norms.norm_across,
    "norm_groups": norms.norm_groups,
    "softmax": _softmax,
    "spatial": _spatial,
    "unpool": _unpool,
    "unfold": copies.unfold,
    "fold": copies.fold,
    "index_select": copies.index_select,
    "last_two": copies.last_two,
    "repeat_interleave": copies.repeat_interleave,
    "sample": copies.sample,
    "windows": copies.windows,
    "move_dim": views.move_dim,
    "prelu": _prelu,
    "permute": views.permute,
    "cat": views.cat,
    "split": views.split,
    "getitem": views.getitem,
    "slice": views.slice_,
    "select": views.select,
    "pad": views.pad,
    "reduce": views.reduce,
    "expand": views.expand,
    "reshape": views.reshape,
    "reshape_as": views.reshape_as,
    "flip": copies.flip,
    "index": copies.index,
    "narrow": views.narrow,
    "repeat": copies.repeat,
    "roll": copies.roll,
    "stack": copies.stack,
    "unbind": views.unbind,
    "along": views.along,
    "pixel_shuffle": copies.pixel_shuffle,
    "pixel_unshuffle": copies.pixel_unshuffle,
    "channel_shuffle": copies.channel_shuffle,
    "matmul": products.matmul,
    "addmm": products.addmm,
    "attention": products.attention,
    "functional_linear": products.linear,
    "functional_conv": products.conv,
    "functional_embedding": products.embedding,
    "functional_norm": norms.functional_norm,
}
