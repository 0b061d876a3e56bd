"""export_onnx: what stands in the file, that it computes what the graph computes, and that a bad one leaves nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from onnx import numpy_helper
from torch import fx, nn

from fxopt.decisions import Policy
from fxopt.errors import ExportError, ParityError
from fxopt.export import _export, export_onnx
from fxopt.export._parity import compare, random_like
from fxopt.export._runtime import make_session
from fxopt.graph import normalize, trace
from fxopt.graph.fake_quantize import ActivationQuantizer
from fxopt.passes import FoldBatchNorm, Quantize
from tests.strategies import Cnn, Transformer, networks, traced
from tests.wiring import Wired

IMAGE = (2, 3, 8, 8)


def conv(inputs: int = 3, outputs: int = 8, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, **options)


def quantized(
    forward: Callable[..., Any], size: tuple[int, ...] = IMAGE, **layers: nn.Module
) -> tuple[fx.GraphModule, Any]:
    torch.manual_seed(0)
    example = torch.randn(size)
    gm = trace(Wired(forward, **layers).eval(), example)
    return Quantize(calibration=torch.randn(16, *size[1:]))(gm).graph_module, example


def operators(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def initializers(path: Path) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


def run(path: Path, *inputs: torch.Tensor) -> list[np.ndarray]:
    session = make_session(path)
    return session.run(None, {value.name: x.numpy() for value, x in zip(session.get_inputs(), inputs, strict=True)})


def small_network() -> tuple[fx.GraphModule, Any]:
    return quantized(
        lambda s, x: s.f(s.b(s.act(s.a(x))).mean((2, 3))), a=conv(), act=nn.ReLU(), b=conv(8, 16), f=nn.Linear(16, 5)
    )


def test_integers_in_the_file_are_those_of_the_graph(tmp_path: Path) -> None:
    gm, example = small_network()
    report = export_onnx(gm, tmp_path / "m.onnx", example)
    found = initializers(tmp_path / "m.onnx")
    layer = gm.get_submodule("a")
    np.testing.assert_array_equal(found["a.weight"], layer.weight_quantizer.integers(layer.weight).numpy())
    np.testing.assert_array_equal(found["a.weight_scale"], layer.weight_quantizer.scale.numpy())
    assert not found["a.weight_zero_point"].any()
    scale = found["quantizers.x.scale"] * found["a.weight_scale"]
    np.testing.assert_array_equal(found["a.bias_scale"], scale)
    np.testing.assert_array_equal(found["a.bias"], np.rint(layer.bias.detach().numpy() / scale.astype(np.float64)))
    kinds = {name: str(found[name].dtype) for name in ("a.weight", "a.bias", "f.weight", "quantizers.x.zero_point")}
    assert kinds == {"a.weight": "int8", "a.bias": "int32", "f.weight": "int8", "quantizers.x.zero_point": "uint8"}
    assert report.integer_nodes == 4
    assert report.float_nodes == 0
    assert dict(report.operators)["QLinearConv"] == 2
    assert report.integers_differing is not None
    assert report.integers_differing < 0.01


def test_the_file_has_names_and_versions_that_people_and_runtimes_know(tmp_path: Path) -> None:
    gm, example = small_network()
    report = export_onnx(gm, tmp_path / "m.onnx", example)
    model = onnx.load(tmp_path / "m.onnx")
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 21)]
    assert model.ir_version == 10
    assert [value.name for value in (*model.graph.input, *model.graph.output)] == ["x", "output"]
    for value in (*model.graph.input, *model.graph.output):
        assert value.type.tensor_type.shape.dim[0].dim_param == "batch"
    assert str(Path(__file__).name) not in str(model)
    assert all(node.name for node in model.graph.node)
    assert report.file_bytes == (tmp_path / "m.onnx").stat().st_size
    assert report.batches == (2, 3)
    assert report.notes == ()


@pytest.mark.parametrize("opset", [18, 24])
def test_other_opsets_load(tmp_path: Path, opset: int) -> None:
    gm, example = small_network()
    report = export_onnx(gm, tmp_path / "m.onnx", example, opset=opset)
    model = onnx.load(tmp_path / "m.onnx")
    assert model.opset_import[0].version == report.opset == opset
    assert report.integer_nodes == 4


def test_weights_shrink_to_a_quarter(tmp_path: Path) -> None:
    gm, example = quantized(lambda s, x: s.b(s.a(x).relu()), (2, 64), a=nn.Linear(64, 512), b=nn.Linear(512, 256))
    whole = export_onnx(gm, tmp_path / "float.onnx", example, format="float", check=False)
    packed = export_onnx(gm, tmp_path / "int8.onnx", example, check=False)
    assert 3.7 < whole.file_bytes / packed.file_bytes < 4.1
    assert packed.max_abs_diff is None
    assert packed.batches == ()


def test_the_float_format_holds_the_weights_of_the_grid(tmp_path: Path) -> None:
    gm, example = small_network()
    report = export_onnx(gm, tmp_path / "m.onnx", example, format="float")
    assert report.integer_nodes == 0
    assert report.relative is not None
    assert report.relative < 1e-5
    assert not {"QuantizeLinear", "DequantizeLinear"} & set(operators(tmp_path / "m.onnx"))
    layer: Any = gm.get_submodule("a")
    held = layer.quantized_weight().detach()
    np.testing.assert_array_equal(initializers(tmp_path / "m.onnx")["a.weight"], held)
    assert not torch.equal(held, layer.weight)
    assert isinstance(gm.get_submodule("quantizers.x"), ActivationQuantizer)


NETWORKS: dict[str, tuple[Callable[..., Any], dict[str, nn.Module], dict[str, int]]] = {
    "relu6 and depthwise": (
        lambda s, x: s.b(s.act(s.a(x))),
        {"a": conv(), "act": nn.ReLU6(), "b": conv(8, 8, groups=8)},
        {"QLinearConv": 2},
    ),
    "residual": (
        lambda s, x: s.c(torch.relu(s.b(y := s.act(s.a(x))) + y)),
        {"a": conv(), "act": nn.ReLU(), "b": conv(8), "c": conv(8)},
        {"QLinearConv": 3, "QLinearAdd": 1},
    ),
    "concatenation": (
        lambda s, x: s.c(torch.cat([s.a(x), s.b(x)], 1)),
        {"a": conv(), "b": conv(), "c": conv(16)},
        {"QLinearConv": 3, "QLinearConcat": 1},
    ),
    "pooling": (
        lambda s, x: s.f(s.avg(s.max(s.a(x))).flatten(1)),
        {"a": conv(), "max": nn.MaxPool2d(2), "avg": nn.AvgPool2d(2), "f": nn.Linear(32, 5)},
        {"QLinearConv": 1, "NhwcMaxPool": 1, "QLinearAveragePool": 1, "QGemm": 1},
    ),
    "global pooling": (
        lambda s, x: s.f(s.p(s.a(x)).flatten(1)),
        {"a": conv(), "p": nn.AdaptiveAvgPool2d(1), "f": nn.Linear(8, 5)},
        {"QLinearConv": 1, "QLinearGlobalAveragePool": 1, "QGemm": 1},
    ),
    "silu and squeeze": (
        lambda s, x: s.c((y := s.act(s.a(x))) * torch.sigmoid(s.g(y.mean((2, 3), keepdim=True)))),
        {"a": conv(), "act": nn.SiLU(), "g": nn.Conv2d(8, 8, 1), "c": conv(8)},
        {"QLinearConv": 3, "QLinearSigmoid": 2, "QLinearMul": 2, "QLinearGlobalAveragePool": 1},
    ),
    "float activation function": (
        lambda s, x: s.c(s.act(s.a(x))),
        {"a": conv(), "act": nn.GELU(), "c": conv(8)},
        {"QLinearConv": 2, "Gelu": 1},
    ),
    "channel shuffle": (
        lambda s, x: s.c(s.a(x).view(-1, 2, 4, 8, 8).transpose(1, 2).reshape(-1, 8, 8, 8)),
        {"a": conv(), "c": conv(8, 8, groups=2)},
        {"QLinearConv": 2},
    ),
    "split": (
        lambda s, x: s.c(torch.cat(s.a(x).chunk(2, 1)[::-1], 1)),
        {"a": conv(), "c": conv(8)},
        {"QLinearConv": 2, "QLinearConcat": 1},
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_integer_kernels_run_unbroken(name: str, tmp_path: Path) -> None:
    forward, layers, wanted = NETWORKS[name]
    report = export_onnx(*_reordered(quantized(forward, **layers), tmp_path))
    found = dict(report.operators)
    assert {operator: found.get(operator, 0) for operator in wanted} == wanted
    floats = {operator for operator in ("Conv", "Gemm", "Add", "Concat", "MaxPool", "FusedConv") if operator in found}
    assert not floats


def _reordered(made: tuple[fx.GraphModule, Any], folder: Path) -> tuple[fx.GraphModule, Path, Any]:
    return made[0], folder / "m.onnx", made[1]


@pytest.mark.parametrize(
    ("layer", "size"),
    [
        (nn.Conv1d(3, 8, 3), (2, 3, 9)),
        (nn.Conv3d(3, 8, 2), (2, 3, 4, 4, 4)),
        (nn.Linear(6, 8, bias=False), (2, 5, 6)),
        (nn.Linear(6, 8), (2, 5, 6)),
        (nn.Conv2d(4, 8, 3, stride=2, dilation=2, groups=2, bias=False), (2, 4, 9, 9)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_layer_computes_on_integers(layer: nn.Module, size: tuple[int, ...], tmp_path: Path) -> None:
    gm, example = quantized(lambda s, x: s.layer(x), size, layer=layer)
    report = export_onnx(gm, tmp_path / "m.onnx", example)
    assert report.integer_nodes == 1
    assert initializers(tmp_path / "m.onnx")["layer.weight"].dtype == np.int8


def test_heads_are_merged_whatever_strides_attention_has(tmp_path: Path) -> None:
    def attend(self: Any, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).view(x.shape[0], 5, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind()
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=self.bias.expand(x.shape[0], -1, -1, -1))
        return self.out(mixed.reshape(x.shape[0], -1, 5, 4).transpose(1, 2).contiguous().reshape(x.shape[0], 5, -1))

    torch.manual_seed(0)
    example = torch.randn(2, 5, 8)
    model = Wired(attend, qkv=nn.Linear(8, 24), out=nn.Linear(8, 8))
    model.register_parameter("bias", nn.Parameter(torch.randn(1, 2, 5, 5)))
    report = export_onnx(trace(model.eval(), example), tmp_path / "m.onnx", example)
    assert report.relative < 1e-5
    assert not operators(tmp_path / "m.onnx")["Identity"]


def test_transposed_convolutions_are_right(tmp_path: Path) -> None:
    torch.manual_seed(0)
    example = torch.randn(2, 4, 5, 5)
    gm = trace(nn.Sequential(nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2)).eval(), example)
    gm = Quantize(policy=Policy({("bits", "0"): (8, 8)}), calibration=example)(gm).graph_module
    export_onnx(gm, tmp_path / "m.onnx", example)
    assert initializers(tmp_path / "m.onnx")["0.weight"].dtype == np.int8


def test_mixed_precision_keeps_floats_where_the_policy_says_so(tmp_path: Path) -> None:
    torch.manual_seed(0)
    example = torch.randn(IMAGE)
    gm = trace(nn.Sequential(conv(), nn.ReLU(), conv(8, 8), nn.ReLU(), conv(8, 4)).eval(), example)
    gm = Quantize(policy=Policy({("bits", "2"): (8, 8)}))(gm).graph_module
    report = export_onnx(gm, tmp_path / "m.onnx", example)
    found = initializers(tmp_path / "m.onnx")
    assert [str(found[f"{site}.weight"].dtype) for site in (0, 2, 4)] == ["float32", "int8", "float32"]
    assert report.integer_nodes == 1
    assert any("synthetic" in note for note in report.notes)


def test_several_inputs_and_nested_outputs_keep_their_names(tmp_path: Path) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.f = nn.Embedding(5, 4), nn.Linear(4, 3)

        def forward(self, tokens: torch.Tensor, *, weight: torch.Tensor) -> dict[str, Any]:
            y = self.f(self.embed(tokens) * weight)
            return {"scores": y, "parts": (y.exp(), {"sum": y.sum(1)})}

    example = ((torch.randint(0, 5, (2, 3)),), {"weight": torch.rand(2, 3, 1)})
    gm = Quantize()(trace(Two().eval(), example)).graph_module
    export_onnx(gm, tmp_path / "m.onnx", example)
    graph = onnx.load(tmp_path / "m.onnx").graph
    assert [value.name for value in graph.input] == ["tokens", "weight"]
    assert [value.name for value in graph.output] == ["scores", "parts_0", "parts_1_sum"]
    tokens, weight = torch.randint(0, 5, (7, 3)), torch.rand(7, 3, 1)
    expected = gm(tokens, weight=weight)
    found = run(tmp_path / "m.onnx", tokens, weight)
    np.testing.assert_allclose(found[0], expected["scores"].detach(), atol=1e-5)
    np.testing.assert_allclose(found[2], expected["parts"][1]["sum"].detach(), atol=1e-5)


def test_a_shared_layer_stores_its_weight_once(tmp_path: Path) -> None:
    gm, example = quantized(lambda s, x: s.a(torch.relu(s.a(x))), a=conv(3, 3))
    report = export_onnx(gm, tmp_path / "m.onnx", example)
    weights = [name for name in initializers(tmp_path / "m.onnx") if name.startswith("a.weight")]
    assert sorted(weights) == ["a.weight", "a.weight_scale", "a.weight_zero_point"]
    assert report.integer_nodes == 2


def test_a_weight_that_is_read_as_floats_too_keeps_both_forms(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.f = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
            self.f.weight = self.embed.weight

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.f(self.embed(tokens).mean(1))

    example = torch.randint(0, 7, (2, 3))
    gm = Quantize()(trace(Tied().eval(), example)).graph_module
    report = export_onnx(gm, tmp_path / "m.onnx", example)
    assert sorted(str(a.dtype) for a in initializers(tmp_path / "m.onnx").values() if a.shape == (7, 4)) == [
        "float32",
        "int8",
    ]
    assert report.integer_nodes == 1


def test_a_large_bias_on_a_channel_of_tiny_weights_survives(tmp_path: Path) -> None:
    layer = conv(3, 4)
    with torch.no_grad():
        layer.weight[1] *= 1e-9
        layer.weight[2] = 0.0
        layer.bias.copy_(torch.tensor([0.5, 3.0, -2.0, 0.0]))
    gm, example = quantized(lambda s, x: s.a(x), a=layer)
    export_onnx(gm, tmp_path / "m.onnx", example)
    found = run(tmp_path / "m.onnx", example)[0]
    np.testing.assert_allclose(found[:, 1], 3.0, atol=0.05)
    np.testing.assert_allclose(found[:, 2], -2.0, atol=0.05)


def test_a_bias_that_integers_are_too_coarse_for_stays_a_float(tmp_path: Path) -> None:
    """A channel of huge weights, of which a clip leaves nothing but what the bias decides."""
    layer, last = nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.Conv2d(4, 3, 1)
    with torch.no_grad():
        layer.weight[1] = -1e5
        layer.bias.copy_(torch.tensor([0.5, 5.9, -2.0, 0.1]))
    gm, example = quantized(lambda s, x: s.c(nn.functional.relu6(s.b(s.a(x).relu()))), a=conv(3, 4), b=layer, c=last)
    with torch.no_grad():
        gm.get_submodule("a").bias[1] = -100.0  # Nothing comes in, so that the bias of 5.9 comes out.
        wanted = gm(example).numpy()
    report = export_onnx(gm, tmp_path / "m.onnx", example)
    assert report.max_abs_diff is not None
    np.testing.assert_allclose(run(tmp_path / "m.onnx", example)[0], wanted, atol=0.05 * np.abs(wanted).max())
    kernels = {one.layer: one.integer for one in report.kernels if one.layer}
    assert [kernels.get(site) for site in ("a", "b", "c")] == [True, False, True]
    assert initializers(tmp_path / "m.onnx")["b.bias"].dtype == np.float32


def test_what_rounding_a_bias_changes_is_told(tmp_path: Path) -> None:
    """Products that cancel leave the bias, which is less than half of the least product."""
    layer = nn.Linear(2, 3)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[100.0, -100.0]] * 3))
        layer.bias.copy_(torch.tensor([0.001, -0.002, 0.0015]))
    torch.manual_seed(0)
    example = torch.randn(2, 1).repeat(1, 2)
    gm = Quantize(calibration=example)(trace(nn.Sequential(layer).eval(), example)).graph_module
    report = export_onnx(gm, tmp_path / "m.onnx", example)
    with torch.no_grad():
        away = np.abs(run(tmp_path / "m.onnx", example)[0] - gm(example).numpy()).max()
    assert away == pytest.approx(0.002, rel=0.1)
    assert report.max_abs_diff is not None
    assert report.max_abs_diff >= away * (1.0 - 1e-6)
    assert any("Judge accuracy by the file" in note for note in report.notes)
    report = export_onnx(small_network()[0], tmp_path / "m.onnx", torch.randn(IMAGE))
    assert not any("Judge accuracy by the file" in note for note in report.notes)


def test_a_plain_module_is_traced_and_left_in_its_mode(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(conv(), nn.BatchNorm2d(8), nn.Dropout(), nn.ReLU()).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = export_onnx(model, tmp_path / "m.onnx", torch.randn(1, 3, 8, 8))
    assert report.max_abs_diff is not None
    assert report.max_abs_diff < 1e-5
    assert "BatchNormalization" not in operators(tmp_path / "m.onnx")
    assert all(module.training for module in model.modules())
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0.0, atol=0.0)


def test_nothing_is_printed_logged_or_warned(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    gm, example = small_network()
    caplog.clear()
    export_onnx(gm, tmp_path / "m.onnx", example)
    assert capfd.readouterr() == ("", "")
    assert [record for record in caplog.records if record.levelname not in ("DEBUG", "INFO")] == []


@settings(max_examples=3)
@given(networks())
def test_random_networks_pass_their_own_check(
    tmp_path_factory: pytest.TempPathFactory, network: Cnn | Transformer
) -> None:
    gm, example = traced(network)
    path = tmp_path_factory.mktemp("random") / "m.onnx"
    report = export_onnx(Quantize()(FoldBatchNorm()(gm).graph_module).graph_module, path, example)
    assert report.integer_nodes
    assert report.integers_differing is not None
    assert report.integers_differing < 0.02


# What goes wrong leaves nothing behind.


def corrupted(model: onnx.ModelProto, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    tensor = next(t for t in model.graph.initializer if t.name == name)
    tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor)), name))


def damage(monkeypatch: pytest.MonkeyPatch, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    honest = _export.form_of("qdq")

    def damaging(marked: Any, opset: int) -> Any:
        made = honest.rewrite(marked, opset)
        corrupted(marked.model, name, change)
        return made

    monkeypatch.setattr(_export, "form_of", lambda _: dataclasses.replace(honest, rewrite=damaging))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("a.weight", lambda a: -a),
        ("a.weight_scale", lambda a: a * np.float32(1.1)),
        ("quantizers.act.scale", lambda a: a * np.float32(0.97)),
        ("quantizers.x.zero_point", lambda a: (a // 2).astype(np.uint8)),
        ("f.bias", lambda a: a + 500),
    ],
)
def test_a_damaged_file_is_caught_and_leaves_nothing(
    name: str, change: Callable[[np.ndarray], np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gm, example = small_network()
    damage(monkeypatch, name, change)
    (tmp_path / "m.onnx").write_text("what stood here before")
    with pytest.raises(ParityError, match="does not compute what its graph computes") as caught:
        export_onnx(gm, tmp_path / "m.onnx", example)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]
    assert (tmp_path / "m.onnx").read_text() == "what stood here before"


def test_a_damaged_float_file_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damage(monkeypatch, "0.weight", lambda a: a * np.float32(1.01))
    with pytest.raises(ParityError):
        export_onnx(nn.Sequential(nn.Linear(3, 2)), tmp_path / "m.onnx", torch.randn(2, 3))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "onnx"}, "Unknown format"),
        ({"opset": 12}, "choose one of 18"),
        ({"opset": 99}, "choose one of 18"),
    ],
)
def test_options_are_checked_first(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=message):
        export_onnx(nn.Linear(3, 2), tmp_path / "m.onnx", torch.randn(2, 3), **options)


def test_folders_that_cannot_be_written_are_an_export_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(ExportError, match="Cannot write"):
        export_onnx(nn.Sequential(nn.Linear(3, 2)), tmp_path / "file" / "m.onnx", torch.randn(2, 3))


def test_a_full_disk_is_an_export_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(ExportError, match="No space left"):
        export_onnx(nn.Sequential(nn.Linear(3, 2)), tmp_path / "m.onnx", torch.randn(2, 3))
    assert list(tmp_path.iterdir()) == []


def test_models_too_large_for_one_file_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_export, "_MAX_BYTES", 30)
    with pytest.raises(ExportError, match=r"single ONNX file at most 2\.1 GB"):
        export_onnx(nn.Sequential(nn.Linear(3, 2)), tmp_path / "m.onnx", torch.randn(2, 3))


def test_what_the_runtime_does_not_compute_in_is_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 2)).to(torch.bfloat16)
    with pytest.raises(ExportError, match="bfloat16"):
        export_onnx(model, tmp_path / "m.onnx", torch.randn(2, 3, dtype=torch.bfloat16))


def test_convolutions_in_double_precision_are_refused_where_the_file_is_run(tmp_path: Path) -> None:
    model, example = nn.Sequential(conv()).double().eval(), torch.randn(IMAGE, dtype=torch.double)
    with pytest.raises(ExportError, match=r"convolutions in float64, .*; convert it with \.float\(\)"):
        export_onnx(model, tmp_path / "m.onnx", example)
    assert export_onnx(model, tmp_path / "m.onnx", example, check=False).file_bytes
    linear = nn.Sequential(nn.Linear(3, 2)).double().eval()
    assert export_onnx(linear, tmp_path / "l.onnx", torch.randn(2, 3, dtype=torch.double)).max_abs_diff is not None


def test_an_operator_without_a_kernel_in_the_models_type_is_named(tmp_path: Path) -> None:
    model = nn.Sequential(nn.AvgPool2d(2)).double().eval()
    with pytest.raises(ExportError, match=r"no kernel for AveragePool in the types .* float64, convert with \.float"):
        export_onnx(model, tmp_path / "m.onnx", torch.randn(IMAGE, dtype=torch.double))


@pytest.mark.parametrize(
    ("kind", "off", "caught"),
    [
        *((torch.half, 1.008, False), (torch.half, 1.03, True)),
        *((torch.float32, 1.0008, False), (torch.float32, 1.0012, True)),
    ],
)
def test_a_file_is_as_near_as_its_type_allows(
    kind: torch.dtype, off: float, caught: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage(monkeypatch, "0.weight", lambda a: (a.astype(np.float64) * off).astype(a.dtype))
    model = nn.Sequential(nn.Linear(3, 2, bias=False)).to(kind)
    expected = pytest.raises(ParityError) if caught else contextlib.nullcontext()
    with expected:
        export_onnx(model, tmp_path / "m.onnx", torch.randn(2, 3).to(kind))


def test_example_inputs_have_to_fit_the_graph(tmp_path: Path) -> None:
    gm = trace(nn.Sequential(nn.Linear(3, 2)), torch.randn(2, 3))
    with pytest.raises(ExportError, match="example_inputs holds 2 values"):
        export_onnx(gm, tmp_path / "m.onnx", (torch.randn(2, 3), torch.randn(2, 3)))


def test_importing_the_package_loads_no_runtime() -> None:
    code = "import sys, fxopt.export; sys.exit(bool({'onnx', 'onnxruntime', 'onnxscript'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_agreement_is_a_part_of_all_positions(tmp_path: Path) -> None:
    """Batches of different sizes count by what they hold."""
    gm, example = small_network()
    report = export_onnx(gm, tmp_path / "m.onnx", example)
    graph = trace(nn.Sequential(nn.Flatten(), nn.Linear(192, 5)).eval(), torch.randn(IMAGE))
    assert report.batches == (2, 3)
    trials = [random_like(normalize(example), batch) for batch in (2, 3)]
    found = compare(gm, str(tmp_path / "m.onnx"), trials, quantized=True, given=graph)
    with torch.no_grad():
        agree = [
            (graph(*trial.args).numpy().argmax(1) == run(tmp_path / "m.onnx", *trial.args)[0].argmax(1)).tolist()
            for trial in trials
        ]
    assert found.top1_agreement == pytest.approx(np.mean(agree[0] + agree[1]))
    assert found.positions == 5
