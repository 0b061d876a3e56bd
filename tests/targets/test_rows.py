"""Rows: the layout shared with C, the derived quantities, and what a workload refuses."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxopt.errors import FxoptError, TargetError
from fxopt.targets import ROW_DTYPE, OpKind, Workload, default_rows, make_row
from fxopt.targets import rows as r
from fxopt.targets._soundness import row_layout
from fxopt.targets.models.linear_cpu import Model
from tests.targets.oracle import conv, random_rows, workload

SIZES = (
    *("inputs", "n", "c", "k", "groups", "in_d", "in_h", "in_w", "out_d", "out_h", "out_w"),
    *("kernel_d", "kernel_h", "kernel_w", "stride_d", "stride_h", "stride_w"),
)
BITS = ("weight_bits", "activation_bits", "output_bits")


def test_dtype_has_the_layout_of_the_struct() -> None:
    layout = row_layout()
    assert layout.pop("") == ROW_DTYPE.itemsize == 152
    assert [*layout] == [*(ROW_DTYPE.names or ())]
    assert [*layout.values()] == [ROW_DTYPE.fields[name][1] for name in layout]


def test_another_layout_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(r, "row_layout", lambda: {**row_layout(), "live_bytes": 104})
    with pytest.raises(FxoptError, match="compiled for other rows"):
        r._check_layout()


# Each case: row, then macs, weights, biases, inputs and outputs (elements), bytes of weights; derived beside it.
GOLDEN = {
    # n*k*(c/g)*3*3*112*112 = 32*3*9*12544; 32*3*9 weights; 3*224*224 in; 32*112*112 out; 864*4 + 32*4 bytes
    "first convolution": (conv(3, 32, 112, 3, 2, bias=1), 10_838_016, 864, 32, 150_528, 401_408, 3_584),
    # one input channel for each of 64 groups: 64*1*9*56*56; 576 weights of one byte
    "depthwise": (conv(64, 64, 56, 3, 2, groups=64, weight_bits=8), 1_806_336, 576, 0, 802_816, 200_704, 576),
    # two groups: 2 samples * 8 * (6/2) * 25 taps * 100; in 2*6*100, out 2*8*100; 600 weights of 4 bits
    "grouped": (conv(6, 8, 10, 5, groups=2, n=2, weight_bits=4), 120_000, 600, 0, 1_200, 1_600, 300),
    # transposed: every input pixel meets every tap: 16*(8/1)*4*7*7; in 16*49, out 8*14*14
    "transposed": (
        make_row(
            OpKind.CONV,
            **{"transposed": 1, "c": 16, "k": 8, "kernel_h": 2, "kernel_w": 2, "stride_h": 2, "stride_w": 2},
            **{"in_h": 7, "in_w": 7, "out_h": 14, "out_w": 14},
        ),
        *(25_088, 512, 0, 784, 1_568, 2_048),
    ),
    # 3-D: 4*2*27*5*6*7 out of the same volume in
    "volume": (
        make_row(
            OpKind.CONV,
            **{"c": 2, "k": 4, "kernel_d": 3, "kernel_h": 3, "kernel_w": 3},
            **{"in_d": 5, "in_h": 6, "in_w": 7, "out_d": 5, "out_h": 6, "out_w": 7},
        ),
        *(45_360, 216, 0, 420, 840, 864),
    ),
    # 2 samples * 10 rows * 768 * 3072; biases in 4 bytes beside weights in one
    "linear": (
        make_row(OpKind.LINEAR, n=2, c=768, k=3072, in_h=10, out_h=10, bias=1, weight_bits=8),
        *(47_185_920, 2_359_296, 3_072, 15_360, 61_440, 2_359_296 + 12_288),
    ),
    # attention scores, 12 heads: 12*(128*64 + 64*128) in, 12*128*128 out, no weights
    "product of activations": (
        make_row(OpKind.MATMUL, n=12, c=64, k=128, in_h=128, out_h=128, inputs=2),
        *(12_582_912, 0, 0, 196_608, 196_608, 0),
    ),
    # 2 samples of 10 indices into a table of 1000 x 16
    "embedding": (
        make_row(OpKind.EMBEDDING, n=2, c=1000, k=16, in_h=10, out_h=10),
        *(0, 16_000, 0, 20, 320, 64_000),
    ),
    # scale and shift of 64 channels, 4 bytes each
    "affine norm": (make_row(OpKind.NORM, c=64, k=64, in_h=8, out_h=8, held=128), 0, 0, 0, 512, 512, 512),
    "plain norm": (make_row(OpKind.NORM, c=64, k=64, in_h=8, out_h=8), 0, 0, 0, 512, 512, 0),
    # addition reads two tensors
    "addition": (make_row(OpKind.ELEMENTWISE, inputs=2, c=5, k=5, in_h=3, out_h=3), 0, 0, 0, 30, 15, 0),
}


@pytest.mark.parametrize("case", GOLDEN)
def test_derived_quantities_of_known_operators(case: str) -> None:
    row, *expected = GOLDEN[case]
    functions = (r.macs, r.weights, r.bias_elements, r.in_elements, r.out_elements, r.weight_bytes)
    assert [function(row)[0] for function in functions] == expected


def test_traffic_and_bits_of_a_mixed_operator() -> None:
    # 10*10*6 inputs of 1 byte, 48 weights of half a byte, 8 biases of 4, 10*10*8 outputs of 4 bytes
    row = conv(6, 8, 10, bias=1, weight_bits=4, activation_bits=8)
    assert r.traffic_bytes(row)[0] == 600 + 24 + 32 + 3200
    assert r.compute_bits(row)[0] == 8
    assert r.compute_bits(conv(6, 8, 10, weight_bits=8, activation_bits=4))[0] == 8
    # without weights, their bits say nothing
    assert r.compute_bits(make_row(OpKind.ELEMENTWISE, activation_bits=8))[0] == 8


@given(st.integers(0, 2**32 - 1))
@pytest.mark.parametrize("quantity", ["mac", "weight", "in", "out", "const"])
def test_c_and_numpy_derive_the_same(quantity: str, seed: int) -> None:
    rows = random_rows(np.random.default_rng(seed), 200)
    rows = rows[rows["kind"] != OpKind.UNKNOWN]
    groups = ("pointwise", "dense", "depthwise", "linear", "matmul", "elementwise", "pool", "norm", "softmax")
    values = {f"float.{group}.{quantity}": 1.0 for group in (*groups, "embedding", "copy", "resize")}
    compiled, energy = np.empty((1, len(rows))), np.empty((1, len(rows)))
    Model(values, False).per_row(rows.reshape(1, -1), compiled, energy, np.empty_like(compiled))
    functions = {"mac": r.macs, "weight": r.weights, "in": r.in_elements, "out": r.out_elements}
    expected = functions[quantity](rows) if quantity in functions else np.ones(len(rows))
    np.testing.assert_allclose(compiled[0], expected, rtol=1e-12)


def test_parameters_count_where_they_are_stored() -> None:
    first = conv(6, 8, 10, bias=1, weight_bits=4)
    again = conv(6, 8, 10, bias=1, weight_bits=4, reused=1)
    positions = make_row(OpKind.ELEMENTWISE, c=8, k=8, held=40)
    rows = np.concatenate([first, again, positions])
    assert r.parameters(rows).tolist() == [56.0, 0.0, 40.0]
    assert r.stored_bytes(rows).tolist() == [24 + 32, 0.0, 160.0]
    # what is stored once is read by both
    assert r.weight_bytes(rows).tolist() == [24 + 32, 24 + 32, 160.0]


def test_nonzero_weights_and_their_positions_are_stored_where_that_is_less() -> None:
    # 48 weights, of which 12 stay: 6 bytes of a bit each, 12 to 48 bytes of values; 8 biases of 4 bytes
    sparse = {"bias": 1, "weight_density": 0.25}
    rows = np.concatenate(
        [
            conv(6, 8, 10, **sparse, position_bytes=6),
            conv(6, 8, 10, **sparse, position_bytes=6, weight_bits=8),
            conv(6, 8, 10, **sparse, position_bytes=6, weight_bits=1),
            conv(6, 8, 10, **sparse),
            conv(6, 8, 10, **sparse, position_bytes=6, reused=1),
        ]
    )
    assert r.stored_bytes(rows).tolist() == [48 + 6 + 32, 12 + 6 + 32, 6 + 32, 192 + 32, 0]
    # kernels read all of them
    assert r.weight_bytes(rows).tolist() == [192 + 32, 48 + 32, 6 + 32, 192 + 32, 192 + 32]


def test_one_policy_and_many() -> None:
    one = Workload(np.concatenate([conv(3, 8, 4), conv(8, 8, 4)]), ["a", "b"])
    assert (one.policies, len(one), one.rows.shape) == (1, 2, (1, 2))
    many = Workload(np.repeat(one.rows, 5, axis=0), one.names)
    assert (many.policies, len(many)) == (5, 2)
    assert repr(many) == "Workload(5 policies, 2 rows)"


def test_rows_are_neither_copied_nor_writable() -> None:
    rows = np.repeat(conv(3, 8, 4), 3)
    held = Workload(rows, "abc").rows
    assert np.shares_memory(held, rows)
    assert rows.flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        held["c"] = 1


def test_strided_and_read_only_rows_are_accepted() -> None:
    rows = np.repeat(conv(3, 8, 4), 6).reshape(2, 3)
    strided = Workload(rows[:, ::2], "ab")
    assert strided.rows.shape == (2, 2)
    frozen = np.frombuffer(rows.tobytes(), ROW_DTYPE)
    assert not frozen.flags.writeable
    assert Workload(frozen, "abcdef").policies == 1


@pytest.mark.parametrize(
    ("rows", "names", "message"),
    [
        (np.zeros(3), "abc", "ROW_DTYPE"),
        (default_rows(8).reshape(2, 2, 2), "ab", "shape"),
        (default_rows(0), "", "at least one policy and one row"),
        (default_rows(0).reshape(0, 3), "abc", "at least one policy and one row"),
        (default_rows(3), "ab", "3 rows needs as many names, got 2"),
    ],
)
def test_wrong_arrays_are_refused(rows: np.ndarray, names: str, message: str) -> None:
    with pytest.raises(TargetError, match=message):
        Workload(rows, names)


BAD = [
    *((name, value) for name in (*SIZES, *BITS) for value in (0, -1)),
    *((name, 33) for name in BITS),
    *(("kind", value) for value in (-1, 12)),
    *((name, value) for name in ("fused", "transposed", "bias") for value in (-1, 2)),
    *(("activation", value) for value in (-1, 3)),
    *((name, value) for name in ("weight_density", "activation_density") for value in (0.0, -0.5, 1.5, np.nan)),
    *((name, value) for name in ("live_bytes", "position_bytes") for value in (-1.0, np.nan, np.inf)),
]


@pytest.mark.parametrize(("field", "value"), BAD)
def test_bad_fields_are_refused_by_row_and_name(field: str, value: float) -> None:
    rows = np.repeat(conv(8, 8, 4, 3), 6).reshape(2, 3)
    rows[field][1, 2] = value
    with pytest.raises(TargetError, match=rf"Row 2 \('stem.conv'\) of policy 1 .*{field} is {value}|kind {value} is"):
        Workload(rows, ["a", "b", "stem.conv"])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (conv(8, 6, 4, groups=4), "4 groups do not divide 8 input and 6 output channels"),
        (make_row(OpKind.LINEAR, c=4, k=4, groups=2), "no groups"),
        (make_row(OpKind.MATMUL, c=4, k=4, kernel_h=3), "no kernel"),
        (make_row(OpKind.LINEAR, c=4, k=4, out_w=3), "in_h and out_h alone"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(row: np.ndarray, message: str) -> None:
    with pytest.raises(TargetError, match=message):
        Workload(row, ["x"])


@given(st.integers(0, 2**32 - 1))
def test_random_sound_rows_are_accepted(seed: int) -> None:
    rows = random_rows(np.random.default_rng(seed), 100)
    assert len(workload(rows)) == 100


def test_make_row_refuses_unknown_fields() -> None:
    with pytest.raises(TargetError, match="no field 'channels'"):
        make_row(OpKind.CONV, channels=3)
