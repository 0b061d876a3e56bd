"""Activations that are spelled out become one operator, however they are written, and nothing else does."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from fxopt.graph import trace
from fxopt.passes import Canonicalize
from fxopt.testing import assert_equivalent

Function = Callable[[torch.Tensor], torch.Tensor]

SPELLED: dict[str, tuple[str, Function]] = {
    "relu6 of a shift, product, sixth": ("hardswish", lambda x: x * functional.relu6(x + 3.0) / 6.0),
    "product with a gate": ("hardswish", lambda x: x * (functional.relu6(x + 3) / 6)),
    "a sixth as a factor": ("hardswish", lambda x: x * functional.hardtanh(x + 3, 0.0, 6.0) * (1 / 6)),
    "clamp": ("hardswish", lambda x: torch.clamp(x + 3, 0, 6).div(6) * x),
    "product with hard-sigmoid": ("hardswish", lambda x: x * functional.hardsigmoid(x)),
    "in place": ("hardswish", lambda x: x.mul_(functional.relu6(x + 3)).div_(6)),
    "hard-sigmoid": ("hardsigmoid", lambda x: functional.relu6(x + 3.0, inplace=True) / 6.0),
    "product with sigmoid": ("silu", lambda x: x * torch.sigmoid(x)),
    "the other way round": ("silu", lambda x: x.sigmoid().mul_(x)),
    "erf": ("gelu", lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2.0)))),
    "erf with rounded numbers": ("gelu", lambda x: x * 0.5 * (1.0 + torch.erf(x * 0.70710678))),
    "erfc": ("gelu", lambda x: 0.5 * x * torch.erfc(-x / math.sqrt(2.0))),
    "logarithm": ("mish", lambda x: x * torch.tanh(torch.log1p(torch.exp(x)))),
    "tanh of softplus": ("mish", lambda x: x * torch.tanh(functional.softplus(x))),
    "logistic": ("sigmoid", lambda x: 1 / (1 + torch.exp(-x))),
    "tanh of a half": ("sigmoid", lambda x: 0.5 * torch.tanh(0.5 * x) + 0.5),
    "the other side": ("sigmoid", lambda x: 1 - torch.sigmoid(-x)),
    "line with rounded numbers": ("hardsigmoid", lambda x: (0.16666667 * x + 0.5).clamp(0, 1)),
    "mean with its absolute value": ("relu", lambda x: (x + x.abs()) / 2),
    "clamped below": ("relu", lambda x: x.clamp(min=0)),
    "clamped at zero and six": ("relu6", lambda x: x.clamp(0, 6)),
}
OTHERS: dict[str, Function] = {
    "a fifth": lambda x: x * functional.relu6(x + 3) / 5,
    "a steeper gate": lambda x: x * torch.sigmoid(1.702 * x),
    "of two values": lambda x: x * torch.sigmoid(x.flip(1)),
    "a gate of one pixel": lambda x: x * torch.sigmoid(x.mean((2, 3), keepdim=True)),
    "a wider clamp": lambda x: x.clamp(0, 7),
    "a limit of float16": lambda x: x.clamp(0, 65504.0),
    "a limit beyond it": lambda x: x.clamp(0, 1e20),
    "without a NaN": lambda x: torch.nan_to_num(torch.relu(x)),
    "a threshold just above zero": lambda x: functional.threshold(x, 1e-6, 0.0),
    "a sum that runs over channels": lambda x: x * torch.sigmoid(x.cumsum(1)),
    "a gate that learns nothing": lambda x: x * torch.sigmoid(x.detach()),
    "gradients that pass straight through": lambda x: x + (torch.relu(x) - x).detach(),
    "a cast to fewer digits": lambda x: x * torch.sigmoid(x.half()).to(x.dtype),
    "dropout before the gate": lambda x: x * torch.sigmoid(functional.dropout(x, 0.5, training=True)),
    "a random one": lambda x: torch.rand_like(x) * torch.sigmoid(x),
}


class Net(nn.Module):
    def __init__(self, function: Function) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self.conv(x)).mean((2, 3))


class Plain(nn.Module):
    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


def names(graph: torch.fx.GraphModule) -> list[str]:
    return [str(node.target) for node in graph.graph.nodes if node.op in ("call_function", "call_module")]


def gradient(graph: torch.fx.GraphModule) -> torch.Tensor:
    inputs = (4 * torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(1))).requires_grad_()
    (found,) = torch.autograd.grad(graph(inputs).square().sum(), [inputs])
    return found


@pytest.mark.parametrize("name", SPELLED)
def test_one_operator_computes_what_was_spelled_out(name: str) -> None:
    wanted, function = SPELLED[name]
    torch.manual_seed(0)
    graph = trace(Net(function).eval(), torch.randn(2, 3, 5, 5))
    result = Canonicalize()(graph)
    assert result.modified
    assert names(result.graph_module) == ["conv", f"aten.{wanted}.default", "aten.mean.dim"]
    assert_equivalent(graph, result.graph_module, 4 * torch.randn(2, 3, 5, 5), batch=3)
    assert not Canonicalize()(result.graph_module).modified
    assert names(Canonicalize(join=False)(graph).graph_module) != names(result.graph_module)
    torch.testing.assert_close(gradient(result.graph_module), gradient(graph), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", OTHERS)
def test_what_computes_something_else_stays(name: str) -> None:
    torch.manual_seed(0)
    graph = trace(Net(OTHERS[name]).eval(), torch.randn(2, 3, 5, 5))
    result = Canonicalize()(graph)
    assert names(result.graph_module) == names(graph)


@pytest.mark.parametrize("least", [1e-5, 1e-6, 1e-7, 1e-12, 1e-20, 1e-38])
@pytest.mark.parametrize(
    "function",
    [
        lambda x, least: torch.relu(x) + least,
        lambda x, least: x.clamp(min=least),
        lambda x, least: torch.sigmoid(x).clamp(min=least),
        lambda x, least: torch.sigmoid(x) + least,
        lambda x, least: functional.relu6(x) + least,
    ],
)
def test_what_is_kept_from_zero_stays_above_it(function: Callable[..., torch.Tensor], least: float) -> None:
    """Behind it a logarithm or a quotient is finite, and so it is when the graph was made canonical."""
    graph = trace(Net(lambda x: function(x, least).log()).eval(), torch.randn(2, 3, 5, 5))
    result = Canonicalize()(graph).graph_module
    inputs = 1e3 * torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    assert_equivalent(graph, result, inputs, batch=3)
    assert bool(result(inputs).isfinite().all())


@settings(max_examples=12, deadline=None)
@given(
    name=st.sampled_from(sorted(SPELLED)),
    scale=st.floats(0.5, 2.0),
    shift=st.floats(-1.0, 1.0),
    part=st.sampled_from(["inside", "outside"]),
)
def test_another_constant_is_another_function(name: str, scale: float, shift: float, part: str) -> None:
    """Whatever is joined computes the same: a spelling with a scale and a shift, before or behind it."""
    _, function = SPELLED[name]

    def moved(x: torch.Tensor) -> torch.Tensor:
        return function(x * scale + shift) if part == "inside" else function(x.clone()) * scale + shift

    graph = trace(Plain(moved).eval(), torch.randn(2, 3, 2, 2))
    inputs = torch.cat([torch.linspace(-9.0, 9.0, 21), torch.tensor([-1e4, 0.0, 1e4])]).reshape(2, 3, 2, 2)
    with torch.no_grad():
        torch.testing.assert_close(Canonicalize()(graph).graph_module(inputs), graph(inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("in_training", [6.0, 8.0])
def test_a_limit_of_its_own_in_each_mode_stays(in_training: float) -> None:
    class Modal(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.clamp(0.0, in_training if self.training else 14.0 - in_training)

    graph = trace(Modal().eval(), torch.randn(2, 3, 5, 5))
    result = Canonicalize()(graph).graph_module
    inputs = torch.full((2, 3, 5, 5), 20.0)
    assert torch.equal(result.eval()(inputs), inputs - 6.0 - in_training)
    assert torch.equal(result.train()(inputs), inputs - 20.0 + in_training)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_type_stays(dtype: torch.dtype) -> None:
    inputs = torch.linspace(-9, 9, 24).reshape(2, 3, 2, 2).to(dtype)
    graph = trace(Plain(SPELLED["a sixth as a factor"][1]), inputs)
    result = Canonicalize()(graph).graph_module
    assert names(result) == ["aten.hardswish.default"]
    torch.testing.assert_close(result(inputs), graph(inputs))


def test_what_is_read_in_between_stays() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        gate = functional.relu6(x + 3)
        return x * gate / 6 + gate

    graph = trace(Net(function).eval(), torch.randn(2, 3, 5, 5))
    assert not Canonicalize()(graph).modified


def test_modules_inside_go_along_and_hooks_are_left_alone() -> None:
    class Hard(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.clamp = nn.ReLU6(inplace=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.clamp(x + 3) / 6

    model = nn.Sequential(nn.Conv2d(3, 4, 1), Hard()).eval()
    example = torch.randn(2, 3, 5, 5)
    joined = Canonicalize()(trace(model, example)).graph_module
    assert names(joined) == ["0", "aten.hardswish.default"]
    assert not any(isinstance(module, nn.ReLU6) for module in joined.modules())
    graph = trace(model, example)
    hooked = next(module for module in graph.modules() if isinstance(module, nn.ReLU6))
    hooked.register_forward_hook(lambda module, inputs, output: None)
    assert not Canonicalize()(graph).modified
