"""One walk over the graph: a row for each operator, a value for each tensor."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from fxopt._lowering.forms import Forms, Size
from fxopt._lowering.operators import Constant, Drafts, fields_of
from fxopt.graph import ops, values_at_batch
from fxopt.graph.channels import analyze
from fxopt.graph.fake_quantize import ActivationQuantizer, QuantizedLayer
from fxopt.graph.matrix_products import matrix_products
from fxopt.graph.sparsity import pattern_of, sparse_sites
from fxopt.targets.rows import FLOAT_BITS, OpKind

__all__ = ["Builder", "Row", "Value"]

_LAYERS = ("conv", "linear")
_WITH_WEIGHTS = (*_LAYERS, "embedding")
_INTEGER_KINDS = ("elementwise", "pool", "copy", "resize", "none")
_SILU = ops.OpSemantics("SiLU", "elementwise", "broadcast", activation=True, fuses=True)
_ATTENTION = ops.OpSemantics("scaled_dot_product_attention", "attention", "attention")


@dataclass
class Row:
    """A row in the making.

    Attributes:
        name: Module path or node name.
        operator: Name of the operator.
        kind: Kind of work.
        node: Name of the node.
        fields: The row's sizes.
        held: Sizes of the parameters besides weights and bias that it is the first to read.
        layer: Index of the layer whose bits it runs at, or None.
        output: Index of the value that it makes.
        inputs: Indices of the values that it reads.
    """

    name: str
    operator: str
    kind: OpKind
    node: str
    fields: dict[str, Size]
    held: tuple[Size, ...]
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


class Builder(Drafts):
    """Walks a graph; :meth:`walk` fills ``rows`` and ``values``.

    What is computed from parameters alone is a constant: it has no row, and its parameters count where it is read.
    """

    def __init__(self, gm: fx.GraphModule, batch: int, attention: str) -> None:
        channels = analyze(gm, attention)
        super().__init__(gm, channels, values_at_batch(gm, batch), Forms(channels.groups))
        self.channel_sites = {group.site: group.size for group in channels.groups}
        self.bit_sites: dict[str, tuple[int, int]] = {}
        self.sparse = {site: pattern_of(choice) for site, choice in sparse_sites(gm).items()}
        self.rows: list[Row] = []
        self.values: list[Value] = []
        self.barriers: list[str] = []
        self._layers: dict[str, int] = {}
        self._counted: set[int] = set()
        self._weights: set[int] = set()
        self._numbers: dict[object, int] = {}
        self._value_of: dict[fx.Node, int] = {}
        self.products = {product.node: product for product in matrix_products(gm)}
        self._inner = {node for product in self.products.values() for node in product.inner}

    def walk(self) -> None:
        """Make the rows and values, in graph order."""
        gates = set(self._silu_gates())
        for node in self.gm.graph.nodes:
            if node.op == "output":
                for index in self._read(node):
                    self.values[index].needs_float = True
                    self.values[index].last = len(self.rows) - 1
            elif node.op == "placeholder":
                if isinstance(self.found.get(node), torch.Tensor):
                    self._store(node)
            elif not self._is_constant(node):
                meaning = self._meaning(gates, node)
                passed = node in gates or node in self._inner or self.tensor(node) is None
                if passed or meaning.is_view:
                    self._pass_through(node)
                else:
                    self._lower_node(node, meaning)

    def _meaning(self, gates: set[fx.Node], node: fx.Node) -> ops.OpSemantics:
        """What a node is to a runtime, however it is spelled out."""
        if self._is_product_with(gates, node):
            return _SILU
        product = self.products.get(node)
        return _ATTENTION if product is not None and product.inner else ops.semantics(self.gm, node)

    def _is_constant(self, node: fx.Node) -> bool:
        """Whether a tensor depends on no input of the model; notes what it is computed from."""
        if node.op == "get_attr":
            tensor = self.attribute(node)
            held = {id(tensor): self.elements(node)} if isinstance(tensor, nn.Parameter) else {}
            self.constants[node] = Constant(self._number(id(tensor)), held)
        elif all(source in self.constants or self.is_number(source) for source in node.all_input_nodes):
            held = self._own_parameters(node)
            for source in node.all_input_nodes:
                held |= self.constants[source].parameters if source in self.constants else {}
            call = fx.map_arg((node.args, node.kwargs), self._key)
            self.constants[node] = Constant(self._number(f"{node.op} {node.target} {call}"), held)
        return node in self.constants and not self.is_number(node)

    def _number(self, computation: object) -> int:
        return self._numbers.setdefault(computation, len(self._numbers))

    def _key(self, source: fx.Node) -> Any:
        return f"constant {self.constants[source].key}" if source in self.constants else source

    def _silu_gates(self) -> Iterator[fx.Node]:
        """The sigmoid of every ``x * sigmoid(x)``, which runtimes compute at once, as they do SiLU."""
        for node in self.gm.graph.nodes:
            if ops.semantics(self.gm, node).name.lower() != "sigmoid":
                continue
            readers = self._readers(node)
            product = readers[0] if len(readers) == 1 else None
            if product is None or ops.semantics(self.gm, product).name != "mul":
                continue
            factors = {self._through(source) for source in product.all_input_nodes}
            if factors == {node, self._through(node.all_input_nodes[0])}:
                yield node

    def _is_product_with(self, gates: set[fx.Node], node: fx.Node) -> bool:
        read = {self._through(source) for source in node.all_input_nodes}
        return not gates.isdisjoint(read) and self._through(node) is node

    def _through(self, node: fx.Node) -> fx.Node:
        """The node whose value a node passes on quantized, or itself."""
        while isinstance(self.module(node), ActivationQuantizer):
            node = node.all_input_nodes[0]
        return node

    def _readers(self, node: fx.Node) -> list[fx.Node]:
        """The nodes that read a value, as it is or quantized."""
        found: dict[fx.Node, None] = {}
        for user in node.users:
            quantized = isinstance(self.module(user), ActivationQuantizer)
            found |= dict.fromkeys(self._readers(user) if quantized else [user])
        return list(found)

    def _sources(self, node: fx.Node) -> list[fx.Node]:
        """What a node reads; of a spelled-out attention, what all of it reads."""
        product = self.products.get(node)
        if product is None:
            return node.all_input_nodes
        return [*product.operands, *([] if product.mask is None else [product.mask])]

    def _read(self, node: fx.Node) -> tuple[int, ...]:
        sources = self._sources(node)
        return tuple(dict.fromkeys(self._value_of[source] for source in sources if source in self._value_of))

    def _pass_through(self, node: fx.Node) -> None:
        """A view or a no-op: its value is its first input's."""
        read = self._read(node)
        if read:
            self._value_of[node] = read[0]

    def _store(self, node: fx.Node) -> int:
        index = len(self.values)
        self.values.append(Value(self.elements(node), len(self.rows), len(self.rows)))
        self._value_of[node] = index
        return index

    def _lower_node(self, node: fx.Node, meaning: ops.OpSemantics) -> None:
        inputs = self._read(node)
        fused = meaning.fuses and bool(inputs) and self._fuses(node)
        layer = self._layer(node, meaning)
        drafts = fields_of(self, node, meaning)
        last = len(self.rows) + len(drafts) - 1
        output = inputs[0] if fused else self._store(node)
        self._value_of[node] = output
        product = self.products.get(node)
        # The mask of an attention is added in floating point.
        masks = set() if product is None else set(inputs) - {self._value_of[one] for one in product.operands}
        for index in inputs:
            value = self.values[index]
            value.last = max(value.last, last)
            if layer is not None and index not in masks:
                value.read_by_layers.add(layer)
            elif meaning.kind in _INTEGER_KINDS or fused:
                if index != output:
                    value.read_by_values.add(output)
            else:
                value.needs_float = True
        self.values[output].last = max(self.values[output].last, last)
        name = str(node.target) if node.op == "call_module" else node.name
        name = name if product is None else product.site
        reused, held = self._parameters(node, meaning)
        shared = {"fused": Forms.fixed(int(fused)), "reused": Forms.fixed(int(reused))}
        for suffix, kind, fields in drafts:
            # A softmax between products of integers stays in floating point.
            own, read = (None, ()) if product is not None and kind == OpKind.SOFTMAX else (layer, inputs)
            row = Row(name + suffix, meaning.name, kind, node.name, fields | shared, held, own, output, read)
            self.rows.append(row)
            shared, held = {"fused": shared["fused"]}, ()
        if meaning.kind == "unknown":
            self.barriers.append(node.name)

    def _parameters(self, node: fx.Node, meaning: ops.OpSemantics) -> tuple[bool, tuple[Size, ...]]:
        """Whether the weights of a row are stored by another, and what else it is the first to hold."""
        held = self._own_parameters(node)
        for source in self._sources(node):
            held |= self.constants[source].parameters if source in self.constants else {}
        fresh = tuple(size for key, size in held.items() if key not in self._counted)
        self._counted |= held.keys()
        if meaning.kind not in (*_WITH_WEIGHTS, "matmul"):
            return False, fresh
        if node in self.products:
            return False, fresh
        module: Any = self.module(node)
        weight = None if module is not None else self.weight(node, meaning)
        if weight is not None and weight not in self.constants:
            # Computed while the model runs; a product of activations has no weights at all.
            return meaning.kind != "matmul", fresh
        # Slices of one tensor are weights of their own; the same computation made twice is one weight.
        key = self._number(id(module.weight)) if weight is None else self.constants[weight].key
        reused = key in self._weights
        self._weights.add(key)
        return reused, ()

    def _own_parameters(self, node: fx.Node) -> dict[int, Size]:
        module = self.module(node)
        if module is None:
            return {}
        owned = module.named_parameters(recurse=False)
        return {id(tensor): self.parameter(str(node.target), name) for name, tensor in owned}

    def _fuses(self, node: fx.Node) -> bool:
        """Whether the input is made by a layer (or something fused to one) and read here alone."""
        source = self._through(node.all_input_nodes[0])
        readers = {reader for reader in self._readers(source) if reader is not node}
        if any(self._readers(reader) != [node] or reader not in self._gate_of(node) for reader in readers):
            return False
        meaning = ops.semantics(self.gm, source)
        if meaning.kind in _LAYERS:
            return True
        return meaning.fuses and source not in self.constants and self._fuses(source)

    def _gate_of(self, node: fx.Node) -> list[fx.Node]:
        return [self._through(source) for source in node.all_input_nodes]

    def _layer(self, node: fx.Node, meaning: ops.OpSemantics) -> int | None:
        """Index of a layer, or a product of activations, that has bits of its own."""
        module, product = self.module(node), self.products.get(node)
        if product is not None:
            path, bits = product.site, (product.bits, product.bits)
        elif module is not None and meaning.kind in _LAYERS:
            path, bits = str(node.target), _current_bits(module)
        else:
            return None
        if path not in self._layers:
            self._layers[path] = len(self._layers)
            self.bit_sites[path] = bits
        return self._layers[path]


def _current_bits(module: nn.Module) -> tuple[int, int]:
    if not isinstance(module, QuantizedLayer):
        return (FLOAT_BITS, FLOAT_BITS)
    return (int(module.weight_quantizer.bits), int(module.activation_bits))
