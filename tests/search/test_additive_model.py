"""The critic: a model of sums over decisions that learns what decisions of a kind have in common."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from fxopt.decisions import Choice
from fxopt.search._additive_model import AdditiveModel
from fxopt.search._ladders import Ladder

PAIRS: tuple[Choice, ...] = tuple((w, a) for w in range(1, 9) for a in range(1, 9))
LAYERS = 10


class Sum:
    """Scores that are sums: layers of one shape, each as sensitive as it is."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        losses = np.array([2.0**-w + 2.0**-a for w, a in PAIRS])  # type: ignore[misc]
        self.tables = [-size * losses for size in np.exp(self.rng.normal(size=LAYERS))]
        self.ladders = [Ladder(PAIRS) for _ in range(LAYERS)]

    def rows(self, n: int) -> npt.NDArray[np.intp]:
        return self.rng.integers(0, len(PAIRS), (n, LAYERS))

    def scores(self, rows: npt.NDArray[np.intp], tables: Any = None) -> npt.NDArray[np.float64]:
        parts = zip(self.tables if tables is None else tables, rows.T, strict=True)
        return np.asarray(sum(table[column] for table, column in parts))

    def agreement(self, model: AdditiveModel) -> float:
        rows = self.rows(300)
        return float(np.corrcoef(self.scores(rows), self.scores(rows, model.worth()))[0, 1])


@pytest.mark.parametrize("seed", range(3))
def test_sixty_scores_tell_what_six_hundred_and_forty_choices_are_worth(seed: int) -> None:
    made = Sum(seed)
    rows = made.rows(60)
    model = AdditiveModel(made.ladders)
    model.fit(rows, made.scores(rows))
    assert made.agreement(model) > 0.97


def test_what_was_seen_is_explained_and_so_is_every_guess() -> None:
    made = Sum(0)
    rows = made.rows(40)
    scores = made.scores(rows)
    model = AdditiveModel(made.ladders)
    model.fit(rows, scores)
    for tables in (model.worth(), model.drawn(np.random.default_rng(0))):
        found = made.scores(rows, tables)
        np.testing.assert_allclose(found - found.mean(), scores - scores.mean(), atol=0.02 * float(scores.std()))
    apart = [made.scores(made.rows(1), model.drawn(np.random.default_rng(seed))) for seed in range(2)]
    assert apart[0] != apart[1]


def test_a_score_in_doubt_counts_for_less() -> None:
    made = Sum(1)
    rows = made.rows(60)
    wrong = made.scores(rows)
    wrong[:5] -= 30.0 * float(wrong.std())
    doubt = np.where(np.arange(60) < 5, 100.0 * float(wrong.std()), 0.0)
    agreements = []
    for given in (0.0, doubt):
        model = AdditiveModel(made.ladders)
        model.fit(rows, wrong, doubt=given)
        agreements.append(made.agreement(model))
    assert agreements[1] > 0.9 > agreements[0]


def test_a_saved_model_goes_on_where_it_was() -> None:
    made = Sum(2)
    rows = made.rows(50)
    first, again = AdditiveModel(made.ladders), AdditiveModel(made.ladders)
    first.fit(rows, made.scores(rows))
    again.load(json.loads(json.dumps(first.state())))
    again.fit(rows, made.scores(rows))
    for one, other in zip(first.worth(), again.worth(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_what_was_learnt_of_a_kind_helps_with_other_decisions_of_it() -> None:
    made, other = Sum(3), Sum(4)
    rows = made.rows(120)
    first = AdditiveModel(made.ladders, ["bits"] * LAYERS)
    first.fit(rows, made.scores(rows))
    few = other.rows(15)
    found = []
    for helped in (False, True):
        model = AdditiveModel(other.ladders, ["bits"] * LAYERS)
        if helped:
            model.load(first.state(), elsewhere=True)
        model.fit(few, other.scores(few))
        found.append(other.agreement(model))
    assert found[1] > found[0] + 0.02
    strange = AdditiveModel([Ladder((4, 8))] * 3, ["channels"] * 3)
    before = strange.state()
    strange.load(first.state(), elsewhere=True)
    assert strange.state() == before


def test_decisions_of_unlike_numbers_of_choices_learn_from_each_other() -> None:
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 40, 8)
    ladders = [Ladder(tuple(range(8, 8 * size + 1, 8))) for size in sizes.tolist()]
    tables = [-weight * (1 - ladder.places[:, 0]) ** 2 for weight, ladder in zip(rng.random(8), ladders, strict=True)]
    rows = np.stack([rng.integers(0, size, 80) for size in sizes.tolist()], axis=1)
    scores = np.asarray(sum(table[column] for table, column in zip(tables, rows.T, strict=True)))
    model = AdditiveModel(ladders, ["channels"] * 8)
    model.fit(rows[:50], scores[:50])
    found = sum(table[column] for table, column in zip(model.worth(), rows[50:].T, strict=True))
    assert float(np.corrcoef(found, scores[50:])[0, 1]) > 0.99


@pytest.mark.parametrize("scores", [np.zeros(3), np.full(30, 7.0)])
def test_equal_scores_tell_nothing(scores: npt.NDArray[np.float64]) -> None:
    made = Sum(5)
    model = AdditiveModel(made.ladders)
    model.fit(made.rows(len(scores)), scores)
    assert all(np.abs(table).max() < 1e-9 for table in model.worth())
    assert all(np.isfinite(table).all() for table in model.drawn(made.rng))
