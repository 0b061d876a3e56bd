"""Least squares for the weights of a layer whose inputs have changed: rows, second moments, solutions.

A layer's output at one position is a linear function of the inputs under its kernel. With rows ``x`` of such inputs and
``y`` of the outputs that are wanted, the weights nearest to the old ones ``W0`` among the good ones minimize

    mean |y - W x - b|^2 + ridge * mean(diag C) * |W - W0|^2,        C = mean (x - mean x)(x - mean x)'

(He, Zhang and Sun, "Channel pruning for accelerating very deep neural networks", ICCV 2017, equation 2, without their
selection; the offset ``b`` and the ridge are added here). As ``W0`` itself has no penalty, the first term is never
larger after than before. All moments are sums of outer products in float64, so the rows are read once.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.nn import functional

from fxopt.errors import DataError

__all__ = ["Layer", "Moments", "groups_of", "input_rows", "is_linear", "output_rows", "positions_of", "solve"]

Layer: TypeAlias = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)

_RAISES = 6
"""How often the ridge is raised a hundredfold where the moments are not positive definite."""


def is_linear(module: nn.Module) -> bool:
    """Whether a module's weights can be found by least squares: a convolution (not transposed) or linear layer."""
    return type(module) in _LAYERS


def groups_of(module: Layer) -> int:
    """Groups of a layer, each a system of equations of its own."""
    return 1 if isinstance(module, nn.Linear) else int(module.groups)


def positions_of(module: Layer, output: torch.Tensor) -> int:
    """Output positions of one sample: pixels of a convolution, tokens of a linear layer."""
    return math.prod(output.shape[1:-1]) if isinstance(module, nn.Linear) else math.prod(output.shape[2:])


def input_rows(module: Layer, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """What the layer's weights are multiplied with at some output positions.

    Args:
        module: The layer.
        x: Its input, shape (samples, channels, ...) of a convolution, (samples, ..., features) of a linear layer.
        positions: Flat indices into the output's positions, shape (p,).

    Returns:
        Float64, shape (groups, samples * p, unknowns); unknowns are in the order of the flattened weight.
    """
    if isinstance(module, nn.Linear):
        return x.reshape(x.shape[0], -1, x.shape[-1])[:, positions].flatten(0, 1)[None].double()
    padded = _padded(module, x)
    index = _taps(module, padded.shape[2:], positions)
    taken = padded.flatten(2)[:, :, index.flatten()]
    rows = taken.reshape(len(x), module.groups, -1, *index.shape).permute(1, 0, 3, 2, 4)
    # (groups, samples, positions, channels, taps)
    return rows.flatten(3).flatten(1, 2).double()


def output_rows(module: Layer, y: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """The layer's output at some positions, shape (samples * p, outputs)."""
    if isinstance(module, nn.Linear):
        return y.reshape(y.shape[0], -1, y.shape[-1])[:, positions].flatten(0, 1)
    return y.flatten(2)[:, :, positions].movedim(1, 2).flatten(0, 1)


def _padded(module: Any, x: torch.Tensor) -> torch.Tensor:
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    amounts = module._reversed_padding_repeated_twice
    return functional.pad(x, amounts, mode=mode) if any(amounts) else x


def _taps(module: Any, padded: torch.Size, positions: torch.Tensor) -> torch.Tensor:
    """Flat indices into the padded input under the kernel at each position, shape (positions, taps)."""
    spans = [dilation * (size - 1) for size, dilation in zip(module.kernel_size, module.dilation, strict=True)]
    outputs = [(size - span - 1) // stride + 1 for size, span, stride in zip(padded, spans, module.stride, strict=True)]
    rest, starts = positions, []
    for size, stride in zip(reversed(outputs), reversed(module.stride), strict=True):
        starts.append(rest % size * stride)
        rest = rest // size
    starts.reverse()
    taps = torch.tensor(list(itertools.product(*(range(size) for size in module.kernel_size))))
    flat = torch.zeros(len(positions), len(taps), dtype=torch.long)
    for dim, (start, size) in enumerate(zip(starts, padded, strict=True)):
        flat = flat * size + start[:, None] + taps[None, :, dim] * module.dilation[dim]
    return flat


@dataclass
class Moments:
    """Sums over rows, by group; float64.

    Attributes:
        count: Number of rows.
        x: Sum of inputs, shape (groups, unknowns).
        xx: Sum of outer products of inputs, shape (groups, unknowns, unknowns).
        y: Sum of outputs, shape (groups, outputs of a group), or None where the outputs are not needed.
        xy: Sum of outer products of inputs and outputs, shape (groups, unknowns, outputs of a group), or None.
        weight: What makes the outputs of the inputs, shape (groups, outputs of a group, unknowns), if they are so made.
        shifted: Whether a constant was added to outputs that are so made.
    """

    count: int
    x: torch.Tensor
    xx: torch.Tensor
    y: torch.Tensor | None = None
    xy: torch.Tensor | None = None
    weight: torch.Tensor | None = None
    shifted: bool = False

    @classmethod
    def of(cls, x: torch.Tensor, y: torch.Tensor | None = None) -> Moments:
        """Moments of rows.

        Args:
            x: Inputs, shape (groups, rows, unknowns).
            y: Outputs, shape (rows, groups * outputs of a group), or None.
        """
        turned = x.transpose(1, 2)
        found = cls(x.shape[1], x.sum(1), turned @ x)
        if y is not None:
            wanted = y.double().reshape(len(y), x.shape[0], -1).transpose(0, 1)
            found.y, found.xy = wanted.sum(1), turned @ wanted
        return found

    @staticmethod
    def total(parts: Iterable[Moments]) -> Moments:
        """The moments of all rows of some parts.

        Raises:
            DataError: If there is no part.
        """
        found: Moments | None = None
        for one in parts:
            found = one if found is None else found + one
        if found is None:
            raise DataError("There is no batch to take moments from.")
        return found

    def __add__(self, other: Moments) -> Moments:
        y = None if self.y is None or other.y is None else self.y + other.y
        xy = None if self.xy is None or other.xy is None else self.xy + other.xy
        return Moments(self.count + other.count, self.x + other.x, self.xx + other.xx, y, xy)

    def with_outputs(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Moments:
        """The same moments with those of the outputs that weights make of the rows.

        Args:
            weight: Shape (groups, outputs of a group, unknowns), float64.
            bias: Shape (groups * outputs of a group), or None.
        """
        y = (weight @ self.x[:, :, None]).squeeze(2)
        xy = self.xx @ weight.transpose(1, 2)
        if bias is not None:
            offset = bias.double().reshape(y.shape)
            y = y + self.count * offset
            xy = xy + self.x[:, :, None] * offset[:, None, :]
        return Moments(self.count, self.x, self.xx, y, xy, weight, bias is not None)

    def part(self, unknowns: torch.Tensor, outputs: torch.Tensor) -> Moments:
        """The moments of some unknowns, the same ones in each group, and of some outputs, numbered over all groups.

        Both are ascending.
        """
        groups = len(self.x)
        y = None if self.y is None else self.y.flatten()[outputs].reshape(groups, -1)
        xy = None
        if self.xy is not None:
            flat = self.xy.index_select(1, unknowns)
            if len(outputs) < groups * flat.shape[2]:
                rows = flat.transpose(1, 2).flatten(0, 1).index_select(0, outputs)
                flat = rows.reshape(groups, -1, len(unknowns)).transpose(1, 2)
            xy = flat
        xx = self.xx.index_select(1, unknowns).index_select(2, unknowns)
        return Moments(self.count, self.x[:, unknowns], xx, y, xy)

    def fit(self, weight: torch.Tensor, ridge: float, offset: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """The weights of the least squares, and the constant to add to their outputs.

        Args:
            weight: The weights to stay near to, shape (groups, outputs of a group, unknowns), float64.
            ridge: Penalty on the distance from them, as a part of the mean of the diagonal.
            offset: Whether outputs may have a constant; the moments are about the means then.

        Returns:
            Weights of the same shape, and constants of shape (groups, outputs of a group).

        Raises:
            ValueError: If the outputs were not summed.
        """
        if self.y is None or self.xy is None:
            raise ValueError("These are moments of inputs alone.")
        second, cross = self.xx / self.count, self.xy / self.count
        mean_x, mean_y = self.x / self.count, self.y / self.count
        if offset:
            second = torch.baddbmm(second, mean_x[:, :, None], mean_x[:, None, :], alpha=-1)
            cross = torch.baddbmm(cross, mean_x[:, :, None], mean_y[:, None, :], alpha=-1)
        found = solve(second, cross, weight, ridge)
        return found, mean_y - (found @ mean_x[:, :, None]).squeeze(2)

    def refit(
        self, unknowns: torch.Tensor, outputs: torch.Tensor, weight: torch.Tensor, ridge: float, offset: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The least squares of a part: ``part(unknowns, outputs).fit(weight, ridge, offset)``, by the least work.

        Where the outputs are linear in all unknowns and ``weight`` holds the weights that made them, ``K`` being the
        unknowns that stay and ``R`` the others, the solution is ``W_K + W_R C_RK (C_KK + ridge)^-1``: one system for
        each unknown that goes instead of one for each output.

        Args:
            unknowns: Those that stay, ascending, the same ones in each group.
            outputs: Those that stay, ascending, numbered over all groups.
            weight: As of :meth:`fit`.
            ridge: As of :meth:`fit`.
            offset: As of :meth:`fit`.

        Returns:
            As :meth:`fit`.
        """
        gone = torch.ones(self.x.shape[1], dtype=torch.bool).index_fill_(0, unknowns, False).nonzero().flatten()
        kept, made = len(unknowns), weight.shape[1]
        makers = self._makers(outputs) if len(gone) * (kept + made) < kept * made else None
        known = makers is not None and (offset or not self.shifted) and _is_same(makers, unknowns, weight)
        if makers is None or self.y is None or not known:
            return self.part(unknowns, outputs).fit(weight, ridge, offset)
        rows = self.xx.index_select(1, unknowns)
        second, cross = rows.index_select(2, unknowns).div_(self.count), rows.index_select(2, gone).div_(self.count)
        mean_x, mean_gone = self.x[:, unknowns] / self.count, self.x[:, gone] / self.count
        if offset:
            second.baddbmm_(mean_x[:, :, None], mean_x[:, None, :], alpha=-1)
            cross.baddbmm_(mean_x[:, :, None], mean_gone[:, None, :], alpha=-1)
        nothing = torch.zeros_like(cross).transpose(1, 2)
        lost = makers.index_select(1, gone).reshape(len(self.x), made, -1)
        found = torch.baddbmm(weight, lost, solve(second, cross, nothing, ridge))
        mean_y = self.y.flatten()[outputs].reshape(len(self.x), -1) / self.count
        return found, mean_y - (found @ mean_x[:, :, None]).squeeze(2)

    def _makers(self, outputs: torch.Tensor) -> torch.Tensor | None:
        """The weights that made some outputs of the inputs, shape (outputs, unknowns); None if they are not so made."""
        if self.weight is None:
            return None
        rows = self.weight.flatten(0, 1)
        return rows if len(outputs) == len(rows) else rows.index_select(0, outputs)


def _is_same(makers: torch.Tensor, unknowns: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether weights are those that made the outputs, so that nothing is wrong with them but what they miss."""
    return torch.equal(makers.index_select(1, unknowns).reshape(weight.shape), weight)


def solve(covariance: torch.Tensor, cross: torch.Tensor, weight: torch.Tensor, ridge: float) -> torch.Tensor:
    """The weights that minimize the error and, by the ridge, the distance from weights that are given.

    Args:
        covariance: Second moments of the inputs, shape (groups, unknowns, unknowns).
        cross: Second moments of inputs and wanted outputs, shape (groups, unknowns, outputs of a group).
        weight: The weights to stay near to, shape (groups, outputs of a group, unknowns).
        ridge: Penalty, as a part of the mean of the diagonal.

    Returns:
        Shape of ``weight``: the given ones for a group whose inputs are all zero, or whose moments are beyond repair.
    """
    scale = covariance.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    unit = torch.where(scale > 0, scale, torch.ones_like(scale))
    start = weight.transpose(1, 2)
    strength = ridge
    for _ in range(_RAISES):
        matrix = covariance.clone()
        matrix.diagonal(dim1=1, dim2=2).add_((strength * unit).squeeze(2))
        factor, info = torch.linalg.cholesky_ex(matrix)
        if not bool(info.any()):
            wanted = torch.add(cross, unit * start, alpha=strength) if strength else cross
            found = torch.cholesky_solve(wanted, factor)
            return torch.where(scale > 0, found, start).transpose(1, 2)
        strength = max(strength, 1e-12) * 100.0
    return weight
