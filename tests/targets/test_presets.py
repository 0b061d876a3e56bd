"""Presets: what comes with fxopt, files of one's own, and what is refused, with its line."""

from __future__ import annotations

from pathlib import Path

import pytest

from fxopt.decisions import Placement
from fxopt.errors import TargetError, UnknownNameError
from fxopt.targets import PresetTarget, Target, describe, load, names
from fxopt.targets._presets import FOLDER, _key_lines, builtin_presets
from fxopt.targets.parameters import UNITS, Parameter, ParameterError

PRESETS = tuple(builtin_presets())
PIXEL1 = (FOLDER / "pixel1.toml").read_text(encoding="utf-8")


def line_of(text: str, part: str) -> int:
    return next(number for number, line in enumerate(text.splitlines(), 1) if part in line)


def test_names_and_loading() -> None:
    assert {"host", *PRESETS} <= set(names())
    assert names() == sorted(names())
    assert all(name.partition(":")[0] in PRESETS for name in names() if name != "host")
    assert {"note10", "phone-int8", "pixel1", "stm32f746", "stm32h743", "v100", "xeon-e5-2640v4"} <= set(PRESETS)
    assert all(load(name).name == name for name in names())
    assert load("pixel1").name == "pixel1"
    target = load("v100")
    assert load(target) is target
    assert repr(target) == "<target v100: NVIDIA V100 (SXM2), eager PyTorch of 2018, batch 8>"


def test_unknown_names_suggest_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match=r"Unknown target 'pixel'. Did you mean 'pixel1'"):
        load("pixel")


@pytest.mark.parametrize("name", PRESETS)
def test_presets_say_where_every_figure_is_from(name: str) -> None:
    target = load(name)
    assert isinstance(target, PresetTarget)
    assert target.name == name
    assert target.status in ("calibrated", "uncalibrated")
    assert "%" in target.error or target.status == "uncalibrated"
    for figure in target.preset.figures.values():
        assert figure.source in target.info.sources
    assert {figure.source for figure in target.preset.figures.values()} == set(target.info.sources)


def test_capabilities_of_the_presets() -> None:
    phone, gpu = load("pixel1").capabilities, load("v100").capabilities
    assert phone.allowed_bits("conv") == ((32, 32), (8, 8))
    assert gpu.allowed_bits("conv") == ((32, 32), (16, 16))
    assert (phone.channel_tile, phone.batch, gpu.channel_tile, gpu.batch) == (8, 1, 8, 8)


def test_descriptions_hold_status_error_figures_and_sources() -> None:
    text = describe("pixel1")
    for part in (
        "calibrated at 32 bits",
        "Mean 5.0%",
        "32/32, 8/8",
        "0.1731 ms/M [profiles]",
        "[profiles] Non-negative",
    ):
        assert part in text
    assert "energy: no energy measurement" in text
    assert load("pixel1").provenance.startswith("Google Pixel 1")
    assert "sm_count = 80 [whitepaper]" in describe(load("v100"))
    assert describe("host").startswith("host: This machine")


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "phone.toml"
    path.write_text(PIXEL1.replace('name = "pixel1"', 'name = "mine"').replace("0.1731", "0.2"))
    mine = load(path)
    assert mine.name == "mine"
    assert load(str(path)).info == mine.info


def test_placement_is_told_by_the_file(tmp_path: Path) -> None:
    path = tmp_path / "phone.toml"
    told = 'placement = { ends = [8, 8], floats = ["AvgPool2d"], shared_grids = ["add", "cat"] }'
    path.write_text(PIXEL1.replace("batch = 1", f"batch = 1\n{told}", 1))
    assert load(path).capabilities.placement == Placement((8, 8), ("avg_pool2d",), (), ("add", "cat"))
    assert load("pixel1").capabilities.placement == Placement()
    assert load("stm32h743-tflm").capabilities.placement.shared_grids == ("cat",)


# What is changed in pixel1.toml, into what, the line (by a part of it, after the change), and what the error says.
WRONG = {
    "unknown key": ("fuses = true", "fuses = true\nfuse = 1", "fuse = 1", "fuse: is not known here"),
    "unknown figure": (
        "[parameters.float.pool]\nin =",
        "[parameters.float.pool]\ninn =",
        "inn =",
        "is no figure of this",
    ),
    "unknown kind": (
        "[parameters.float.pool]",
        "[parameters.float.pol]",
        "in = { value = 3.0",
        "is no figure of this",
    ),
    "wrong unit": (
        '1.085, unit = "ms"',
        '1.085, unit = "ms/M"',
        "1.085",
        "unit 'ms/M' is none of time; use one of s, ms",
    ),
    "no unit": ('value = 1.085, unit = "ms"', "value = 1.085", "1.085", "unit: is missing"),
    "no source": (', source = "kryo"', "", "spill_threshold", "source: is missing"),
    "unknown source": ('source = "kryo"', 'source = "cryo"', "spill_threshold", "source 'cryo' is not among [sources]"),
    "text for a number": ("value = 1.085", 'value = "1.085"', "1.085", "value: has to be a number, got '1.085'"),
    "truth for a number": ("value = 1.085", "value = true", "value = true", "value: has to be a number, got True"),
    "bare number": ("mac = { value = 0.5158, ", "mac = 0.5158 #", "mac = 0.5158", "has to be { value = ..., unit"),
    "extra in a figure": ("value = 1.085,", "value = 1.085, error = 3,", "1.085", "error: is not known here"),
    "negative": ("value = 1.085", "value = -1.085", "-1.085", "-1.085 has to be at least 0"),
    "zero threshold": (
        "spill_threshold = { value = 1,",
        "spill_threshold = { value = 0,",
        "spill_thr",
        "has to be above 0",
    ),
    "not a number": ("value = 1.085", "value = nan", "value = nan", "nan is not a finite number"),
    "infinite": ("value = 1.085", "value = inf", "value = inf", "inf is not a finite number"),
    "schema": ("schema = 1", "schema = 2", "schema = 2", "schema: is 2; this version of fxopt reads schema 1"),
    "family": ('family = "linear_cpu"', 'family = "linear"', "family", "'linear' is not known; known: "),
    "status": ('status = "calibrated"', 'status = "exact"', "status", "'exact' is none of calibrated, uncalibrated"),
    "bits of status": ("bits = [32]", "bits = [64]", "bits = [64]", "has to list widths from 1 to 32"),
    "empty title": (
        'title = "Google Pixel 1, TensorFlow Lite on one big CPU core, batch 1"',
        'title = ""',
        "title",
        "empty",
    ),
    "fuses": ("fuses = true", 'fuses = "yes"', "fuses", "has to be true or false, got 'yes'"),
    "kind of bits": ('bits."*"', "bits.convolution", "bits.convolution", "is not known here; known: *, conv"),
    "pair": (
        "[[32, 32], [8, 8]]",
        "[[32, 32], [8, 64]]",
        'bits."*"',
        "pairs of weight and activation bits from 1 to 32",
    ),
    "not pairs": ("[[32, 32], [8, 8]]", "[32, 8]", 'bits."*"', "has to list pairs of weight and activation bits"),
    "tile": ("channel_tile = 8", "channel_tile = 0", "[capabilities]", "at least 1"),
    "tile type": ("channel_tile = 8", "channel_tile = 8.5", "8.5", "has to be a whole number, got 8.5"),
    "placement key": ("batch = 1", "batch = 1\nplacement.share = []", "placement.share", "share: is not known here"),
    "placement ends": (
        "batch = 1",
        "batch = 1\nplacement.ends = [8]",
        "placement",
        "ends: ends is (8,); give bits",
    ),
    "placement grids": (
        "batch = 1",
        'batch = 1\nplacement.shared_grids = ["mul"]',
        "placement.shared_grids",
        "shared_grids names 'mul'",
    ),
    "placement type": ("batch = 1", "batch = 1\nplacement.floats = 3", "placement", "floats: has to be a list, got 3"),
    "no energy reason": ("unavailable =", "because =", "because", "because: is not known here"),
    "spill without threshold": ("spill_threshold = ", "# spill_threshold = ", "[parameters]", "spill coefficients"),
    "source no text": ('kryo = "Second', 'kryo = 3 # "Second', "kryo = 3", "sources.kryo: has to be text"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_files_are_refused_with_line_and_reason(case: str, tmp_path: Path) -> None:
    before, after, where, reason = WRONG[case]
    assert PIXEL1.count(before) >= 1
    text = PIXEL1.replace(before, after, 1)
    path = tmp_path / "wrong.toml"
    path.write_text(text)
    with pytest.raises(TargetError) as caught:
        load(path)
    assert f"{path}, line {line_of(text, where)}: " in str(caught.value)
    assert reason in str(caught.value)


@pytest.mark.parametrize("section", ["sources", "calibration", "capabilities", "parameters", "energy"])
def test_missing_sections_are_refused(section: str, tmp_path: Path) -> None:
    path = tmp_path / "wrong.toml"
    kept = [part for part in PIXEL1.split("\n[") if not part.startswith((f"{section}]", f"{section}."))]
    path.write_text("\n[".join(kept))
    with pytest.raises(TargetError, match=f"{section}|energy.unavailable"):
        load(path)


def test_figures_that_a_family_requires(tmp_path: Path) -> None:
    path = tmp_path / "wrong.toml"
    text = (FOLDER / "v100.toml").read_text(encoding="utf-8")
    path.write_text(text.replace("tile_m", "# tile_m"))
    with pytest.raises(TargetError, match=r"parameters.tile_m: is missing \(rows of a tile\)"):
        load(path)
    path.write_text(text.replace("value = 32, unit", "value = 32.5, unit", 1))
    with pytest.raises(TargetError, match=r"32\.5 has to be a whole number"):
        load(path)
    path.write_text(text.replace("value = 0.914,", "value = 1.914,"))
    with pytest.raises(TargetError, match="above the largest that makes sense, 1"):
        load(path)
    path.write_text(text.replace("value = 512,", "value = 32,"))
    with pytest.raises(TargetError, match=rf"line {line_of(text, 'cycle.32')}: .* has to be at most that of 16 bits"):
        load(path)


def test_energy_is_told_once(tmp_path: Path) -> None:
    from tests.targets.oracle import BOARD

    path = tmp_path / "board.toml"
    path.write_text(BOARD + '\n[energy]\nunavailable = "none"\n')
    with pytest.raises(TargetError, match="says that energy is unavailable, but there are energy figures"):
        load(path)


def test_files_that_are_no_toml(tmp_path: Path) -> None:
    path = tmp_path / "broken.toml"
    path.write_text("schema = 1\nname = \n")
    with pytest.raises(TargetError, match=r"broken.toml is not TOML: .*line 2"):
        load(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(TargetError, match="Cannot read target file"):
        load(path)
    with pytest.raises(TargetError, match="Cannot read target file"):
        load(tmp_path / "absent.toml")


def test_options_of_the_host_are_refused_elsewhere() -> None:
    with pytest.raises(TargetError, match="Only the target 'host' is measured"):
        load("pixel1", fingerprint="here")


def test_lines_of_keys() -> None:
    text = 'a = 1\n[t."x.y" . z]\nb.c = """\nd = 2\n"""  # not a key\ne = 3\n[[f]]\n'
    assert dict(_key_lines(text)) == {"a": 1, "t.x.y.z": 2, "t.x.y.z.b.c": 3, "t.x.y.z.e": 6, "f": 7}


@pytest.mark.parametrize(
    ("dimension", "value", "unit", "si"),
    [
        ("time per item", 0.1731, "ms/M", 0.1731e-9),
        ("rate", 15.7, "TFLOP/s", 7.85e12),
        ("bandwidth", 900, "GB/s", 9e11),
        ("bytes", 1, "MiB", 1048576),
        ("energy per byte", 15, "pJ/bit", 120e-12),
        ("time", 39, "us", 39e-6),
    ],
)
def test_units(dimension: str, value: float, unit: str, si: float) -> None:
    assert Parameter(dimension, "x").to_si("x", value, unit) == pytest.approx(si, rel=1e-12)
    assert 1.0 in UNITS[dimension].values()
    with pytest.raises(ParameterError, match="use one of"):
        Parameter(dimension, "x").to_si("x", value, "parsec")


def test_targets_are_abstract() -> None:
    with pytest.raises(TypeError, match="abstract"):
        Target()  # type: ignore[abstract]
