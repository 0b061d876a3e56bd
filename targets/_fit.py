"""A cost model out of measured times of operators."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from fxopt.targets._measured import MeasuredModel, family_keys
from fxopt.targets.models.linear_cpu import GROUP_NAMES, group_names
from fxopt.targets.rows import Floats, Rows, compute_bits, in_elements, macs, out_elements, weights

__all__ = ["families_of", "fit", "held_out_errors"]

# Features in order of importance: a group with few measurements is fitted to the first ones alone.
_WITH_MACS = ("mac", "const", "out", "in", "weight")
_WITHOUT_MACS = ("out", "const", "in")
_LEAST_TO_HOLD_OUT = 4


def families_of(rows: Rows) -> NDArray[np.uint64]:
    """Key of the family of each row: everything but its channels. Shape (n,)."""
    keys = np.empty(rows.size, np.uint64)
    family_keys(np.ravel(rows), keys)
    return keys


def fit(rows: Rows, seconds: Floats) -> MeasuredModel:
    """Fit the linear model to measured times, then a factor for each family.

    Coefficients are the non-negative least squares of relative errors, by group of operators and class of bits; the
    factor of a family is the geometric mean of measured over linear time.

    Args:
        rows: Measured operators, shape (n,), n > 0.
        seconds: Their times, above 0.
    """
    values: dict[str, float] = {}
    for (bits, group), members in _groups(rows):
        values |= {f"{bits}.{group}.{name}": value for name, value in _coefficients(rows[members], seconds[members])}
    none = np.empty(0, np.uint64), np.empty(0, np.float64)
    ratios = np.log(seconds / _predict(MeasuredModel(values, True, *none), rows))
    keys, family = np.unique(families_of(rows), return_inverse=True)
    factors = np.exp(np.bincount(family, weights=ratios) / np.bincount(family))
    return MeasuredModel(values, True, keys, factors)


def held_out_errors(rows: Rows, seconds: Floats) -> Floats:
    """Relative errors on every second operator of each group when the model is fitted to the others.

    Groups of fewer than four are left out: half of them says nothing.
    """
    halves = [(members[::2], members[1::2]) for _, members in _groups(rows) if len(members) >= _LEAST_TO_HOLD_OUT]
    if not halves:
        return np.empty(0, np.float64)
    known, unseen = (np.concatenate(half) for half in zip(*halves, strict=True))
    predicted = _predict(fit(rows[known], seconds[known]), rows[unseen])
    errors: Floats = np.abs(predicted / seconds[unseen] - 1.0)
    return errors


def _groups(rows: Rows) -> Iterator[tuple[tuple[str, str], NDArray[np.intp]]]:
    """Class of bits, group and indices of the rows that share coefficients."""
    groups = np.array([group or "" for group in group_names(rows)])
    widths = compute_bits(rows)
    classes = np.where(widths <= 8, "int8", np.where(widths <= 16, "int16", "float"))
    for group in GROUP_NAMES:
        for bits in ("float", "int16", "int8"):
            members = np.flatnonzero((groups == group) & (classes == bits))
            if members.size:
                yield (bits, group), members


def _coefficients(rows: Rows, seconds: Floats) -> Iterator[tuple[str, float]]:
    features = {
        "mac": macs(rows),
        "const": np.ones(len(rows)),
        "out": out_elements(rows),
        "in": in_elements(rows),
        "weight": weights(rows),
    }
    names: tuple[str, ...] = _WITH_MACS if features["mac"].any() else _WITHOUT_MACS
    names = names[: max(1, len(rows) - 1)]
    relative = np.stack([features[name] / seconds for name in names], axis=1)
    # Columns differ by ten orders of magnitude: scaled, they do not trouble the solver.
    scale = relative.max(axis=0)
    used = scale > 0.0
    solution, _ = nnls(relative[:, used] / scale[used], np.ones(len(rows)))
    yield from zip(np.array(names)[used].tolist(), (solution / scale[used]).tolist(), strict=True)


def _predict(model: MeasuredModel, rows: Rows) -> Floats:
    latency_s: Floats = np.empty((1, len(rows)), np.float64)
    model.per_row(rows.reshape(1, -1), latency_s, np.empty_like(latency_s), np.empty_like(latency_s))
    return latency_s.ravel()
