"""What the comparisons of single operators share."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from fxopt.targets import load
from fxopt.targets._core import CostModel
from fxopt.targets._presets import PresetTarget
from fxopt.targets.models import family
from fxopt.targets.rows import Floats, Rows

__all__ = ["costs", "figures", "model", "points", "spread"]


def points(path: Path) -> list[dict[str, str]]:
    """The rows of a table of published figures."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def figures(preset: str) -> dict[str, float]:
    """The figures of a preset in SI units."""
    target = load(preset)
    if not isinstance(target, PresetTarget):
        raise TypeError(f"{preset} is no preset")
    return {key: figure.si for key, figure in target.preset.figures.items()}


def model(preset: str, **changes: float) -> CostModel:
    """The model of a preset, with some figures (in SI units) changed."""
    target = load(preset)
    return family(target.info.family).Model(figures(preset) | changes, target.info.fuses)


def costs(costed: CostModel, rows: Rows | Sequence[Rows]) -> tuple[Floats, Floats]:
    """(latency in s, energy in J) of each row."""
    joined = rows if isinstance(rows, np.ndarray) else np.concatenate(rows)
    latency, energy = np.empty((1, len(joined))), np.empty((1, len(joined)))
    costed.per_row(joined.reshape(1, -1), latency, energy, np.empty_like(latency))
    return latency[0], energy[0]


def spread(errors: Floats) -> Mapping[str, float]:
    """Mean and largest relative error, and the mean with its sign."""
    found = np.abs(errors)
    return {"mean": float(found.mean()), "max": float(found.max()), "bias": float(errors.mean())}
