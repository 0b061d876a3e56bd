"""A model of scores that are, nearly, sums over decisions."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy.linalg import cho_factor, cho_solve

from fxopt.search._ladders import Ladder

__all__ = ["AdditiveModel"]

_Floats = npt.NDArray[np.float64]
_Indices = npt.NDArray[np.intp]

_REACH = 0.35
_ROUGH = 0.05
_NOISES = (1e-6, 1e-4, 1e-2, 0.1)
_JUDGED = 128


class AdditiveModel:
    """A Gaussian process over policies whose kernel is a sum over decisions.

    What a choice is worth is smooth along its decision's axes, with a small part of its own; so a choice that was
    never tried is guessed from its neighbours, and one that was tried is taken at its word. A score that is a sum over
    decisions is known exactly after every single change of one policy. Duvenaud et al. 2011, additive Gaussian
    processes, first order.

    Args:
        ladders: The decisions' ladders.
    """

    def __init__(self, ladders: Sequence[Ladder]) -> None:
        self._starts = np.concatenate(([0], np.cumsum([len(ladder.rungs) for ladder in ladders]))).astype(np.intp)
        self._kernels = [_kernel(ladder) for ladder in ladders]
        self._known_rows: _Indices = np.zeros((0, len(ladders)), dtype=np.intp)
        self._known_gram: _Floats = np.zeros((0, 0))
        self._roots = [np.linalg.cholesky(kernel + 1e-10 * np.eye(len(kernel))) for kernel in self._kernels]

    def fit(self, rows: _Indices, scores: _Floats, spread: float = 0.0) -> None:
        """Take over the scores of policies given by choice indices, shape ``(n, decisions)``.

        ``spread`` is how much scores are thought to differ; more, if those given do.
        """
        self._rows = rows
        self._mean = float(scores.mean())
        self._scale = max(float(scores.std()), spread) or 1.0
        self._targets = (scores - self._mean) / self._scale
        gram = self._gram(rows)
        self._noise = self._likeliest_noise(gram, self._targets)
        self._factor = cho_factor(gram + self._noise * np.eye(len(rows)), lower=True)

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
            gram[:, known:] = new / max(len(self._kernels), 1)
            gram[known:] = gram[:, known:].T
        self._known_rows, self._known_gram = rows.copy(), gram
        return gram

    def _likeliest_noise(self, gram: _Floats, targets: _Floats) -> float:
        """The part of the scores that no sum explains, by the likelihood of the latest of them."""
        part, seen = gram[-_JUDGED:, -_JUDGED:], targets[-_JUDGED:] - targets[-_JUDGED:].mean()
        best, noise = -np.inf, _NOISES[0]
        for candidate in _NOISES:
            factor = cho_factor(part + candidate * np.eye(len(part)), lower=True)
            # The scale of the scores is the one of the highest likelihood.
            fit = max(float(seen @ cho_solve(factor, seen)) / len(seen), 1e-300)
            likelihood = -0.5 * len(seen) * np.log(fit) - float(np.log(np.diag(factor[0])).sum())
            if likelihood > best:
                best, noise = likelihood, candidate
        return noise

    def worth(self) -> list[_Floats]:
        """What each choice of each decision adds to the score, as far as is known."""
        return self._split(self._scale * self._explained(self._targets))

    def drawn(self, rng: np.random.Generator) -> list[_Floats]:
        """A guess at the same, drawn from what is possible given the scores (Matheron's rule)."""
        weight = 1.0 / np.sqrt(max(len(self._kernels), 1))
        prior = np.concatenate(
            [np.zeros(0), *(weight * (root @ rng.standard_normal(len(root))) for root in self._roots)]
        )
        seen = prior[self._rows + self._starts[:-1]].sum(axis=1)
        noise = np.sqrt(self._noise) * rng.standard_normal(len(seen))
        return self._split(self._scale * (prior + self._explained(self._targets - seen - noise)))

    def _explained(self, targets: _Floats) -> _Floats:
        weights = cho_solve(self._factor, targets)
        parts = [
            kernel @ np.bincount(column, weights, minlength=len(kernel))
            for kernel, column in zip(self._kernels, self._rows.T, strict=True)
        ]
        return np.concatenate([np.zeros(0), *parts]) / max(len(self._kernels), 1)

    def _split(self, flat: _Floats) -> list[_Floats]:
        return [flat[start:stop] for start, stop in itertools.pairwise(self._starts)]


def _kernel(ladder: Ladder) -> _Floats:
    away = (ladder.places[:, np.newaxis] - ladder.places[np.newaxis]) / _REACH
    smooth = np.exp(-0.5 * (away**2).sum(axis=2))
    return np.asarray(smooth + _ROUGH * np.eye(len(smooth)))
