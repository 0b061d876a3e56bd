"""Options of PruneChannels, policies that do not fit, and what is told before anything is cut."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fxopt.decisions import Policy
from fxopt.errors import PassError, PolicyError, UnknownNameError
from fxopt.evaluate import apply_policy
from fxopt.graph import trace
from fxopt.passes import PruneChannels
from fxopt.passes.prune_channels import CutResult
from tests.passes.test_prune_channels import prepared, pruned
from tests.strategies import Cnn, Transformer, traced


def test_bounds_limit_what_is_offered_and_what_is_taken() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 2, 1))
    step = PruneChannels(bounds={"0": (0.5, 1.0), "1": (0.2, 0.75)})
    gm, inputs = prepared(network, 3, 4, 4)
    first, second = step.search_space(gm)
    assert (first.choices, first.default) == ((4, 5, 6, 7, 8), 8)
    assert (second.choices, second.default) == ((2, 3, 4, 5, 6), 6)
    pruned(gm, inputs, step.search_space(gm).uniform(0.1))
    with pytest.raises(PolicyError, match="bounds ask for 4"):
        step.with_policy(Policy({("channels", "0"): 3}))(gm)
    assert step == PruneChannels(bounds=[["0", [0.5, 1.0]], ["1", [0.2, 0.75]]])
    assert [one.site for one in PruneChannels(bounds={"1": (0.6, 0.7)}, round_to=4).search_space(gm)] == ["0"]


@pytest.mark.parametrize("bounds", [{"0": (0.5, 0.2)}, {"0": (-0.1, 1.0)}, {"0": (0.0, 1.5)}, {"0": 0.5}, ["0"], 3])
def test_bounds_that_are_no_fractions_are_refused(bounds: Any) -> None:
    with pytest.raises(PassError, match="bounds"):
        PruneChannels(bounds=bounds)


def test_bounds_that_contradict_each_other_are_refused() -> None:
    gm, _ = prepared(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)), 3, 4, 4)
    with pytest.raises(PassError, match="leave nothing"):
        PruneChannels(bounds={"0": (0.0, 0.4), "[0]": (0.6, 1.0)}).search_space(gm)
    with pytest.raises(PassError, match="of bounds matches no module"):
        PruneChannels(bounds={"first": (0.0, 0.4)}).search_space(gm)


def test_an_explanation_is_a_table_and_json() -> None:
    gm, _ = prepared(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)), 3, 4, 4)
    found = PruneChannels({("channels", "0"): 4}).explain(gm)
    lines = str(found).splitlines()
    assert "8 -> 4" in lines[1]
    assert "frozen by output" in lines[2]
    data = json.loads(found.to_json())
    assert [group["site"] for group in data["groups"]] == ["0", "1"]
    assert data["frozen"] == pytest.approx(found.frozen)
    assert sum(found.frozen.values()) == pytest.approx((16 + 2) / (24 + 8 + 16 + 2))
    assert found[0].share == pytest.approx((24 + 8 + 16) / 50)


@pytest.mark.parametrize(
    ("site", "count", "message"),
    [
        ("blocks.0.expand.1", 4, r"Did you mean 'blocks\.0\.expand\.0'\?"),
        ("layer1.0.conv1", 4, "may be of another model"),
        ("stem.0", 0, "it has 6, keep 1 to 6"),
        ("stem.0", 7, "it has 6, keep 1 to 6"),
        ("stem.0", 2.5, "Cannot keep 2.5"),
        ("classifier", 2, "cannot be cut: output"),
    ],
)
def test_policies_that_do_not_fit_are_refused(site: str, count: Any, message: str) -> None:
    gm, _ = traced(Cnn(("inverted",), 6, "pool", True, "relu", 0), torch.float64)
    code = gm.code
    step = PruneChannels({("channels", site): count, ("bits", "stem.0"): (8, 8)})
    for run in (step, step.masked, step.explain):
        with pytest.raises(PolicyError, match=message):
            run(gm)
    assert gm.code == code


def test_options_are_checked() -> None:
    with pytest.raises(PassError, match="round_to"):
        PruneChannels(round_to=0)
    with pytest.raises(UnknownNameError, match="Unknown importance 'l3'"):
        PruneChannels(importance="l3")
    with pytest.raises(PassError, match="patterns"):
        PruneChannels(ignore=(3,))
    with pytest.raises(PassError, match="attention is cut by"):
        PruneChannels(attention="depth")


@pytest.mark.parametrize("last", [False, True])
def test_networks_that_are_channels_last_in_memory_stay_so(last: bool) -> None:
    torch.manual_seed(0)
    order = torch.channels_last if last else torch.contiguous_format
    model = nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.Conv2d(16, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 3)),
    )
    gm = trace(model.to(memory_format=order).eval(), torch.randn(2, 3, 6, 6))
    step = PruneChannels()
    space = step.search_space(gm)
    smaller = apply_policy(gm, [step], space.uniform(0.5), calibration=[(torch.randn(8, 3, 6, 6), torch.zeros(8))])
    weights = {name: tensor for name, tensor in smaller.named_parameters() if tensor.dim() == 4}
    assert len(weights) == 4
    assert weights["2.weight"].shape == (8, 1, 3, 3)
    for name, weight in weights.items():
        alike = torch.empty(weight.shape, memory_format=order)
        assert weight.stride() == alike.stride(), name


@pytest.mark.parametrize("attention", ["heads", "width"])
def test_a_cut_knows_what_it_kept(attention: str) -> None:
    gm, _ = traced(Transformer(2, 4, 6, 1, True, 0))
    step = PruneChannels(attention=attention)
    step = step.with_policy(step.search_space(gm).uniform(0.5))
    result = step(gm)
    assert isinstance(result, CutResult)
    graph, modified = result
    assert modified
    wanted = step.kept(gm)
    assert result.kept.keys() == wanted.keys()
    for (path, name), by_dim in result.kept.items():
        shape = getattr(graph.get_submodule(path), name).shape
        for dim, indices in by_dim.items():
            np.testing.assert_array_equal(indices, wanted[path, name][dim])
            assert shape[dim] == len(indices)
