"""Modes of a target: what they change, how they are named, and what is refused."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fxopt.errors import TargetError, UnknownNameError
from fxopt.targets import OpKind, PresetTarget, Target, describe, load, make_row, names
from fxopt.targets._presets import FOLDER, modes_of
from tests.targets.oracle import conv, workload

V100 = (FOLDER / "v100.toml").read_text(encoding="utf-8")
MODES = [name for name in names() if ":" in name]
SIDES = {"in_h": 14, "in_w": 14, "out_h": 14, "out_w": 14}


def preset(target: Target) -> PresetTarget:
    assert isinstance(target, PresetTarget)
    return target


def line_of(text: str, part: str) -> int:
    return next(number for number, line in enumerate(text.splitlines(), 1) if part in line)


def test_modes_are_listed_and_load_by_name_or_argument() -> None:
    assert {"v100:compiled", "h200:compiled", "jetson-tx2:compiled"} <= set(MODES)
    by_name, by_argument = load("v100:compiled"), load("v100", mode="compiled")
    assert by_name.name == by_argument.name == "v100:compiled"
    assert preset(by_name).preset == preset(by_argument).preset
    assert copy.copy(by_name).name == "v100:compiled"


@pytest.mark.parametrize("name", MODES)
def test_a_mode_says_for_itself_what_it_is_and_how_far_to_trust_it(name: str) -> None:
    base, mode = load(name.partition(":")[0]), preset(load(name))
    assert mode.name == name
    assert mode.title != base.title
    assert mode.error != base.error
    assert "%" in mode.error or mode.status == "uncalibrated"
    assert {figure.source for figure in mode.preset.figures.values()} <= set(mode.info.sources)


def test_a_mode_changes_what_it_names_and_nothing_else() -> None:
    base, mode = preset(load("v100")), preset(load("v100:compiled"))
    changed = {key for key in base.preset.figures if base.preset.figures[key] != mode.preset.figures[key]}
    assert changed == {"launch_floor"}
    assert base.preset.figures.keys() == mode.preset.figures.keys()
    assert (base.info.fuses, mode.info.fuses) == (False, True)
    assert base.capabilities == mode.capabilities
    assert load("v100:eager-2020").capabilities.batch == 64
    assert load("v100:eager-2020").capabilities.bits == base.capabilities.bits


def test_bitfusion_at_a_larger_batch_is_the_same_accelerator() -> None:
    base, mode = preset(load("bitfusion")), preset(load("bitfusion:batch-16"))
    assert base.preset.figures == mode.preset.figures
    assert mode.capabilities == replace(base.capabilities, batch=16)


def test_a_compiled_network_has_fewer_and_shorter_launches() -> None:
    norm = make_row(OpKind.NORM, n=8, c=32, k=32, held=64, fused=1, **SIDES)
    work = workload(conv(16, 32, 14, n=8), norm)
    eager, compiled = load("v100").estimate(work), load("v100:compiled").estimate(work)
    # Two launches of 40.2 us; one of 3, above which is 1.2 us of arithmetic.
    np.testing.assert_allclose(eager.rows.latency_s[0], [40.2e-6, 40.2e-6])
    np.testing.assert_allclose(compiled.rows.latency_s[0], [3e-6, 0.0])


def test_descriptions_name_the_modes() -> None:
    listed = "modes: v100, v100:eager-2020, v100:compiled"
    assert listed in describe("v100")
    assert listed in describe("v100:compiled")
    assert "v100:compiled: NVIDIA V100 (SXM2), compiled" in describe("v100:compiled")
    assert "launch_floor = 3 us [captured]" in describe("v100:compiled")
    assert "modes:" not in describe("pixel1")


@pytest.mark.parametrize(
    ("target", "mode", "message"),
    [
        ("v100:compile", "", "Unknown mode of v100: 'compile'. Did you mean 'compiled'. Known: compiled, eager-2020"),
        ("v100", "compile", "Unknown mode of v100: 'compile'. Did you mean 'compiled'. Known: compiled, eager-2020"),
        ("v10:compiled", "", "Unknown target 'v10:compiled'. Did you mean 'v100:compiled'."),
        ("pixel1:compiled", "", "Unknown mode of pixel1: 'compiled'. Known: none"),
        ("v100:compiled", "compiled", "Unknown target 'v100:compiled:compiled'. Did you mean 'v100:compiled'."),
    ],
)
def test_unknown_modes_suggest_the_nearest(target: str, mode: str, message: str) -> None:
    with pytest.raises(UnknownNameError, match=message):
        load(target, mode=mode)


def test_only_files_have_modes() -> None:
    with pytest.raises(TargetError, match="'host' has no modes"):
        load("host", mode="compiled")
    with pytest.raises(TargetError, match=r"<target pixel1: .*> has no modes"):
        load(load("pixel1"), mode="compiled")


def test_a_file_of_ones_own_has_modes(tmp_path: Path) -> None:
    path = tmp_path / "gpu.toml"
    path.write_text(V100.replace('name = "v100"', 'name = "mine"'))
    assert modes_of(path) == ("eager-2020", "compiled")
    assert load(path).name == "mine"
    assert load(path, mode="compiled").name == load(f"{path}:compiled").name == "mine:compiled"


# What is changed in v100.toml, into what, the line (by a part of it, after the change), and what the error says.
WRONG = {
    "unknown section": (
        'title = "NVIDIA V100 (SXM2), compiled',
        'familiar = "gpu"\ntitle = "NVIDIA V100 (SXM2), compiled',
        "familiar",
        "modes.compiled.familiar: is not known here; known: calibration, capabilities, fuses",
    ),
    "no calibration": (
        'calibration.status = "uncalibrated"\ncalibration.bits = []\ncalibration.error = """',
        'sources.other = """',
        "[modes.compiled]",
        "modes.compiled.calibration: is missing",
    ),
    "unknown figure": (
        'parameters.launch_floor = { value = 3, unit = "us"',
        'parameters.launch = { value = 3, unit = "us"',
        "parameters.launch = ",
        "is no figure of this family",
    ),
    "unit": (
        'parameters.launch_floor = { value = 3, unit = "us"',
        'parameters.launch_floor = { value = 3, unit = "GHz"',
        'value = 3, unit = "GHz"',
        "unit 'GHz' is none of time",
    ),
    "no table": (
        V100[V100.index("[modes.eager") :],
        "[modes]\ncompiled = 3\n",
        "compiled = 3",
        "has to be a table, got 3",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_modes_are_refused_with_line_and_reason(case: str, tmp_path: Path) -> None:
    before, after, where, reason = WRONG[case]
    assert V100.count(before) == 1
    text = V100.replace(before, after)
    path = tmp_path / "wrong.toml"
    path.write_text(text)
    with pytest.raises(TargetError) as caught:
        load(path, mode="compiled")
    assert f"{path}, line {line_of(text, where)}: " in str(caught.value)
    assert reason in str(caught.value)
