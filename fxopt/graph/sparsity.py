"""Patterns of zeros in a weight: which stay for a choice, and how many.

A choice is a fraction of zeros (``0.8``: the four fifths of least magnitude); ``"2:4"``: of every four weights in a
row, in the order of the flattened weight of one output, the two of largest magnitude stay, and those behind the last
four; or ``"kernel:4"``: of every kernel the four largest stay.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import fx

from fxopt.errors import PolicyError

__all__ = ["SPARSITY_META", "Counts", "Pattern", "pattern_of", "sparse_sites"]

SPARSITY_META = "fxopt_sparsity"
"""Key of ``gm.meta`` under which a graph says which layers are sparse: the choice by module path."""

_TEXT = re.compile(r"(kernel|[1-9][0-9]*):([1-9][0-9]*)")
_FEW = 16
"""Values of a row that are few enough to compare each with each, which runs over all rows at once."""

Counts: TypeAlias = npt.NDArray[np.int64]
Magnitudes: TypeAlias = npt.NDArray[np.floating[Any]]
Mask: TypeAlias = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Pattern:
    """What stays of a weight.

    Attributes:
        fraction: Fraction of zeros in the whole weight.
        kept: How many stay of each ``block``, or 0 where the fraction decides.
        block: Consecutive weights that are counted together; 0 for a kernel.
    """

    fraction: float = 0.0
    kept: int = 0
    block: int = 0

    def count(self, outputs: Counts, unknowns: Counts, taps: Counts) -> Counts:
        """How many weights stay.

        Args:
            outputs: Outputs of the layer.
            unknowns: Weights of one output.
            taps: Weights of one kernel.
        """
        if not self.kept:
            whole = outputs * unknowns
            left: Counts = whole - np.floor(self.fraction * whole).astype(np.int64)
            return left
        block = self.block_size(taps)
        found: Counts = outputs * (unknowns // block * np.minimum(self.kept, block) + unknowns % block)
        return found

    def block_size(self, taps: Counts) -> Counts:
        """Weights that are counted together where no fraction decides: a block, or a kernel of ``taps``."""
        return np.full_like(taps, self.block) if self.block else taps

    def mask(self, weight: torch.Tensor) -> torch.Tensor:
        """Which weights stay, those of largest magnitude; of equal ones the first. Same shape, bool.

        Args:
            weight: Shape (outputs, channels, ...).
        """
        held = weight.detach().abs().cpu()
        # NumPy has no bfloat16; widening changes no order.
        magnitude: Magnitudes = (held.float() if held.dtype == torch.bfloat16 else held).flatten(1).numpy()
        if not self.kept:
            zeros = int(np.floor(self.fraction * magnitude.size))
            stay = _largest(magnitude.reshape(1, -1), magnitude.size - zeros)
        else:
            block = self.block or max(1, weight[0, 0].numel())
            whole = magnitude.shape[1] // block * block
            stay = np.ones(magnitude.shape, np.bool_)
            blocks = magnitude[:, :whole].reshape(-1, block)
            stay[:, :whole] = _largest(blocks, min(self.kept, block)).reshape(len(stay), whole)
        return torch.from_numpy(stay).reshape(weight.shape).to(weight.device)


def pattern_of(choice: Any) -> Pattern:
    """The pattern that a choice names.

    Raises:
        PolicyError: If it names none.
    """
    if isinstance(choice, (int, float)) and not isinstance(choice, bool) and 0.0 <= choice < 1.0:
        return Pattern(float(choice))
    found = _TEXT.fullmatch(choice) if isinstance(choice, str) else None
    if found is None:
        raise PolicyError(
            f"{choice!r} is no sparsity; give a fraction of zeros from 0 to below 1, '2:4' or the like, or 'kernel:4'."
        )
    if found[1] == "kernel":
        return Pattern(kept=int(found[2]))
    kept, block = int(found[1]), int(found[2])
    if kept > block:
        raise PolicyError(
            f"{choice!r} keeps more weights than a block has; write the smaller number first, as in '2:4'."
        )
    return Pattern(kept=kept, block=block)


def sparse_sites(module: torch.nn.Module) -> dict[str, Any]:
    """The choice of every sparse layer of a graph, by module path; empty for what is no graph."""
    return dict(module.meta.get(SPARSITY_META, {})) if isinstance(module, fx.GraphModule) else {}


def _largest(rows: Magnitudes, count: int) -> Mask:
    """Whether each value is among the ``count`` largest of its row, of equal ones the first; no row is sorted."""
    if rows.shape[1] <= _FEW:
        return _by_rank(rows, count)
    least = np.partition(rows, rows.shape[1] - count, axis=1)[:, rows.shape[1] - count, None]
    stay: Mask = rows >= least
    crowded = np.flatnonzero(stay.sum(axis=1) > count)
    if len(crowded):
        equal = rows[crowded] == least[crowded]
        left = count - (rows[crowded] > least[crowded]).sum(axis=1, keepdims=True)
        stay[crowded] &= ~equal | (equal.cumsum(axis=1) <= left)
    return stay


def _by_rank(rows: Magnitudes, count: int) -> Mask:
    columns = np.ascontiguousarray(rows.T)
    rank = np.zeros(columns.shape, np.int8)
    for later in range(1, len(columns)):
        for first in range(later):
            behind = columns[first] >= columns[later]
            rank[later] += behind
            rank[first] += ~behind
    stay: Mask = np.ascontiguousarray((rank < count).T)
    return stay
