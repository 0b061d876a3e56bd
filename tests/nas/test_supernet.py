"""A supernet computes one path, and gives that path away as a network of its own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from fxopt.decisions import Policy
from fxopt.errors import PassError, PolicyError, VerifyError
from fxopt.graph import trace, verify
from fxopt.nas import Supernet
from fxopt.passes import SelectOperators
from tests.nas.toys import mobile


def test_paths_are_the_networks_of_their_policies() -> None:
    graph, step = mobile()
    supernet = Supernet(graph, step)
    supernet.net.eval()
    x = torch.randn(3, 2, 8, 8)
    assert torch.equal(supernet.net(x), graph(x))
    rng = np.random.default_rng(0)
    for _ in range(4):
        policy = supernet.space.sample(rng)
        supernet.choose_policy(policy)
        derived = supernet.derive(policy)
        verify(derived)
        rewritten = step.with_policy(policy)(graph).graph_module
        assert torch.equal(supernet.net(x), derived(x))
        assert torch.equal(rewritten(x), derived(x))
        assert list(rewritten.state_dict()) == list(derived.state_dict())


def test_a_derived_network_has_tensors_of_its_own() -> None:
    graph, step = mobile()
    supernet = Supernet(graph, step)
    policy = supernet.space.decode([0] * len(supernet.space))
    before = {name: value.clone() for name, value in graph.state_dict().items()}
    kept, new = supernet.derive(policy), supernet.derive(policy, keep_weights=False)
    with torch.no_grad():
        for network in (kept, new, supernet.net):
            for parameter in network.parameters():
                parameter.add_(1.0)
    assert all(torch.equal(value, before[name]) for name, value in graph.state_dict().items())
    again = supernet.derive(policy)
    assert all(torch.allclose(a, b) for a, b in zip(kept.parameters(), again.parameters(), strict=True))
    assert any(not torch.allclose(a, b) for a, b in zip(kept.parameters(), new.parameters(), strict=True))


def test_inactive_paths_change_no_statistics_and_no_weights() -> None:
    graph, step = mobile()
    supernet = Supernet(graph, step)
    supernet.net.train()
    gates = supernet.open_gates([0] * len(supernet.space), [[1]] * len(supernet.space))
    before = {name: value.clone() for name, value in supernet.net.state_dict().items()}
    with supernet.frozen_weights():
        torch.autograd.backward(supernet.net(torch.randn(4, 2, 8, 8)).square().sum(), inputs=gates)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in supernet.net.parameters())
    changed = {name for name, value in supernet.net.state_dict().items() if not torch.equal(value, before[name])}
    assert any("candidates.0" in name for name in changed)
    assert not any("candidates.1" in name for name in changed)
    assert all(gate.grad is not None and gate.grad.shape == (2,) for gate in gates)


def test_a_zero_that_is_computed_gets_a_gradient_as_any_other() -> None:
    graph, step = mobile()
    supernet = Supernet(graph, step)
    row = next(index for index, one in enumerate(supernet.space) if "zero" in one.choices)
    zero = supernet.space[row].choices.index("zero")
    active = [0] * len(supernet.space)
    active[row] = zero
    gates = supernet.open_gates(active, [[1]] * len(supernet.space))
    torch.autograd.backward(supernet.net(torch.randn(4, 2, 8, 8)).square().sum(), inputs=gates)
    assert float(gates[row].grad[0]) == 0.0
    assert float(gates[row].grad[1]) != 0.0


def test_what_does_not_fit() -> None:
    with pytest.raises(PassError, match="no block"):
        Supernet(trace(nn.Linear(3, 2), torch.randn(2, 3)), SelectOperators())
    with pytest.raises(PassError, match=r"step is a str; give what fxopt\.passes\.SelectOperators\(\) makes"):
        Supernet(mobile()[0], "select-operators")  # type: ignore[arg-type]
    with pytest.raises(VerifyError, match=r"A Linear is no graph; give what fxopt\.trace"):
        Supernet(nn.Linear(3, 2), SelectOperators())  # type: ignore[arg-type]
    supernet = Supernet(*mobile())
    for take in (supernet.choose_policy, supernet.derive):
        with pytest.raises(PolicyError, match="cannot be chosen"):
            take(Policy({("operator", "blocks.1"): "conv-k9"}))
        with pytest.raises(PolicyError, match="policy is a NoneType; give a Policy"):
            take(None)  # type: ignore[arg-type]
    for path in ([0], [99, 0, 0], [-1, 0, 0]):
        with pytest.raises(PolicyError, match=r"an index below \[\d+, \d+, \d+\], one for each block; got"):
            supernet.choose(path)
    for wrong in (None, 3, [0.5, 0.5, 0.5], "aaa"):
        with pytest.raises(PolicyError, match=r"an index below \[.*one for each block; got"):
            supernet.choose(wrong)  # type: ignore[arg-type]


def test_all_of_a_network_from_scratch_begins_anew() -> None:
    """Norms and activations with parameters, too; what nothing tells the beginning of is named."""
    torch.manual_seed(0)
    behind = (nn.GroupNorm(2, 4), nn.PReLU(4), nn.AvgPool2d(5), nn.Flatten(), nn.LayerNorm(4), nn.Linear(4, 3))
    model = nn.Sequential(nn.Conv2d(2, 4, 1), nn.Conv2d(4, 4, 3, padding=1), *behind).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    graph = trace(model, torch.randn(2, 2, 5, 5))
    step = SelectOperators(candidates=("conv-k3", "conv-k5"))
    found = Supernet(graph, step).derive(Policy({("operator", "1"): "conv-k5"}), keep_weights=False)
    trained = model.state_dict()
    kept = [name for name, one in found.state_dict().items() if name in trained and torch.equal(one, trained[name])]
    assert kept == []

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.scale = model, nn.Parameter(torch.ones(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x) * self.scale

    supernet = Supernet(trace(Scaled().eval(), torch.randn(2, 2, 5, 5)), step)
    with pytest.raises(PassError, match="how scale began; keep the weights"):
        supernet.derive(supernet.space.default(), keep_weights=False)


class Normalize(nn.Module):
    """Reads tensors of its own, of every kind that a module holds."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(1, 3, 1, 1))
        self.register_buffer("deviation", torch.ones(1, 3, 1, 1), persistent=False)
        self.gain = nn.Parameter(torch.ones(1, 3, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = (x - self.mean) / self.deviation * self.gain
        return found


class Normalized(Normalize):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Normalize()
        self.net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.net(self.inner(super().forward(x)))
        return found


def test_what_a_moved_supernet_gives_is_where_it_is() -> None:
    supernet = Supernet(trace(Normalized().eval(), torch.randn(2, 3, 8, 8)), SelectOperators(kernels=(3, 5)))
    policies = [supernet.space.decode([index] * len(supernet.space)) for index in (0, 1)]
    supernet.net.double()
    for policy in policies:
        derived = supernet.derive(policy)
        tensors = [*derived.parameters(), *derived.buffers()]
        assert len(tensors) == 10
        assert {tensor.dtype for tensor in tensors} == {torch.float64}
        assert derived(torch.randn(3, 3, 8, 8).double()).dtype == torch.float64
    supernet.net.to("meta")
    for policy in policies:
        derived = supernet.derive(policy)
        assert {tensor.device.type for tensor in (*derived.parameters(), *derived.buffers())} == {"meta"}
