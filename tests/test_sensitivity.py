"""Sensitivities: what they measure, and that they are measured once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import fx, nn

from fxopt import sensitivity
from fxopt.decisions import Capabilities, Decision, SearchSpace
from fxopt.errors import DataError, PassError
from fxopt.graph import trace
from fxopt.graph.fake_quantize import WeightScheme, quantize_layer
from fxopt.passes import Quantize
from fxopt.search import engines
from fxopt.sensitivity import sensitivities

ABLE = Capabilities({"*": ((2, 8), (4, 4), (8, 8), (4, 32), (32, 32))})
METHODS: Any = pytest.mark.parametrize("method", ["mse", "kl", "hessian", "gradient"])


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 5)
        self.act = nn.SiLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.a(x))
        return self.c((x + self.act(self.b(x))).mean((2, 3)))


def made() -> tuple[fx.GraphModule, SearchSpace, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(16, 3, 6, 6)
    gm = trace(Net().eval(), x[:2])
    return gm, Quantize().search_space(gm, ABLE), x


@METHODS
def test_fewer_bits_lose_more_and_floats_nothing(method: Any) -> None:
    gm, space, x = made()
    before = gm(x)
    tables = sensitivities(gm, space, x, method=method)
    assert [len(table) for table in tables] == [5, 5, 5]
    for decision, table in zip(space, tables, strict=True):
        loss = dict(zip(decision.choices, table, strict=True))
        assert loss[32, 32] == 0.0
        assert loss[8, 8] < loss[4, 4] <= loss[2, 8] + loss[4, 4]
        assert 0.0 < loss[4, 32] < loss[4, 4]
        assert loss[2, 8] > loss[4, 32]
    assert torch.equal(gm(x), before)
    assert not any(module._forward_pre_hooks for module in gm.modules())


@pytest.mark.parametrize("site", ["a", "b", "c"])
@pytest.mark.parametrize("method", ["mse", "kmeans"])
def test_a_weight_loses_what_the_whole_network_with_it_does(site: str, method: Any) -> None:
    gm, space, x = made()
    table = sensitivities(gm, space, x, weights=WeightScheme(method))[[decision.site for decision in space].index(site)]
    twin, _, _ = made()
    twin.set_submodule(site, quantize_layer(twin.get_submodule(site), 4, scheme=WeightScheme(method)))
    with torch.no_grad():
        wanted, found = gm(x), twin(x)
    expected = float((found - wanted).square().sum() / wanted.square().sum())
    choice = space[0].choices.index((4, 32))
    assert table[choice] == pytest.approx(expected, rel=1e-4)


def test_the_hessian_of_a_linear_layer_is_known() -> None:
    torch.manual_seed(0)
    x = torch.randn(32, 6)
    gm = trace(nn.Sequential(nn.Linear(6, 1)).eval(), x[:2])
    space = SearchSpace([Decision("bits", "0", ((4, 32), (32, 32)), (32, 32))])
    found = np.mean([sensitivities(gm, space, x, method="hessian", seed=seed)[0][0] for seed in range(10)])
    weight = gm.get_submodule("0").weight
    layer = quantize_layer(gm.get_submodule("0"), 4, scheme=WeightScheme("mse"))
    gap = float((layer.quantized_weight() - weight).detach().square().sum())
    # Half the mean square of the output: the Hessian is the inputs' second moment.
    assert found == pytest.approx(0.5 * float(x.square().mean()) * gap, rel=0.25)


def test_a_file_keeps_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gm, space, x = made()
    path = tmp_path / "losses.json"
    measured: list[str] = []
    original = sensitivity._Measured.loss

    def counting(self: Any, site: str, part: str, bits: int) -> float:
        if len(measured) == 6:
            raise KeyboardInterrupt
        measured.append(site)
        return original(self, site, part, bits)

    monkeypatch.setattr(sensitivity._Measured, "loss", counting)
    with pytest.raises(KeyboardInterrupt):
        sensitivities(gm, space, x, cache=path)
    monkeypatch.setattr(sensitivity._Measured, "loss", original)
    resumed = sensitivities(gm, space, x, cache=path)
    assert resumed == sensitivities(gm, space, x)
    monkeypatch.setattr(sensitivity._Measured, "loss", counting)
    assert sensitivities(gm, space, x, cache=path) == resumed
    with pytest.raises(DataError, match="another graph, batch or method"):
        sensitivities(gm, space, x + 1.0, cache=path)
    path.write_text("{}")
    with pytest.raises(DataError, match="holds no sensitivities"):
        sensitivities(gm, space, x, cache=path)


def test_the_exact_engine_takes_them() -> None:
    gm, space, x = made()
    tables = sensitivities(gm, space, x, method="kl")
    policy = engines.create("exact", space, losses=tables).ask(1)[0]
    assert all(policy[decision.key] == (32, 32) for decision in space)


def test_bad_input_is_refused() -> None:
    gm, space, x = made()
    with pytest.raises(PassError, match="by 'best'"):
        sensitivities(gm, space, x, method="best")  # type: ignore[arg-type]
    with pytest.raises(PassError, match="'z' is no layer"):
        sensitivities(gm, SearchSpace([Decision("bits", "z", ((8, 8),), (8, 8))]), x)
    with pytest.raises(DataError, match="NaN"):
        sensitivities(gm, space, torch.full_like(x, float("nan")))


def test_weights_rounded_by_moments_lose_less_than_the_nearest() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 1, 6, 6) + 0.2 * torch.randn(64, 3, 6, 6)
    gm = trace(Net().eval(), x[:2])
    space = Quantize().search_space(gm, Capabilities({"*": ((2, 32), (3, 32), (32, 32))}))
    nearest, rounded = (sensitivities(gm, space, x, rounding=rounding) for rounding in (False, True))
    assert sum(map(sum, rounded)) < 0.9 * sum(map(sum, nearest))
    assert all(table[-1] == 0.0 for table in rounded)


class Narrow(nn.Module):
    """One output channel that is to be measured, and classes made of it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 1), nn.Linear(1, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.tanh(self.a(x)))


@pytest.mark.parametrize("choice", [(3, 32), (8, 3)])
def test_gradients_foretell_the_divergence_of_small_changes(choice: tuple[int, int], monkeypatch: Any) -> None:
    torch.manual_seed(3)
    x = torch.randn(64, 6)
    gm = trace(Narrow().eval(), x[:2])
    able = Capabilities({"*": (choice, (32, 32))})
    space = SearchSpace([one for one in Quantize().search_space(gm, able) if one.site == "a"])
    at = next(iter(space)).choices.index(choice)
    monkeypatch.setattr(sensitivity, "_DRAWS", 300)
    found = sensitivities(gm, space, x, method="gradient")[0][at]
    # The divergence itself: the finite difference that the gradients foretell.
    measured = sensitivities(gm, space, x, method="kl")[0][at]
    assert found == pytest.approx(measured, rel=0.25)
    assert found == sensitivities(gm, space, x, method="gradient")[0][at]
