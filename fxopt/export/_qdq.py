"""Standard QuantizeLinear / DequantizeLinear form.

Activations become Q and DQ on unsigned integers, weights integer initializers with a DQ (one scale an output channel),
biases int32 initializers whose scale is that of input times weight: that is what integer kernels are selected by.
Integers stand under the names of the user's own parameters.

A grid of fewer than 8 bits keeps its steps in a container. In portable form that is 8 bits wide, whatever the grid, for
onnxruntime has integer kernels for nothing narrower: activations are clipped to the grid's own integers behind their Q,
where a kernel is already done, and weights multiplied by a power of two that their steps are divided by, for the steps
of a bias are those of a weight times an activation, and would be coarse. In native form it is the narrowest type that
ONNX has (2, 4 or 8 bits, packed), and the file is as small as its bits say; activations are clipped in front of their Q
where the type is wider than the grid, and biases stay floats.

A linear layer whose weight alone is quantized becomes MatMul and Add on 4-bit or 8-bit weights, which onnxruntime runs
as MatMulNBits. The weight of any other layer that computes in floats is a Cast and a Mul of its integers, or with a
codebook a Gather of its indices: a runtime computes those once, when it loads the file, and a DequantizeLinear at every
run, for it is kept for kernels to be found by it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fxopt.export._codebooks import store_codebooks
from fxopt.export._rewriter import QuantizedWeight, Rewriter, Rewritten
from fxopt.export._torch_onnx import MARKER_DOMAIN, Marked
from fxopt.graph.fake_quantize import ActivationQuantizer

if TYPE_CHECKING:
    import onnx

__all__ = ["NATIVE_BITS", "container_bits", "least_opset", "to_qdq"]

NATIVE_BITS = (2, 4, 8)
"""Widths of the integers that ONNX can hold packed."""

_LEAST_OPSETS = {2: 25, 4: 21, 8: 13}

_MAX_BIAS = 2.0**30
"""Largest magnitude of an integer bias; leaves room for the sum of products in 32 bits."""

_LARGEST = 127
"""The largest integer of a weight in 8 bits."""

_FUSED_BY_Q = ("Clip", "Relu")
"""Operators that an integer kernel takes in, between a layer and its Q."""

_BIASED = {"Conv": 2, "ConvTranspose": 2, "Gemm": 2}
"""Operators whose integer kernels take an int32 bias, and the input that it is."""


def container_bits(bits: int, *, native: bool) -> int:
    """Bits of the integer type that holds a grid of so many bits."""
    return next(width for width in NATIVE_BITS if width >= bits) if native else NATIVE_BITS[-1]


def least_opset(bits: Iterable[int], *, native: bool) -> int:
    """The least opset that has the types for grids of these bits."""
    return max((_LEAST_OPSETS[container_bits(one, native=native)] for one in bits), default=0)


def to_qdq(marked: Marked, *, native: bool, opset: int) -> Rewritten:
    """Rewrite a model with markers in place, to standard operators alone.

    Args:
        marked: The model.
        native: Whether grids are packed into the narrowest types, or into 8 bits throughout.
        opset: The opset that the file is to have.

    Raises:
        ExportError: If the weight of a quantized layer is not stored in the model.
    """
    return _QdqRewriter(marked, native=native, opset=opset).run()


_COARSE = 0.125
"""Part of a step behind a layer that rounding its bias may take."""
_FUSED_BY_GEMM = ("Elu", "HardSigmoid", "LeakyRelu", "Relu", "Selu", "Sigmoid", "Softplus", "Softsign", "Tanh")


class _QdqRewriter(Rewriter):
    def __init__(self, marked: Marked, *, native: bool, opset: int) -> None:
        super().__init__(marked)
        self._native = native
        self._packs = opset >= _LEAST_OPSETS[4]
        self._biases: dict[tuple[str, str, str], str] = {}
        self._sources: dict[str, str] = {}
        self._alone: set[str] = set()
        self._loose: dict[str, str] = {}
        self._floats: set[str] = set()
        self._codebooks = marked.codebooks

    def run(self) -> Rewritten:
        """Rewrite the model, and store codebooks as such.

        Raises:
            ExportError: If a quantizer has a grid that the form cannot hold.
        """
        made = super().run()
        store_codebooks(self.model, self._codebooks, self._index_bits)
        return made

    def prepare(self) -> None:
        """See what is redundant, which weights are quantized alone, and which biases integers do not hold."""
        for output, site in self.site_of.items():
            value = self.makers[output].input[0]
            self._sources[output] = self._before_redundant(value, self.activation(site))
        for node in self.graph.node:
            weight = self.weight_of.get(node.input[1]) if len(node.input) > 1 else None
            if weight is not None and node.op_type in ("Gemm", "MatMul") and node.input[0] not in self.site_of:
                self._alone.add(weight.output)
        if not self._native:
            for output, weight in self.weight_of.items():
                if weight.output not in self._alone and not any(map(self._is_integer, self.readers[output])):
                    self._floats.add(weight.output)
                plain = weight.output in self._alone | self._floats
                weight.factor = 1 if plain else 2 ** int(math.log2(_LARGEST / weight.quantizer.largest))
            self._fit_biases()
            self._leave_coarse_biases()

    def _index_bits(self, bits: int) -> int:
        """Bits of the type that holds an index of so many bits."""
        least = container_bits(bits, native=True)
        return least if self._native else self._packed_bits(least)

    def _packed_bits(self, least: int) -> int:
        """Bits of the narrowest type that every opset from the default one on has."""
        return max(least, 4) if self._packs else NATIVE_BITS[-1]

    def _fit_biases(self) -> None:
        """A channel of tiny weights with a large bias gets larger steps, so that the bias fits into 32 bits."""
        for node in self.graph.node:
            found = self._bias_of(node)
            if found is None:
                continue
            weight, site, bias = found
            least = np.abs(self.array(bias)) / (_MAX_BIAS * float(self.activation(site).scale.detach()))
            weight.least_scale = np.maximum(weight.least_scale, least.astype(np.float32))

    def _leave_coarse_biases(self) -> None:
        """A layer computes in floats where the integers of its bias are too coarse for what is made of its outputs.

        So it is behind a channel of huge weights that a batch norm of next to no variance was folded into.
        """
        for node in self.graph.node:
            found = self._bias_of(node)
            steps = [float(self.activation(site).scale.detach()) for site in self._sites_behind(node)]
            if found is None or not steps:
                continue
            weight, site, bias = found
            scale = self._bias_scale(weight, site)
            values = self.array(bias).astype(np.float64)
            if np.abs(np.rint(values / scale) * scale - values).max(initial=0.0) > _COARSE * min(steps):
                self._floats.add(weight.output)
                weight.factor, weight.least_scale = 1, np.zeros(1, np.float32)

    def _bias_scale(self, weight: QuantizedWeight, site: str) -> NDArray[np.float32]:
        """The steps of the products that a bias is added to, one for each channel."""
        own = self.activation(site).scale.detach().cpu().numpy().astype(np.float32)
        return (own * weight.scale).astype(np.float32)

    def permutation_of(self, reader: onnx.NodeProto) -> tuple[int, ...] | None:
        """A product of floats with integer weights has a kernel as MatMul alone, which wants the weight transposed."""
        return (1, 0) if self._is_weight_only(reader) else super().permutation_of(reader)

    def quantize(self, site: str, value: str, output: str) -> Iterator[onnx.NodeProto]:
        """Q and DQ, and a clip where the container is wider than the grid."""
        from onnx import helper

        quantizer = self.activation(site)
        width = container_bits(quantizer.bits, native=self._native)
        scale = self.store(f"{site}.scale", quantizer.scale.detach().cpu().numpy().astype(np.float32))
        zero = self.store(f"{site}.zero_point", _unsigned(quantizer.zero_point.cpu().numpy(), width))
        held, unclipped = f"{output}_quantized", f"{output}_unclipped"
        value = self._sources.get(output, value)
        if quantizer.bits == width:
            yield helper.make_node("QuantizeLinear", [value, scale, zero], [held])
        elif self._native:
            low, high = (np.asarray(bound, np.float32) for bound in _range(quantizer))
            bounds = [self.store(f"{site}.low", low), self.store(f"{site}.high", high)]
            # A Clip in front of a Q is refused by onnxruntime where the integers have fewer than 8 bits.
            yield helper.make_node("Max", [value, bounds[0]], [f"{output}_raised"])
            yield helper.make_node("Min", [f"{output}_raised", bounds[1]], [unclipped])
            yield helper.make_node("QuantizeLinear", [unclipped, scale, zero], [held])
        else:
            yield helper.make_node("QuantizeLinear", [value, scale, zero], [unclipped])
            largest = self.store(f"{site}.largest", np.asarray(quantizer.largest, np.uint8))
            yield helper.make_node("Clip", [unclipped, "", largest], [held])
        yield helper.make_node("DequantizeLinear", [held, scale, zero], [output])

    def dequantize(self, weight: QuantizedWeight) -> Iterator[onnx.NodeProto]:
        """A DQ on stored integers, or what a runtime computes when it loads the file."""
        from onnx import TensorProto, helper

        width = container_bits(weight.quantizer.bits, native=self._native)
        folded = weight.output in self._floats
        if folded or (weight.output in self._alone and not self._native):
            width = self._packed_bits(container_bits(weight.quantizer.bits, native=True))
        read_as_float = any(reader.domain != MARKER_DOMAIN for reader in self.readers[weight.name])
        integers = weight.integers()
        stored = self.store_new(weight.name, _signed(integers, width), read_as_float)
        if folded:
            size = [-1 if axis == weight.axis else 1 for axis in range(integers.ndim)]
            scale = self.store(f"{stored}_scale", weight.scale.reshape(size))
            plain = f"{weight.output}_integers"
            yield helper.make_node("Cast", [stored], [plain], to=TensorProto.FLOAT)
            yield helper.make_node("Mul", [plain, scale], [weight.output])
            return
        inputs = [stored, self.store(f"{stored}_scale", weight.scale)]
        if weight.output not in self._alone:
            inputs.append(self.store(f"{stored}_zero_point", _signed(np.zeros(weight.scale.shape, np.int8), width)))
        yield helper.make_node("DequantizeLinear", inputs, [weight.output], axis=weight.axis)

    def rewrite(self, node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
        """Integer biases, and the spellings that kernels are selected by."""
        from onnx import helper

        if self._is_weight_only(node):
            product = f"{node.output[0]}_product" if len(node.input) > 2 else node.output[0]
            yield helper.make_node("MatMul", list(node.input[:2]), [product], name=node.name)
            if len(node.input) > 2:
                # Add and an activation function behind it would be fused to a Gemm of floats.
                fused = any(reader.op_type in _FUSED_BY_GEMM for reader in self.readers[node.output[0]])
                yield helper.make_node("Sum" if fused else "Add", [product, node.input[2]], [node.output[0]])
            return
        if self._native and node.op_type == "Clip":
            yield from self._as_bounds(node)
            return
        found = self._bias_of(node)
        if found is not None:
            yield from self._quantize_bias(node, *found)
        if self._is_float_amid_integers(node):
            yield from self._loosen(node)
        yield from self._as_global_pool(node)

    def _is_float_amid_integers(self, node: onnx.NodeProto) -> bool:
        """Whether onnxruntime would put weight and bias of a layer that stays in floats on grids of its own.

        It does so between a DQ and a Q.
        """
        if self._native or node.op_type not in _BIASED or node.input[0] not in self.site_of:
            return False
        weight = self.weight_of.get(node.input[1])
        floats = self.is_stored(node.input[1]) if weight is None else weight.output in self._floats
        return floats and self._writes_integers(node)

    def _is_integer(self, node: onnx.NodeProto) -> bool:
        """Whether a layer with a quantized weight has a kernel that reads it as integers."""
        if node.input[0] not in self.site_of:
            return False
        fused = any(reader.op_type in _FUSED_BY_GEMM for reader in self.readers[node.output[0]])
        writes_floats = node.op_type == "MatMul" or (node.op_type == "Gemm" and not fused)
        return writes_floats or self._writes_integers(node)

    def _writes_integers(self, node: onnx.NodeProto) -> bool:
        """Whether a Q stands behind a node, or behind the activation function there."""
        return bool(self._sites_behind(node))

    def _sites_behind(self, node: onnx.NodeProto) -> list[str]:
        """The sites of the quantizers behind a node, or behind the activation function there."""
        behind = self.readers[node.output[0]]
        while len(behind) == 1 and behind[0].op_type in _FUSED_BY_Q:
            behind = self.readers[behind[0].output[0]]
        return [self.site_of[reader.output[0]] for reader in behind if reader.output[0] in self.site_of]

    def _loosen(self, node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
        """A clip that cuts nothing off keeps a DQ and the layer that reads it apart."""
        from onnx import helper

        held = node.input[0]
        if held not in self._loose:
            self._loose[held] = f"{held}_loose"
            least = self.store("lowest", np.asarray(np.finfo(np.float32).min, np.float32))
            yield helper.make_node("Clip", [held, least], [self._loose[held]])
        node.input[0] = self._loose[held]

    def _as_bounds(self, node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
        """A Clip as Max and Min: onnxruntime refuses one in front of a Q to integers of fewer than 8 bits."""
        from onnx import helper

        bounds = [(kind, name) for kind, name in zip(("Max", "Min"), node.input[1:], strict=False) if name]
        value = node.input[0]
        for index, (kind, name) in enumerate(bounds):
            output = node.output[0] if index == len(bounds) - 1 else f"{node.output[0]}_raised"
            yield helper.make_node(kind, [value, name], [output])
            value = output
        if not bounds:
            yield node

    def _is_weight_only(self, node: onnx.NodeProto) -> bool:
        """Whether a node is a linear layer in floats with a quantized weight."""
        if node.op_type != "Gemm" or node.input[0] in self.site_of:
            return False
        maker = self.makers.get(node.input[1])
        marked = node.input[1] in self.weight_of or (maker is not None and maker.domain == MARKER_DOMAIN)
        return marked and {entry.name: entry.i for entry in node.attribute}.get("transB", 0) == 1

    def _before_redundant(self, value: str, quantizer: ActivationQuantizer) -> str:
        """The value before a ReLU or clip that cuts nothing off which the grid does not cut off too."""
        node = self.makers.get(value)
        # At 8 bits the runtime sees it itself.
        if quantizer.bits == NATIVE_BITS[-1] or node is None or node.op_type not in ("Relu", "Clip"):
            return value
        clip = node.op_type == "Clip"
        least = self._bound(node, 1, -np.inf) if clip else 0.0
        most = self._bound(node, 2, np.inf) if clip else np.inf
        low, high = _range(quantizer)
        half = 0.5 * float(quantizer.scale.detach())
        if len(self.readers[value]) > 1 or not (low > least - half and high < most + half):
            return value
        self.dropped.add(value)
        return str(node.input[0])

    def _bound(self, node: onnx.NodeProto, index: int, default: float) -> float:
        """A bound of a Clip; NaN, which compares with nothing, if it is computed."""
        if len(node.input) <= index or not node.input[index]:
            return default
        return float(self.array(node.input[index])) if self.is_stored(node.input[index]) else float("nan")

    def _bias_of(self, node: onnx.NodeProto) -> tuple[QuantizedWeight, str, str] | None:
        """Weight, site of the input's quantizer and name of the bias, if all three are quantized or can be."""
        index = _BIASED.get(node.op_type)
        if self._native or index is None or len(node.input) <= index or not self.is_stored(node.input[index]):
            return None
        weight, site = self.weight_of.get(node.input[1]), self.site_of.get(node.input[0])
        if weight is None or site is None or len(self.array(node.input[index])) != len(weight.scale):
            return None
        if weight.output in self._floats:
            return None
        return weight, site, node.input[index]

    def _quantize_bias(
        self, node: onnx.NodeProto, weight: QuantizedWeight, site: str, bias: str
    ) -> Iterator[onnx.NodeProto]:
        """Round the bias to the grid of the products that it is added to."""
        from onnx import helper

        key = (bias, weight.output, site)
        if key not in self._biases:
            scale = self._bias_scale(weight, site)
            integers = np.rint(self.array(bias).astype(np.float64) / scale)
            self.rounded[bias] = (integers * scale).astype(np.float32)
            read_as_float = any(self._bias_of(reader) is None for reader in self.readers[bias])
            stored = self.store_new(bias, integers.astype(np.int32), read_as_float)
            output = f"{stored}_dequantized"
            self._biases[key] = output
            inputs = [stored, self.store(f"{stored}_scale", scale)]
            yield helper.make_node("DequantizeLinear", inputs, [output], axis=0)
        node.input[_BIASED[node.op_type]] = self._biases[key]

    def _as_global_pool(self, node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
        """Means over all positions have an integer kernel as GlobalAveragePool alone."""
        from onnx import helper

        readers = self.readers[node.output[0]]
        site = next((self.site_of.get(reader.output[0]) for reader in readers), None)
        if node.op_type != "ReduceMean" or node.input[0] not in self.site_of or site is None or len(readers) != 1:
            yield node
            return
        attributes: dict[str, Any] = {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}
        axes, rank = self.array(node.input[1]), self.rank(node.input[0])
        if rank is None or {int(axis) % rank for axis in axes} != set(range(2, rank)):
            yield node
            return
        output = node.output[0]
        if attributes.get("keepdims", 1):
            yield helper.make_node("GlobalAveragePool", [node.input[0]], [output], name=node.name)
            return
        pooled = f"{output}_pooled"
        yield helper.make_node("GlobalAveragePool", [node.input[0]], [pooled], name=node.name)
        yield from self.quantize(site, pooled, f"{pooled}_held")
        squeezed = self.store(f"{output}_axes", np.arange(2, rank, dtype=np.int64))
        yield helper.make_node("Squeeze", [f"{pooled}_held", squeezed], [output])


def _range(quantizer: ActivationQuantizer) -> tuple[float, float]:
    """The values at the ends of a grid."""
    zero, scale = int(quantizer.zero_point), float(quantizer.scale.detach())
    return -zero * scale, (quantizer.largest - zero) * scale


def _unsigned(values: NDArray[Any], width: int) -> NDArray[Any]:
    import ml_dtypes

    types: dict[int, Any] = {2: ml_dtypes.uint2, 4: ml_dtypes.uint4, 8: np.uint8}
    return values.astype(np.uint8).astype(types[width])


def _signed(values: NDArray[Any], width: int) -> NDArray[Any]:
    import ml_dtypes

    types: dict[int, Any] = {2: ml_dtypes.int2, 4: ml_dtypes.int4, 8: np.int8}
    return values.astype(types[width])
