"""GPUs: batch, precision and energy by hand, published times, and the script that calibrates one."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from fxopt.targets import OpKind, Target, load, make_row
from fxopt.targets.rows import Rows
from tests.targets.oracle import conv, workload

DATA = Path(os.environ.get("FXOPT_SHARED_DATA") or Path(__file__).parents[3] / "shared" / "data")
published = pytest.mark.skipif(not DATA.is_dir(), reason="the published figures are not here (FXOPT_SHARED_DATA)")

# Bounds in the presets' own words, with half a percent to spare; the last by a fit to the other networks.
STATED = {
    "v100": (0.021, 0.058, 0.066),
    "v100:eager-2020": (0.053, 0.091, None),
    "gtx1080ti": (0.015, 0.026, None),
    "titan-xp": (0.014, 0.020, 0.026),
    "jetson-tx2": (0.048, 0.098, 0.115),
}


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The fits, imported as the scripts beside them do."""
    monkeypatch.syspath_prepend("benchmarks")
    return importlib.import_module("fits.gpu")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend("benchmarks")
    return importlib.import_module("calibrate_gpu")


def latency_s(target: Target, row: Rows) -> float:
    return float(target.estimate(workload(row)).latency_s[0])


@pytest.mark.parametrize("name", ["v100", "titan-xp", "gtx1080ti", "jetson-tx2", "h200", "h200:compiled"])
def test_time_an_image_falls_with_the_batch_and_stays_once_the_device_is_full(name: str) -> None:
    target = load(name)
    batches = [1, 2, 4, 8, 16, 64, 256, 1024]
    taken = np.array([latency_s(target, conv(64, 64, 7, 3, n=n)) for n in batches])
    assert np.all(np.diff(taken) >= 0.0)
    an_image = taken / batches
    assert an_image[-1] < 0.95 * an_image[0]
    assert an_image[-1] == pytest.approx(an_image[-2], rel=0.05)


@pytest.mark.parametrize(
    ("name", "bits", "gain"),
    # Peak rates of the datasheets over those in float32: where arithmetic binds, time falls by as much.
    [("v100", 16, 8.0), ("titan-xp", 8, 4.0), ("gtx1080ti", 8, 4.0), ("jetson-tx2", 16, 2.0), ("h200", 16, 16.0)],
)
def test_precision_gains_what_the_arithmetic_does(name: str, bits: int, gain: float) -> None:
    pair = {"weight_bits": bits, "activation_bits": bits, "output_bits": bits}
    wide, narrow = conv(2048, 2048, 28, 3, n=256), conv(2048, 2048, 28, 3, n=256, **pair)
    target = load(name)
    assert (bits, bits) in target.capabilities.allowed_bits("conv")
    assert latency_s(target, wide) / latency_s(target, narrow) == pytest.approx(gain, rel=1e-9)


def test_a_wave_more_costs_as_much_as_a_full_one() -> None:
    # v100: 80 tiles of 32 x 32 fill the device once; 81 take twice as long. A sample is a tile of 32 pixels; K = 4608.
    sides = {"in_h": 4, "in_w": 8, "out_h": 4, "out_w": 8, "kernel_h": 3, "kernel_w": 3}
    rows = [make_row(OpKind.CONV, n=tiles, c=512, k=32, **sides) for tiles in (1, 79, 80, 81)]
    wave_s = 32 * 32 * 4608 / (64 * 1.53e9 * 0.914)
    taken = [latency_s(load("v100"), row) for row in rows]
    assert taken == pytest.approx([wave_s, wave_s, wave_s, 2.0 * wave_s], rel=1e-9)


def test_energy_is_there_only_where_power_was_measured() -> None:
    # One product of 16 x 4096 x 4096 on the Jetson TX2: 128 tiles in 64 waves of 32 * 32 * 4096 MACs at 128 a cycle,
    # 1.3 GHz and 62.1%: 2.597 ms; 67.6 MB at 40.3% of 59.7 GB/s take longer: 2.811 ms. At 7.66 W: 21.5 mJ.
    row = make_row(OpKind.LINEAR, n=16, c=4096, k=4096)
    moved = 4 * (16 * 4096 + 4096 * 4096 + 16 * 4096)
    seconds = moved / (0.403 * 59.7e9)
    estimate = load("jetson-tx2").estimate(workload(row))
    assert estimate.latency_s[0] == pytest.approx(seconds, rel=1e-9)
    assert estimate.energy_j is not None
    assert estimate.energy_j[0] == pytest.approx(7.66 * seconds, rel=1e-9)
    for name in ("v100", "titan-xp", "gtx1080ti", "h200"):
        assert load(name).estimate(workload(row)).energy_j is None


@published
@pytest.mark.parametrize("name", STATED)
def test_presets_meet_published_times_as_they_say(name: str, fits: ModuleType) -> None:
    mean, most, _ = STATED[name]
    cases = fits.cases_of(DATA, name)
    found = np.abs(fits.predict(fits.figures_of(name), cases) / [case.seconds for case in cases] - 1.0)
    assert found.mean() < mean
    assert found.max() < most


@published
@pytest.mark.parametrize("name", [name for name, (_, _, held) in STATED.items() if held])
def test_networks_left_out_of_the_fit_are_met_as_the_presets_say(name: str, fits: ModuleType) -> None:
    held = fits.left_out(fits.figures_of(name), fits.FREE[name], fits.cases_of(DATA, name))
    assert np.max(np.abs([*held.values()])) < STATED[name][2]


@published
@pytest.mark.parametrize("name", STATED)
def test_presets_hold_what_the_fit_finds(name: str, fits: ModuleType) -> None:
    values = fits.figures_of(name)
    found = fits.fit(values, fits.FREE[name], fits.cases_of(DATA, name))
    assert found == {key: pytest.approx(values[key], rel=0.015) for key in fits.FREE[name]}


def test_networks_are_told_apart_by_the_first_word(fits: ModuleType) -> None:
    work = workload(conv(8, 8, 4))
    assert fits.Case("net float32 at 1", work, 1.0).network == fits.Case("net bfloat16 at 64", work, 1.0).network


def test_names_of_specialized_networks_tell_batch_and_time(fits: ModuleType) -> None:
    cases = {case.name: case for case in fits.ofa_cases("tx2")}
    assert [case.seconds for case in cases.values()] == [0.035, 0.096]
    assert all((case.work.rows["n"] == 16).all() for case in cases.values())
    # Its authors give no size for the network of the V100, so that its time is not compared.
    assert fits.ofa_cases("v100") == []


def test_turns_go_forth_and_back(script: ModuleType) -> None:
    assert list(script.turns(3, 3)) == [0, 1, 2, 2, 1, 0, 0, 1, 2]
    calls: list[tuple[str, int]] = []

    def timer(name: str, seconds: float) -> float:
        def timed(runs: int) -> float:
            calls.append((name, runs))
            return seconds

        return timed  # type: ignore[return-value]

    samples = script.interleaved([timer("a", 0.001), timer("b", 0.1)], 2)
    assert samples == [[0.001, 0.001], [0.1, 0.1]]
    # A try of three runs each, then as many as fill a turn of 20 ms, three at least.
    assert calls == [("a", 3), ("b", 3), ("a", 20), ("b", 3), ("b", 3), ("a", 20)]


def test_a_measurement_is_the_median_of_its_turns(script: ModuleType) -> None:
    setting = script.Setting("resnet18", "float32", 64)
    found = script.summarized(setting, [3.0, 1.0, 2.0, 100.0, 2.0])
    assert found["seconds"] == 2.0
    assert found["quartiles"][0] <= 2.0 <= found["quartiles"][1]
    assert (found["network"], found["precision"], found["batch"], found["turns"]) == ("resnet18", "float32", 64, 5)
    assert script.summarized(setting, [4.0])["seconds"] == 4.0


def test_there_are_enough_networks_in_both_precisions_and_batches(script: ModuleType) -> None:
    settings = script.settings(script.CHOSEN)
    assert len(script.CHOSEN) >= 12
    assert len(set(settings)) == 4 * len(script.CHOSEN)
    assert {(setting.precision, setting.batch) for setting in settings} == {
        ("float32", 1),
        ("float32", 64),
        ("bfloat16", 1),
        ("bfloat16", 64),
    }
    assert all(f"pytorchcv:{name}" in script.NETWORKS for name in script.CHOSEN)


def made_up(script: ModuleType, values: Mapping[str, float], size: int) -> list[object]:
    """Networks of three layers each, with the time that the model itself gives them."""
    cases = []
    for setting in script.settings([f"net{i}" for i in range(size)]):
        width = 32 + 24 * int(setting.network[3:])
        bits = script.BITS[setting.precision]
        rows = [
            conv(width, width, 56, 3, n=setting.batch),
            conv(width, width, 56, 7, n=setting.batch, groups=width),
            make_row(
                OpKind.ELEMENTWISE, n=setting.batch, c=8 * width, k=8 * width, in_h=56, in_w=56, out_h=56, out_w=56
            ),
        ]
        work = script.in_bits(workload(*rows), bits)
        cases.append(script.Case(setting.name, work, 1.0))
    seconds = script.predict(values, cases)
    return [script.Case(case.name, case.work, float(each)) for case, each in zip(cases, seconds, strict=True)]


def test_calibration_finds_the_figures_that_made_the_times(script: ModuleType, fits: ModuleType) -> None:
    values = fits.figures_of("h200")
    true = {**values, "launch_floor": 9e-6, "dense_efficiency": 0.55, "depthwise_efficiency": 0.03}
    true["bandwidth_efficiency"] = 0.8
    found = script.calibrated(values, made_up(script, true, 3))
    assert found["figures"] == {key: pytest.approx(true[key], rel=0.01) for key in script.FREE}
    assert set(found["fitted"]) == {"all", "float32 at 1", "float32 at 64", "bfloat16 at 1", "bfloat16 at 64"}
    assert found["fitted"]["all"]["max"] < 0.01
    assert found["left_out"]["all"]["max"] < 0.05
    assert len(found["errors"]) == 12


def test_figures_are_written_as_presets_read_them(script: ModuleType) -> None:
    lines = script.preset_lines({"launch_floor": 8.76e-6, "dense_efficiency": 0.6123})
    assert lines == [
        'launch_floor = { value = 8.76, unit = "us", source = "measured" }',
        'dense_efficiency = { value = 0.612, unit = "1", source = "measured" }',
    ]


def test_without_a_device_the_script_says_so(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["calibrate_gpu.py"])
    with pytest.raises(SystemExit, match="No CUDA device here"):
        script.main()
