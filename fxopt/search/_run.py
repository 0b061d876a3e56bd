"""Running a search: ask, evaluate, write down, tell."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np

from fxopt.decisions import Policy
from fxopt.errors import FxoptError, JournalError, SearchError
from fxopt.search._engine import FAILED, Engine
from fxopt.search._journal import Journal, journal_header
from fxopt.search._trial import SearchResult, Trial

__all__ = ["SearchProgress", "run_search"]


@dataclass(frozen=True)
class SearchProgress:
    """How far a search has come, after each trial.

    Attributes:
        trial: The trial just finished.
        done: How many trials are done, those from the journal included.
        trials: How many there are to be.
        best: The best trial so far; None before the first that did not fail.
        elapsed_s: Seconds since the search was started or resumed.
        remaining_s: An estimate of the seconds still to go; None before the first new trial.
        replayed: Whether the trial came from the journal.
    """

    trial: Trial
    done: int
    trials: int
    best: Trial | None
    elapsed_s: float
    remaining_s: float | None
    replayed: bool


def run_search(
    engine: Engine,
    evaluate: Callable[[Policy], float],
    trials: int,
    *,
    journal: str | os.PathLike[str] | None = None,
    executor: Executor | None = None,
    parallel: int = 1,
    patience: int | None = None,
    progress: Callable[[SearchProgress], None] | None = None,
    context: Mapping[str, Any] | None = None,
) -> SearchResult:
    """Try policies and return the best.

    In each round the engine is asked for ``parallel`` policies; all are evaluated, and told in the order
    in which they were asked. The trials therefore depend on ``parallel`` but not on the executor, nor on
    which evaluation ends first. A policy that was tried before is not evaluated again; it counts as a trial.

    With a journal the search can be stopped at any moment, by Ctrl-C or a crash, and is resumed by the
    same call: the trials in the journal are replayed through a fresh engine, without evaluating them, and
    the search goes on as if it had never stopped. Asking for more trials than before extends a search.

    Args:
        engine: A fresh engine.
        evaluate: The score of a policy, higher is better. If it raises an ``FxoptError`` or returns NaN or
            an infinite number, the trial has failed and the search goes on. It has to be picklable for an
            executor of processes.
        trials: How many policies to try.
        journal: The file to resume from and write to; None for none.
        executor: Where to evaluate; None for here, one after the other. It is not shut down.
        parallel: How many policies to ask for at a time.
        patience: Stop when so many trials in a row brought no better score; None for never.
        progress: Called after each trial.
        context: What the scores depend on besides the policies, such as a digest of the model, as JSON-ready data. A
            journal that was written in another context is not resumed.

    Returns:
        The best trial and all others.

    Raises:
        SearchError: If ``evaluate`` raises anything but an ``FxoptError`` (chained, naming the policy), if
            every trial failed, or if an argument is out of range.
        JournalError: If the journal cannot be written or belongs to another search.
    """
    _check_arguments(engine, trials, parallel, patience, resumable=journal is not None)
    _check_executor(executor, evaluate)
    header = journal_header(engine, parallel, context)
    with contextlib.ExitStack() as stack:
        book = stack.enter_context(Journal(journal, header)) if journal is not None else None
        search = _Search(engine, evaluate, trials, book, executor, progress)
        stopped = search.run(parallel, patience)
    return search.result(stopped)


def _check_arguments(engine: Engine, trials: int, parallel: int, patience: int | None, *, resumable: bool) -> None:
    if not isinstance(engine, Engine):
        raise SearchError(f"The engine is a {type(engine).__name__}; make one with fxopt.search.engines.create().")
    options: dict[str, object] = {"trials": trials, "parallel": parallel}
    if patience is not None:
        options["patience"] = patience
    for name, value in options.items():
        if not isinstance(value, (int, np.integer)) or value < 1:
            raise SearchError(f"A search needs {name} of at least 1, got {value!r}; give a whole number.")
    if resumable and engine.asked:
        raise SearchError("A search with a journal needs a fresh engine, this one has been asked; create another.")


def _check_executor(executor: Executor | None, evaluate: Callable[[Policy], float]) -> None:
    """A pool of processes would fail on the first trial, with a message from deep within."""
    if not isinstance(executor, ProcessPoolExecutor):
        return
    try:
        ForkingPickler.dumps(evaluate)
    except FxoptError:
        raise
    except Exception as failure:
        raise SearchError(
            f"The evaluation cannot go to other processes: {type(failure).__name__}: {failure}. Define the classes and "
            "functions that it uses at the top level of a module, or give an executor of threads."
        ) from failure


@dataclass(frozen=True)
class _Outcome:
    """What came of an evaluation: whatever it returned, or the error that failed it."""

    value: Any
    error: str | None
    elapsed_s: float


def _evaluate(evaluate: Callable[[Policy], float], policy: Policy) -> _Outcome:
    """Run in the worker. Errors cross as text: not every exception survives the way between processes."""
    start_s = time.perf_counter()
    try:
        value, error = evaluate(policy), None
    except FxoptError as failure:
        value, error = None, f"{type(failure).__name__}: {failure}"
    return _Outcome(value, error, time.perf_counter() - start_s)


class _Search:
    """The state of a running search."""

    def __init__(
        self,
        engine: Engine,
        evaluate: Callable[[Policy], float],
        trials: int,
        journal: Journal | None,
        executor: Executor | None,
        progress: Callable[[SearchProgress], None] | None,
    ) -> None:
        self._engine = engine
        self._evaluate = evaluate
        self._trials = trials
        self._journal = journal
        self._executor = executor
        self._progress = progress
        self._recorded: Sequence[Trial] = () if journal is None else journal.trials
        self._done: list[Trial] = []
        self._by_policy: dict[Policy, Trial] = {}
        self._best: Trial | None = None
        self._start_s = time.perf_counter()

    def run(self, parallel: int, patience: int | None) -> str:
        """Run rounds until the search ends; why it did."""
        while len(self._done) < self._trials:
            # The last round asks for as many as any other, so that more trials later extend the same search.
            policies = self._engine.ask(parallel)[: self._trials - len(self._done)]
            if not policies:
                return "exhausted"
            for trial in self._round(policies):
                self._engine.tell(trial.policy, FAILED if trial.score is None else trial.score)
                self._keep(trial)
            if patience is not None and self._trials_since_best() >= patience:
                return "patience"
        return "trials"

    def result(self, stopped: str) -> SearchResult:
        """The outcome.

        Raises:
            SearchError: If every trial failed.
        """
        if self._best is None:
            first = self._done[0].error if self._done else "the engine proposed nothing"
            raise SearchError(f"None of the {len(self._done)} trials gave a score; the first failed with: {first}")
        return SearchResult(
            best=self._best,
            trials=tuple(self._done),
            engine=self._engine.name,
            seed=self._engine.seed,
            stopped=stopped,
            resumed=min(len(self._recorded), len(self._done)),
        )

    def _round(self, policies: Sequence[Policy]) -> Iterator[Trial]:
        first = len(self._done)
        recorded = self._recorded[first : first + len(policies)]
        for policy, trial in zip(policies, recorded, strict=False):
            self._check_replay(policy, trial)
            yield trial
        fresh = policies[len(recorded) :]
        futures = self._submit(fresh)
        try:
            for number, policy in enumerate(fresh, start=first + len(recorded)):
                trial = self._by_policy_or(number, policy, futures.get(policy))
                if self._journal is not None:
                    self._journal.append(trial)
                yield trial
        finally:
            for future in futures.values():
                future.cancel()

    def _submit(self, policies: Sequence[Policy]) -> dict[Policy, Future[_Outcome]]:
        futures: dict[Policy, Future[_Outcome]] = {}
        if self._executor is None:
            return futures
        for policy in policies:
            if policy in self._by_policy or policy in futures:
                continue
            try:
                futures[policy] = self._executor.submit(_evaluate, self._evaluate, policy)
            except Exception as failure:
                raise SearchError(f"The executor refuses work: {type(failure).__name__}: {failure}.") from failure
        return futures

    def _by_policy_or(self, number: int, policy: Policy, future: Future[_Outcome] | None) -> Trial:
        known = self._by_policy.get(policy)
        if known is not None:
            return Trial(number, policy, known.score, known.error, cached=True)
        try:
            outcome = _evaluate(self._evaluate, policy) if future is None else future.result()
        except Exception as failure:
            raise SearchError(
                f"Trial {number} broke with {type(failure).__name__}: {failure}. Its policy: {policy.to_data()}. "
                "Trials before it are kept in the journal, if there is one; correct the evaluation and run again."
            ) from failure
        return _as_trial(number, policy, outcome)

    def _check_replay(self, policy: Policy, trial: Trial) -> None:
        if policy != trial.policy and self._journal is not None:
            raise JournalError(
                f"{self._journal.path}, trial {trial.number}: the search proposes another policy than it did when the "
                "journal was written, though its settings are the same. Features, costs or software versions (they "
                "are in the journal's first line) have changed; restore them, or give another file to start anew."
            )

    def _keep(self, trial: Trial) -> None:
        self._done.append(trial)
        self._by_policy.setdefault(trial.policy, trial)
        if trial.score is not None and (
            self._best is None or self._best.score is None or trial.score > self._best.score
        ):
            self._best = trial
        if self._progress is None:
            return
        done, resumed = len(self._done), min(len(self._recorded), len(self._done))
        elapsed_s = time.perf_counter() - self._start_s
        new = done - resumed
        self._progress(
            SearchProgress(
                trial=trial,
                done=done,
                trials=self._trials,
                best=self._best,
                elapsed_s=elapsed_s,
                remaining_s=elapsed_s / new * (self._trials - done) if new else None,
                replayed=not new,
            )
        )

    def _trials_since_best(self) -> int:
        return len(self._done) - (-1 if self._best is None else self._best.number) - 1


def _as_trial(number: int, policy: Policy, outcome: _Outcome) -> Trial:
    if outcome.error is not None:
        return Trial(number, policy, None, outcome.error, elapsed_s=outcome.elapsed_s)
    try:
        score = float(outcome.value)
    except (TypeError, ValueError) as failure:
        raise SearchError(
            f"Trial {number}: an evaluation returns a number, this one returned a {type(outcome.value).__name__}. "
            f"Its policy: {policy.to_data()}."
        ) from failure
    if not math.isfinite(score):
        return Trial(number, policy, None, f"The score is {score}.", elapsed_s=outcome.elapsed_s)
    return Trial(number, policy, score, elapsed_s=outcome.elapsed_s)
