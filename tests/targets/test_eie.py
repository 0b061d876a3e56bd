"""The sparse engine: its formula, one published frame, and what it has no model for."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxopt.targets import OpKind, Workload, load, make_row
from fxopt.targets import rows as r
from fxopt.targets.models import family
from tests.targets.oracle import conv, random_rows, workload

VALUES = {"elements": 48.0, "clock": 5e8, "padding": 0.1, "balance": 0.7, "power": 0.4}


@given(st.integers(0, 2**32 - 1))
def test_products_of_nonzeros_are_counted(seed: int) -> None:
    rows = random_rows(np.random.default_rng(seed), 100)
    latency, energy, moved = (np.empty((1, len(rows))) for _ in range(3))
    family("eie").Model(VALUES, False).per_row(rows.reshape(1, -1), latency, energy, moved)
    products = r.macs(rows) * rows["weight_density"] * rows["activation_density"]
    runs = np.isin(rows["kind"], [OpKind.CONV, OpKind.DEPTHWISE, OpKind.LINEAR])
    expected = np.where(runs, products * 1.1 / (48 * 0.7 * 5e8), 0.0)
    np.testing.assert_allclose(latency[0], expected, rtol=1e-12)
    np.testing.assert_allclose(energy[0], 0.4 * expected, rtol=1e-12)
    assert (moved == 0.0).all()


def test_a_frame_of_the_compressed_alexnet() -> None:
    # Sizes and densities of fully connected layers 6 to 8 (Han et al. 2016, table 3); 18,800 frames a second, 600 mW.
    layers = [(9216, 4096, 0.09, 0.35), (4096, 4096, 0.09, 0.35), (4096, 1000, 0.25, 0.375)]
    rows = [make_row(OpKind.LINEAR, c=c, k=k, weight_density=w, activation_density=a) for c, k, w, a in layers]
    estimate = load("eie").estimate(Workload(np.concatenate(rows), ["fc6", "fc7", "fc8"]))
    assert 1.0 / estimate.latency_s[0] == pytest.approx(18_800, rel=0.01)
    assert estimate.energy_j is not None
    assert estimate.energy_j[0] == pytest.approx(0.6 / 18_800, rel=0.01)


def test_what_is_stored_are_entries_of_values_and_runs() -> None:
    # The formula against weights strewn at random, encoded one by one.
    rng = np.random.default_rng(0)
    outputs, columns, elements = 4000, 50, 48
    for density in (0.5, 0.09, 0.02):
        entries = 0
        stays = rng.random((outputs, columns)) < density
        for element in range(elements):
            for column in stays[element::elements].T:
                gaps = np.diff(np.flatnonzero(column), prepend=-1) - 1
                entries += len(gaps) + int((gaps // 16).sum())
        row = make_row(OpKind.LINEAR, c=columns, k=outputs, weight_density=density, bias=1)
        found = np.empty((1, 1))
        family("eie").Model(VALUES, False).sizes(row.reshape(1, 1), found)
        assert found[0, 0] == pytest.approx(entries + 2 * columns * elements + 4 * outputs, rel=0.02)


def test_a_dense_layer_takes_an_entry_for_every_weight() -> None:
    rows = conv(64, 96, 14, 3, groups=2)
    # 96 / 2 * 64 * 9 entries; two bytes for each of 64 * 9 columns and 64 elements
    assert load("eie").estimate(workload(rows)).weight_bytes[0] == pytest.approx(27_648 + 73_728)


def test_what_has_no_model_is_listed() -> None:
    product = make_row(OpKind.MATMUL, c=8, k=8, in_h=8, out_h=8)
    estimate = load("eie").estimate(workload(conv(8, 8, 4), product, make_row(OpKind.POOL)))
    assert estimate.uncosted == ("row1", "row2")
    assert estimate.uncosted_macs_share == pytest.approx(0.5 / (0.5 + 1.0))


@given(st.integers(0, 2**32 - 1), st.sampled_from(["c", "k", "n", "weight_density", "activation_density"]))
def test_cost_never_falls_as_channels_batch_or_densities_grow(seed: int, what: str) -> None:
    rows = random_rows(np.random.default_rng(seed), 100)
    more = rows.copy()
    more[what] = np.minimum(1.0, 1.1 * rows[what]) if "density" in what else rows[what] + rows["groups"]
    model = family("eie").Model(VALUES, False)
    before, after = np.empty((1, 100)), np.empty((1, 100))
    for each, latency in ((rows, before), (more, after)):
        model.per_row(each.reshape(1, -1), latency, np.empty_like(latency), np.empty_like(latency))
    assert np.all(after >= before * (1.0 - 1e-12))


def test_the_peak_is_what_the_paper_states() -> None:
    # 64 elements, a product (two operations) a cycle at 800 MHz: 102 GOP/s; of dense layers, the balance is reached.
    estimate = load("eie").estimate(workload(make_row(OpKind.LINEAR, c=1000, k=1000, weight_bits=4)))
    assert 2e6 / estimate.latency_s[0] / 0.772 == pytest.approx(102e9, rel=0.005)


def test_one_width_of_arithmetic() -> None:
    model = load("eie")
    wide, narrow = (workload(conv(64, 64, 14, 3, weight_bits=bits, activation_bits=16)) for bits in (32, 4))
    assert model.estimate(wide).latency_s[0] == model.estimate(narrow).latency_s[0]
