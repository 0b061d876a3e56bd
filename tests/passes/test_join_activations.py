"""Activations that are spelled out become one operator, however they are written, and nothing else does."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
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
    "tanh of softplus": ("mish", lambda x: x * torch.tanh(functional.softplus(x))),
    "logistic": ("sigmoid", lambda x: 1 / (1 + torch.exp(-x))),
    "clamped below": ("relu", lambda x: x.clamp(min=0)),
    "clamped at zero and six": ("relu6", lambda x: x.clamp(0, 6)),
}
OTHERS: dict[str, Function] = {
    "a fifth": lambda x: x * functional.relu6(x + 3) / 5,
    "a steeper gate": lambda x: x * torch.sigmoid(1.702 * x),
    "of two values": lambda x: x * torch.sigmoid(x.flip(1)),
    "a gate of one pixel": lambda x: x * torch.sigmoid(x.mean((2, 3), keepdim=True)),
    "a wider clamp": lambda x: x.clamp(0, 7),
    "a random one": lambda x: torch.rand_like(x) * torch.sigmoid(x),
}


class Net(nn.Module):
    def __init__(self, function: Function) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self.conv(x)).mean((2, 3))


def names(graph: torch.fx.GraphModule) -> list[str]:
    return [str(node.target) for node in graph.graph.nodes if node.op in ("call_function", "call_module")]


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
    assert f"aten.{wanted}.default" not in names(Canonicalize(join=False)(graph).graph_module)


@pytest.mark.parametrize("name", OTHERS)
def test_what_computes_something_else_stays(name: str) -> None:
    torch.manual_seed(0)
    graph = trace(Net(OTHERS[name]).eval(), torch.randn(2, 3, 5, 5))
    result = Canonicalize()(graph)
    assert names(result.graph_module) == names(graph)


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
