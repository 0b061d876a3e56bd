"""Every grid that a file can hold computes there what its graph computes; others are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fxopt.decisions import Policy
from fxopt.errors import ExportError
from fxopt.export import Format, export_onnx
from fxopt.graph import trace
from fxopt.graph.fake_quantize import learn_scales
from fxopt.passes import Quantize, RoundWeights

EXAMPLE = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(1))
FORMS: Any = pytest.mark.parametrize("form", ["qdq", "qonnx"])


def quantized(bits: tuple[int, int], **schemes: Any) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4)).eval()
    policy = Policy({("bits", "0"): bits, ("bits", "3"): bits})
    return Quantize(policy, calibration=EXAMPLE, **schemes)(trace(model, EXAMPLE[:2])).graph_module


@FORMS
@pytest.mark.parametrize(
    ("bits", "weights", "activations"),
    [
        ((4, 4), {"narrow": False, "method": "mse"}, {"method": "mse"}),
        ((2, 8), {"narrow": False}, {"symmetric": True}),
        ((5, 3), {"power_of_two": True, "per_channel": False}, {"power_of_two": True, "symmetric": True}),
        ((3, 32), {"method": "kmeans"}, {}),
    ],
)
def test_grids_of_every_form_are_exported(
    form: Format, bits: tuple[int, int], weights: Any, activations: Any, tmp_path: Path
) -> None:
    gm = quantized(bits, weights=weights, activations=activations)
    report = export_onnx(gm, tmp_path / "model.onnx", EXAMPLE[:2], format=form)
    assert report.relative is not None


@FORMS
def test_rounded_weights_and_learned_scales_are_exported(form: Format, tmp_path: Path) -> None:
    gm = RoundWeights(EXAMPLE)(quantized((3, 4))).graph_module
    learn_scales(gm)
    optimizer = torch.optim.SGD(gm.train().parameters(), lr=0.01)
    gm(EXAMPLE).square().mean().backward()
    optimizer.step()
    assert export_onnx(gm.eval(), tmp_path / "model.onnx", EXAMPLE[:2], format=form).relative is not None


@pytest.mark.parametrize("bits", [(4, 8), (2, 3), (1, 4), (8, 32)])
@pytest.mark.parametrize("per_channel", [True, False])
def test_asymmetric_weights_are_quant_nodes_with_zero_points(
    bits: tuple[int, int], per_channel: bool, tmp_path: Path
) -> None:
    gm = quantized(bits, weights={"symmetric": False, "per_channel": per_channel})
    report = export_onnx(gm, tmp_path / "model.onnx", EXAMPLE[:2], format="qonnx")
    assert report.relative is not None
    assert report.relative < 1e-4


@pytest.mark.parametrize("form", ["qdq", "qdq-native"])
def test_asymmetric_weights_are_refused_and_leave_no_file(form: Format, tmp_path: Path) -> None:
    gm = quantized((4, 8), weights={"symmetric": False})
    with pytest.raises(ExportError, match="'0' has a weight on an asymmetric grid"):
        export_onnx(gm, tmp_path / "model.onnx", EXAMPLE[:2], format=form)
    assert not list(tmp_path.iterdir())
    assert export_onnx(gm, tmp_path / "float.onnx", EXAMPLE[:2], format="float").relative is not None
