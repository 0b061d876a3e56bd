"""Architecture gradients against finite differences and the enumeration of every path (Han et al., equations 1-3)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from fxopt.errors import BudgetError, InfeasibleError, UnknownNameError
from fxopt.nas import BinaryGates, Cost, CostTerm, ExpectedCost, Reinforce, Relaxed, Supernet
from fxopt.nas._architecture import gate_gradient, path_matrix, sample
from tests.nas.toys import CLASSES, between, mobile_table, paths, table, toy

BATCH = (
    torch.randn(6, 2, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3)),
    torch.arange(6) % CLASSES,
)


def cross_entropy(supernet: Supernet) -> Callable[[Any], torch.Tensor]:
    return lambda batch: torch.nn.functional.cross_entropy(supernet.net(batch[0]), batch[1])


def differences(function: Callable[[], float], alpha: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The gradient by central differences."""
    found = torch.zeros(alpha.shape, dtype=torch.float64)
    for place in mask.nonzero().tolist():
        values = []
        for move in (1e-3, -1e-3):
            with torch.no_grad():
                alpha[tuple(place)] += move
                values.append(function())
                alpha[tuple(place)] -= move
        found[tuple(place)] = (values[0] - values[1]) / 2e-3
    return found


def path_losses(supernet: Supernet, loss: Callable[[Any], torch.Tensor]) -> dict[tuple[int, ...], float]:
    found = {}
    for path in paths(supernet):
        supernet.choose(path)
        with torch.no_grad():
            found[tuple(path.tolist())] = float(loss(BATCH))
    return found


def probability(supernet: Supernet, path: Any) -> float:
    shares = supernet.alpha.detach().double().softmax(1).numpy()
    return float(np.prod([shares[row, index] for row, index in enumerate(path)]))


def test_gates_have_the_gradient_of_their_paths() -> None:
    """dL/dg_j at a binary gate vector, against differences of the network with gates between 0 and 1."""
    supernet = toy()
    loss = cross_entropy(supernet)
    active, others = [1, 0], [[0, 2], [1]]
    gates = supernet.open_gates(active, others)
    torch.autograd.backward(loss(BATCH), inputs=gates)
    for block, mixed in enumerate(supernet.mixed.values()):
        for place, candidate in enumerate([active[block], *others[block]]):
            values = []
            for move in (1e-5, -1e-5):
                supernet.choose(active)
                weights = torch.zeros(len(mixed.candidates), dtype=torch.float64)
                weights[active[block]] = 1.0
                weights[candidate] += move
                mixed.mixture = weights
                with torch.no_grad():
                    values.append(float(loss(BATCH)))
            assert float(gates[block].grad[place]) == pytest.approx((values[0] - values[1]) / 2e-5, abs=1e-6)


def test_all_gates_of_a_linear_loss_give_the_exact_gradient() -> None:
    """Where the loss is linear in a block's output, the expected estimate is the gradient of the expected loss."""
    supernet = toy(1)
    weights = torch.randn(6, CLASSES, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def loss(batch: Any) -> torch.Tensor:
        return (supernet.net(batch[0]) * weights).sum()

    losses = path_losses(supernet, loss)
    exact = differences(
        lambda: sum(probability(supernet, path) * value for path, value in losses.items()),
        supernet.alpha,
        supernet.mask,
    )
    cost, shares = Cost(table(supernet), []), supernet.probabilities().detach()
    estimate = torch.zeros_like(exact)
    for path in losses:
        gates = supernet.open_gates(path, [[one for one in range(3) if one != path[0]]])
        torch.autograd.backward(loss(BATCH), inputs=gates)
        order = [path[0], *(one for one in range(3) if one != path[0])]
        row = torch.zeros(3, dtype=torch.float64)
        row[order] = gates[0].grad.double()
        estimate += probability(supernet, path) * gate_gradient(shares.double(), row[None])
    assert torch.allclose(estimate, exact, atol=1e-6)
    step = BinaryGates(None)(supernet, cost, loss, BATCH, np.random.default_rng(0))
    assert torch.allclose(step.gradient.double(), exact, atol=1e-6)


def pair_chances(shares: Any) -> dict[tuple[int, int], float]:
    """How likely a pair is to be drawn without replacement in proportion to probabilities."""
    pairs = itertools.combinations(range(len(shares)), 2)
    return {(i, j): shares[i] * shares[j] * (1 / (1 - shares[i]) + 1 / (1 - shares[j])) for i, j in pairs}


@dataclass
class _Told(BinaryGates):
    """Binary gates that are told what they draw: a pair for every block, of which the first is computed."""

    pairs: Sequence[tuple[int, int]] = ()

    def __post_init__(self) -> None:
        self.left, self.first = iter(self.pairs), iter(self.pairs)

    def _drawn(self, *_: object) -> list[int]:
        return list(next(self.left))

    def _active(self, *_: object) -> int:
        return next(self.first)[0]


def told_gradient(supernet: Supernet, cost: Cost, loss: Any, pairs: Sequence[tuple[int, int]]) -> torch.Tensor:
    """The gradient where each block computes the first of its pair."""
    method = _Told(pairs=pairs)
    found = method(supernet, cost, loss, BATCH, np.random.default_rng(0)).gradient.double()
    assert not [*method.left, *method.first], "pairs that were not asked for"
    return found


@pytest.mark.parametrize("form", ["multiplicative", "additive", "budget"])
def test_every_pair_of_both_blocks_has_the_gradient_of_its_own_loss(form: Any) -> None:
    """All pairs, and all that is computed of each, against the loss written out and differentiated by torch.

    In it the candidates of a pair are mixed with their renormalized probabilities, linearly around the path.
    """
    supernet = toy()
    loss, costs = cross_entropy(supernet), table(supernet)
    cost = Cost(costs, [CostTerm("latency", float(costs.score(np.array([[0, 1]]))[0]), form, 0.5)])
    cost.duals[0] = 0.7
    alpha, (prices, fixed) = supernet.alpha.detach().double(), costs.of("latency")
    ordered = list(itertools.permutations(range(3), 2))
    for drawn in itertools.product(ordered, ordered):
        found = told_gradient(supernet, cost, loss, drawn)
        gates = supernet.open_gates([pair[0] for pair in drawn], [pair[1:] for pair in drawn])
        value = loss(BATCH)
        torch.autograd.backward(value, inputs=gates)
        moved = alpha.clone().requires_grad_()
        shares = [moved[row, list(pair)].softmax(0) for row, pair in enumerate(drawn)]
        expected = fixed + sum(
            (one * torch.tensor(prices[row, list(drawn[row])])).sum() for row, one in enumerate(shares)
        )
        bend = sum((one * gate.grad).sum() for one, gate in zip(shares, gates, strict=True))
        (wanted,) = torch.autograd.grad(cost.combined(value.detach() + bend - bend.detach(), [expected]), [moved])
        assert torch.allclose(found, wanted, atol=1e-7)


def test_the_mean_over_all_draws_weighs_pairs_by_their_chance() -> None:
    """For one block and a loss linear in its output: p_i p_j (g_i - g_j) of every pair, renormalized and enumerated."""
    supernet = toy(1)
    weights = torch.randn(6, CLASSES, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def loss(batch: Any) -> torch.Tensor:
        return (supernet.net(batch[0]) * weights).sum()

    losses = [value for _, value in sorted(path_losses(supernet, loss).items())]
    shares = supernet.probabilities().detach().double().numpy()[0]
    wanted, found = np.zeros(3), torch.zeros(1, 3, dtype=torch.float64)
    for pair, chance in pair_chances(shares).items():
        both = shares[list(pair)].sum()
        for i, j in (pair, pair[::-1]):
            wanted[i] += chance * shares[i] * shares[j] / both**2 * (losses[i] - losses[j])
            found += chance * shares[i] / both * told_gradient(supernet, Cost(table(supernet), []), loss, [(i, j)])
    assert np.allclose(found.numpy()[0], wanted, atol=1e-7)
    # The exact gradient is the same sum without the chances: each pair pushes the same way.
    exact = shares * (np.array(losses) - shares @ np.array(losses))
    pushes = [shares[i] * shares[j] * (losses[i] - losses[j]) for i, j in ((0, 1), (0, 2), (1, 2))]
    assert np.allclose(exact, [pushes[0] + pushes[1], pushes[2] - pushes[0], -pushes[1] - pushes[2]])


def test_pairs_of_three_are_drawn_by_their_chances() -> None:
    shares, method, rng = np.array([0.6, 0.3, 0.1]), BinaryGates(2), np.random.default_rng(0)
    counts: dict[tuple[int, ...], int] = {}
    for _ in range(4000):
        pair = tuple(sorted(method._drawn(shares, rng)))
        counts[pair] = counts.get(pair, 0) + 1
    for pair, chance in pair_chances(shares).items():
        assert counts[pair] / 4000 == pytest.approx(chance, abs=0.03)


def test_a_pair_is_renormalized_and_keeps_its_sum() -> None:
    supernet = toy()
    loss = cross_entropy(supernet)
    cost = Cost(table(supernet), [])
    alpha = supernet.alpha.detach().double()
    for seed in range(5):
        step = BinaryGates(2)(supernet, cost, loss, BATCH, np.random.default_rng(seed))
        assert step.touched is not None
        assert step.touched.sum(1).tolist() == [2, 2]
        assert torch.allclose(step.gradient.sum(1), torch.zeros(2), atol=1e-9)
        assert not step.gradient[~step.touched].any()
        for row, mixed in enumerate(supernet.mixed.values()):
            one, other = mixed.active, mixed.others[0]
            share = torch.softmax(alpha[row, [one, other]], 0)
            by_gates = mixed.gates.grad.double()
            wanted = share[0] * share[1] * (by_gates[0] - by_gates[1])
            assert float(step.gradient[row, one]) == pytest.approx(float(wanted), abs=1e-8)


def test_pairs_are_drawn_in_proportion() -> None:
    """Among two candidates of a block, each is computed as often as its renormalized probability says."""
    supernet = toy(1, ("conv-k3", "identity"))
    with torch.no_grad():
        supernet.alpha.copy_(torch.tensor([[np.log(3.0), 0.0]]))
    method, rng = BinaryGates(2), np.random.default_rng(0)
    drawn = [
        method._active(np.array([0.75, 0.25]), method._drawn(np.array([0.75, 0.25]), rng), rng) for _ in range(4000)
    ]
    assert np.mean(drawn) == pytest.approx(0.25, abs=0.03)
    assert np.mean(sample(np.array([[0.75, 0.25]] * 4000), rng)) == pytest.approx(0.25, abs=0.03)


def test_expected_cost_is_that_of_all_paths() -> None:
    supernet = toy()
    costs = table(supernet)
    for metric in ("latency", "size", "macs"):
        expected = ExpectedCost(costs, metric)
        every = np.array(list(paths(supernet)))
        scores = costs.score(every, metric)
        wanted = sum(probability(supernet, path) * score for path, score in zip(every, scores, strict=True))
        assert float(expected(supernet.probabilities()).detach()) == pytest.approx(wanted, rel=1e-6)
        assert expected.least == pytest.approx(scores.min(), rel=1e-12)
    memory = ExpectedCost(costs, "memory")
    assert float(memory(path_matrix(every[3], supernet.alpha.detach()))) == costs.score(every[3:4], "memory")[0]


@pytest.mark.parametrize("form", ["multiplicative", "additive", "budget"])
def test_relaxed_gradients_are_those_of_differences(form: Any) -> None:
    supernet = toy()
    costs = table(supernet)
    reference = float(costs.score(np.array([[0, 0]]))[0])
    cost = Cost(costs, [CostTerm("latency", reference, form, 0.5), CostTerm("macs", 1e4, "additive", 0.1)])
    cost.duals[0] = 0.7
    loss = cross_entropy(supernet)

    def whole() -> float:
        supernet.alpha.data = supernet.alpha.data.double()
        supernet.mix()
        with torch.no_grad():
            return float(cost.combined(loss(BATCH), [one(supernet.probabilities()) for one in cost.expected]))

    supernet.alpha.data = supernet.alpha.data.double()
    step = Relaxed()(supernet, cost, loss, BATCH, np.random.default_rng(0))
    assert torch.allclose(step.gradient.double(), differences(whole, supernet.alpha.data, supernet.mask), atol=1e-5)


@pytest.mark.parametrize("form", ["multiplicative", "additive", "budget"])
def test_binary_gradients_of_the_cost_are_those_of_differences(form: Any) -> None:
    """With every gate open and a loss that no path changes, what is left is the gradient of the cost."""
    supernet = toy()
    supernet.alpha.data = supernet.alpha.data.double()
    costs = table(supernet)
    cost = Cost(costs, [CostTerm("latency", float(costs.score(np.array([[0, 0]]))[0]), form, 0.5)])
    cost.duals[0] = 0.7

    def loss(batch: Any) -> torch.Tensor:
        return 1.5 + 0.0 * supernet.net(batch[0]).sum()

    def whole() -> float:
        shares = supernet.probabilities().detach()
        return float(cost.combined(torch.tensor(1.5), [one(shares) for one in cost.expected]))

    step = BinaryGates(None)(supernet, cost, loss, BATCH, np.random.default_rng(0))
    assert torch.allclose(step.gradient.double(), differences(whole, supernet.alpha.data, supernet.mask), atol=1e-6)


def test_reinforce_is_the_gradient_of_the_expected_loss() -> None:
    supernet = toy()
    losses = path_losses(supernet, cross_entropy(supernet))
    exact = differences(
        lambda: sum(probability(supernet, path) * value for path, value in losses.items()),
        supernet.alpha,
        supernet.mask,
    )
    shares = supernet.probabilities().detach().double()
    enumerated = sum(
        probability(supernet, path) * value * (path_matrix(np.array(path), shares) - shares)
        for path, value in losses.items()
    )
    assert torch.allclose(enumerated, exact, atol=1e-6)

    def known(batch: Any) -> torch.Tensor:
        return torch.tensor(losses[tuple(mixed.active for mixed in supernet.mixed.values())])

    spread, mean = np.std(list(losses.values())), sum(probability(supernet, one) * two for one, two in losses.items())
    method = Reinforce(samples=10_000, momentum=0.8)
    for baseline in (None, mean + 3 * spread):
        method.baseline = baseline
        step = method(supernet, Cost(table(supernet), []), known, BATCH, np.random.default_rng(0))
        reach = 4 * spread * (1.0 if baseline is None else 4.0) / np.sqrt(10_000)
        assert torch.allclose(step.gradient.double(), exact, atol=reach)
        wanted = step.loss if baseline is None else 0.8 * baseline + 0.2 * step.loss
        assert method.baseline == pytest.approx(wanted)


def test_the_product_form_is_free_of_units_and_one_at_the_reference() -> None:
    supernet = toy()
    costs = table(supernet)
    reference = float(costs.score(np.array([[0, 0]]))[0])
    shares = supernet.probabilities().detach()

    def value(scale: float, factor: float) -> float:
        cost = Cost(costs, [CostTerm("latency", reference * scale, "multiplicative", 0.6)])
        cost.expected[0].costs *= scale
        cost.expected[0].fixed *= scale
        at = torch.tensor(reference * scale * factor) if factor else cost.expected[0](shares)
        return float(cost.combined(torch.tensor(2.0), [at]))

    assert value(1.0, 1.0) == pytest.approx(2.0)
    assert value(1.0, 0.0) == pytest.approx(value(1e6, 0.0))
    assert value(1.0, 0.9) < 2.0 < value(1.0, 1.1)


def test_the_dual_variable_rises_above_the_budget_and_falls_below() -> None:
    costs = table(toy())
    reference = float(costs.score(np.array([[0, 0]]))[0])
    cost = Cost(costs, [CostTerm("latency", reference, "budget", 0.5), CostTerm("macs", 1.0, "additive")])
    cost.raise_duals([reference * 1.2, 3.0])
    assert cost.duals == pytest.approx([0.1, 0.0])
    cost.raise_duals([reference * 0.5, 3.0])
    assert cost.duals == [0.0, 0.0]
    with pytest.raises(InfeasibleError, match="cheapest architecture"):
        Cost(costs, [CostTerm("latency", 1e-9)])


def test_a_budget_comes_down_to_its_reference_in_half_of_the_search() -> None:
    costs = table(toy())
    expected = ExpectedCost(costs, "latency")
    reference = 0.9 * expected.least + 0.1 * expected.mean
    cost = Cost(costs, [CostTerm("latency", reference), CostTerm("macs", 1.0, "additive")])
    assert cost.references == [reference, 1.0]
    limits = []
    for part in (0.0, 0.2, 0.4, 0.5, 1.0):
        cost.tighten(part)
        limits.append(cost.references[0])
        assert cost.references[1] == 1.0
    even = toy().mask.double() / torch.from_numpy(costs.space.sizes)[:, None]
    assert limits[0] == pytest.approx(float(expected(even)))
    assert limits[0] > limits[1] > limits[2] > limits[3] == pytest.approx(reference)
    assert limits[4] == limits[3]
    # The dual variable rises for what is over the limit as it is now.
    cost.tighten(0.2)
    cost.raise_duals([limits[1], 1.0])
    assert cost.duals == pytest.approx([0.0, 0.0])


def test_terms_out_of_range() -> None:
    term = CostTerm("latency", between(0.5))
    assert Cost(mobile_table(), (one for one in (term,))).terms == (term,)  # type: ignore[arg-type]
    for reference in (0.0, "1ms"):
        with pytest.raises(
            BudgetError, match="reference of a cost term, in SI units, has to be above zero and finite, got"
        ):
            CostTerm("latency", reference)  # type: ignore[arg-type]
    with pytest.raises(UnknownNameError, match="additive"):
        CostTerm("latency", 1.0, "addition")


def test_a_limit_above_what_candidates_cost_on_average_stays_where_it_is() -> None:
    costs = table(toy())
    reference = 3 * ExpectedCost(costs, "latency").mean
    cost = Cost(costs, [CostTerm("latency", reference, "budget")])
    for part in (0.0, 0.1, 0.4, 1.0):
        cost.tighten(part)
        assert cost.references == [pytest.approx(reference)]


def test_memory_is_at_least_what_everything_outside_of_blocks_takes() -> None:
    expected = ExpectedCost(table(toy()), "memory")
    assert expected.fixed > 0.0
    assert float(expected.total(torch.tensor([0.1, 0.2]).double())) == expected.fixed
    assert float(expected.total(torch.tensor([0.1, 2.0]).double() * expected.fixed)) == 2.0 * expected.fixed
