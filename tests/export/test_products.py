"""Products of activations in the file: on integer kernels where there are some, and equal to the graph's everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fxopt.decisions import Policy
from fxopt.export import Format, export_onnx, fastest_bits
from fxopt.graph import trace
from fxopt.passes import Quantize


class Attention(nn.Module):
    def __init__(self, by_hand: bool) -> None:
        super().__init__()
        self.qkv, self.mix, self.by_hand = nn.Linear(16, 48), nn.Linear(16, 6), by_hand

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).view(-1, 7, 3, 2, 8).permute(2, 0, 3, 1, 4).unbind(0)
        mask = (x.mean(-1) < 0.2)[:, None, None, :]
        if self.by_hand:
            scores = (q @ k.transpose(-1, -2) * 8**-0.5).masked_fill(~mask, -1e4)
            y = scores.softmax(-1) @ v
        else:
            y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.mix(y.transpose(1, 2).reshape(-1, 7, 16))


def graph_of(by_hand: bool = False) -> tuple[Any, torch.Tensor]:
    torch.manual_seed(0)
    model, example = Attention(by_hand).eval(), torch.randn(8, 7, 16)
    return trace(model, example[:2]), example


def sites(by_hand: bool) -> list[str]:
    return ["matmul", "matmul_1"] if by_hand else ["scaled_dot_product_attention"]


@pytest.mark.parametrize("by_hand", [False, True])
def test_both_products_run_on_integers_in_onnxruntime(by_hand: bool, tmp_path: Path) -> None:
    gm, example = graph_of(by_hand)
    made = Quantize(calibration=example)(gm).graph_module
    report = export_onnx(made, tmp_path / "model.onnx", example[:2])
    operators = dict(report.operators)
    # The scores are floats for the softmax; what the second product gives goes on in integers.
    assert operators["MatMulIntegerToFloat"] + operators["QLinearMatMul"] >= 2
    assert operators["QLinearMatMul"] >= 1
    assert not {"MatMul", "FusedMatMul"} & operators.keys()
    assert operators["Softmax"] == 1
    assert report.integers_differing is not None


@pytest.mark.parametrize(
    ("form", "by_hand", "bits"), [("qdq", True, 1), ("qdq-native", True, 4), ("qonnx", False, 3), ("float", False, 8)]
)
def test_every_form_computes_what_the_graph_computes(form: Format, by_hand: bool, bits: int, tmp_path: Path) -> None:
    gm, example = graph_of(by_hand)
    policy = Policy({("bits", site): (bits, bits) for site in sites(by_hand)} | {("bits", "mix"): (8, bits)})
    made = Quantize(policy, calibration=example)(gm).graph_module
    report = export_onnx(made, tmp_path / "model.onnx", example[:2], format=form)
    assert report.relative is not None


def test_the_fastest_bits_name_products_too() -> None:
    gm, example = graph_of()
    found = fastest_bits(gm, example[:2], runs=3).policy
    assert [site for _, site in found] == ["qkv", "mix", "scaled_dot_product_attention"]
    assert set(found.values()) <= {(8, 8), (32, 32)}
