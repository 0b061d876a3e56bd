"""The operator profiler: what it builds for each kind of row, and that it answers for all of them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from fxopt.errors import ExportError
from fxopt.export import onnxruntime_profiler
from fxopt.export._micro import build
from fxopt.export._runtime import make_session, optimized
from fxopt.export.profiler import kernel_seconds
from fxopt.targets.rows import OpKind, Rows, make_row

INTEGER = {"weight_bits": 8, "activation_bits": 8, "output_bits": 8}
SQUARE = {"in_h": 8, "in_w": 8, "out_h": 8, "out_w": 8}
WINDOW = {"kernel_h": 3, "kernel_w": 3}
HALVED = {"in_h": 9, "in_w": 8, "out_h": 4, "out_w": 4, "kernel_h": 2, "kernel_w": 2, "stride_h": 2, "stride_w": 2}
WHOLE = {"in_h": 8, "in_w": 8, "kernel_h": 8, "kernel_w": 8, "stride_h": 8, "stride_w": 8}

# Name: row, the operator that is timed in float, and in integers (None: there is none, or the float one).
CASES: dict[str, tuple[Rows, set[str], set[str] | None]] = {
    "conv": (make_row(OpKind.CONV, c=16, k=16, bias=1, **SQUARE, **WINDOW), {"Conv", "FusedConv"}, {"QLinearConv"}),
    "strided conv": (make_row(OpKind.CONV, c=3, k=8, **HALVED), {"Conv", "FusedConv"}, {"QLinearConv"}),
    "conv3d": (
        make_row(OpKind.CONV, c=4, k=4, in_d=4, out_d=4, kernel_d=3, **SQUARE, **WINDOW),
        {"Conv", "FusedConv"},
        {"QLinearConv"},
    ),
    "grouped conv": (make_row(OpKind.CONV, c=8, k=16, groups=4, **SQUARE), {"Conv", "FusedConv"}, {"QLinearConv"}),
    "depthwise": (
        make_row(OpKind.DEPTHWISE, c=16, k=16, groups=16, **SQUARE, **WINDOW),
        {"Conv", "FusedConv"},
        {"QLinearConv"},
    ),
    "linear": (make_row(OpKind.LINEAR, c=32, k=10, bias=1), {"Gemm"}, {"QGemm"}),
    "linear rows": (make_row(OpKind.LINEAR, c=32, k=10, in_h=7, out_h=7), {"Gemm"}, {"QGemm"}),
    "matmul": (make_row(OpKind.MATMUL, c=8, k=6, in_h=5, out_h=5), {"MatMul"}, {"QLinearMatMul"}),
    "sum": (make_row(OpKind.ELEMENTWISE, c=8, k=8, inputs=2, **SQUARE), {"Add"}, {"QLinearAdd"}),
    "scale": (make_row(OpKind.ELEMENTWISE, c=8, k=8, **SQUARE), {"Mul"}, {"QLinearMul"}),
    "clamp": (make_row(OpKind.ELEMENTWISE, c=8, k=8, activation=1, **SQUARE), {"Relu"}, None),
    "pool": (make_row(OpKind.POOL, c=16, k=16, **HALVED), {"MaxPool"}, {"NhwcMaxPool"}),
    "global pool": (make_row(OpKind.POOL, c=16, k=16, **WHOLE), {"ReduceMean"}, {"QLinearGlobalAveragePool"}),
    "batch norm": (make_row(OpKind.NORM, c=8, k=8, held=16, **SQUARE), {"BatchNormalization"}, None),
    "layer norm": (make_row(OpKind.NORM, c=8, k=8, held=16, in_h=5, out_h=5), {"LayerNormalization"}, None),
    "softmax": (make_row(OpKind.SOFTMAX, c=8, k=8, in_h=5, out_h=5), {"Softmax"}, None),
    "embedding": (make_row(OpKind.EMBEDDING, c=50, k=8, in_h=5, out_h=5), {"Gather"}, None),
    "resize": (make_row(OpKind.RESIZE, c=8, k=8, in_h=5, in_w=5, out_h=10, out_w=10), {"Resize"}, {"Resize"}),
    "dilated conv": (
        make_row(OpKind.CONV, c=8, k=8, kernel_h=3, kernel_w=3, dilation=2, **SQUARE),
        {"Conv", "FusedConv"},
        {"QLinearConv"},
    ),
    "copy": (make_row(OpKind.COPY, c=8, k=8, **SQUARE), {"Concat"}, {"QLinearConcat"}),
}


def with_fields(row: Rows, **fields: int) -> Rows:
    changed = row.copy()
    for name, value in fields.items():
        changed[name] = value
    return changed


def timed(row: Rows) -> Counter[str]:
    micro = build(row[0])
    assert micro is not None
    found = Counter(node.op_type for node in optimized(micro.model.SerializeToString()).graph.node)
    return Counter({name: count for name, count in found.items() if name not in micro.ignored})


@pytest.mark.parametrize("name", CASES)
def test_just_the_kernels_of_the_operator_are_timed(name: str) -> None:
    row, floats, integers = CASES[name]
    found = timed(row)
    assert set(found) <= floats
    assert sum(found.values()) == 1
    held = timed(with_fields(row, **INTEGER))
    assert set(held) <= (integers or floats)
    assert sum(held.values()) == 1


def test_a_curve_pays_for_leaving_the_layout_of_convolutions() -> None:
    row = make_row(OpKind.ELEMENTWISE, c=16, k=16, activation=2, **SQUARE)
    assert set(timed(row)) <= {"Sigmoid", "Mul", "QuickGelu", "ReorderOutput"}
    assert timed(with_fields(row, **INTEGER)) == Counter({"QLinearSigmoid": 1, "QLinearMul": 1})


@pytest.mark.parametrize("channels", [1, 7, 16])
def test_a_shuffle_is_timed_with_what_its_layout_costs(channels: int) -> None:
    row = make_row(OpKind.COPY, c=channels, k=channels, transposed=1, **SQUARE)
    assert {*timed(row)} <= {"Transpose", "ReorderInput", "ReorderOutput"}
    assert np.isfinite(onnxruntime_profiler(with_fields(row, **INTEGER), runs=1)).all()


@pytest.mark.parametrize(
    "name", ["conv", "strided conv", "conv3d", "depthwise", "linear", "pool", "global pool", "copy"]
)
def test_the_model_has_the_sizes_of_the_row(name: str) -> None:
    row = CASES[name][0]
    micro = build(row[0])
    assert micro is not None
    session = make_session(micro.model.SerializeToString())
    shape = session.run(None, dict(micro.feed))[0].shape
    fields: dict[str, Any] = {field: int(row[field][0]) for field in ("n", "k", "out_d", "out_h", "out_w")}
    assert np.prod(shape) == np.prod(list(fields.values()))


def test_rows_of_any_shape_are_answered_in_that_shape() -> None:
    rows = np.concatenate([CASES[name][0] for name in ("conv", "linear", "sum")] + [make_row(OpKind.UNKNOWN)])
    found = onnxruntime_profiler(rows.reshape(2, 2), runs=2)
    assert found.shape == (2, 2)
    assert np.isfinite(found.reshape(-1)[:3]).all()
    assert (found.reshape(-1)[:3] > 0.0).all()
    assert np.isnan(found[1, 1])


@pytest.mark.parametrize(
    "row",
    [
        make_row(OpKind.UNKNOWN),
        make_row(OpKind.CONV, c=8, k=8, weight_bits=8, activation_bits=32),
        make_row(OpKind.CONV, c=8, k=8, weight_bits=32, activation_bits=8),
        make_row(OpKind.LINEAR, c=8, k=8, weight_bits=16, activation_bits=16),
        make_row(OpKind.LINEAR, c=8, k=8, weight_bits=4, activation_bits=4),
        make_row(OpKind.CONV, c=8, k=8, transposed=1, **SQUARE, **INTEGER),
    ],
)
def test_what_has_no_kernel_is_not_a_number(row: Rows) -> None:
    assert np.isnan(onnxruntime_profiler(row)).all()


def test_four_bit_weights_are_carried_in_eight_bits() -> None:
    row = with_fields(CASES["conv"][0], weight_bits=4, activation_bits=8, output_bits=8)
    assert timed(row) == Counter({"QLinearConv": 1})


def test_transposed_convolutions_are_timed_in_float() -> None:
    row = make_row(OpKind.CONV, c=4, k=6, transposed=1, **{**HALVED, "in_h": 4, "in_w": 4, "out_h": 8, "out_w": 8})
    assert set(timed(row)) <= {"ConvTranspose"}


def test_runs_that_lost_their_processor_do_not_count() -> None:
    micro = build(CASES["conv"][0][0])
    assert micro is not None
    times = [1000.0] * 3 + [10.0, 40.0, 12.0, 30.0, 12.0, 9.0, 14.0, 10.0]
    events = [
        {"cat": "Node", "name": f"{name}_kernel_time", "dur": time, "args": {"op_name": name}}
        for time in times
        for name in ("Conv", "ReorderInput")
    ]
    assert kernel_seconds(events, micro) == pytest.approx(np.mean([9.0, 10.0, 10.0, 12.0]) * 1e-6)
    shares = [1.0] * 3 + [1.0, 0.3, 1.0, 0.4, 1.0, 0.5, 0.99, 0.2]
    assert kernel_seconds(events, micro, shares) == pytest.approx(np.mean([10.0, 12.0]) * 1e-6)
    # Always disturbed: the quarter that was disturbed least.
    shares = [1.0] * 3 + [0.1, 0.3, 0.1, 0.4, 0.1, 0.1, 0.1, 0.2]
    assert kernel_seconds(events, micro, shares) == pytest.approx(30e-6)


def test_what_is_no_row_is_refused() -> None:
    with pytest.raises(ExportError, match="rows of ROW_DTYPE"):
        onnxruntime_profiler(np.zeros(3))
    with pytest.raises(ExportError, match="at least 1"):
        onnxruntime_profiler(CASES["conv"][0], runs=0)
