"""Quantize: widths, what can be decided, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from fxopt.decisions import Capabilities, Policy
from fxopt.errors import DataError, PassError, PolicyError
from fxopt.export import export_onnx
from fxopt.graph import trace
from fxopt.graph.fake_quantize import CodebookQuantizer, QuantConv2d, QuantizedLayer
from fxopt.graph.grids import WeightScheme
from fxopt.passes import FoldBatchNorm, Quantize
from fxopt.passes.quantize import CALIBRATION_META
from fxopt.testing import PassConformance, TunablePassConformance
from tests.passes.quantizing import (
    IMAGE,
    assert_refused,
    bits,
    chain,
    conv,
    float_but,
    graph_of,
    policy_of,
    quantized,
    sources,
)


class TestQuantize(TunablePassConformance):
    pass_type = Quantize
    first: ClassVar = (FoldBatchNorm(),)


class TestQuantizeEverything(PassConformance):
    pass_type = Quantize
    first: ClassVar = (FoldBatchNorm(),)


# Several widths in one graph.


def test_every_layer_reads_its_own_width() -> None:
    gm = graph_of(lambda s, x: (s.c(y := torch.relu(s.a(x))), s.d(y)), a=conv(), c=conv(), d=conv())
    result = quantized(gm, policy=policy_of(a=(3, 5), c=(2, 4), d=(1, 6)))
    reads = {name: bits(result, sources(result, name)[0].removeprefix("quantizers_")) for name in "acd"}
    assert reads == {"a": 5, "c": 4, "d": 6}
    widths = {name: result.get_submodule(name).weight_quantizer.bits for name in "acd"}
    assert widths == {"a": 3, "c": 2, "d": 1}
    assert {name: result.get_submodule(name).activation_bits for name in "acd"} == reads


def test_what_joins_values_reads_them_at_the_width_that_its_result_is_read_at() -> None:
    gm = graph_of(lambda s, x: s.c(s.p(s.a(x) + s.b(x))), a=conv(), b=conv(), p=nn.MaxPool2d(2), c=conv())
    result = quantized(gm, policy=policy_of(a=(8, 8), b=(4, 2), c=(4, 3)))
    assert [bits(result, name) for name in ("a", "b", "add", "p")] == [3, 3, 3, 3]
    assert result.get_submodule("quantizers.add") is result.get_submodule("quantizers.p")
    assert sorted(bits(result, name) for name in ("x", "x_1")) == [2, 8]


def test_floating_point_reads_integers_at_eight_bits() -> None:
    gm = graph_of(lambda s, x: s.a(x).exp(), a=conv())
    result = quantized(gm, policy=policy_of(a=(4, 4)))
    assert sources(result, "exp") == ["quantizers_a"]
    assert (bits(result, "x"), bits(result, "a")) == (4, 8)


def test_weights_alone_are_quantized_without_data() -> None:
    gm = graph_of(lambda s, x: s.b(s.n(s.a(x))), a=conv(), n=nn.BatchNorm2d(3), b=conv())
    result = quantized(gm, policy=policy_of(a=(4, 32), b=(2, 32)), calibration=iter([]))
    assert chain(result) == ["a", "n", "b"]
    assert [result.get_submodule(name).weight_quantizer.bits for name in "ab"] == [4, 2]
    assert len(result.get_submodule("a").quantized_weight().unique()) <= 3 * 15
    assert result.meta[CALIBRATION_META]["source"].startswith("none")


def test_fewer_bits_come_less_near() -> None:
    gm = graph_of(lambda s, x: s.b(torch.relu(s.a(x))), a=conv(3, 8), b=conv(8, 4))
    x = torch.randn(16, 3, 8, 8)
    gaps = []
    for width in (8, 6, 4, 2):
        result = quantized(gm, policy=policy_of(a=(width, width), b=(width, width)), calibration=x)
        gaps.append(float((result(x) - gm(x)).detach().norm()))
    assert gaps == sorted(gaps)


def test_the_ends_are_pinned() -> None:
    gm = graph_of(lambda s, x: s.c(s.b(s.a(x))), a=conv(), b=conv(), c=conv())
    able = Capabilities({"*": ((4, 4), (8, 8))})
    space = Quantize(ends=(8, 8)).search_space(gm, able)
    assert [d.choices for d in space] == [((8, 8),), ((4, 4), (8, 8)), ((8, 8),)]
    with pytest.raises(
        PassError, match=r"ends is \(2, 2\), which the target cannot run at '.*'; choose one of \(4, 4\)"
    ):
        Quantize(ends=(2, 2)).search_space(gm, able)
    result = quantized(gm, ends=(4, 4))
    assert [result.get_submodule(name).weight_quantizer.bits for name in "abc"] == [4, 8, 4]
    left = quantized(gm, ends=(32, 32))
    assert [isinstance(left.get_submodule(name), QuantizedLayer) for name in "abc"] == [False, True, False]
    assert_refused(gm, PassError, "ends is", ends=(9, 9))


def test_schemes_reach_the_quantizers() -> None:
    gm = graph_of(lambda s, x: s.b(s.a(x)), a=conv(), b=conv())
    activations = {"method": "mse", "power_of_two": True}
    result = quantized(gm, weights=WeightScheme("kmeans"), activations=activations, calibration=torch.randn(IMAGE))
    assert isinstance(result.get_submodule("a").weight_quantizer, CodebookQuantizer)
    assert np.frexp(float(result.get_submodule("quantizers.a").scale))[0] == 0.5
    for options, match in (({"weights": {"bits": 3}}, "its options are method"), ({"activations": "mse"}, "is a str")):
        with pytest.raises(PassError, match=match):
            Quantize(**options)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(), conv()
        self.b.weight = self.a.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.relu(self.a(x)))


def test_a_shared_weight_has_one_width() -> None:
    gm = trace(Tied().eval(), torch.randn(IMAGE))
    assert_refused(gm, PolicyError, "'a' and 'b' share a weight.* 4 and 8 bits", policy=policy_of(a=(4, 8), b=(8, 8)))
    assert Quantize(policy=policy_of(a=(4, 8), b=(4, 2)))(gm).modified
    assert Quantize(policy=policy_of(a=(4, 8)))(gm).modified


# What can be decided.


def test_the_space_follows_the_capabilities() -> None:
    gm = graph_of(lambda s, x: s.f(s.b(s.a(x)).flatten(1)), a=conv(), b=conv(3, 3, groups=3), f=nn.Linear(192, 2))
    space = Quantize().search_space(gm)
    assert [(d.kind, d.site, d.operator) for d in space] == [
        ("bits", "a", "conv"),
        ("bits", "b", "depthwise"),
        ("bits", "f", "linear"),
    ]
    assert all(d.choices == ((8, 8), (32, 32)) and d.default == (32, 32) for d in space)
    assert len(Quantize().search_space(gm, Capabilities())) == 0
    only = Quantize().search_space(gm, Capabilities({"linear": ((8, 8), (32, 32)), "*": ((16, 16), (32, 32))}))
    assert [d.site for d in only] == ["f"]
    low = Quantize().search_space(gm, Capabilities({"conv": ((1, 2), (4, 32)), "*": ((8, 16), (4, 4), (32, 32))}))
    assert [d.choices for d in low] == [((1, 2), (4, 32)), ((4, 4), (32, 32)), ((4, 4), (32, 32))]
    integers = Quantize().search_space(gm, Capabilities({"*": ((8, 8),)}))
    assert [d.choices for d in integers] == [((8, 8),)] * 3


def test_features_describe_the_layer() -> None:
    gm = graph_of(lambda s, x: s.a(x), a=nn.Conv2d(3, 6, (3, 1), stride=2, groups=3))
    features = Quantize().search_space(gm)[0].features
    assert features == {
        **{"is_depthwise": 1, "in_channels": 3, "out_channels": 6, "kernel": 3, "stride": 4, "groups": 3},
        **{"input_size": 64, "positions": 12, "weights": 18, "macs": 216, "index": 0},
    }


def test_a_layer_called_twice_is_decided_once() -> None:
    gm = graph_of(lambda s, x: s.a(torch.relu(s.a(x))), a=conv())
    assert [d.site for d in Quantize().search_space(gm)] == ["a"]
    result = quantized(gm)
    assert isinstance(result.get_submodule("a"), QuantConv2d)
    assert chain(result) == ["Q(x)", "a", "relu", "Q(relu)", "a_1", "Q(a_1)"]


@pytest.mark.parametrize("choice", [(9, 8), (8, 0), (0, 0), (16, 16), (32, 8), (8,)])
def test_bits_that_are_not_on_offer_are_refused(choice: tuple[int, ...]) -> None:
    gm = graph_of(lambda s, x: s.a(x), a=conv())
    with pytest.raises(PolicyError, match="'a'"):
        Quantize(policy=Policy({("bits", "a"): choice}))(gm)


# What is refused, and leaves everything as it was.


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        ([], "loader is empty"),
        (iter([]), "loader is empty"),
        (3, "give an iterable of batches"),
        ([torch.randn(2, 3, 9, 8)], r"batch 0, input 'x': shape \(2, 3, 9, 8\), where .* \(2, 3, 8, 8\)"),
        ([torch.randn(IMAGE), torch.randn(3, 8, 8)], "batch 1, input 'x': shape"),
        ([torch.randn(0, 3, 8, 8)], "it is empty"),
        ([torch.full(IMAGE, float("nan"))], "NaN or infinity"),
        ([torch.full(IMAGE, float("inf"))], "NaN or infinity"),
        ([torch.zeros(IMAGE, dtype=torch.long)], "type torch.int64"),
        (["text"], "is of type str"),
        ([{"y": torch.randn(IMAGE)}], "no value for the input 'x'"),
        ([()], "no value for the input 'x'"),
    ],
)
def test_bad_data_is_refused(loader: Any, message: str) -> None:
    assert_refused(graph_of(lambda s, x: s.a(x), a=conv()), DataError, message, calibration=loader)


def test_values_that_are_not_finite_inside_name_their_place() -> None:
    gm = graph_of(lambda s, x: s.b(s.a(x).log()), a=conv(), b=conv())
    assert_refused(gm, DataError, "The value of 'log' ranges from", calibration=torch.randn(IMAGE))


def test_parameters_that_are_not_finite_are_named() -> None:
    gm = graph_of(lambda s, x: s.b(s.a(x)), a=conv(), b=conv())
    with torch.no_grad():
        gm.get_submodule("b").bias[0] = float("nan")
    assert_refused(gm, DataError, "Parameter 'b.bias'")
    assert Quantize(policy=float_but("a"))(gm).modified


def test_batch_norm_behind_a_layer_asks_for_folding() -> None:
    gm = graph_of(lambda s, x: s.n(s.a(x)), a=conv(), n=nn.BatchNorm2d(3))
    assert_refused(gm, PassError, "'n' follows 'a'.* FoldBatchNorm first[.]")
    assert Quantize()(FoldBatchNorm()(gm).graph_module).modified
    with pytest.raises(PassError, match="FoldBatchNorm first, on the graph in eval mode"):
        Quantize()(FoldBatchNorm()(gm.train()).graph_module)


def test_batch_norm_that_cannot_be_folded_stays_in_floats(tmp_path: Path) -> None:
    """Before the activation: what the norm reads is added to later."""
    gm = graph_of(
        lambda s, x: (lambda y: y + s.b(torch.relu(s.n(y))))(s.a(x)),
        a=conv(),
        b=conv(),
        n=nn.BatchNorm2d(3),
    )
    folded = FoldBatchNorm()(gm).graph_module
    quantized_graph = Quantize(calibration=torch.randn(8, *IMAGE[1:]))(folded).graph_module
    assert type(quantized_graph.get_submodule("n")) is nn.BatchNorm2d
    layers = [name for name, one in quantized_graph.named_modules() if isinstance(one, QuantizedLayer)]
    assert layers == ["a", "b"]
    example = torch.randn(IMAGE)
    away = (quantized_graph(example) - folded(example)).abs().max()
    assert away < 0.1 * folded(example).abs().max()
    assert export_onnx(quantized_graph, tmp_path / "m.onnx", example).integers_differing is not None


def test_quantizing_what_is_partly_quantized_is_refused() -> None:
    gm = graph_of(lambda s, x: s.b(s.a(x)), a=conv(), b=conv())
    result = quantized(gm, policy=float_but("a"))
    assert_refused(result, PassError, "quantized already", policy=float_but("b"))
    assert not Quantize()(quantized(gm)).modified


def test_options_out_of_range_are_refused() -> None:
    assert_refused(graph_of(lambda s, x: s.a(x), a=conv()), PassError, "max_batches is 0", max_batches=0)


def test_nothing_to_quantize_is_no_change() -> None:
    gm = graph_of(lambda s, x: x.relu())
    assert not Quantize()(gm).modified
    half = trace(nn.Sequential(nn.Linear(3, 2)).double().eval(), torch.randn(2, 3, dtype=torch.float64))
    assert not Quantize()(half).modified


def test_parameters_are_shared_with_the_model() -> None:
    model = nn.Sequential(conv(), nn.ReLU(), conv()).eval()
    keys = set(model.state_dict())
    result = quantized(trace(model, torch.randn(IMAGE)))
    assert result.get_submodule("0").weight is model[0].weight
    assert keys < set(result.state_dict())
    assert type(model[0]) is nn.Conv2d
    assert set(model.state_dict()) == keys


def test_quantization_aware_training_lowers_the_loss() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))
    torch.manual_seed(0)
    x = torch.randn(64, 8)
    y = x[:, :1] * x[:, 1:2]
    gm = quantized(trace(model.eval(), x[:2]), calibration=x).train()
    optimizer = torch.optim.Adam(gm.parameters(), lr=0.01)
    losses = []
    for _ in range(60):
        loss = nn.functional.mse_loss(gm(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
