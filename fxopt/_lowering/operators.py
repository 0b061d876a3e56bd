"""The sizes of each kind of operator, as the fields of its rows."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from fxopt._lowering.forms import Forms, Size
from fxopt.graph import ops
from fxopt.graph.channels import ChannelGraph
from fxopt.graph.matrix_products import MatrixProduct
from fxopt.targets.rows import Activation, OpKind

__all__ = ["Constant", "Draft", "Drafts", "fields_of"]

Fields: TypeAlias = dict[str, Size]
Draft: TypeAlias = tuple[str, OpKind, Fields]

_KINDS = {
    "elementwise": OpKind.ELEMENTWISE,
    "norm": OpKind.NORM,
    "softmax": OpKind.SOFTMAX,
    "copy": OpKind.COPY,
    "resize": OpKind.RESIZE,
    "unknown": OpKind.UNKNOWN,
}
_JOINS = ("cat", "stack")
"""Copies that put tensors side by side; all others rearrange elements."""
_AXES = ("d", "h", "w")
_fixed = Forms.fixed


@dataclass(frozen=True)
class Constant:
    """A tensor that depends on no input of the model.

    Attributes:
        key: Equal for tensors that are computed in the same way.
        parameters: Size of every parameter that it is computed from, by identity.
    """

    key: int
    parameters: Mapping[int, Size]


class Drafts:
    """What rows are written from: the graph, its channel groups, and the shapes of its values.

    Attributes:
        gm: The graph.
        found: Value of every node at the batch lowered for.
        constants: The nodes whose tensors depend on no input.
        products: The products of activations that can run on integers, by the node of their result.
    """

    def __init__(self, gm: fx.GraphModule, channels: ChannelGraph, found: Mapping[fx.Node, Any], forms: Forms) -> None:
        self.gm = gm
        self.found = found
        self.forms = forms
        self.constants: dict[fx.Node, Constant] = {}
        self.products: dict[fx.Node, MatrixProduct] = {}
        self._channels = channels
        self._modules = dict(gm.named_modules(remove_duplicate=False))
        self._dims: dict[fx.Node, list[Size]] = {}
        self._uses = {(use.path, use.name, use.dim): use.atoms for use in channels.parameters}

    def module(self, node: fx.Node) -> nn.Module | None:
        """The module that a node calls, or None."""
        return self._modules[str(node.target)] if node.op == "call_module" else None

    def attribute(self, node: fx.Node) -> object:
        """What a ``get_attr`` node reads."""
        return operator.attrgetter(str(node.target))(self.gm)

    def dims(self, node: fx.Node) -> list[Size]:
        """Size of every dimension of a node's tensor at the batch lowered for."""
        if node not in self._dims:
            tensor = self.tensor(node)
            shape = () if tensor is None else tensor.shape
            labels = self._channels.labels
            self._dims[node] = [self.forms.of(labels(node, dim), int(size)) for dim, size in enumerate(shape)]
        return self._dims[node]

    def tensor(self, node: fx.Node) -> torch.Tensor | None:
        """A node's value, or the first tensor in it."""
        leaves = pytree.tree_leaves(self.found.get(node))
        return next((leaf for leaf in leaves if isinstance(leaf, torch.Tensor)), None)

    def elements(self, node: fx.Node) -> Size:
        """Number of elements of a node's tensor."""
        return product(self.dims(node))

    def parameter(self, path: str, name: str) -> Size:
        """Number of elements of a module's parameter."""
        shape = getattr(self._modules[path], name).shape
        return product([self.forms.of(self._uses.get((path, name, dim)), size) for dim, size in enumerate(shape)])

    def is_number(self, node: fx.Node) -> bool:
        """Whether a node's value is a number, such as a size."""
        return isinstance(self.found.get(node), (bool, int, float))

    def weight(self, node: fx.Node, meaning: ops.OpSemantics) -> fx.Node:
        """The weight of a functional call, or the right factor of a matrix product."""
        found: fx.Node = factors(node)[1] if meaning.kind == "matmul" else ops.arguments(node)["weight"]
        return found


def fields_of(drafts: Drafts, node: fx.Node, meaning: ops.OpSemantics) -> list[Draft]:
    """The rows of a node: a suffix of the name, the kind and the sizes of each."""
    maker = _MAKERS.get(meaning.kind)
    if maker is not None:
        return maker(drafts, node)
    return [("", _KINDS[meaning.kind], _plain(drafts, node, meaning))]


def product(sizes: list[Size]) -> Size:
    """The product of some sizes, 1 of none."""
    result = _fixed(1)
    for size in sizes:
        result = result * size
    return result


def factors(node: fx.Node) -> tuple[fx.Node, fx.Node]:
    """The two factors of a matrix product, a summand apart."""
    left, right = [source for source in node.args if isinstance(source, fx.Node)][-2:]
    return left, right


def _conv(drafts: Drafts, node: fx.Node) -> list[Draft]:
    weight, bias, options, transposed = _conv_options(drafts, node)
    source, made = drafts.dims(node.all_input_nodes[0]), drafts.dims(node)
    groups = options["groups"]
    depthwise = groups > 1 and groups == source[1].constant
    fields = {
        "n": source[0],
        "c": source[1],
        "k": made[1],
        "groups": source[1] if depthwise else _fixed(groups),
        "bias": _fixed(int(bias)),
        "transposed": _fixed(int(transposed)),
        "dilation": _fixed(max(options["dilation"])),
    }
    fields |= _spatial("in", source[2:]) | _spatial("out", made[2:])
    fields |= _spatial("kernel", [_fixed(int(size)) for size in weight.shape[2:]])
    fields |= _spatial("stride", [_fixed(int(size)) for size in options["stride"]])
    return [("", OpKind.DEPTHWISE if depthwise else OpKind.CONV, fields)]


def _conv_options(drafts: Drafts, node: fx.Node) -> tuple[torch.Tensor, bool, dict[str, Any], bool]:
    """Weight, whether there is a bias, the options, and whether it is transposed."""
    module: Any = drafts.module(node)
    if module is not None:
        options = {"groups": module.groups, "stride": module.stride, "dilation": module.dilation}
        return module.weight, module.bias is not None, options, bool(module.transposed)
    bound = ops.arguments(node)
    weight = drafts.found[bound["weight"]]
    options = {"groups": int(bound["groups"])}
    options |= {name: _spread(bound[name], weight.dim() - 2) for name in ("stride", "dilation")}
    return weight, bound["bias"] is not None, options, "transpose" in str(node.target)


def _linear(drafts: Drafts, node: fx.Node) -> list[Draft]:
    module: Any = drafts.module(node)
    bias = module.bias if module is not None else ops.arguments(node)["bias"]
    return [("", OpKind.LINEAR, _linear_fields(drafts, node, node.all_input_nodes[0], bias is not None))]


def _linear_fields(drafts: Drafts, node: fx.Node, source: fx.Node, bias: bool) -> Fields:
    read, made = drafts.dims(source), drafts.dims(node)
    samples = read[0] if len(read) > 1 else _fixed(1)
    per_sample = product(read[1:-1])
    fields = {"n": samples, "c": read[-1], "k": made[-1], "in_h": per_sample, "out_h": per_sample}
    return {**fields, "bias": _fixed(int(bias))}


def _matmul(drafts: Drafts, node: fx.Node) -> list[Draft]:
    left, right = factors(node)
    if right in drafts.constants:
        return [("", OpKind.LINEAR, _linear_fields(drafts, node, left, len(node.all_input_nodes) == 3))]
    one, other, made = drafts.dims(left), drafts.dims(right), drafts.dims(node)
    rows = made[-2] if len(one) > 1 and len(made) > 1 else _fixed(1)
    columns = other[-1] if len(other) > 1 else _fixed(1)
    fields = {"n": product(made[:-2]), "c": one[-1], "k": columns, "in_h": rows, "out_h": rows}
    return [("", OpKind.MATMUL, fields)]


def _attention(drafts: Drafts, node: fx.Node) -> list[Draft]:
    found = drafts.products.get(node)
    operands = node.args[:3] if found is None else found.operands
    query, key, value = (drafts.dims(source) for source in operands if isinstance(source, fx.Node))
    heads = product(query[:-2])
    rows, columns = query[-2], key[-2]
    scores = {"n": heads, "c": query[-1], "k": columns, "in_h": rows, "out_h": rows}
    softmax = {"n": heads, "c": columns, "k": columns, "in_h": rows, "out_h": rows}
    mixed = {"n": heads, "c": columns, "k": value[-1], "in_h": rows, "out_h": rows}
    return [(".qk", OpKind.MATMUL, scores), (".softmax", OpKind.SOFTMAX, softmax), (".av", OpKind.MATMUL, mixed)]


def _embedding(drafts: Drafts, node: fx.Node) -> list[Draft]:
    module: Any = drafts.module(node)
    entries = module.num_embeddings if module is not None else drafts.found[node.all_input_nodes[0]].shape[0]
    read, made = drafts.dims(node.all_input_nodes[0 if module is not None else -1]), drafts.dims(node)
    length = product(read[1:])
    fields = {"n": read[0] if read else _fixed(1), "c": _fixed(int(entries)), "k": made[-1]}
    return [("", OpKind.EMBEDDING, {**fields, "in_h": length, "out_h": length})]


def _pool(drafts: Drafts, node: fx.Node) -> list[Draft]:
    """Pooling over the dimensions behind the channels; other reductions are rows of plain sizes."""
    source, made = drafts.dims(node.all_input_nodes[0]), drafts.dims(node)
    rank = len(source) - 2
    if len(made) == 2:
        made = [*made, *[_fixed(1)] * rank]
    whole = [size.constant for size in made[2:]] == [1] * rank
    window, stride = _window(drafts, node, rank)
    if not 1 <= rank <= 3 or len(made) != len(source) or source[1] != made[1] or not (whole or window):
        return [("", OpKind.POOL, _plain(drafts, node, ops.semantics(drafts.gm, node)))]
    if not window:
        window = stride = [size.constant for size in source[2:]]
    fields = {"n": source[0], "c": source[1], "k": made[1]}
    fields |= _spatial("in", source[2:]) | _spatial("out", made[2:])
    fields |= _spatial("kernel", [_fixed(size) for size in window])
    return [("", OpKind.POOL, fields | _spatial("stride", [_fixed(size) for size in stride]))]


def _window(drafts: Drafts, node: fx.Node, rank: int) -> tuple[list[int], list[int]]:
    """Kernel and stride of a pooling operator, empty where it has none."""
    module: Any = drafts.module(node)
    if module is not None:
        kernel, stride = getattr(module, "kernel_size", None), getattr(module, "stride", None)
    else:
        bound = ops.arguments(node)
        kernel, stride = bound.get("kernel_size"), bound.get("stride")
    return (_spread(kernel, rank), _spread(stride or kernel, rank)) if kernel else ([], [])


def _plain(drafts: Drafts, node: fx.Node, meaning: ops.OpSemantics) -> Fields:
    """Operators whose cost depends on how much they read and write."""
    made = drafts.dims(node)
    batch, channels, rest = _layout(made)
    fields = {"n": batch, "k": channels, "out_h": rest, "c": channels, "in_h": rest, **_manner(meaning)}
    tensors = [source for source in node.all_input_nodes if isinstance(drafts.found.get(source), torch.Tensor)]
    activations = [source for source in tensors if source not in drafts.constants]
    # A copy reads what it writes; so does a SiLU, however it is written down.
    if not activations or meaning.kind == "copy" or meaning.activation:
        return fields
    sizes = [math.prod(drafts.found[source].shape) for source in activations]
    batch_in, channels_in, rest_in = _layout(drafts.dims(activations[sizes.index(max(sizes))]))
    fields |= {"c": channels_in, "in_h": rest_in, "inputs": _fixed(sizes.count(max(sizes)))}
    if batch_in.constant != batch.constant:
        fields |= {"n": _fixed(1), "k": channels * batch, "c": channels_in * batch_in}
    return fields


def _manner(meaning: ops.OpSemantics) -> Fields:
    """What tells operators of one kind apart that runtimes treat differently."""
    if meaning.kind == "copy":
        return {"transposed": _fixed(int(meaning.name not in _JOINS))}
    if not meaning.activation:
        return {}
    return {"activation": _fixed(Activation.CLAMP if meaning.clamps else Activation.CURVE)}


def _layout(sizes: list[Size]) -> tuple[Size, Size, Size]:
    """Batch, channels and the rest of a tensor: the changeable dimension, or the usual one, is the channels."""
    if not sizes:
        return _fixed(1), _fixed(1), _fixed(1)
    if len(sizes) == 1:
        return _fixed(1), sizes[0], _fixed(1)
    loose = [dim for dim, size in enumerate(sizes) if dim and size.forms]
    axis = loose[0] if loose else (2 if len(sizes) == 3 else 1)
    rest = [size for dim, size in enumerate(sizes) if dim not in (0, axis)]
    return sizes[0], sizes[axis], product(rest)


def _spatial(prefix: str, sizes: list[Size]) -> Fields:
    return {f"{prefix}_{axis}": size for axis, size in zip(_AXES[3 - len(sizes) :], sizes, strict=True)}


def _spread(value: Any, rank: int) -> list[int]:
    spread = list(value) if isinstance(value, (list, tuple)) else [value]
    return (spread * rank)[:rank]


_MAKERS: Mapping[str, Callable[[Drafts, fx.Node], list[Draft]]] = {
    "conv": _conv,
    "linear": _linear,
    "matmul": _matmul,
    "attention": _attention,
    "embedding": _embedding,
    "pool": _pool,
}
