"""Small instances of real architectures: every block that has a pattern is found, and can be another."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn

from fxopt.decisions import Policy
from fxopt.graph import trace
from fxopt.passes import Canonicalize, SelectOperators


def of(module: str, function: str, *args: Any, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        found: nn.Module = getattr(pytest.importorskip(f"pytorchcv.models.{module}"), function)(*args, **options)
        features: Any = found.get_submodule("features")
        if hasattr(features, "final_pool"):
            features.final_pool = nn.AdaptiveAvgPool2d(1)
        return found

    return make


# Of each: how many blocks of which pattern.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], dict[str, int]]] = {
    "resnet10": (of("resnet", "get_resnet", 10, width_scale=0.25), {"basic": 4, "convolution": 1}),
    "preresnet10": (of("preresnet", "get_preresnet", 10, width_scale=0.25), {"basic": 4, "convolution": 1}),
    "seresnet10": (of("seresnet", "get_seresnet", 10), {"basic": 4, "convolution": 1}),
    "mobilenet": (of("mobilenet", "mobilenet_wd4"), {"depthwise-separable": 13, "convolution": 1}),
    "mobilenetv3, spelled-out hard-swish": (
        of("mobilenetv3", "get_mobilenetv3", "small", 0.5),
        {"inverted-residual": 10, "depthwise-separable": 1, "convolution": 1},
    ),
    "regnet": (of("regnet", "regnetx002"), {"grouped-bottleneck": 13, "convolution": 1}),
}


def graph_of(make: Callable[[], nn.Module]) -> fx.GraphModule:
    torch.manual_seed(0)
    return Canonicalize()(trace(make().eval(), torch.randn(2, 3, 32, 32))).graph_module


@pytest.mark.parametrize("name", NETWORKS)
def test_every_block_is_found_and_replaced(name: str) -> None:
    make, wanted = NETWORKS[name]
    gm = graph_of(make)
    step = SelectOperators(kernels=(3, 5))
    found = step.explain(gm)
    assert Counter(block.pattern for block in found) == wanted
    assert all(len(block.candidates) > 1 for block in found)
    policy = Policy({("operator", block.site): block.candidates[-1] for block in found})
    made = step.with_policy(policy)(gm).graph_module
    assert made(torch.randn(3, 3, 32, 32)).shape == (3, 1000)
