"""Forms of quantized files: grids of any width in 8 bits, packed, as QONNX, and as floats."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import fx, nn

from fxopt.decisions import Policy
from fxopt.errors import ExportError
from fxopt.export import ExportReport, Format, export_onnx
from fxopt.graph import edit, trace
from fxopt.graph.fake_quantize import quantize_layer
from fxopt.passes import Quantize


class Small(nn.Module):
    """A clipped convolution, a residual sum with a ReLU behind it, and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.clip = nn.ReLU6()
        self.second = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.third = nn.Linear(8, 16)
        self.last = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.clip(self.first(x))
        x = (x + self.second(x)).relu()
        return self.last(self.third(x.mean((2, 3))).relu())


EXAMPLE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def narrow(weight_bits: int, activation_bits: int) -> fx.GraphModule:
    """The network quantized to so many bits throughout."""
    gm = trace(Small().eval(), EXAMPLE)
    sites = ("first", "second", "third", "last")
    policy = Policy({("bits", site): (weight_bits, activation_bits) for site in sites})
    return Quantize(policy, calibration=[EXAMPLE])(gm).graph_module


def weight_only(bits: int) -> fx.GraphModule:
    """A linear layer with a quantized weight, in a graph of floats."""
    torch.manual_seed(0)
    gm = trace(nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4)).eval(), torch.randn(2, 64))
    return Quantize(Policy({("bits", "0"): (bits, 32)}))(gm).graph_module


def stored(path: Path) -> dict[str, onnx.TensorProto]:
    return {tensor.name: tensor for tensor in onnx.load(path).graph.initializer}


def export(gm: fx.GraphModule, folder: Path, form: Format, **options: Any) -> ExportReport:
    return export_onnx(gm, folder / f"{form}.onnx", EXAMPLE, format=form, **options)


@pytest.mark.parametrize("bits", [(4, 4), (3, 5), (1, 1)])
@pytest.mark.parametrize("form", ["qdq", "qdq-native", "qonnx", "float"])
def test_every_form_computes_what_the_graph_computes(bits: tuple[int, int], form: Format, tmp_path: Path) -> None:
    report = export(narrow(*bits), tmp_path, form)
    assert report.relative is not None
    assert (report.integers_differing is None) == (form == "float")
    onnx.checker.check_model(onnx.load(tmp_path / f"{form}.onnx")) if form != "qonnx" else None


@pytest.mark.parametrize("bits", [2, 6])
def test_grids_of_any_width_run_on_integer_kernels(bits: int, tmp_path: Path) -> None:
    report = export(narrow(bits, bits), tmp_path, "qdq")
    operators = dict(report.operators)
    assert operators["QLinearConv"] == 2
    assert operators["QLinearAdd"] == 1
    assert operators["QGemm"] == 2
    weight = numpy_helper.to_array(stored(tmp_path / "qdq.onnx")["first.weight"])
    assert weight.dtype == np.int8
    steps = weight // np.gcd.reduce(weight, axis=None)
    assert np.abs(steps).max() <= max(2 ** (bits - 1) - 1, 1)


def test_native_files_are_as_small_as_their_bits(tmp_path: Path) -> None:
    gm = trace(nn.Sequential(nn.Linear(512, 512, bias=False)).eval(), torch.randn(2, 512))
    for bits in (8, 4, 2):
        edit.replace_module(gm, "0", quantize_layer(nn.Linear(512, 512, bias=False), bits))
        edit.finish(gm)
        path = tmp_path / f"{bits}.onnx"
        report = export_onnx(gm, path, torch.randn(2, 512), format="qdq-native")
        overhead = report.file_bytes - 512 * 512 * bits // 8
        assert 0 < overhead < 6000
        assert report.opset == (25 if bits == 2 else 21)
        kind = {8: onnx.TensorProto.INT8, 4: onnx.TensorProto.INT4, 2: onnx.TensorProto.INT2}[bits]
        assert stored(path)["0.weight"].data_type == kind


def test_packed_types_need_an_opset_that_has_them(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="packed from opset 25 on"):
        export(narrow(2, 8), tmp_path, "qdq-native", opset=21)
    assert export(narrow(4, 8), tmp_path, "qdq-native", opset=21).opset == 21
    assert list(tmp_path.iterdir()) == [tmp_path / "qdq-native.onnx"]


@pytest.mark.parametrize(
    ("bits", "kind"), [(4, onnx.TensorProto.INT4), (3, onnx.TensorProto.INT4), (8, onnx.TensorProto.INT8)]
)
def test_a_linear_layer_with_only_its_weight_quantized_has_a_kernel(bits: int, kind: int, tmp_path: Path) -> None:
    report = export_onnx(weight_only(bits), tmp_path / "m.onnx", torch.randn(2, 64))
    assert dict(report.operators)["MatMulNBits"] == 1
    assert stored(tmp_path / "m.onnx")["0.weight"].data_type == kind


def test_qonnx_says_bits_and_runs_in_qonnx(tmp_path: Path) -> None:
    gm = narrow(3, 4)
    export(gm, tmp_path, "qonnx")
    model = onnx.load(tmp_path / "qonnx.onnx")
    quants = [node for node in model.graph.node if node.op_type == "Quant"]
    values = {name: numpy_helper.to_array(tensor) for name, tensor in stored(tmp_path / "qonnx.onnx").items()}
    signed = {values[node.input[3]].item() for node in quants if _attribute(node, "signed")}
    unsigned = {values[node.input[3]].item() for node in quants if not _attribute(node, "signed")}
    assert (signed, unsigned) == ({3.0}, {4.0})
    pytest.importorskip("qonnx")
    np.save(tmp_path / "x.npy", EXAMPLE.numpy())
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", IN_QONNX, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        wanted = gm(EXAMPLE).numpy()
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), wanted, atol=1e-4 * np.abs(wanted).max())


# qonnx refuses files of newer versions than it knows by a process-wide constant; so it gets a process of its own.
IN_QONNX = """
import sys
from pathlib import Path
import numpy as np
import onnx
onnx.IR_VERSION = 10
from qonnx.core.modelwrapper import ModelWrapper
from qonnx.core.onnx_exec import execute_onnx
from qonnx.util.cleanup import cleanup_model
folder = Path(sys.argv[1])
model = ModelWrapper(str(folder / "qonnx.onnx"))
model.set_tensor_shape("x", [2, 3, 8, 8])
model = cleanup_model(model)
found = execute_onnx(model, {model.graph.input[0].name: np.load(folder / "x.npy")})
np.save(folder / "y.npy", found[model.graph.output[0].name])
"""


def _attribute(node: onnx.NodeProto, name: str) -> int:
    return next(entry.i for entry in node.attribute if entry.name == name)
