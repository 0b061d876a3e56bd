"""The exact engine: what it measures, and that it then knows the best."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest

from fxopt.decisions import AdditiveCosts, Constraint, Decision, Policy, SearchSpace
from fxopt.errors import SearchError
from fxopt.search import engines, run_search
from fxopt.search._ladders import Ladder, ladders
from fxopt.search.solver import solve
from fxopt.testing import EngineConformance


class TestExact(EngineConformance):
    engine = "exact"


class TestExactWithFewProbes(EngineConformance):
    engine = "exact"
    options = {"probes": 2}
    trials = 120


WIDTHS = tuple(range(8, 65, 8))
SPACE = SearchSpace([Decision("channels", f"conv{i}", WIDTHS, 64) for i in range(6)])
RNG = np.random.default_rng(5)
LOSSES = [np.sort(RNG.exponential(size=8))[::-1] * 3.0**i for i in range(6)]
PRICES = RNG.uniform(0.5, 2.0, 6)
COSTS = AdditiveCosts(SPACE, [price * np.array(WIDTHS) for price in PRICES])
LIMIT = float(0.5 * COSTS([SPACE.default()])[0, 0])


def constraint() -> Constraint:
    return Constraint(SPACE, COSTS, LIMIT, by_index=COSTS.at)


def score(policy: Policy) -> float:
    return -sum(float(table[i]) for table, i in zip(LOSSES, SPACE.encode(policy), strict=True))


def test_the_first_solution_of_a_sum_is_the_optimum() -> None:
    """After one measurement of every choice, the next policy is the best there is."""
    optimum = solve(LOSSES, COSTS.tables, LIMIT).loss
    result = run_search(engines.create("exact", SPACE, constraint(), seed=0), score, 1 + 6 * 7 + 1)
    assert result.score == pytest.approx(-optimum, rel=1e-9)


def test_without_a_constraint_single_changes_are_measured() -> None:
    asked = engines.create("exact", SPACE, seed=0).ask(43)
    assert asked[0] == SPACE.default()
    changed = [[key for key in policy if policy[key] != 64] for policy in asked[1:]]
    assert all(len(keys) == 1 for keys in changed)
    assert len(set(asked)) == 43


def test_probes_are_spread_over_the_choices() -> None:
    asked = engines.create("exact", SPACE, seed=0, probes=3).ask(100)
    assert len(asked) == 1 + 6 * 3
    tried = sorted(policy["channels", "conv2"] for policy in asked if policy["channels", "conv2"] != 64)
    assert tried == [8, 32, 56]


def test_given_losses_are_solved_at_once() -> None:
    (policy,) = engines.create("exact", SPACE, constraint(), losses=[table.tolist() for table in LOSSES]).ask(1)
    assert -score(policy) == pytest.approx(solve(LOSSES, COSTS.tables, LIMIT).loss, rel=1e-9)


def test_given_losses_are_corrected_by_scores() -> None:
    """Losses that are wrong for one decision are found out."""
    wrong = [table.tolist() for table in LOSSES]
    wrong[5] = wrong[5][::-1]
    result = run_search(engines.create("exact", SPACE, constraint(), losses=wrong), score, 60)
    assert result.score > result.trials[0].score  # type: ignore[operator]
    assert result.score >= -1.1 * solve(LOSSES, COSTS.tables, LIMIT).loss


def products(policies: Sequence[Policy]) -> npt.NDArray[np.float64]:
    """Multiply-accumulates of a chain: no sum over decisions."""
    widths = np.array([[policy["channels", f"conv{i}"] for i in range(6)] for policy in policies], dtype=np.float64)
    return np.asarray((widths[:, 1:] * widths[:, :-1]).sum(axis=1))


def test_costs_that_are_no_sums_are_linearized() -> None:
    """It ends above the best of random search with ten times the trials."""
    limit = float(0.4 * products([SPACE.default()])[0])
    chain = Constraint(SPACE, products, limit)
    found = run_search(engines.create("exact", SPACE, chain, seed=0), score, 60)
    random = run_search(engines.create("random", SPACE, chain, seed=0), score, 600)
    assert found.score > random.score
    assert products([found.policy])[0] <= limit


def test_wrong_options_are_refused() -> None:
    with pytest.raises(SearchError, match="probes=0"):
        engines.create("exact", SPACE, probes=0)
    with pytest.raises(SearchError, match="one table a decision"):
        engines.create("exact", SPACE, losses=[[1.0]])


# Ladders.


def test_pairs_of_bits_that_form_a_grid_have_two_axes() -> None:
    grid = Ladder([(w, a) for a in (8, 4) for w in (2, 4, 8)])
    assert grid.sizes == (3, 2)
    assert grid.choice_at.tolist() == [[3, 0], [4, 1], [5, 2]]
    assert Ladder([(2, 8), (4, 8), (8, 8), (32, 32)]).sizes == (4,)
    assert Ladder([(8, 8)]).sizes == (1,)


def test_names_are_ordered_by_cost() -> None:
    space = SearchSpace([Decision("operator", "block", ("conv7", "skip", "conv3"), "conv3")])
    assert ladders(space, None)[0].rungs[:, 0].tolist() == [0, 1, 2]
    costs = AdditiveCosts(space, [[9.0, 1.0, 4.0]])
    assert ladders(space, Constraint(space, costs, 9.0))[0].rungs[:, 0].tolist() == [2, 0, 1]
