"""Boards' files: what a measured machine writes is a target like any preset, on any other machine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tomllib
from hypothesis import given
from hypothesis import strategies as st

from fxopt.errors import TargetError
from fxopt.targets import HostTarget, OpKind, PresetTarget, Workload, describe, load, make_row
from fxopt.targets import rows as r
from fxopt.targets._fit import coefficients, held_out_errors
from fxopt.targets._sweep import calibration_sweep, pace_row
from fxopt.targets.models.measured import COEFFICIENTS, GROUP_NAMES, Model, group_names, terms_of
from fxopt.targets.parameters import ParameterError
from fxopt.targets.rows import Floats, Rows
from tests.targets.oracle import conv, random_rows, workload

SWEEP = calibration_sweep()


def seconds_of(rows: Rows) -> Floats:
    """An imaginary machine of which the model's form is the truth."""
    per_mac = np.where(r.compute_bits(rows) <= 8, 2e-11, 6e-11)
    moved = r.in_elements(rows) + r.out_elements(rows)
    return np.asarray(4e-6 + r.macs(rows) * per_mac + moved * 2e-10)


def profiler(rows: Rows) -> Floats:
    return seconds_of(rows)


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HostTarget:
    monkeypatch.setattr("os.fsync", lambda _: None)
    made = HostTarget(profiler, 'A "board", 4 cores', folder=tmp_path / "cache")
    made.calibrate()
    return made


@pytest.fixture
def board(host: HostTarget, tmp_path: Path) -> Path:
    return host.save(tmp_path / "my_board.toml")


def linear(rows: Rows, values: dict[str, float]) -> Floats:
    """Latency by the formula in fxopt/targets/models/measured.pyx, a row at a time; NaN where there is no model."""
    found = np.full(len(rows), np.nan)
    for i in range(len(rows)):
        row, name = rows[i : i + 1], group_names(rows[i : i + 1])[0]
        windowed = row["kind"][0] in (OpKind.CONV, OpKind.DEPTHWISE, OpKind.POOL)
        size = [int(row[f"{what}_{axis}"][0]) for what in ("out", "kernel") for axis in "dhw"]
        places = float(np.prod(size, dtype=float)) * int(row["n"][0]) if windowed else 0.0
        amounts = {
            "mac": r.macs(row)[0],
            "patch": places * int(row["c"][0]),
            "tap": places * (int(row["groups"][0]) if row["kind"][0] == OpKind.CONV else 1),
            "rest": places * (int(row["c"][0]) % 16) * (row["kind"][0] != OpKind.POOL),
            "weight": r.weights(row)[0],
            "in": r.in_elements(row)[0],
            "out": r.out_elements(row)[0],
            "const": 1.0,
        }
        for bits in ("int8", "float") if name and name[0] == "int8" else ("float",):
            prefix = f"{bits}.{name[1] if name else ''}."
            terms = [values[prefix + key] * amount for key, amount in amounts.items() if prefix + key in values]
            if terms:
                found[i] = sum(terms)
                break
    return found


@given(st.integers(0, 2**32 - 1))
def test_the_model_equals_its_oracle(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = random_rows(rng, 60)
    values = {
        f"{bits}.{group}.{name}": float(rng.uniform(1e-12, 1e-9))
        for bits in ("int8", "float")
        for group in GROUP_NAMES
        if rng.random() < 0.7
        for name in (*COEFFICIENTS, "const")
        if rng.random() < 0.7
    }
    latency = np.empty((1, len(rows)))
    Model(values, False).per_row(rows.reshape(1, -1), latency, np.empty_like(latency), np.empty_like(latency))
    np.testing.assert_allclose(latency[0], np.nan_to_num(linear(rows, values)), rtol=1e-12)
    assert terms_of(rows).shape == (60, len(COEFFICIENTS) + 1)


def test_what_fuses_is_free_but_for_curves() -> None:
    values = {f"float.{group}.const": 1e-6 for group in GROUP_NAMES}
    fused = make_row(OpKind.ELEMENTWISE, fused=1)
    rows = np.concatenate([fused, fused, fused, make_row(OpKind.ELEMENTWISE), make_row(OpKind.ELEMENTWISE)])
    rows["activation"] = [1, 2, 0, 1, 1]
    rows["activation_bits"][4] = 8
    latency, traffic = np.empty((1, 5)), np.empty((1, 5))
    Model(values, True).per_row(rows.reshape(1, -1), latency, np.empty_like(latency), traffic)
    np.testing.assert_array_equal(latency[0] > 0.0, [False, True, False, True, False])
    np.testing.assert_array_equal(traffic[0] > 0.0, latency[0] > 0.0)
    Model(values, False).per_row(rows.reshape(1, -1), latency, np.empty_like(latency), traffic)
    assert (latency > 0.0).all()


@pytest.mark.parametrize("values", [{}, {"float.pool.in": 0.0}])
def test_a_model_without_costs_is_refused(values: dict[str, float]) -> None:
    with pytest.raises(ParameterError, match=r"holds no coefficient|would cost nothing"):
        Model(values, True)


def test_disturbed_times_bend_the_fit_little() -> None:
    rows = SWEEP[SWEEP["kind"] == OpKind.LINEAR]
    seconds = seconds_of(rows)
    disturbed = seconds.copy()
    disturbed[::6] *= 4.0
    predicted = linear(rows, coefficients(rows, disturbed))
    assert np.median(np.abs(predicted / seconds - 1.0)) < 0.02


def test_the_held_out_error_is_of_the_model_in_the_file() -> None:
    assert np.quantile(held_out_errors(SWEEP, seconds_of(SWEEP), by_family=False), 0.9) < 0.05
    noise = np.random.default_rng(0).lognormal(0.0, 1.5, len(SWEEP))
    assert np.median(held_out_errors(SWEEP, seconds_of(SWEEP) * noise, by_family=False)) > 0.3


def test_a_file_is_a_target(board: Path) -> None:
    target = load(board)
    assert isinstance(target, PresetTarget)
    assert (target.name, target.status, target.title) == ("my_board", "measured", 'A "board", 4 cores')
    assert f"Of {len(SWEEP)} operators measured, half predict the other half" in target.error
    assert target.info.calibrated_bits == (8, 32)
    assert "energy was not" in target.info.energy_reason
    data = tomllib.loads(board.read_text())
    leaves = [leaf for bits in data["parameters"].values() for group in bits.values() for leaf in group.values()]
    assert len(leaves) > 40
    assert all(set(leaf) == {"value", "unit", "source"} for leaf in leaves)
    assert "measured one by one on 2" in describe(target)


def test_it_predicts_what_was_never_measured(board: Path) -> None:
    network = workload(
        conv(24, 80, 30, 3),
        conv(80, 80, 30, 5, groups=80),
        conv(80, 144, 30, weight_bits=8, activation_bits=8, output_bits=8),
        make_row(OpKind.LINEAR, c=300, k=77),
        make_row(OpKind.UNKNOWN),
    )
    estimate = load(board).estimate(network)
    np.testing.assert_allclose(estimate.rows.latency_s[0, :4], seconds_of(network.rows[0, :4]), rtol=0.05)
    assert estimate.uncosted == ("row4",)
    # Nothing is left to prepare.
    load(board).prepare(network)


def test_the_host_and_its_file_differ_by_families_alone(host: HostTarget, board: Path) -> None:
    rows = SWEEP[SWEEP["activation_bits"] == 32]
    whole = Workload(rows, [str(index) for index in range(len(rows))])
    np.testing.assert_allclose(load(board).estimate(whole).latency_s, host.estimate(whole).latency_s, rtol=0.02)


def test_half_a_sweep_is_enough(tmp_path: Path) -> None:
    quick = HostTarget(profiler, "board", folder=tmp_path)
    quick.calibrate(quick=True)
    target = load(quick.save(tmp_path / "quick.toml"))
    assert len(SWEEP[::2]) <= int(target.error.split()[1]) <= len(SWEEP[::2]) + 1
    layer = workload(conv(64, 64, 28))
    assert target.estimate(layer).latency_s[0] == pytest.approx(seconds_of(layer.rows[0])[0], rel=0.1)


def test_a_machine_without_integers_gets_a_file_for_floats(tmp_path: Path) -> None:
    only = HostTarget(
        lambda rows: np.where(r.compute_bits(rows) <= 8, np.nan, seconds_of(rows)), "board", folder=tmp_path
    )
    only.calibrate()
    target = load(only.save(tmp_path / "floats.toml"))
    assert target.capabilities.allowed_bits("conv") == ((32, 32),)


@pytest.mark.parametrize(
    ("path", "name", "reason"),
    [
        ("board.json", None, "has to end in .toml"),
        ("two words.toml", None, "cannot name a target"),
        ("fine.toml", "a:b", "cannot name a target"),
        ("pixel1.toml", None, "comes with fxopt"),
        ("fine.toml", "host", "comes with fxopt"),
    ],
)
def test_what_cannot_be_written_says_why(
    path: str, name: str | None, reason: str, host: HostTarget, tmp_path: Path
) -> None:
    with pytest.raises(TargetError, match=reason):
        host.save(tmp_path / path, name)
    assert not (tmp_path / path).exists()


def test_nothing_measured_is_nothing_to_write(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="No operator in float"):
        HostTarget(profiler, "board", folder=tmp_path).save(tmp_path / "none.toml")
    with pytest.raises(TargetError, match="nothing measured"):
        HostTarget().save(tmp_path / "none.toml")


def test_the_pace_is_known_once_measured(host: HostTarget, tmp_path: Path) -> None:
    assert host.pace_s == pytest.approx(seconds_of(pace_row())[0])
    with pytest.raises(TargetError, match="calibrate it first"):
        _ = HostTarget(profiler, "other", folder=tmp_path).pace_s


@pytest.mark.parametrize(
    ("found", "put", "reason"),
    [
        ('unit = "ns/item", source', 'unit = "GB/s", source', "unit 'GB/s' is none of time per item"),
        ("mac = { value = 0", "mac = { value = -0", "has to be at least 0"),
        ("[parameters.float.dense]", "[parameters.float.dance]", "no figure of this family"),
        ('status = "measured"', 'status = "guessed"', "none of calibrated, uncalibrated, measured"),
        ('family = "measured"\n', "", "family: is missing"),
        (', source = "fit"', "", "is missing"),
    ],
)
def test_a_wrong_file_is_refused_with_the_line(found: str, put: str, reason: str, board: Path) -> None:
    text = board.read_text()
    assert found in text
    board.write_text(text.replace(found, put, 1))
    with pytest.raises(TargetError, match=rf"my_board\.toml, line \d+: .*{reason}"):
        load(board)
