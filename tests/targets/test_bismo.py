"""Bit-serial overlays: the compiled model against plain Python, layers by hand, monotone in channels and bits."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxopt.targets import OpKind, Workload, load, make_row
from fxopt.targets import rows as r
from fxopt.targets.models import family
from fxopt.targets.rows import Floats, Rows
from tests.targets.oracle import conv, random_rows

SEEDS = st.integers(0, 2**32 - 1)
NAMES = ("zynq7020", "vu9p", "vu9p-table")
VALUES = {
    "rows": 6.0,
    "depth": 48.0,
    "columns": 7.0,
    "port": 5.0,
    "depthwise_pad": 12.0,
    "depthwise_fetch": 1.5,
    "overlap": 0.25,
    "clock": 2.0,
    "widest_bits": 8.0,
}


def expected(row: np.void, values: dict[str, float]) -> tuple[float, float]:
    """(seconds, bytes moved) by the formulas in fxopt/targets/models/bismo.pyx."""
    kind = OpKind(int(row["kind"]))
    port = 8 * values["port"]
    n, c, k, groups = (int(row[name]) for name in ("n", "c", "k", "groups"))
    w, a, o = (min(int(row[f"{name}_bits"]), 8) for name in ("weight", "activation", "output"))
    one = row.reshape(1)
    read, written = float(r.in_elements(one)[0]), float(r.out_elements(one)[0])
    if kind == OpKind.UNKNOWN:
        return math.nan, 0.0
    if not r.macs(one)[0]:
        bits = read * a + written * o
        return bits / port / values["clock"], bits / 8
    side = "in" if row["transposed"] else "out"
    pixels = math.prod(int(row[f"{side}_{axis}"]) for axis in "dhw")
    taps = math.prod(int(row[f"kernel_{axis}"]) for axis in "dhw")
    if kind == OpKind.DEPTHWISE:
        fetch = values["depthwise_pad"] / port * values["depthwise_fetch"]
        phases = (
            a * n * c * pixels * fetch,
            w * k * n * fetch,
            w * a * k * n * math.ceil(pixels / values["columns"]) / values["rows"],
        )
    else:
        w = a if kind == OpKind.MATMUL else w
        images, pixels = (1, pixels * n) if kind == OpKind.LINEAR else (n * groups, pixels)
        depth, width = (c // groups, k // groups * taps) if row["transposed"] else (c // groups * taps, k // groups)
        blocks = math.ceil(depth / values["depth"])
        stream = blocks * values["depth"] / port * images
        steps = math.ceil(width / values["rows"]) * math.ceil(pixels / values["columns"])
        phases = (a * pixels * stream, w * width * stream, w * a * blocks * images * steps)
    cycles = max(phases) + values["overlap"] * min(phases)
    return cycles / values["clock"], (phases[0] + phases[1]) * values["port"] + written * o / 8


def costs(rows: Rows, values: dict[str, float]) -> tuple[Floats, Floats]:
    latency, energy, moved = (np.empty((1, len(rows))) for _ in range(3))
    family("bismo").Model(values, False).per_row(rows.reshape(1, -1), latency, energy, moved)
    return latency[0], moved[0]


@given(SEEDS)
def test_the_model_equals_its_oracle(seed: int) -> None:
    rows = random_rows(np.random.default_rng(seed), 100)
    latency, moved = costs(rows, VALUES)
    wanted = np.array([expected(row, VALUES) for row in rows])
    np.testing.assert_allclose(latency, np.nan_to_num(wanted[:, 0]), rtol=1e-12)
    np.testing.assert_allclose(moved, wanted[:, 1], rtol=1e-12)


# Cycles on vu9p-table: 16 x 256 x 16 units, ports of 256 bits, depthwise padded to 16 taps, half of the shortest phase.
GOLDEN = {
    # 16 images, 7 x 7 pixels, C 160 in one block, K 960 in 60 rows, pixels in 4 columns; w 4, a 6:
    # A = 6*16*49*256/256 = 4704, W = 4*960*16*256/256 = 61440, compute = 24*1*60*16*4 = 92160
    "pointwise": (conv(160, 960, 7, n=16, weight_bits=4, activation_bits=6), 92_160 + 2_352),
    # A = 8*16*960*49*16/256 = 376320, W = 8*960*16*16/256 = 7680, compute = 64*960*16*4/16 = 245760
    "depthwise": (
        conv(960, 960, 7, 3, n=16, groups=960, weight_bits=8, activation_bits=8),
        376_320 + 3_840,
    ),
    # batch as pixels: A = 8*16*5 = 640 (5 blocks), W = 8*1000*5 = 40000, compute = 64*5*63*1 = 20160
    "classifier": (
        make_row(OpKind.LINEAR, n=16, c=1280, k=1000, weight_bits=8, activation_bits=8),
        40_000 + 320,
    ),
    # two inputs and an output of 16*24*28*28 numbers of 8 bits through a port of 256
    "addition": (
        make_row(OpKind.ELEMENTWISE, n=16, c=24, k=24, in_h=784, out_h=784, inputs=2, activation_bits=8, output_bits=8),
        3 * 16 * 24 * 784 * 8 / 256,
    ),
}


@pytest.mark.parametrize("case", GOLDEN)
def test_layers_by_hand(case: str) -> None:
    row, cycles = GOLDEN[case]
    target = load("vu9p-table")
    found = target.estimate(Workload(row, ["layer"])).latency_s[0]
    assert found * 322e6 == pytest.approx(cycles, rel=1e-12)


def test_a_float_network_runs_at_the_widest_width() -> None:
    wide = conv(64, 128, 14, 3, weight_bits=32, activation_bits=32, output_bits=32)
    eight = conv(64, 128, 14, 3, weight_bits=8, activation_bits=8, output_bits=8)
    assert costs(wide, VALUES) == costs(eight, VALUES)


@given(SEEDS)
@pytest.mark.parametrize("field", ["c", "k", "n", "weight_bits", "activation_bits"])
def test_cost_never_falls(field: str, seed: int) -> None:
    rows = random_rows(np.random.default_rng(seed), 60)
    rows = rows[(rows["groups"] == 1) & (rows["kind"] != OpKind.UNKNOWN)]
    more = rows.copy()
    more[field] = np.minimum(more[field] + 1, 32) if field.endswith("bits") else more[field] + 1
    for low, high in zip(costs(rows, VALUES), costs(more, VALUES), strict=True):
        assert (high >= low).all()


@pytest.mark.parametrize("name", NAMES)
def test_presets_say_what_they_can_run(name: str) -> None:
    target = load(name)
    assert target.status == "calibrated"
    assert target.capabilities.batch == (1 if name == "zynq7020" else 16)
    assert len(target.capabilities.allowed_bits("conv")) == 64
    assert target.info.energy_reason
