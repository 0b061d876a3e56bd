"""A cost model out of measured times of operators."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from fxopt.targets.models.measured import COEFFICIENTS, Model, family_keys, group_names, terms_of
from fxopt.targets.rows import Floats, Rows

__all__ = ["coefficients", "families_of", "fit", "held_out_errors"]

_NAMES = (*COEFFICIENTS, "const")
# In order of importance: a group with few measurements is fitted to the first ones alone.
_ORDER = ("mac", "const", "out", "patch", "tap", "rest", "in", "weight")
_LEAST_TO_HOLD_OUT = 4
_ROUNDS = 12


def families_of(rows: Rows) -> NDArray[np.uint64]:
    """Key of the family of each row: everything but its channels. Shape (n,)."""
    keys = np.empty(rows.size, np.uint64)
    family_keys(np.ravel(rows), keys)
    return keys


def coefficients(rows: Rows, seconds: Floats) -> dict[str, float]:
    """Coefficients of the linear model for measured times, in SI units, by name.

    For each class of bits and group of operators they are the non-negative ones with the least absolute relative
    errors (least squares, reweighted by the inverse of the errors before), which a few disturbed times do not bend.

    Args:
        rows: Measured operators, shape (n,), n > 0.
        seconds: Their times, above 0.
    """
    values: dict[str, float] = {}
    for (bits, group), members in _groups(rows).items():
        found = _coefficients(terms_of(rows[members]), seconds[members])
        values |= {f"{bits}.{group}.{name}": value for name, value in found if value > 0.0}
    return values


def fit(rows: Rows, seconds: Floats, *, fuses: bool = True) -> Model:
    """Fit the linear model to measured times, then a factor for each family.

    The factor of a family is the geometric mean of measured over linear time.

    Args:
        rows: Measured operators, shape (n,), n > 0.
        seconds: Their times, above 0.
        fuses: Whether the model takes what is fused as free.
    """
    values = coefficients(rows, seconds)
    ratios = np.log(seconds / _predict(Model(values, False), rows))
    keys, family = np.unique(families_of(rows), return_inverse=True)
    factors = np.exp(np.bincount(family, weights=ratios) / np.bincount(family))
    return Model(values, fuses, keys, factors)


def held_out_errors(rows: Rows, seconds: Floats, *, by_family: bool = True) -> Floats:
    """Relative errors on every second operator of each group when the model is fitted to the others.

    Groups of fewer than four are left out: half of them says nothing.

    Args:
        rows: Measured operators, shape (n,).
        seconds: Their times, above 0.
        by_family: Whether the model has factors for families, or is linear alone.
    """
    halves = [(members[::2], members[1::2]) for members in _groups(rows).values() if len(members) >= _LEAST_TO_HOLD_OUT]
    if not halves:
        return np.empty(0, np.float64)
    known, unseen = (np.concatenate(half) for half in zip(*halves, strict=True))
    found = rows[known], seconds[known]
    predicted = _predict(fit(*found, fuses=False) if by_family else Model(coefficients(*found), False), rows[unseen])
    errors: Floats = np.abs(predicted / seconds[unseen] - 1.0)
    return errors


def _groups(rows: Rows) -> Mapping[tuple[str, str], NDArray[np.intp]]:
    """Indices of the rows that share coefficients, by class of bits and group."""
    members: dict[tuple[str, str], list[int]] = {}
    for index, name in enumerate(group_names(rows)):
        if name is not None:
            members.setdefault(name, []).append(index)
    return {name: np.array(members[name], np.intp) for name in sorted(members)}


def _coefficients(terms: Floats, seconds: Floats) -> Iterator[tuple[str, float]]:
    used = [_NAMES.index(name) for name in _ORDER if terms[:, _NAMES.index(name)].any()][: max(1, len(terms) - 1)]
    relative = terms[:, used] / seconds[:, None]
    # Columns differ by ten orders of magnitude: scaled, they do not trouble the solver.
    scale = relative.max(axis=0)
    columns, wanted = relative / scale, np.ones(len(terms))
    trust = np.ones(len(terms))
    for _ in range(_ROUNDS):
        solution, _ = nnls(columns * trust[:, None], wanted * trust)
        trust = 1.0 / np.sqrt(np.maximum(np.abs(columns @ solution - wanted), 0.02))
    yield from zip((_NAMES[index] for index in used), (solution / scale).tolist(), strict=True)


def _predict(model: Model, rows: Rows) -> Floats:
    latency_s: Floats = np.empty((1, len(rows)), np.float64)
    model.per_row(rows.reshape(1, -1), latency_s, np.empty_like(latency_s), np.empty_like(latency_s))
    return latency_s.ravel()
