"""Ending before the last epoch, and going on after a kill."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fxopt.errors import DataError, FxoptError
from fxopt.training import EarlyStop, fit
from tests.training.test_fit import assert_same, make_data, make_model, state_of


class Scores:
    """Judges as it was told, and remembers the weights that it was shown."""

    def __init__(self, *scores: float) -> None:
        self.scores = scores
        self.seen: list[dict[str, torch.Tensor]] = []
        self.modes: list[bool] = []

    def __call__(self, module: nn.Module) -> float:
        self.seen.append(state_of(module))
        self.modes.append(module.training)
        return self.scores[len(self.seen) - 1]


def test_training_ends_when_patience_does_and_the_best_weights_come_back() -> None:
    model, judge = make_model(), Scores(0.5, 0.7, 0.7, 0.6, 0.9)
    history = fit(model, make_data(), epochs=5, evaluate=judge, early_stop=EarlyStop(patience=2))
    assert history.score == [0.5, 0.7, 0.7, 0.6]
    assert len(history.loss) == 4
    assert history.best_epoch == 2
    assert_same(state_of(model), judge.seen[1])
    assert judge.modes == [False] * 4
    assert not model.training


def test_the_best_weights_come_back_from_a_training_that_went_to_its_end() -> None:
    model, judge = make_model(), Scores(0.5, 0.9, 0.7)
    history = fit(model, make_data(), epochs=3, evaluate=judge, early_stop=EarlyStop(patience=5))
    assert (len(history.loss), history.best_epoch) == (3, 2)
    assert_same(state_of(model), judge.seen[1])


def test_scores_without_an_early_stop_are_noted_alone() -> None:
    judged, plain = make_model(), make_model()
    history = fit(judged, make_data(), epochs=3, evaluate=Scores(0.9, 0.5, 0.1))
    fit(plain, make_data(), epochs=3)
    assert (history.score, history.best_epoch) == ([0.9, 0.5, 0.1], 0)
    assert_same(state_of(judged), state_of(plain))


@given(
    st.lists(st.floats(-1, 1), min_size=1, max_size=12),
    st.integers(1, 4),
    st.sampled_from([0.0, 0.1]),
    st.integers(0, 12),
)
def test_the_best_epoch_is_the_last_that_was_better_by_enough(
    scores: list[float], patience: int, min_delta: float, cut: int
) -> None:
    stop = EarlyStop(patience, min_delta)
    best = stop.best(scores)
    assert 1 <= best <= len(scores)
    assert all(score <= scores[best - 1] + min_delta for score in scores[best:])
    assert best == 1 or scores[best - 1] > max(scores[: best - 1]) or min_delta > 0.0
    # What was seen before does not change with what comes after.
    assert stop.best(scores[:best]) == best
    assert stop.is_over(scores) == (len(scores) - best >= patience)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"patience": 0}, "patience is a whole number of epochs"),
        ({"patience": 1.5}, "patience is a whole number of epochs"),
        ({"min_delta": -0.1}, "min_delta has to be finite and not below zero"),
        ({"min_delta": math.nan}, "min_delta has to be finite"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(FxoptError, match=words):
        EarlyStop(**options)


def test_an_early_stop_needs_a_score() -> None:
    with pytest.raises(FxoptError, match="give evaluate"):
        fit(make_model(), make_data(), epochs=1, early_stop=EarlyStop())


@pytest.mark.parametrize(
    ("judge", "words"),
    [
        (lambda module: math.nan, "evaluate gives nan after epoch 1"),
        (lambda module: 1 / 0, "evaluate raised ZeroDivisionError"),
        (lambda module: "good", "evaluate raised ValueError"),
    ],
)
def test_a_judge_that_fails_is_told(judge: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        fit(make_model(), make_data(), epochs=2, evaluate=judge)


class KilledError(BaseException):
    pass


class Killing:
    """Data whose loader is killed at one batch of all that it gives."""

    def __init__(self, at: int) -> None:
        self.data, self.at, self.given = make_data(), at, 0

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Any:
        # The order is torch's own generator's, as a DataLoader's is.
        for batch in torch.randperm(48).split(16):
            self.given += 1
            if self.given == self.at:
                raise KilledError
            yield self.data.inputs[batch], self.data.labels[batch]


def distance(module: nn.Module) -> float:
    """A score that a model has by itself and that draws random numbers."""
    torch.rand(3)
    return -float(module[0].weight.detach().square().sum())  # type: ignore[index, union-attr]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("schedule", ["one-cycle", "step"])
def test_killed_and_resumed_equals_uninterrupted(tmp_path: Path, optimizer: Any, schedule: Any) -> None:
    """Weights get larger all the time: the first epoch stays the best, and the fourth is the last."""
    options: dict[str, Any] = {
        "epochs": 9,
        "optimizer": optimizer,
        "schedule": schedule,
        "learning_rate": 0.05,
        "evaluate": distance,
        "early_stop": EarlyStop(patience=3),
        "seed": 4,
    }
    whole = make_model()
    expected = fit(whole, Killing(0), **options)
    assert (len(expected.loss), expected.best_epoch) == (4, 1)
    # Reading the first batch to look at it counts as one.
    for at in (6, 8, 12):
        stem = tmp_path / f"at-{at}"
        with pytest.raises(KilledError):
            fit(make_model(), Killing(at), **options, checkpoint=stem)
        for _ in range(2):
            resumed = make_model(seed=9)
            torch.rand(5)
            history = fit(resumed, Killing(0), **options, checkpoint=stem)
            assert (history.loss, history.learning_rate, history.score) == (
                (expected.loss, expected.learning_rate, expected.score)
            )
            assert history.best_epoch == 1
            assert_same(state_of(resumed), state_of(whole))
        assert history.resumed_at == 4


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"early_stop": EarlyStop(patience=2)}, "early_stop"),
        ({"early_stop": None}, "early_stop"),
        ({"evaluate": None, "early_stop": None}, "early_stop"),
        ({"schedule": "step"}, "schedule"),
    ],
)
def test_a_checkpoint_of_another_stop_is_refused(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    options: dict[str, Any] = {"epochs": 1, "evaluate": distance, "early_stop": EarlyStop()}
    fit(make_model(), make_data(), **options, checkpoint=tmp_path / "run")
    with pytest.raises(FxoptError, match=f"with {named} = "):
        fit(make_model(), make_data(), **(options | change), checkpoint=tmp_path / "run")
