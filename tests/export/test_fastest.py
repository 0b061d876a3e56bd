"""fastest_bits: a minimum cut over what was measured. No test asserts how fast anything is."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fxopt.export import _fastest as fastest
from fxopt.export import export_onnx, fastest_bits
from fxopt.export._kernels import KernelTime, kernel_times, names_of, stem
from fxopt.graph import trace
from fxopt.passes import Quantize


class Gated(nn.Module):
    """Two branches that meet in a product."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.gate = nn.Conv2d(8, 8, 1)
        self.last = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x).relu()
        return self.last((x * self.gate(x).sigmoid()).mean((2, 3)))


def times(count: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, 20), min_size=count, max_size=count)


@given(times(5), times(5), st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(0, 10)), max_size=8))
def test_the_cut_is_the_best_of_all_assignments(
    floats: list[int], integers: list[int], values: list[tuple[int, int, int]]
) -> None:
    sites = [f"layer{index}" for index in range(5)]
    names = [*sites, "between"]
    changes = [((names[one], names[other]), float(cost)) for one, other, cost in values if one != other]
    in_floats = dict(zip(sites, map(float, floats), strict=True))
    in_integers = dict(zip(sites, map(float, integers), strict=True))

    def cost(chosen: frozenset[str]) -> float:
        own = sum(in_integers[site] if site in chosen else in_floats[site] for site in sites)
        return own + sum(weight for (one, other), weight in changes if (one in chosen) != (other in chosen))

    found = fastest._cut(sites, in_floats, in_integers, changes)
    least = min(
        cost(frozenset(itertools.compress(names, kept))) for kept in itertools.product((False, True), repeat=len(names))
    )
    assert min(cost(found), cost(found | {"between"})) == least


def test_a_change_costs_two_kernels_and_two_passes() -> None:
    kernels = [
        KernelTime("a", "QLinearConv", 3e-6, 10),
        KernelTime("b", "QuantizeLinear", 13e-6, 1000),
        KernelTime("c", "Transpose", 23e-6, 2000),
    ]
    assert fastest._change_s(kernels, 0) == pytest.approx(2 * 3e-6)
    assert fastest._change_s(kernels, 600) == pytest.approx(2 * (3e-6 + 600 * 30e-6 / 3000))
    assert fastest._change_s(kernels[:1], 600) == pytest.approx(2 * 3e-6)


@pytest.mark.parametrize(
    ("kernel", "name"),
    [
        ("node_conv2d_1_token_5", "node_conv2d_1"),
        ("sigmoid_3_nchwc", "sigmoid_3"),
        ("node_mul_4/QuickGeluFusion/", "node_mul_4"),
        ("fused node_conv2d", "node_conv2d"),
    ],
)
def test_a_kernel_bears_the_name_of_a_node_or_value(kernel: str, name: str) -> None:
    assert stem(kernel) == name


@pytest.mark.parametrize("quantized", [False, True])
def test_every_kernel_of_a_layer_is_found(tmp_path: Path, quantized: bool) -> None:
    graph = trace(Gated().eval(), torch.randn(2, 3, 8, 8))
    if quantized:
        graph = Quantize()(graph).graph_module
    file = export_onnx(graph, tmp_path / "gated.onnx", torch.randn(2, 3, 8, 8), check=False).path
    names = names_of(onnx.load(file), {"first", "gate", "last"})
    feed = {"x": np.random.default_rng(0).standard_normal((1, 3, 8, 8), dtype=np.float32)}
    kernels = kernel_times(file, feed, runs=1)
    found = [names[stem(kernel.name)] for kernel in kernels if stem(kernel.name) in names]
    assert list(dict.fromkeys(found)) == ["first", "gate", "last"]
    assert all(kernel.seconds > 0 for kernel in kernels)


def test_the_fastest_file_measured_wins() -> None:
    graph = trace(Gated().eval(), torch.randn(2, 3, 8, 8))
    found = fastest_bits(graph, torch.randn(2, 3, 8, 8), runs=3)
    assert {site for _, site in found.policy} == {"first", "gate", "last"}
    assert set(found.policy.values()) <= {(8, 8), (32, 32)}
    assert found.median_s > 0
    assert found.float_s > 0
    assert found.integer_s > 0


def test_a_graph_without_layers_stays_in_floats() -> None:
    graph = trace(nn.Sequential(nn.ReLU()).eval(), torch.randn(2, 3))
    assert not fastest_bits(graph, torch.randn(2, 3), runs=1).policy
