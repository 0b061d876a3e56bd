"""``fxopt export``: what it writes, what it tells, and what it refuses before any work."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest

from tests.commands import run, work_in

MODELS = """
import torch
from torch import nn


def small():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                          nn.Linear(16, 32))
    return model, torch.randn(2, 3, 8, 8)


def bare():
    return nn.Sequential(nn.ReLU()), torch.randn(2, 3)


def loader():
    return [(torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 3]))]
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return work_in(tmp_path, monkeypatch, nets=MODELS)


def test_layers_kernels_and_time_are_told(folder: Path) -> None:
    result = run("export", "nets:small", "--bits", "8,8", "--train", "nets:loader", "--out", "made/net.onnx")
    assert result.exit_code == 0, result.stderr
    for wanted in ("net.onnx", "8/8", "QLinearConv", "QGemm", "integers", "latency measured on this machine"):
        assert wanted in result.stdout, wanted
    assert onnx.load(folder / "made" / "net.onnx").opset_import[0].version == 21


def test_json_has_everything_and_nothing_else(folder: Path) -> None:
    result = run("export", "nets:small", "--bits", "4, 32", "--format", "qdq-native", "--opset", "22", "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["file_bytes"] == (folder / found["path"]).stat().st_size
    assert [(line["site"], line["weight_bits"], line["activation_bits"]) for line in found["layers"]] == [
        ("0", 4, 32),
        ("5", 4, 32),
    ]
    assert found["opset"] == 22
    assert found["top1_agreement"] == 1.0
    assert found["notes"]


def test_what_optimize_saved_is_exported(folder: Path) -> None:
    words = ("--target", "pixel1", "--trials", "1", "--epochs", "0", "--passes", "quantize", "--out", "done")
    assert run("optimize", "nets:small", *words).exit_code == 0
    result = run("export", "nets:small", "--saved", "done", "--format", "qonnx", "--out", "done/net.onnx", "--json")
    assert result.exit_code == 0, result.stderr
    saved = json.loads((folder / "done" / "report.json").read_text())["export"]["layers"]
    found = json.loads(result.stdout)["layers"]
    assert [line["weight_bits"] for line in found] == [line["weight_bits"] for line in saved]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("nets:small", "--bits", "8"), "give bits of weights and of activations"),
        (("nets:small", "--bits", "9,8"), "9"),
        (("nets:bare", "--bits", "8,8"), "no layer that can be quantized"),
        (("nets:small", "--train", "nets:loader"), "give --bits too"),
        (("nets:small", "--bits", "8,8", "--saved", "done"), "leave out --bits"),
        (("nets:small", "--format", "onnx"), "choose one of 'qdq'"),
        (("nets:small", "--saved", "nowhere"), "nowhere"),
    ],
)
def test_what_cannot_be_is_refused_and_leaves_nothing(folder: Path, words: tuple[str, ...], reason: str) -> None:
    result = run("export", *words)
    assert result.exit_code == 1
    assert reason in result.stderr
    assert not list(folder.rglob("*.onnx"))


def test_a_folder_that_cannot_be_written_is_told(folder: Path) -> None:
    (folder / "file").write_text("here")
    result = run("export", "nets:small", "--out", "file/net.onnx")
    assert result.exit_code == 1
    assert "Cannot write" in result.stderr
    assert (folder / "file").read_text() == "here"
