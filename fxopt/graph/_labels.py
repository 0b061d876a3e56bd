"""How channels flow through operators: an array of atoms for every dimension of every tensor.

An *atom* is one index of a dimension that some layer makes (an output channel of a convolution). Rules carry atoms
through the graph by indexing alone, and *link* two atoms that can only be cut together. ``-1`` stands for an index
that nothing may cut. A dimension is ``None`` when all of it is so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import fx, nn

from fxopt.graph import ops

__all__ = ["FROZEN", "Constant", "Flow", "Labels", "ParameterUse", "flow_labels"]

FROZEN = -1
Atoms: TypeAlias = npt.NDArray[np.int64]
Labels: TypeAlias = "list[Atoms | None]"


@dataclass(frozen=True)
class ParameterUse:
    """One dimension of a parameter or buffer whose indices are atoms.

    Attributes:
        path: Module path of the owner.
        name: Name of the parameter or buffer in its owner.
        dim: The dimension.
        role: ``out`` where the layer makes the channels, ``in`` where it reads them, ``along`` where it follows them.
        atoms: The atom of every index.
    """

    path: str
    name: str
    dim: int
    role: str
    atoms: Atoms


@dataclass(frozen=True)
class Constant:
    """A number in the graph that counts atoms: a size in a view, the end of a slice.

    Attributes:
        node: The call that holds the number.
        argument: Index of the call's argument.
        position: Index in that argument if it is a list, else None.
        atoms: The atoms that the number counts; after cutting it is the number of those that stay.
    """

    node: fx.Node
    argument: int
    position: int | None
    atoms: Atoms


@dataclass
class Flow:
    """What the walk over the graph found."""

    labels: dict[fx.Node, Any] = field(default_factory=dict)
    uses: list[ParameterUse] = field(default_factory=list)
    constants: list[Constant] = field(default_factory=list)
    links: list[tuple[Atoms, Atoms]] = field(default_factory=list)
    frozen: list[tuple[Atoms, str]] = field(default_factory=list)
    atoms: int = 0
    outs: dict[str, Atoms] = field(default_factory=dict)

    def fresh(self, size: int) -> Atoms:
        """New atoms for the output channels of a layer."""
        self.atoms += size
        return np.arange(self.atoms - size, self.atoms, dtype=np.int64)

    def link(self, one: Atoms | None, other: Atoms | None, reason: str) -> None:
        """Cut ``one[i]`` and ``other[i]`` only together."""
        if one is None or other is None:
            self.freeze(one if other is None else other, reason)
            return
        loose = (one != FROZEN) & (other != FROZEN)
        self.links.append((one[loose], other[loose]))
        self.freeze(one[other == FROZEN], reason)
        self.freeze(other[one == FROZEN], reason)

    def freeze(self, atoms: Atoms | None, reason: str) -> None:
        """Never cut these atoms."""
        if atoms is not None and atoms.size:
            self.frozen.append((atoms[atoms != FROZEN], reason))

    def freeze_all(self, labels: Sequence[Atoms | None], reason: str) -> None:
        """Never cut what these dimensions hold."""
        for atoms in labels:
            self.freeze(atoms, reason)


def flow_labels(gm: fx.GraphModule) -> Flow:
    """Walk the graph once and label every dimension of every tensor."""
    flow = Flow()
    for node in gm.graph.nodes:
        meaning = ops.semantics(gm, node)
        rule = _RULES.get(meaning.flow, _barrier)
        flow.labels[node] = rule(flow, gm, node, f"{meaning.name} ({node.name})")
    return flow


def _dims(value: object) -> Any:
    """All-frozen labels of a value."""
    if isinstance(value, torch.Tensor):
        return [None] * value.dim()
    if isinstance(value, (tuple, list)):
        return [_dims(item) for item in value]
    return []


def _frozen_output(node: fx.Node) -> Any:
    return _dims(node.meta.get("val"))


def _size(node: fx.Node) -> tuple[int, ...]:
    value = node.meta.get("val")
    return tuple(int(size) for size in value.shape) if isinstance(value, torch.Tensor) else ()


def _tensor_inputs(node: fx.Node) -> list[fx.Node]:
    return [source for source in node.all_input_nodes if isinstance(source.meta.get("val"), torch.Tensor)]


def _first(node: fx.Node) -> fx.Node | None:
    source = node.args[0] if node.args else None
    return source if isinstance(source, fx.Node) else None


def _barrier(flow: Flow, gm: fx.GraphModule, node: fx.Node, reason: str) -> Any:
    for source in node.all_input_nodes:
        _freeze_value(flow, flow.labels[source], reason)
    return _frozen_output(node)


def _freeze_value(flow: Flow, labels: Any, reason: str) -> None:
    for item in labels:
        if isinstance(item, list):
            _freeze_value(flow, item, reason)
        else:
            flow.freeze(item, reason)


def _plain(flow: Flow, gm: fx.GraphModule, node: fx.Node, reason: str) -> Any:
    return _frozen_output(node)


def _parameter(flow: Flow, gm: fx.GraphModule, node: fx.Node, reason: str) -> Any:
    """A parameter read directly follows the channels it is combined with."""
    path, _, name = str(node.target).rpartition(".")
    key = str(node.target)
    owner = gm.get_submodule(path)
    if name not in owner._parameters and name not in owner._buffers:
        return _frozen_output(node)
    labels: Labels = []
    for dim, size in enumerate(_size(node)):
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
    source = _first(node)
    if source is None or _size(source) != _size(node):
        return _barrier(flow, gm, node, reason)
    return list(flow.labels[source])


def _broadcast(flow: Flow, gm: fx.GraphModule, node: fx.Node, reason: str) -> Any:
    size = _size(node)
    result: Labels = [None] * len(size)
    sources = _tensor_inputs(node)
    for dim in range(-len(size), 0):
        found: list[Atoms | None] = []
        for source in sources:
            extent = _size(source)
            if len(extent) < -dim:
                continue
            atoms = flow.labels[source][dim]
            if extent[dim] == size[dim] and size[dim] != 1:
                found.append(atoms)
            else:
                flow.freeze(atoms, reason)
        for atoms in found[1:]:
            flow.link(found[0], atoms, reason)
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
    path, source = str(node.target), _first(node)
    module: Any = gm.get_submodule(path)
    if source is None or len(_size(source)) != module.weight.dim():
        return _barrier(flow, gm, node, reason)
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
        _tie_rows(flow, out.reshape(groups, -1), reason)
        if inputs is not None:
            _tie_rows(flow, inputs.reshape(groups, -1), reason)
        per_group = None if inputs is None else inputs[: module.in_channels // groups]
        if transposed:
            uses = [("weight", 0, "in", inputs), ("weight", 1, "out", out[: module.out_channels // groups])]
        else:
            uses = [("weight", 0, "out", out), ("weight", 1, "in", per_group)]
    _hold(flow, module, path, [*uses, ("bias", 0, "along", out)])
    return [labels[0], out, *[None] * (len(_size(node)) - 2)]


def _tie_rows(flow: Flow, rows: Atoms, reason: str) -> None:
    for row in rows[1:]:
        flow.link(rows[0], row, reason)


def _linear(flow: Flow, gm: fx.GraphModule, node: fx.Node, reason: str) -> Any:
    path, source = str(node.target), _first(node)
    if source is None:
        return _barrier(flow, gm, node, reason)
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
    return [*_frozen_output(node)[:-1], out]


def _norm_channels(flow: Flow, gm: fx.GraphModule, node: fx.Node, reason: str) -> Any:
    path, source = str(node.target), _first(node)
    if source is None or len(_size(source)) < 2:
        return _barrier(flow, gm, node, reason)
    module = gm.get_submodule(path)
    labels = flow.labels[source]
    channels = _size(source)[1]
    for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
        if tensor is not None and tensor.dim() == 1 and tensor.shape[0] == channels and channels > 1:
            _hold(flow, module, path, [(name, 0, "along", labels[1])])
    return list(labels)


def _across(flow: Flow, gm: fx.GraphModule, node: fx.Node, reason: str) -> Any:
    """Norms and softmax over channels: cutting some changes all others, so they are frozen."""
    source = _first(node)
    if source is None:
        return _barrier(flow, gm, node, reason)
    flow.freeze_all(flow.labels[source], reason)
    return _frozen_output(node)


def _softmax(flow: Flow, gm: fx.GraphModule, node: fx.Node, reason: str) -> Any:
    source = _first(node)
    dim = getattr(gm.get_submodule(str(node.target)), "dim", None) if node.op == "call_module" else node.args[1]
    if source is None or not isinstance(dim, int):
        return _barrier(flow, gm, node, reason)
    labels = list(flow.labels[source])
    flow.freeze(labels[dim], reason)
    return labels


def _spatial(flow: Flow, gm: fx.GraphModule, node: fx.Node, reason: str) -> Any:
    source = _first(node)
    size = _size(node)
    if source is None or not size or len(_size(source)) != len(size) or len(size) < 3:
        return _barrier(flow, gm, node, reason)
    labels = flow.labels[source]
    flow.freeze_all(labels[2:], reason)
    return [*labels[:2], *[None] * (len(size) - 2)]


def _permute(flow: Flow, gm: fx.GraphModule, node: fx.Node, reason: str) -> Any:
    source = _first(node)
    if source is None:
        return _barrier(flow, gm, node, reason)
    order = list(range(len(_size(source))))
    if len(node.args) == 2 and isinstance(node.args[1], (list, tuple)):
        order = [int(dim) for dim in node.args[1]]
    else:
        one, other = (0, 1) if len(node.args) == 1 else (int(node.args[1]), int(node.args[2]))  # type: ignore[arg-type]
        order[one], order[other] = order[other], order[one]
    return [flow.labels[source][dim] for dim in order]


def _cat(flow: Flow, gm: fx.GraphModule, node: fx.Node, reason: str) -> Any:
    sources = node.args[0]
    if not isinstance(sources, (list, tuple)) or not all(isinstance(source, fx.Node) for source in sources):
        return _barrier(flow, gm, node, reason)
    nodes: list[fx.Node] = [source for source in sources if isinstance(source, fx.Node)]
    rank = len(_size(node))
    dim = int(node.args[1]) % rank if len(node.args) > 1 else 0  # type: ignore[arg-type]
    result: Labels = []
    for axis in range(rank):
        parts = [(flow.labels[source][axis], _size(source)[axis]) for source in nodes]
        if axis == dim:
            loose = any(atoms is not None for atoms, _ in parts)
            filled = [np.full(size, FROZEN) if atoms is None else atoms for atoms, size in parts]
            result.append(np.concatenate(filled) if loose else None)
            continue
        for atoms, _ in parts[1:]:
            flow.link(parts[0][0], atoms, reason)
        result.append(parts[0][0] if all(atoms is not None for atoms, _ in parts) else None)
    return result


def _split(flow: Flow, gm: fx.GraphModule, node: fx.Node, reason: str) -> Any:
    source = _first(node)
    values = node.meta.get("val")
    if source is None or not isinstance(values, (list, tuple)):
        return _barrier(flow, gm, node, reason)
    rank = len(_size(source))
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


def _getitem(flow: Flow, gm: fx.GraphModule, node: fx.Node, reason: str) -> Any:
    source, index = node.args[0], node.args[1]
    if isinstance(source, fx.Node) and isinstance(index, int) and not isinstance(source.meta.get("val"), torch.Tensor):
        return flow.labels[source][index] if flow.labels[source] else _frozen_output(node)
    return _barrier(flow, gm, node, reason)


def _slice(flow: Flow, gm: fx.GraphModule, node: fx.Node, reason: str) -> Any:
    source = _first(node)
    arguments: list[Any] = [*node.args[1:], *([0, None, None, 1][len(node.args) - 1 :])]
    if source is None or any(isinstance(value, fx.Node) for value in arguments):
        return _slice_unknown(flow, node, source, reason)
    dim, start, end, step = arguments
    labels = list(flow.labels[source])
    dim = int(dim) % len(labels)
    atoms = labels[dim]
    if atoms is None:
        return labels
    size = len(atoms)
    first, last, stride = slice(start, end, step).indices(size)
    if stride != 1:
        flow.freeze(atoms, reason)
        return _frozen_output(node)
    if first > 0:
        flow.constants.append(Constant(node, 2, None, atoms[:first]))
    if last < size:
        flow.constants.append(Constant(node, 3, None, atoms[:last]))
    labels[dim] = atoms[first:last]
    return labels


def _slice_unknown(flow: Flow, node: fx.Node, source: fx.Node | None, reason: str) -> Any:
    """A slice whose bounds are computed: its own dimension is frozen, the others pass."""
    dim = node.args[1] if len(node.args) > 1 else 0
    if source is None or not isinstance(dim, int):
        return _frozen_output(node)
    labels = list(flow.labels[source])
    flow.freeze(labels[dim], reason)
    labels[dim] = None
    return labels


def _select(flow: Flow, gm: fx.GraphModule, node: fx.Node, reason: str) -> Any:
    source = _first(node)
    dim = node.args[1] if len(node.args) > 1 else None
    if source is None or not isinstance(dim, int):
        return _barrier(flow, gm, node, reason)
    labels = list(flow.labels[source])
    flow.freeze(labels.pop(dim), reason)
    return labels


def _pad(flow: Flow, gm: fx.GraphModule, node: fx.Node, reason: str) -> Any:
    source = _first(node)
    widths = node.args[1] if len(node.args) > 1 else None
    if source is None or not isinstance(widths, (list, tuple)):
        return _barrier(flow, gm, node, reason)
    labels = list(flow.labels[source])
    for offset in range(len(widths) // 2):
        dim = len(labels) - 1 - offset
        flow.freeze(labels[dim], reason)
        labels[dim] = None
    return labels


def _reduce(flow: Flow, gm: fx.GraphModule, node: fx.Node, reason: str) -> Any:
    """A mean or a sum over some dimensions; what is summed over is frozen."""
    source = _first(node)
    rank = len(_size(source)) if source is not None else 0
    dims = node.args[1] if len(node.args) > 1 else None
    if source is None or not isinstance(dims, (list, tuple)) or not all(isinstance(dim, int) for dim in dims):
        return _barrier(flow, gm, node, reason)
    gone = {int(dim) % rank for dim in dims} or set(range(rank))
    kept = len(_size(node)) == rank
    result: Labels = []
    for dim, atoms in enumerate(flow.labels[source]):
        if dim not in gone:
            result.append(atoms)
            continue
        flow.freeze(atoms, reason)
        if kept:
            result.append(None)
    return result


def _expand(flow: Flow, gm: fx.GraphModule, node: fx.Node, reason: str) -> Any:
    source = _first(node)
    if source is None:
        return _barrier(flow, gm, node, reason)
    size, extent = _size(node), _size(source)
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


def _reshape(flow: Flow, gm: fx.GraphModule, node: fx.Node, reason: str) -> Any:
    """Views: a labelled dimension may keep its place or be merged with plain ones; anything else is frozen."""
    source = _first(node)
    if source is None:
        return _barrier(flow, gm, node, reason)
    labels, old, new = flow.labels[source], _size(source), _size(node)
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


_aten = torch.ops.aten
_SIZED_VIEWS = (_aten.view, _aten.reshape, _aten._unsafe_view)
_Rule: TypeAlias = Callable[[Flow, fx.GraphModule, fx.Node, str], Any]
_RULES: dict[str, _Rule] = {
    "input": _plain,
    "constant": _plain,
    "scalar": _plain,
    "parameter": _parameter,
    "output": _barrier,
    "barrier": _barrier,
    "unary": _unary,
    "broadcast": _broadcast,
    "conv": _conv,
    "conv_transpose": _conv,
    "linear": _linear,
    "embedding": _embedding,
    "norm_channels": _norm_channels,
    "norm_across": _across,
    "softmax": _softmax,
    "spatial": _spatial,
    "permute": _permute,
    "cat": _cat,
    "split": _split,
    "getitem": _getitem,
    "slice": _slice,
    "select": _select,
    "pad": _pad,
    "reduce": _reduce,
    "expand": _expand,
    "reshape": _reshape,
}
