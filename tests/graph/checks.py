"""Small models, and what it means that a traced model does what the model does."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxopt.graph import as_args, trace, verify
from fxopt.graph.shapes import TRACE_META
from tests.strategies import randomize_statistics

__all__ = ["Calls", "assert_same", "assert_traced", "image", "rows", "run", "small"]


class Calls(nn.Module):
    """A module whose forward is a function of itself and its inputs."""

    def __init__(self, function: Callable[..., Any], **state: Any) -> None:
        super().__init__()
        for name, value in state.items():
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def run(model: nn.Module, example: Any, seed: int = 3) -> Any:
    args, kwargs = as_args(copy.deepcopy(example))
    torch.manual_seed(seed)
    return model(*args, **kwargs)


def assert_same(one: Any, other: Any) -> None:
    """Same structure, same leaves to the last bit."""
    leaves, spec = pytree.tree_flatten(one)
    others, other_spec = pytree.tree_flatten(other)
    assert spec == other_spec
    for leaf, theirs in zip(leaves, others, strict=True):
        if isinstance(leaf, Tensor):
            torch.testing.assert_close(leaf, theirs, rtol=0.0, atol=0.0)
        else:
            assert leaf == theirs


def assert_traced(model: nn.Module, example: Any, other: Any, *, dynamic: bool = True) -> fx.GraphModule:
    """Trace, and compare with the model on ``other``; the model and what it holds stay as they were."""
    before = copy.deepcopy(model.state_dict())
    gm = trace(model, example)
    verify(gm)
    assert gm.meta[TRACE_META]["dynamic_batch"] is dynamic
    assert_same(dict(model.state_dict()), dict(before))
    assert list(gm.state_dict()) == list(model.state_dict())
    for name, tensor in gm.state_dict(keep_vars=True).items():
        assert tensor is model.state_dict(keep_vars=True)[name]
    expected = run(model, other)
    model.load_state_dict(before)
    assert_same(run(gm, other), expected)
    return gm


def image(batch: int, channels: int = 3) -> Tensor:
    return torch.randn(batch, channels, 6, 6)


def rows(batch: int) -> Tensor:
    return torch.randn(batch, 4)


def small() -> nn.Module:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))
    randomize_statistics(net)
    return net
