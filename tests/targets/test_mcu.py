"""Microcontrollers: their times, what they hold in memory, and whether a model fits them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxopt.targets import ColumnWorkload, OpKind, Workload, load, make_row
from fxopt.targets import rows as r
from fxopt.targets.models import family
from fxopt.targets.parameters import ParameterError
from fxopt.targets.rows import Floats, Rows
from tests.targets.oracle import Values, conv, narrowest, random_rows, workload

VALUES = {"clock": 480e6, "mac_per_cycle.8": 0.5, "mac_per_cycle.16": 0.25, "item_per_cycle": 2.0, "in_place": 1.0}
SEEDS = st.integers(0, 2**32 - 1)
BYTES = {"weight_bits": 8, "activation_bits": 8, "output_bits": 8}


def oracle(rows: Rows, values: Values) -> Floats:
    """Latency by the formulas in fxopt/targets/models/mcu.pyx."""
    widest = max(int(key.split(".")[1]) for key in values if key.startswith("mac_per_cycle."))
    rate = np.array([narrowest(values, "mac_per_cycle", min(bits, widest)) for bits in r.compute_bits(rows)])
    items = (r.in_elements(rows) + r.out_elements(rows)) / values["item_per_cycle"]
    latency = np.where(r.macs(rows) > 0.0, r.macs(rows) / rate, items) / values["clock"]
    return np.where(rows["kind"] == OpKind.UNKNOWN, 0.0, latency)


def held(rows: Rows) -> Floats:
    """Bytes held in place, by the formulas there."""
    read = r.in_elements(rows) / rows["inputs"] * rows["activation_bits"] / 8.0
    written = r.out_elements(rows) * rows["output_bits"] / 8.0
    plane = np.where(rows["kind"] == OpKind.DEPTHWISE, written / (rows["n"] * rows["k"].astype(float)), 0.0)
    shares = np.isin(rows["kind"], [OpKind.DEPTHWISE, OpKind.ELEMENTWISE]) & (rows["fused"] == 0)
    saved = np.where(shares, np.maximum(np.minimum(read, written) - plane, 0.0), 0.0)
    return np.maximum(rows["live_bytes"] - saved, 0.0)


def latencies(values: Values, rows: Rows) -> Floats:
    latency = np.empty((1, len(rows)))
    family("mcu").Model(values, False).per_row(rows[None], latency, np.empty_like(latency), np.empty_like(latency))
    return latency[0]


@given(SEEDS)
def test_time_and_memory_equal_their_oracles(seed: int) -> None:
    rows = random_rows(np.random.default_rng(seed), 300)
    np.testing.assert_allclose(latencies(VALUES, rows), oracle(rows, VALUES), rtol=1e-12)
    found = np.empty((1, len(rows)))
    family("mcu").Model(VALUES, False).held_bytes(rows[None], found)
    np.testing.assert_allclose(found[0], held(rows), rtol=1e-9)


@given(SEEDS, st.sampled_from(["c", "k", "weight_bits", "activation_bits", "output_bits"]))
def test_time_never_falls_as_channels_or_bits_grow(seed: int, what: str) -> None:
    rows = random_rows(np.random.default_rng(seed), 200)
    more = rows.copy()
    more[what] = rows[what] + rows["groups"] if what in ("c", "k") else np.minimum(32, rows[what] + 1 + seed % 8)
    assert np.all(latencies(VALUES, more) >= latencies(VALUES, rows) * (1.0 - 1e-12))


@given(SEEDS)
def test_policies_in_columns_hold_what_they_hold_written_out(seed: int) -> None:
    rng = np.random.default_rng(seed)
    template = np.concatenate([conv(8, 8, 6, 3, groups=8, **BYTES), make_row(OpKind.ELEMENTWISE, in_h=9, out_h=9)])
    columns = [
        {name: rng.integers(1, 60, 20).astype(np.int32) for name in ("in_h", "out_h")}
        | {"live_bytes": rng.uniform(0.0, 1e4, 20)}
        for _ in template
    ]
    work = ColumnWorkload(template, columns, ["a", "b"], 20)
    target = load("stm32h743")
    streamed, expanded = target.estimate(work), target.estimate(work.expand())
    np.testing.assert_array_equal(streamed.peak_activation_bytes, expanded.peak_activation_bytes)
    np.testing.assert_array_equal(expanded.rows.activation_bytes.max(axis=1), expanded.peak_activation_bytes)


# Input 28*28*64 = 50176 bytes, output of stride 2 14*14*64 = 12544, one channel of it 196; 1000 bytes lie beside them.
DEPTHWISE = conv(64, 64, 14, 3, 2, groups=64, live_bytes=50176 + 12544 + 1000, **BYTES)
# Two operands and a result of 7*7*100 bytes each.
ADDITION = make_row(OpKind.ELEMENTWISE, c=100, k=100, inputs=2, in_h=49, out_h=49, live_bytes=3 * 4900, **BYTES)


def test_golden_peaks_in_place() -> None:
    in_place, apart = load("stm32h743"), load("stm32h743-tflm")
    for row, alive, shared in ((DEPTHWISE, 63720, 12544 - 196), (ADDITION, 14700, 4900)):
        assert apart.estimate(workload(row)).peak_activation_bytes[0] == alive
        assert in_place.estimate(workload(row)).peak_activation_bytes[0] == alive - shared
    pointwise = conv(64, 64, 14, live_bytes=25088, **BYTES)
    fused = ADDITION.copy()
    fused["fused"] = 1
    peaks = in_place.estimate(Workload(np.stack([pointwise, fused]), ["a"])).peak_activation_bytes
    assert peaks.tolist() == [25088, 14700]


def test_golden_times() -> None:
    # 64*64*196 = 802816 MACs at 0.486 a cycle of 480 MHz, and of 216 MHz
    row = conv(64, 64, 14, **BYTES)
    assert load("stm32h743").estimate(workload(row)).latency_s[0] == pytest.approx(802816 / (0.486 * 480e6), rel=1e-9)
    assert load("stm32f746").estimate(workload(row)).latency_s[0] == pytest.approx(802816 / (0.486 * 216e6), rel=1e-9)
    # three tensors of 4900 bytes, one element a cycle
    assert load("stm32h743").estimate(workload(ADDITION)).latency_s[0] == pytest.approx(14700 / 480e6, rel=1e-9)


def test_floating_point_is_costed_as_the_widest_integers() -> None:
    target = load("stm32h743")
    narrow, wide = conv(64, 64, 14, **BYTES), conv(64, 64, 14)
    assert target.estimate(workload(wide)).latency_s[0] == target.estimate(workload(narrow)).latency_s[0]
    assert target.estimate(workload(wide)).uncosted == ()
    (caveat,) = target.caveats(workload(wide))
    assert "32 bits, for which stm32h743 is uncalibrated" in caveat


def test_models_that_do_not_fit_are_told() -> None:
    target = load("stm32f746")
    # 147 KB are code: 901576 bytes of weights fit 1 MiB, one more does not.
    fits = make_row(OpKind.LINEAR, c=901576, k=1, live_bytes=320 * 1024, **BYTES)
    over = make_row(OpKind.LINEAR, c=901577, k=1, live_bytes=320 * 1024 + 1, **BYTES)
    assert target.caveats(workload(fits)) == ()
    memory, storage = target.caveats(Workload(np.stack([fits, over]), ["classifier"]))
    assert memory == ("does not fit stm32f746: activations at their peak take 321 KiB of 320 (under 1 of 2 policies).")
    assert "weights and code take 1025 KiB of 1024 (under 1 of 2 policies)" in storage
    assert "policies" not in "".join(target.caveats(workload(over)))


def test_zeros_lie_in_flash_like_any_weight() -> None:
    sparse = make_row(OpKind.LINEAR, c=100, k=100, weight_density=0.1, position_bytes=600, **BYTES)
    assert load("stm32h743").estimate(workload(sparse)).weight_bytes[0] == 10_000
    assert load("pixel1").estimate(workload(sparse)).weight_bytes[0] == 1_600


def test_figures_are_checked() -> None:
    with pytest.raises(ParameterError, match="no figure for any width"):
        family("mcu").Model({key: value for key, value in VALUES.items() if "mac" not in key}, False)
    with pytest.raises(ParameterError, match=r"mac_per_cycle\.16: has to be at most that of 8 bits"):
        family("mcu").Model(VALUES | {"mac_per_cycle.16": 1.0}, False)
