"""Sizes that depend on a policy: products of sums of kept channel counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fxopt.graph.channels import ChannelGroup

__all__ = ["Forms", "Size"]

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Size:
    """``factor`` times the product of some forms.

    Attributes:
        factor: The part that no policy changes.
        forms: Indices of the forms.
        constant: The value for the graph as it is.
    """

    factor: int
    forms: tuple[int, ...]
    constant: int

    def __mul__(self, other: Size) -> Size:
        return Size(self.factor * other.factor, self.forms + other.forms, self.constant * other.constant)

    def evaluate(self, sizes: Ints) -> Ints:
        """The size for every policy, from the forms' values of shape (policies, forms)."""
        result: Ints = np.full(len(sizes), self.factor, dtype=np.int64)
        for form in self.forms:
            result = result * sizes[:, form]
        return result


class Forms:
    """A table of sums ``constant + sum(multiplicity * kept channels of a group)``."""

    def __init__(self, groups: Sequence[ChannelGroup]) -> None:
        top = max((int(group.units.max()) for group in groups), default=-1)
        self._group_of_unit = np.full(top + 1, -1, dtype=np.int64)
        for index, group in enumerate(groups):
            self._group_of_unit[group.units] = index
        self._sizes = np.array([group.size for group in groups], dtype=np.int64)
        self._known: dict[tuple[int, ...], int] = {}
        self._rows: list[tuple[int, ...]] = []

    @staticmethod
    def fixed(value: int) -> Size:
        """A size that no policy changes."""
        return Size(value, (), value)

    def of(self, units: Ints | None, size: int) -> Size:
        """The size of a dimension whose indices are these units (None: no policy changes it)."""
        if units is None:
            return self.fixed(size)
        loose = units[units >= 0]
        counts = np.bincount(self._group_of_unit[loose], minlength=len(self._sizes)) // np.maximum(self._sizes, 1)
        row = (size - len(loose), *counts.tolist())
        if row not in self._known:
            self._known[row] = len(self._rows)
            self._rows.append(row)
        return Size(1, (self._known[row],), size)

    def evaluate(self, kept: Ints) -> Ints:
        """Every form for every policy.

        Args:
            kept: Kept units, shape (policies, groups).

        Returns:
            Sizes, shape (policies, forms).
        """
        if not self._rows:
            return np.zeros((len(kept), 0), dtype=np.int64)
        table = np.array(self._rows, dtype=np.int64)
        result: Ints = table[:, 0] + kept @ table[:, 1:].T
        return result
