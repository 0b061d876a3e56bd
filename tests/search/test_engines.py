"""The built-in engines keep every promise of an engine; and what is particular to each."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import pytest

from fxopt.decisions import Constraint, Decision, Policy, SearchSpace
from fxopt.errors import PolicyError, SearchError, UnknownNameError
from fxopt.search import FAILED, Engine, engines
from fxopt.testing import EngineConformance


class TestUniform(EngineConformance):
    engine = "uniform"
    searches = False


class TestRandom(EngineConformance):
    engine = "random"
    searches = False


class TestGreedy(EngineConformance):
    engine = "greedy"


class TestEvolution(EngineConformance):
    engine = "evolution"


class TestEvolutionWithOptions(EngineConformance):
    engine = "evolution"
    options = {"population": 8, "tournament": 2, "crossover": 1.0, "mutation": 0.2}
    searches = False


CHANNELS = SearchSpace([Decision("channels", f"conv{i}", tuple(range(4, 41, 4)), 40) for i in range(4)])
BITS = SearchSpace([Decision("bits", f"conv{i}", ((32, 32), (8, 8), (4, 8)), (32, 32)) for i in range(3)])


def total(batch: Sequence[Policy]) -> npt.NDArray[np.float64]:
    sizes = [[sum(c) if isinstance(c, tuple) else int(c) for c in policy.values()] for policy in batch]
    return np.array(sizes, dtype=np.float64).reshape(len(batch), -1).sum(axis=1)


def run(engine: Engine, trials: int, score: Callable[[Policy], float] = lambda _: 0.0) -> list[Policy]:
    asked: list[Policy] = []
    while len(asked) < trials and (batch := engine.ask(1)):
        engine.tell(batch[0], score(batch[0]))
        asked += batch
    return asked


# Uniform.


def test_uniform_starts_at_the_largest_feasible_fraction() -> None:
    constraint = Constraint(CHANNELS, total, 100.0)
    first, second = run(engines.create("uniform", CHANNELS, constraint, steps=10), 2)
    assert set(first.values()) == {24}, "0.6 of 40; 0.7 of 40 would be 112 in all"
    assert second == constraint.project(CHANNELS.uniform(0.7))


def test_uniform_tries_every_fraction_once() -> None:
    asked = run(engines.create("uniform", CHANNELS, steps=10), 100)
    assert [set(policy.values()) for policy in asked] == [{40 - 4 * i} for i in range(10)]
    assert engines.create("uniform", CHANNELS, steps=20).ask(1) == [CHANNELS.default()]
    assert len(run(engines.create("uniform", CHANNELS, steps=20), 100)) == 10


def test_uniform_walks_the_bits_too() -> None:
    asked = run(engines.create("uniform", BITS), 100)
    assert [set(policy.values()) for policy in asked] == [{(32, 32)}, {(8, 8)}, {(4, 8)}]
    both = SearchSpace([*CHANNELS, *BITS])
    asked = run(engines.create("uniform", both, steps=2), 100)
    assert len(asked) == 6
    assert [policy["bits", "conv0"] for policy in asked] == [(32, 32), (8, 8), (4, 8)] * 2


def test_uniform_gives_the_same_whatever_the_batch() -> None:
    constraint = Constraint(CHANNELS, total, 90.0)
    one = run(engines.create("uniform", CHANNELS, constraint), 100)
    assert engines.create("uniform", CHANNELS, constraint).ask(100) == one
    assert len(set(one)) == len(one)


FINE = SearchSpace([Decision("channels", f"conv{i}", tuple(range(1, 101)), 100) for i in range(4)])


@pytest.mark.parametrize("name", ["random", "evolution"])
def test_a_search_starts_from_the_largest_uniform_policy_within_the_budget(name: str) -> None:
    """4 x 61 = 244 of at most 246; steps of a twentieth would stop at 4 x 60."""
    constraint = Constraint(FINE, total, 246.0)
    for seed in range(2):
        first, second = run(engines.create(name, FINE, constraint, seed), 2)
        assert set(first.values()) == {61}
        assert second != first
    assert run(engines.create(name, FINE), 1) == [FINE.default()]


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_what_random_draws_does_not_depend_on_where_it_starts_or_on_batches(batch: int) -> None:
    constraint = Constraint(FINE, total, 246.0)
    alone = run(engines.create("random", FINE, constraint, uniform=0), 8)
    asked: list[Policy] = []
    engine = engines.create("random", FINE, constraint, uniform=2)
    while len(asked) < 8:
        asked += engine.ask(batch)
    assert asked[2:8] == alone[2:]
    assert asked[0] != alone[0]
    with pytest.raises(SearchError, match="uniform=-1"):
        engines.create("random", FINE, uniform=-1)


# Greedy.


def separable(policy: Policy) -> float:
    """Best at 16 channels everywhere, and twice as sensitive from site to site."""
    return -sum(2.0**i * abs(int(policy["channels", f"conv{i}"]) - 16) for i in range(4))  # type: ignore[arg-type]


def test_greedy_solves_a_sum_in_one_sweep() -> None:
    moves = int(CHANNELS.sizes.sum())
    for seed in range(5):
        asked = run(engines.create("greedy", CHANNELS, seed=seed), 1 + moves, separable)
        assert max(map(separable, asked)) == 0.0


def test_greedy_starts_from_the_best_uniform_policy() -> None:
    constraint = Constraint(CHANNELS, total, 100.0)
    assert set(engines.create("greedy", CHANNELS, constraint).ask(1)[0].values()) == {24}


def test_greedy_lets_insensitive_sites_make_room() -> None:
    """More channels score more, most of all at conv3: a tight budget has to be moved there."""
    constraint = Constraint(CHANNELS, total, 100.0)

    def score(policy: Policy) -> float:
        return sum(10.0**i * int(policy["channels", f"conv{i}"]) for i in range(4))  # type: ignore[arg-type]

    best = max(run(engines.create("greedy", CHANNELS, constraint, seed=0), 120, score), key=score)
    assert [*best.values()] == [4, 16, 40, 40]


def test_greedy_projects_the_most_sensitive_first() -> None:
    """At a tight budget conv0 is moved up; the site with the smallest change of score per move makes room."""
    constraint = Constraint(CHANNELS, total, 64.0)
    engine = engines.create("greedy", CHANNELS, constraint, seed=0)
    state = engine.state_dict()
    for least in (1, 2, 3):
        changes = [5.0] * 4
        changes[least] = 2.0
        extra = {"base": [3, 3, 3, 3], "base_score": 0.0, "queue": [[0, 5]], "improved": False}
        state["extra"].update(extra, changes=changes, counts=[1.0, 1.0, 1.0, 1.0])
        engine.load_state_dict(state)
        expected = [24, 16, 16, 16]
        expected[least] = 8
        assert [*engine.ask(1)[0].values()] == expected


def test_greedy_waits_for_the_sweep_before_it_restarts() -> None:
    engine = engines.create("greedy", BITS, seed=0)
    asked = engine.ask(100)
    assert len(asked) == 1 + 3 * 2, "the base and its neighbours"
    assert engine.ask(1) == [], "nothing more before it is told"
    for policy in asked:
        engine.tell(policy, -total([policy])[0])
    assert engine.ask(1) != []


def test_greedy_resumes_at_any_point_of_a_sweep() -> None:
    expected = run(engines.create("greedy", BITS, seed=4), 27, lambda policy: total([policy])[0])
    for told in range(27):
        engine = engines.create("greedy", BITS, seed=4)
        run(engine, told, lambda policy: total([policy])[0])
        resumed = engines.create("greedy", BITS, seed=0)
        resumed.load_state_dict(engine.state_dict())
        assert run(resumed, 27 - told, lambda policy: total([policy])[0]) == expected[told:]


def test_greedy_never_repeats_and_ends_when_all_is_tried() -> None:
    asked = run(engines.create("greedy", BITS, seed=0), 1000, lambda policy: -total([policy])[0])
    assert len(asked) == len(set(asked))
    assert len(asked) == BITS.policies
    engine = engines.create("greedy", BITS, seed=0)
    asked = run(engine, 1000, lambda _: FAILED)
    assert len(asked) == len(set(asked)) > BITS.policies // 2
    assert engine.ask(1) == []


# Evolution.


def test_evolution_starts_with_uniform_policies() -> None:
    constraint = Constraint(CHANNELS, total, 100.0)
    asked = engines.create("evolution", CHANNELS, constraint, seed=0).ask(3)
    assert set(asked[0].values()) == {24}


def test_evolution_avoids_repeats_while_there_is_something_new() -> None:
    asked = run(engines.create("evolution", CHANNELS, seed=0, population=6), 100, separable)
    assert len(set(asked)) == 100
    assert len(run(engines.create("evolution", BITS, seed=0, population=6), 60)) == 60, "repeats when all are tried"


@pytest.mark.parametrize(
    "options",
    [{"population": 1}, {"tournament": 0}, {"crossover": 1.5}, {"mutation": -0.1}, {"mutation": float("nan")}],
)
def test_evolution_refuses_other_options(options: dict[str, float]) -> None:
    with pytest.raises(SearchError, match=next(iter(options))):
        engines.create("evolution", CHANNELS, **options)


def test_uniform_refuses_no_steps() -> None:
    with pytest.raises(SearchError, match="steps=0"):
        engines.create("uniform", CHANNELS, steps=0)


# The base class.


class Fixed(Engine):
    """Proposes what it is given."""

    name = "fixed"

    def __init__(
        self, space: SearchSpace, constraint: Constraint | None = None, seed: int = 0, *, proposals: Sequence = ()
    ) -> None:
        super().__init__(space, constraint, seed)
        self.proposals = proposals

    def propose(self, n: int) -> Sequence[Policy]:
        return self.proposals

    def observe(self, policy: Policy, score: float) -> None:
        self.observed = (policy, score)


def test_what_a_proposal_leaves_out_is_default() -> None:
    assert Fixed(CHANNELS, proposals=[Policy()]).ask(1) == [CHANNELS.default()]


def test_a_wrong_proposal_is_refused() -> None:
    constraint = Constraint(CHANNELS, total, 100.0)
    with pytest.raises(SearchError, match="'fixed' proposed a policy over the budget"):
        Fixed(CHANNELS, constraint, proposals=[CHANNELS.default()]).ask(1)
    with pytest.raises(SearchError, match="2 policies when asked for 1"):
        Fixed(CHANNELS, proposals=[Policy(), Policy()]).ask(1)
    with pytest.raises(PolicyError, match="conv9"):
        Fixed(CHANNELS, proposals=[Policy({("channels", "conv9"): 4})]).ask(1)


def test_a_policy_may_be_pending_twice() -> None:
    engine = Fixed(CHANNELS, proposals=[Policy(), Policy()])
    first, second = engine.ask(2)
    engine.tell(first, 1.0)
    assert engine.pending == (second,)
    engine.tell(second, FAILED)
    assert engine.observed == (second, FAILED)
    assert engine.pending == ()


@pytest.mark.parametrize("score", [float("nan"), float("inf")])
def test_only_numbers_and_failed_are_scores(score: float) -> None:
    engine = Fixed(CHANNELS, proposals=[Policy()])
    (policy,) = engine.ask(1)
    with pytest.raises(SearchError, match="finite number, or FAILED"):
        engine.tell(policy, score)


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(SearchError, match="another search space"):
        Fixed(BITS, Constraint(CHANNELS, total, 100.0))
    with pytest.raises(SearchError, match="non-negative"):
        Fixed(BITS, seed=-1)
    with pytest.raises(SearchError, match="at least one"):
        Fixed(BITS).ask(0)
    with pytest.raises(SearchError, match="lacks asked, engine"):
        Fixed(BITS).load_state_dict({})
    with pytest.raises(SearchError, match="keeps nothing"):
        Fixed(BITS).load_state_dict({**Fixed(BITS).state_dict(), "extra": {"a": 1}})


# The registry.


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines._ENGINES, "_entries", dict(engines._ENGINES._entries))


def test_the_built_in_engines_are_known_by_name() -> None:
    assert {"uniform", "random", "greedy", "evolution"} <= set(engines.names())
    for name in ("uniform", "random", "greedy", "evolution"):
        assert engines.load(name).name == name


def test_an_unknown_engine_is_suggested_a_name() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'evolution'") as failure:
        engines.create("evolutoin", CHANNELS)
    assert failure.value.suggestion == "evolution"


def test_an_unknown_option_lists_the_known() -> None:
    with pytest.raises(SearchError, match=r"no option 'popsize'; its options are population, tournament, crossover"):
        engines.create("evolution", CHANNELS, popsize=3)
    with pytest.raises(SearchError, match="its options are uniform"):
        engines.create("random", CHANNELS, popsize=3)


@pytest.mark.usefixtures("registry")
def test_engines_are_registered_as_classes_or_paths() -> None:
    engines.register("fixed", Fixed)
    assert isinstance(engines.create("fixed", CHANNELS, seed=3, proposals=()), Fixed)
    engines.register("mine", "fxopt.search._random:RandomEngine")
    assert engines.create("mine", CHANNELS).name == "random"
    with pytest.raises(SearchError, match="'mine' already"):
        engines.register("mine", Fixed)


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize("path", ["no_such_module:Engine", "fxopt.search:NoSuchEngine", "fxopt.search:Trial"])
def test_a_path_that_leads_to_no_engine_is_named(path: str) -> None:
    engines.register("broken", path)
    with pytest.raises(SearchError, match=f"'broken'.*{path}"):
        engines.create("broken", CHANNELS)


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize("path", ["", "module", "module:", ":Class"])
def test_a_malformed_path_is_refused(path: str) -> None:
    with pytest.raises(SearchError, match=r"package\.module:Class"):
        engines.register("broken", path)


def test_with_a_budget_the_widest_even_bits_within_it_come_first() -> None:
    pairs = tuple((w, a) for w in range(2, 9) for a in range(2, 9))
    space = SearchSpace([Decision("bits", f"conv{i}", pairs, (8, 8)) for i in range(3)])
    constraint = Constraint(space, total, 3.0 * 10)
    for name in ("uniform", "random", "evolution", "ddpg"):
        (first,) = engines.create(name, space, constraint).ask(1)
        assert set(first.values()) == {(5, 5)}
