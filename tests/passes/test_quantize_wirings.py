"""Quantize: where quantizers stand, whatever the wiring."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fxopt.decisions import Capabilities
from fxopt.graph.fake_quantize import ActivationQuantizer, QuantizedLayer
from fxopt.passes import Quantize
from tests.passes.quantizing import (
    IMAGE,
    chain,
    conv,
    float_but,
    graph_of,
    quantized,
    sources,
)

SILU = ("act_gate", "Q(act_gate)", "act_product", "Q(act_product)")


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
