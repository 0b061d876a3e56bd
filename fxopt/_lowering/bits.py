"""Scores of policies that decide bits alone, as sums of looked-up costs."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from fxopt.decisions import SearchSpace
from fxopt.errors import PolicyError
from fxopt.targets import Target
from fxopt.targets.rows import FLOAT_BITS, Floats, Rows
from fxopt.targets.tables import Codes, CostTable

if TYPE_CHECKING:
    from fxopt.lowering import ParametricWorkload

__all__ = ["BitTable"]

Ints = npt.NDArray[np.int64]


class _Coded:
    """Widths that a value may be asked for, and the code of each."""

    def __init__(self, widths: Iterable[int]) -> None:
        self.widths = np.array(sorted(set(widths)), dtype=np.int64)
        self._code = np.zeros(FLOAT_BITS + 1, np.int64)
        self._code[self.widths] = np.arange(len(self.widths))

    def __len__(self) -> int:
        return len(self.widths)

    def codes(self, demand: Ints) -> Ints:
        """The code of every width."""
        found: Ints = self._code[demand]
        return found


def _largest(parts: Sequence[_Coded]) -> _Coded:
    """The widths that the largest of some may have."""
    least = max(int(part.widths[0]) for part in parts)
    return _Coded(width for part in parts for width in part.widths.tolist() if width >= least)


class BitTable:
    """Costs of a graph whose channels are settled, for every choice of bits.

    Args:
        workload: The lowered graph.
        target: The target.
        space: Decisions of bits; what it does not decide stays as the graph has it.

    Raises:
        PolicyError: If the space decides something else, or layers that the graph does not have.
    """

    def __init__(self, workload: ParametricWorkload, target: Target, space: SearchSpace) -> None:
        if any(decision.kind != "bits" for decision in space):
            raise PolicyError("A table of bits takes decisions of bits alone; bind the channels of a policy first.")
        self.space = space
        self._workload = workload
        site_of = {decision.site: decision for decision in space}
        self._pairs = [
            np.array(site_of[site].choices if site in site_of else [current], dtype=np.int64)
            for site, current in workload.bit_sites.items()
        ]
        self._decision_of = {site: index for index, site in enumerate(decision.site for decision in space)}
        self._demands = self._possible_demands()
        template = workload.bind().rows[0]
        forms = [self._forms(index, template) for index in range(len(template))]
        whole = CostTable(target, forms, workload.names)
        self._rows = np.flatnonzero(whole.depends)
        self.table = whole.without(~whole.depends)

    def codes(self, indices: npt.NDArray[np.integer]) -> Codes:
        """The code of every operator that bits matter to.

        Args:
            indices: Index of the choice of every decision, shape (policies, decisions).

        Returns:
            Codes for :meth:`fxopt.targets.tables.CostTable.score` of ``table``.
        """
        choices = self._workload.choices(self.space, indices)
        demands = self._workload.demands(choices.bits.astype(np.int64))
        sites = list(self._workload.bit_sites)
        columns = []
        for row in self._rows.tolist():
            draft = self._workload.drafts[row]
            code = np.zeros(len(indices), np.int64)
            if draft.layer is not None:
                decision = self._decision_of.get(sites[draft.layer])
                code += 0 if decision is None else indices[:, decision]
            elif draft.inputs:
                code += self._read(row).codes(functools.reduce(np.maximum, (demands[each] for each in draft.inputs)))
            written = self._demands[draft.output]
            columns.append(code * len(written) + written.codes(demands[draft.output]))
        stacked = np.stack(columns, axis=1) if columns else np.zeros((len(indices), 0), np.int64)
        return stacked.astype(self.table.dtype)

    def score(self, indices: npt.NDArray[np.integer], metric: str = "latency", *, threads: int = 1) -> Floats:
        """Cost of every policy, shape (policies,); see :meth:`fxopt.targets.tables.CostTable.score`."""
        return self.table.score(self.codes(indices), metric, threads=threads)

    def _possible_demands(self) -> list[_Coded]:
        values = self._workload.values
        found: list[_Coded] = [_Coded([FLOAT_BITS])] * len(values)
        for index in range(len(values) - 1, -1, -1):
            value = values[index]
            parts = [_Coded(self._pairs[layer][:, 1].tolist()) for layer in value.read_by_layers]
            parts += [found[each] for each in value.read_by_values]
            if value.needs_float or not parts:
                parts = [_Coded([FLOAT_BITS])]
            found[index] = _largest(parts)
        return found

    def _read(self, row: int) -> _Coded:
        return _largest([self._demands[each] for each in self._workload.drafts[row].inputs])

    def _forms(self, row: int, template: Rows) -> Rows:
        """The row in every width that it may have, in the order of its codes."""
        draft = self._workload.drafts[row]
        written = self._demands[draft.output].widths
        if draft.layer is not None:
            first = self._pairs[draft.layer]
        else:
            read = self._read(row).widths if draft.inputs else template["activation_bits"][row : row + 1]
            first = np.stack([np.full(len(read), template["weight_bits"][row]), read], axis=1)
        forms = np.repeat(template[row : row + 1], len(first) * len(written))
        forms["weight_bits"] = np.repeat(first[:, 0], len(written))
        forms["activation_bits"] = np.repeat(first[:, 1], len(written))
        forms["output_bits"] = np.tile(written, len(first))
        return forms
