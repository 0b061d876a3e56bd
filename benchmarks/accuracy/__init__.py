"""How far the targets are from published measurements, one module a family of models.

Each module has ``lines(data)``: it takes the folder of the published figures and gives a :class:`Line` for each
comparison. A module whose figures are not there gives none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["Line"]


@dataclass(frozen=True)
class Line:
    """One comparison of a target with measurements.

    Attributes:
        target: Name of the target.
        against: What the measurements are and who published them.
        points: How many.
        evidence: ``fitted`` (the figures were fitted to these very points), ``left out`` (each point or group was
            predicted by a fit without it) or ``unseen`` (never used in a fit).
        figure: What was found, by name: relative errors (0.03 for 3%) or rank correlations.
        bar: What is wanted of each of them, by the same names; errors at most, correlations at least.
    """

    target: str
    against: str
    points: int
    evidence: Literal["fitted", "left out", "unseen"]
    figure: dict[str, float]
    bar: dict[str, float]

    @property
    def met(self) -> bool:
        """Whether every figure meets its bar."""
        return all(
            self.figure[name] >= wanted if name in ("spearman", "pearson", "order") else self.figure[name] <= wanted
            for name, wanted in self.bar.items()
        )
