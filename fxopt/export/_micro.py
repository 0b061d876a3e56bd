"""One operator of a workload as an ONNX model of its own, in float or in 8-bit Q / DQ form."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import gcd
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fxopt.export._runtime import CARRIERS
from fxopt.targets.rows import FLOAT_BITS, Activation, OpKind

if TYPE_CHECKING:
    import onnx

__all__ = ["Micro", "build"]

_OPSET, _IR_VERSION = 21, 10
_CONVOLUTIONS = frozenset(("Conv", "FusedConv", "QLinearConv", "NhwcFusedConv"))
_REORDERS = frozenset(("ReorderInput", "ReorderOutput"))
_WIDE = 64


@dataclass(frozen=True)
class Micro:
    """A model around one operator.

    Attributes:
        model: The model.
        feed: Its inputs.
        ignored: Operators of the optimized graph that are no part of the one to time.
    """

    model: onnx.ModelProto
    feed: Mapping[str, NDArray[Any]]
    ignored: frozenset[str]


@dataclass
class _Builder:
    """Collects nodes; knows whether values are quantized."""

    quantized: bool
    nodes: list[Any] = field(default_factory=list)
    stored: list[Any] = field(default_factory=list)
    inputs: dict[str, NDArray[Any]] = field(default_factory=dict)
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    def node(self, operator: str, inputs: Sequence[str], **attributes: Any) -> str:
        from onnx import helper

        output = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, list(inputs), [output], **attributes))
        return output

    def constant(self, values: NDArray[Any]) -> str:
        from onnx import numpy_helper

        name = f"c{len(self.stored)}"
        self.stored.append(numpy_helper.from_array(values, name))
        return name

    def input(self, *size: int) -> str:
        """An activation: random numbers, quantized if activations are."""
        name = f"x{len(self.inputs)}"
        self.inputs[name] = self.rng.standard_normal(size).astype(np.float32)
        return self.hold(name)

    def hold(self, value: str, zero_point: int = 128) -> str:
        """Quantize and dequantize a value, if activations are quantized."""
        if not self.quantized:
            return value
        scale, zero = self.constant(np.asarray(0.05, np.float32)), self.constant(np.asarray(zero_point, np.uint8))
        integers = self.node("QuantizeLinear", [value, scale, zero])
        return self.node("DequantizeLinear", [integers, scale, zero])

    def weight(self, size: Sequence[int], axis: int = 0) -> str:
        if not self.quantized:
            return self.constant((self.rng.standard_normal(size) * 0.05).astype(np.float32))
        integers = self.constant(self.rng.integers(-127, 128, size, dtype=np.int8))
        scales = self.constant(np.full(size[axis], 1e-3, np.float32))
        zeros = self.constant(np.zeros(size[axis], np.int8))
        return self.node("DequantizeLinear", [integers, scales, zeros], axis=axis)

    def bias(self, channels: int) -> str:
        if not self.quantized:
            return self.constant(np.full(channels, 0.1, np.float32))
        integers = self.constant(np.full(channels, 100, np.int32))
        return self.node(
            "DequantizeLinear", [integers, self.constant(np.full(channels, 0.05 * 1e-3, np.float32))], axis=0
        )

    def finish(self, output: str, ignored: frozenset[str]) -> Micro:
        from onnx import TensorProto, helper

        kinds = {np.dtype(np.float32): TensorProto.FLOAT, np.dtype(np.int64): TensorProto.INT64}
        ends = [helper.make_tensor_value_info(n, kinds[a.dtype], a.shape) for n, a in self.inputs.items()]
        result = helper.make_tensor_value_info(output, TensorProto.FLOAT, None)
        graph = helper.make_graph(self.nodes, "operator", ends, [result], self.stored)
        opsets = [helper.make_opsetid("", _OPSET)]
        return Micro(helper.make_model(graph, opset_imports=opsets, ir_version=_IR_VERSION), self.inputs, ignored)


def build(row: Any) -> Micro | None:
    """The model for one row of a workload, or None if there is none for its kind or bits.

    Args:
        row: One row of ``fxopt.targets.rows.ROW_DTYPE``.
    """
    weights, activations = int(row["weight_bits"]), int(row["activation_bits"])
    kind = OpKind(int(row["kind"]))
    if activations not in (8, FLOAT_BITS) or kind not in _BUILDERS:
        return None
    weighted = kind in (OpKind.CONV, OpKind.DEPTHWISE, OpKind.LINEAR)
    # Weights of fewer bits are kept in 8; there are no kernels for integer weights with float activations.
    if weighted and (weights == FLOAT_BITS) != (activations == FLOAT_BITS):
        return None
    if weighted and weights not in (*range(1, 9), FLOAT_BITS):
        return None
    return _BUILDERS[kind](_Builder(activations == 8), row)


def _axes(row: Mapping[str, Any]) -> list[str]:
    deep = int(row["in_d"]) > 1 or int(row["kernel_d"]) > 1 or int(row["out_d"]) > 1
    return ["d", "h", "w"] if deep else ["h", "w"]


def _sizes(row: Mapping[str, Any], what: str) -> list[int]:
    return [int(row[f"{what}_{axis}"]) for axis in _axes(row)]


def _window(row: Mapping[str, Any]) -> tuple[list[int], dict[str, Any]]:
    """The input sizes that give just the output sizes, and the attributes of the window."""
    sizes, begins, ends = [], [], []
    dilation = int(row["dilation"])
    for size, out, kernel, stride in zip(
        _sizes(row, "in"), _sizes(row, "out"), _sizes(row, "kernel"), _sizes(row, "stride"), strict=True
    ):
        reach = (out - 1) * stride + (kernel - 1) * dilation + 1
        padding = max(reach - size, 0)
        begins.append(padding // 2)
        ends.append(padding - padding // 2)
        sizes.append(reach - padding)
    attributes = {"kernel_shape": _sizes(row, "kernel"), "strides": _sizes(row, "stride"), "pads": begins + ends}
    if dilation > 1:
        attributes["dilations"] = [dilation] * len(sizes)
    return sizes, attributes


def _convolution(builder: _Builder, row: Mapping[str, Any]) -> Micro | None:
    n, c, k, groups = (int(row[name]) for name in ("n", "c", "k", "groups"))
    if int(row["transposed"]):
        return _transposed_convolution(builder, row)
    sizes, attributes = _window(row)
    x = builder.input(n, c, *sizes)
    inputs = [x, builder.weight((k, c // groups, *attributes["kernel_shape"]))]
    if int(row["bias"]):
        inputs.append(builder.bias(k))
    y = builder.node("Conv", inputs, group=groups, **attributes)
    # A grid that starts at zero subsumes the ReLU; with any other the runtime keeps it, and the kernel stays in float.
    return builder.finish(builder.hold(builder.node("Relu", [y]), zero_point=0), CARRIERS)


def _transposed_convolution(builder: _Builder, row: Mapping[str, Any]) -> Micro | None:
    """In float alone: there is no integer kernel."""
    n, c, k, groups = (int(row[name]) for name in ("n", "c", "k", "groups"))
    if builder.quantized:
        return None
    x = builder.input(n, c, *_sizes(row, "in"))
    weight = builder.weight((c, k // groups, *_sizes(row, "kernel")), axis=1)
    y = builder.node("ConvTranspose", [x, weight], group=groups, strides=_sizes(row, "stride"))
    return builder.finish(y, CARRIERS)


def _linear(builder: _Builder, row: Mapping[str, Any]) -> Micro | None:
    c, k, rows = int(row["c"]), int(row["k"]), int(row["n"]) * int(row["in_h"])
    inputs = [builder.input(rows, c), builder.weight((k, c))]
    if int(row["bias"]):
        inputs.append(builder.bias(k))
    y = builder.node("Gemm", inputs, transB=1)
    return builder.finish(y if int(row["output_bits"]) == FLOAT_BITS else builder.hold(y), CARRIERS)


def _matmul(builder: _Builder, row: Mapping[str, Any]) -> Micro | None:
    n, rows, c, k = (int(row[name]) for name in ("n", "out_h", "c", "k"))
    y = builder.node("MatMul", [builder.input(n, rows, c), builder.input(n, c, k)])
    return builder.finish(builder.hold(y), CARRIERS)


def _layer(builder: _Builder, value: str, channels: int, rank: int) -> str:
    """A convolution that costs little: whatever stands beside one finds its layout there."""
    weight = builder.weight((channels, 1, *[1] * rank))
    return builder.hold(builder.node("Conv", [value, weight], group=channels))


def _elementwise(builder: _Builder, row: Mapping[str, Any]) -> Micro | None:
    """An activation, a sum, or with one input a product by channel, as squeeze-and-excitation has it."""
    if int(row["activation"]) == Activation.CURVE:
        return _curve(builder, row)
    size = (int(row["n"]), int(row["k"]), *_sizes(row, "out"))
    values = [builder.input(*size) for _ in range(int(row["inputs"]))]
    y = values[0]
    if int(row["activation"]) == Activation.CLAMP:
        y = builder.hold(builder.node("Relu", [y]))
    elif len(values) == 1:
        y = builder.hold(builder.node("Mul", [y, builder.input(*size[:2], *[1] * len(size[2:]))]))
    for value in values[1:]:
        y = builder.hold(builder.node("Add", [y, value]))
    return builder.finish(y, CARRIERS)


def _curve(builder: _Builder, row: Mapping[str, Any]) -> Micro | None:
    """A SiLU behind a convolution and before another, whose layout it does not share."""
    channels, sizes = int(row["k"]), _sizes(row, "out")
    fed = _layer(builder, builder.input(int(row["n"]), channels, *sizes), channels, len(sizes))
    y = builder.hold(builder.node("Mul", [fed, builder.hold(builder.node("Sigmoid", [fed]))]))
    # What comes after often shares the way back.
    ignored = (CARRIERS | _CONVOLUTIONS) - {"ReorderOutput"}
    return builder.finish(_layer(builder, y, channels, len(sizes)), ignored)


def _pool(builder: _Builder, row: Mapping[str, Any]) -> Micro | None:
    """Behind a convolution: the layout that integer convolutions write has pooling kernels of its own."""
    n, c = int(row["n"]), int(row["c"])
    sizes, attributes = _window(row)
    whole = (
        attributes["kernel_shape"] == sizes and not any(attributes["pads"]) and _sizes(row, "out") == [1] * len(sizes)
    )
    x = builder.input(n, c, *sizes)
    fed = _layer(builder, x, c, len(sizes))
    if whole and builder.quantized:
        # The form that has an integer kernel.
        y = builder.node("GlobalAveragePool", [fed])
    elif whole:
        axes = builder.constant(np.arange(2, 2 + len(sizes), dtype=np.int64))
        y = builder.node("ReduceMean", [fed, axes], keepdims=1)
    else:
        y = builder.node("MaxPool", [fed], **attributes)
    return builder.finish(builder.hold(y), CARRIERS | _CONVOLUTIONS)


def _norm(builder: _Builder, row: Mapping[str, Any]) -> Micro | None:
    """Rows of features are layer-normalized, images batch-normalized; in float, for there is no integer kernel."""
    builder.quantized = False
    n, c = int(row["n"]), int(row["c"])
    ones, zeros = builder.constant(np.ones(c, np.float32)), builder.constant(np.zeros(c, np.float32))
    if int(row["in_w"]) == 1 and int(row["in_d"]) == 1:
        x = builder.input(n, int(row["in_h"]), c)
        return builder.finish(builder.node("LayerNormalization", [x, ones, zeros], axis=-1), CARRIERS)
    x = builder.input(n, c, *_sizes(row, "in"))
    variance = builder.constant(np.full(c, 2.0, np.float32))
    return builder.finish(builder.node("BatchNormalization", [x, ones, zeros, zeros, variance]), CARRIERS)


def _softmax(builder: _Builder, row: Mapping[str, Any]) -> Micro | None:
    builder.quantized = False
    positions = int(np.prod(_sizes(row, "in")))
    x = builder.input(int(row["n"]), positions, int(row["c"]))
    return builder.finish(builder.node("Softmax", [x], axis=-1), CARRIERS)


def _embedding(builder: _Builder, row: Mapping[str, Any]) -> Micro | None:
    builder.quantized = False
    table = builder.constant(builder.rng.standard_normal((int(row["c"]), int(row["k"]))).astype(np.float32))
    positions = int(np.prod(_sizes(row, "in")))
    indices = builder.rng.integers(0, int(row["c"]), (int(row["n"]), positions), dtype=np.int64)
    builder.inputs["indices"] = indices
    return builder.finish(builder.node("Gather", [table, "indices"]), CARRIERS - {"Gather"})


def _copy(builder: _Builder, row: Mapping[str, Any]) -> Micro | None:
    """Between convolutions, two halves joined, or elements rearranged."""
    if int(row["transposed"]):
        return _shuffle(builder, row)
    n, channels, sizes = int(row["n"]), int(row["k"]), _sizes(row, "out")
    parts = [part for part in (channels // 2, channels - channels // 2) if part]
    halves = [_layer(builder, builder.input(n, part, *sizes), part, len(sizes)) for part in parts]
    y = builder.hold(builder.node("Concat", halves, axis=1))
    return builder.finish(_layer(builder, y, channels, len(sizes)), (CARRIERS | _CONVOLUTIONS) - {"Concat"})


def _shuffle(builder: _Builder, row: Mapping[str, Any]) -> Micro | None:
    """Channels in two groups shuffled between convolutions, whose layout is left for it; without such, a transpose."""
    n, channels, sizes = int(row["n"]), int(row["k"]), _sizes(row, "out")
    if channels % 2:
        elements = channels * int(np.prod(sizes))
        x = builder.input(n, gcd(elements, _WIDE), elements // gcd(elements, _WIDE))
        return builder.finish(builder.hold(builder.node("Transpose", [x], perm=[0, 2, 1])), CARRIERS - {"Transpose"})
    apart = builder.constant(np.array([n, 2, channels // 2, int(np.prod(sizes))], np.int64))
    whole = builder.constant(np.array([n, channels, *sizes], np.int64))
    fed = _layer(builder, builder.input(n, channels, *sizes), channels, len(sizes))
    y = builder.node("Transpose", [builder.node("Reshape", [fed, apart])], perm=[0, 2, 1, 3])
    y = builder.hold(builder.node("Reshape", [y, whole]))
    counted = _REORDERS | {"Transpose"}
    return builder.finish(_layer(builder, y, channels, len(sizes)), (CARRIERS | _CONVOLUTIONS) - counted)


def _resize(builder: _Builder, row: Mapping[str, Any]) -> Micro | None:
    """To the nearest pixel, which has an integer kernel."""
    x = builder.input(int(row["n"]), int(row["c"]), *_sizes(row, "in"))
    sizes = builder.constant(np.array([int(row["n"]), int(row["c"]), *_sizes(row, "out")], np.int64))
    y = builder.node("Resize", [x, "", "", sizes], mode="nearest", coordinate_transformation_mode="asymmetric")
    return builder.finish(builder.hold(y), CARRIERS)


_BUILDERS: Mapping[OpKind, Callable[[_Builder, Mapping[str, Any]], Micro | None]] = {
    OpKind.CONV: _convolution,
    OpKind.DEPTHWISE: _convolution,
    OpKind.LINEAR: _linear,
    OpKind.MATMUL: _matmul,
    OpKind.ELEMENTWISE: _elementwise,
    OpKind.POOL: _pool,
    OpKind.NORM: _norm,
    OpKind.SOFTMAX: _softmax,
    OpKind.EMBEDDING: _embedding,
    OpKind.COPY: _copy,
    OpKind.RESIZE: _resize,
}
