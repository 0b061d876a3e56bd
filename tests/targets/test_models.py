"""Each compiled model against its NumPy oracle, against figures derived by hand, and in its monotonicity."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxopt.errors import UnknownNameError
from fxopt.targets import Workload, load
from fxopt.targets._core import CostModel
from fxopt.targets.models import families, family
from fxopt.targets.models.linear_cpu import COEFFICIENTS
from fxopt.targets.parameters import ParameterError
from fxopt.targets.rows import Activation, Floats, OpKind, Rows, make_row
from tests.targets import oracle
from tests.targets.oracle import conv, random_rows

ROOFLINE = {
    "bandwidth": 25e9,
    "overhead": 3e-6,
    "peak.32": 10e9,
    "peak.8": 35e9,
    "peak.2": 90e9,
    "mac_energy.32": 5e-12,
    "mac_energy.8": 1e-12,
    "byte_energy": 1e-10,
    "static_power": 0.3,
}
GPU = {
    "sm_count": 28.0,
    "clock": 1.5e9,
    "mac_per_sm_cycle.32": 64.0,
    "mac_per_sm_cycle.8": 256.0,
    "dense_efficiency": 0.8,
    "depthwise_efficiency": 0.05,
    "tile_m": 96.0,
    "tile_n": 48.0,
    "split_k": 3.0,
    "blocks_per_sm": 2.0,
    "bandwidth": 480e9,
    "bandwidth_efficiency": 0.7,
    "launch_floor": 5e-6,
}
SEEDS = st.integers(0, 2**32 - 1)


def linear_values(rng: np.random.Generator) -> dict[str, float]:
    """Random coefficients for a random part of all groups and classes."""
    values = {"spill_threshold": float(rng.uniform(0.0, 1e6))}
    if rng.random() < 0.5:
        values["channel_tile"] = float(rng.integers(1, 40))
    for bits in oracle.CLASS_BITS:
        for group in oracle.GROUPS:
            if rng.random() < 0.6:
                values[f"{bits}.{group}.const"] = float(rng.uniform(1e-6, 1e-3))
                values |= {f"{bits}.{group}.{name}": float(rng.uniform(0.0, 1e-8)) for name in COEFFICIENTS}
    return values


def costs(model: CostModel, rows: Rows) -> tuple[Floats, Floats]:
    """(latency, energy) of each row; rows without a model come as zero."""
    latency, energy = np.empty((1, len(rows))), np.empty((1, len(rows)))
    model.per_row(rows.reshape(1, -1), latency, energy, np.empty_like(latency))
    return latency[0], energy[0]


def latency_of(model: CostModel, row: Rows) -> float:
    return float(costs(model, row)[0][0])


@given(SEEDS)
def test_roofline_equals_its_oracle(seed: int) -> None:
    rows = random_rows(np.random.default_rng(seed), 300)
    latency, energy = costs(family("roofline").Model(ROOFLINE, False), rows)
    expected_latency, expected_energy = oracle.roofline(rows, ROOFLINE)
    np.testing.assert_allclose(latency, np.nan_to_num(expected_latency), rtol=1e-12)
    np.testing.assert_allclose(energy, np.nan_to_num(expected_energy), rtol=1e-12)


@given(SEEDS)
def test_linear_cpu_equals_its_oracle(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows, values = random_rows(rng, 100), linear_values(rng)
    model = family("linear_cpu").Model(values, False)
    expected = oracle.linear_cpu(rows, values)
    np.testing.assert_allclose(costs(model, rows)[0], np.nan_to_num(expected), rtol=1e-12)


@given(SEEDS)
def test_gpu_equals_its_oracle(seed: int) -> None:
    rows = random_rows(np.random.default_rng(seed), 300)
    latency, _ = costs(family("gpu").Model(GPU, False), rows)
    np.testing.assert_allclose(latency, np.nan_to_num(oracle.gpu(rows, GPU)), rtol=1e-12)


@pytest.mark.parametrize("tile", [7, 10, 12, 14, 49, 96, 192])
def test_tiles_are_counted_exactly(tile: int) -> None:
    # Every number of columns, for tiles that are no powers of two: a reciprocal alone would be off by one.
    values = {**GPU, "tile_m": 1.0, "tile_n": float(tile), "split_k": 1.0, "sm_count": 1.0, "blocks_per_sm": 1.0}
    values |= {
        "launch_floor": 0.0,
        "bandwidth": 1e30,
        "dense_efficiency": 1.0,
        "clock": 1.0,
        "mac_per_sm_cycle.32": 1.0,
    }
    columns = np.arange(1, 4000)
    rows = np.repeat(make_row(OpKind.LINEAR), len(columns))
    rows["k"] = columns
    model = family("gpu").Model({key: value for key, value in values.items() if not key.endswith(".8")}, False)
    np.testing.assert_array_equal(costs(model, rows)[0], -(-columns // tile) * tile)


# Latency in ms of single operators on pixel1, from the figures in its preset; M: million, ms/M times M. Channels are
# rounded up to 16.
PIXEL1 = {
    # 64*128*56*56 = 25.690112 M MACs, 0.008192 M weights
    "pointwise": (conv(64, 128, 56), 0.1731 * 25.690112 + 3.807 * 0.008192),
    # 40 channels to 20 take as many steps as 48 to 32
    "ragged pointwise": (conv(40, 20, 56), 0.1731 * 48 * 32 * 56 * 56 * 1e-6 + 3.807 * 0.0008),
    # 24 channels as many as 32: 3.612672 M MACs; 0.301056 M inputs: 1204224 bytes, 155648 beyond 1 MiB
    "ragged depthwise": (
        conv(24, 24, 112, 3, groups=24),
        0.5158 * 3.612672 + 0.536 * 0.301056 + 2.038 * 0.038912,
    ),
    # 3*32*9*112*112 = 10.838016 M MACs
    "first": (conv(3, 32, 112, 3, 2), 0.2934 * 10.838016 + 1.085),
    # 1.806336 M MACs, 0.802816 M inputs: 3211264 bytes, 2162688 beyond 1 MiB, a quarter is 0.540672 M
    "depthwise": (
        conv(64, 64, 56, 3, 2, groups=64),
        0.5158 * 1.806336 + 0.536 * 0.802816 + 2.038 * 0.540672,
    ),
    # 1024*1001 weights
    "classifier": (make_row(OpKind.LINEAR, c=1024, k=1001), 0.5616 * 1.025024),
    # 8 bits: the int8 class takes 4.26 ms, the float class 4.48
    "pointwise, 8 bits": (
        conv(64, 128, 56, weight_bits=8, activation_bits=8),
        0.0789 * 25.690112 + 5.559 * 0.401408,
    ),
    # 8 bits with few channels: 5.559 * 0.802816 alone is more than the float class; a runtime stays with that
    "thin pointwise, 8 bits": (
        conv(8, 64, 112, weight_bits=8, activation_bits=8),
        0.1731 * 2 * 6.422528 + 3.807 * 0.000512,
    ),
    # weights alone in 8 bits: computed in float
    "weights in 8 bits": (make_row(OpKind.LINEAR, c=1000, k=1000, weight_bits=8), 0.5616),
}

# Latency in us on v100: 80 multiprocessors, 64 MACs a cycle, 1.53 GHz, tiles of 32 x 32, efficiency 0.914, floor 40.2.
V100 = {
    # M = 8*56*56 = 25088: 784 tiles; N = 64: 2; 1568 tiles in 20 waves; K = 576
    "convolution": (conv(64, 64, 56, 3, n=8), 20 * 32 * 32 * 576 / (64 * 1.53e3 * 0.914)),
    # 32*64*56*56*49 MACs at 34% of 80*64*1.53e9; the bytes would take 61 us
    "depthwise": (conv(64, 64, 56, 7, n=32, groups=64), 32 * 64 * 3136 * 49 / (80 * 64 * 1.53e3 * 0.34)),
    # in 16 bits as many on the same lanes, not on the tensor cores
    "depthwise, 16 bits": (
        conv(64, 64, 56, 7, n=32, groups=64, weight_bits=16, activation_bits=16, output_bits=16),
        32 * 64 * 3136 * 49 / (80 * 64 * 1.53e3 * 0.34),
    ),
    # (2*64 + 64)*112*112*32 elements of 4 bytes at 94.2% of 900 GB/s
    "addition": (
        make_row(OpKind.ELEMENTWISE, n=32, c=64, k=64, inputs=2, in_h=112, in_w=112, out_h=112, out_w=112),
        192 * 12544 * 32 * 4 / 847.8e3,
    ),
    "launch": (make_row(OpKind.NORM, n=8, c=64, k=64, in_h=7, out_h=7), 40.2),
    # at 16 bits, the tensor cores' 512 MACs a cycle: 16.5 us, below the floor
    "convolution, 16 bits": (conv(64, 64, 56, 3, n=8, weight_bits=16, activation_bits=16, output_bits=16), 40.2),
}


@pytest.mark.parametrize("case", PIXEL1)
def test_golden_operators_of_pixel1(case: str) -> None:
    row, milliseconds = PIXEL1[case]
    assert latency_of(load("pixel1").model, row) * 1e3 == pytest.approx(milliseconds, rel=1e-9)


@pytest.mark.parametrize("case", V100)
def test_golden_operators_of_v100(case: str) -> None:
    row, microseconds = V100[case]
    assert latency_of(load("v100").model, row) * 1e6 == pytest.approx(microseconds, rel=1e-9)


def test_golden_block_of_note10() -> None:
    # 40 channels to 240, 5x5 by depth, to 40, at 28 pixels a side: 784 pixels
    convolutions = [conv(40, 240, 28), conv(240, 240, 28, 5, groups=240), conv(240, 40, 28)]
    plain = 0.0348 * 2 * 7.5264 + 0.2026 * 4.704 + 1.403 * (0.0192 + 0.006) + 0.911 * (2 * 0.18816 + 0.03136)
    model = load("note10").model
    assert sum(latency_of(model, row) for row in convolutions) * 1e3 == pytest.approx(plain, rel=1e-9)
    # Squeeze and excitation of what the depthwise convolution writes: pooling and the product with the gate.
    sides = {"in_h": 28, "in_w": 28}
    pool = make_row(OpKind.POOL, c=240, k=240, kernel_h=28, kernel_w=28, **sides)
    gate = make_row(OpKind.ELEMENTWISE, c=240, k=240, out_h=28, out_w=28, **sides)
    found = latency_of(model, pool) + latency_of(model, gate)
    assert found * 1e3 == pytest.approx(0.766 * 0.18816, rel=1e-9)

    # H-swish costs the same merged into its convolution, by itself, and written as x * relu6(x + 3) / 6; ReLU is free.
    def whole(activation: Activation, fused: int) -> float:
        row = gate.copy()
        row["fused"], row["activation"] = fused, activation
        return float(load("note10").estimate(Workload(row, ["activation"])).latency_s[0]) * 1e3

    assert whole(Activation.CURVE, 1) == whole(Activation.CURVE, 0) == pytest.approx(1.59 * 0.18816, rel=1e-9)
    assert whole(Activation.CLAMP, 1) == 0.0
    # An addition, a product and a division; relu6 is merged.
    assert 3 * latency_of(model, gate) * 1e3 == pytest.approx(1.59 * 0.18816, rel=1e-9)


def test_golden_roofline() -> None:
    # 1000*1000 MACs at 10 GMAC/s: 100 us; 4 MB + 8 KB at 25 GB/s: 160.32 us; the longer, and 3 us
    float_row = make_row(OpKind.LINEAR, c=1000, k=1000)
    latency, energy = costs(family("roofline").Model(ROOFLINE, False), float_row)
    assert latency[0] == pytest.approx(163.32e-6, rel=1e-9)
    # 1e6 * 5 pJ + 4008000 * 100 pJ + 0.3 W * 163.32 us
    assert energy[0] == pytest.approx(5e-6 + 400.8e-6 + 48.996e-6, rel=1e-9)


MODELS = {
    "roofline": family("roofline").Model(ROOFLINE, False),
    "gpu": family("gpu").Model(GPU, False),
    "pixel1": load("pixel1").model,
    "v100": load("v100").model,
    "jetson-tx2": load("jetson-tx2").model,
    "note10": load("note10").model,
    "phone-int8": load("phone-int8").model,
    "xeon": load("xeon-e5-2640v4").model,
}


@given(
    what=st.sampled_from(["c", "k", "weight_bits", "activation_bits", "output_bits", "all bits"]),
    seed=SEEDS,
)
@pytest.mark.parametrize("name", MODELS)
def test_cost_never_falls_as_channels_or_bits_grow(name: str, what: str, seed: int) -> None:
    rows = random_rows(np.random.default_rng(seed), 200)
    more = rows.copy()
    if what in ("c", "k"):
        # A depthwise convolution has one filter for each channel: it grows in groups too, here left as they are.
        more[what] += rows["groups"]
    else:
        fields = ("weight_bits", "activation_bits", "output_bits") if what == "all bits" else (what,)
        for field in fields:
            more[field] = np.minimum(32, rows[field] + 1 + seed % 8)
    before, energy_before = costs(MODELS[name], rows)
    after, energy_after = costs(MODELS[name], more)
    assert np.all(after >= before * (1.0 - 1e-12))
    if MODELS[name].has_energy:
        assert np.all(energy_after >= energy_before * (1.0 - 1e-12))


@pytest.mark.parametrize("name", MODELS)
def test_depthwise_cost_never_falls_as_it_widens(name: str) -> None:
    rows = np.concatenate([conv(c, c, 28, 3, groups=c) for c in range(2, 300)])
    assert np.all(np.diff(costs(MODELS[name], rows)[0]) >= 0.0)


@pytest.mark.parametrize("name", MODELS)
def test_densities_do_not_matter_to_dense_kernels(name: str) -> None:
    dense, sparse = conv(64, 64, 28, 3), conv(64, 64, 28, 3, weight_density=0.1, activation_density=0.5)
    np.testing.assert_equal(costs(MODELS[name], dense), costs(MODELS[name], sparse))


def test_a_width_without_a_class_has_no_model() -> None:
    values = {"bandwidth": 1e9, "overhead": 0.0, "peak.8": 1e9}
    target_rows = np.concatenate([conv(8, 8, 4, weight_bits=8, activation_bits=8), conv(8, 8, 4)])
    model = family("roofline").Model(values, False)
    latency, _ = costs(model, target_rows)
    assert latency[0] > 0.0
    totals, flags = np.empty((5, 1)), np.zeros(2, np.uint8)
    model.totals(target_rows.reshape(1, -1), *totals, flags)
    assert flags.tolist() == [0, 1]
    # An operator without MACs needs no arithmetic class.
    assert latency_of(model, make_row(OpKind.COPY, c=100, k=100)) == pytest.approx(800e-9)


@pytest.mark.parametrize(
    ("name", "change", "key"),
    [
        ("roofline", {"peak.32": 50e9}, "peak.32"),
        ("roofline", {"mac_energy.32": 0.5e-12}, "mac_energy.32"),
        ("roofline", {"byte_energy": None}, "byte_energy"),
        ("roofline", {"peak.32": None, "peak.8": None, "peak.2": None}, "peak"),
        ("gpu", {"mac_per_sm_cycle.32": 300.0}, "mac_per_sm_cycle.32"),
        ("gpu", {"mac_per_sm_cycle.32": None, "mac_per_sm_cycle.8": None}, "mac_per_sm_cycle"),
        ("linear_cpu", {"float.pool.in": 0.0}, "float.pool"),
        ("linear_cpu", {"float.pool.spill": 1e-9}, "spill_threshold"),
    ],
)
def test_figures_that_do_not_fit_together_are_refused(name: str, change: dict[str, float | None], key: str) -> None:
    base = {"roofline": ROOFLINE, "gpu": GPU, "linear_cpu": {}}[name]
    values = {field: value for field, value in {**base, **change}.items() if value is not None}
    with pytest.raises(ParameterError) as caught:
        family(name).Model(values, False)
    assert caught.value.key == key


def test_every_family_declares_what_it_takes() -> None:
    assert {"bismo", "bitfusion", "eie", "eyeriss", "gpu", "linear_cpu"} <= set(families())
    assert {"mcu", "measured", "npu", "roofline", "systolic"} <= set(families())
    for name in families():
        assert all(parameter.about for parameter in family(name).PARAMETERS.values())
    with pytest.raises(UnknownNameError, match="roofline"):
        family("rooflin")


def test_the_base_model_costs_nothing_it_knows_of() -> None:
    workload = Workload(conv(3, 8, 4), ["a"])
    assert costs(CostModel(False), workload.rows[0]) == (0.0, 0.0)
