"""Holding tensors to grids, with gradients that pass straight through: hand-written, as torch's own take long.

The quotient is a true division and rounding is half to even, as in ONNX's QuantizeLinear. Plain float32 tensors on the
CPU go through compiled loops, once over the memory (:mod:`fxopt.graph._in_memory`); all others, and whatever is traced
or differentiated twice, through torch's operators, which give the same values.
"""

from __future__ import annotations

from typing import Any

import torch

from fxopt.graph._in_memory import Grids
from fxopt.graph.grids import MIN_SCALE

__all__ = ["hold", "hold_learned", "hold_signs", "positive", "spread"]


def hold(
    x: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bounds: tuple[int, int],
    axis: int | None = None,
) -> torch.Tensor:
    """``x`` on the grid ``scale * (q - zero)``, ``q`` within ``bounds``; gradients pass where nothing is clipped.

    Args:
        x: The values.
        scale: One scale without dimensions, or one for each index of ``axis``.
        zero: Zero points of the same shape, or None for none.
        bounds: The least and the largest integer.
        axis: The axis of ``x`` that scales belong to, or None for one scale.
    """
    found: torch.Tensor = _Hold.apply(x, scale, zero, bounds, axis)  # type: ignore[no-untyped-call]
    return found


def hold_learned(
    x: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bounds: tuple[int, int],
    axis: int | None = None,
    *,
    rounding: bool,
) -> torch.Tensor:
    """:func:`hold`, with a gradient for the scale as well.

    Args:
        x: The values.
        scale: As for :func:`hold`; what counts is :func:`positive`.
        zero: As for :func:`hold`.
        bounds: As for :func:`hold`.
        axis: As for :func:`hold`.
        rounding: Whether the scale hears of rounding errors too, as for learned step sizes (Esser et al. 2020, equation
            3), or only of values that are clipped, as for learned clipping (Choi et al. 2018, PACT, equation 3; the
            bound that it learns is the scale times the largest integer). Learned step sizes have their gradient scaled
            by ``1 / sqrt(values * largest integer)``.
    """
    found: torch.Tensor = _HoldLearned.apply(x, scale, zero, bounds, axis, rounding)  # type: ignore[no-untyped-call]
    return found


def hold_signs(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """``scale`` with the sign of each value, zero counting as positive; gradients pass everywhere."""
    found: torch.Tensor = _HoldSigns.apply(x, scale)  # type: ignore[no-untyped-call]
    return found


def positive(scale: torch.Tensor) -> torch.Tensor:
    """The magnitude of a scale that training moved, or the smallest scale there is."""
    return scale.abs().clamp(min=MIN_SCALE)


def spread(values: torch.Tensor, axis: int | None, dims: int) -> torch.Tensor:
    """Values for the indices of an axis, with the dimensions to broadcast against ``dims``."""
    return values if axis is None else values.view([-1 if one == axis else 1 for one in range(dims)])


def _steps(x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, bounds: tuple[int, int]) -> torch.Tensor:
    """``q - zero``, as floats."""
    steps = torch.div(x, scale).round_()
    if zero is None:
        return steps.clamp_(*bounds)
    alone = type(zero) is torch.Tensor and zero.dim() == 0 and zero.device.type == "cpu"
    if alone and not torch.compiler.is_compiling():
        # The bounds move instead of the values: two passes less over the tensor. As numbers, that is: bounds that are
        # tensors take ten times as long. Not while the graph is traced, and not where it would wait for a GPU.
        shift = int(zero)
        return steps.clamp_(bounds[0] - shift, bounds[1] - shift)
    offset = zero.to(steps.dtype)
    return steps.add_(offset).clamp_(*bounds).sub_(offset)


def _held(
    x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, bounds: tuple[int, int], axis: int | None
) -> torch.Tensor:
    """``x`` on its grid, by torch's operators."""
    sizes = spread(scale, axis, x.dim())
    return _steps(x, sizes, None if zero is None else spread(zero, axis, x.dim()), bounds).mul_(sizes)


def _passed(
    gradient: torch.Tensor,
    x: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bounds: tuple[int, int],
    axis: int | None,
) -> torch.Tensor:
    """The gradient where nothing is clipped, and zero elsewhere; by torch's operators."""
    low, high = bounds[0] - 0.5, bounds[1] + 0.5
    if axis is None and not torch.compiler.is_compiling():
        size, shift = float(scale.detach()), 0.0 if zero is None else float(zero)
        within = torch.ops.aten.hardtanh_backward.default
        return within(gradient, x, (low - shift) * size, (high - shift) * size)  # type: ignore[no-any-return]
    sizes, shifts = scale.detach().double(), 0.0 if zero is None else zero.double()
    ends = (spread(((end - shifts) * sizes).to(x.dtype), axis, x.dim()) for end in (low, high))
    return gradient.masked_fill((x <= next(ends)) | (x >= next(ends)), 0.0)


class _Hold(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        scale: torch.Tensor,
        zero: torch.Tensor | None,
        bounds: tuple[int, int],
        axis: int | None,
    ) -> torch.Tensor:
        grids = Grids.of(x, scale, zero, bounds, axis)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(x, scale, zero)
            ctx.grids, ctx.bounds, ctx.axis = grids, bounds, axis
        return _held(x, scale, zero, bounds, axis) if grids is None else grids.hold(x)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        x, scale, zero = ctx.saved_tensors
        if ctx.grids is not None and ctx.grids.takes(gradients[0]):
            passed = ctx.grids.pass_gradient(gradients[0], x)
        else:
            passed = _passed(gradients[0], x, scale, zero, ctx.bounds, ctx.axis)
        return passed, None, None, None, None


class _HoldLearned(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        scale: torch.Tensor,
        zero: torch.Tensor | None,
        bounds: tuple[int, int],
        axis: int | None,
        rounding: bool,
    ) -> torch.Tensor:
        size = positive(scale)
        grids = Grids.of(x, size, zero, bounds, axis)
        y = _held(x, size, zero, bounds, axis) if grids is None else grids.hold(x)
        ctx.save_for_backward(x, y, scale, zero)
        ctx.grids, ctx.bounds, ctx.axis, ctx.rounding = grids, bounds, axis, rounding
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        x, y, scale, zero = ctx.saved_tensors
        bounds, factor = ctx.bounds, 1.0
        if ctx.rounding:
            factor = (x.numel() / scale.numel() * max(abs(bounds[0]), bounds[1])) ** -0.5
        if ctx.grids is not None and ctx.grids.takes(gradients[0]):
            passed, total = ctx.grids.pass_and_learn(gradients[0], x, factor, rounding=ctx.rounding)
        else:
            size = positive(scale)
            passed = _passed(gradients[0], x, size, zero, bounds, ctx.axis)
            total = _learned(gradients[0], passed, (x, y, size), ctx.axis, rounding=ctx.rounding) * factor
        return passed, total * scale.sign(), None, None, None, None


def _learned(
    gradient: torch.Tensor,
    passed: torch.Tensor,
    values: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    axis: int | None,
    *,
    rounding: bool,
) -> torch.Tensor:
    """With ``y = scale * steps``: the scale's gradient is that of ``y / scale``, less ``x / scale`` inside."""
    x, y, scale = values
    if not rounding:
        # Nothing but what is clipped; there y / scale is a bound.
        return _summed(gradient - passed, y, axis) / scale
    return (_summed(gradient, y, axis) - _summed(passed, x, axis)) / scale


def _summed(one: torch.Tensor, other: torch.Tensor, axis: int | None) -> torch.Tensor:
    """The sum of products over all dimensions but ``axis``."""
    if axis is None:
        return torch.dot(one.reshape(-1), other.reshape(-1))
    return (one * other).movedim(axis, 0).flatten(1).sum(1)


class _HoldSigns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return torch.where(x >= 0, scale, -scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return gradients[0], None
