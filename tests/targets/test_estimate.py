"""Estimates: totals, batches, threads, fused rows, rows without a model, metrics, caveats."""

from __future__ import annotations

import pickle  # noqa: TID251 (process pools send targets that way)
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fxopt.targets
from fxopt.errors import TargetError, UnknownNameError, UnsupportedError
from fxopt.targets import METRICS, ColumnWorkload, Estimate, OpKind, Target, Workload, load, make_row
from fxopt.targets import rows as r
from tests.targets.oracle import BOARD, conv, random_rows, workload

NAMES = ("pixel1", "v100")
SEEDS = st.integers(0, 2**32 - 1)


@pytest.fixture
def energetic(tmp_path: Path) -> Target:
    path = tmp_path / "board.toml"
    path.write_text(BOARD)
    return load(path)


def policies(seed: int, count: int = 7, rows: int = 20) -> Workload:
    made = random_rows(np.random.default_rng(seed), count * rows).reshape(count, rows)
    return Workload(made, [f"row{i}" for i in range(rows)])


def fields(estimate: Estimate) -> np.ndarray:
    arrays = (
        *(estimate.latency_s, estimate.weight_bytes, estimate.peak_activation_bytes, estimate.macs),
        estimate.energy_j if estimate.energy_j is not None else np.zeros_like(estimate.macs),
    )
    return np.stack(arrays)


@given(SEEDS)
@pytest.mark.parametrize("name", NAMES)
def test_totals_are_sums_over_rows(name: str, seed: int) -> None:
    work = policies(seed)
    estimate = load(name).estimate(work)
    summed = load(name).model.fixed_s + estimate.rows.latency_s.sum(axis=1)
    np.testing.assert_allclose(estimate.latency_s, summed, rtol=1e-12)
    np.testing.assert_allclose(estimate.weight_bytes, r.stored_bytes(work.rows).sum(axis=1), rtol=1e-12)
    np.testing.assert_allclose(estimate.macs, r.macs(work.rows).sum(axis=1), rtol=1e-12)
    np.testing.assert_array_equal(estimate.peak_activation_bytes, work.rows["live_bytes"].max(axis=1))
    by_row = estimate.rows
    np.testing.assert_allclose(estimate.weight_bytes, by_row.weight_bytes.sum(axis=1), rtol=1e-12)
    np.testing.assert_allclose(estimate.macs, by_row.macs.sum(axis=1), rtol=1e-12)
    free = (work.rows["kind"] == OpKind.UNKNOWN) | (load(name).info.fuses & (work.rows["fused"] == 1))
    costed = ~(free | np.isin(np.array(work.names), estimate.uncosted))
    np.testing.assert_allclose(by_row.dram_bytes[costed], r.traffic_bytes(work.rows)[costed], rtol=1e-12)
    assert (by_row.dram_bytes[free] == 0.0).all()
    np.testing.assert_array_equal(estimate.dram_bytes, by_row.dram_bytes.sum(axis=1))


@given(SEEDS)
@pytest.mark.parametrize("name", NAMES)
def test_columns_cost_what_written_rows_cost(name: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    count, template = 6, random_rows(rng, 12)
    columns = []
    for row in template:
        sizes = {field: row["groups"] * rng.integers(1, 9, count).astype(np.int32) for field in ("c", "k")}
        bits = rng.choice([4, 8, 32], count).astype(np.int32)
        columns.append({**sizes, "output_bits": bits, "live_bytes": rng.uniform(0.0, 1e6, count)})
    work = ColumnWorkload(template, columns, [f"row{i}" for i in range(12)], count)
    target = load(name)
    written = fields(target.estimate(work.expand()))
    for threads in (1, 2, 6):
        np.testing.assert_array_equal(fields(target.estimate(work, threads=threads)), written)
    np.testing.assert_array_equal(target.estimate(work).rows.latency_s, target.estimate(work.expand()).rows.latency_s)


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ({"c": np.array([8, 0], np.int32)}, "c is 0"),
        ({"c": np.array([8, 12], np.int32), "groups": np.array([8, 8], np.int32)}, "groups do not divide"),
        ({"weight_bits": np.array([8, 33], np.int32)}, "weight_bits is 33"),
        ({"live_bytes": np.array([0.0, np.nan])}, "live_bytes is nan"),
        ({"c": np.array([8, 8])}, "int64"),
        ({"c": np.array([8], np.int32)}, r"shape \(1,\)"),
    ],
)
def test_unsound_columns_are_refused(column: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(TargetError, match=message):
        ColumnWorkload(conv(8, 8, 4), [column], ["conv"], 2)


@given(SEEDS)
@pytest.mark.parametrize("name", NAMES)
def test_alone_as_in_a_batch_and_on_any_number_of_threads(name: str, seed: int) -> None:
    target, work = load(name), policies(seed)
    batch = fields(target.estimate(work))
    for threads in (2, 3, 16):
        np.testing.assert_array_equal(fields(target.estimate(work, threads=threads)), batch)
    for i in range(work.policies):
        alone = target.estimate(Workload(work.rows[i], work.names))
        np.testing.assert_array_equal(fields(alone)[:, 0], batch[:, i])


def test_uncosted_rows_are_found_on_any_thread() -> None:
    rows = np.repeat(conv(8, 8, 4), 8).reshape(4, 2)
    rows["kind"][3, 1] = OpKind.UNKNOWN
    for threads in (1, 2, 4):
        assert load("pixel1").estimate(Workload(rows, "ab"), threads=threads).uncosted == ("b",)


def test_rows_without_a_model_cost_nothing_and_are_named() -> None:
    known = conv(8, 8, 4)
    estimate = load("pixel1").estimate(workload(known, make_row(OpKind.UNKNOWN, c=100, k=100), known))
    assert estimate.uncosted == ("row1",)
    assert estimate.uncosted_macs_share == 0.0
    assert estimate.rows.latency_s[0, 1] == 0.0
    assert estimate.latency_s[0] == load("pixel1").estimate(workload(known, known)).latency_s[0]


def test_the_share_of_macs_without_a_model_is_told(tmp_path: Path) -> None:
    # Arithmetic at 8 bits alone, so the float convolution has no model: 3 of 4 equal convolutions are left.
    text = BOARD.replace("peak.32", "peak.8").replace("mac_energy.32", "mac_energy.8")
    (tmp_path / "int8.toml").write_text(text)
    narrow = conv(8, 8, 4, weight_bits=8, activation_bits=8)
    estimate = load(tmp_path / "int8.toml").estimate(workload(narrow, narrow, conv(8, 8, 4), narrow))
    assert estimate.uncosted == ("row2",)
    assert estimate.uncosted_macs_share == pytest.approx(0.25)
    assert np.isfinite(fields(estimate)).all()


def test_fused_rows_are_free_where_the_runtime_fuses() -> None:
    convolution = conv(16, 32, 14, n=8)
    norm = make_row(OpKind.NORM, n=8, c=32, k=32, in_h=14, in_w=14, out_h=14, out_w=14, held=64, fused=1)
    phone, eager = (load(name).estimate(workload(convolution, norm)) for name in NAMES)
    assert phone.rows.latency_s[0, 1] == 0.0
    assert eager.rows.latency_s[0, 1] == pytest.approx(40.2e-6)
    # What is stored does not depend on the runtime: 16*32 weights and 2*32 of the norm.
    assert phone.weight_bytes[0] == eager.weight_bytes[0] == 4 * (512 + 64)


def test_energy_is_none_with_a_reason_or_there(energetic: Target) -> None:
    work = workload(make_row(OpKind.LINEAR, c=100, k=100))
    without = load("pixel1").estimate(work)
    assert without.energy_j is None
    assert without.rows.energy_j is None
    assert "no energy measurement" in without.energy_reason
    estimate = energetic.estimate(work)
    # 10^4 MACs at 2 pJ; 40800 bytes at 10 pJ; 40.8 us at 0.1 W
    assert estimate.energy_j == pytest.approx([2e-8 + 4.08e-7 + 4.08e-6], rel=1e-9)
    assert estimate.rows.energy_j == pytest.approx(estimate.energy_j.reshape(1, 1))
    assert estimate.energy_reason == ""
    assert estimate.metric("energy") is estimate.energy_j


def test_metrics_by_name() -> None:
    estimate = load("v100").estimate(workload(conv(8, 8, 4, live_bytes=512)))
    assert [*METRICS] == ["latency", "energy", "size", "macs", "memory"]
    assert [estimate.metric(name)[0] for name in ("size", "macs", "memory")] == [256, 1024, 512]
    assert estimate.metric("latency") is estimate.latency_s
    with pytest.raises(UnsupportedError, match="'v100' cannot estimate energy: no energy measurement"):
        estimate.metric("energy")
    with pytest.raises(UnknownNameError, match="Did you mean 'latency'"):
        estimate.metric("latncy")


def test_widths_beyond_calibration_are_a_caveat(energetic: Target) -> None:
    float_conv, narrow = conv(8, 8, 4), conv(8, 8, 4, weight_bits=8, activation_bits=8)
    phone = load("pixel1")
    assert phone.caveats(workload(float_conv)) == ()
    # Operators without MACs do not count.
    assert phone.caveats(workload(float_conv, make_row(OpKind.COPY, activation_bits=8))) == ()
    (caveat,) = phone.caveats(workload(float_conv, narrow, float_conv, float_conv))
    assert "25% of the operators with MACs run at 8 bits" in caveat
    assert "calibrated at 32 bits" in caveat
    # Where nothing is calibrated, the status says so already.
    assert energetic.caveats(workload(narrow)) == ()


def test_figures_that_overflow_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "slow.toml").write_text(BOARD.replace('value = 1, unit = "GMAC/s"', 'value = 1e-300, unit = "MAC/s"'))
    huge = make_row(OpKind.LINEAR, c=2**31 - 1, k=2**31 - 1, n=2**31 - 1)
    with pytest.raises(TargetError, match="'board' gives a cost that is not finite"):
        load(tmp_path / "slow.toml").estimate(workload(huge))


@pytest.mark.parametrize("threads", [0, -1])
def test_threads_below_one_are_refused(threads: int) -> None:
    with pytest.raises(TargetError, match="threads has to be at least 1"):
        load("pixel1").estimate(workload(conv(8, 8, 4)), threads=threads)


@pytest.mark.parametrize("name", NAMES)
def test_targets_survive_pickling(name: str) -> None:
    target, work = load(name), policies(1)
    copy = pickle.loads(pickle.dumps(target))
    np.testing.assert_array_equal(fields(copy.estimate(work)), fields(target.estimate(work)))
    assert copy.info == target.info


def test_preparing_a_preset_does_nothing() -> None:
    target, work = load("pixel1"), policies(2)
    before = fields(target.estimate(work))
    target.prepare(work)
    np.testing.assert_array_equal(fields(target.estimate(work)), before)


def test_the_package_lists_what_it_has() -> None:
    assert all(hasattr(fxopt.targets, name) for name in fxopt.targets.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Gpu'"):
        _ = fxopt.targets.Gpu
