"""Optuna's samplers keep the promises of an engine."""

from __future__ import annotations

from pathlib import Path

import pytest

from fxopt.decisions import Constraint, Decision, Policy, SearchSpace
from fxopt.errors import SearchError
from fxopt.search import engines, run_search
from fxopt.testing import EngineConformance

optuna = pytest.importorskip("optuna")


class TestRandom(EngineConformance):
    engine = "optuna"
    options = {"sampler": "random"}
    searches = False


class TestNSGA2(EngineConformance):
    engine = "optuna"
    options = {"sampler": "nsga2"}
    searches = False


SPACE = SearchSpace([Decision("channels", f"conv{i}", (8, 16, 24, 32), 32) for i in range(3)])


def score(policy: Policy) -> float:
    return -sum(abs(int(width) - 16) for width in policy.values())  # type: ignore[arg-type]


def size(policies: list[Policy]) -> list[float]:
    return [float(sum(policy.values())) for policy in policies]  # type: ignore[arg-type]


def test_tpe_learns() -> None:
    best = [
        run_search(engines.create("optuna", SPACE, seed=seed, sampler=sampler), score, 30).curve[-1]
        for sampler in ("tpe", "random")
        for seed in range(2)
    ]
    assert sum(best[:2]) >= sum(best[2:])  # type: ignore[arg-type]


def test_nsga2_keeps_a_front_of_score_and_cost() -> None:
    constraint = Constraint(SPACE, size, 80.0)  # type: ignore[arg-type]
    engine = engines.create("optuna", SPACE, constraint, sampler="nsga2")
    run_search(engine, lambda policy: float(sum(policy.values())), 40)  # type: ignore[arg-type]
    front = [trial.values for trial in engine.study.best_trials]  # type: ignore[attr-defined]
    assert len({tuple(values) for values in front}) > 1
    assert all(values[1] == pytest.approx(values[0] / 80.0) and values[1] <= 1.0 for values in front)


def test_trials_are_seen_in_a_storage(tmp_path: Path) -> None:
    journal = str(tmp_path / "study.log")
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(journal))
    engine = engines.create("optuna", SPACE, storage=storage, study="widths", sampler="random")
    result = run_search(engine, score, 5)
    seen = optuna.load_study(study_name="widths", storage=storage).trials
    assert [trial.value for trial in seen] == [trial.score for trial in result.trials]
    assert Policy.from_json(seen[0].user_attrs["policy"]) == result.trials[0].policy
    with pytest.raises(SearchError, match="refuses the study 'widths'"):
        engines.create("optuna", SPACE, storage=storage, study="widths")


def test_an_unknown_sampler_is_refused() -> None:
    with pytest.raises(SearchError, match="known: tpe, cmaes, gp"):
        engines.create("optuna", SPACE, sampler="magic")


def test_without_optuna_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(SearchError, match=r"pip install 'fxopt\[optuna\]'"):
        engines.create("optuna", SPACE)
