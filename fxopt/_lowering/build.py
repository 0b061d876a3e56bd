"""One walk over the graph: a row for each operator, a value for each tensor."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import fx, nn

from fxopt._lowering.forms import Forms, Size
from fxopt.graph import ops, values_at_batch
from fxopt.graph.channels import analyze
from fxopt.graph.fake_quantize import ActivationQuantizer, QuantizedLayer
from fxopt.targets.rows import FLOAT_BITS, OpKind

__all__ = ["Builder", "Row", "Value"]

_KINDS = {
    "elementwise": OpKind.ELEMENTWISE,
    "pool": OpKind.POOL,
    "norm": OpKind.NORM,
    "softmax": OpKind.SOFTMAX,
    "copy": OpKind.COPY,
    "unknown": OpKind.UNKNOWN,
}
_INTEGER_KINDS = ("elementwise", "pool", "copy", "none")
_AXES = ("d", "h", "w")


@dataclass
class Row:
    """A row in the making.

    Attributes:
        name: Module path or node name.
        operator: Name of the operator.
        kind: Kind of work.
        node: Name of the node.
        fields: The row's sizes.
        layer: Index of the layer whose bits it runs at, or None.
        output: Index of the value that it makes.
        inputs: Indices of the values that it reads.
    """

    name: str
    operator: str
    kind: OpKind
    node: str
    fields: dict[str, Size]
    layer: int | None
    output: int
    inputs: tuple[int, ...]


@dataclass
class Value:
    """A tensor that is stored: views and what a runtime fuses share their source's.

    Attributes:
        size: Number of elements.
        first: Row index at which it begins to live.
        last: Last row that reads it.
        read_by_layers: Layers that read it, at their activation bits.
        read_by_values: Values made from it by operators that run at the bits of their output.
        needs_float: Whether something reads it in floating point.
    """

    size: Size
    first: int
    last: int
    read_by_layers: set[int] = field(default_factory=set)
    read_by_values: set[int] = field(default_factory=set)
    needs_float: bool = False


class Builder:
    """Walks a graph; :meth:`walk` fills ``rows`` and ``values``."""

    def __init__(self, gm: fx.GraphModule, batch: int) -> None:
        self.gm = gm
        self.channels = analyze(gm)
        self.found = values_at_batch(gm, batch)
        self.forms = Forms(self.channels.groups)
        self.channel_sites = {group.site: group.size for group in self.channels.groups}
        self.bit_sites: dict[str, tuple[int, int]] = {}
        self.rows: list[Row] = []
        self.values: list[Value] = []
        self.barriers: list[str] = []
        self._value_of: dict[fx.Node, int] = {}
        self._layers: dict[str, int] = {}

    def walk(self) -> None:
        """Make the rows and values, in graph order."""
        for node in self.gm.graph.nodes:
            meaning = ops.semantics(self.gm, node)
            if node.op == "output":
                for index in self._read(node):
                    self.values[index].needs_float = True
                    self.values[index].last = len(self.rows)
                continue
            if node.op == "get_attr" or not isinstance(self.found.get(node), torch.Tensor):
                self._pass_through(node)
                continue
            if node.op == "placeholder":
                self._store(node)
                continue
            if meaning.kind == "none":
                self._pass_through(node)
                continue
            self._lower_node(node, meaning)

    def alive_matrix(self) -> npt.NDArray[np.float64]:
        """Which value is alive while which row runs, shape (rows, values)."""
        alive = np.zeros((len(self.rows), len(self.values)))
        for index, value in enumerate(self.values):
            alive[max(value.first, 0) : value.last + 1, index] = 1.0
        return alive

    def _read(self, node: fx.Node) -> tuple[int, ...]:
        return tuple(
            dict.fromkeys(self._value_of[source] for source in node.all_input_nodes if source in self._value_of)
        )

    def _pass_through(self, node: fx.Node) -> None:
        """A view or a no-op: its value is its first input's."""
        read = self._read(node)
        if read:
            self._value_of[node] = read[0]

    def _store(self, node: fx.Node) -> int:
        sizes = self._dims(node)
        index = len(self.values)
        self.values.append(Value(_product(sizes), len(self.rows), len(self.rows)))
        self._value_of[node] = index
        return index

    def _dims(self, node: fx.Node) -> list[Size]:
        """Size of every dimension of a node's tensor at the batch lowered for."""
        value = self.found[node]
        shape = [int(size) for size in value.shape]
        return [self.forms.of(self.channels.labels(node, dim), size) for dim, size in enumerate(shape)]

    def _lower_node(self, node: fx.Node, meaning: ops.OpSemantics) -> None:
        inputs = self._read(node)
        fused = meaning.fuses and self._fuses(node)
        layer = self._layer(node, meaning)
        rows = self._rows_of(node, meaning)
        output = self._value_of[node.all_input_nodes[0]] if fused and inputs else self._store(node)
        self._value_of[node] = output
        for index in inputs:
            value = self.values[index]
            value.last = max(value.last, len(self.rows) + len(rows) - 1)
            if layer is not None:
                value.read_by_layers.add(layer)
            elif meaning.kind in _INTEGER_KINDS or fused:
                if index != output:
                    value.read_by_values.add(output)
            else:
                value.needs_float = True
        self.values[output].last = max(self.values[output].last, len(self.rows) + len(rows) - 1)
        name = str(node.target) if node.op == "call_module" else node.name
        for suffix, kind, fields in rows:
            fields["fused"] = Forms.fixed(int(fused))
            self.rows.append(Row(name + suffix, meaning.name, kind, node.name, fields, layer, output, inputs))
        if meaning.kind == "unknown":
            self.barriers.append(node.name)

    def _fuses(self, node: fx.Node) -> bool:
        """Whether the input is made by a layer (or something fused to one) and read here alone."""
        source = node.all_input_nodes[0]
        while isinstance(self._module(source), ActivationQuantizer):
            source = source.all_input_nodes[0]
        if sum(not isinstance(self._module(user), ActivationQuantizer) for user in source.users) > 1:
            return False
        meaning = ops.semantics(self.gm, source)
        if meaning.kind in ("conv", "linear"):
            return True
        return meaning.fuses and self._fuses(source)

    def _module(self, node: fx.Node) -> nn.Module | None:
        return self.gm.get_submodule(str(node.target)) if node.op == "call_module" else None

    def _layer(self, node: fx.Node, meaning: ops.OpSemantics) -> int | None:
        """Index of a layer that has bits of its own."""
        module = self._module(node)
        if module is None or meaning.kind not in ("conv", "linear"):
            return None
        path = str(node.target)
        if path not in self._layers:
            self._layers[path] = len(self._layers)
            self.bit_sites[path] = self._current_bits(node, module)
        return self._layers[path]

    def _current_bits(self, node: fx.Node, module: nn.Module) -> tuple[int, int]:
        if not isinstance(module, QuantizedLayer):
            return (FLOAT_BITS, FLOAT_BITS)
        weight_bits = int(module.weight_quantizer.bits)
        source = node.all_input_nodes[0]
        while not isinstance(self._module(source), ActivationQuantizer) and source.all_input_nodes:
            if ops.semantics(self.gm, source).kind != "none":
                return (weight_bits, FLOAT_BITS)
            source = source.all_input_nodes[0]
        quantizer = self._module(source)
        return (weight_bits, int(quantizer.bits) if isinstance(quantizer, ActivationQuantizer) else FLOAT_BITS)

    def _rows_of(self, node: fx.Node, meaning: ops.OpSemantics) -> list[tuple[str, OpKind, dict[str, Size]]]:
        maker = {
            "conv": self._conv,
            "linear": self._linear,
            "matmul": self._matmul,
            "attention": self._attention,
            "embedding": self._embedding,
        }.get(meaning.kind)
        if maker is not None:
            return maker(node)
        return [("", _KINDS[meaning.kind], self._plain(node))]

    def _conv(self, node: fx.Node) -> list[tuple[str, OpKind, dict[str, Size]]]:
        module: Any = self._module(node)
        weight, bias, groups, transposed, stride = self._conv_options(node, module)
        source = self._dims(node.all_input_nodes[0])
        made = self._dims(node)
        fixed = Forms.fixed
        depthwise = groups > 1 and groups == source[1].constant
        fields = {
            "n": source[0],
            "c": source[1],
            "k": made[1],
            "groups": source[1] if depthwise else fixed(groups),
            "bias": fixed(int(bias)),
            "transposed": fixed(int(transposed)),
        }
        fields |= _spatial("in", source[2:]) | _spatial("out", made[2:])
        fields |= _spatial("kernel", [fixed(int(size)) for size in weight.shape[2:]])
        fields |= _spatial("stride", [fixed(int(size)) for size in stride])
        return [("", OpKind.DEPTHWISE if depthwise else OpKind.CONV, fields)]

    def _conv_options(self, node: fx.Node, module: Any) -> tuple[torch.Tensor, bool, int, bool, list[int]]:
        if module is not None:
            transposed = bool(getattr(module, "transposed", False))
            return module.weight, module.bias is not None, module.groups, transposed, list(module.stride)
        bound = _bound_arguments(node)
        weight = self.found[bound["weight"]]
        transposed = "transpose" in str(node.target)
        stride = bound["stride"]
        spread = list(stride) if isinstance(stride, (list, tuple)) else [stride]
        rank = weight.dim() - 2
        return weight, bound["bias"] is not None, int(bound["groups"]), transposed, (spread * rank)[:rank]

    def _linear(self, node: fx.Node) -> list[tuple[str, OpKind, dict[str, Size]]]:
        module: Any = self._module(node)
        bias = module.bias is not None if module is not None else _bound_arguments(node)["bias"] is not None
        return [("", OpKind.LINEAR, self._linear_fields(node, bias))]

    def _linear_fields(self, node: fx.Node, bias: bool, source: fx.Node | None = None) -> dict[str, Size]:
        read = self._dims(source or node.all_input_nodes[0])
        made = self._dims(node)
        samples = read[0] if len(read) > 1 else Forms.fixed(1)
        per_sample = _product(read[1:-1])
        fields = {"n": samples, "c": read[-1], "k": made[-1], "in_h": per_sample, "out_h": per_sample}
        return {**fields, "bias": Forms.fixed(int(bias))}

    def _matmul(self, node: fx.Node) -> list[tuple[str, OpKind, dict[str, Size]]]:
        factors = [source for source in node.args if isinstance(source, fx.Node)]
        left, right = factors[-2], factors[-1]
        if self._is_parameter(right):
            return [("", OpKind.LINEAR, self._linear_fields(node, len(factors) == 3, left))]
        one, other, made = self._dims(left), self._dims(right), self._dims(node)
        rows = made[-2] if len(one) > 1 and len(made) > 1 else Forms.fixed(1)
        columns = other[-1] if len(other) > 1 else Forms.fixed(1)
        fields = {"n": _product(made[:-2]), "c": one[-1], "k": columns, "in_h": rows, "out_h": rows}
        return [("", OpKind.MATMUL, fields)]

    def _is_parameter(self, node: fx.Node) -> bool:
        while node.op == "call_function" and len(node.all_input_nodes) == 1:
            node = node.all_input_nodes[0]
        return node.op == "get_attr"

    def _attention(self, node: fx.Node) -> list[tuple[str, OpKind, dict[str, Size]]]:
        query, key, value = (self._dims(source) for source in node.all_input_nodes[:3])
        heads = _product(query[:-2])
        rows, columns = query[-2], key[-2]
        scores = {"n": heads, "c": query[-1], "k": columns, "in_h": rows, "out_h": rows}
        softmax = {"n": heads, "c": columns, "k": columns, "in_h": rows, "out_h": rows}
        mixed = {"n": heads, "c": columns, "k": value[-1], "in_h": rows, "out_h": rows}
        return [(".qk", OpKind.MATMUL, scores), (".softmax", OpKind.SOFTMAX, softmax), (".av", OpKind.MATMUL, mixed)]

    def _embedding(self, node: fx.Node) -> list[tuple[str, OpKind, dict[str, Size]]]:
        module: Any = self._module(node)
        entries = module.num_embeddings if module is not None else int(self.found[node.all_input_nodes[0]].shape[0])
        indices = node.all_input_nodes[0] if module is not None else node.all_input_nodes[-1]
        read, made = self._dims(indices), self._dims(node)
        length = _product(read[1:])
        fields = {"n": read[0] if read else Forms.fixed(1), "c": Forms.fixed(int(entries)), "k": made[-1]}
        return [("", OpKind.EMBEDDING, {**fields, "in_h": length, "out_h": length})]

    def _plain(self, node: fx.Node) -> dict[str, Size]:
        """Operators whose cost depends on how much they read and write."""
        sources = [source for source in node.all_input_nodes if isinstance(self.found.get(source), torch.Tensor)]
        made = self._dims(node)
        batch, channels, rest = _layout(made)
        fields = {"n": batch, "k": channels, "out_h": rest, "c": channels, "in_h": rest}
        activations = [source for source in sources if source in self._value_of]
        if activations:
            largest = max(activations, key=lambda source: math.prod(self.found[source].shape))
            read = self._dims(largest)
            batch_in, channels_in, rest_in = _layout(read)
            fields |= {"c": channels_in, "in_h": rest_in}
            fields["n"] = batch
            if batch_in.constant != batch.constant:
                fields |= {"n": Forms.fixed(1), "k": channels * batch, "c": channels_in * batch_in}
            total = math.prod(self.found[largest].shape)
            full = sum(math.prod(self.found[source].shape) == total for source in activations)
            fields["inputs"] = Forms.fixed(max(full, 1))
        module = self._module(node)
        affine = module is not None and getattr(module, "weight", None) is not None
        fields["bias"] = Forms.fixed(int(affine and ops.semantics(self.gm, node).kind == "norm"))
        if ops.semantics(self.gm, node).name == "cat":
            fields |= {"c": fields["k"], "in_h": fields["out_h"], "inputs": Forms.fixed(1)}
        return fields


def _layout(sizes: list[Size]) -> tuple[Size, Size, Size]:
    """Batch, channels and the rest of a tensor: the changeable dimension, or the usual one, is the channels."""
    if not sizes:
        return Forms.fixed(1), Forms.fixed(1), Forms.fixed(1)
    if len(sizes) == 1:
        return Forms.fixed(1), sizes[0], Forms.fixed(1)
    loose = [dim for dim, size in enumerate(sizes) if dim and size.forms]
    axis = loose[0] if loose else (2 if len(sizes) == 3 else 1)
    rest = [size for dim, size in enumerate(sizes) if dim not in (0, axis)]
    return sizes[0], sizes[axis], _product(rest)


def _product(sizes: list[Size]) -> Size:
    result = Forms.fixed(1)
    for size in sizes:
        result = result * size
    return result


def _spatial(prefix: str, sizes: list[Size]) -> dict[str, Size]:
    return {f"{prefix}_{axis}": size for axis, size in zip(_AXES[3 - len(sizes) :], sizes, strict=True)}


def _bound_arguments(node: fx.Node) -> dict[str, Any]:
    bound = {}
    for index, argument in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        given = node.kwargs.get(argument.name, argument.default_value)
        bound[argument.name] = node.args[index] if index < len(node.args) else given
    return bound
