"""Eyeriss and systolic arrays: against their oracles, by hand, in their monotonicity, and against published figures."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxopt.targets import load
from fxopt.targets._core import CostModel
from fxopt.targets.models import family
from fxopt.targets.parameters import ParameterError
from fxopt.targets.rows import Floats, OpKind, Rows, macs, make_row
from tests.targets import oracle_dataflows as oracle
from tests.targets.oracle import Values, conv, random_rows

DATA = Path(os.environ.get("FXOPT_SHARED_DATA") or Path(__file__).parents[3] / "shared" / "data")

ENERGIES = {"mac_energy": 3e-12, "dram_energy": 6e-11, "static_power": 0.2}
EYERISS = {
    "rows": 12.0,
    "columns": 14.0,
    "clock": 2e8,
    "bandwidth": 4.8e8,
    "buffer": 65536.0,
    "filters": 16.0,
    "efficiency": 0.8,
    **ENERGIES,
}
SYSTOLIC = {
    "rows": 24.0,
    "columns": 16.0,
    "dataflow": 1.0,
    "native_bits": 4.0,
    "clock": 7e8,
    "bandwidth": 3.4e10,
    "weight_buffer": 20e3,
    "activation_buffer": 60e3,
    **ENERGIES,
}
SEEDS = st.integers(0, 2**32 - 1)
Oracle = Callable[[Rows, Values], tuple[Floats, Floats, Floats]]


def all_costs(model: CostModel, rows: Rows) -> tuple[Floats, Floats, Floats]:
    """(latency, energy, bytes moved) of each row; rows without a model come as zero."""
    latency, energy, moved = (np.empty((1, len(rows))) for _ in range(3))
    model.per_row(rows.reshape(1, -1), latency, energy, moved)
    return latency[0], energy[0], moved[0]


def check(model: CostModel, rows: Rows, expected: tuple[Floats, Floats, Floats]) -> None:
    known = ~np.isnan(expected[0])
    for ours, theirs in zip(all_costs(model, rows), expected, strict=True):
        np.testing.assert_allclose(ours, np.where(known, theirs, 0.0), rtol=1e-9)


@given(SEEDS)
def test_eyeriss_equals_its_oracle(seed: int) -> None:
    rows = random_rows(np.random.default_rng(seed), 100)
    check(family("eyeriss").Model(EYERISS, False), rows, oracle.eyeriss(rows, EYERISS))


@given(SEEDS, st.sampled_from([1.0, 2.0, 3.0]))
def test_systolic_equals_its_oracle(seed: int, dataflow: float) -> None:
    rows, values = random_rows(np.random.default_rng(seed), 100), {**SYSTOLIC, "dataflow": dataflow}
    check(family("systolic").Model(values, False), rows, oracle.systolic(rows, values))


@pytest.mark.parametrize(("name", "values"), [("eyeriss", EYERISS), ("systolic", SYSTOLIC)])
@given(seed=SEEDS, field=st.sampled_from(["c", "k", "n", "weight_bits", "activation_bits", "output_bits"]))
def test_costs_never_fall_as_sizes_and_bits_grow(name: str, values: Values, seed: int, field: str) -> None:
    rng = np.random.default_rng(seed)
    rows = random_rows(rng, 100)
    larger = rows.copy()
    steps = rng.integers(1, 4, len(rows)) * (rows["groups"] if field in "ck" else 1)
    larger[field] += steps.astype(np.int32)
    larger[field] = np.minimum(larger[field], 32 if field.endswith("bits") else 2**20)
    model = family(name).Model(values, False)
    for before, after in zip(all_costs(model, rows), all_costs(model, larger), strict=True):
        assert np.all(after >= before * (1.0 - 1e-12))


# Cycles on 12 x 14 elements by hand; half of a buffer of 65536 B is 16384 psums.
EYERISS_CYCLES = {
    # 3 rows of a kernel: 4 sets above one another; 13 rows of the map: 1 beside; 256 / 4 = 64 turns a filter. Psums:
    # 13 * 13 * 64 = 10816, no crowding.
    "3 x 3, 13 x 13": (conv(256, 384, 13, 3), 64 * 384 * 13 * 3),
    # 11 rows: 1 set; 55 rows in 4 folds; psums 14 * 55 * 16 = 12320.
    "11 x 11, 55 x 55": (conv(3, 96, 55, 11, 4), 3 * 96 * 4 * 55 * 11),
    # 7 rows of the map: 2 sets beside one another, 24 in all for 16 * 12 channels: 8 turns.
    "pointwise, 7 x 7": (conv(192, 100, 7), 8 * 100 * 7),
    # Psums 14 * 112 * 64 = 100352, 6.125 times what fits, of which at most 16 / 4 count; 112 / 14 = 8 folds.
    "crowded": (conv(64, 64, 112, 3), 16 * 64 * 8 * 112 * 3 * 4),
    # 15 rows of a kernel in 2 folds; 3 channels and 5 filters, one set.
    "15 x 15": (conv(3, 5, 14, 15), 3 * 5 * 2 * 14 * 15),
    # 1024 inputs over 168 elements: 7 turns; 1000 outputs over them, 6: the lesser of 7 * 1000 and 1024 * 6.
    "linear": (make_row(OpKind.LINEAR, c=1024, k=1000), 1024 * 6),
    # 32 channels over 4 sets.
    "depthwise": (conv(32, 32, 14, 3, groups=32), 8 * 14 * 3),
}


@pytest.mark.parametrize("case", EYERISS_CYCLES)
def test_golden_operators_of_eyeriss(case: str) -> None:
    row, cycles = EYERISS_CYCLES[case]
    fast = {**EYERISS, "bandwidth": 1e30, "efficiency": 1.0, "clock": 1.0}
    assert all_costs(family("eyeriss").Model(fast, False), row)[0][0] == pytest.approx(cycles, rel=1e-12)


def test_eyeriss_waits_for_its_first_and_last_buffer() -> None:
    # 1000 inputs and 10 outputs of 2 bytes are exposed; 11010 words cross, 45.9 us, longer than 77 cycles.
    row = make_row(OpKind.LINEAR, c=1000, k=10)
    latency, energy, moved = all_costs(family("eyeriss").Model(EYERISS, False), row)
    assert moved[0] == 2 * 11010
    assert latency[0] == pytest.approx((2 * 11010 + 2 * 1010) / 4.8e8, rel=1e-12)
    assert energy[0] == pytest.approx(10000 * 3e-12 + 22020 * 6e-11 + 0.2 * latency[0], rel=1e-12)


def test_all_widths_cost_the_same_on_eyeriss() -> None:
    rows = [conv(64, 64, 14, 3, weight_bits=bits, activation_bits=bits, output_bits=bits) for bits in (2, 8, 16, 32)]
    assert len(set(all_costs(load("eyeriss").model, np.concatenate(rows))[0])) == 1


# Cycles that SCALE-Sim reports for weight-stationary 256 x 256; MobileNet's layers.
@pytest.mark.parametrize(
    ("row", "cycles"),
    [
        # 27 rows, 32 columns: one fold of 2 * 256 + 256 + 112 * 112 - 2
        (conv(3, 32, 112, 3, 2), 13309),
        # one filter of 9 taps: 2 * 256 + 256 + 28 * 28 - 2
        (conv(1, 1, 28, 3), 1549),
    ],
)
def test_golden_operators_of_systolic(row: Rows, cycles: int) -> None:
    row["weight_bits"] = row["activation_bits"] = row["output_bits"] = 8
    assert all_costs(load("systolic").model, row)[0][0] * 700e6 == pytest.approx(cycles, rel=1e-12)


def test_dataflows_of_a_systolic_array() -> None:
    # M = 196, R = 9 * 32 = 288, K = 48 on 24 x 16; fill 2 * 24 + 16 - 2 = 62.
    row = conv(32, 48, 14, 3, weight_bits=4, activation_bits=4)
    by_hand = {1.0: 12 * 3 * (62 + 196) - 1, 2.0: 12 * 13 * (62 + 48) - 1, 3.0: 9 * 3 * (62 + 288) - 1}
    for dataflow, cycles in by_hand.items():
        model = family("systolic").Model({**SYSTOLIC, "dataflow": dataflow, "bandwidth": 1e30}, False)
        assert all_costs(model, row)[0][0] * 7e8 == pytest.approx(cycles, rel=1e-12)
        # 8 bits: two parts of each operand.
        row8 = conv(32, 48, 14, 3, weight_bits=8, activation_bits=8)
        assert all_costs(model, row8)[0][0] * 7e8 == pytest.approx(4 * cycles, rel=1e-12)


def test_what_does_not_stay_is_fetched_again() -> None:
    # Inputs 64 * 28 * 28 bytes exceed the half of 60 KB: fetched for each of 128 / 16 folds. Psums, 4 bytes each, too:
    # stored and fetched between ceil(64 / 24) = 3 folds.
    row = conv(64, 128, 28, weight_bits=8, activation_bits=8, output_bits=8)
    inputs, weights, outputs = 64 * 784, 64 * 128, 128 * 784
    moved = all_costs(family("systolic").Model(SYSTOLIC, False), row)[2][0]
    assert moved == inputs * 8 + weights + outputs + 2 * 2 * 4 * outputs


def test_figures_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ParameterError, match=r"mac_energy.*together or not at all"):
        family("eyeriss").Model({key: value for key, value in EYERISS.items() if key != "mac_energy"}, False)
    parameter = family("systolic").PARAMETERS["dataflow"]
    with pytest.raises(ParameterError, match="above the largest that makes sense"):
        parameter.to_si("dataflow", 4, "1")


@pytest.mark.skipif(not DATA.is_dir(), reason="the published figures are not here (FXOPT_SHARED_DATA)")
def test_the_chip() -> None:
    with (DATA / "validation.csv").open(newline="") as file:
        chip = {
            (point["model"], point["metric"]): float(point["value"])
            for point in csv.DictReader(file)
            if point["device"].startswith("Eyeriss chip")
        }
    alexnet = [(3, 96, 55, 11, 4, 1), (96, 256, 27, 5, 1, 2), (256, 384, 13, 3, 1, 1), (384, 384, 13, 3, 1, 2)]
    rows = [conv(*layer[:5], groups=layer[5], n=4) for layer in [*alexnet, (384, 256, 13, 3, 1, 2)]]
    widths = [(3, 64, 224), (64, 64, 224), (64, 128, 112), (128, 128, 112), (128, 256, 56)]
    widths += [(256, 256, 56)] * 2 + [(256, 512, 28)] + [(512, 512, 28)] * 2 + [(512, 512, 14)] * 3
    deep = [conv(*layer, 3, n=3) for layer in widths]
    for name, network, batch, error in (("AlexNet conv", rows, 4, 0.01), ("VGG-16 conv", deep, 3, 0.2)):
        joined = np.concatenate(network)
        latency, energy, moved = all_costs(load("eyeriss").model, joined)
        assert batch / latency.sum() == pytest.approx(chip[name, "throughput"], rel=error)
        # The chip's power is without memory's.
        watts = (energy.sum() - moved.sum() * 64e-12) / latency.sum()
        assert watts == pytest.approx(chip[name, "power"] * 1e-3, rel=0.04)
        assert macs(joined).sum() / batch > 6e8
