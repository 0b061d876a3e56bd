"""The learning agents keep every promise of an engine; and what is particular to each."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fxopt.decisions import AdditiveCosts, Constraint, Decision, Policy, SearchSpace
from fxopt.errors import SearchError
from fxopt.search import engines, run_search
from fxopt.search._agent import AgentEngine
from fxopt.search._ladders import Ladder
from fxopt.search._networks import Adam, Perceptron
from fxopt.search._process import DecisionProcess, Interpolated
from fxopt.testing import EngineConformance

SMALL = {"hidden": (32, 32), "warmup": 12}


class TestDDPG(EngineConformance):
    engine = "ddpg"
    options = {**SMALL, "updates": 4, "batch": 64, "decay": 0.96}
    trials = 120
    tolerance = 0.05


class TestDDPGWithDecrease(EngineConformance):
    engine = "ddpg"
    options = {**SMALL, "updates": 1, "batch": 16, "enforce": "decrease", "replay": 16}
    searches = False


BITS = tuple((w, a) for w in range(1, 9) for a in range(1, 9))


def problem(layers: int, seed: int) -> tuple[SearchSpace, Constraint, Any]:
    """Layers whose sensitivity shows in a feature: what an agent learns here it can use elsewhere."""
    rng = np.random.default_rng(seed)
    weights, fragile = rng.uniform(1.0, 4.0, layers), rng.uniform(0.0, 1.0, layers)
    space = SearchSpace(
        [
            Decision("bits", f"conv{i}", BITS, (8, 8), {"weights": w, "fragile": f}, "conv")
            for i, (w, f) in enumerate(zip(weights, fragile, strict=True))
        ]
    )
    product = np.array([w * a for w, a in BITS], dtype=np.float64)
    costs = AdditiveCosts(space, [weight * product for weight in weights])
    limit = 0.4 * float(costs([space.default()])[0, 0])
    lost = np.array([2.0**-w + 2.0**-a for w, a in BITS])
    tables = [np.exp(4.0 * f) * lost for f in fragile]

    def score(policy: Policy) -> float:
        return -sum(float(table[i]) for table, i in zip(tables, space.encode(policy), strict=True))

    return space, Constraint(space, costs, limit, by_index=costs.at), score


def agent(name: str, space: SearchSpace, constraint: Constraint | None, seed: int = 0, **options: Any) -> AgentEngine:
    engine = engines.create(name, space, constraint, seed, **{**SMALL, **options})
    assert isinstance(engine, AgentEngine)
    return engine


def test_an_agent_starts_on_another_network() -> None:
    """What it learnt on eight layers makes, in a few episodes, better policies for twelve others than any drawn."""
    space, constraint, score = problem(8, 0)
    first = agent("ddpg", space, constraint, updates=4, batch=64, decay=0.97)
    run_search(first, score, 70)
    other, limits, judge = problem(12, 1)
    moved = agent("ddpg", other, limits, warm_start=first.agent())
    random = run_search(engines.create("random", other, limits), judge, 60)
    own = moved.policy()
    found = run_search(moved, judge, 15)
    assert found.trials[0].policy == own
    assert found.score > random.score


def test_an_agent_goes_through_a_file(tmp_path: Any) -> None:
    space, constraint, score = problem(6, 0)
    first = agent("ddpg", space, constraint)
    run_search(first, score, 20)
    path = tmp_path / "agents" / "small.json"
    first.save_agent(path)
    again = agent("ddpg", space, constraint, 9, warm_start=path)
    assert again.policy() == first.policy()
    assert again.ask(1) == [first.policy()]
    assert again.options["warm_start"] == str(path)
    path.write_text("{")
    with pytest.raises(SearchError, match=r"Cannot read an agent from .*small\.json"):
        agent("ddpg", space, constraint, warm_start=path)
    with pytest.raises(SearchError, match="no agent"):
        agent("ddpg", space, constraint, warm_start={"features": []})
    with pytest.raises(SearchError, match=r"give hidden=\[32, 32\]"):
        agent("ddpg", space, constraint, warm_start=first.agent(), hidden=(8,))


def test_features_meet_by_name() -> None:
    """An agent from a network that lacks a feature, or has one axis, is taken over all the same."""
    space, constraint, _ = problem(6, 0)
    plain = SearchSpace([Decision("channels", f"conv{i}", (8, 16, 24), 24, {"weights": 1.0 + i}) for i in range(3)])
    one = agent("ddpg", plain, None)
    two = agent("ddpg", space, constraint, warm_start=one.agent())
    names, mine = one.agent()["features"], two.agent()["features"]
    np.testing.assert_array_equal(
        two._actor.weights[0][mine.index("weights")], one._actor.weights[0][names.index("weights")]
    )
    assert not two._actor.weights[0][mine.index("fragile")].any()


@pytest.mark.parametrize(
    "options",
    [
        {"warmup": -1},
        {"noise": 0.0},
        {"decay": 1.5},
        {"hidden": ()},
        {"hidden": (0,)},
        {"enforce": "luck"},
        {"actor_rate": 0.0},
        {"batch": 0},
        {"updates": 0},
        {"replay": 1},
        {"planned": 1.5},
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(SearchError, match=f"{next(iter(options)).split('_')[-1]}|enforce"):
        engines.create("ddpg", problem(2, 0)[0], **options)


@pytest.mark.parametrize("options", [{"batch": 0}, {"baseline": 1.0}, {"rate": -1.0}])
def test_wrong_options_of_reinforce_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(SearchError, match=next(iter(options))):
        engines.create("reinforce", problem(2, 0)[0], **options)


# The process.


def process(constrained: bool = True) -> DecisionProcess:
    space, constraint, _ = problem(5, 3)
    return DecisionProcess(space, constraint if constrained else None)


def test_states_tell_what_was_taken_off() -> None:
    """Costs here are sums: reduced is exact, and with rest it never passes one."""
    made = process()
    rows = np.random.default_rng(0).integers(0, 64, (4, 5))
    states = made.states(rows)
    names = made.features
    reduced, rest = states[..., names.index("reduced")], states[..., names.index("rest")]
    full = made.constraint.costs_at(np.full((1, 5), 63))[0, 0]  # type: ignore[union-attr]
    for j in range(5):
        upto = np.where(np.arange(5) < j, rows, 63)
        saved = 1.0 - made.constraint.costs_at(upto)[:, 0] / full  # type: ignore[union-attr]
        np.testing.assert_allclose(reduced[:, j], saved, atol=1e-12)
    assert (reduced + rest <= 1.0).all()
    assert (rest[:, -1] == 0.0).all()
    np.testing.assert_allclose(states[:, 1:, names.index("last1")], made.actions(rows)[:, :-1, 1])
    np.testing.assert_allclose(made.state(rows[0], 3), states[0, 3])


def test_features_are_scaled_and_constant_ones_are_zero() -> None:
    space = SearchSpace(
        [Decision("channels", f"c{i}", (4, 8), 8, {"wide": 10.0**i, "same": 7.0, "near": 1.0 + i}) for i in range(5)]
    )
    made = DecisionProcess(space, None)
    columns = dict(zip(made.names, made.static.T, strict=True))
    np.testing.assert_allclose(columns["near"], [0.0, 0.25, 0.5, 0.75, 1.0])
    np.testing.assert_allclose(columns["wide"], [0.0, 0.25, 0.5, 0.75, 1.0])
    assert not columns["same"].any()


def test_every_action_names_a_rung_and_comes_back() -> None:
    made = process()
    for choice in range(64):
        assert made.choice(0, made.places[0, choice]) == choice
    assert made.choice(0, np.array([0.0, 1.0])) == BITS.index((1, 8))


@pytest.mark.parametrize("seed", range(5))
def test_a_masked_walk_is_what_the_mask_makes_of_it_step_by_step(seed: int) -> None:
    made = process()
    rng = np.random.default_rng(seed)
    table = rng.uniform(0.3, 1.0, (5, 2))
    row = made.walk(lambda j, state: table[j])
    expected = np.zeros(5, dtype=np.intp)
    for j in range(5):
        allowed = made.constraint.mask(expected[:j], j)  # type: ignore[union-attr]
        wanted = made.choice(j, table[j])
        expected[j] = wanted if allowed[wanted] else made.nearest(j, table[j], allowed)
    np.testing.assert_array_equal(row, expected)
    assert (made.constraint.costs_at(row[None]) <= made.constraint.limits).all()  # type: ignore[union-attr]


def test_an_interpolated_table_is_exact_on_its_rungs_and_its_slopes_are_right() -> None:
    rng = np.random.default_rng(0)
    ladders = [Ladder(BITS), Ladder((8, 16, 24)), Ladder((5,))]
    tables = [rng.normal(size=(len(ladder.rungs), 2)) for ladder in ladders]
    made = Interpolated(ladders, tables)
    for choice in range(64):
        places = np.zeros((1, 3, 2))
        places[0, 0], places[0, 1, 0] = ladders[0].places[choice], ladders[1].places[choice % 3, 0]
        values, _ = made(places)
        np.testing.assert_allclose(values[0, 0], tables[0][choice])
        np.testing.assert_allclose(values[0, 1], tables[1][choice % 3])
    actions = rng.uniform(0.2, 0.8, (4, 3, 2))
    _, slopes = made(actions)
    for axis in range(2):
        step = np.zeros(2)
        step[axis] = 1e-7
        numeric = (made(actions + step)[0] - made(actions - step)[0]) / 2e-7
        np.testing.assert_allclose(slopes[:, :, axis], numeric, atol=1e-5)


# The networks.


@pytest.mark.parametrize("output", ["linear", "sigmoid"])
def test_gradients_are_those_of_finite_differences(output: Any) -> None:
    rng = np.random.default_rng(0)
    network = Perceptron((3, 8, 6, 2), rng, output)
    network.weights[:] = [rng.normal(size=weight.shape) for weight in network.weights]
    inputs, slope = rng.normal(size=(5, 3)), rng.normal(size=(5, 2))
    _, kept = network.forward(inputs)
    gradients, back = network.backward(kept, slope)
    for array, gradient in [*zip(network.weights, gradients, strict=True), (inputs, back)]:
        place = tuple(int(rng.integers(size)) for size in array.shape)
        before = array[place]
        array[place] = before + 1e-6
        up = float((network(inputs) * slope).sum())
        array[place] = before - 1e-6
        down = float((network(inputs) * slope).sum())
        array[place] = before
        assert gradient[place] == pytest.approx((up - down) / 2e-6, rel=1e-4, abs=1e-7)


def test_adam_finds_the_bottom() -> None:
    weights = [np.array([5.0, -3.0], dtype=np.float32)]
    adam = Adam(weights, 0.1)
    for _ in range(400):
        adam.step([2.0 * (weights[0] - np.array([1.0, 2.0], dtype=np.float32))])
    np.testing.assert_allclose(weights[0], [1.0, 2.0], atol=1e-2)


class TestReinforce(EngineConformance):
    engine = "reinforce"
    options = {**SMALL, "noise": 0.3, "rate": 1e-2}
    trials = 240
    tolerance = 0.25
