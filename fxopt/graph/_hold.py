"""Holding tensors to grids, with gradients that pass straight through: hand-written, as torch's own take twice as long.

The quotient is a true division and rounding is half to even, as in ONNX's QuantizeLinear.
"""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["hold", "hold_learned", "hold_signs"]


def hold(x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, bounds: tuple[int, int]) -> torch.Tensor:
    """``x`` on the grid ``scale * (q - zero)``, ``q`` within ``bounds``; gradients pass where nothing is clipped."""
    found: torch.Tensor = _Hold.apply(x, scale, zero, bounds)  # type: ignore[no-untyped-call]
    return found


def hold_learned(
    x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, bounds: tuple[int, int], *, rounding: bool
) -> torch.Tensor:
    """:func:`hold`, with a gradient for the scale as well.

    Args:
        x: The values.
        scale: Scales, broadcasting against ``x``.
        zero: Zero points, or None for none.
        bounds: The least and the largest integer.
        rounding: Whether the scale hears of rounding errors too, as for learned step sizes (Esser et al. 2020, equation
            3), or only of values that are clipped, as for learned clipping (Choi et al. 2018, PACT, equation 3; the
            bound that it learns is the scale times the largest integer). Learned step sizes have their gradient scaled
            by ``1 / sqrt(values * largest integer)``.
    """
    found: torch.Tensor = _HoldLearned.apply(x, scale, zero, bounds, rounding)  # type: ignore[no-untyped-call]
    return found


def hold_signs(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """``scale`` with the sign of each value, zero counting as positive; gradients pass everywhere."""
    found: torch.Tensor = _HoldSigns.apply(x, scale)  # type: ignore[no-untyped-call]
    return found


def _steps(x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, bounds: tuple[int, int]) -> torch.Tensor:
    """``q - zero``, as floats."""
    steps = torch.div(x, scale).round_()
    if zero is None:
        return steps.clamp_(*bounds)
    if type(zero) is torch.Tensor and zero.dim() == 0 and zero.device.type == "cpu":
        # The bounds move instead of the values: two passes less over the tensor. As numbers, that is: bounds that are
        # tensors take ten times as long. Not while the graph is traced, and not where it would wait for a GPU.
        shift = int(zero)
        return steps.clamp_(bounds[0] - shift, bounds[1] - shift)
    offset = zero.to(steps.dtype)
    return steps.add_(offset).clamp_(*bounds).sub_(offset)


def _passed(
    gradient: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, bounds: tuple[int, int]
) -> torch.Tensor:
    """The gradient where nothing is clipped, and zero elsewhere."""
    low, high = bounds[0] - 0.5, bounds[1] + 0.5
    within = torch.ops.aten.hardtanh_backward.default
    if scale.dim() == 0:
        size, shift = float(scale.detach()), 0.0 if zero is None else float(zero)
        return within(gradient, x, (low - shift) * size, (high - shift) * size)  # type: ignore[no-any-return]
    steps = torch.div(x, scale)
    if zero is not None:
        steps.add_(zero)
    return within(gradient, steps, low, high)  # type: ignore[no-any-return]


class _Hold(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, bounds: tuple[int, int]
    ) -> torch.Tensor:
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(x, scale, zero)
            ctx.bounds = bounds
        return _steps(x, scale, zero, bounds).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        x, scale, zero = ctx.saved_tensors
        return _passed(gradients[0], x, scale, zero, ctx.bounds), None, None, None


class _HoldLearned(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        scale: torch.Tensor,
        zero: torch.Tensor | None,
        bounds: tuple[int, int],
        rounding: bool,
    ) -> torch.Tensor:
        y = _steps(x, scale, zero, bounds).mul_(scale)
        ctx.save_for_backward(x, y, scale, zero)
        ctx.bounds, ctx.rounding = bounds, rounding
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        """With ``y = scale * steps``: the scale's gradient is that of ``y / scale``, less ``x / scale`` inside."""
        x, y, scale, zero = ctx.saved_tensors
        gradient, bounds = gradients[0], ctx.bounds
        passed = _passed(gradient, x, scale, zero, bounds)
        if not ctx.rounding:
            # Nothing but what is clipped; there y / scale is a bound.
            total = _summed(gradient - passed, y, scale) / scale
            return passed, total, None, None, None
        total = (_summed(gradient, y, scale) - _summed(passed, x, scale)) / scale
        largest = max(abs(bounds[0]), bounds[1])
        total.mul_((x.numel() / scale.numel() * largest) ** -0.5)
        return passed, total, None, None, None


def _summed(one: torch.Tensor, other: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The sum of products over the dimensions that ``like`` broadcasts along, in its shape."""
    if like.dim() == 0:
        return torch.dot(one.reshape(-1), other.reshape(-1))
    return (one * other).sum_to_size(like.shape)


class _HoldSigns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return torch.where(x >= 0, scale, -scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return gradients[0], None
