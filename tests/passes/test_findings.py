"""Findings that policies share change nothing but the time: each policy gives what it gives alone."""

from __future__ import annotations

import random

import pytest
import torch
from torch import fx, nn

from fxopt.decisions import Capabilities, Policy
from fxopt.graph import trace
from fxopt.graph.fake_quantize import ActivationQuantizer, QuantizedLayer
from fxopt.passes import Quantize
from fxopt.passes._findings import Findings
from fxopt.passes._reconstruction import Reconstruction

BITS = tuple((weight, activation) for weight in (2, 4, 8) for activation in (3, 8, 32))


class Net(nn.Module):
    """Branches that share a grid, and gates that are written out only behind quantized layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(3 if index == 0 else 6, 6, 3, padding=1) for index in range(3))
        self.head = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.silu(self.a(x))
        x = torch.cat([x + nn.functional.silu(self.b(x)), nn.functional.silu(self.c(x))], 2)
        return self.head(x.mean((2, 3)))


@pytest.fixture
def graph() -> fx.GraphModule:
    torch.manual_seed(0)
    gm: fx.GraphModule = trace(Net().eval(), torch.randn(2, 3, 6, 6))
    return gm


@pytest.fixture
def data() -> list[torch.Tensor]:
    return list(torch.randn(24, 3, 6, 6, generator=torch.Generator().manual_seed(1)).split(8))


def policies(graph: fx.GraphModule, count: int) -> list[Policy]:
    space, draw = Quantize().search_space(graph, Capabilities({"*": BITS})), random.Random(0)
    return [
        Policy({decision.key: draw.choice([*decision.choices, (32, 32)]) for decision in space}) for _ in range(count)
    ]


@pytest.mark.parametrize("method", ["max", "mse"])
def test_a_policy_gives_with_shared_findings_what_it_gives_alone(
    graph: fx.GraphModule, data: list[torch.Tensor], method: str
) -> None:
    options = {"calibration": data, "weights": {"method": method}, "activations": {"method": method}}
    shared = Findings()
    for policy in policies(graph, 12):
        alone = Quantize(policy, **options)(graph).graph_module
        found = Quantize(policy, findings=shared, **options)(graph).graph_module
        mine, theirs = (
            [one.state_dict() for one in gm.modules() if isinstance(one, (ActivationQuantizer, QuantizedLayer))]
            for gm in (found, alone)
        )
        assert len(mine) == len(theirs)
        for one, other in zip(mine, theirs, strict=True):
            assert one.keys() == other.keys()
            assert all(torch.equal(one[name], other[name]) for name in one)
        assert torch.equal(found(data[0]), alone(data[0]))
        assert found.meta["fxopt_calibration"] == alone.meta["fxopt_calibration"]


def test_data_is_read_until_every_value_was_seen_and_then_no_more(
    graph: fx.GraphModule, data: list[torch.Tensor]
) -> None:
    class Counted:
        reads = 0

        def __iter__(self):
            self.reads += 1
            return iter(data)

    counted, shared = Counted(), Findings()
    drawn = policies(graph, 6)
    for policy in drawn:
        Quantize(policy, counted, findings=shared)(graph)
    before = counted.reads
    for policy in drawn:
        Quantize(policy, counted, findings=shared)(graph)
    assert counted.reads == before


def test_findings_of_another_graph_are_forgotten(graph: fx.GraphModule, data: list[torch.Tensor]) -> None:
    shared = Findings()
    Quantize(calibration=data, findings=shared)(graph)
    torch.manual_seed(5)
    other = trace(Net().eval(), data[0][:2])
    found = Quantize(calibration=data, findings=shared)(other).graph_module
    assert torch.equal(found(data[0]), Quantize(calibration=data)(other).graph_module(data[0]))


def test_layers_with_moments_give_outputs_nearer_than_the_nearest_integers(graph: fx.GraphModule) -> None:
    draw = torch.Generator().manual_seed(2)
    alike = torch.randn(32, 1, 6, 6, generator=draw) + 0.2 * torch.randn(32, 3, 6, 6, generator=draw)
    policy = Policy({("bits", "a"): (3, 32)})
    errors = []
    for findings in (Findings(), Findings(Reconstruction(False))):
        found = Quantize(policy, [alike], findings=findings, rounding=True)(graph).graph_module
        errors.append((found.get_submodule("a")(alike) - graph.get_submodule("a")(alike)).norm().item())
    assert errors[1] < 0.8 * errors[0]


def test_rounding_is_that_of_the_pass_behind_it(graph: fx.GraphModule, data: list[torch.Tensor]) -> None:
    from fxopt.passes import Pipeline, RoundWeights

    policy = Policy({("bits", site): (3, 8) for site in ("a", "b", "c")})
    one = Quantize(policy, data, rounding=True)(graph).graph_module
    other = Pipeline((Quantize(policy, data), RoundWeights(data)))(graph).graph_module
    assert torch.equal(one(data[0]), other(data[0]))
