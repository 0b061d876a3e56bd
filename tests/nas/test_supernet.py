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
    with pytest.raises(PolicyError, match="cannot be chosen"):
        supernet.choose_policy(Policy({("operator", "blocks.1"): "conv-k9"}))
