"""The conformance suite notices broken engines: each of these breaks one promise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from fxopt.decisions import Policy
from fxopt.errors import SearchError
from fxopt.search import Engine
from fxopt.search._evolution import EvolutionEngine
from fxopt.search._random import RandomEngine
from fxopt.testing import EngineConformance


class Unseeded(RandomEngine):
    def propose(self, n: int) -> Sequence[Policy]:
        self.rng = np.random.default_rng()
        return super().propose(n)


class GlobalGenerator(RandomEngine):
    def propose(self, n: int) -> Sequence[Policy]:
        rng = np.random.default_rng(np.random.randint(1000))  # noqa: NPY002
        return self.project([self.space.sample(rng) for _ in range(n)])


class IgnoresTheBudget(RandomEngine):
    def propose(self, n: int) -> Sequence[Policy]:
        return [self.space.sample(self.rng) for _ in range(n)]


class Forgetful(EvolutionEngine):
    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        super().load_extra_state({**state, "members": []})


class SharesItsState(EvolutionEngine):
    def state_dict(self) -> dict[str, Any]:
        return self.__dict__.setdefault("state", {}) | {**super().state_dict(), "rng": self.rng.bit_generator}


class HidesItsOptions(EvolutionEngine):
    def __init__(self, *arguments: Any, population: int = 8, **options: Any) -> None:
        super().__init__(*arguments, population=population, **options)

    @property
    def options(self) -> dict[str, Any]:
        return {"tournament": self.tournament + 1}


class Stubborn(EvolutionEngine):
    def observe(self, policy: Policy, score: float) -> None:
        super().observe(policy, -score if np.isfinite(score) else score)


class AcceptsAnything(RandomEngine):
    def tell(self, policy: Policy, score: float) -> None:
        self._pending.clear()


class GivesUp(RandomEngine):
    failed = 0

    def propose(self, n: int) -> Sequence[Policy]:
        return super().propose(n) if self.failed < 3 else []

    def observe(self, policy: Policy, score: float) -> None:
        self.failed += not np.isfinite(score)


BROKEN = [
    (Unseeded, "test_the_same_seed_gives_the_same_trials"),
    (Unseeded, "test_a_saved_state_goes_on_as_if_uninterrupted"),
    (GlobalGenerator, "test_the_global_generator_is_left_alone"),
    (IgnoresTheBudget, "test_every_policy_is_within_the_budget"),
    (IgnoresTheBudget, "test_two_budgets_hold_at_once"),
    (Forgetful, "test_a_saved_state_goes_on_as_if_uninterrupted"),
    (SharesItsState, "test_a_state_is_a_copy"),
    (HidesItsOptions, "test_the_options_rebuild_the_engine"),
    (Stubborn, "test_it_solves_the_separable_toy"),
    (Stubborn, "test_it_beats_random_at_equal_budget"),
    (AcceptsAnything, "test_a_policy_that_was_not_asked_is_refused"),
    (AcceptsAnything, "test_a_policy_is_told_once"),
    (AcceptsAnything, "test_a_score_is_a_number"),
    (GivesUp, "test_failed_trials_do_no_harm"),
]


@pytest.mark.parametrize(("engine", "promise"), BROKEN)
def test_a_broken_promise_is_noticed(engine: type[Engine], promise: str) -> None:
    suite = type("Suite", (EngineConformance,), {"engine": engine})()
    with pytest.raises((AssertionError, SearchError, TypeError)):
        getattr(suite, promise)()


def test_every_promise_is_collected() -> None:
    promises = [name for name in vars(EngineConformance) if name.startswith("test_")]
    assert len(promises) >= 17
    assert {promise for _, promise in BROKEN} <= set(promises)


def test_a_callable_makes_the_engine() -> None:
    suite = type("Suite", (EngineConformance,), {"engine": lambda *arguments: RandomEngine(*arguments)})()
    suite.test_the_same_seed_gives_the_same_trials()
