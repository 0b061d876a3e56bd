"""fxopt.optimize with operators among what is decided."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fxopt
from fxopt import models
from fxopt.errors import DataError, PassError
from fxopt.passes import PruneChannels, SelectOperators
from tests.optimizing import InProcess, make_batches, optimize, outcome

EXAMPLE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
STEP = SelectOperators(patterns=("inverted-residual",), kernels=(3, 5), expansions=(2, 3))


def make() -> torch.nn.Module:
    torch.manual_seed(0)
    blocks = (models.Block(8, 3, 3), models.Block(12, 3, 3, 2), models.Block(12, 3, 3))
    return models.MobileNetwork(models.Plan(8, blocks, 16, 1), 4, 3).eval()


def test_operators_channels_and_bits_within_one_budget(tmp_path: Path) -> None:
    model = make()
    data = make_batches(5)
    result = optimize(
        model,
        EXAMPLE,
        passes=(STEP, PruneChannels(round_to=4), "quantize"),
        budget={"macs": 0.7},
        target="pixel1",
        train=data,
        val=data,
        workdir=tmp_path / "work",
    )
    assert set(result.policy.of_kind("operator")) == {"blocks.0", "blocks.1", "blocks.2"}
    assert {kind for kind, _ in result.policy} == {"operator", "channels", "bits"}
    before, after = result.report.before, result.report.after
    assert after.macs <= 0.7 * before.macs
    assert result.report.passes[0].name == "select-operators"
    result.save(tmp_path / "saved")
    again = fxopt.load(tmp_path / "saved", make())
    assert torch.equal(again(EXAMPLE), result.model(EXAMPLE))
    assert (tmp_path / "work" / "supernet.safetensors").exists()


def test_operators_alone() -> None:
    data = make_batches(5)
    result = optimize(make(), EXAMPLE, passes=(STEP,), budget={"macs": 0.9}, train=data, val=data)
    assert result.report.after.macs <= 0.9 * result.report.before.macs
    assert result.search is None


def test_trials_after_operators_run_in_other_processes() -> None:
    """What travels is the model and the weights; the policy of operators makes the graph anew."""
    data = make_batches(4)
    options = {"passes": (STEP, PruneChannels(round_to=4)), "budget": {"macs": 0.6}, "train": data, "val": data}

    pool = InProcess()
    assert outcome(optimize(make(), EXAMPLE, executor=pool, **options)) == outcome(optimize(make(), EXAMPLE, **options))
    assert pool.sent > 1


def test_what_does_not_go() -> None:
    with pytest.raises(PassError, match="put it first"):
        optimize(make(), EXAMPLE, passes=("prune-channels", STEP), train=make_batches(5))
    with pytest.raises(DataError, match="give train"):
        optimize(make(), EXAMPLE, passes=(STEP,))
    with pytest.raises(PassError, match="no block"):
        optimize(torch.nn.Linear(3, 4), torch.randn(2, 3), passes=(STEP,), train=[(torch.randn(4, 3), torch.arange(4))])
