"""Shapes after a cut: found by rule or on meta tensors, they are those that running the graph on fake tensors gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.utils import _pytree as pytree

from fxopt.errors import VerifyError
from fxopt.graph import edit, propagate, trace
from fxopt.graph._resizing import propagate_sizes
from fxopt.graph.shapes import ShapeInterpreter
from fxopt.passes import PruneChannels
from tests.graph.checks import Calls
from tests.strategies import Cnn, Transformer, networks, traced


def described(gm: fx.GraphModule) -> list[Any]:
    """All that the values of a graph tell."""

    def facts(value: Tensor) -> tuple[Any, ...]:
        layout = (tuple(value.shape), value.stride(), value.storage_offset())
        return (type(value), *layout, value.dtype, value.device, value.requires_grad)

    return [pytree.tree_map_only(Tensor, facts, node.meta["val"]) for node in gm.graph.nodes]


def assert_found_as_by_running(gm: fx.GraphModule, policy: Any = None) -> fx.GraphModule:
    """Cut a graph (by half if nothing else is said) and compare what its nodes tell."""
    chosen = PruneChannels().search_space(gm).uniform(0.5) if policy is None else policy
    cut = PruneChannels(chosen)(gm).graph_module
    found = described(cut)
    propagate(cut)
    for node, mine, expected in zip(cut.graph.nodes, found, described(cut), strict=True):
        assert mine == expected, node.format_node()
    return cut


@settings(max_examples=5)
@given(networks(), st.integers(0, 99))
def test_random_graphs(network: Cnn | Transformer, seed: int) -> None:
    gm, _ = traced(network)
    assert_found_as_by_running(gm, PruneChannels().search_space(gm).sample(np.random.default_rng(seed)))


def conv(inputs: int, outputs: int, kernel: int = 1, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, **options)


Wiring = tuple[Callable[[Any, Tensor], Tensor], tuple[int, ...], dict[str, nn.Module]]
HALF = {"a": conv(3, 8), "b": conv(8, 5)}

WIRINGS: dict[str, Wiring] = {
    "a gate on single pixels": (lambda m, x: m.b(m.a(x) * m.a(x).mean((2, 3), keepdim=True)), (3, 5, 4), HALF),
    "images of one pixel": (lambda m, x: m.b(m.a(x) * m.a(x).mean((2, 3), keepdim=True).sigmoid()), (3, 1, 1), HALF),
    "one channel is left": (lambda m, x: m.b(m.a(x)) + 1, (3, 4, 4), {"a": conv(3, 2), "b": conv(2, 5, 3)}),
    "channels last within": (
        lambda m, x: m.b(m.norm(m.a(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)),
        (3, 4, 4),
        {**HALF, "norm": nn.LayerNorm(8)},
    ),
    "memory format": (lambda m, x: m.b(m.a(x.to(memory_format=torch.channels_last)).relu()), (3, 4, 4), HALF),
    "strided halves": (lambda m, x: m.b(torch.cat(m.a(x).chunk(2, 1)[::-1], 1)), (3, 4, 4), HALF),
    "slices": (lambda m, x: m.b(m.a(x)[:, :, ::2, 1:]), (3, 4, 5), HALF),
    "pools": (
        lambda m, x: m.b(functional.interpolate(m.pool(m.a(x)), scale_factor=2.0)),
        (3, 6, 6),
        {**HALF, "pool": nn.MaxPool2d(3, 2, 1)},
    ),
    "sequences": (
        lambda m, x: m.b(m.pool(m.norm(m.a(x)))),
        (3, 9),
        {
            "a": nn.Conv1d(3, 8, 3),
            "b": nn.ConvTranspose1d(8, 5, 3),
            "norm": nn.GroupNorm(2, 8),
            "pool": nn.AvgPool1d(2),
        },
    ),
    "volumes": (
        lambda m, x: m.b(m.act(m.a(x))),
        (3, 3, 4, 4),
        {"a": nn.ConvTranspose3d(3, 8, 2), "b": nn.Conv3d(8, 5, 2), "act": nn.PReLU(8)},
    ),
    "a parameter seen by a view": (lambda m, x: m.b(m.a(x) * m.scale.weight.view(1, -1, 1, 1)), (3, 4, 4), HALF),
    "types change": (lambda m, x: m.b(m.a(x).double().add(1).float() + (m.a(x) > 0)), (3, 4, 4), HALF),
    "one head is left": (
        lambda m, x: m.b(
            functional.scaled_dot_product_attention(*[x.view(-1, 5, 2, 4).transpose(1, 2) for x in m.a(x).chunk(3, 2)])
            .transpose(1, 2)
            .reshape(-1, 5, 8)
        ),
        (5, 3),
        {"a": nn.Linear(3, 24), "b": nn.Linear(8, 4)},
    ),
    "a gate of channels last": (
        lambda m, x: m.b(m.a(x) * m.up(m.down(m.pool(m.a(x))).relu()).sigmoid()),
        (3, 4, 4),
        {**HALF, "pool": nn.AdaptiveAvgPool2d(1), "down": conv(8, 2), "up": conv(2, 8)},
    ),
    "a model of channels last": (lambda m, x: m.b(m.a(x).relu()), (3, 4, 4), HALF),
}


@pytest.mark.parametrize("wiring", WIRINGS)
def test_wirings(wiring: str) -> None:
    forward, size, layers = WIRINGS[wiring]
    extra = {"scale": nn.BatchNorm2d(8)} if "parameter" in wiring else {}
    model = Calls(forward, **layers, **extra).eval()
    if wiring.endswith("of channels last"):
        model = model.to(memory_format=torch.channels_last)
    gm = trace(model, torch.randn(2, *size))
    assert len(PruneChannels().search_space(gm))
    assert_found_as_by_running(gm)


def test_layers_that_are_known_are_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    gm, _ = traced(Cnn(("residual", "inverted", "concat"), 8, "flatten", True, "relu6", 0))
    policy = PruneChannels().search_space(gm).uniform(0.5)
    ran = []
    run = ShapeInterpreter.run_node
    monkeypatch.setattr(ShapeInterpreter, "run_node", lambda self, n: ran.append(n.op) or run(self, n))
    PruneChannels(policy)(gm)
    assert "call_module" not in ran


def test_sizes_that_do_not_fit_are_refused() -> None:
    gm = edit.fork(trace(nn.Sequential(conv(3, 8), conv(8, 5)), torch.randn(2, 3, 4, 4)))
    edit.replace_tensor(gm, "0.weight", torch.zeros(6, 3, 1, 1))
    with pytest.raises(VerifyError, match="does not fit its inputs"):
        propagate_sizes(gm)
