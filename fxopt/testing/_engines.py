"""The conformance suite for search engines."""

from __future__ import annotations

import inspect
import json
import unittest
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from fxopt.decisions import Constraint, Decision, Policy, SearchSpace
from fxopt.errors import SearchError
from fxopt.search import FAILED, Engine, engines
from fxopt.testing._expect import expect

__all__ = ["EngineConformance"]

_CHOICES = (8, 16, 24, 32, 48, 64)
_BITS = ((2, 8), (4, 8), (8, 8), (32, 32))


class EngineConformance:
    """Every promise of an engine, as tests. Subclass it, set :attr:`engine`, and let pytest collect it.

    The toy problem is separable: ten decisions about channels and bits, each with a choice that scores
    best, under a budget that the best policy just meets.

    Example::

        class TestMyEngine(EngineConformance):
            engine = MyEngine
            options = {"temperature": 0.5}

    Attributes:
        engine: The engine's class, its registered name, or a callable of (space, constraint, seed).
        options: Options for a class or a name.
        searches: Whether the engine learns from scores; one that does has to solve the toy and beat random.
        trials: How many trials the engine may take for the toy.
        tolerance: How far below the toy's best score the engine may end, as a fraction of the range between
            the worst and the best score.
    """

    engine: ClassVar[str | Callable[..., Engine]]
    options: ClassVar[dict[str, Any]] = {}
    searches: ClassVar[bool] = True
    trials: ClassVar[int] = 300
    tolerance: ClassVar[float] = 0.02

    def make(self, space: SearchSpace, constraint: Constraint | None, seed: int) -> Engine:
        """A fresh engine of the kind under test."""
        kind = inspect.getattr_static(self, "engine")
        make = engines.load(kind) if isinstance(kind, str) else kind
        return make(space, constraint, seed, **self.options)

    # What is asked.

    def test_every_policy_is_complete_and_within_the_space(self) -> None:
        """Without a constraint, every policy decides everything and nothing else."""
        toy = _Toy()
        for policy in _run(self.make(toy.space, None, 0), toy.score, trials=40):
            toy.space.validate(policy)
            expect(set(policy) == set(toy.space.by_key), "an asked policy leaves decisions open")

    def test_every_policy_is_within_the_budget(self) -> None:
        """Under budgets from barely feasible to generous, no policy is over."""
        toy = _Toy()
        for tightness in (0.02, 0.3, 0.8):
            constraint = toy.constraint(tightness)
            asked = _run(self.make(toy.space, constraint, 1), toy.score, trials=40)
            expect(bool(asked), "nothing was asked")
            expect(bool((toy.cost(asked) <= constraint.limits[0]).all()), "an asked policy is over the budget")

    def test_two_budgets_hold_at_once(self) -> None:
        """With two metrics, no policy is over either."""
        toy = _Toy()
        limits = toy.two_costs([toy.space.default()])[0] * 0.5
        asked = _run(self.make(toy.space, Constraint(toy.space, toy.two_costs, limits), 2), toy.score, trials=40)
        expect(bool((toy.two_costs(asked) <= limits).all()), "an asked policy is over a budget")

    def test_batches_are_no_larger_than_asked(self) -> None:
        """An engine gives at most what it is asked for, and something at first."""
        toy = _Toy()
        engine = self.make(toy.space, toy.constraint(0.5), 0)
        for n in (1, 7, 3):
            expect(len(engine.ask(n)) <= n, "more was proposed than asked")
        expect(engine.asked > 0, "a fresh engine proposed nothing")

    def test_a_space_of_one_policy_does_no_harm(self) -> None:
        """Where there is nothing to decide, the one policy is asked or nothing."""
        for space in (SearchSpace(), SearchSpace([Decision("channels", "only", (8,), 8)])):
            asked = _run(self.make(space, None, 0), lambda _: 0.0, trials=5)
            expect(set(asked) <= {space.default()}, "a policy was asked that the space has not")

    # What is told.

    def test_a_policy_that_was_not_asked_is_refused(self) -> None:
        """Telling of another policy is an error."""
        toy = _Toy()
        engine = self.make(toy.space, None, 0)
        (asked,) = engine.ask(1)
        other = next(policy for policy in toy.corners() if policy != asked)
        _expect_refused(engine, other, 0.0)

    def test_a_policy_is_told_once(self) -> None:
        """Telling twice of one ask is an error."""
        toy = _Toy()
        engine = self.make(toy.space, None, 0)
        (asked,) = engine.ask(1)
        engine.tell(asked, 0.5)
        _expect_refused(engine, asked, 0.5)

    def test_a_score_is_a_number(self) -> None:
        """NaN is refused and the policy stays open."""
        toy = _Toy()
        engine = self.make(toy.space, None, 0)
        (asked,) = engine.ask(1)
        _expect_refused(engine, asked, float("nan"))
        engine.tell(asked, 0.5)

    def test_failed_trials_do_no_harm(self) -> None:
        """An engine goes on when the first trials, or all of them, fail."""
        toy = _Toy()
        scores = iter([FAILED] * 15)
        asked = _run(self.make(toy.space, toy.constraint(0.5), 0), lambda p: next(scores, toy.score(p)), trials=40)
        expect(len(asked) > 15, "the search ended with the failed trials")
        _run(self.make(toy.space, None, 0), lambda _: FAILED, trials=40)

    def test_scores_may_come_in_any_order(self) -> None:
        """A batch may be told last first."""
        toy = _Toy()
        engine = self.make(toy.space, toy.constraint(0.5), 0)
        for _ in range(5):
            for policy in reversed(engine.ask(6)):
                engine.tell(policy, toy.score(policy))
        expect(not engine.pending, "told policies are still pending")

    # Repeating and resuming.

    def test_the_same_seed_gives_the_same_trials(self) -> None:
        """Two engines with one seed ask the same."""
        toy = _Toy()
        first, second = (
            _run(self.make(toy.space, toy.constraint(0.5), 7), toy.score, trials=60, batch=4) for _ in range(2)
        )
        expect(first == second, "two runs under one seed differ")

    def test_the_global_generator_is_left_alone(self) -> None:
        """What others draw from numpy's global generator does not change the trials, nor the other way round."""
        toy = _Toy()
        runs = []
        for seed in (1, 2):
            np.random.seed(seed)  # noqa: NPY002 - the global generator is what is tested
            before = str(np.random.get_state())  # noqa: NPY002
            runs.append(_run(self.make(toy.space, None, 7), toy.score, trials=30))
            after = str(np.random.get_state())  # noqa: NPY002
            expect(before == after, "the engine draws from numpy's global generator")
        expect(runs[0] == runs[1], "the trials depend on numpy's global generator")

    def test_a_saved_state_goes_on_as_if_uninterrupted(self) -> None:
        """A state taken anywhere, through JSON, leads to the same trials, also with trials on their way."""
        toy = _Toy()
        for told in (0, 1, 17, 40):
            constraint = toy.constraint(0.5)
            engine = self.make(toy.space, constraint, 3)
            _run(engine, toy.score, trials=told)
            waiting = engine.ask(2)
            state = json.loads(json.dumps(engine.state_dict()))
            resumed = self.make(toy.space, constraint, 99)
            resumed.load_state_dict(state)
            expect(resumed.pending == engine.pending, "the pending policies are lost")
            for one in (engine, resumed):
                for policy in waiting:
                    one.tell(policy, toy.score(policy))
            tails = [_run(one, toy.score, trials=30) for one in (engine, resumed)]
            expect(tails[0] == tails[1], f"a state taken after {told} trials goes on otherwise")

    def test_a_state_is_a_copy(self) -> None:
        """Going on does not change a state that was taken, and loading one does not share it."""
        toy = _Toy()
        engine = self.make(toy.space, None, 3)
        _run(engine, toy.score, trials=10)
        state = engine.state_dict()
        text = json.dumps(state)
        other = self.make(toy.space, None, 3)
        other.load_state_dict(state)
        for one in (engine, other):
            _run(one, toy.score, trials=10)
        expect(json.dumps(state) == text, "the engine and its state share data")

    def test_the_state_of_another_engine_is_refused(self) -> None:
        """A state names its engine and its space."""
        toy = _Toy()
        engine = self.make(toy.space, None, 0)
        for name in ("engine", "space"):
            state = {**engine.state_dict(), name: "another"}
            try:
                engine.load_state_dict(state)
            except SearchError:
                continue
            raise AssertionError(f"the state of another {name} was loaded")

    def test_the_options_rebuild_the_engine(self) -> None:
        """What ``options`` tells is enough to repeat the search, and can be written to a journal."""
        toy = _Toy()
        engine = self.make(toy.space, toy.constraint(0.5), 5)
        options = json.loads(json.dumps(engine.options))
        again = type(engine)(toy.space, toy.constraint(0.5), 5, **options)
        expect(again.options == engine.options, "the options are not those of the constructor")
        tails = [_run(one, toy.score, trials=30) for one in (engine, again)]
        expect(tails[0] == tails[1], "an engine made from the options asks otherwise")

    # How good it is.

    def test_it_solves_the_separable_toy(self) -> None:
        """In the mean over seeds the best policy found is nearly the best there is, with and without a budget."""
        if not self.searches:
            raise unittest.SkipTest("this engine does not learn from scores")
        toy = _Toy()
        for constraint in (None, toy.constraint_of_the_best()):
            runs = [_run(self.make(toy.space, constraint, seed), toy.score, self.trials) for seed in range(3)]
            mean = float(np.mean([max(map(toy.score, run)) for run in runs]))
            expect(mean >= -self.tolerance, f"the best score is {-mean:.3f} of the range below the optimum")

    def test_it_beats_random_at_equal_budget(self) -> None:
        """In the mean over seeds it ends no worse than random search with as many trials."""
        if not self.searches:
            raise unittest.SkipTest("this engine does not learn from scores")
        toy = _Toy()
        constraint = toy.constraint_of_the_best()
        trials = self.trials // 3
        ends: dict[str, list[float]] = {"random": [], "engine": []}
        for seed in range(4):
            random = engines.create("random", toy.space, constraint, seed)
            ends["random"].append(max(map(toy.score, _run(random, toy.score, trials))))
            ends["engine"].append(max(map(toy.score, _run(self.make(toy.space, constraint, seed), toy.score, trials))))
        expect(float(np.mean(ends["engine"])) >= float(np.mean(ends["random"])), f"random is better: {ends}")


class _Toy:
    """A separable problem with a known best policy, of score 0; the worst policy has the score -1.

    The best policy is far from uniform, so that no heuristic start gives it away.
    """

    def __init__(self) -> None:
        rng = np.random.default_rng(2024)
        self.space = SearchSpace(
            [Decision("channels", f"block.{i}", _CHOICES, 64, {"channels": 64.0}, "conv") for i in range(6)]
            + [Decision("bits", f"block.{i}", _BITS, (32, 32), {"weights": 1.0 + i}, "conv") for i in range(4)]
        )
        self.best = np.array([0, 5, 1, 4, 5, 0, 3, 0, 2, 1], dtype=np.intp)
        self._gain = rng.uniform(0.5, 2.0, len(self.space))
        self._price = rng.uniform(0.5, 2.0, len(self.space))
        self._worst = float((self._gain * np.maximum(self.best, self.space.sizes - 1 - self.best)).sum())

    def score(self, policy: Policy) -> float:
        """The weighted distance to the best policy."""
        away = np.abs(self.space.encode(policy) - self.best)
        return -float((self._gain * away).sum()) / self._worst

    def cost(self, policies: Sequence[Policy]) -> npt.NDArray[np.float64]:
        """A sum over decisions that grows with the index of the choice."""
        rows = np.array([self.space.encode(policy) for policy in policies]).reshape(len(policies), -1)
        return np.asarray(((1.0 + rows) * self._price).sum(axis=1), dtype=np.float64)

    def two_costs(self, policies: Sequence[Policy]) -> npt.NDArray[np.float64]:
        """The cost, and one with other prices."""
        rows = np.array([self.space.encode(policy) for policy in policies]).reshape(len(policies), -1)
        other = ((1.0 + rows) * self._price[::-1]).sum(axis=1)
        return np.stack([self.cost(policies), other], axis=1)

    def constraint(self, tightness: float) -> Constraint:
        """A limit between the least cost (0) and that of the default (1)."""
        low, high = self.cost([self.space.decode(np.zeros_like(self.best)), self.space.default()])
        return Constraint(self.space, self.cost, low + tightness * (high - low))

    def constraint_of_the_best(self) -> Constraint:
        """A limit that the best policy just meets."""
        return Constraint(self.space, self.cost, self.cost([self.space.decode(self.best)]))

    def corners(self) -> list[Policy]:
        """The policies with all first and all last choices."""
        return [self.space.decode(np.zeros_like(self.best)), self.space.decode(self.space.sizes - 1)]


def _run(engine: Engine, score: Callable[[Policy], float], trials: int, batch: int = 1) -> list[Policy]:
    asked: list[Policy] = []
    while len(asked) < trials:
        policies = engine.ask(batch)
        if not policies:
            break
        for policy in policies:
            engine.tell(policy, score(policy))
        asked.extend(policies)
    return asked


def _expect_refused(engine: Engine, policy: Policy, score: float) -> None:
    try:
        engine.tell(policy, score)
    except SearchError:
        return
    raise AssertionError(f"a score of {score} for {policy!r} was accepted")
