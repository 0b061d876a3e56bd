"""Costs of policies that are given by choice indices, in the cheapest exact way there is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from fxopt._lowering.bits import BitTable
from fxopt.decisions import AdditiveCosts, Choice, Decision, Key, SearchSpace
from fxopt.targets import Target
from fxopt.targets.tables import SUMS

if TYPE_CHECKING:
    from fxopt.lowering import ParametricWorkload

__all__ = ["IndexCosts", "is_additive"]

Floats = npt.NDArray[np.float64]
_ByIndex = Callable[[npt.NDArray[np.intp]], Floats]


class IndexCosts:
    """Costs of policies on a target, by choice indices or by policies; the same in both ways.

    Where every operator depends on one decision at most, a policy costs the sum of what its choices cost. Where bits
    alone are decided, an operator's cost is looked up by its own bits and those of its readers. Channels couple the
    layers that make and read them: there all rows are filled in and estimated.

    Args:
        workload: The lowered graph.
        target: The target.
        space: What policies decide.
        metrics: What is costed.

    Attributes:
        way: ``"sum"``, ``"table"`` or ``"estimate"``.
    """

    def __init__(
        self, workload: ParametricWorkload, target: Target, space: SearchSpace, metrics: Sequence[str]
    ) -> None:
        self._workload, self._target, self._space, self._metrics = workload, target, space, tuple(metrics)
        self.way = "estimate"
        self._costs: _ByIndex = self._estimated
        if set(metrics) <= set(SUMS) and is_additive(workload, space):
            row = space.encode(space.default())
            self.way, self._costs = "sum", AdditiveCosts.around(space, self._estimated, row).at
        elif set(metrics) <= set(SUMS) and all(decision.kind == "bits" for decision in space):
            self._table: BitTable = workload.bit_table(target, space)
            self.way, self._costs = "table", self._looked_up

    def __call__(self, policies: Sequence[Mapping[Key, Choice]]) -> Floats:
        """Costs of policies, shape ``(n, metrics)``."""
        rows = [self._space.encode(policy) for policy in policies]
        return self.at(np.array(rows, dtype=np.intp).reshape(len(policies), len(self._space)))

    def at(self, indices: npt.NDArray[np.intp]) -> Floats:
        """Costs by choice indices of shape ``(n, decisions)``, shape ``(n, metrics)``.

        Raises:
            PolicyError: If an index is out of range.
        """
        return self._costs(indices)

    def _estimated(self, indices: npt.NDArray[np.intp]) -> Floats:
        estimate = self._workload.estimate(self._target, self._workload.choices(self._space, indices))
        return np.stack([estimate.metric(metric) for metric in self._metrics], axis=1)

    def _looked_up(self, indices: npt.NDArray[np.intp]) -> Floats:
        codes = self._table.codes(indices)
        return np.stack([self._table.table.score(codes, metric) for metric in self._metrics], axis=1)


def is_additive(workload: ParametricWorkload, space: SearchSpace) -> bool:
    """Whether no operator depends on more than one decision, so that what sums over operators sums over decisions."""
    decisions = {decision.key: decision for decision in space if len(decision.choices) > 1}
    readers = _readers(workload, decisions)
    layers = list(workload.bit_sites)
    for draft in workload.drafts:
        sizes = (*draft.fields.values(), *draft.held)
        sites = {site for size in sizes for site in workload.sites_of(size)}
        found: set[Key] = {("channels", site) for site in sites} & set(decisions)
        if draft.layer is not None:
            found |= {(kind, layers[draft.layer]) for kind in ("bits", "sparsity")} & set(decisions)
        for value in (draft.output, *(draft.inputs if draft.layer is None else ())):
            found |= readers[value]
        if len(found) > 1:
            return False
    return True


def _readers(workload: ParametricWorkload, decisions: Mapping[Key, Decision]) -> list[set[Key]]:
    """For every value the decisions of bits that may change how wide it is stored."""
    layers = list(workload.bit_sites)
    found: list[set[Key]] = [set()] * len(workload.values)
    for index in range(len(workload.values) - 1, -1, -1):
        value = workload.values[index]
        if value.needs_float:
            continue
        mine = {("bits", layers[layer]) for layer in value.read_by_layers}
        own = {key for key in mine & set(decisions) if _decides_activations(decisions[key].choices)}
        found[index] = own.union(*(found[each] for each in value.read_by_values))
    return found


def _decides_activations(choices: Iterable[Choice]) -> bool:
    return len({choice[1] for choice in choices if isinstance(choice, tuple)}) > 1
