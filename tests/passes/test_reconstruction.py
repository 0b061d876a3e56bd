"""Reconstruction: weights behind a cut are those of least squares, and nothing else changes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn

from fxopt.errors import DataError, PassError
from fxopt.graph import trace
from fxopt.passes import PruneChannels
from fxopt.passes._reconstruction import Reconstruction, Reconstructor
from tests.strategies import Cnn, cnns, randomize_statistics

EXACT = {"ridge": 0.0, "rows": 10**9}


def two_layers(second: nn.Module, head: nn.Module | None = None) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), second, *([head] if head else [])).double().eval()


def images(count: int = 24, seed: int = 0, **kind: Any) -> torch.Tensor:
    return torch.randn(count, 3, 6, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(**kind)


def cut(gm: fx.GraphModule, share: float = 0.5) -> tuple[fx.GraphModule, Any]:
    step = PruneChannels()
    step = step.with_policy(step.search_space(gm).uniform(share))
    return step(gm).graph_module, step.kept(gm)


def error(gm: nn.Module, other: nn.Module, x: torch.Tensor) -> float:
    with torch.no_grad():
        return float((gm(x) - other(x)).norm())


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize(
    "second",
    [nn.Conv2d(8, 5, 1), nn.Conv2d(8, 5, 3, stride=2, padding=1), nn.Conv2d(8, 6, 3, groups=2, bias=False)],
    ids=["1x1", "3x3", "grouped"],
)
def test_weights_are_those_of_numpy(second: nn.Conv2d, sequential: bool) -> None:
    gm = trace(two_layers(second), images(2))
    pruned, kept = cut(gm)
    x = images()
    options = Reconstruction(sequential=sequential, **EXACT)
    restored = Reconstructor(gm, [x[:10], x[10:]], options).restore(pruned, kept)
    with torch.no_grad():
        features, wanted = pruned.get_submodule("1")(pruned.get_submodule("0")(x)), gm(x)
    made: Any = restored.get_submodule("2")
    unfolded = nn.functional.unfold(features, made.kernel_size, padding=made.padding, stride=made.stride)
    groups = made.groups
    rows = unfolded.unflatten(1, (groups, -1)).permute(1, 0, 3, 2).flatten(1, 2).numpy()
    targets = wanted.flatten(2).permute(0, 2, 1).flatten(0, 1).unflatten(1, (groups, -1)).permute(1, 0, 2).numpy()
    for group in range(groups):
        given = rows[group] if made.bias is None else np.concatenate([rows[group], np.ones((len(rows[group]), 1))], 1)
        oracle = np.linalg.lstsq(given, targets[group], rcond=None)[0].T
        mine = made.weight.detach().flatten(1).unflatten(0, (groups, -1))[group]
        if made.bias is not None:
            mine = torch.cat([mine, made.bias.detach()[:, None]], 1)
        np.testing.assert_allclose(mine.numpy(), oracle, rtol=0, atol=1e-6)


@pytest.mark.parametrize("sequential", [False, True])
def test_linear_layers_of_any_rank(sequential: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 4)).double().eval()
    x = torch.randn(20, 3, 6, dtype=torch.float64)
    gm = trace(model, x[:2])
    pruned, kept = cut(gm)
    restored = Reconstructor(gm, x, Reconstruction(sequential=sequential, **EXACT)).restore(pruned, kept)
    with torch.no_grad():
        rows = pruned.get_submodule("1")(pruned.get_submodule("0")(x)).flatten(0, 1).numpy()
        wanted = gm(x).flatten(0, 1).numpy()
    oracle = np.linalg.lstsq(np.concatenate([rows, np.ones((60, 1))], 1), wanted, rcond=None)[0].T
    layer: Any = restored.get_submodule("2")
    found = torch.cat([layer.weight, layer.bias[:, None]], 1).detach().numpy()
    np.testing.assert_allclose(found, oracle, rtol=0, atol=1e-6)


@settings(max_examples=6, deadline=None)
@given(network=cnns(), ridge=st.sampled_from([0.0, 1e-3, 1.0]))
def test_the_first_layer_behind_a_cut_is_never_worse(network: Cnn, ridge: float) -> None:
    """Sequential, layer by layer: no layer's error on the rows is larger than with the weights that it had."""
    module, example = network.build()
    gm = trace(module.double().eval(), example.double())
    pruned, kept = cut(gm)
    if not kept:
        return
    x = images(8)
    for sequential in (True, False):
        options = Reconstruction(sequential=sequential, ridge=ridge, rows=10**9)
        restored = Reconstructor(gm, x, options).restore(pruned, kept)
        changed = [
            n for n, p in restored.named_parameters() if n.endswith("weight") and p is not pruned.get_parameter(n)
        ]
        assert changed
        first = changed[0].removesuffix(".weight")
        before, after, wanted = (_output_of(one, first, x) for one in (pruned, restored, gm))
        outputs = kept.get((first, "weight"), {}).get(0, np.arange(wanted.shape[1]))
        wanted = wanted[:, torch.as_tensor(outputs)]
        old, new = before - wanted, after - wanted
        layer: Any = restored.get_submodule(first)
        if layer.bias is None and _has_norm(restored, first):
            axes = [dim for dim in range(old.dim()) if dim != 1]
            old, new = old - old.mean(axes, keepdim=True), new - new.mean(axes, keepdim=True)
        assert float(new.norm()) <= float(old.norm()) * (1 + 1e-9) + 1e-9


def _output_of(gm: fx.GraphModule, path: str, x: torch.Tensor) -> torch.Tensor:
    found: list[torch.Tensor] = []
    hook = gm.get_submodule(path).register_forward_hook(lambda _, __, output: found.append(output))
    with torch.no_grad():
        gm(x)
    hook.remove()
    return found[0]


def _has_norm(gm: fx.GraphModule, path: str) -> bool:
    (node,) = gm.graph.find_nodes(op="call_module", target=path)
    users = [gm.get_submodule(str(user.target)) for user in node.users if user.op == "call_module"]
    return len(users) == len(node.users) == 1 and isinstance(users[0], nn.BatchNorm2d)


def normed() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 16, 3, groups=16, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 12, 1, bias=False), nn.BatchNorm2d(12), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(48, 5)),
    )
    randomize_statistics(model)
    return model.eval()


@pytest.mark.parametrize("sequential", [False, True])
def test_a_network_with_norms_comes_nearer_to_what_it_was(sequential: bool) -> None:
    gm = trace(normed(), images(2).float())
    pruned, kept = cut(gm)
    seen, unseen = images(400).float(), images(100, seed=1).float()
    states = [{k: v.clone() for k, v in one.state_dict().items()} for one in (gm, pruned)]
    reconstructor = Reconstructor(gm, [seen], Reconstruction(sequential=sequential))
    restored = reconstructor.restore(pruned, kept)
    assert error(gm, restored, unseen) < 0.7 * error(gm, pruned, unseen)
    for one, state in zip((gm, pruned), states, strict=True):
        assert all(torch.equal(state[name], tensor) for name, tensor in one.state_dict().items())
    again = reconstructor.restore(pruned, kept).state_dict()
    anew = Reconstructor(gm, [seen], Reconstruction(sequential=sequential)).restore(pruned, kept).state_dict()
    for name, tensor in restored.state_dict().items():
        assert torch.equal(tensor, again[name])
        assert torch.equal(tensor, anew[name])


def test_in_order_is_nearer_than_all_at_once() -> None:
    gm = trace(normed(), images(2).float())
    pruned, kept = cut(gm)
    seen, unseen = images(400).float(), images(100, seed=1).float()
    one, other = (
        error(gm, Reconstructor(gm, [seen], Reconstruction(sequential=kind)).restore(pruned, kept), unseen)
        for kind in (True, False)
    )
    assert one < other


def test_nothing_cut_gives_the_very_graph() -> None:
    gm = trace(normed(), images(2).float())
    assert Reconstructor(gm, images(4).float()).restore(gm, {}) is gm


class Shared(nn.Module):
    """One layer is called twice, two hold one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.twice = nn.Linear(8, 8)
        self.one, self.other = nn.Linear(8, 8), nn.Linear(8, 8)
        self.other.weight = self.one.weight
        self.last = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.twice(torch.relu(self.twice(torch.relu(self.first(x)))))
        y: torch.Tensor = self.last(torch.relu(self.one(x)) + torch.relu(self.other(x)))
        return y


@pytest.mark.parametrize("sequential", [False, True])
def test_layers_that_serve_several_masters_keep_their_weights(sequential: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(30, 6)
    gm = trace(Shared().eval(), x[:2])
    pruned, kept = cut(gm)
    restored = Reconstructor(gm, x, Reconstruction(sequential=sequential)).restore(pruned, kept)
    changed = {n for n, p in restored.named_parameters() if p is not pruned.get_parameter(n)}
    assert changed == {"last.weight", "last.bias"}


@pytest.mark.parametrize("limit", [{"most_unknowns": 71}, {"memory": 100}])
def test_systems_that_are_too_large_are_left_out(limit: dict[str, int]) -> None:
    gm = trace(two_layers(nn.Conv2d(8, 5, 3)), images(2))
    pruned, kept = cut(gm)
    restored = Reconstructor(gm, images(), Reconstruction(sequential=False, **limit)).restore(pruned, kept)
    assert restored.get_parameter("2.weight") is pruned.get_parameter("2.weight")


def test_little_memory_means_fewer_samples_and_rows() -> None:
    gm = trace(two_layers(nn.Conv2d(8, 5, 3)), images(2))
    pruned, kept = cut(gm)
    little = Reconstructor(gm, images(400), Reconstruction(memory=40_000)).restore(pruned, kept)
    much = Reconstructor(gm, images(400)).restore(pruned, kept)
    assert error(gm, much, images(100, 2)) < error(gm, little, images(100, 2)) < error(gm, pruned, images(100, 2))


def test_frozen_parameters_stay_frozen() -> None:
    model = two_layers(nn.Conv2d(8, 5, 1)).requires_grad_(False)
    gm = trace(model, images(2))
    pruned, kept = cut(gm)
    restored = Reconstructor(gm, images()).restore(pruned, kept)
    assert not any(parameter.requires_grad for parameter in restored.parameters())


@pytest.mark.parametrize("options", [{"samples": 0}, {"rows": 0}, {"ridge": -1.0}, {"ridge": float("nan")}])
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(PassError, match=next(iter(options))):
        Reconstruction(**options)


@pytest.mark.parametrize("data", [[], [torch.full((2, 3, 6, 6), float("nan"))], [torch.zeros(2, 1, 6, 6)]])
def test_data_that_does_not_fit_is_refused(data: list[torch.Tensor]) -> None:
    gm = trace(normed(), images(2).float())
    with pytest.raises(DataError, match="batch"):
        Reconstructor(gm, data)
