"""The solvers against trying everything, and against each other where that would take too long."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxopt.errors import InfeasibleError, SearchError
from fxopt.search import solver
from fxopt.search.solver import solve, solve_lagrangian


def problem(seed: int) -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray]:
    """Few decisions with coarse numbers, so that ties and limits that are just met are common."""
    rng = np.random.default_rng(seed)
    metrics = int(rng.integers(1, 3))
    losses = [rng.normal(size=rng.integers(1, 6)).round(int(rng.integers(0, 3))) for _ in range(rng.integers(1, 6))]
    costs = [rng.normal(1.0, 1.0, (len(table), metrics)).round(1) for table in losses]
    least = np.sum([table.min(axis=0) for table in costs], axis=0)
    return losses, costs, least + rng.uniform(0.0, 3.0, metrics).round(1)


def best_of_all(losses: list[np.ndarray], costs: list[np.ndarray], limits: np.ndarray) -> float:
    best = np.inf
    for combination in itertools.product(*(range(len(table)) for table in losses)):
        spent = np.sum([costs[j][k] for j, k in enumerate(combination)], axis=0)
        if (spent <= limits + 1e-11).all():
            best = min(best, sum(float(losses[j][k]) for j, k in enumerate(combination)))
    return best


@settings(max_examples=150)
@given(st.integers(0, 100_000))
def test_the_solution_is_the_best_of_all(seed: int) -> None:
    losses, costs, limits = problem(seed)
    best = best_of_all(losses, costs, limits)
    if best == np.inf:
        with pytest.raises(InfeasibleError):
            solve(losses, costs, limits)
        return
    found = solve(losses, costs, limits)
    assert found.loss == pytest.approx(best, abs=1e-9)
    assert found.gap <= 1e-6
    assert (found.costs <= limits + 1e-9).all()
    assert found.loss == pytest.approx(sum(table[i] for table, i in zip(losses, found.indices, strict=True)))


@settings(max_examples=150)
@given(st.integers(0, 100_000))
def test_the_lagrangian_bound_holds(seed: int) -> None:
    losses, costs, limits = problem(seed)
    best = best_of_all(losses, costs, limits)
    try:
        found = solve_lagrangian(losses, costs, limits)
    except (InfeasibleError, SearchError):
        assert len(limits) > 1, "one limit that can be met is met"
        return
    assert found.bound - 1e-9 <= best <= found.loss + 1e-9
    assert (found.costs <= limits + 1e-9).all()


def layers(seed: int, count: int, metrics: int = 1) -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray]:
    """Layers with 8 x 8 pairs of bits: losses fall fourfold a bit, costs grow with the product."""
    rng = np.random.default_rng(seed)
    bits = np.arange(1, 9)
    weights, kinds = np.exp(rng.normal(0, 1, (count, metrics))), np.exp(rng.normal(0, 1, (count, 2)))
    product = np.multiply.outer(bits, bits).ravel() / 64
    costs = [product[:, None] * weight * rng.uniform(0.95, 1.05, (64, metrics)) for weight in weights]
    losses = [
        (w * 4.0 ** -bits[:, None] + a * 4.0 ** -bits[None, :]).ravel() * rng.uniform(0.9, 1.1, 64) for w, a in kinds
    ]
    return losses, costs, 0.4 * np.sum([table.max(axis=0) for table in costs], axis=0)


@pytest.mark.parametrize("metrics", [1, 2])
def test_the_two_ways_to_the_optimum_agree(metrics: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """HiGHS, which takes over when there are too many partial solutions, finds the same."""
    losses, costs, limits = layers(2, 24, metrics)
    first = solve(losses, costs, limits)
    monkeypatch.setattr(solver, "_STATES", 1)
    second = solve(losses, costs, limits)
    assert second.loss == pytest.approx(first.loss, rel=1e-6)
    assert (second.costs <= limits * (1 + 1e-9)).all()


def test_many_layers_are_solved_nearly() -> None:
    losses, costs, limits = layers(3, 2000)
    found = solve_lagrangian(losses, costs, limits)
    assert found.gap <= 1e-3 * found.loss
    assert found.costs[0] <= limits[0]
    assert found.costs[0] >= 0.999 * limits[0]


def test_no_limit_that_binds_leaves_the_least_losses() -> None:
    losses, costs, limits = layers(1, 20)
    for method in (solve, solve_lagrangian):
        found = method(losses, costs, 1e3 * limits)
        assert found.indices.tolist() == [int(table.argmin()) for table in losses]
        assert found.gap == 0.0


def test_a_limit_below_the_least_is_told() -> None:
    with pytest.raises(InfeasibleError, match=r"least possible sum of cost 0 is 3, over the limit of 2\.5") as failure:
        solve([[0.0, 1.0], [0.0, 1.0]], [[1.0, 2.0], [2.0, 3.0]], 2.5)
    assert failure.value.least == 3.0
    crossed = [np.array([[0.0, 1.0], [1.0, 0.0]])]
    with pytest.raises(InfeasibleError, match="No choices meet all limits together"):
        solve([[0.0, 0.0]], crossed, [0.5, 0.5])


@pytest.mark.parametrize(
    ("losses", "costs", "message"),
    [
        ([], [], "a loss and 1 costs"),
        ([[0.0, 1.0]], [[1.0]], "a loss and 1 costs"),
        ([[0.0], []], [[1.0], []], "a loss and 1 costs"),
        ([[np.nan]], [[1.0]], "finite"),
        ([[0.0]], [[np.inf]], "finite"),
    ],
)
def test_tables_that_do_not_fit_are_refused(losses: list, costs: list, message: str) -> None:
    with pytest.raises(SearchError, match=message):
        solve(losses, costs, 1.0)
