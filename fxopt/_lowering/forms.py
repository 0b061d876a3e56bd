"""Sizes that depend on a policy: products of sums of kept channel counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array

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
        """The size for every policy, from the forms' values of shape (forms, policies)."""
        result: Ints = np.full(sizes.shape[1] if self.forms else 1, self.factor, dtype=np.int64)
        for form in self.forms:
            result *= sizes[form]
        return result


@dataclass(frozen=True)
class _Form:
    """``constant + sum(multiplicity * kept channels of a group)``."""

    constant: int
    terms: tuple[tuple[int, int], ...]


class Forms:
    """A table of sums of kept channels, each written down once."""

    def __init__(self, groups: Sequence[ChannelGroup]) -> None:
        top = max((int(group.units.max()) for group in groups), default=-1)
        self._group_of_unit = np.full(top + 1, -1, dtype=np.int64)
        for index, group in enumerate(groups):
            self._group_of_unit[group.units] = index
        self._sizes = [group.size for group in groups]
        self._known: dict[_Form, int] = {}

    @staticmethod
    def fixed(value: int) -> Size:
        """A size that no policy changes."""
        return Size(value, (), value)

    def of(self, units: Ints | None, size: int) -> Size:
        """The size of a dimension whose indices are these units (None: no policy changes it)."""
        if units is None:
            return self.fixed(size)
        loose = units[units >= 0]
        if not len(loose):
            return self.fixed(size)
        groups = self._group_of_unit[loose]
        counted = [(int(groups[0]), len(loose))]
        if (groups != groups[0]).any():
            found, counts = np.unique(groups, return_counts=True)
            counted = list(zip(found.tolist(), counts.tolist(), strict=True))
        # Heads folded into the batch: as many indices as there are at the batch lowered for.
        fixed, scaled = len(units) - len(loose), (size, len(units)) if size != len(units) else (1, 1)
        counted = [(group, count * scaled[0] // scaled[1]) for group, count in counted]
        fixed = fixed * scaled[0] // scaled[1]
        form = _Form(fixed, tuple((group, count // self._sizes[group]) for group, count in counted))
        return Size(1, (self._known.setdefault(form, len(self._known)),), size)

    def groups_of(self, form: int) -> set[int]:
        """Indices of the groups whose channels a form sums."""
        return {group for group, count in list(self._known)[form].terms if count}

    def evaluate(self, kept: Ints) -> Ints:
        """Every form for every policy.

        Args:
            kept: Kept units, shape (groups, policies).

        Returns:
            Sizes, shape (forms, policies).
        """
        constants = np.array([form.constant for form in self._known], dtype=np.int64).reshape(-1, 1)
        terms = [(row, *term) for row, form in enumerate(self._known) for term in form.terms]
        if not terms:
            return np.tile(constants, (1, kept.shape[1]))
        rows, groups, counts = np.array(terms, dtype=np.int64).T
        table = csr_array((counts, (rows, groups)), shape=(len(constants), len(kept)))
        result: Ints = constants + table @ kept
        return result
