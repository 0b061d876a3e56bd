"""Roofs: those of the device by hand, and no estimate passes them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxopt.targets import OpKind, Workload, load, names
from fxopt.targets.roofs import roofs
from fxopt.targets.rows import out_elements
from tests.targets.oracle import random_rows

PRESETS = [name for name in names() if name != "host"]
WITHOUT_SLOPE = {"linear_cpu", "npu", "mcu", "eie"}


def test_roofs_by_hand() -> None:
    # 8 x 8 dot units of 256 bits at 210 MHz, w * a passes; two ports of 4 bytes
    edge = roofs(load("zynq7020"), [(8, 8), (4, 4), (2, 8), (32, 32)])
    peak = 8 * 8 * 256 * 210e6
    assert [roof.label for roof in edge.peaks] == ["4/4, 2/8 bits", "32/32, 8/8 bits"]
    assert [roof.macs_per_s for roof in edge.peaks] == pytest.approx([peak / 16, peak / 64])
    assert edge.bandwidth_bytes_per_s == pytest.approx(2 * 4 * 210e6)
    # 16 x 32 units at 500 MHz, each a product of 8 bits or two of 8 by 4 or sixteen of 2 by 2; 192 bits a cycle
    fused = roofs(load("bitfusion"), [(8, 8), (4, 8), (2, 2), (5, 6)])
    assert [roof.macs_per_s / (16 * 32 * 500e6) for roof in fused.peaks] == pytest.approx([16, 2, 1])
    assert fused.bandwidth_bytes_per_s == pytest.approx(24 * 500e6)


@pytest.mark.parametrize("name", PRESETS)
@settings(max_examples=5)
@given(seed=st.integers(0, 2**32 - 1))
def test_no_operator_passes_the_roofs(name: str, seed: int) -> None:
    target = load(name)
    rows = random_rows(np.random.default_rng(seed), 60)
    rows["weight_density"] = rows["activation_density"] = 1.0
    rows["groups"] = np.where(rows["kind"] == OpKind.DEPTHWISE, rows["c"], rows["groups"])
    rows["k"] = np.where(rows["kind"] == OpKind.DEPTHWISE, rows["c"], rows["k"])
    # On the CPUs of phones linear and depthwise layers may be charged by weights or elements alone.
    others = [] if target.info.family == "linear_cpu" else [OpKind.LINEAR, OpKind.DEPTHWISE]
    rows = rows[np.isin(rows["kind"], [OpKind.CONV, *others])]
    costs = target.estimate(Workload(rows, [str(index) for index in range(len(rows))])).rows
    for index, row in enumerate(rows):
        time = float(costs.latency_s[0, index])
        if not time > 0.0:
            continue
        found = roofs(target, [(int(row["weight_bits"]), int(row["activation_bits"]))])
        assert len(found.peaks) == 1
        assert costs.macs[0, index] / time <= found.peaks[0].macs_per_s * (1 + 1e-9)
        if found.bandwidth_bytes_per_s is not None:
            moved = costs.dram_bytes[0, index]
            if target.info.family == "bismo":  # writes results in no time
                moved -= out_elements(rows[index : index + 1])[0] * min(row["output_bits"], 8) / 8
            assert moved / time <= found.bandwidth_bytes_per_s * (1 + 1e-9)


@pytest.mark.parametrize("name", PRESETS)
def test_every_family_says_what_bounds_it(name: str) -> None:
    target = load(name)
    found = roofs(target, [(8, 8), (32, 32)])
    assert found.note
    assert (found.bandwidth_bytes_per_s is None) == (target.info.family in WITHOUT_SLOPE)
    assert ("no bandwidth" in found.note) == (found.bandwidth_bytes_per_s is None)
    assert all(math.isfinite(roof.macs_per_s) and roof.macs_per_s > 0.0 for roof in found.peaks)
    assert [roof.macs_per_s for roof in found.peaks] == sorted({roof.macs_per_s for roof in found.peaks}, reverse=True)


def test_a_measured_target_has_no_roofs_and_says_so() -> None:
    found = roofs(load("host"), [(8, 8)])
    assert not found.peaks
    assert found.bandwidth_bytes_per_s is None
    assert "measured" in found.note
