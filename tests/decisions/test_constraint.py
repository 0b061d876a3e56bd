"""Constraints: what is within the limits, and the nearest policy that is."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxopt.decisions import Constraint, Decision, Policy, SearchSpace
from fxopt.errors import BudgetError, InfeasibleError, PolicyError, SearchError
from tests.decisions.strategies import Cost, additive, arbitrary, policies, spaces

SEEDS = st.integers(0, 2**32)
FRACTIONS = st.floats(0.0, 1.0)


def every(space: SearchSpace) -> list[Policy]:
    return space.decode_all(np.array(list(itertools.product(*map(range, space.sizes)))).reshape(-1, len(space)))


def between(costs: npt.NDArray[np.float64], fraction: float) -> float:
    """A limit that at least one policy meets, and all of them at fraction 1."""
    ordered = np.sort(costs)
    return float(ordered[round(fraction * (len(ordered) - 1))])


def constrained(data: st.DataObject, kind: str, max_size: int = 4) -> tuple[Constraint, Cost]:
    space = data.draw(spaces(min_size=1, max_size=max_size))
    seed = data.draw(SEEDS)
    cost = additive(space, seed) if kind == "additive" else arbitrary(space, seed)
    return Constraint(space, cost, between(cost(every(space)), data.draw(FRACTIONS)), ["latency"]), cost


@given(st.data())
def test_the_cheapest_is_the_least_for_additive_costs(data: st.DataObject) -> None:
    constraint, cost = constrained(data, "additive")
    assert cost([constraint.cheapest()])[0] == pytest.approx(cost(every(constraint.space)).min(), rel=1e-12)


@given(st.data())
def test_the_cheapest_is_feasible_for_any_cost(data: st.DataObject) -> None:
    constraint, cost = constrained(data, "arbitrary")
    assert cost([constraint.cheapest()])[0] <= constraint.limits[0]


@given(st.data())
def test_feasible_is_the_comparison_with_the_limit(data: st.DataObject) -> None:
    constraint, cost = constrained(data, "arbitrary")
    batch = every(constraint.space)
    assert constraint.feasible(batch).tolist() == (cost(batch) <= constraint.limits[0]).tolist()
    assert constraint.feasible([]).tolist() == []


@given(st.data(), st.sampled_from(["additive", "arbitrary"]))
def test_projecting_is_always_feasible_and_leaves_the_feasible_alone(data: st.DataObject, kind: str) -> None:
    constraint, cost = constrained(data, kind)
    space = constraint.space
    wanted = [data.draw(policies(space)) for _ in range(4)]
    orders = [data.draw(st.permutations(range(len(space)))) for _ in wanted]
    projected = constraint.project_all(wanted, np.array(orders))
    assert (cost(projected) <= constraint.limits[0]).all()
    for before, after, order in zip(wanted, projected, orders, strict=True):
        space.validate(after)
        assert len(after) == len(space)
        assert (after == before) or not constraint.feasible([before])[0]
        assert constraint.project(before, order) == after
        assert constraint.project(after, order) == after


@given(st.data())
def test_the_walk_is_the_one_by_one_walk_under_the_mask(data: st.DataObject) -> None:
    constraint, _ = constrained(data, "additive", max_size=5)
    space = constraint.space
    wanted = data.draw(policies(space))
    order = data.draw(st.permutations(range(len(space))))
    if constraint.feasible([wanted])[0]:
        return
    target = space.encode(wanted)
    chosen: list[int] = []
    for i in order:
        allowed = np.flatnonzero(constraint.mask(chosen, i, order))
        chosen.append(int(min(allowed, key=lambda choice: (abs(choice - target[i]), choice))))
    expected = np.empty(len(space), dtype=np.intp)
    expected[list(order)] = chosen
    assert constraint.project(wanted, order) == space.decode(expected)


@given(st.data())
def test_the_mask_agrees_with_brute_force(data: st.DataObject) -> None:
    constraint, cost = constrained(data, "additive")
    space = constraint.space
    order = data.draw(st.permutations(range(len(space))))
    decided = data.draw(st.integers(0, len(space) - 1))
    full = space.encode(data.draw(policies(space)))
    i = order[decided]
    batch = every(space)
    rows = np.array([space.encode(policy) for policy in batch])
    matches = (rows[:, order[:decided]] == full[order[:decided]]).all(axis=1)
    totals = cost(batch)
    least = [totals[matches & (rows[:, i] == choice)].min() for choice in range(int(space.sizes[i]))]
    clear = np.abs(np.array(least) - constraint.limits[0]) > 1e-9
    expected = np.array(least) <= constraint.limits[0]
    by_index = constraint.mask(full[order[:decided]], i, order)
    assert by_index[clear].tolist() == expected[clear].tolist()
    prefix = Policy({space[j].key: space[j].choices[full[j]] for j in order[:decided]})
    assert constraint.mask(prefix, i).tolist() == by_index.tolist()


@given(st.data(), st.sampled_from(["additive", "arbitrary", "two"]))
def test_a_walk_under_the_mask_never_gets_stuck(data: st.DataObject, kind: str) -> None:
    if kind == "two":
        constraint = two_metrics(data)
    else:
        constraint, _ = constrained(data, kind)
    chosen: list[int] = []
    for i in range(len(constraint.space)):
        allowed = np.flatnonzero(constraint.mask(chosen, i))
        assert len(allowed)
        chosen.append(int(data.draw(st.sampled_from(allowed.tolist()))))
    assert constraint.feasible([constraint.space.decode(chosen)])[0]


def two_metrics(data: st.DataObject) -> Constraint:
    """Limits that one random policy just meets; there may be no other."""
    space = data.draw(spaces(min_size=1))
    cost = additive(space, data.draw(SEEDS), metrics=2)
    return Constraint(space, cost, cost([data.draw(policies(space))])[0], ["latency", "size"])


@given(st.data())
def test_two_limits_hold_at_once(data: st.DataObject) -> None:
    constraint = two_metrics(data)
    wanted = [data.draw(policies(constraint.space)) for _ in range(3)]
    for policy in [constraint.cheapest(), *constraint.project_all(wanted)]:
        assert (constraint.costs([policy])[0] <= constraint.limits).all()


@given(st.data())
def test_what_the_mask_allows_under_two_limits_can_be_completed(data: st.DataObject) -> None:
    constraint = two_metrics(data)
    batch = [policy for policy in every(constraint.space) if constraint.feasible([policy])[0]]
    reachable = {constraint.space.encode(policy)[0] for policy in batch}
    assert set(np.flatnonzero(constraint.mask([], 0))) <= reachable


SPACE = SearchSpace([Decision("channels", f"conv{i}", (8, 16, 24, 32), 32) for i in range(3)])


def total(batch: Sequence[Policy]) -> npt.NDArray[np.float64]:
    return np.array([float(sum(policy.values())) for policy in batch])  # type: ignore[arg-type]


def test_early_decisions_keep_what_they_want_and_late_ones_make_room() -> None:
    constraint = Constraint(SPACE, total, 64.0)
    wanted = SPACE.default()
    assert [*constraint.project(wanted).values()] == [32, 24, 8]
    assert constraint.project(wanted, [2, 0, 1]) == {
        ("channels", "conv2"): 32,
        ("channels", "conv0"): 24,
        ("channels", "conv1"): 8,
    }


def test_the_cheapest_is_found_by_cost_and_not_by_order() -> None:
    prices = {8: 5.0, 16: 3.0, 24: 4.0, 32: 6.0}

    def cost(batch: Sequence[Policy]) -> npt.NDArray[np.float64]:
        return np.array([sum(prices[choice] for choice in policy.values()) for policy in batch])  # type: ignore[index]

    constraint = Constraint(SPACE, cost, 12.0)
    assert set(constraint.cheapest().values()) == {16}
    assert constraint.mask([], 0).tolist() == [True, True, True, True]
    assert constraint.mask([3], 1).tolist() == [False, True, False, False]


def test_partial_policies_are_completed() -> None:
    constraint = Constraint(SPACE, total, 80.0)
    assert constraint.feasible([Policy(), Policy({("channels", "conv0"): 8})]).tolist() == [False, True]
    assert len(constraint.project(Policy())) == 3


def test_the_whole_batch_is_costed_at_once() -> None:
    space = SearchSpace([Decision("channels", f"conv{i}", tuple(range(1, 9)), 8) for i in range(40)])
    calls: list[int] = []

    def cost(batch: Sequence[Policy]) -> npt.NDArray[np.float64]:
        calls.append(len(batch))
        return total(batch)

    constraint = Constraint(space, cost, 160.0)
    calls.clear()
    constraint.mask([], 0)
    assert calls == [8]
    calls.clear()
    rng = np.random.default_rng(0)
    constraint.project_all([space.sample(rng) for _ in range(64)])
    assert len(calls) < 2 * len(space) + 4, "64 policies are walked in as many calls as one"
    calls.clear()
    order = np.arange(40)
    wanted = space.decode([2] * 39 + [7])
    assert constraint.project(wanted, order) == space.decode([2] * 39 + [7])
    Constraint(space, cost, 123.0).project(wanted, order)
    calls.clear()
    Constraint(space, cost, 123.0).project(wanted, order)
    assert len(calls) < 20, "what is allowed is walked many decisions at a time"


def test_a_cost_that_wavers_does_not_slip_through() -> None:
    """A cost that depends on the batch by a rounding error: the result is still within when costed again."""

    def cost(batch: Sequence[Policy]) -> npt.NDArray[np.float64]:
        return total(batch) * (1.0 + 1e-15 * (len(batch) == 3))

    constraint = Constraint(SPACE, cost, 72.0)
    wanted = [SPACE.default()] * 3
    assert (cost(constraint.project_all(wanted)) <= 72.0).all()


def test_infeasible_says_by_how_much_and_what_is_possible() -> None:
    with pytest.raises(
        InfeasibleError, match=r"least possible latency is 24 s, over the budget of 20 s by 20\.0%"
    ) as one:
        Constraint(SPACE, total, 20.0, ["latency"])
    assert (one.value.metric, one.value.limit, one.value.least) == ("latency", 20.0, 24.0)
    with pytest.raises(InfeasibleError, match=r"is 24 s, 24 times the budget of 1 s\."):
        Constraint(SPACE, total, 1.0, ["latency"])


def test_the_advice_of_an_infeasible_budget_is_enough() -> None:
    def cost(batch: Sequence[Policy]) -> npt.NDArray[np.float64]:
        return total(batch) * 1.2346e-6

    with pytest.raises(InfeasibleError, match=r"is 29\.63 us.*Raise the latency budget to 29\.64 us"):
        Constraint(SPACE, cost, 1e-6, ["latency"])
    Constraint(SPACE, cost, 29.64e-6, ["latency"])


def test_infeasible_names_the_metric_that_is_over() -> None:
    def cost(batch: Sequence[Policy]) -> npt.NDArray[np.float64]:
        return np.stack([total(batch), 2 * total(batch)], axis=1)

    with pytest.raises(InfeasibleError, match="least possible size is 48 B") as failure:
        Constraint(SPACE, cost, [30.0, 40.0], ["latency", "size"])
    assert failure.value.metric == "size"


def test_budgets_that_exclude_one_another_are_infeasible_together() -> None:
    space = SearchSpace([Decision("rank", "fc", (1, 2), 2)])

    def cost(batch: Sequence[Policy]) -> npt.NDArray[np.float64]:
        return np.array([[policy["rank", "fc"], 3 - policy["rank", "fc"]] for policy in batch], dtype=float)  # type: ignore[operator]

    with pytest.raises(InfeasibleError, match="together"):
        Constraint(space, cost, [1.5, 1.5], ["latency", "size"])


@pytest.mark.parametrize("limits", [[9.0, 33.0], [5.0, 51.0], [14.5, 14.5], [20.0, 5.0]])
def test_budgets_that_pull_apart_are_met_together_in_a_large_space(limits: list[float]) -> None:
    """Sites that are all alike: what meets both limits is a mixture, and no weighted sum of the metrics finds it."""
    space = SearchSpace([Decision("rank", f"fc{i}", (0, 1, 2, 3), 3) for i in range(8)])
    assert space.policies > 4096

    def cost(batch: Sequence[Policy]) -> npt.NDArray[np.float64]:
        ranks = np.array([list(policy.values()) for policy in batch], dtype=float)
        return np.stack([ranks.sum(axis=1), ((3 - ranks) ** 2).sum(axis=1)], axis=1)

    constraint = Constraint(space, cost, limits, ["latency", "size"])
    assert (cost([constraint.cheapest()]) <= limits).all()
    rng = np.random.default_rng(0)
    assert (cost(constraint.project_all([space.sample(rng) for _ in range(20)])) <= limits).all()


def test_a_cost_with_a_detour_is_descended_step_by_step() -> None:
    """All steps at once would be dearer: the descent takes as many as pay."""
    space = SearchSpace([Decision("rank", f"fc{i}", (0, 1), 0) for i in range(14)])
    assert space.policies > 4096

    def cost(batch: Sequence[Policy]) -> npt.NDArray[np.float64]:
        return np.array([1.0 + abs(sum(policy.values()) - 5) for policy in batch])  # type: ignore[arg-type]

    constraint = Constraint(space, cost, 1.5)
    assert sum(constraint.cheapest().values()) == 5  # type: ignore[arg-type]


def test_small_spaces_are_searched_through_before_giving_up() -> None:
    """Only one corner is feasible, and every single step towards it is dearer."""

    def cost(batch: Sequence[Policy]) -> npt.NDArray[np.float64]:
        sums = total(batch)
        return np.where(sums == 24, 1.0, 200.0 - sums)

    constraint = Constraint(SPACE, cost, 50.0)
    assert set(constraint.cheapest().values()) == {8}


def test_an_impossible_choice_may_cost_infinity() -> None:
    def cost(batch: Sequence[Policy]) -> npt.NDArray[np.float64]:
        return np.array([np.inf if 8 in policy.values() else sum(policy.values()) for policy in batch])  # type: ignore[arg-type]

    constraint = Constraint(SPACE, cost, 60.0)
    assert set(constraint.cheapest().values()) == {16}
    assert constraint.mask([], 0).tolist() == [False, True, True, False]


@pytest.mark.parametrize("limits", [0.0, -1.0, float("nan"), float("inf"), [], [[1.0]], [1.0, 0.0]])
def test_malformed_limits_are_refused(limits: object) -> None:
    with pytest.raises(BudgetError):
        Constraint(SPACE, total, limits)  # type: ignore[arg-type]


def test_a_name_for_each_metric() -> None:
    with pytest.raises(BudgetError, match="1 limits and 2 metrics"):
        Constraint(SPACE, total, 60.0, ["latency", "size"])


@pytest.mark.parametrize("shape", ["wrong count", "wrong metrics", "scalar"])
def test_a_cost_of_another_shape_is_refused(shape: str) -> None:
    def cost(batch: Sequence[Policy]) -> npt.NDArray[np.float64]:
        return np.ones({"wrong count": (len(batch) + 1,), "wrong metrics": (len(batch), 2), "scalar": ()}[shape])

    with pytest.raises(SearchError, match="shape"):
        Constraint(SPACE, cost, 60.0)


def test_a_cost_that_is_nan_is_refused() -> None:
    with pytest.raises(SearchError, match="NaN latency"):
        Constraint(SPACE, lambda batch: np.full(len(batch), np.nan), 60.0, ["latency"])


def test_walks_and_prefixes_are_checked() -> None:
    constraint = Constraint(SPACE, total, 60.0)
    for order in ([0, 1], [0, 1, 1], [0, 1, 3], [[0, 1, 2]] * 2):
        with pytest.raises(PolicyError, match="permutation"):
            constraint.project(SPACE.default(), order)  # type: ignore[arg-type]
    for prefix in ([4], [-1], [0, 0, 0, 0]):
        with pytest.raises(PolicyError, match="prefix"):
            constraint.mask(prefix, 1)
    with pytest.raises(PolicyError, match="conv9"):
        constraint.mask(Policy({("channels", "conv9"): 8}), 0)
    with pytest.raises(PolicyError, match="conv9"):
        constraint.project({("channels", "conv9"): 8})
    assert constraint.project_all([]) == []


def test_a_space_without_decisions() -> None:
    constraint = Constraint(SearchSpace(), lambda batch: np.ones(len(batch)), 2.0)
    assert constraint.cheapest() == Policy()
    assert constraint.project(Policy()) == Policy()
    with pytest.raises(InfeasibleError):
        Constraint(SearchSpace(), lambda batch: np.ones(len(batch)), 0.5)
