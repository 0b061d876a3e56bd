"""Costs that are sums, and the two ways into a budget."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxopt.decisions import AdditiveCosts, Constraint, Decision, SearchSpace
from fxopt.errors import PolicyError, SearchError

GRID = tuple((w, a) for w in (2, 4, 8) for a in (4, 8))
SPACE = SearchSpace(
    [
        *(Decision("bits", f"conv{i}", GRID, (8, 8)) for i in range(4)),
        Decision("channels", "conv0", (8, 16, 24), 24),
        Decision("operator", "block", ("a", "b"), "a"),
    ]
)


def tables(seed: int, metrics: int = 1) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.uniform(0.5, 2.0, (size, metrics)).cumsum(axis=0) for size in SPACE.sizes]


def test_a_policy_costs_the_sum() -> None:
    costs = AdditiveCosts(SPACE, tables(0, 2), constant=[1.0, 2.0])
    policy = SPACE.sample(np.random.default_rng(1))
    row = SPACE.encode(policy)
    expected = np.array([1.0, 2.0]) + sum(table[i] for table, i in zip(tables(0, 2), row, strict=True))
    np.testing.assert_allclose(costs([policy]), [expected])
    np.testing.assert_allclose(costs.at(row[np.newaxis]), [expected])
    assert costs([]).shape == (0, 2)


@given(st.integers(0, 1000))
def test_the_additive_part_of_a_sum_is_the_sum(seed: int) -> None:
    rng = np.random.default_rng(seed)
    costs = AdditiveCosts(SPACE, tables(seed), 3.0)
    base, other = rng.integers(0, SPACE.sizes, (2, len(SPACE)))
    np.testing.assert_allclose(AdditiveCosts.around(SPACE, costs.at, base).at(other[None]), costs.at(other[None]))


def test_the_additive_part_is_exact_at_single_changes() -> None:
    def product(rows: np.ndarray) -> np.ndarray:
        return np.asarray((1.0 + rows).prod(axis=1, keepdims=True), dtype=np.float64)

    base = np.ones(len(SPACE), dtype=np.intp)
    part = AdditiveCosts.around(SPACE, product, base)
    for j, size in enumerate(SPACE.sizes):
        rows = np.repeat(base[None], size, axis=0)
        rows[:, j] = np.arange(size)
        np.testing.assert_allclose(part.at(rows), product(rows))


@pytest.mark.parametrize("wrong", [[], [[1.0]], [*tables(0)[:-1], [[1.0]]], [*tables(0)[:-1], [np.inf, 1.0]]])
def test_tables_that_do_not_fit_are_refused(wrong: list) -> None:
    with pytest.raises(SearchError, match="Additive costs"):
        AdditiveCosts(SPACE, wrong)


@given(st.integers(0, 1000))
def test_by_index_changes_nothing(seed: int) -> None:
    rng = np.random.default_rng(seed)
    costs = AdditiveCosts(SPACE, tables(seed, 2))
    limits = 0.6 * costs([SPACE.default()])[0]
    slow, fast = Constraint(SPACE, costs, limits), Constraint(SPACE, costs, limits, by_index=costs.at)
    wanted = [SPACE.sample(rng) for _ in range(4)]
    assert fast.project_all(wanted) == slow.project_all(wanted)
    assert fast.cheapest() == slow.cheapest()
    prefix = SPACE.encode(fast.project(wanted[0]))[:3]
    np.testing.assert_array_equal(fast.mask(prefix, 3), slow.mask(prefix, 3))


def test_costs_by_index_are_checked() -> None:
    costs = AdditiveCosts(SPACE, tables(0))
    limit = float(costs([SPACE.default()])[0, 0])
    rows = np.zeros((2, len(SPACE)), dtype=np.intp)
    with pytest.raises(SearchError, match="policies and"):
        Constraint(SPACE, costs, limit, by_index=lambda rows: np.zeros((1, 1)))
    worse = Constraint(SPACE, costs, limit, by_index=costs.at)
    worse._by_index = lambda rows: np.full((len(rows), 1), np.nan)
    with pytest.raises(SearchError, match="NaN cost"):
        worse.costs_at(rows)
    with pytest.raises(PolicyError, match="out of range"):
        Constraint(SPACE, costs, limit).costs_at(rows + 99)


# HAQ's decrease.


def decreasing(limit: float, seed: int = 0) -> Constraint:
    costs = AdditiveCosts(SPACE, tables(seed))
    return Constraint(SPACE, costs, limit, by_index=costs.at)


def full() -> float:
    return float(AdditiveCosts(SPACE, tables(0))([SPACE.default()])[0, 0])


def test_a_policy_within_the_limits_is_left_alone() -> None:
    assert decreasing(full()).project_all([SPACE.default()], enforce="decrease") == [SPACE.default()]


def test_the_last_decision_goes_first_and_activations_before_weights() -> None:
    """A budget just missed costs one step; each smaller one, one step more, in HAQ's order."""
    keys = [("channels", "conv0"), *(("bits", f"conv{i}") for i in (3, 2, 1, 0))]
    steps = [(keys[0], 16)] + [(key, pair) for key in keys[1:] for pair in ((8, 4), (4, 4))]
    policy = SPACE.default()
    for key, choice in steps:
        lower = policy.merged({key: choice})
        (cost,) = AdditiveCosts(SPACE, tables(0))([lower])[0]
        assert decreasing(float(cost) + 1e-9).project_all([SPACE.default()], enforce="decrease") == [lower]
        policy = lower


@given(st.integers(0, 1000), st.floats(0.25, 1.0))
def test_decrease_meets_every_limit_that_can_be_met(seed: int, part: float) -> None:
    rng = np.random.default_rng(seed)
    costs = AdditiveCosts(SPACE, tables(seed))
    low = sum(float(table.min()) for table in tables(seed))
    limit = low + part * float(costs([SPACE.default()])[0, 0] - low)
    limits = decreasing(limit, seed)
    lowered = limits.project_all([SPACE.sample(rng) for _ in range(3)], enforce="decrease")
    assert limits.feasible(lowered).all()


def test_an_unknown_way_is_refused() -> None:
    with pytest.raises(SearchError, match="'mask' or by 'decrease'"):
        decreasing(full()).project_all([SPACE.default()], enforce="luck")  # type: ignore[arg-type]
