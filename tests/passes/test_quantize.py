"""Quantize: where quantizers stand, what they are calibrated on, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import fx, nn
from torch.utils.data import DataLoader, TensorDataset

from fxopt.decisions import Capabilities, Policy
from fxopt.errors import DataError, PassError, PolicyError
from fxopt.graph import trace
from fxopt.graph.fake_quantize import ActivationQuantizer, CodebookQuantizer, QuantConv2d, QuantizedLayer
from fxopt.graph.grids import WeightScheme
from fxopt.passes import FoldBatchNorm, Quantize
from fxopt.passes.quantize import CALIBRATION_META
from fxopt.testing import PassConformance, TunablePassConformance
from tests.strategies import Cnn, Transformer, networks, traced

IMAGE = (2, 3, 8, 8)
SILU = ("act_gate", "Q(act_gate)", "act_product", "Q(act_product)")


class TestQuantize(TunablePassConformance):
    pass_type = Quantize
    first: ClassVar = (FoldBatchNorm(),)


class TestQuantizeEverything(PassConformance):
    pass_type = Quantize
    first: ClassVar = (FoldBatchNorm(),)


class Wired(nn.Module):
    """Layers by name, wired by a function."""

    def __init__(self, forward: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.wiring = forward

    def forward(self, x: torch.Tensor) -> Any:
        return self.wiring(self, x)


def conv(inputs: int = 3, outputs: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, **options)


def graph_of(forward: Callable[..., Any], size: tuple[int, ...] = IMAGE, **layers: nn.Module) -> fx.GraphModule:
    torch.manual_seed(0)
    return trace(Wired(forward, **layers).eval(), torch.randn(size))


def quantized(gm: fx.GraphModule, **options: Any) -> fx.GraphModule:
    result = Quantize(**options)(gm)
    assert result.modified
    return result.graph_module


def chain(gm: fx.GraphModule) -> list[str]:
    """What the graph calls in order, quantizers as ``Q(node)``."""
    found = []
    for node in gm.graph.nodes:
        if node.op == "call_module" and isinstance(gm.get_submodule(node.target), ActivationQuantizer):
            found.append(f"Q({node.args[0].name})")
        elif node.op in ("call_module", "call_function"):
            found.append(node.name)
    return found


def sources(gm: fx.GraphModule, name: str) -> list[str]:
    return [source.name for source in next(n for n in gm.graph.nodes if n.name == name).all_input_nodes]


def float_but(*sites: str) -> Policy:
    return Policy({("bits", site): (8, 8) for site in sites})


# Where quantizers stand.


def test_a_quantizer_stands_behind_the_activation_function_and_at_the_input() -> None:
    gm = graph_of(lambda s, x: s.c(s.b(s.a(x))), a=conv(), b=nn.ReLU6(), c=conv())
    assert chain(quantized(gm)) == ["Q(x)", "a", "b", "Q(b)", "c", "Q(c)"]


@pytest.mark.parametrize("act", [nn.ReLU(), nn.ReLU6(), nn.Hardtanh()])
def test_nothing_comes_between_a_layer_and_what_is_fused_into_it(act: nn.Module) -> None:
    gm = graph_of(lambda s, x: s.head(s.act(s.a(x)).flatten(1)), a=conv(), act=act, head=nn.Linear(192, 2))
    assert chain(quantized(gm)) == ["Q(x)", "a", "act", "Q(act)", "flatten", "Q(flatten)", "head"]


@pytest.mark.parametrize("act", [nn.GELU(), nn.Hardswish(), nn.Tanh()])
def test_an_activation_without_a_kernel_is_computed_in_float_between_two_quantizers(act: nn.Module) -> None:
    gm = graph_of(lambda s, x: s.c(s.act(s.a(x))), a=conv(), act=act, c=conv())
    assert chain(quantized(gm)) == ["Q(x)", "a", "Q(a)", "act", "Q(act)", "c", "Q(c)"]


@pytest.mark.parametrize("act", [nn.SiLU(), nn.SiLU(inplace=True)])
def test_silu_becomes_a_product_of_two_quantized_factors(act: nn.Module) -> None:
    gm = graph_of(lambda s, x: s.c(s.act(s.a(x))), a=conv(), act=act, c=conv())
    result = quantized(gm)
    assert chain(result) == ["Q(x)", "a", "Q(a)", *SILU, "c", "Q(c)"]
    x = torch.randn(IMAGE)
    torch.testing.assert_close(result(x), gm(x), rtol=0.1, atol=0.05)


def test_silu_behind_a_float_layer_is_left_alone() -> None:
    gm = graph_of(lambda s, x: s.c(s.act(s.a(x))), a=conv(), act=nn.SiLU(), c=conv())
    assert chain(quantized(gm, policy=float_but("c"))) == ["a", "act", "Q(act)", "c", "Q(c)"]


def test_a_residual_addition_reads_and_writes_integers() -> None:
    gm = graph_of(
        lambda s, x: s.c(torch.relu(s.b(y := s.relu(s.a(x))) + y)), a=conv(), b=conv(), c=conv(), relu=nn.ReLU()
    )
    result = quantized(gm)
    first, last = sources(result, "quantizers_relu")[0], sources(result, "c")[0]
    assert chain(result) == ["Q(x)", "a", first, f"Q({first})", "b", "Q(b)", "add", "relu_1", "Q(relu_1)", "c", "Q(c)"]
    assert last == "quantizers_relu_1"
    for source in sources(result, "add"):
        node = next(n for n in result.graph.nodes if n.name == source)
        assert isinstance(result.get_submodule(node.target), ActivationQuantizer)


@pytest.mark.parametrize(
    ("join", "name"), [(torch.add, "add"), (torch.mul, "mul"), (lambda a, b: torch.cat([a, b], 1), "cat")]
)
def test_what_joins_quantized_values_reads_and_writes_integers(join: Callable[..., Any], name: str) -> None:
    width = 6 if name == "cat" else 3
    gm = graph_of(lambda s, x: s.c(join(s.a(x), s.b(x))), a=conv(), b=conv(), c=conv(width))
    result = quantized(gm)
    assert chain(result) == ["Q(x)", "a", "Q(a)", "b", "Q(b)", name, f"Q({name})", "c", "Q(c)"]
    assert all("quantizers" in source for source in sources(result, name))


def test_an_addition_with_a_float_side_stays_in_float() -> None:
    gm = graph_of(lambda s, x: s.c(s.a(x) + s.b(x)), a=conv(), b=conv(), c=conv())
    assert chain(quantized(gm, policy=float_but("a", "c"))) == ["Q(x)", "a", "Q(a)", "b", "add", "Q(add)", "c", "Q(c)"]
    scaled = graph_of(lambda s, x: s.c(torch.add(s.a(x), s.b(x), alpha=2)), a=conv(), b=conv(), c=conv())
    result = quantized(scaled)
    assert [call for call in chain(result) if "add" in call] == ["add", "Q(add)"]


def test_an_addition_that_no_integer_operator_reads_stays_in_float() -> None:
    gm = graph_of(lambda s, x: s.a(x) + s.b(x), a=conv(), b=conv())
    assert "Q(add)" not in chain(quantized(gm))


def test_pooling_and_reshaping_share_the_grid_of_what_they_read() -> None:
    gm = graph_of(lambda s, x: s.f(s.p(s.a(x)).flatten(1)), a=conv(), p=nn.MaxPool2d(2), f=nn.Linear(48, 4))
    result = quantized(gm)
    assert chain(result) == ["Q(x)", "a", "Q(a)", "p", "Q(p)", "flatten", "Q(flatten)", "f"]
    a, p, flat = (result.get_submodule(f"quantizers.{name}") for name in ("a", "p", "flatten"))
    assert a is p
    assert a is flat
    values = torch.randn(5, 3, 8, 8)
    pooled = nn.functional.max_pool2d(a(values), 2)
    torch.testing.assert_close(p(pooled), pooled, rtol=0.0, atol=0.0)


def test_averages_have_a_grid_of_their_own() -> None:
    gm = graph_of(lambda s, x: s.f(s.a(x).mean((2, 3))), a=conv(), f=nn.Linear(3, 4))
    result = quantized(gm)
    assert chain(result) == ["Q(x)", "a", "Q(a)", "mean", "Q(mean)", "f"]
    assert float(result.get_submodule("quantizers.mean").scale) < float(result.get_submodule("quantizers.a").scale)
    other = graph_of(lambda s, x: s.f(s.a(x).mean(3)), a=conv(), f=nn.Linear(8, 4))
    assert chain(quantized(other)) == ["Q(x)", "a", "Q(a)", "mean", "Q(mean)", "f"]


def test_splits_keep_the_grid() -> None:
    def forward(s: Any, x: torch.Tensor) -> torch.Tensor:
        left, right = s.a(x).chunk(2, 1)
        return s.c(torch.cat([right, left], 1))

    result = quantized(graph_of(forward, a=conv(3, 4), c=conv(4)))
    assert chain(result)[:4] == ["Q(x)", "a", "Q(a)", "chunk"]
    assert result.get_submodule("quantizers.getitem") is result.get_submodule("quantizers.a")


def test_no_quantizer_stands_behind_dropout() -> None:
    gm = graph_of(lambda s, x: s.f(s.d(s.a(x).flatten(1))), a=conv(), d=nn.Dropout(0.5), f=nn.Linear(192, 4))
    assert chain(quantized(gm)) == ["Q(x)", "a", "Q(a)", "flatten", "Q(flatten)", "d", "f"]
    first = graph_of(lambda s, x: s.f(s.d(x)), (2, 4), d=nn.Dropout(0.5), f=nn.Linear(4, 4))
    assert chain(quantized(first)) == ["Q(x)", "d", "f"]


def test_one_quantizer_serves_all_readers_of_a_value() -> None:
    gm = graph_of(lambda s, x: (s.a(x), s.b(x), x.exp()), a=conv(), b=conv())
    result = quantized(gm)
    assert chain(result).count("Q(x)") == 1
    assert sources(result, "exp") == ["x"]


def test_a_float_reader_of_an_integer_value_reads_it_quantized() -> None:
    result = quantized(graph_of(lambda s, x: s.a(x).exp(), a=conv()))
    assert sources(result, "exp") == ["quantizers_a"]


def test_layers_left_in_float_get_no_quantizers() -> None:
    gm = graph_of(lambda s, x: s.c(s.b(s.a(x))), a=conv(), b=conv(), c=conv())
    result = quantized(gm, policy=float_but("b"))
    assert chain(result) == ["a", "Q(a)", "b", "Q(b)", "c"]
    kinds = [isinstance(result.get_submodule(name), QuantizedLayer) for name in "abc"]
    assert kinds == [False, True, False]


def test_a_standalone_activation_function_has_a_grid_of_its_own() -> None:
    gm = graph_of(lambda s, x: s.c(torch.relu(s.p(s.a(x)))), a=conv(), p=nn.MaxPool2d(2), c=conv())
    assert chain(quantized(gm)) == ["Q(x)", "a", "Q(a)", "p", "Q(p)", "relu", "Q(relu)", "c", "Q(c)"]


def test_transposed_convolutions_are_quantized_only_if_the_target_says_so() -> None:
    gm = graph_of(lambda s, x: s.up(s.a(x)), a=conv(), up=nn.ConvTranspose2d(3, 3, 2, 2))
    assert [d.site for d in Quantize().search_space(gm)] == ["a"]
    able = Capabilities({"conv_transpose": ((8, 8), (32, 32))})
    assert [(d.site, d.operator) for d in Quantize().search_space(gm, able)] == [("up", "conv_transpose")]
    assert chain(quantized(gm, policy=float_but("up"))) == ["a", "Q(a)", "up", "Q(up)"]


# Several widths in one graph.


def bits(gm: fx.GraphModule, name: str) -> int:
    return int(gm.get_submodule(f"quantizers.{name}").bits)


def policy_of(**choices: tuple[int, int]) -> Policy:
    return Policy({("bits", site): choice for site, choice in choices.items()})


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
    assert [d.choices for d in Quantize(ends=(2, 2)).search_space(gm, able)] == [((4, 4), (8, 8))] * 3
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


# What it is calibrated on.


def scales(gm: fx.GraphModule) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in gm.state_dict().items()
        if name.endswith(".scale") and "quantizers" in name
    }


def test_every_form_of_loader_gives_the_same_ranges() -> None:
    gm = graph_of(lambda s, x: s.b(torch.relu(s.a(x))), a=conv(), b=conv())
    x, labels = torch.randn(6, 3, 8, 8), torch.arange(6)
    loaders: list[Any] = [
        x,
        (x, labels),
        [x],
        [x[:2], x[2:]],
        [(x, labels)],
        [[x, labels]],
        [{"x": x, "label": labels}],
        [((x,), {})],
        iter([x[:5], x[5:]]),
        DataLoader(TensorDataset(x, labels), batch_size=4),
    ]
    found = [scales(quantized(gm, calibration=loader)) for loader in loaders]
    assert len(found[0]) == 3
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-6)


def test_the_range_is_that_of_all_values_seen() -> None:
    gm = graph_of(lambda s, x: s.a(x), a=conv())
    x = torch.randn(9, 3, 8, 8)
    result = quantized(gm, calibration=[x[:4], x[4:]])
    quantizer = result.get_submodule("quantizers.x")
    assert float(quantizer.minimum) == float(x.min())
    assert float(quantizer.maximum) == float(x.max())
    expected = (float(x.max()) - float(x.min())) / 255
    assert float(quantizer.scale) == pytest.approx(expected, rel=1e-6)
    assert float(result.get_submodule("quantizers.a").maximum) == pytest.approx(float(gm(x).detach().max()), rel=1e-5)


def test_max_batches_stops_reading() -> None:
    gm = graph_of(lambda s, x: s.a(x), a=conv())
    loader = iter([torch.randn(IMAGE) for _ in range(5)])
    meta = quantized(gm, calibration=loader, max_batches=2).meta[CALIBRATION_META]
    assert meta == {"source": "loader", "batches": 2, "samples": 4}
    assert len(list(loader)) >= 2


def test_without_data_a_synthetic_batch_is_used_and_named() -> None:
    gm = graph_of(lambda s, x: s.a(x), a=conv())
    one, same, other = (quantized(gm, seed=seed) for seed in (0, 0, 1))
    assert one.meta[CALIBRATION_META]["source"] == "synthetic: standard normal, seed 0"
    assert scales(one) == scales(same)
    assert scales(one) != scales(other)
    assert CALIBRATION_META not in gm.meta


def test_without_data_ranges_follow_from_batch_norms() -> None:
    norm = nn.BatchNorm2d(4)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 2.0, 0.5, 1.0]))
        norm.bias.copy_(torch.tensor([0.0, 30.0, 0.0, -5.0]))
    gm = graph_of(lambda s, x: s.b(torch.relu(s.n(s.a(x)))), a=conv(3, 4), n=norm, b=conv(4, 4))
    result = quantized(FoldBatchNorm()(gm).graph_module)
    assert result.meta[CALIBRATION_META]["source"].endswith("outputs of 1 layers as their batch norms say")
    # The largest of some thousand values with mean 30 and standard deviation 2.
    assert 34.0 < float(result.get_submodule("quantizers.relu").maximum) < 42.0
    assert not result.get_submodule("a")._forward_hooks


def test_models_of_several_inputs_are_calibrated() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.f = nn.Embedding(5, 4), nn.Linear(4, 2)

        def forward(self, tokens: torch.Tensor, *, weight: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"y": self.f(self.embed(tokens) * weight)}

    example = ((torch.zeros(2, 3, dtype=torch.long),), {"weight": torch.ones(2, 3, 1)})
    gm = trace(Two().eval(), example)
    tokens, weight = torch.randint(0, 5, (4, 3)), torch.rand(4, 3, 1)
    results = [
        quantized(gm, calibration=[((tokens,), {"weight": weight})]),
        quantized(gm, calibration=[{"weight": weight, "tokens": tokens, "label": tokens}]),
    ]
    assert scales(results[0]) == scales(results[1])
    assert quantized(gm).meta[CALIBRATION_META]["source"].startswith("synthetic")
    with pytest.raises(DataError, match="no value for the input 'weight'"):
        Quantize(calibration=[tokens])(gm)


def test_the_quantized_graph_computes_nearly_the_same() -> None:
    gm = graph_of(
        lambda s, x: s.f(s.p(s.b(torch.relu(s.a(x)))).flatten(1)),
        a=conv(3, 16),
        b=conv(16, 16),
        p=nn.AdaptiveAvgPool2d(1),
        f=nn.Linear(16, 5),
    )
    x = torch.randn(32, 3, 8, 8)
    result = quantized(gm, calibration=x)
    with torch.no_grad():
        gap = (result(x) - gm(x)).abs().max() / gm(x).abs().max()
    assert 0.0 < float(gap) < 0.05


def test_constant_values_and_channels_of_zeros_work() -> None:
    gm = graph_of(lambda s, x: s.b(torch.relu(s.a(x) - 100.0)), a=conv(), b=conv())
    with torch.no_grad():
        gm.get_submodule("b").weight[1] = 0.0
    result = quantized(gm, calibration=torch.zeros(4, 3, 8, 8))
    x = torch.zeros(IMAGE)
    torch.testing.assert_close(result(x), gm(x), rtol=1e-2, atol=1e-2)


@settings(max_examples=5)
@given(networks())
def test_random_networks_quantize_and_run(network: Cnn | Transformer) -> None:
    gm, example = traced(network)
    folded = FoldBatchNorm()(gm).graph_module
    result = quantized(folded)
    layers = [d.site for d in Quantize().search_space(folded)]
    assert layers
    for site in layers:
        assert isinstance(result.get_submodule(site), QuantizedLayer)
    for node in result.graph.nodes:
        if node.op == "call_module" and str(node.target) in layers:
            held = node.args[0]
            while held.op == "call_module" and isinstance(result.get_submodule(held.target), nn.Dropout):
                held = held.args[0]
            assert isinstance(result.get_submodule(str(held.target)), ActivationQuantizer)
    with torch.no_grad():
        expected, found = gm(example), result(example)
    assert np.isfinite(found.numpy()).all()
    assert float((found - expected).abs().max()) < 0.5 * float(expected.abs().max()) + 0.1


# What is refused, and leaves everything as it was.


def assert_refused(gm: fx.GraphModule, error: type[Exception], match: str, **options: Any) -> None:
    code, state = gm.code, {name: id(value) for name, value in gm.state_dict(keep_vars=True).items()}
    types = [type(module) for module in gm.modules()]
    with pytest.raises(error, match=match):
        Quantize(**options)(gm)
    assert gm.code == code
    assert {name: id(value) for name, value in gm.state_dict(keep_vars=True).items()} == state
    assert [type(module) for module in gm.modules()] == types


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
    assert_refused(gm, PassError, "'n' follows 'a'.* FoldBatchNorm first")
    assert Quantize()(FoldBatchNorm()(gm).graph_module).modified


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
