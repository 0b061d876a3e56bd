"""Neural processors of phones: the model against its oracle and figures by hand, presets, published times."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from benchmarks.fits import npu as fits
from fxopt.errors import TargetError
from fxopt.targets import Activation, ColumnWorkload, OpKind, PresetTarget, Workload, describe, load, make_row
from fxopt.targets._core import CostModel
from fxopt.targets._presets import FOLDER
from fxopt.targets.models.npu import Model
from fxopt.targets.parameters import ParameterError
from fxopt.targets.rows import Floats, Rows, in_elements, out_elements
from tests.targets import oracle_npu
from tests.targets.oracle import conv, random_rows, workload

DATA = Path(os.environ.get("FXOPT_SHARED_DATA") or Path(__file__).parents[3] / "shared" / "data")
published = pytest.mark.skipif(
    not (DATA / fits.FILE).is_file(), reason="the published figures are not here (FXOPT_SHARED_DATA)"
)
PRESETS = tuple(fits.DEVICES)
SEEDS = st.integers(0, 2**32 - 1)
BITS = {"float": (32, 32), "w8a16": (8, 16), "w8a8": (8, 8)}


def costs(model: CostModel, rows: Rows) -> Floats:
    """Latency of each row; 0 where there is no model."""
    latency = np.empty((1, len(rows)))
    model.per_row(rows.reshape(1, -1), latency, np.empty_like(latency), np.empty_like(latency))
    return latency[0]


def varied(seed: int, count: int = 150) -> Rows:
    """Random rows, among them dilated ones, stems and lines of pixels."""
    rng = np.random.default_rng(seed)
    rows = random_rows(rng, count)
    windows = np.isin(rows["kind"], [OpKind.CONV, OpKind.DEPTHWISE])
    rows["dilation"] = np.where(windows, rng.integers(1, 3, count), 1)
    flat = rng.random(count) < 0.3
    for side in ("in", "out"):
        rows[f"{side}_d"] = np.where(flat, 1, rows[f"{side}_d"])
        rows[f"{side}_h"] = np.where(flat & windows & (rng.random(count) < 0.3), 1, rows[f"{side}_h"])
    stems = (rows["kind"] == OpKind.CONV) & (rows["groups"] == 1) & (rng.random(count) < 0.3)
    rows["c"] = np.where(stems, 3, rows["c"])
    return rows


@settings(max_examples=25)
@given(SEEDS, st.booleans(), st.sampled_from(["all", "w8a8", "w8a16", "w8a"]))
def test_the_model_equals_its_oracle(seed: int, merges: bool, without: str) -> None:
    rows = varied(seed)
    values = {key: value for key, value in oracle_npu.VALUES.items() if not key.startswith(without)}
    expected = np.nan_to_num(oracle_npu.latency(rows, values, merges=merges))
    np.testing.assert_allclose(costs(Model(values, merges), rows), expected, rtol=1e-9)


# Microseconds on galaxy-s25, from the figures in its preset; us/M times millions.
S25 = {
    # 64 -> 64 and 100 -> 128 channels, 14 -> 16 pixels a side: 2.097152 M padded MACs; 64*196 + 100*196 = 0.032144 M
    # elements; 0.0064 M weights
    "pointwise": (conv(64, 100, 14), 0.06687 * 2.097152 + 13.83 * 0.032144 + 5.435 * 0.0064),
    # twice as far apart: three times the MACs' time. 64*64*9*256 = 9.437184 M, 0.025088 M elements, 0.036864 M weights
    "dilated": (
        conv(64, 64, 14, 3, dilation=2),
        3 * 0.06687 * 9.437184 + 13.83 * 0.025088 + 5.435 * 0.036864,
    ),
    # 3 -> 32 and 32 channels, 112: 32*32*9*12544 = 115.605504 M; 3*224*224 + 32*112*112 = 0.551936 M; 0.000864 M
    "stem": (
        conv(3, 32, 112, 3, 2),
        0.06687 * 115.605504 + (13.83 + 167.3) * 0.551936 + 5.435 * 0.000864,
    ),
    # 64*9*784 = 0.451584 M MACs as they are; 0.100352 M elements; 0.000576 M weights
    "depthwise": (
        conv(64, 64, 28, 3, groups=64),
        0.2006 * 0.451584 + 13.83 * 0.100352 + 5.435 * 0.000576,
    ),
    # 64*32*9*784 = 14.450688 M MACs in two groups, three times a dense one each; 0.018432 M weights
    "grouped": (
        conv(64, 64, 28, 3, groups=2),
        3 * 0.06687 * 14.450688 + 13.83 * 0.100352 + 5.435 * 0.018432,
    ),
    # 197 -> 200 rows, 768 x 3072: 471.8592 M; 197*3840 = 0.75648 M elements; 2.359296 M weights
    "linear": (
        make_row(OpKind.LINEAR, c=768, k=3072, in_h=197, out_h=197),
        0.06687 * 471.8592 + 13.83 * 0.75648 + 5.435 * 2.359296,
    ),
    # the same layer with its rows as samples: they are padded together
    "linear, samples": (
        make_row(OpKind.LINEAR, n=197, c=768, k=3072),
        0.06687 * 471.8592 + 13.83 * 0.75648 + 5.435 * 2.359296,
    ),
    # 12 heads: 12*(197*64 + 64*197 + 197*197) = 0.768300 M
    "attention": (make_row(OpKind.MATMUL, n=12, c=64, k=197, in_h=197, out_h=197), 21.5 + 13.83 * 0.7683),
    "transpose": (make_row(OpKind.COPY, c=1000, k=1000, in_h=100, out_h=100, transposed=1), 48.13 * 0.2),
    "concatenation": (make_row(OpKind.COPY, c=1000, k=1000, in_h=100, out_h=100), 0.0),
    "interpolation": (make_row(OpKind.RESIZE, c=100, k=100, in_h=100, out_h=400), (13.83 + 230) * 0.05),
    "addition": (make_row(OpKind.ELEMENTWISE, inputs=2, c=1000, k=1000, in_h=100, out_h=100), 13.83 * 0.3),
    # merged, wherever it stands; not so a SiLU, whatever it follows
    "ReLU": (make_row(OpKind.ELEMENTWISE, c=1000, k=1000, activation=Activation.CLAMP), 0.0),
    "SiLU": (
        make_row(OpKind.ELEMENTWISE, c=1000, k=1000, in_h=100, out_h=100, activation=Activation.CURVE, fused=1),
        13.83 * 0.2,
    ),
    "merged norm": (make_row(OpKind.NORM, c=1000, k=1000, fused=1), 0.0),
    # 0.6479 of float, and 1.287 us
    "pointwise, w8a16": (
        conv(64, 100, 14, weight_bits=8, activation_bits=16),
        0.6479 * (0.06687 * 2.097152 + 13.83 * 0.032144 + 5.435 * 0.0064) + 1.287,
    ),
    "pointwise, w8a8": (conv(64, 100, 14, weight_bits=8, activation_bits=8), 0.03027 * 2.097152 + 1.917),
    # narrower than 8 bits is no faster; 16-bit weights are float
    "pointwise, w4a4": (conv(64, 100, 14, weight_bits=4, activation_bits=4), 0.03027 * 2.097152 + 1.917),
    "pointwise, w16a16": (
        conv(64, 100, 14, weight_bits=16, activation_bits=16),
        0.06687 * 2.097152 + 13.83 * 0.032144 + 5.435 * 0.0064,
    ),
    "addition, a8": (
        make_row(OpKind.ELEMENTWISE, inputs=2, c=1000, k=1000, in_h=100, out_h=100, activation_bits=8),
        8.064 * 0.3 + 1.917,
    ),
    # 64 channels, 3*3*3 taps, 4 planes of 16 x 16: 64*64*27*1024 = 113.246208 M
    "3-D": (
        conv(64, 64, 14, 3, kernel_d=3, in_d=4, out_d=4),
        0.09371 * 113.246208 + 13.83 * 0.100352 + 5.435 * 0.110592,
    ),
}


@pytest.mark.parametrize("case", S25)
def test_golden_operators_of_the_galaxy_s25(case: str) -> None:
    row, microseconds = S25[case]
    assert costs(load("galaxy-s25").model, row)[0] * 1e6 == pytest.approx(microseconds, rel=1e-9)


def test_a_run_takes_its_own_time_once() -> None:
    target, row = load("galaxy-s25"), conv(64, 100, 14)
    by_row = costs(target.model, row)[0]
    assert target.model.fixed_s == pytest.approx(47.96e-6)
    one, three = target.estimate(workload(row)), target.estimate(workload(row, row, row))
    assert one.latency_s[0] == pytest.approx(47.96e-6 + by_row, rel=1e-12)
    assert three.latency_s[0] == pytest.approx(47.96e-6 + 3 * by_row, rel=1e-12)
    assert one.rows.latency_s.tolist() == [[by_row]]


def test_columns_and_threads_count_the_time_of_a_run_once() -> None:
    template = varied(5, 12)
    template["kind"] = OpKind.ELEMENTWISE
    widths = np.arange(1, 8, dtype=np.int32)
    columns = [{"c": widths, "k": widths * 3} for _ in template]
    template["groups"] = 1
    work = ColumnWorkload(template, columns, [f"row{i}" for i in range(12)], len(widths))
    target = load("snapdragon-x-elite")
    written = target.estimate(work.expand())
    np.testing.assert_allclose(written.latency_s - written.rows.latency_s.sum(axis=1), target.model.fixed_s, rtol=1e-9)
    for threads in (1, 3):
        np.testing.assert_array_equal(target.estimate(work, threads=threads).latency_s, written.latency_s)


def test_what_is_merged_or_joined_moves_nothing() -> None:
    curve = make_row(OpKind.ELEMENTWISE, c=10, k=10, activation=Activation.CURVE, fused=1)
    clamp = make_row(OpKind.ELEMENTWISE, c=10, k=10, activation=Activation.CLAMP, fused=1)
    joined = make_row(OpKind.COPY, c=10, k=10)
    assert load("galaxy-s25").estimate(workload(curve, clamp, joined)).rows.dram_bytes.tolist() == [[80.0, 0.0, 0.0]]


@settings(max_examples=25)
@given(SEEDS, st.sampled_from(["c", "k"]), st.sampled_from(PRESETS))
def test_cost_never_falls_as_channels_grow(seed: int, what: str, name: str) -> None:
    rows = varied(seed)
    # A stem is taken to be one of images: a fourth channel makes it an ordinary convolution.
    rows = rows[rows["c"] != 3]
    more = rows.copy()
    more[what] += rows["groups"]
    model = load(name).model
    assert np.all(costs(model, more) >= costs(model, rows) * (1.0 - 1e-12))


@pytest.mark.parametrize("name", PRESETS)
def test_depthwise_cost_never_falls_as_it_widens(name: str) -> None:
    for weight_bits, activation_bits in BITS.values():
        bits = {"weight_bits": weight_bits, "activation_bits": activation_bits}
        rows = np.concatenate([conv(c, c, 28, 3, groups=c, **bits) for c in range(4, 200)])
        assert np.all(np.diff(costs(load(name).model, rows)) >= 0.0)


@pytest.mark.parametrize("name", PRESETS)
def test_dense_work_is_cheaper_in_fewer_bits(name: str) -> None:
    # Launching an operator is not, so this holds for layers of some size.
    model = load(name).model
    layer = {
        precision: costs(model, conv(256, 256, 56, 3, weight_bits=bits[0], activation_bits=bits[1]))[0]
        for precision, bits in BITS.items()
    }
    assert layer["w8a8"] < layer["w8a16"] < layer["float"]


@settings(max_examples=10)
@given(SEEDS)
def test_densities_do_not_matter(seed: int) -> None:
    rows = varied(seed)
    dense = rows.copy()
    dense["weight_density"] = dense["activation_density"] = 1.0
    model = load("galaxy-s25").model
    np.testing.assert_array_equal(costs(model, rows), costs(model, dense))


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"float.dense": 0.0}, "float"),
        ({"float.element": None}, "float"),
        ({"float.depthwise": 1e-14}, "float.depthwise"),
        ({"w8a8.volume": 1e-14}, "w8a8.volume"),
    ],
)
def test_figures_that_do_not_fit_together_are_refused(change: dict[str, float | None], key: str) -> None:
    merged = {**oracle_npu.VALUES, **change}
    with pytest.raises(ParameterError) as caught:
        Model({name: value for name, value in merged.items() if value is not None}, True)
    assert caught.value.key == key


@pytest.mark.parametrize("name", PRESETS)
def test_presets_say_what_they_are_good_for(name: str) -> None:
    target = load(name)
    assert isinstance(target, PresetTarget)
    assert (target.name, target.status, target.info.family) == (name, "calibrated", "npu")
    assert target.capabilities.allowed_bits("conv") == ((32, 32), (8, 16), (8, 8))
    assert (target.capabilities.channel_tile, target.capabilities.batch) == (32, 1)
    assert {figure.source for figure in target.preset.figures.values()} == set(target.info.sources)
    # At 8 bits all of them only rank networks, and say so wherever a user may look.
    assert 8 in target.info.ranks_only_bits
    assert "In w8a8 it only ranks networks" in target.error
    assert re.search(r"calibrated at 32(, 16)? bits, ranks only at (16, )?8\.", describe(target))
    assert target.caveats(workload(conv(8, 8, 4))) == ()
    (caveat,) = target.caveats(workload(conv(8, 8, 4), conv(8, 8, 4, weight_bits=8, activation_bits=8)))
    assert f"50% of the operators with MACs run at 8 bits, at which {name} only ranks networks" in caveat


def test_16_bits_are_calibrated_where_there_are_enough_networks() -> None:
    found = {name for name in PRESETS if 16 in load(name).info.calibrated_bits}
    assert found == {"galaxy-s24", "galaxy-s25", "galaxy-s26"}
    assert all(16 in load(name).info.ranks_only_bits for name in set(PRESETS) - found)


def test_ranked_and_uncalibrated_widths_are_told_apart(tmp_path: Path) -> None:
    text = (FOLDER / "galaxy-s25.toml").read_text(encoding="utf-8")
    rows = workload(conv(8, 8, 4), conv(8, 8, 4, weight_bits=8, activation_bits=8), conv(8, 8, 4, weight_bits=16))
    path = tmp_path / "one.toml"
    path.write_text(text.replace("bits = [32, 16]", "bits = [16]"))
    foreign, ranked = load(path).caveats(rows)
    assert "67% of the operators with MACs run at 32 bits, for which galaxy-s25 is uncalibrated" in foreign
    assert "33% of the operators with MACs run at 8 bits, at which galaxy-s25 only ranks networks" in ranked
    for wrong, reason in (("[8, 32]", "has to be apart from bits"), ("[64]", "has to list widths from 1 to 32")):
        path.write_text(text.replace("ranks_only_bits = [8]", f"ranks_only_bits = {wrong}"))
        with pytest.raises(TargetError, match=rf"line 10: calibration.ranks_only_bits: {reason}"):
            load(path)


@pytest.fixture(scope="module")
def timings() -> fits.Timings:
    return fits.read(DATA)


@pytest.fixture(scope="module")
def held_out(timings: fits.Timings) -> dict[tuple[str, str], tuple[Floats, Floats]]:
    return fits.left_out(timings, lambda network: network.name)


@published
@pytest.mark.parametrize("name", PRESETS)
def test_presets_hold_what_the_fit_finds(name: str, timings: fits.Timings) -> None:
    target = load(name)
    assert isinstance(target, PresetTarget)
    found = fits.to_si(fits.fit(timings)[name])
    held = {key: figure.si for key, figure in target.preset.figures.items()}
    assert held == pytest.approx(found, rel=1e-3, abs=1e-18)


@published
@pytest.mark.parametrize("name", PRESETS)
def test_errors_are_as_the_preset_says(name: str, held_out: dict[tuple[str, str], tuple[Floats, Floats]]) -> None:
    error = load(name).error
    for precision in fits.PRECISIONS:
        predicted, measured = held_out[name, precision]
        said = re.search(rf"{precision} ([\d.]+)% \(at most (\d+)%, rank correlation ([\d.]+)\)", error)
        assert said is not None
        off = np.abs(predicted / measured - 1.0)
        ranks = spearmanr(predicted, measured).statistic
        found = (100.0 * off.mean(), 100.0 * off.max(), ranks)
        assert [float(text) for text in said.groups()] == pytest.approx(found, abs=0.51, rel=0.01)
        if precision == "float":
            assert off.mean() <= 0.20
            assert ranks >= 0.97
        if precision == "w8a16" and 16 in load(name).info.calibrated_bits:
            assert off.mean() <= 0.20


@published
@pytest.mark.parametrize("precision", fits.PRECISIONS)
def test_the_model_adds_up_to_what_was_fitted(precision: str, timings: fits.Timings) -> None:
    # One row for each term stands for a whole network: counts in the fit's features and in rows have one meaning.
    network = timings.networks["mobilenet_v2"]
    values = fits.fit(timings)["galaxy-s25"]
    model = Model(fits.to_si(values), True)
    weight_bits, activation_bits = BITS[precision]
    bits = {"weight_bits": weight_bits, "activation_bits": activation_bits}
    rows = np.concatenate(
        [conv(320, 1280, 8, **bits), conv(96, 96, 56, 3, groups=96, **bits), make_row(OpKind.COPY, **bits)]
    )
    padded = 320 * 1280 * 64e-6
    depthwise, elements = 96 * 9 * 3136e-6, float((in_elements(rows) + out_elements(rows))[:2].sum()) * 1e-6
    in_float = np.array([padded + 3.0 * depthwise, 0.0, elements, 0.0, 0.0, 0.0, (320 * 1280 + 96 * 9) * 1e-6, 0.0])
    in_w8a8 = np.array([padded + depthwise, depthwise, 0.0, 0.0, 0.0, 3.0])
    made = fits.Network(network.name, network.family, in_float, in_w8a8, 3.0)
    totals = np.empty((5, 1))
    model.totals(Workload(rows, ["conv", "depthwise", "cat"]).rows, *totals, np.zeros(3, np.uint8))
    assert totals[0, 0] * 1e3 == pytest.approx(fits.predict(values, made, precision), rel=1e-12)
