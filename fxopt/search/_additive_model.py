"""A model of scores that are, nearly, sums over decisions."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.linalg import cho_factor, cho_solve

from fxopt.search._ladders import Ladder

__all__ = ["AdditiveModel"]

_Floats = npt.NDArray[np.float64]
_Indices = npt.NDArray[np.intp]

_GRID = 12
_REACH = 0.5
_ROUGH = 0.02
_OWN = 0.003
_NOISES = (1e-9, 1e-7, 1e-5, 1e-4, 1e-2, 0.1)
_JUDGED = 128
_FIRST_LEARNT = 24
_LEARNT_AGAIN = 1.25
_STEPS = 2
_BELIEF = 3.0
_TINY = 1e-10


class AdditiveModel:
    """A Gaussian process over policies whose kernel is a sum over decisions.

    What a choice is worth is a sum of one effect for each axis of its decision, smooth along the axis, and a small part
    of its own; so a choice that was never tried is guessed from its neighbours, and one that was tried is taken at its
    word. A score that is a sum over decisions is known exactly after every single change of one policy. Duvenaud et al.
    2011, additive Gaussian processes, first order.

    Decisions of a kind are alike: there is an effect that all of them share, and the covariance of what each adds to it
    is learnt from all of them by expectation and maximization, as in factor analysis, each time that the scores have
    grown by a quarter. So it comes to know that bits are the dearer the fewer they are, and that some layers feel it
    more than others, after far fewer scores than there are choices.

    Args:
        ladders: The decisions' ladders.
        kinds: A name for each decision; decisions of one name and number of axes learn from each other.
    """

    def __init__(self, ladders: Sequence[Ladder], kinds: Sequence[str] | None = None) -> None:
        self._starts = np.concatenate(([0], np.cumsum([len(ladder.rungs) for ladder in ladders]))).astype(np.intp)
        given = kinds or [""] * len(ladders)
        names = [f"{kind}, {len(ladder.sizes)}" for kind, ladder in zip(given, ladders, strict=True)]
        self._groups = {
            name: _Group([j for j, one in enumerate(names) if one == name], ladders) for name in sorted(set(names))
        }
        self._learnt = 0
        self._kernels: list[_Floats] = []
        self._known_rows: _Indices = np.zeros((0, 0), dtype=np.intp)
        self._known_gram: _Floats = np.zeros((0, 0))
        self._rebuild()

    # Learning.

    def fit(self, rows: _Indices, scores: _Floats, spread: float = 0.0, doubt: npt.ArrayLike = 0.0) -> None:
        """Take over the scores of policies.

        Args:
            rows: Choice indices, shape ``(n, decisions)``.
            scores: Shape ``(n,)``.
            spread: How much scores are thought to differ; more, if those given do.
            doubt: The standard deviation of what is wrong with each score, shape ``(n,)``.
        """
        self._learnt = min(self._learnt, len(rows))
        self._take(rows, scores, spread, doubt)
        if len(rows) < max(_FIRST_LEARNT, _LEARNT_AGAIN * self._learnt):
            return
        for _ in range(_STEPS):
            inverse = cho_solve(self._factor, np.eye(len(rows)))
            counts = self._counts(self._weights / np.sqrt(self._variance))
            for group in self._groups.values():
                group.learn(rows, inverse, counts)
            self._rebuild()
            self._take(rows, scores, spread, doubt)
        self._learnt = len(rows)

    def _take(self, rows: _Indices, scores: _Floats, spread: float, doubt: npt.ArrayLike) -> None:
        self._rows = rows
        gram = self._gram(rows)
        self._targets = scores - float(scores.mean())
        doubts = np.broadcast_to(np.asarray(doubt, dtype=np.float64), (len(rows),))
        sure = np.flatnonzero(doubts == 0.0)[-_JUDGED:] if (doubts == 0.0).any() else np.arange(len(rows))
        noise, self._variance = self._likeliest(gram[np.ix_(sure, sure)], scores[sure], spread)
        wrong = doubts**2 / self._variance
        self._noise = noise + wrong + _TINY * float(gram.trace()) / len(gram)
        self._factor = cho_factor(gram + np.diag(self._noise), lower=True)
        self._weights = cho_solve(self._factor, self._targets)

    def _gram(self, rows: _Indices) -> _Floats:
        """The covariance of the policies' scores; what is known of the policies before is kept."""
        known = len(self._known_rows)
        if known > len(rows) or not np.array_equal(self._known_rows, rows[:known]):
            known = 0
        gram = np.zeros((len(rows), len(rows)))
        gram[:known, :known] = self._known_gram[:known, :known]
        if known < len(rows):
            new = np.zeros((len(rows), len(rows) - known))
            for kernel, column in zip(self._kernels, rows.T, strict=True):
                new += kernel[column[:, np.newaxis], column[known:]]
            gram[:, known:] = new
            gram[known:] = gram[:, known:].T
        self._known_rows, self._known_gram = rows.copy(), gram
        # Whole each time: a part of a product of matrices differs in its last bits from the same part of the whole.
        return gram + sum(group.taken(rows) @ group.shared @ group.taken(rows).T for group in self._groups.values())

    def _likeliest(self, gram: _Floats, scores: _Floats, spread: float) -> tuple[float, float]:
        """The part of some scores that no sum explains, and the variance of the rest, by their likelihood."""
        seen = scores - scores.mean()
        usual = sum(float(kernel.diagonal().mean()) for kernel in self._kernels) or 1.0
        best, noise, variance = -np.inf, 0.0, 0.0
        for candidate in _NOISES:
            factor = cho_factor(
                gram + (candidate * usual + _TINY * gram.trace() / len(gram)) * np.eye(len(gram)), lower=True
            )
            # The scale of the scores is the one of the highest likelihood.
            fit = max(float(seen @ cho_solve(factor, seen)) / len(seen), 1e-300)
            likelihood = -0.5 * len(seen) * np.log(fit) - float(np.log(np.diag(factor[0])).sum())
            if likelihood > best:
                best, noise, variance = likelihood, candidate * usual, fit
        least = (max(spread, 1e-12 * float(np.abs(scores).max(initial=0.0))) or 1.0) ** 2 / usual
        return noise, max(variance, least)

    def _rebuild(self) -> None:
        """Make the kernels anew, after the covariances were learnt."""
        self._kernels = [np.zeros((0, 0))] * (len(self._starts) - 1)
        for group in self._groups.values():
            for j, kernel in zip(group.members, group.kernels(), strict=True):
                self._kernels[j] = kernel
        self._known_rows = np.zeros((0, len(self._kernels)), dtype=np.intp)
        self._known_gram = np.zeros((0, 0))

    # What is known.

    def worth(self) -> list[_Floats]:
        """What each choice of each decision adds to the score, as far as is known."""
        return self._explained(self._weights)

    def drawn(self, rng: np.random.Generator) -> list[_Floats]:
        """A guess at the same, drawn from what is possible given the scores (Matheron's rule)."""
        scale = np.sqrt(self._variance)
        prior = [np.zeros(0)] * len(self._kernels)
        for group in self._groups.values():
            for j, table in zip(group.members, group.drawn(rng), strict=True):
                prior[j] = scale * table
        flat = np.concatenate([np.zeros(0), *prior])
        seen = flat[self._rows + self._starts[:-1]].sum(axis=1)
        noise = scale * np.sqrt(self._noise) * rng.standard_normal(len(seen))
        more = self._explained(cho_solve(self._factor, self._targets - seen - noise))
        return [one + other for one, other in zip(prior, more, strict=True)]

    def _counts(self, weights: _Floats) -> list[_Floats]:
        """The sum of the weights of the policies that made each choice."""
        flat = np.bincount(
            (self._rows + self._starts[:-1]).ravel(),
            np.repeat(weights, self._rows.shape[1]),
            minlength=int(self._starts[-1]),
        )
        return [np.asarray(flat[start:stop], dtype=np.float64) for start, stop in itertools.pairwise(self._starts)]

    def _explained(self, weights: _Floats) -> list[_Floats]:
        counts = self._counts(weights)
        found = [kernel @ count for kernel, count in zip(self._kernels, counts, strict=True)]
        for group in self._groups.values():
            shared = group.shared @ group.gathered(counts)
            for j, features in zip(group.members, group.features, strict=True):
                found[j] = found[j] + features @ shared
        return found

    # The state.

    def state(self) -> dict[str, Any]:
        """What was learnt about decisions of each kind, as JSON-ready data; the scores are not part of it."""
        groups = {name: group.state() for name, group in self._groups.items()}
        return {"learnt": self._learnt, "groups": groups}

    def load(self, state: Mapping[str, Any], *, elsewhere: bool = False) -> None:
        """Take over what was learnt, ``elsewhere`` by a model of other decisions: then of the kinds that fit alone."""
        self._learnt = 0 if elsewhere else int(state["learnt"])
        for name, group in self._groups.items():
            if name in state["groups"]:
                group.load(state["groups"][name])
        self._rebuild()


class _Group:
    """Decisions that learn from each other: the same effects for all, and what each adds to them.

    Attributes:
        members: The indices of the decisions.
        features: For each of them what effects its choices have, shape ``(choices, effects)``: the places of a grid for
            each axis, between which effects are linear.
        shared: The covariance of the effects that all share.
    """

    def __init__(self, members: list[int], ladders: Sequence[Ladder]) -> None:
        self.members = members
        axes = len(ladders[members[0]].sizes)
        self._sizes = [min(_GRID, max(ladders[j].sizes[axis] for j in members)) for axis in range(axes)]
        self.features = [
            np.concatenate([_between(ladders[j].places[:, axis], self._sizes[axis]) for axis in range(axes)], axis=1)
            for j in members
        ]
        self._blocks = list(itertools.pairwise(np.concatenate(([0], np.cumsum(self._sizes))).tolist()))
        self._before: _Floats = np.zeros((sum(self._sizes), sum(self._sizes)))
        for (start, stop), size in zip(self._blocks, self._sizes, strict=True):
            self._before[start:stop, start:stop] = _smooth(size)
        self.shared = self._before.copy()
        self._each = self._before.copy()
        self._squares = np.ones(len(self._before)) / axes

    def taken(self, rows: _Indices) -> _Floats:
        """How often each effect is in policies, shape ``(n, effects)``."""
        found = np.zeros((len(rows), len(self._before)))
        for j, features in zip(self.members, self.features, strict=True):
            found += features[rows[:, j]]
        return found

    def gathered(self, counts: Sequence[_Floats]) -> _Floats:
        """The sum of the counts of all members' choices, effect by effect."""
        found = np.zeros(len(self._before))
        for j, features in zip(self.members, self.features, strict=True):
            found += features.T @ counts[j]
        return found

    def kernels(self) -> list[_Floats]:
        """The covariance of what the choices of each member add, beyond what all share."""
        return [
            features @ self._each @ features.T + np.diag(_OWN * (features @ self._squares))
            for features in self.features
        ]

    def drawn(self, rng: np.random.Generator) -> list[_Floats]:
        """What the choices of the members might be worth, before any score is known."""
        root, common = _root(self._each), _root(self.shared) @ rng.standard_normal(len(self.shared))
        return [
            features @ (common + root @ rng.standard_normal(len(root)))
            + np.sqrt(_OWN * (features @ self._squares)) * rng.standard_normal(len(features))
            for features in self.features
        ]

    def learn(self, rows: _Indices, inverse: _Floats, counts: Sequence[_Floats]) -> None:
        """One step of expectation and maximization, given the inverse of the policies' covariance.

        The covariance before anything was learnt counts as much as :data:`_BELIEF` members.
        """
        common = self.shared @ self.gathered(counts)
        moments, squares = np.zeros_like(self._each), np.zeros(len(self._each))
        for j, features in zip(self.members, self.features, strict=True):
            added = self._each @ (features.T @ counts[j])
            effects = features[rows[:, j]] @ self._each
            moments += np.outer(added, added) + self._each - effects.T @ inverse @ effects
            for start, stop in self._blocks:
                # An effect is as large as it is far from that of the axis's last rung.
                whole = (common + added)[start:stop]
                squares[start:stop] += (whole - whole[-1]) ** 2 / len(self.members)
        before = self._scaled(self._each)
        self._each = _positive((_BELIEF * before + moments) / (_BELIEF + len(self.members)))
        self.shared = self._scaled(self._each) + np.outer(common, common)
        self._squares = squares + _TINY * float(self._each.trace())

    def _scaled(self, like: _Floats) -> _Floats:
        """The covariance before anything was learnt, each axis as large as in another."""
        found = self._before.copy()
        for start, stop in self._blocks:
            block = found[start:stop, start:stop]
            block *= like[start:stop, start:stop].trace() / block.trace()
        return found

    def state(self) -> dict[str, Any]:
        """The covariances."""
        return {
            "sizes": self._sizes,
            "each": self._each.tolist(),
            "shared": self.shared.tolist(),
            "squares": self._squares.tolist(),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Take over covariances, if they are of as many effects."""
        if list(state["sizes"]) != self._sizes:
            return
        self._each, self.shared = np.array(state["each"]), np.array(state["shared"])
        self._squares = np.array(state["squares"])


def _between(places: _Floats, size: int) -> _Floats:
    """The weights of the middles of ``size`` equal parts of [0, 1] at places, shape ``(places, size)``."""
    return np.stack([np.interp(places * size - 0.5, np.arange(size), one) for one in np.eye(size)], axis=1)


def _smooth(size: int) -> _Floats:
    middles = (np.arange(size) + 0.5) / size
    away = (middles[:, np.newaxis] - middles) / _REACH
    return np.asarray(np.exp(-0.5 * away**2) + _ROUGH * np.eye(size))


def _positive(covariance: _Floats) -> _Floats:
    """A covariance without what rounding took from it."""
    variances, axes = np.linalg.eigh(0.5 * (covariance + covariance.T))
    return np.asarray((axes * np.maximum(variances, _TINY * variances[-1])) @ axes.T)


def _root(covariance: _Floats) -> _Floats:
    small = 10.0 * _TINY * float(covariance.trace()) * np.eye(len(covariance))
    return np.asarray(np.linalg.cholesky(covariance + small))
