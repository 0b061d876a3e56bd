"""Layers in floats amid layers in integers: what the policy says is what the file computes, layer by layer."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import fx, nn

from fxopt.decisions import Policy
from fxopt.export import ExportReport, Format, export_onnx
from fxopt.graph import trace
from fxopt.passes import Quantize

IMAGES = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
INTEGER, FLOAT = (8, 8), (32, 32)


class Net(nn.Module):
    """Convolutions with all kinds of activations behind them, a branch, and linear layers on rows and on vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 16, 3, padding=1)
        self.b = nn.Conv2d(16, 16, 3, padding=1)
        self.c = nn.Conv2d(16, 16, 1)
        self.up = nn.ConvTranspose2d(16, 16, 2, stride=2)
        self.d = nn.Conv2d(16, 16, 3, padding=1, stride=2)
        self.rows = nn.Linear(16, 16)
        self.vector = nn.Linear(16, 16)
        self.last = nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.a(x).relu()
        x = nn.functional.relu6(self.b(x)) + nn.functional.leaky_relu(self.c(x))
        x = self.d(self.up(x)).relu()
        x = self.rows(x.flatten(2).transpose(1, 2)).relu()
        return self.last(self.vector(x.mean(1)).relu())


SITES = ("a", "b", "c", "up", "d", "rows", "vector", "last")


@cache
def floats() -> fx.GraphModule:
    torch.manual_seed(0)
    return trace(Net().eval(), IMAGES[:2])


def exported(folder: Path, bits: dict[str, tuple[int, int]], form: Format = "qdq", **options: Any) -> ExportReport:
    policy = Policy({("bits", site): one for site, one in bits.items()})
    gm = Quantize(policy, calibration=IMAGES, **options)(floats()).graph_module
    return export_onnx(gm, folder / "model.onnx", IMAGES[:2], format=form)


@pytest.mark.parametrize("left_out", [("b",), ("a", "c", "d"), ("c", "up", "vector"), ("b", "rows"), ("d", "last")])
def test_a_layer_left_in_floats_computes_in_floats(tmp_path: Path, left_out: tuple[str, ...]) -> None:
    report = exported(tmp_path, {site: FLOAT if site in (*left_out, "up") else INTEGER for site in SITES})
    assert report.relative is not None
    assert report.relative < 1e-4
    in_floats = {line.site for line in report.layers if not line.integer}
    assert set(left_out) <= in_floats
    assert {"a", "b", "c"} - set(left_out) <= {line.site for line in report.layers if line.integer}


@pytest.mark.parametrize(("weights", "width"), [(8, 8), (5, 8), (4, 4), (2, 4)])
@pytest.mark.parametrize("method", ["max", "kmeans"])
def test_weights_quantized_alone_are_small_in_the_file_and_floats_once_it_is_loaded(
    tmp_path: Path, weights: int, width: int, method: str
) -> None:
    bits = dict.fromkeys(("a", "b", "c", "d", "up"), (weights, 32))
    report = exported(tmp_path, bits, weights={"method": method})
    operators = dict(report.operators)
    assert operators["Conv"] + operators.get("FusedConv", 0) == 4
    assert operators["ConvTranspose"] == 1
    assert not {"DequantizeLinear", "Cast", "Gather", "QuantizeLinear"} & set(operators)
    stored = {tensor.name: tensor for tensor in onnx.load(tmp_path / "model.onnx").graph.initializer}
    for site in bits:
        weight = stored[f"{site}.weight"]
        assert len(weight.raw_data) == -(-math.prod(weight.dims) * width // 8)


def test_an_integer_input_without_integer_output_leaves_no_dequantized_weight_to_every_run(tmp_path: Path) -> None:
    report = exported(tmp_path, {"a": INTEGER, "b": (4, 32), "c": (4, 32), "vector": (2, 4), "last": (4, 32)})
    kernels = {line.site: line.kernel for line in report.layers}
    assert kernels["a"] == "QLinearConv"
    assert kernels["last"] == "MatMulNBits"
    assert dict(report.operators)["DequantizeLinear"] == 3, "the values that are read, no weight"


@pytest.mark.parametrize(("bits", "width", "opset"), [(2, 2, 25), (3, 4, 21), (8, 8, 21)])
def test_indices_are_packed_as_narrow_as_types_are(tmp_path: Path, bits: int, width: int, opset: int) -> None:
    report = exported(tmp_path, {"b": (bits, 8), "rows": (bits, 32)}, form="qdq-native", weights={"method": "kmeans"})
    assert report.opset == opset
    stored = {tensor.name: tensor for tensor in onnx.load(tmp_path / "model.onnx").graph.initializer}
    assert len(stored["b.weight"].raw_data) == 16 * 16 * 9 * width // 8
    assert len(stored["rows.weight"].raw_data) == 16 * 16 * width // 8
    assert stored["b.weight_codebook"].dims[0] == 2**bits


@pytest.mark.parametrize("bits", [(3, 8), (4, 4)])
def test_codebooks_stay_what_they_are_beside_integer_activations(tmp_path: Path, bits: tuple[int, int]) -> None:
    report = exported(tmp_path, dict.fromkeys(SITES, bits) | {"up": FLOAT}, weights={"method": "kmeans"})
    assert report.relative is not None
    assert report.relative < 1e-4
    assert report.integers_differing is not None
    assert report.integers_differing < 0.01
    assert not any(line.integer for line in report.layers)
