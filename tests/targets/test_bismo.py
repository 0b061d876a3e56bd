"""Bit-serial overlays: the compiled model against plain Python, layers by hand, monotone in channels and bits."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxopt.targets import OpKind, Workload, load, make_row
from fxopt.targets import rows as r
from fxopt.targets.models import family
from fxopt.targets.rows import Floats, Rows
from tests.targets.oracle import conv, random_rows

SEEDS = st.integers(0, 2**32 - 1)
NAMES = ("zynq7020", "vu9p", "vu9p-table")
# Buffers are small, so that most layers come in stripes.
VALUES = {
    "rows": 6.0,
    "depth": 48.0,
    "columns": 7.0,
    "port": 5.0,
    "words": 90.0,
    "depthwise_pad": 6.0,
    "clock": 2.0,
    "widest_bits": 8.0,
}


Operand = tuple[int, int, int, float, float]
"""Bits, tiles, stripes, cycles to fetch a tile and to fetch the last."""
Way = Callable[[Operand, Operand, int], float]


def operand(bits: int, lanes: int, size: int, blocks: int, values: dict[str, float]) -> Operand:
    tiles = math.ceil(lanes / size)
    word = bits * blocks * values["depth"] / (8 * values["port"])
    held = max(1, values["words"] // (bits * blocks))
    return bits, tiles, math.ceil(tiles / held), size * word, (lanes - (tiles - 1) * size) * word


def by_formula(outer: Operand, inner: Operand, x: int) -> float:
    """Cycles with ``outer`` as the outer loop, as in fxopt/targets/models/bismo.pyx; its weights are outside."""
    w, rows, r, g, last_g = outer
    a, columns, q, f, last_f = inner
    streamed = r * ((columns - 1) * max(f, x) + max(last_f, x)) + x * columns * (rows - r) + q * r * (w - 1)
    ways = [q * ((rows - 1) * g + last_g)]
    ways += [q * (rows - 1) * g + x * columns] if rows > r else []
    ways += [q * r * g + x * columns * (rows - r)] if rows > 1 else []
    return max(streamed, r * (columns - q) * x + max(ways) + q * r * w * (a - 1))


def by_tiles(outer: Operand, inner: Operand, x: int) -> float:
    """The same for operands that the buffers hold whole: each tile waits for its turn and for what it multiplies."""

    def finish(arrivals: Floats) -> float:
        """When the last of the products is done, given when what each needs has come in."""
        return float(np.max(arrivals + x * np.arange(len(arrivals))[::-1]))

    def arrived(side: Operand) -> Floats:
        return np.cumsum([side[3]] * (side[1] - 1) + [side[4]])

    w, rows, a, columns = outer[0], outer[1], inner[0], inner[1]
    streamed = np.concatenate([arrived(inner), np.zeros((rows - 1) * columns)])
    awaited = np.zeros((rows, columns))
    awaited[:, 0] = arrived(outer)
    return max(x * rows * columns + w - 1, finish(streamed) + w - 1, finish(awaited.ravel()) + w * (a - 1))


def product_of(row: np.void, values: dict[str, float]) -> tuple[int, int, int, int]:
    """(products, output channels, pixels, blocks) that a row comes to."""
    n, c, k, groups = (int(row[name]) for name in ("n", "c", "k", "groups"))
    side = "in" if row["transposed"] else "out"
    pixels = math.prod(int(row[f"{side}_{axis}"]) for axis in "dhw")
    taps = math.prod(int(row[f"kernel_{axis}"]) for axis in "dhw")
    depth, pad = int(values["depth"]), int(values["depthwise_pad"])
    if row["kind"] == OpKind.DEPTHWISE:
        padded = math.ceil(taps / pad) * pad
        packed = max(1, depth // padded)
        return n * math.ceil(c / packed), k // c * packed, pixels, math.ceil(padded / depth)
    if row["kind"] == OpKind.LINEAR:
        n, pixels = 1, pixels * n
    deep, wide = (c // groups, k // groups * taps) if row["transposed"] else (c // groups * taps, k // groups)
    return n * groups, wide, pixels, math.ceil(deep / depth)


def expected(row: np.void, values: dict[str, float], way: Way = by_formula) -> tuple[float, float]:
    """(seconds, bytes moved) as told in fxopt/targets/models/bismo.pyx."""
    port = 8 * values["port"]
    w, a, o = (min(int(row[f"{name}_bits"]), 8) for name in ("weight", "activation", "output"))
    one = row.reshape(1)
    read, written = float(r.in_elements(one)[0]), float(r.out_elements(one)[0])
    if row["kind"] == OpKind.UNKNOWN:
        return math.nan, 0.0
    if not r.macs(one)[0]:
        bits = read * a + written * o
        return bits / port / values["clock"], bits / 8
    w = a if row["kind"] == OpKind.MATMUL else w
    products, wide, pixels, blocks = product_of(row, values)
    weights = operand(w, wide, int(values["rows"]), blocks, values)
    activations = operand(a, pixels, int(values["columns"]), blocks, values)
    x = w * a * blocks
    cycles = min(way(weights, activations, x), way(activations, weights, x))
    planes = weights[2] * a * pixels + activations[2] * w * wide
    moved = products * planes * blocks * values["depth"] / 8 + written * o / 8
    return products * cycles / values["clock"], moved


def costs(rows: Rows, values: dict[str, float]) -> tuple[Floats, Floats]:
    latency, energy, moved = (np.empty((1, len(rows))) for _ in range(3))
    family("bismo").Model(values, False).per_row(rows.reshape(1, -1), latency, energy, moved)
    return latency[0], moved[0]


def sound_rows(seed: int, count: int) -> Rows:
    rng = np.random.default_rng(seed)
    rows = random_rows(rng, count)
    depthwise = rows["kind"] == OpKind.DEPTHWISE
    rows["groups"] = np.where(depthwise, rows["c"], rows["groups"])
    rows["k"] = np.where(depthwise, rows["c"] * rng.integers(1, 4, count), rows["k"])
    return rows


@given(SEEDS)
def test_the_model_equals_its_oracle(seed: int) -> None:
    rows = sound_rows(seed, 100)
    latency, moved = costs(rows, VALUES)
    wanted = np.array([expected(row, VALUES) for row in rows])
    np.testing.assert_allclose(latency, np.nan_to_num(wanted[:, 0]), rtol=1e-12)
    np.testing.assert_allclose(moved, wanted[:, 1], rtol=1e-12)


@settings(max_examples=20)
@given(SEEDS)
def test_buffers_that_hold_a_layer_run_it_tile_by_tile(seed: int) -> None:
    rows = sound_rows(seed, 10)
    rows = rows[rows["kind"] != OpKind.UNKNOWN]
    for axis in "hw":  # as many tiles as can be gone through one by one
        for side in ("in", "out"):
            rows[f"{side}_{axis}"] = np.minimum(rows[f"{side}_{axis}"], 9)
    large = {**VALUES, "words": 1e9}
    wanted = [expected(row, large, by_tiles)[0] for row in rows]
    np.testing.assert_allclose(costs(rows, large)[0], wanted, rtol=1e-12)


# Cycles on vu9p-table: 16 x 256 x 16 units, ports of 256 bits, so a word a cycle; buffers of 1,024 words.
GOLDEN = {
    # Each of 16 images: 60 tiles of 16 channels, 4 tiles of 49 = 3 * 16 + 1 pixels, one block; w 4, a 6, so a pair of
    # tiles takes 24 cycles. A tile of activations comes in 16 * 6 = 96 cycles, the last in 6; of weights, in 64. Both
    # fit: 1024 / 4 = 256 tiles of weights. Weights outside: 3 * 96 + 24 + 24 * 4 * 59 + 3 = 5979 by activations, less
    # by weights (59 * 64 + 96 + 24 * 3 + 4 * 5 = 3964); activations outside wait for 59 * 64 + 64 weights, then
    # 24 * 60 * 3 are left: 3840 + 4320 + 5 = 8165.
    "pointwise": (conv(160, 960, 7, n=16, weight_bits=4, activation_bits=6), 16 * 5979),
    # 9 taps padded to 16, so 16 channels make a block and 16 * 60 products of 16 rows are left. 64 cycles a pair, 128 a
    # tile of either; 49 pixels are 4 tiles, the last comes in 8 cycles: 3 * 128 + 64 + 7 by activations, 128 + 64 * 3 +
    # 8 * 7 by weights; with activations outside, 3 * 128 + 64 + 8 * 7 by activations, which is more.
    "depthwise": (conv(960, 960, 7, 3, n=16, groups=960, weight_bits=8, activation_bits=8), 16 * 60 * 455),
    # The batch as pixels: one tile of 16, five blocks, so 320 cycles a pair. 63 tiles of weights of 640 cycles, the
    # last has 8 channels and takes 320; buffers hold 1024 / 40 = 25 of them, three stripes. The activations outside:
    # 62 * 640 + 320 + 3 * 7 by weights. Weights outside wait 8 * 7 cycles in each stripe for planes.
    "classifier": (make_row(OpKind.LINEAR, n=16, c=1280, k=1000, weight_bits=8, activation_bits=8), 40_021),
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


def test_the_second_operand_is_fetched_for_each_stripe_of_the_first() -> None:
    # 196 tiles of pixels of 8 bits are two stripes of a buffer of 1,024 words; weights of 16 channels, once for each.
    row = conv(256, 16, 56, weight_bits=8, activation_bits=8, output_bits=8)
    moved = load("vu9p-table").estimate(Workload(row, ["layer"])).rows.dram_bytes[0, 0]
    assert moved == 256 * 3136 + 2 * 256 * 16 + 16 * 3136


def test_a_float_network_runs_at_the_widest_width() -> None:
    wide = conv(64, 128, 14, 3, weight_bits=32, activation_bits=32, output_bits=32)
    eight = conv(64, 128, 14, 3, weight_bits=8, activation_bits=8, output_bits=8)
    assert costs(wide, VALUES) == costs(eight, VALUES)


@given(SEEDS)
@pytest.mark.parametrize("field", ["c", "k", "n", "weight_bits", "activation_bits", "channels"])
def test_cost_never_falls(field: str, seed: int) -> None:
    rows = sound_rows(seed, 60)
    rows = rows[rows["kind"] != OpKind.UNKNOWN]
    depthwise = rows["kind"] == OpKind.DEPTHWISE
    if field in ("c", "k"):
        rows = rows[(rows["groups"] == 1) & ~depthwise]
    if field == "channels":
        rows = rows[depthwise]
    more = rows.copy()
    if field == "channels":  # a depthwise layer has an output channel for each input channel, or several
        more["k"] += more["k"] // more["c"]
        more["groups"] += 1
        more["c"] += 1
    else:
        more[field] = np.minimum(more[field] + 1, 32) if field.endswith("bits") else more[field] + 1
    for low, high in zip(costs(rows, VALUES), costs(more, VALUES), strict=True):
        assert (high >= low * (1.0 - 1e-12)).all()


@pytest.mark.parametrize("name", NAMES)
def test_presets_say_what_they_can_run(name: str) -> None:
    target = load(name)
    assert target.status == "calibrated"
    assert target.capabilities.batch == (1 if name == "zynq7020" else 16)
    assert len(target.capabilities.allowed_bits("conv")) == 64
    assert target.info.energy_reason
