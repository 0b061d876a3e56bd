"""What a stranger gets wrong about quantization: one clear error or what is documented, and nothing left behind."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn

import fxopt
from fxopt.decisions import Capabilities, Policy
from fxopt.errors import DataError, ExportError, FxoptError, PassError, PolicyError, TargetError
from fxopt.export import export_onnx
from fxopt.passes import FoldBatchNorm, Quantize
from tests.optimizing import CLASSES, DATA, EXAMPLE, make_net, optimize

LABELS = torch.zeros(4, dtype=torch.long)
QUICK: dict[str, Any] = {"passes": ("quantize",), "target": "phone-int8", "trials": 2, "epochs": 0, "engine": "random"}


@functools.cache
def graph() -> fx.GraphModule:
    return FoldBatchNorm()(fxopt.trace(make_net(), EXAMPLE)).graph_module


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(6, 6), nn.Linear(6, 6)
        self.other.weight = self.one.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.other(self.one(x).relu())


@pytest.mark.parametrize("bits", [(0, 8), (9, 8), (8, 0), (8, 16), (32, 8), (8,), (8, 8, 8), 8, "8"])
def test_bits_that_are_not_on_offer_are_refused_with_the_layer(bits: Any) -> None:
    with pytest.raises(PolicyError, match="cannot be chosen for 'bits' at '0'; its choices are"):
        Quantize({("bits", "0"): bits})(graph())  # type: ignore[arg-type]


@pytest.mark.parametrize("bits", [(2.5, 8), (True, 8), (), None])
def test_what_is_no_number_of_bits_is_refused(bits: Any) -> None:
    with pytest.raises(PolicyError, match="cannot be used"):
        Quantize({("bits", "0"): bits})(graph())  # type: ignore[arg-type]


@pytest.mark.parametrize("ends", [(9, 9), (8, 16), 8, "88", (8,)])
def test_bits_of_the_ends_are_checked_when_the_pass_is_made(ends: Any) -> None:
    with pytest.raises(PassError, match=r"ends is .*; give 1 to 8 bits"):
        Quantize(ends=ends)


def test_ends_that_the_target_has_not_are_refused_before_anything_is_searched() -> None:
    with pytest.raises(PassError, match=r"ends is \(4, 4\), which the target cannot run at '0'; choose one of"):
        optimize(**{**QUICK, "passes": (Quantize(ends=(4, 4)),)})


def test_weights_of_another_type_are_why_nothing_is_quantized() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, CLASSES)).double()
    options: dict[str, Any] = {"target": "pixel1", "passes": "quantize", "trials": 1, "verify_on_host": False}
    result = fxopt.optimize(model.eval(), torch.randn(2, 1, 6, 6, dtype=torch.double), **options)
    (note,) = (one for one in result.report.notes if one.startswith("Nothing is quantized"))
    assert note.endswith(
        "weights are in float64, and only those in float32 are quantized; convert the model with .float()."
    )


@pytest.mark.parametrize("target", ["eyeriss", "eie"])
def test_a_target_without_the_widths_quantizes_nothing_and_says_so(target: str) -> None:
    result = optimize(**{**QUICK, "target": target})
    assert not dict(result.policy)
    assert any("Nothing is quantized" in note for note in result.report.notes)


def test_a_target_file_without_a_width_is_told_by_its_line(tmp_path: Path) -> None:
    path = tmp_path / "board.toml"
    text = (Path(fxopt.targets.__file__).parent / "presets" / "phone-int8.toml").read_text(encoding="utf-8")
    path.write_text(text.replace("[[32, 32], [8, 8]]", "[[32, 32], [8, 0]]"), encoding="utf-8")
    with pytest.raises(TargetError, match=r"line \d+: capabilities.bits.\*: has to list pairs"):
        optimize(**{**QUICK, "target": path})


@pytest.mark.parametrize(
    ("batches", "words"),
    [
        ([(torch.full((4, 3, 8, 8), math.nan), LABELS)], "first batch hold NaN"),
        ([*DATA, (torch.full((4, 3, 8, 8), math.inf), LABELS)], "train, batch 2, input 'input': it holds NaN"),
        ([(torch.randn(4, 3, 9, 9), LABELS)], r"batch 0, input 'input': shape \(4, 3, 9, 9\)"),
        ([(torch.randn(4, 1, 8, 8), LABELS)], "to have 3 channels"),
        ([(torch.ones(4, 3, 8, 8, dtype=torch.long), LABELS)], "Give inputs such as example_inputs"),
        ([], "train yields nothing"),
    ],
)
def test_calibration_data_is_checked_by_optimize(batches: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        optimize(**QUICK, train=batches)


@pytest.mark.parametrize(
    ("batches", "words"),
    [
        ([torch.full((4, 3, 8, 8), math.nan)], "Calibration batch 0, input .*NaN"),
        ([torch.randn(4, 3, 8, 8), torch.randn(4, 3, 9, 9)], "Calibration batch 1, input"),
        ([torch.randn(3, 8, 8)], r"shape \(3, 8, 8\)"),
        ([], "loader is empty"),
        (iter(()), "loader is empty"),
    ],
)
def test_calibration_data_is_checked_by_the_pass(batches: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        Quantize(calibration=batches)(graph())


def test_constant_activations_and_channels_of_zeros_are_quantized() -> None:
    model = make_net()
    with torch.no_grad():
        model.get_submodule("0").weight[:3] = 0.0  # type: ignore[index, operator]
    result = optimize(model, **{**QUICK, "target": "zynq7020"}, train=[(torch.zeros(4, 3, 8, 8), LABELS)])
    outputs = result.model(EXAMPLE)
    assert outputs.shape == (2, CLASSES)
    assert bool(torch.isfinite(outputs).all())


def test_a_shared_weight_takes_one_width() -> None:
    gm = fxopt.trace(Tied().eval(), torch.randn(2, 6))
    with pytest.raises(PolicyError, match=r"'one' and 'other' share a weight.* 8 and 4 bits; choose the same"):
        Quantize(Policy({("bits", "one"): (8, 8), ("bits", "other"): (4, 8)}))(gm)
    made = Quantize(Policy({("bits", "one"): (4, 8), ("bits", "other"): (4, 4)}))(gm).graph_module
    assert made.get_submodule("one").weight is made.get_submodule("other").weight


@pytest.mark.parametrize("engine", ["evolution", "exact"])
def test_no_trial_of_a_search_fails_where_a_weight_is_shared(engine: str) -> None:
    data = [(torch.randn(8, 6), torch.randint(6, (8,)))]
    options = {**QUICK, "target": "bitfusion", "trials": 4, "engine": engine}
    result = optimize(Tied().eval(), torch.randn(2, 6), **options, train=data, val=data)
    assert result.search is not None
    assert all(trial.score is not None for trial in result.search.trials)
    assert {bits[0] for bits in result.policy.values() if isinstance(bits, tuple)} == {8}


def test_layers_that_share_a_weight_are_offered_the_widest_that_all_have() -> None:
    gm = fxopt.trace(Tied().eval(), torch.randn(2, 6))
    able = Capabilities({"*": ((2, 2), (4, 4), (4, 8), (32, 32))})
    assert {one.choices for one in Quantize().search_space(gm, able)} == {((4, 4), (4, 8), (32, 32))}
    first = [one.choices for one in Quantize(ends=(2, 2)).search_space(gm, able)]
    assert first == [((2, 2),), ((2, 2),)]


@pytest.mark.parametrize(("form", "where"), [("qdq", "file/model.onnx"), ("qonnx", "")])
def test_nothing_is_left_at_a_path_that_cannot_be_written(form: Any, where: str, tmp_path: Path) -> None:
    made = Quantize(Policy({("bits", "0"): (4, 8)}))(graph()).graph_module
    (tmp_path / "file").write_text("kept")
    with pytest.raises(ExportError, match=r"Cannot write .*; nothing was changed"):
        export_onnx(made, tmp_path / where, EXAMPLE, format=form, check=False)
    assert [one.name for one in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "kept"


def test_a_result_is_not_saved_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    with pytest.raises(FxoptError, match="Cannot write"):
        optimize(**QUICK).save(tmp_path / "file" / "folder")
    assert (tmp_path / "file").read_text() == "kept"
