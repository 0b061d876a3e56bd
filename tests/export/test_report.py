"""What a report of an export tells of layers, kernels and time."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import numpy_helper
from torch import fx, nn

from fxopt.decisions import Policy
from fxopt.export import ExportReport, Format, export_onnx
from fxopt.export._layers import layers_in
from fxopt.graph import trace
from fxopt.passes import Quantize

EXAMPLE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
SITES = ("0", "2", "6")


@cache
def floats() -> fx.GraphModule:
    """A convolution, a depthwise one and a linear layer."""
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 16, 3), nn.ReLU6(), nn.Conv2d(16, 16, 3, groups=16), nn.AdaptiveAvgPool2d(1))
    return trace(nn.Sequential(*layers, nn.Flatten(), nn.Dropout(), nn.Linear(16, 32)).eval(), EXAMPLE)


def quantized(bits: Any) -> fx.GraphModule:
    """Each at bits of its own."""
    policy = Policy({("bits", site): one for site, one in zip(SITES, bits, strict=True)})
    return Quantize(policy, calibration=EXAMPLE)(floats()).graph_module


def exported(folder: Path, bits: Any, **options: Any) -> ExportReport:
    return export_onnx(quantized(bits), folder / "model.onnx", EXAMPLE, **options)


@pytest.mark.parametrize(
    ("bits", "kernels"),
    [
        (((8, 8), (4, 6), (8, 8)), [("QLinearConv", True), ("QLinearConv", True), ("QGemm", True)]),
        (((8, 8), (32, 32), (4, 32)), [("QLinearConv", True), ("Conv", False), ("MatMulNBits", True)]),
        (((32, 32), (32, 32), (32, 32)), [("Conv", False), ("Conv", False), ("Gemm", False)]),
    ],
)
def test_each_layer_is_told_with_its_bits_and_the_kernel_that_runs_it(
    tmp_path: Path, bits: Any, kernels: list[tuple[str, bool]]
) -> None:
    report = exported(tmp_path, bits)
    assert [(line.weight_bits, line.activation_bits) for line in report.layers] == list(bits)
    assert [line.site for line in report.layers] == list(SITES)
    found = [(line.kernel.removeprefix("Fused"), line.integer) for line in report.layers]
    assert found == kernels
    assert report.latency_s is not None
    assert report.latency_s > 0


@pytest.mark.parametrize("form", ["qdq", "qdq-native", "float"])
def test_kernels_are_those_of_the_counts(tmp_path: Path, form: Format) -> None:
    report = exported(tmp_path, ((8, 8), (4, 4), (8, 8)), format=form)
    integers = [kernel for kernel in report.kernels if kernel.integer]
    assert (len(integers), len(report.kernels) - len(integers)) == (report.integer_nodes, report.float_nodes)
    counts = dict(report.operators)
    assert all(counts[kernel.operator] > 0 for kernel in report.kernels)
    assert bool(integers) == (form == "qdq")


def test_a_clip_to_a_narrow_grid_computes_on_integers(tmp_path: Path) -> None:
    report = exported(tmp_path, ((4, 4), (4, 4), (4, 4)))
    clips = [kernel.integer for kernel in report.kernels if kernel.operator == "Clip"]
    assert clips
    assert all(clips)
    assert report.float_nodes == 0


@pytest.mark.parametrize("form", ["qdq", "qdq-native", "qonnx", "float"])
def test_bytes_of_layers_are_those_in_the_file(tmp_path: Path, form: Format) -> None:
    report = exported(tmp_path, ((8, 8), (4, 4), (2, 8)), format=form)
    stored = {tensor.name: tensor for tensor in onnx.load(tmp_path / "model.onnx").graph.initializer}
    for line in report.layers:
        mine = [tensor for name, tensor in stored.items() if name.startswith(f"{line.site}.")]
        assert line.stored_bytes == sum(len(tensor.raw_data) for tensor in mine) > 0
    assert sum(line.stored_bytes for line in report.layers) < report.file_bytes
    if form == "qdq-native":
        widths = {line.site: line.weight_bits for line in report.layers}
        for site in SITES:
            weight = stored[f"{site}.weight"]
            count = int(np.prod(numpy_helper.to_array(weight).shape))
            assert len(weight.raw_data) == -(-count * widths[site] // 8)


def test_what_onnxruntime_does_not_run_itself_has_no_kernels_and_no_time(tmp_path: Path) -> None:
    report = exported(tmp_path, ((8, 8), (4, 4), (8, 8)), format="qonnx")
    assert report.kernels == ()
    assert report.latency_s is None
    assert {line.integer for line in report.layers} == {None}
    assert {line.kernel for line in report.layers} == {""}


def test_a_report_prints_as_one_line_with_its_proof(tmp_path: Path) -> None:
    report = exported(tmp_path, ((8, 8), (4, 4), (8, 8)))
    for words in (str(report.path), f"opset {report.opset}", "ran in onnxruntime", f"{report.integer_nodes} of"):
        assert words in str(report)
    assert "\n" not in str(report)
    assert len(str(report)) < 300 + len(str(report.path))
    assert "not compared" in str(exported(tmp_path, ((8, 8), (4, 4), (8, 8)), check=False))


def test_an_unchecked_file_still_tells_bits_and_bytes(tmp_path: Path) -> None:
    report = exported(tmp_path, ((8, 8), (4, 4), (8, 8)), check=False)
    assert [line.weight_bits for line in report.layers] == [8, 4, 8]
    assert report.latency_s is None
    assert {line.integer for line in report.layers} == {None}


@given(bits=st.lists(st.sampled_from([(8, 8), (3, 5), (4, 32), (1, 2), (32, 32)]), min_size=3, max_size=3))
def test_any_mixture_is_told_as_it_was_asked(bits: Any) -> None:
    found = layers_in(quantized(bits), onnx.ModelProto(), None, baked=False)
    assert [line.weight_bits for line in found] == [weights for weights, _ in bits]
    # A layer whose weights alone are quantized still reads the integers that one before it wrote.
    read = [line.activation_bits for line, (_, asked) in zip(found, bits, strict=True) if asked != 32]
    assert read == [activations for _, activations in bits if activations != 32]
