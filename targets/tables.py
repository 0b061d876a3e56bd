"""Tables of costs: where every operator has a few forms, a policy costs one look-up for each operator.

A model is asked once for each form of each operator, in whatever time its search for tiles takes; after that a score is
a sum of look-ups. The sum is that of :meth:`fxopt.targets.Target.estimate` but for the order of addition.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fxopt.errors import TargetError, UnknownNameError, UnsupportedError
from fxopt.targets._gather import gather
from fxopt.targets.base import Target
from fxopt.targets.rows import Floats, Rows, Workload

__all__ = ["SUMS", "Codes", "CostTable"]

SUMS = ("latency", "energy", "size", "macs")
"""The metrics that are sums over operators; the peak of memory is none."""

Codes: TypeAlias = NDArray[np.unsignedinteger[Any]]
"""uint8, or uint16 where an operator has more than 256 forms."""


class CostTable:
    """Costs of operators in each of their forms.

    Args:
        target: The target.
        forms: For each operator its forms, rows of shape (forms,).
        names: A name for each operator.

    Attributes:
        names: One name for each operator.
        uncosted: Names of the operators that the target has no model for in some form; they cost nothing here.

    Raises:
        TargetError: If an operator has no form or more than 65536.
    """

    def __init__(self, target: Target, forms: Sequence[Rows], names: Sequence[str]) -> None:
        self.names = tuple(names)
        counts = [len(rows) for rows in forms]
        if len(counts) != len(self.names) or not counts or not all(1 <= count <= 2**16 for count in counts):
            raise TargetError(f"Each of {len(self.names)} operators needs 1 to 65536 forms, got {counts}.")
        owners = np.repeat(np.arange(len(counts)), counts)
        # Forms are costed as if they were the operators of one network, so that each without a model is named.
        rows = np.concatenate(list(forms))
        estimate = target.estimate(Workload(rows.reshape(1, -1), [str(index) for index in range(len(rows))]))
        costs = estimate.rows
        found: Mapping[str, Floats | None] = {
            "latency": costs.latency_s,
            "energy": costs.energy_j,
            "size": costs.weight_bytes,
            "macs": costs.macs,
        }
        self._energy_reason = estimate.energy_reason
        self._target = target.name
        self._counts = np.array(counts)
        places = np.concatenate([np.arange(count) for count in counts])
        self._tables: dict[str, Floats] = {}
        for metric, values in found.items():
            if values is not None:
                self._tables[metric] = np.zeros((len(counts), max(counts)))
                self._tables[metric][owners, places] = values[0]
        # What a network costs besides its operators.
        self._fixed = {"latency": target.model.fixed_s}
        without = np.array([int(index) for index in estimate.uncosted], np.int64)
        self.uncosted = tuple(self.names[i] for i in np.unique(owners[without]))

    def __len__(self) -> int:
        """Number of operators."""
        return len(self.names)

    @property
    def depends(self) -> NDArray[np.bool_]:
        """Whether any cost of each operator depends on its form."""
        found = np.zeros(len(self), np.bool_)
        for table in self._tables.values():
            # Places behind an operator's last form hold zeros, which no code reaches.
            used = np.arange(table.shape[1]) < self._counts[:, None]
            found |= (used & (table != table[:, :1])).any(axis=1)
        return found

    def without(self, operators: NDArray[np.bool_]) -> CostTable:
        """The table with some operators, whose cost does not depend on their form, in no need of codes."""
        rest = object.__new__(CostTable)
        rest.__dict__ = dict(self.__dict__)
        rest.names = tuple(itertools.compress(self.names, ~operators))
        rest._counts = self._counts[~operators]
        width = max(rest._counts, default=1)
        rest._tables = {metric: table[~operators, :width].copy() for metric, table in self._tables.items()}
        rest._fixed = {
            metric: self._fixed.get(metric, 0.0) + float(table[operators, 0].sum())
            for metric, table in self._tables.items()
        }
        return rest

    @property
    def dtype(self) -> type[np.uint8] | type[np.uint16]:
        """The type of codes: the smallest that holds them."""
        return np.uint8 if self._counts.max(initial=0) <= 2**8 else np.uint16

    def score(self, codes: Codes, metric: str = "latency", *, threads: int = 1) -> Floats:
        """Cost of every policy.

        Args:
            codes: For each policy and operator the index of its form, shape (policies, operators).
            metric: latency (s), energy (J), size (bytes) or macs.
            threads: Threads that share the policies; the result does not depend on it.

        Returns:
            Costs of shape (policies,).

        Raises:
            UnknownNameError: If there is no such metric.
            UnsupportedError: If the target has no energy figures, or the metric is memory, which is no sum.
            TargetError: If codes have another shape or type or are out of range.
        """
        table = self._table(metric)
        codes = np.ascontiguousarray(codes)
        if codes.ndim != 2 or codes.shape[1] != len(self) or codes.dtype != self.dtype:
            raise TargetError(
                f"Codes need the shape (policies, {len(self)}) and the type {np.dtype(self.dtype)}, got {codes.shape} "
                f"of {codes.dtype}."
            )
        if len(codes) and (codes.max(axis=0) >= self._counts).any():
            worst = int(np.argmax(codes.max(axis=0) - self._counts.astype(np.int64)))
            raise TargetError(f"A code of {self.names[worst]!r} is not below its {self._counts[worst]} forms.")
        if threads < 1:
            raise TargetError(f"threads has to be at least 1, got {threads}.")
        totals = np.empty(len(codes))
        edges = np.linspace(0, len(codes), threads + 1).astype(int).tolist()
        blocks = [slice(start, stop) for start, stop in itertools.pairwise(edges)]
        if not len(self):
            totals[:] = 0.0
        elif threads == 1:
            gather(table, codes, totals)
        else:
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(lambda block: gather(table, codes[block], totals[block]), blocks))
        return totals + self._fixed.get(metric, 0.0)

    def _table(self, metric: str) -> Floats:
        if metric == "memory":
            raise UnsupportedError("The peak of memory is no sum over operators; use Target.estimate for it.")
        if metric not in SUMS:
            raise UnknownNameError("metric", metric, SUMS)
        if metric not in self._tables:
            raise UnsupportedError(f"Target {self._target!r} cannot estimate {metric}: {self._energy_reason}")
        return self._tables[metric]
