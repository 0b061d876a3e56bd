"""What an exported file computes, by integers of NumPy alone: an oracle that shares no code with graph or runtime."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

Array = NDArray[Any]


@dataclass(frozen=True)
class Held:
    """Integers less the one that stands for zero, and the size of a step, spread over their shape."""

    steps: NDArray[np.int64]
    scale: Array

    @property
    def floats(self) -> Array:
        return (self.steps * self.scale).astype(np.float32)


def run(model: onnx.ModelProto, feeds: Mapping[str, Array]) -> dict[str, Any]:
    """Every value of a model in Q/DQ form: sums of products are sums of integers, scaled once."""
    values: dict[str, Any] = {one.name: numpy_helper.to_array(one) for one in model.graph.initializer} | dict(feeds)
    for node in model.graph.node:
        given = [values[name] if name else None for name in node.input]
        options = {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}
        values[node.output[0]] = _OPERATORS[node.op_type](*given, **options)
    return values


def _floats(value: Any) -> Array:
    return value.floats if isinstance(value, Held) else value


def _quantize(x: Any, scale: Array, zero: Array) -> Array:
    bounds = np.iinfo(zero.dtype)
    return np.clip(np.rint(_floats(x) / scale) + zero, bounds.min, bounds.max).astype(zero.dtype)


def _dequantize(x: Array, scale: Array, zero: Array | None = None, axis: int = 1) -> Held:
    form = [-1 if at == axis else 1 for at in range(x.ndim)] if scale.ndim else []
    offset = np.zeros_like(scale, np.int64) if zero is None else zero.astype(np.int64)
    return Held(x.astype(np.int64) - offset.reshape(form), scale.reshape(form))


def _scaled(sums: NDArray[np.int64], one: Held, other: Array, bias: Held | None, form: tuple[int, ...]) -> Array:
    """Sums of products of steps, a bias of the same steps added as an integer."""
    scale = (one.scale * other.reshape(-1)).astype(np.float32)
    if bias is not None:
        np.testing.assert_array_equal(bias.scale.reshape(-1), scale)
        sums = sums + bias.steps.reshape(form)
    return (sums * scale.reshape(form if scale.size > 1 else ())).astype(np.float32)


def _gemm(one: Held, other: Held, bias: Held | None = None, transB: int = 0, **_: Any) -> Array:
    weight = other.steps.T if transB else other.steps
    return _scaled(one.steps @ weight, one, other.scale, bias, (1, -1))


def _matmul(one: Held, other: Held) -> Array:
    return _scaled(one.steps @ other.steps, one, other.scale, None, (-1,))


def _conv(x: Held, weight: Held, bias: Held | None = None, **options: Any) -> Array:
    top, left, bottom, right = options["pads"]
    padded = np.pad(x.steps, ((0, 0), (0, 0), (top, bottom), (left, right)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, weight.steps.shape[2:], axis=(2, 3))
    sums = np.einsum("nchwij,ocij->nohw", windows, weight.steps)
    return _scaled(sums, x, weight.scale, bias, (1, -1, 1, 1))


def _clip(x: Any, low: Array | None = None, high: Array | None = None) -> Array:
    found = _floats(x)
    found = found if low is None else np.maximum(found, low)
    return found if high is None else np.minimum(found, high)


def _softmax(x: Any, axis: int = -1) -> Array:
    powers = np.exp(_floats(x) - _floats(x).max(axis, keepdims=True))
    return powers / powers.sum(axis, keepdims=True)


_OPERATORS: dict[str, Any] = {
    "QuantizeLinear": _quantize,
    "DequantizeLinear": _dequantize,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "Conv": _conv,
    "Clip": _clip,
    "Softmax": _softmax,
    "Relu": lambda x: np.maximum(_floats(x), 0),
    "Add": lambda one, other: _floats(one) + _floats(other),
    "Mul": lambda one, other: _floats(one) * _floats(other),
    "Concat": lambda *parts, axis: np.concatenate([_floats(part) for part in parts], axis),
    "Transpose": lambda x, perm: _floats(x).transpose(perm),
    "Reshape": lambda x, size, **_: _floats(x).reshape(size),
    "Flatten": lambda x, axis=1: _floats(x).reshape(*_floats(x).shape[:axis], -1),
    "Identity": lambda x: x,
}
