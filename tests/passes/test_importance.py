"""Importances against formulas written by hand, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import fx, nn

from fxopt.errors import DataError, PassError, UnknownNameError
from fxopt.graph import trace
from fxopt.graph.channels import ChannelGroup, analyze
from fxopt.passes import Fisher, GeometricMedian, Importance, Magnitude, PruneChannels, Random, Taylor
from fxopt.passes._importance import as_importance, checked_scores

KEY = ("channels", "0")


def network() -> tuple[fx.GraphModule, ChannelGroup]:
    torch.manual_seed(1)
    layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
    with torch.no_grad():
        layers[1].weight.uniform_(-1, 1)
        layers[1].bias.normal_()
    gm = trace(layers.double().eval(), torch.randn(2, 3, 4, 4, dtype=torch.float64))
    return gm, analyze(gm).by_site()["0"]


def batches(count: int = 3) -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(2, 3, 4, 4, generator=generator, dtype=torch.float64), torch.tensor([0, 1])) for _ in range(count)
    ]


def scores(importance: Any) -> np.ndarray[Any, Any]:
    gm, group = network()
    return checked_scores(as_importance(importance), gm, [group])[0]


def test_magnitudes_of_readers_and_makers() -> None:
    gm, _ = network()
    reads = gm.get_submodule("4").weight.detach().reshape(2, 4, 4)
    makes = gm.get_submodule("0").weight.detach()
    np.testing.assert_allclose(scores("l1"), reads.abs().sum((0, 2)))
    np.testing.assert_allclose(scores("l2"), reads.square().sum((0, 2)).sqrt())
    np.testing.assert_allclose(scores(Magnitude(1, "makers")), makes.abs().sum((1, 2, 3)))


def test_the_scale_of_batch_norm() -> None:
    gm, _ = network()
    np.testing.assert_allclose(scores("batch-norm"), gm.get_submodule("1").weight.detach().abs())


def test_a_group_without_norm_has_its_magnitude() -> None:
    gm = trace(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), torch.randn(2, 3))
    group = analyze(gm).by_site()["0"]
    named = [as_importance(name).scores(gm, group) for name in ("batch-norm", "l1")]
    np.testing.assert_array_equal(*named)


def test_the_geometric_median() -> None:
    rows = network()[0].get_submodule("0").weight.detach().flatten(1)
    np.testing.assert_allclose(scores(GeometricMedian()), torch.cdist(rows, rows).sum(1), rtol=1e-6)


def test_random_numbers_are_those_of_the_seed() -> None:
    np.testing.assert_array_equal(scores(Random(3)), scores(Random(3)))
    assert not np.array_equal(scores(Random(3)), scores(Random(4)))
    np.testing.assert_array_equal(scores("random"), scores(Random()))


def test_gradients_are_those_of_a_gate() -> None:
    gm, _ = network()
    found = []
    for inputs, label in batches():
        gate = torch.ones(4, dtype=torch.float64, requires_grad=True)
        y = gm.get_submodule("0")(inputs) * gate.reshape(1, 4, 1, 1)
        for path in ("1", "2", "3", "4"):
            y = gm.get_submodule(path)(y)
        found.append(torch.autograd.grad(nn.functional.cross_entropy(y, label), gate)[0].numpy())
    np.testing.assert_allclose(scores(Taylor(batches())), np.abs(np.mean(found, axis=0)), rtol=1e-9)
    np.testing.assert_allclose(scores(Fisher(batches())), 0.5 * np.mean(np.square(found), axis=0), rtol=1e-9)
    np.testing.assert_allclose(scores(Taylor(batches(), max_batches=1)), np.abs(found[0]), rtol=1e-9)


def test_gradients_are_taken_once_and_leave_nothing_behind() -> None:
    gm, group = network()
    gm.get_submodule("0").weight.requires_grad_(False)
    gm.train()
    seen = []

    def loss(output: Any, label: Any) -> torch.Tensor:
        seen.append(output.shape)
        return nn.functional.cross_entropy(output, label)

    importance = Taylor(batches(2), loss)
    before = {name: value.clone() for name, value in gm.state_dict().items()}
    one, other = (importance.scores(gm, group) for _ in range(2))
    np.testing.assert_array_equal(one, other)
    assert len(seen) == 2
    assert not gm.get_submodule("0").weight.requires_grad
    assert gm.training
    assert all(parameter.grad is None for parameter in gm.parameters())
    assert all(torch.equal(value, before[name]) for name, value in gm.state_dict().items())
    with torch.no_grad():
        gm.get_submodule("4").weight.mul_(2)
    importance.scores(gm, group)
    assert len(seen) == 4


def test_a_function_ranks() -> None:
    gm, _ = network()
    step = PruneChannels({KEY: 2}, importance=lambda gm, group: torch.tensor([1.0, 4.0, 3.0, 2.0]))
    kept = step(gm).graph_module.get_submodule("0").weight
    assert torch.equal(kept, gm.get_submodule("0").weight[1:3])


class _Wrong(Importance):
    def scores(self, gm: fx.GraphModule, group: ChannelGroup) -> Any:
        return np.array([1.0, np.nan, 2.0, 3.0])


@pytest.mark.parametrize(
    ("importance", "message"),
    [
        (_Wrong(), "NaN or infinite"),
        (lambda gm, group: [1.0, 2.0], "one number for each"),
        (lambda gm, group: ["a", "b", "c", "d"], "no array of numbers"),
    ],
)
def test_bad_scores_are_refused_and_nothing_is_changed(importance: Any, message: str) -> None:
    gm, _ = network()
    code, shapes = gm.code, {name: value.shape for name, value in gm.state_dict().items()}
    with pytest.raises(PassError, match=message):
        PruneChannels({KEY: 2}, importance=importance)(gm)
    assert (gm.code, {name: value.shape for name, value in gm.state_dict().items()}) == (code, shapes)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "no batch"),
        ([torch.randn(2, 3, 4, 4, dtype=torch.float64)], "give batches of"),
        ([(torch.full((2, 3, 4, 4), 1e300, dtype=torch.float64) ** 2, torch.tensor([0, 1]))], "infinity"),
    ],
)
def test_bad_data_is_told(data: list[Any], message: str) -> None:
    gm, group = network()
    with pytest.raises(DataError, match=message):
        Taylor(data).scores(gm, group)


def test_options_are_checked() -> None:
    with pytest.raises(UnknownNameError, match="Unknown importance 'l3'"):
        as_importance("l3")
    with pytest.raises(PassError, match="importance takes"):
        PruneChannels(importance=3)
    with pytest.raises(PassError, match="order 1 or 2"):
        Magnitude(3)


def test_groups_compete_by_scores_relative_to_their_mean() -> None:
    torch.manual_seed(0)
    gm = trace(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)), torch.randn(2, 3))
    with torch.no_grad():
        gm.get_submodule("1").weight.copy_(torch.tensor([100.0, 100.0, 1.0, 1.0]).expand(4, 4))
        gm.get_submodule("2").weight.fill_(0.01)
    assert dict(PruneChannels().ranked(gm, 0.75)) == {("channels", "0"): 2, ("channels", "1"): 4}
    assert PruneChannels().ranked(gm, 1.0) == PruneChannels().search_space(gm).default()
    with pytest.raises(PassError, match="lies in"):
        PruneChannels().ranked(gm, 0.0)
