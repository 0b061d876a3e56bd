"""BitFusion: against its exhaustive oracle, by hand, in its monotonicity, and against published operators."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxopt.targets import Workload, load
from fxopt.targets._core import CostModel
from fxopt.targets.models import family
from fxopt.targets.parameters import ParameterError
from fxopt.targets.rows import Floats, OpKind, Rows, default_rows, make_row
from tests.targets.oracle import conv, random_rows
from tests.targets.oracle_bitfusion import bitfusion
from tests.targets.test_dataflows import all_costs, check

DATA = Path(os.environ.get("FXOPT_SHARED_DATA") or Path(__file__).parents[3] / "shared" / "data")
SEEDS = st.integers(0, 2**32 - 1)

# An array of sizes that are no powers of two, with buffers that make it tile and split kernels.
ODD = {
    "rows": 6.0,
    "columns": 5.0,
    "clock": 3e8,
    "bandwidth": 13.0,
    "weight_buffer": 2100.0,
    "input_buffer": 700.0,
    "output_buffer": 500.0,
    "depthwise_macs_per_cycle": 3.0,
    "cycle_energy": 2e-11,
    "weight_read_energy": 2e-13,
    "weight_write_energy": 3e-13,
    "input_read_energy": 5e-13,
    "input_write_energy": 9e-13,
    "output_read_energy": 3e-13,
    "output_write_energy": 7e-13,
    "dram_energy": 1.2e-10,
    "static_power": 0.2,
}


def figures() -> dict[str, float]:
    target = load("bitfusion")
    return {key: figure.si for key, figure in target.preset.figures.items()}  # type: ignore[attr-defined]


def small_rows(seed: int, count: int) -> Rows:
    """Sound rows of all kinds, small enough to search without mercy."""
    rng = np.random.default_rng(seed)
    rows = random_rows(rng, count)
    for side in ("in", "out"):
        rows[f"{side}_d"] = np.minimum(rows[f"{side}_d"], 3)
        for axis in "hw":
            rows[f"{side}_{axis}"] = np.minimum(rows[f"{side}_{axis}"], 15)
    gemm = np.isin(rows["kind"], [OpKind.LINEAR, OpKind.MATMUL])
    rows["in_h"] = np.where(gemm, rows["out_h"], rows["in_h"])
    windowed = np.isin(rows["kind"], [OpKind.CONV, OpKind.DEPTHWISE])
    rows["dilation"] = np.where(windowed, rng.choice([1, 1, 2], count), 1)
    return rows


def latency_of(model: CostModel, rows: Rows) -> Floats:
    return all_costs(model, rows)[0]


@given(SEEDS)
def test_search_finds_what_trying_everything_finds(seed: int) -> None:
    rows, values = small_rows(seed, 12), figures()
    check(family("bitfusion").Model(values, False), rows, bitfusion(rows, values))


@given(SEEDS)
def test_search_finds_it_on_an_odd_array(seed: int) -> None:
    rows = small_rows(seed, 8)
    for name in ("c", "k"):
        rows[name] = rows["groups"] * (1 + rows[name] // rows["groups"] % 40)
    check(family("bitfusion").Model(ODD, False), rows, bitfusion(rows, ODD))


@given(SEEDS, st.sampled_from(["weight_bits", "activation_bits"]))
def test_latency_never_falls_as_bits_grow(seed: int, field: str) -> None:
    rng = np.random.default_rng(seed)
    rows = random_rows(rng, 100)
    wider = rows.copy()
    wider[field] = np.minimum(32, wider[field] + rng.integers(1, 4, len(rows)))
    model = family("bitfusion").Model(figures(), False)
    assert np.all(latency_of(model, wider) >= latency_of(model, rows) * (1.0 - 1e-12))


@given(SEEDS, st.sampled_from(["c", "k"]))
def test_latency_hardly_falls_as_channels_grow(seed: int, field: str) -> None:
    # Now and then it does: what fits a buffer is loaded whole before the first tile; a little more is loaded tile by
    # tile, behind the arithmetic. About one pair of a thousand, by less than a third.
    rng = np.random.default_rng(seed)
    rows = random_rows(rng, 200)
    rows["c"] += 16 * rows["groups"]
    larger = rows.copy()
    larger[field] += rows["groups"] * rng.integers(1, 100, len(rows)).astype(np.int32)
    model = family("bitfusion").Model(figures(), False)
    before, after = latency_of(model, rows), latency_of(model, larger)
    assert np.mean(after < before * (1.0 - 1e-12)) <= 0.015
    assert np.all(after >= before * 0.66)


# Cycles on 16 x 32 units, 192 bits a cycle, by hand.
CYCLES = {
    # All of it fits: 49 pixels * ceil(64 / 16) * 1 = 196 cycles; exposed (64 * 32 + 49 * 64) * 8 bits and 2 * 49 * 32 *
    # 32 of psums, 738.7 cycles together.
    "pointwise": (conv(64, 32, 7, weight_bits=8, activation_bits=8), 196 + 141824 / 192),
    # The same in 2 bits: ceil(64 / 256), and a quarter of the operands.
    "2 bits": (conv(64, 32, 7, weight_bits=2, activation_bits=2), 49 + (41472 / 4 + 2 * 50176) / 192),
    # Floating point runs as 8 bits.
    "float": (conv(64, 32, 7), 196 + 141824 / 192),
    # Blocks of 8 channels: 49 * 9 cycles; 9 * 8 * 8 weights, 9 * 9 * 8 inputs, 49 * 8 psums; 4 blocks.
    "depthwise": (
        conv(32, 32, 7, 3, groups=32, weight_bits=8, activation_bits=8),
        4 * np.ceil(441 + ((576 + 648) * 8 + 2 * 392 * 32) / 192),
    ),
    # Bound by its 1024 * 4096 weights of 4 bits; inputs once, psums in and out: memory alone.
    "linear": (
        make_row(OpKind.LINEAR, c=1024, k=4096, weight_bits=4, activation_bits=8),
        (1024 * 4096 * 4 + 1024 * 8 + 2 * 4096 * 32) / 192,
    ),
    # 5 and 6 bits compute like 8, and take less memory: 49 * 4 cycles.
    "5 and 6 bits": (
        conv(64, 32, 7, weight_bits=5, activation_bits=6),
        196 + (64 * 32 * 5 + 49 * 64 * 6 + 2 * 49 * 32 * 32) / 192,
    ),
    # Two inputs of 8 bits, 128 outputs, 192 bits a cycle.
    "addition": (
        make_row(OpKind.ELEMENTWISE, c=64, k=64, inputs=2, activation_bits=8, output_bits=8),
        3 * 64 * 8 / 192,
    ),
}


@pytest.mark.parametrize("case", CYCLES)
def test_golden_operators(case: str) -> None:
    row, cycles = CYCLES[case]
    whole = cycles if case == "addition" else np.ceil(cycles)
    assert latency_of(load("bitfusion").model, row)[0] * 500e6 == pytest.approx(whole, rel=1e-9)


def test_golden_energy() -> None:
    # 196 cycles of 235.104 pJ, 512 * 8 weights, 16 * 8 inputs and 32 psums read and written; 16384 bits of weights,
    # 25088 of inputs, 50176 of psums twice; 935 cycles of 2 ns at 243.7 mW.
    array = 235.104 + 4096 * 0.021 + 128 * 0.059 + 1024 * 0.106
    buffers = 16384 * 0.029 + 25088 * 0.114 + 50176 * 0.106
    expected = 196 * array + buffers + 141824 * 15 + 935 * 2e-9 * 0.2437e12
    row = conv(64, 32, 7, weight_bits=8, activation_bits=8)
    assert all_costs(load("bitfusion").model, row)[2][0] == 141824 / 8
    assert all_costs(load("bitfusion").model, row)[1][0] * 1e12 == pytest.approx(expected, rel=1e-9)


def test_rows_of_unknown_kind_are_uncosted() -> None:
    rows = np.concatenate([make_row(OpKind.UNKNOWN), conv(16, 16, 7)])
    estimate = load("bitfusion").estimate(Workload(rows, ["what", "conv"]))
    assert estimate.uncosted == ("what",)
    assert estimate.energy_j is not None
    assert estimate.energy_j[0] > 0.0


def test_depthwise_blocks_are_a_parameter() -> None:
    row = conv(64, 64, 14, 3, groups=64, weight_bits=8, activation_bits=8)
    by_block = [
        latency_of(family("bitfusion").Model({**figures(), "depthwise_macs_per_cycle": size}, False), row)[0]
        for size in (1.0, 4.0, 8.0, 16.0)
    ]
    # Channel by channel each of them takes its 196 * 9 cycles.
    assert by_block[0] * 500e6 > 64 * 196 * 9
    assert by_block == sorted(by_block, reverse=True)


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("weight_buffer", 4095.0, "has to hold 4096 B"),
        ("input_buffer", 127.0, "has to hold 128 B"),
        ("output_buffer", 255.0, "has to hold 256 B"),
    ],
)
def test_buffers_too_small_for_any_tile_are_refused(key: str, value: float, reason: str) -> None:
    with pytest.raises(ParameterError, match=reason):
        family("bitfusion").Model({**figures(), key: value}, False)
    model = family("bitfusion").Model({**figures(), key: value + 1.0}, False)
    wide = np.concatenate([conv(600, 600, 15, 7, weight_bits=bits, activation_bits=bits) for bits in (2, 4, 8)])
    assert np.all(np.isfinite(latency_of(model, wide)))
    assert np.all(latency_of(model, wide) > 0.0)


def published() -> tuple[Rows, Floats, Floats]:
    with (DATA / "bitfusion_operators_sample.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    column = {name: np.array([float(point[name]) for point in table]) for name in table[0]}
    rows = default_rows(len(table))
    rows["kind"] = np.where(column["groups"] > 1, OpKind.DEPTHWISE, OpKind.CONV)
    for field, name in {"c": "in_channels", "k": "out_channels", "groups": "groups"}.items():
        rows[field] = column[name]
    for axis in "hw":
        rows[f"in_{axis}"], rows[f"kernel_{axis}"] = column["in_size"], column["kernel"]
        rows[f"out_{axis}"] = (column["in_size"] + 2 * column["padding"] - column["kernel"]) // column["stride"] + 1
        rows[f"stride_{axis}"] = column["stride"]
    for field in ("weight_bits", "activation_bits"):
        rows[field] = column[field]
    return rows, column["latency_ms"] * 1e-3, column["energy_mj"] * 1e-3


@pytest.mark.skipif(not DATA.is_dir(), reason="the published figures are not here (FXOPT_SHARED_DATA)")
def test_published_operators() -> None:
    rows, latency, energy = published()
    ours_s, ours_j, _ = all_costs(load("bitfusion").model, rows)
    depthwise = rows["kind"] == OpKind.DEPTHWISE
    for kind in (depthwise, ~depthwise):
        slow, costly = np.abs(ours_s / latency - 1.0)[kind], np.abs(ours_j / energy - 1.0)[kind]
        assert np.mean(slow) < 0.0005
        assert np.max(slow) < 0.07
        assert np.mean(costly) < 0.012
        assert np.max(costly) < 0.05
    # Memory-bound pointwise operators agree to two cycles, in all but a few of a thousand.
    assert np.mean(np.abs(ours_s - latency)[~depthwise] * 500e6 < 2.0) > 0.99


def test_the_preset_gives_every_figure() -> None:
    assert set(figures()) == set(ODD) == set(family("bitfusion").PARAMETERS)


@pytest.mark.parametrize("name", ["bitfusion", "eyeriss", "systolic"])
def test_presets_say_where_every_figure_is_from(name: str) -> None:
    target = load(name)
    assert target.name == name
    used = {figure.source for figure in target.preset.figures.values()}  # type: ignore[attr-defined]
    assert used == set(target.info.sources)
    assert target.error
    # The widest pair of bits stands in for floating point.
    widest = target.capabilities.allowed_bits("conv")[0]
    assert widest == max(target.capabilities.allowed_bits("conv"))
