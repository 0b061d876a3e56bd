"""Small graphs, quantized, and what is to be seen in them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn

from fxopt.decisions import Policy
from fxopt.graph import trace
from fxopt.graph.fake_quantize import ActivationQuantizer
from fxopt.passes import Quantize
from tests.wiring import Wired

IMAGE = (2, 3, 8, 8)


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


def bits(gm: fx.GraphModule, name: str) -> int:
    return int(gm.get_submodule(f"quantizers.{name}").bits)


def policy_of(**choices: tuple[int, int]) -> Policy:
    return Policy({("bits", site): choice for site, choice in choices.items()})


def assert_refused(gm: fx.GraphModule, error: type[Exception], match: str, **options: Any) -> None:
    code, state = gm.code, {name: id(value) for name, value in gm.state_dict(keep_vars=True).items()}
    types = [type(module) for module in gm.modules()]
    with pytest.raises(error, match=match):
        Quantize(**options)(gm)
    assert gm.code == code
    assert {name: id(value) for name, value in gm.state_dict(keep_vars=True).items()} == state
    assert [type(module) for module in gm.modules()] == types
