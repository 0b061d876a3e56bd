"""Running searches: trials, failures, executors."""

from __future__ import annotations

import math
import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from fxopt.decisions import Decision, Policy, SearchSpace
from fxopt.errors import PassError, SearchError, UnknownNameError
from fxopt.search import FAILED, SearchProgress, engines, read_journal, run_search
from tests.search.searching import NAMES, Counted, make, score

# Results.


def test_it_returns_the_best_of_all_trials() -> None:
    result = run_search(make(seed=5), score, 60)
    assert len(result.trials) == 60
    assert [trial.number for trial in result.trials] == list(range(60))
    assert result.score == max(score(trial.policy) for trial in result.trials)
    assert result.policy == result.best.policy
    assert result.best == next(trial for trial in result.trials if trial.score == result.score), "the first of equals"
    assert (result.engine, result.seed, result.stopped, result.resumed) == ("evolution", 5, "trials", 0)
    assert result.curve == tuple(np.maximum.accumulate([trial.score for trial in result.trials]))


def test_an_engine_that_has_nothing_left_ends_the_search() -> None:
    result = run_search(make("uniform"), score, 1000)
    assert result.stopped == "exhausted"
    assert len(result.trials) < 30


def test_patience_ends_the_search() -> None:
    result = run_search(make("random"), score, 1000, patience=10)
    assert result.stopped == "patience"
    assert len(result.trials) == result.best.number + 1 + 10


@pytest.mark.parametrize("threads", [0, 2])
def test_repeated_policies_are_evaluated_once(threads: int) -> None:
    small = SearchSpace([Decision("channels", "conv", (8, 16), 16)])
    calls: list[Policy] = []

    def evaluate(policy: Policy) -> float:
        calls.append(policy)
        if policy["channels", "conv"] == 16:
            raise PassError("no")
        return 1.0

    with ThreadPoolExecutor(2) as pool:
        executor = pool if threads else None
        result = run_search(engines.create("random", small), evaluate, 20, parallel=3, executor=executor)
    assert len(result.trials) == 20
    assert len(calls) == len(set(calls)) == result.evaluations == 2
    assert {trial.score for trial in result.trials} == {1.0, None}
    assert sum(trial.cached for trial in result.trials) == 18


def test_progress_is_told_after_each_trial() -> None:
    told: list[SearchProgress] = []
    result = run_search(make(), score, 10, progress=told.append)
    assert [one.trial for one in told] == list(result.trials)
    assert [one.done for one in told] == list(range(1, 11))
    assert {one.trials for one in told} == {10}
    assert [None if one.best is None else one.best.score for one in told] == list(result.curve)
    assert told[-1].remaining_s == 0.0
    assert all(one.remaining_s is not None and one.elapsed_s >= 0 and not one.replayed for one in told)


@pytest.mark.parametrize("value", [np.float32(0.5), 1, True])
def test_whatever_is_a_number_is_a_score(value: object) -> None:
    result = run_search(make(), lambda _: value, 2)  # type: ignore[arg-type, return-value]
    assert type(result.best.score) is float


# Failures.


@pytest.mark.parametrize(
    ("breaks", "error"),
    [
        (lambda: math.nan, "score is nan"),
        (lambda: math.inf, "score is inf"),
        (lambda: -math.inf, "score is -inf"),
        (PassError("cannot rewrite"), "PassError: cannot rewrite"),
    ],
)
def test_a_failed_trial_is_recorded_and_the_search_goes_on(
    breaks: Callable[[], float] | Exception, error: str, tmp_path: Path
) -> None:
    calls: list[Policy] = []

    def evaluate(policy: Policy) -> float:
        calls.append(policy)
        if len(calls) % 3:
            return score(policy)
        if isinstance(breaks, Exception):
            raise breaks
        return breaks()

    result = run_search(make(), evaluate, 30, journal=tmp_path / "journal")
    assert len(result.trials) == 30
    assert result.failed >= 9
    assert {trial.error for trial in result.trials if trial.failed} != {None}
    assert all(error in (trial.error or "") for trial in result.trials if trial.failed)
    assert "NaN" not in (tmp_path / "journal").read_text()
    assert read_journal(tmp_path / "journal")[1] == result.trials
    assert run_search(make(), score, 30, journal=tmp_path / "journal") == result


def test_the_engine_is_told_of_every_trial_in_order(tmp_path: Path) -> None:
    """Live and replayed alike: the scores, and FAILED for what failed."""

    def evaluate(policy: Policy) -> float:
        return score(policy) if policy["channels", "conv0"] != 8 else math.nan

    told: list[list[tuple[Policy, float]]] = []
    for _ in range(2):
        engine = make("random")
        observed: list[tuple[Policy, float]] = []
        engine.observe = lambda policy, value, seen=observed: seen.append((policy, value))  # type: ignore[method-assign, misc]
        result = run_search(engine, evaluate, 20, journal=tmp_path / "journal", parallel=3)
        assert observed == [(one.policy, FAILED if one.score is None else one.score) for one in result.trials]
        told.append(observed)
    assert told[0] == told[1]
    assert FAILED in [value for _, value in told[0]]


def test_a_search_without_a_score_is_an_error(tmp_path: Path) -> None:
    def evaluate(_: Policy) -> float:
        raise PassError("cannot rewrite")

    with pytest.raises(SearchError, match=r"None of the 5 trials gave a score.*PassError: cannot rewrite"):
        run_search(make(), evaluate, 5, journal=tmp_path / "journal")
    assert len(read_journal(tmp_path / "journal")[1]) == 5


@pytest.mark.parametrize("threads", [0, 3])
def test_any_other_error_ends_the_search_and_names_the_policy(threads: int, tmp_path: Path) -> None:
    path = tmp_path / "journal"
    engine = make("random")
    with ThreadPoolExecutor(max(threads, 1)) as pool, pytest.raises(SearchError) as failure:
        run_search(
            engine,
            Counted(7, ZeroDivisionError("by zero")),
            20,
            journal=path,
            executor=pool if threads else None,
            parallel=threads or 1,
        )
    assert isinstance(failure.value.__cause__, ZeroDivisionError)
    number = len(read_journal(path)[1])
    assert f"Trial {number} broke with ZeroDivisionError: by zero" in str(failure.value)
    assert str(engine.pending[0].to_data()) in str(failure.value)
    assert run_search(make("random"), score, 20, journal=path, parallel=threads or 1) == run_search(
        make("random"), score, 20, parallel=threads or 1
    )


@pytest.mark.parametrize("value", [None, "good", [1.0, 2.0]])
def test_what_is_no_number_is_an_error_that_says_so(value: object) -> None:
    with pytest.raises(SearchError, match=f"Trial 0: .* returned a {type(value).__name__}"):
        run_search(make(), lambda _: value, 2)  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize("name", ["trials", "parallel", "patience"])
def test_numbers_below_one_are_refused(name: str) -> None:
    with pytest.raises(SearchError, match=f"{name} of at least 1, got 0"):
        run_search(make(), score, **{"trials": 3, name: 0})  # type: ignore[arg-type]


def test_what_is_no_engine_is_refused() -> None:
    with pytest.raises(SearchError, match="a str; make one"):
        run_search("evolution", score, 3)  # type: ignore[arg-type]


# Executors.


class LastFirst(Executor):
    """Evaluates whatever is waiting in reverse, as soon as one result is asked for."""

    def __init__(self) -> None:
        self.waiting: list[Callable[[], None]] = []

    def submit(self, function, /, *arguments, **named):  # type: ignore[no-untyped-def]
        executor = self

        class Late(Future):  # type: ignore[type-arg]
            def result(self, timeout: float | None = None) -> object:
                while executor.waiting:
                    executor.waiting.pop()()
                return super().result(timeout)

        future = Late()
        self.waiting.append(lambda: future.set_result(function(*arguments, **named)))
        return future


@pytest.mark.parametrize("name", NAMES)
def test_the_executor_does_not_change_the_result(name: str) -> None:
    expected = run_search(make(name), score, 25, parallel=4)
    assert run_search(make(name), score, 25, parallel=4, executor=LastFirst()) == expected
    with ThreadPoolExecutor(4) as pool:
        assert run_search(make(name), score, 25, parallel=4, executor=pool) == expected


def evaluate_elsewhere(policy: Policy) -> float:
    if policy["channels", "conv0"] == 32:
        raise UnknownNameError("thing", "name", ["names"])
    return float(os.getpid() != 0) * score(policy)


def test_processes_evaluate_and_their_errors_come_home() -> None:
    # Spawned, not forked: the parent may have threads.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        result = run_search(make("uniform", limit=160.0), evaluate_elsewhere, 6, executor=pool, parallel=2)
    assert "UnknownNameError: Unknown thing 'name'. Did you mean 'names'?" in (result.trials[0].error or "")
    assert result.failed == 1


def test_what_cannot_be_sent_to_processes_is_told_before_any_trial() -> None:
    # No process is started: a pool starts its first when it is given work.
    with (
        ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool,
        pytest.raises(SearchError, match=r"cannot go to other processes.*executor of threads"),
    ):
        run_search(make(), lambda policy: score(policy), 3, executor=pool)


@pytest.mark.parametrize("name", ["trials", "parallel", "patience"])
def test_numbers_are_whole(name: str) -> None:
    with pytest.raises(SearchError, match=rf"{name} of at least 1, got 2\.5; give a whole number"):
        run_search(make(), score, **{"trials": 3, name: 2.5})  # type: ignore[arg-type]


def test_an_executor_that_refuses_work_is_an_error() -> None:
    pool = ThreadPoolExecutor(1)
    pool.shutdown()
    with pytest.raises(SearchError, match="executor refuses work"):
        run_search(make(), score, 3, executor=pool)


def test_what_was_not_begun_is_cancelled_when_a_trial_breaks() -> None:
    begun: list[Policy] = []

    def evaluate(policy: Policy) -> float:
        begun.append(policy)
        if len(begun) == 1:
            raise ZeroDivisionError
        time.sleep(0.05)
        return 0.0

    with ThreadPoolExecutor(1) as pool, pytest.raises(SearchError):
        run_search(make("random"), evaluate, 50, executor=pool, parallel=50)
    assert len(begun) < 5
