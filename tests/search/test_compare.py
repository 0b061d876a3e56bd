"""Engines side by side."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fxopt.decisions import AdditiveCosts, Constraint, Decision, Policy, SearchSpace
from fxopt.errors import SearchError, UnknownNameError
from fxopt.search import compare, engines, fitting_options, installed, options_of_search

SPACE = SearchSpace([Decision("channels", f"conv{i}", (8, 16, 24, 32), 32) for i in range(5)])
COSTS = AdditiveCosts(SPACE, [(1.0 + i) * np.arange(1, 5) for i in range(5)])
NAMES = ["uniform", "random", "greedy", "exact"]


def constraint() -> Constraint:
    return Constraint(SPACE, COSTS, 36.0, by_index=COSTS.at)


class Score:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, policy: Policy) -> float:
        self.calls += 1
        return -sum((1.0 + i) * abs(int(width) - 8 * (1 + i % 4)) for i, width in enumerate(policy.values()))  # type: ignore[arg-type]


def test_each_engine_has_as_many_trials() -> None:
    found = compare(SPACE, Score(), 20, constraint=constraint(), names=NAMES, seeds=(0, 1))
    assert [(run.engine, run.seed) for run in found.runs] == [(name, seed) for name in NAMES for seed in (0, 1)]
    assert all(run.feasible for run in found.runs)
    assert all(len(run.result.trials) == 20 for run in found.runs if run.engine != "uniform")
    rows = found.rows
    assert [row["score"] for row in rows] == sorted((row["score"] for row in rows), reverse=True)
    exact, random = (next(row for row in rows if row["engine"] == name) for name in ("exact", "random"))
    assert exact["score"] >= random["score"]
    assert random["spread"] >= 0.0
    assert all(row["engine_cpu_s"] >= 0.0 for row in rows)


def test_a_comparison_resumes(tmp_path: Path) -> None:
    first = compare(SPACE, Score(), 8, constraint=constraint(), names=NAMES, folder=tmp_path)
    score = Score()
    again = compare(SPACE, score, 8, constraint=constraint(), names=NAMES, folder=tmp_path)
    assert score.calls == 0
    assert [run.result for run in again.runs] == [run.result for run in first.runs]
    compare(SPACE, score, 8, constraint=constraint(), names=[*NAMES, "evolution"], folder=tmp_path)
    assert 0 < score.calls <= 8


def test_options_fit_the_trials() -> None:
    assert fitting_options("exact", SPACE, 100) == {"probes": 10}
    assert fitting_options("exact", SPACE, 3) == {"probes": 1}
    assert fitting_options("random", SPACE, 3) == {}
    for name in installed():
        for trials in (1, 10, 1000):
            engines.create(name, SPACE, **fitting_options(name, SPACE, trials))


@pytest.mark.parametrize(
    "header",
    [
        {"engine": "random", "options": {"population": 7}},
        {"engine": "evolution", "options": {"population": "7"}},
        {"engine": "evolution", "options": [7]},
        {"engine": "evolution"},
        None,
    ],
)
def test_a_journal_that_tells_no_options_leaves_those_that_fit(
    header: dict[str, object] | None, tmp_path: Path
) -> None:
    journal = tmp_path / "journal.jsonl"
    fitting = fitting_options("evolution", SPACE, 100)
    assert options_of_search("evolution", SPACE, 100, journal) == fitting
    journal.write_text(
        "nothing" if header is None else json.dumps({"journal": "fxopt.search", "schema": 1} | header) + "\n"
    )
    assert options_of_search("evolution", SPACE, 100, journal) == fitting


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(SearchError, match="each named once"):
        compare(SPACE, Score(), 3, names=["random", "random"])
    with pytest.raises(SearchError, match="needs decisions"):
        compare(SearchSpace(), Score(), 3)
    with pytest.raises(UnknownNameError, match="Did you mean 'greedy'"):
        compare(SPACE, Score(), 3, names=["gredy"])


def test_engines_without_their_package_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "_NEEDS", {"optuna": "no_such_package_anywhere"})
    assert "optuna" not in installed()
    assert {"uniform", "random", "greedy", "exact", "evolution", "ddpg", "reinforce"} <= set(installed())
    with pytest.raises(UnknownNameError):
        engines.available("nothing")
