"""EqualizeWeights: outputs stay, ranges meet, and what follows on one grid a tensor is nearer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import fx, nn

from fxopt.decisions import Policy
from fxopt.errors import PassError
from fxopt.graph import trace
from fxopt.passes import EqualizeWeights, FoldBatchNorm, Pipeline, Quantize
from fxopt.testing import assert_equivalent
from tests.strategies import Cnn, cnns, traced

EXACT = 1e-10


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def prepared(*layers: nn.Module, size: tuple[int, ...] = (3, 8, 8)) -> tuple[fx.GraphModule, torch.Tensor]:
    model = nn.Sequential(*layers).double().eval()
    x = torch.randn(2, *size, dtype=torch.float64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(torch.exp(2 * torch.randn(len(parameter), *[1] * (parameter.dim() - 1))))
    return trace(model, x), x


def ranges(gm: fx.GraphModule, first: str, second: str) -> tuple[torch.Tensor, torch.Tensor]:
    one, other = gm.get_submodule(first).weight, gm.get_submodule(second).weight
    return one.detach().abs().flatten(1).amax(1), other.detach().abs().transpose(0, 1).flatten(1).amax(1)


CHAINS: dict[str, tuple[list[nn.Module], tuple[int, ...], str, str]] = {
    "relu": ([nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)], (3, 8, 8), "0", "2"),
    "pooling": ([nn.Conv2d(3, 8, 3), nn.LeakyReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 4, 1)], (3, 8, 8), "0", "3"),
    "linear": ([nn.Linear(6, 8), nn.Dropout(), nn.ReLU(), nn.Linear(8, 3)], (5, 6), "0", "3"),
    "head": (
        [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)],
        (3, 8, 8),
        "0",
        "4",
    ),
    "one-dimensional": ([nn.Conv1d(3, 8, 3), nn.Conv1d(8, 4, 1)], (3, 9), "0", "1"),
}


@pytest.mark.parametrize("name", CHAINS)
def test_ranges_meet_and_outputs_stay(name: str) -> None:
    layers, size, first, second = CHAINS[name]
    gm, x = prepared(*layers, size=size)
    result = EqualizeWeights()(gm)
    assert result.modified
    assert_equivalent(gm, result.graph_module, x, relative=EXACT, batch=5)
    one, other = ranges(result.graph_module, first, second)
    torch.testing.assert_close(one, other)
    before = ranges(gm, first, second)
    torch.testing.assert_close(one, (before[0] * before[1]).sqrt())


def test_flattened_pixels_belong_to_their_channel() -> None:
    gm, x = prepared(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AvgPool2d(3), nn.Flatten(), nn.Linear(32, 3))
    result = EqualizeWeights()(gm).graph_module
    assert_equivalent(gm, result, x, relative=EXACT)
    weight = result.get_submodule("4").weight.detach().abs().amax(0).reshape(8, 4).amax(1)
    torch.testing.assert_close(weight, result.get_submodule("0").weight.detach().abs().flatten(1).amax(1))


def test_a_depthwise_layer_is_balanced_between_its_neighbours() -> None:
    gm, x = prepared(
        nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.ReLU(), nn.Conv2d(8, 6, 1, groups=2)
    )
    result = EqualizeWeights(sweeps=200)(gm).graph_module
    assert_equivalent(gm, result, x, relative=EXACT)
    sizes = [result.get_submodule(path).weight.detach().abs() for path in ("0", "2", "4")]
    middle = sizes[1].flatten(1).amax(1)
    reads = sizes[2].reshape(2, 3, 4).amax(1).flatten()
    torch.testing.assert_close(sizes[0].flatten(1).amax(1), middle, rtol=1e-2, atol=0)
    torch.testing.assert_close(reads, middle, rtol=1e-2, atol=0)


@settings(max_examples=15)
@given(cnns())
def test_random_networks_compute_the_same(cnn: Cnn) -> None:
    gm, x = traced(cnn)
    folded = FoldBatchNorm()(gm).graph_module
    assert_equivalent(folded, EqualizeWeights()(folded).graph_module, x, relative=1e-4)


@pytest.mark.parametrize("between", [nn.ReLU6(), nn.SiLU(), nn.Sigmoid(), nn.BatchNorm2d(8), nn.Softmax(1)])
def test_what_is_not_homogeneous_ends_a_chain(between: nn.Module) -> None:
    gm, _ = prepared(nn.Conv2d(3, 8, 3), between, nn.Conv2d(8, 4, 1))
    assert not EqualizeWeights()(gm).modified


def test_what_is_read_twice_or_shared_stays() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
            self.c.weight = self.b.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.a(x)
            return self.c(x + self.b(x))

    assert not EqualizeWeights()(trace(Residual().eval(), torch.randn(2, 3, 4, 4))).modified


def test_channels_of_zeros_stay() -> None:
    gm, x = prepared(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    with torch.no_grad():
        gm.get_submodule("0").weight[1] = 0.0
        gm.get_submodule("2").weight[:, 2] = 0.0
    result = EqualizeWeights()(gm).graph_module
    assert_equivalent(gm, result, x, relative=EXACT)
    assert all(bool(torch.isfinite(parameter).all()) for parameter in result.parameters())


def test_one_grid_a_tensor_loses_less_and_data_free_ranges_follow() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3)).eval()
    sizes = torch.exp(2 * torch.randn(8))
    with torch.no_grad():
        for parameter in model[1].parameters():
            parameter.copy_(sizes * (0.5 + torch.rand(8)))
        model[3].weight /= sizes.view(1, -1, 1, 1)
    x = torch.randn(4, 3, 8, 8)
    folded = FoldBatchNorm()(trace(model, x)).graph_module
    wanted, policy = folded(x), Policy({("bits", site): (6, 32) for site in ("0", "3")})
    errors = []
    for before in ((), (EqualizeWeights(),)):
        steps: tuple[Any, ...] = (*before, Quantize(policy, weights={"per_channel": False}))
        errors.append((Pipeline(steps)(folded).graph_module(x) - wanted).norm().item())
    assert errors[1] < 0.5 * errors[0]
    quantized = Pipeline((EqualizeWeights(), Quantize()))(folded).graph_module
    assert "outputs of 1 layers" in quantized.meta["fxopt_calibration"]["source"]


def test_sweeps_out_of_range_are_refused() -> None:
    with pytest.raises(PassError, match="sweeps is 0"):
        EqualizeWeights(sweeps=0)(prepared(nn.Linear(3, 2), size=(3,))[0])
