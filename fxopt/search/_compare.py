"""Several engines on one problem, at an equal number of evaluations."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fxopt.decisions import Constraint, Policy, SearchSpace
from fxopt.errors import SearchError
from fxopt.search import engines
from fxopt.search._fitting import fitting_options
from fxopt.search._run import SearchProgress, run_search
from fxopt.search._trial import SearchResult

__all__ = ["Comparison", "EngineRun", "compare", "installed"]


@dataclass(frozen=True)
class EngineRun:
    """One engine under one seed.

    Attributes:
        engine: The engine's name.
        seed: The seed.
        result: What it found.
        feasible: Whether its best policy is within the constraint.
        engine_cpu_s: CPU time of the engine and its journal in this run, evaluations left out.
    """

    engine: str
    seed: int
    result: SearchResult
    feasible: bool
    engine_cpu_s: float


@dataclass(frozen=True)
class Comparison:
    """What several engines found.

    Attributes:
        runs: The runs, by engine and then by seed.
        trials: How many policies each was allowed to try.
    """

    runs: tuple[EngineRun, ...]
    trials: int

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One row an engine, the best mean score first, as JSON-ready data.

        ``score`` is the mean over seeds of the best score, ``spread`` its standard deviation (zero of one seed), and
        ``evaluations`` and ``engine_cpu_s`` are means.
        """
        names = list(dict.fromkeys(run.engine for run in self.runs))
        rows = [self._row(name, [run for run in self.runs if run.engine == name]) for name in names]
        return sorted(rows, key=lambda row: -float(row["score"]))

    def _row(self, name: str, runs: Sequence[EngineRun]) -> dict[str, Any]:
        scores = [run.result.score for run in runs]
        return {
            "engine": name,
            "score": statistics.fmean(scores),
            "spread": statistics.stdev(scores) if len(scores) > 1 else 0.0,
            "scores": scores,
            "feasible": all(run.feasible for run in runs),
            "trials": statistics.fmean(len(run.result.trials) for run in runs),
            "evaluations": statistics.fmean(run.result.evaluations for run in runs),
            "engine_cpu_s": statistics.fmean(run.engine_cpu_s for run in runs),
            "policy": max(runs, key=lambda run: run.result.score).result.policy.to_data(),
        }


def compare(
    space: SearchSpace,
    evaluate: Callable[[Policy], float],
    trials: int,
    *,
    constraint: Constraint | None = None,
    names: Sequence[str] | None = None,
    seeds: Sequence[int] = (0,),
    options: Mapping[str, Mapping[str, Any]] | None = None,
    folder: str | os.PathLike[str] | None = None,
    context: Mapping[str, Any] | None = None,
    progress: Callable[[str, int, SearchProgress], None] | None = None,
) -> Comparison:
    """Run engines one after the other on the same problem, each with as many trials.

    Args:
        space: What can be decided.
        evaluate: The score of a policy, higher is better; see ``run_search``.
        trials: How many policies each engine may try.
        constraint: What the policies may cost; None for no limit.
        names: The engines; None for all whose packages are installed.
        seeds: The seeds; each engine runs once under each.
        options: Options by engine; :func:`fitting_options` for those that are not named.
        folder: A folder for one journal a run, from which the comparison resumes; None for none.
        context: What the scores depend on besides the policies; see ``run_search``.
        progress: Called after each trial with the engine's name and seed.

    Returns:
        What they found.

    Raises:
        SearchError: If there is nothing to decide or no seed, a name is given twice, or a search fails.
        UnknownNameError: If there is no such engine.
    """
    chosen = list(names) if names is not None else installed()
    if not len(space) or not seeds or not chosen or len(set(chosen)) != len(chosen):
        raise SearchError(
            f"A comparison needs decisions, seeds and engines, each named once; got {len(space)} decisions, "
            f"seeds {list(seeds)} and engines {chosen}."
        )
    known = {name: dict((options or {}).get(name, fitting_options(name, space, trials))) for name in chosen}
    for name in chosen:
        engines.create(name, space, constraint, 0, **known[name])
    runs = []
    for name in chosen:
        for seed in seeds:
            clock = _Clock(evaluate)
            start_s = time.process_time()
            result = run_search(
                engines.create(name, space, constraint, seed, **known[name]),
                clock,
                trials,
                journal=None if folder is None else Path(folder) / f"{name}-{seed}.jsonl",
                context=context,
                progress=None if progress is None else _Report(progress, name, seed),
            )
            spent_s = time.process_time() - start_s - clock.spent_s
            feasible = constraint is None or bool(constraint.feasible([result.policy])[0])
            runs.append(EngineRun(name, seed, result, feasible, spent_s))
    return Comparison(tuple(runs), trials)


def installed() -> list[str]:
    """The engines that can be used: all but those that need a package which is not installed."""
    return [name for name in engines.names() if engines.available(name)]


class _Clock:
    """An evaluation that knows how much CPU time it took."""

    def __init__(self, evaluate: Callable[[Policy], float]) -> None:
        self._evaluate = evaluate
        self.spent_s = 0.0

    def __call__(self, policy: Policy) -> float:
        start_s = time.process_time()
        try:
            return self._evaluate(policy)
        finally:
            self.spent_s += time.process_time() - start_s


@dataclass(frozen=True)
class _Report:
    progress: Callable[[str, int, SearchProgress], None]
    name: str
    seed: int

    def __call__(self, state: SearchProgress) -> None:
        self.progress(self.name, self.seed, state)
