"""What architectures are trained for: the loss of the task, and what the target says they cost."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt
import torch

from fxopt._named import check_known
from fxopt._numbers import check_positive
from fxopt.decisions import format_quantity
from fxopt.decisions._budget import within
from fxopt.errors import BudgetError, InfeasibleError
from fxopt.lowering import OperatorTable
from fxopt.targets import METRICS

__all__ = ["Cost", "CostTerm", "ExpectedCost"]

_Form: TypeAlias = Literal["multiplicative", "additive", "budget"]
_FORMS = get_args(_Form)
_TIGHTENING = 0.5
"""The part of a search in which the limits of budgets come down."""


@dataclass(frozen=True)
class CostTerm:
    """How a cost enters the loss.

    With the expected cost E, the reference R, and L the cheapest policy's cost:

    - ``multiplicative``: loss x ((1 + ln(E / L)) / (1 + ln(R / L))) ^ weight. This is the product of Cai et al. (2019)
      and of Han et al. (equation 3) with its logarithm made free of units: it is 1 at the reference, rises with E, and
      is defined for every E. A reference below L counts as L.
    - ``additive``: loss + weight x (E - R) / R.
    - ``budget``: loss + m x (E / R - 1), where m >= 0 rises by ``weight`` x (E / R - 1) with every step: a hard limit
      by its dual variable, which weighs the cost as much as it takes to meet R. In the first half of a search R comes
      down, by equal factors, from what all candidates cost on average: a dual variable that starts far from its limit
      rises for long, and is far above its place when the limit is met.

    Attributes:
        metric: latency, energy, size, macs or memory.
        reference: R, in SI units.
        form: One of the above.
        weight: The exponent, the factor, or the rate at which the dual variable rises.

    Raises:
        BudgetError: If reference or weight are not above zero and finite.
        UnknownNameError: If there is no such form or metric.
    """

    metric: str
    reference: float
    form: _Form = "budget"
    weight: float = 0.1

    def __post_init__(self) -> None:
        """Check form and numbers."""
        check_known("form of a cost term", self.form, _FORMS)
        check_known("metric", self.metric, METRICS)
        numbers = {
            "The reference of a cost term, in SI units,": self.reference,
            "The weight of a cost term": self.weight,
        }
        check_positive(BudgetError, **numbers)
        for name in ("reference", "weight"):  # As JSON has them, whatever library they come from.
            object.__setattr__(self, name, float(getattr(self, name)))


class ExpectedCost:
    """The expected cost of architectures, as a function of their probabilities (Han et al., equation 2).

    Args:
        table: Costs of all candidates on a target.
        metric: The metric. The expectation of memory, which is a maximum, is taken block by block; it is no more than
            the expectation of the maximum.
    """

    def __init__(self, table: OperatorTable, metric: str) -> None:
        costs, self.fixed = table.of(metric)
        self.costs = torch.from_numpy(costs)
        self.metric = metric
        self._sizes = table.space.sizes

    def __call__(self, probabilities: torch.Tensor) -> torch.Tensor:
        """Expected cost in SI units, from the probability of every candidate of every block."""
        return self.total((probabilities.double() * self.costs.to(probabilities.device)).sum(1))

    def of_pairs(self, pairs: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
        """Expected cost where only some candidates of every block are looked at.

        Args:
            pairs: Their indices, shape (blocks, some).
            probabilities: Their probabilities, of the same shape, which sum to one.
        """
        costs = self.costs.to(pairs.device).gather(1, pairs)
        return self.total((probabilities.double() * costs).sum(1))

    def total(self, blocks: torch.Tensor) -> torch.Tensor:
        """The cost of a network from that of its blocks."""
        if self.metric == "memory":
            return torch.clamp(blocks.max(), min=self.fixed)
        return blocks.sum() + self.fixed

    @property
    def mean(self) -> float:
        """Expected cost where all candidates of a block have the same probability."""
        rows = [row[:size].mean() for row, size in zip(self.costs, self._sizes, strict=True)]
        return float(self.total(torch.stack(rows)))

    @property
    def least(self) -> float:
        """Cost of the cheapest policy."""
        rows = [row[:size].min() for row, size in zip(self.costs, self._sizes, strict=True)]
        return float(self.total(torch.stack(rows)))


class Cost:
    """Terms that a loss is combined with, and their dual variables.

    Attributes:
        terms: The terms.
        expected: The expected cost of every term.
        duals: The dual variable of every term; zero where there is none.
        references: The reference of every term as it is now.

    Raises:
        BudgetError: If ``terms`` is no list of terms.
        InfeasibleError: If the cheapest policy costs more than the reference of a budget.
    """

    def __init__(self, table: OperatorTable, terms: Sequence[CostTerm]) -> None:
        given: object = terms
        self.terms = tuple(terms) if isinstance(given, Iterable) else ()
        if not isinstance(given, Iterable) or not all(isinstance(one, CostTerm) for one in self.terms):
            raise BudgetError(f"terms is a list of fxopt.nas.CostTerm, got {given!r}.")
        self._table = table
        self.expected = tuple(ExpectedCost(table, term.metric) for term in self.terms)
        self.duals = [0.0] * len(self.terms)
        self.references = [term.reference for term in self.terms]
        for term, expected in zip(self.terms, self.expected, strict=True):
            if term.form == "budget" and not within(expected.least, term.reference):
                raise InfeasibleError(
                    f"The cheapest architecture has a {term.metric} of "
                    f"{format_quantity(term.metric, expected.least)}, over the "
                    f"{format_quantity(term.metric, term.reference)} asked for. Raise the budget, or offer cheaper "
                    "candidates.",
                    metric=term.metric,
                    limit=term.reference,
                    least=expected.least,
                )

    def exceeded(self, indices: npt.NDArray[np.intp]) -> Iterator[str]:
        """The budgets that an architecture, an index for each block, does not meet, in words."""
        for term in self.terms:
            value = float(self._table.score(indices[np.newaxis], term.metric)[0])
            if term.form == "budget" and not within(value, term.reference):
                yield (
                    f"The most probable network has a {term.metric} of {format_quantity(term.metric, value)}, over the "
                    f"limit of {format_quantity(term.metric, term.reference)}: fxopt.nas.policy_within gives the most "
                    "probable one within it."
                )

    @property
    def digest(self) -> str:
        """A short name of all costs of all candidates in all terms."""
        found = hashlib.sha256()
        for one in self.expected:
            found.update(one.costs.numpy().tobytes() + np.float64(one.fixed).tobytes())
        return found.hexdigest()[:16]

    def tighten(self, part: float) -> None:
        """Bring the limits of budgets down to where they are after a part of the search, in [0, 1]."""
        way = min(1.0, part / _TIGHTENING)
        for index, (term, expected) in enumerate(zip(self.terms, self.expected, strict=True)):
            if term.form == "budget":
                start = max(expected.mean, term.reference)
                self.references[index] = start * (term.reference / start) ** way

    def combined(self, loss: torch.Tensor, costs: Sequence[torch.Tensor]) -> torch.Tensor:
        """The loss with all terms, from the expected cost of each."""
        total = loss.double()
        for term, expected, cost in zip(self.terms, self.expected, costs, strict=True):
            if term.form == "multiplicative":
                least = expected.least
                whole = 1.0 + math.log(max(term.reference / least, 1.0))
                total = total * ((1.0 + torch.log(cost / least)) / whole) ** term.weight
        for term, cost, dual, reference in zip(self.terms, costs, self.duals, self.references, strict=True):
            excess = cost / reference - 1.0
            if term.form == "additive":
                total = total + term.weight * excess
            elif term.form == "budget":
                total = total + dual * excess
        return total

    def raise_duals(self, costs: Sequence[float]) -> None:
        """One step of dual ascent."""
        for index, (term, cost, reference) in enumerate(zip(self.terms, costs, self.references, strict=True)):
            if term.form == "budget":
                self.duals[index] = max(0.0, self.duals[index] + term.weight * (cost / reference - 1.0))
