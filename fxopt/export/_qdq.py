"""From a float ONNX model with markers to standard QuantizeLinear / DequantizeLinear form.

Activations become Q and DQ on uint8, weights int8 initializers with a DQ (one scale an output channel), biases int32
initializers whose scale is that of input times weight. That is what integer kernels are selected by. Integers stand
under the names of the user's own parameters.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from fxopt.errors import ExportError
from fxopt.export._torch_onnx import MARKER, MARKER_DOMAIN, Marked, Quantizers, rename_values
from fxopt.graph.fake_quantize import ActivationQuantizer, WeightQuantizer

if TYPE_CHECKING:
    import onnx

__all__ = ["to_qdq"]

_MAX_BIAS = 2.0**30
"""Largest magnitude of an integer bias; leaves room for the sum of products in 32 bits."""

_BIASED = {"Conv": 2, "ConvTranspose": 2, "Gemm": 2}
"""Operators whose integer kernels take an int32 bias, and the input that it is."""


@dataclass(eq=False)
class _Weight:
    """A quantized weight on its way into the file."""

    name: str
    values: NDArray[np.float32]
    quantizer: WeightQuantizer
    permutation: tuple[int, ...] | None
    output: str = ""
    least_scale: NDArray[np.float32] = field(default_factory=lambda: np.zeros(1, np.float32))

    @property
    def axis(self) -> int:
        axis = self.quantizer.axis
        return axis if self.permutation is None else self.permutation.index(axis)

    @property
    def scale(self) -> NDArray[np.float32]:
        own: NDArray[np.float32] = self.quantizer.scale.detach().cpu().numpy()
        return np.maximum(own, self.least_scale).astype(np.float32)

    def integers(self) -> NDArray[np.int8]:
        """On the quantizer's grid, unless a bias called for larger steps."""
        weight = torch.from_numpy(self.values)
        plain = self.quantizer.integers(weight).numpy()
        own = self.quantizer.scale.detach().cpu().numpy()
        ratio = np.moveaxis(np.ones(weight.shape, np.float64), self.quantizer.axis, -1) * (own / self.scale)
        found = np.rint(plain * np.moveaxis(ratio, -1, self.quantizer.axis)).astype(np.int8)
        return found if self.permutation is None else np.ascontiguousarray(found.transpose(self.permutation))


def to_qdq(marked: Marked) -> dict[str, str]:
    """Rewrite a model with markers in place, to standard operators alone.

    Returns:
        The name of the tensor that holds the integers of each activation quantizer, by the quantizer's path.

    Raises:
        ExportError: If a quantizer has a grid that standard Q / DQ with integer kernels cannot hold.
    """
    return _Rewriter(marked.model, marked.quantizers).run()


class _Rewriter:
    def __init__(self, model: onnx.ModelProto, quantizers: Quantizers) -> None:
        self._model = model
        self._graph = model.graph
        self._quantizers = quantizers
        self._initializers = {tensor.name: tensor for tensor in model.graph.initializer}
        self._readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in model.graph.node:
            for name in node.input:
                self._readers[name].append(node)
        self._renamed: dict[str, str] = {}
        self._weights: dict[tuple[str, tuple[int, ...] | None], _Weight] = {}
        self._weight_of: dict[str, _Weight] = {}
        self._scale_of: dict[str, str] = {}
        self._path_of: dict[str, str] = {}
        self._dropped: set[str] = set()
        self._biases: dict[tuple[str, str, str], str] = {}
        self._stored: dict[str, onnx.TensorProto] = {}

    def run(self) -> dict[str, str]:
        import onnx

        for node in self._graph.node:
            self._survey(node)
        self._fit_biases()
        nodes = [new for node in self._graph.node for new in self._rewritten(node)]
        del self._graph.node[:]
        self._graph.node.extend(nodes)
        self._tidy()
        renamed = self._name_values()
        kept = [(entry.domain, entry.version) for entry in self._model.opset_import if entry.domain != MARKER_DOMAIN]
        del self._model.opset_import[:]
        self._model.opset_import.extend(onnx.helper.make_opsetid(domain, version) for domain, version in kept)
        return {path: renamed[f"{output}_quantized"] for output, path in self._path_of.items()}

    def _survey(self, node: onnx.NodeProto) -> None:
        """Note what every marker marks."""
        if node.domain != MARKER_DOMAIN or node.op_type != MARKER:
            return
        attributes = {entry.name: entry.s.decode() for entry in node.attribute}
        site = attributes["site"]
        quantizer = self._quantizers[site]
        if isinstance(quantizer, ActivationQuantizer):
            if quantizer.bits != 8:
                raise ExportError(
                    f"{site!r} has {quantizer.bits} bits; activations are exported with 8 bits or in float."
                )
            self._scale_of[node.output[0]] = site
            self._path_of[node.output[0]] = attributes["path"]
            return
        if node.input[0] not in self._initializers:
            raise ExportError(
                f"The weight of {site.rpartition('.')[0]!r} is computed, not stored; quantize stored ones."
            )
        self._survey_weight(node, quantizer)

    def _survey_weight(self, node: onnx.NodeProto, quantizer: WeightQuantizer) -> None:
        """A weight is read as it is, or by transpositions, which are done here and now."""
        from onnx import numpy_helper

        name = node.input[0]
        values = numpy_helper.to_array(self._initializers[name]).astype(np.float32)
        for reader in self._readers[node.output[0]]:
            transposed = reader.op_type == "Transpose"
            permutation = tuple(reader.attribute[0].ints) if transposed else None
            weight = self._weights.setdefault((name, permutation), _Weight(name, values, quantizer, permutation))
            output = reader.output[0] if transposed else node.output[0]
            if weight.output:
                self._renamed[output] = weight.output
            weight.output = weight.output or output
            self._weight_of[output] = weight
            if transposed:
                self._dropped.add(output)

    def _fit_biases(self) -> None:
        """A channel of tiny weights with a large bias gets larger steps, so that the bias fits into 32 bits."""
        for node in self._graph.node:
            found = self._bias_of(node)
            if found is None:
                continue
            weight, site, bias = found
            least = np.abs(self._array(bias)) / (_MAX_BIAS * float(self._activation(site).scale))
            weight.least_scale = np.maximum(weight.least_scale, least.astype(np.float32))

    def _bias_of(self, node: onnx.NodeProto) -> tuple[_Weight, str, str] | None:
        """Weight, site of the input's quantizer and name of the bias, if all three are quantized or can be."""
        index = _BIASED.get(node.op_type)
        if index is None or len(node.input) <= index or node.input[index] not in self._initializers:
            return None
        weight, site = self._weight_of.get(node.input[1]), self._scale_of.get(node.input[0])
        if weight is None or site is None or len(self._array(node.input[index])) != len(weight.scale):
            return None
        return weight, site, node.input[index]

    def _rewritten(self, node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
        output = node.output[0]
        if output in self._scale_of:
            yield from self._quantize(self._scale_of[output], node.input[0], output)
            return
        if node.domain == MARKER_DOMAIN or output in self._dropped:
            weight = self._weight_of.get(output)
            if weight is not None and weight.output == output:
                yield self._dequantize_weight(weight)
            return
        found = self._bias_of(node)
        if found is not None:
            yield from self._quantize_bias(node, *found)
        node.input[:] = [self._renamed.get(name, name) for name in node.input]
        yield from self._as_global_pool(node)

    def _quantize(self, site: str, value: str, output: str) -> Iterator[onnx.NodeProto]:
        from onnx import helper

        quantizer = self._activation(site)
        scale = self._store(f"{site}.scale", quantizer.scale.detach().cpu().numpy().astype(np.float32))
        zero = self._store(f"{site}.zero_point", quantizer.zero_point.cpu().numpy().astype(np.uint8))
        held = f"{output}_quantized"
        yield helper.make_node("QuantizeLinear", [value, scale, zero], [held])
        yield helper.make_node("DequantizeLinear", [held, scale, zero], [output])

    def _dequantize_weight(self, weight: _Weight) -> onnx.NodeProto:
        from onnx import helper

        read_as_float = any(reader.domain != MARKER_DOMAIN for reader in self._readers[weight.name])
        stored = self._store_new(weight.name, weight.integers(), read_as_float)
        scale = self._store(f"{stored}_scale", weight.scale)
        zero = self._store(f"{stored}_zero_point", np.zeros(weight.scale.shape, np.int8))
        return helper.make_node("DequantizeLinear", [stored, scale, zero], [weight.output], axis=weight.axis)

    def _quantize_bias(self, node: onnx.NodeProto, weight: _Weight, site: str, bias: str) -> Iterator[onnx.NodeProto]:
        """Round the bias to the grid of the products that it is added to."""
        from onnx import helper

        key = (bias, weight.name, site)
        index = _BIASED[node.op_type]
        if key not in self._biases:
            scale = (self._activation(site).scale.cpu().numpy().astype(np.float32) * weight.scale).astype(np.float32)
            integers = np.rint(self._array(bias).astype(np.float64) / scale)
            read_as_float = any(self._bias_of(reader) is None for reader in self._readers[bias])
            stored = self._store_new(bias, integers.astype(np.int32), read_as_float)
            output = f"{stored}_dequantized"
            self._biases[key] = output
            inputs = [stored, self._store(f"{stored}_scale", scale)]
            yield helper.make_node("DequantizeLinear", inputs, [output], axis=0)
        node.input[index] = self._biases[key]

    def _as_global_pool(self, node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
        """Means over all positions have an integer kernel as GlobalAveragePool alone."""
        from onnx import helper

        readers = self._readers[node.output[0]]
        site = next((self._scale_of.get(reader.output[0]) for reader in readers), None)
        if node.op_type != "ReduceMean" or node.input[0] not in self._scale_of or site is None or len(readers) != 1:
            yield node
            return
        attributes: dict[str, Any] = {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}
        axes, rank = self._array(node.input[1]), self._rank(node.input[0])
        if rank is None or {int(axis) % rank for axis in axes} != set(range(2, rank)):
            yield node
            return
        output = node.output[0]
        if attributes.get("keepdims", 1):
            yield helper.make_node("GlobalAveragePool", [node.input[0]], [output], name=node.name)
            return
        pooled = f"{output}_pooled"
        yield helper.make_node("GlobalAveragePool", [node.input[0]], [pooled], name=node.name)
        yield from self._quantize(site, pooled, f"{pooled}_held")
        squeezed = self._store(f"{output}_axes", np.arange(2, rank, dtype=np.int64))
        yield helper.make_node("Squeeze", [f"{pooled}_held", squeezed], [output])

    def _rank(self, name: str) -> int | None:
        for value in (*self._graph.value_info, *self._graph.output):
            if value.name == name:
                return len(value.type.tensor_type.shape.dim)
        return None

    def _activation(self, site: str) -> ActivationQuantizer:
        quantizer = self._quantizers[site]
        if not isinstance(quantizer, ActivationQuantizer):
            raise ExportError(f"{site!r} is no activation quantizer.")
        return quantizer

    def _array(self, name: str) -> NDArray[Any]:
        from onnx import numpy_helper

        return numpy_helper.to_array(self._initializers[name])

    def _store(self, name: str, values: NDArray[Any]) -> str:
        """Store an initializer, once."""
        from onnx import numpy_helper

        if name not in self._stored:
            self._stored[name] = numpy_helper.from_array(np.asarray(values, order="C"), name)
        return name

    def _store_new(self, name: str, values: NDArray[Any], read_as_float: bool) -> str:
        """Store integers under the parameter's name, or one beside it if that still stands for something else."""
        free, count = name, 0
        while free in self._stored or (read_as_float and free in self._initializers):
            count += 1
            free = f"{name}_quantized_{count}"
        return self._store(free, values)

    def _tidy(self) -> None:
        """Drop initializers that nobody reads and notes on values that are gone."""
        read = {name for node in self._graph.node for name in node.input}
        floats = [_copied(t) for name, t in self._initializers.items() if name in read and name not in self._stored]
        del self._graph.initializer[:]
        self._graph.initializer.extend([*floats, *self._stored.values()])
        made = {name for node in self._graph.node for name in node.output}
        notes = [_copied(value) for value in self._graph.value_info if value.name in made]
        del self._graph.value_info[:]
        self._graph.value_info.extend(notes)

    def _name_values(self) -> dict[str, str]:
        """Call what the exporter left nameless after the quantizer or weight that it comes from."""
        ends = {value.name for value in self._graph.output}
        taken = {name for node in self._graph.node for name in (*node.input, *node.output)} - set(self._scale_of)
        stems = dict(self._path_of) | {name: f"{weight.name}_dequantized" for name, weight in self._weight_of.items()}
        renamed: dict[str, str] = {}
        for old, stem in stems.items():
            new, count = (old, 1) if old in ends else (stem, 1)
            while new in taken and old not in ends:
                count += 1
                new = f"{stem}_{count}"
            taken.add(new)
            renamed |= {old: new, f"{old}_quantized": f"{new}_quantized"}
        rename_values(self._model, renamed)
        for node in self._graph.node:
            node.name = node.name or f"{node.output[0]}/{node.op_type}"
        return renamed


def _copied(message: Any) -> Any:
    twin = type(message)()
    twin.CopyFrom(message)
    return twin
