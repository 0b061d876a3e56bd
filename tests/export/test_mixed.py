"""Layers in floats amid layers in integers: what the policy says is what the file computes, layer by layer."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn

from fxopt.decisions import Policy
from fxopt.export import ExportReport, export_onnx
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


def exported(folder: Path, bits: dict[str, tuple[int, int]], **options: Any) -> ExportReport:
    policy = Policy({("bits", site): one for site, one in bits.items()})
    gm = Quantize(policy, calibration=IMAGES, **options)(floats()).graph_module
    return export_onnx(gm, folder / "model.onnx", IMAGES[:2])


@pytest.mark.parametrize("left_out", [("b",), ("a", "c", "d"), ("c", "up", "vector"), ("b", "rows"), ("d", "last")])
def test_a_layer_left_in_floats_computes_in_floats(tmp_path: Path, left_out: tuple[str, ...]) -> None:
    report = exported(tmp_path, {site: FLOAT if site in (*left_out, "up") else INTEGER for site in SITES})
    assert report.relative is not None
    assert report.relative < 1e-4
    in_floats = {line.site for line in report.layers if not line.integer}
    assert set(left_out) <= in_floats
    assert {"a", "b", "c"} - set(left_out) <= {line.site for line in report.layers if line.integer}


@pytest.mark.parametrize("bits", [(3, 8), (4, 4)])
def test_codebooks_stay_what_they_are_beside_integer_activations(tmp_path: Path, bits: tuple[int, int]) -> None:
    report = exported(tmp_path, dict.fromkeys(SITES, bits) | {"up": FLOAT}, weights={"method": "kmeans"})
    assert report.relative is not None
    assert report.relative < 1e-4
    assert report.integers_differing is not None
    assert report.integers_differing < 0.01
    assert not any(line.integer for line in report.layers)
