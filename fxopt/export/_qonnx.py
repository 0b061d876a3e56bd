"""QONNX: Quant and BipolarQuant nodes on floats, for FPGA flows such as FINN and hls4ml.

A quantizer is one node that tells scale, zero point and bits; weights stay floats behind it. Source: Pappalardo et al.
2022, "QONNX: Representing Arbitrary-Precision Quantized Neural Networks", and the reference implementation's definition
of the operators: ``Quant(x) = (clip(round(x / scale + zero_point)) - zero_point) * scale``, rounding half to even,
``BipolarQuant(x) = scale`` where ``x >= 0``, else ``-scale``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from fxopt.export._rewriter import QuantizedWeight, Rewriter, Rewritten
from fxopt.export._torch_onnx import Marked

if TYPE_CHECKING:
    import onnx

__all__ = ["QONNX_DOMAIN", "expanded", "to_qonnx"]

QONNX_DOMAIN = "qonnx.custom_op.general"
_VERSION = 2


def to_qonnx(marked: Marked) -> Rewritten:
    """Rewrite a model with markers in place, to QONNX's operators.

    Raises:
        ExportError: If the weight of a quantized layer is not stored in the model.
    """
    from onnx import helper

    made = _QonnxRewriter(marked).run()
    marked.model.opset_import.append(helper.make_opsetid(QONNX_DOMAIN, _VERSION))
    return made


def expanded(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same model with standard operators in the place of QONNX's, which onnxruntime can run."""
    from onnx import helper, numpy_helper

    twin = type(model)()
    twin.CopyFrom(model)
    graph = twin.graph
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.domain != QONNX_DOMAIN:
            nodes.append(node)
            continue
        value, scale, output = node.input[0], node.input[1], node.output[0]
        inner = [f"{output}_step{index}" for index in range(5)]
        if node.op_type == "BipolarQuant":
            graph.initializer.append(numpy_helper.from_array(np.zeros((), np.float32), inner[0]))
            nodes += [
                helper.make_node("GreaterOrEqual", [value, inner[0]], [inner[1]]),
                helper.make_node("Neg", [scale], [inner[2]]),
                helper.make_node("Where", [inner[1], scale, inner[2]], [output]),
            ]
            continue
        low, high = _bounds(node, float(arrays[node.input[3]]))
        limits = [f"{output}_low", f"{output}_high"]
        for name, bound in zip(limits, (low, high), strict=True):
            graph.initializer.append(numpy_helper.from_array(np.asarray(bound, np.float32), name))
        nodes += [
            helper.make_node("Div", [value, scale], [inner[0]]),
            helper.make_node("Add", [inner[0], node.input[2]], [inner[1]]),
            helper.make_node("Clip", [inner[1], *limits], [inner[2]]),
            helper.make_node("Round", [inner[2]], [inner[3]]),
            helper.make_node("Sub", [inner[3], node.input[2]], [inner[4]]),
            helper.make_node("Mul", [inner[4], scale], [output]),
        ]
    del graph.node[:]
    graph.node.extend(nodes)
    kept = [entry for entry in twin.opset_import if entry.domain != QONNX_DOMAIN]
    del twin.opset_import[:]
    twin.opset_import.extend(kept)
    return twin


def _bounds(node: onnx.NodeProto, bits: float) -> tuple[float, float]:
    """The least and the largest integer of a Quant node."""
    attributes = {entry.name: entry.i for entry in node.attribute}
    if not attributes["signed"]:
        return 0.0, 2.0**bits - 1.0
    largest = 2.0 ** (bits - 1.0) - 1.0
    return -largest - (0.0 if attributes["narrow"] else 1.0), largest


class _QonnxRewriter(Rewriter):
    has_weight_offsets: ClassVar[bool] = True

    def quantize(self, site: str, value: str, output: str) -> Iterator[onnx.NodeProto]:
        """An unsigned Quant node."""
        quantizer = self.activation(site)
        scale = self.store(f"{site}.scale", quantizer.scale.detach().cpu().numpy().astype(np.float32))
        zero = self.store(f"{site}.zero_point", quantizer.zero_point.cpu().numpy().astype(np.float32))
        yield self._quant(value, scale, zero, quantizer.bits, output, signed=False)

    def dequantize(self, weight: QuantizedWeight) -> Iterator[onnx.NodeProto]:
        """A signed Quant node on the floats, or a bipolar one."""
        from onnx import helper

        values = weight.floats()
        free = any(reader.domain == "" for reader in self.readers[weight.name])
        stored = self.store_new(weight.name, values, free or weight.permutation is not None)
        shape = [-1 if axis == weight.axis else 1 for axis in range(values.ndim)]
        scale = self.store(f"{stored}_scale", weight.scale.reshape(shape))
        if weight.quantizer.is_binary:
            yield helper.make_node("BipolarQuant", [stored, scale], [weight.output], domain=QONNX_DOMAIN)
            return
        offsets = weight.quantizer.zero_point
        zeros = np.zeros((), np.float32)
        if offsets is not None:
            # Integers from zero on: QONNX takes one signed bit for the grid of -1 and 1.
            zeros = (offsets.cpu().numpy() - weight.quantizer.bounds[0]).astype(np.float32).reshape(shape)
        zero = self.store(f"{stored}_zero_point", zeros)
        yield self._quant(
            stored,
            scale,
            zero,
            weight.quantizer.bits,
            weight.output,
            signed=offsets is None,
            narrow=weight.quantizer.scheme.narrow and offsets is None,
        )

    def _quant(
        self, value: str, scale: str, zero: str, bits: int, output: str, *, signed: bool, narrow: bool = False
    ) -> onnx.NodeProto:
        from onnx import helper

        width = self.store(f"bits_{bits}", np.asarray(bits, np.float32))
        return helper.make_node(
            "Quant",
            [value, scale, zero, width],
            [output],
            domain=QONNX_DOMAIN,
            signed=int(signed),
            narrow=int(narrow),
            rounding_mode="ROUND",
        )
