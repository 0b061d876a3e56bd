"""Training goes on where it was stopped, stops on nonsense, and tells of a collapse."""

from __future__ import annotations

import dataclasses
import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fxopt.data import TensorLoader
from fxopt.errors import DataError, FxoptError, UnknownNameError
from fxopt.nas import CostTerm, Supernet, SupernetResult, SupernetSettings, split, train_supernet
from fxopt.passes import SelectOperators
from tests.nas.toys import between, loader, mobile, mobile_table, table, toy_graph

SETTINGS = SupernetSettings(warm_up=1, epochs=2, learning_rate=0.02)


def trained(supernet: Supernet | None = None, **options: Any) -> SupernetResult:
    found = supernet or Supernet(*mobile())
    terms = options.pop("terms", [CostTerm("latency", between(0.7), "budget", 0.5)])
    known: dict[str, Any] = {"settings": SETTINGS}
    data = options.pop("data", loader())
    return train_supernet(found, data, loader(16, seed=1), mobile_table(), terms, **(known | options))


def state(result: SupernetResult) -> dict[str, torch.Tensor]:
    return {**result.supernet.net.state_dict(), "alpha": result.supernet.alpha.detach()}


@pytest.mark.parametrize("method", ["binary", "reinforce"])
def test_resumed_equals_uninterrupted(tmp_path: Path, method: Any) -> None:
    settings = dataclasses.replace(SETTINGS, method=method)
    whole = trained(settings=settings)
    for stopped in (2, 7):  # in the warm-up, and in the middle of an epoch of both
        place = tmp_path / f"{method}-{stopped}"
        trained(settings=settings, checkpoint=place, checkpoint_steps=1, stop_after=stopped)
        resumed = trained(settings=settings, checkpoint=place, checkpoint_steps=1)
        assert resumed.resumed_at == stopped
        assert resumed.policy == whole.policy
        assert repr(resumed.history) == repr(whole.history)
        for name, value in state(whole).items():
            assert torch.equal(value, state(resumed)[name]), name
    done = trained(settings=settings, checkpoint=place)
    assert done.resumed_at == 9
    assert torch.equal(done.supernet.alpha, whole.supernet.alpha)


@pytest.mark.parametrize("method", ["binary", "binary-all", "relaxed", "reinforce", "uniform"])
def test_every_method_trains(method: Any) -> None:
    torch.manual_seed(0)
    outside = torch.get_rng_state()
    result = trained(settings=dataclasses.replace(SETTINGS, method=method))
    assert torch.equal(outside, torch.get_rng_state())
    assert len(result.history) == 3
    assert all(0.0 <= epoch.entropy <= 1.0 + 1e-9 for epoch in result.history)
    moved = bool((result.supernet.alpha[result.supernet.mask] != 0.0).any())
    assert moved == (method != "uniform")
    assert result.supernet.derive(result.policy)(torch.randn(3, 2, 8, 8)).shape == (3, 3)


def test_a_pair_keeps_its_probability_mass() -> None:
    seen = []
    supernet = Supernet(*mobile())
    real = torch.optim.Adam.step

    def watched(self: Any, closure: Any = None) -> Any:
        seen.append(supernet.probabilities().detach().clone())
        return real(self, closure)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.Adam, "step", watched)
        trained(supernet)
    seen.append(supernet.probabilities().detach())
    for before, after in itertools.pairwise(seen):
        # Two entries of a block change, and their sum does not.
        assert ((before - after).abs() > 1e-7).sum(1).max() <= 2
        assert torch.allclose((before - after).sum(1), torch.zeros(len(before)), atol=1e-6)


def test_a_budget_draws_the_expected_latency_down() -> None:
    settings = SupernetSettings(warm_up=0, epochs=8, alpha_learning_rate=0.3, learning_rate=1e-3)
    result = trained(terms=[CostTerm("latency", between(0.3), "budget", 2.0)], settings=settings)
    assert result.history[-1].costs[0] < result.history[0].costs[0]
    assert max(epoch.duals[0] for epoch in result.history) > 0.0


def test_a_collapse_to_skips_is_told() -> None:
    supernet = Supernet(*mobile())
    with torch.no_grad():
        for row, decision in enumerate(supernet.space):
            if "zero" in decision.choices:
                supernet.alpha[row, decision.choices.index("zero")] = 9.0
    result = trained(supernet)
    assert result.history[-1].skipped == 1.0
    assert "collapsed to skips" in result.notes[0]
    assert not trained().notes


def test_a_loss_that_is_nan_stops_and_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    place = tmp_path / "supernet"
    trained(checkpoint=place, stop_after=3)
    good = place.with_name("supernet.safetensors").read_bytes()
    bad = (torch.full((8, 2, 8, 8), torch.nan), torch.zeros(8, dtype=torch.long))
    with pytest.raises(FxoptError, match=r"loss of the weights is nan in epoch 2, batch 3 \(step 6\), on the path"):
        trained(data=[*[*loader()][:2], bad], checkpoint=place)
    assert place.with_name("supernet.safetensors").read_bytes() == good


def test_a_checkpoint_of_another_training_is_refused(tmp_path: Path) -> None:
    place = tmp_path / "supernet"
    trained(checkpoint=place, stop_after=3)
    with pytest.raises(FxoptError, match="settings"):
        trained(checkpoint=place, settings=dataclasses.replace(SETTINGS, seed=1))
    with pytest.raises(FxoptError, match="terms"):
        trained(checkpoint=place, terms=[])
    place.with_name("supernet.safetensors").write_bytes(b"nothing")
    with pytest.raises(FxoptError, match="no checkpoint"):
        trained(checkpoint=place)


def test_loaders_are_split_or_refused() -> None:
    whole = loader(20)
    weights, architecture = split(whole, 0.3, seed=1)
    assert (len(weights.inputs), len(architecture.inputs)) == (14, 6)
    both = torch.cat([weights.inputs, architecture.inputs]).flatten(1).sum(1).sort().values
    assert torch.equal(both, whole.inputs.flatten(1).sum(1).sort().values)
    batches = [*loader(20, batch=4)]
    weights, architecture = split(batches, 0.4)
    assert (len(weights), len(architecture)) == (3, 2)
    assert {id(one) for one in (*weights, *architecture)} == {id(one) for one in batches}
    for few in (loader(3), batches[:2]):
        with pytest.raises(DataError, match="cannot be split"):
            split(few, 0.2)
    with pytest.raises(DataError, match="val"):
        train_supernet(Supernet(*mobile()), loader(), [], mobile_table())


@pytest.mark.parametrize(
    "options",
    [{"epochs": 0, "warm_up": 0}, {"weight_steps": 0}, {"learning_rate": 0.0}, {"label_smoothing": 1.0}, {"seed": -1}],
)
def test_settings_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(FxoptError, match=r"got|needs|has to"):
        SupernetSettings(**options)
    with pytest.raises(UnknownNameError, match="binary"):
        SupernetSettings(method="binry")


def train_toy(checkpoint: str) -> None:
    supernet = Supernet(toy_graph(), SelectOperators(candidates=("conv-k3", "separable-k3", "identity")))
    supernet.net.double()
    data = loader(16, 5)
    data = TensorLoader(data.inputs.double(), data.labels, 8, shuffle=True)
    settings = SupernetSettings(warm_up=1, epochs=1)
    train_supernet(supernet, data, data, table(supernet), settings=settings, checkpoint=checkpoint)


_WORKER = """
import sys, torch
from torch import distributed
from tests.nas.test_train import train_toy

torch.set_num_threads(1)
distributed.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=int(sys.argv[1]), world_size=2)
train_toy(sys.argv[3])
distributed.destroy_process_group()
"""


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """Without batch norm, two processes on half of every batch each are one process on all of it."""
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", _WORKER, str(rank), str(tmp_path / "store"), str(tmp_path / "of2")],
            env=environment,
            cwd=root,
        )
        for rank in (0, 1)
    ]
    train_toy(str(tmp_path / "of1"))
    assert [one.wait(timeout=240) for one in running] == [0, 0]
    one, two = (load_file(tmp_path / f"of{size}.safetensors") for size in (1, 2))
    assert list(one) == list(two)
    assert all(torch.allclose(one[name], two[name], atol=1e-6) for name in one)
