"""Which tensors the compiled loops of :mod:`fxopt.graph._kernels` take, and how they see them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from fxopt.graph import _kernels

__all__ = ["Grids", "follow"]

_PLAIN = (torch.Tensor, nn.Parameter)
_ALONE = 2
"""Threads that take as long for torch's four passes over memory as one takes for one."""

_GRAIN = 32_768
"""Values below which torch's operators take one thread, whatever there are."""


@dataclass(frozen=True)
class Grids:
    """The grids of a tensor whose memory is rows of values, each row with one scale.

    Attributes:
        like: The tensor's sizes and strides.
        rows: How often the channels repeat, channels, values of a row.
        scale: The scales.
        zero: The zero points, or None for none.
        bounds: The least and the largest integer.
    """

    like: tuple[torch.Size, tuple[int, ...]]
    rows: tuple[int, int, int]
    scale: torch.Tensor
    zero: torch.Tensor | None
    bounds: tuple[int, int]

    @classmethod
    def of(
        cls,
        x: torch.Tensor,
        scale: torch.Tensor,
        zero: torch.Tensor | None,
        bounds: tuple[int, int],
        axis: int | None = None,
    ) -> Grids | None:
        """The grids of ``x``, or None if it has to go through torch's operators.

        Args:
            x: The values.
            scale: One scale without dimensions, or one for each index of ``axis``.
            zero: Zero points of the same shape, or None for none.
            bounds: The least and the largest integer.
            axis: The axis of ``x`` that scales belong to, or None for one scale.
        """
        if not (_is_plain(x) and _is_plain(scale) and (zero is None or _is_plain(zero, torch.int32))):
            return None
        if x.numel() > _GRAIN and torch.get_num_threads() > _ALONE:
            return None
        if _is_traced():
            return None
        rows = _rows(x, axis)
        if rows is None or not _is_one_each(scale, rows[1]) or (zero is not None and not _is_one_each(zero, rows[1])):
            return None
        return cls((x.shape, x.stride()), rows, scale.detach(), zero, bounds)

    def takes(self, gradient: torch.Tensor) -> bool:
        """Whether a gradient can go through as well: it is plain, and nobody asks for its own gradient."""
        return _is_plain(gradient) and not torch.is_grad_enabled() and not _is_traced()

    def hold(self, x: torch.Tensor) -> torch.Tensor:
        """The tensor held to its grids."""
        y = torch.empty_like(x)
        _kernels.hold(x.data_ptr(), y.data_ptr(), *self._place())
        return y

    def pass_gradient(self, gradient: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """The gradient where nothing is clipped, and zero elsewhere."""
        gradient, passed = self._laid_out(gradient, x), torch.empty_like(x)
        _kernels.pass_gradient(x.data_ptr(), gradient.data_ptr(), passed.data_ptr(), *self._place())
        return passed

    def pass_and_learn(
        self, gradient: torch.Tensor, x: torch.Tensor, factor: float, *, rounding: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """:meth:`pass_gradient`, and the gradient of the scales times ``factor``."""
        gradient, passed, sums = self._laid_out(gradient, x), torch.empty_like(x), torch.empty_like(self.scale)
        places = (x.data_ptr(), gradient.data_ptr(), passed.data_ptr(), sums.data_ptr())
        _kernels.pass_and_learn(*places, *self._place(), factor, rounding)
        return passed, sums

    def _place(self) -> tuple[int, int, int, int, int, int, int]:
        zero = 0 if self.zero is None else self.zero.data_ptr()
        return (*self.rows, self.scale.data_ptr(), zero, *self.bounds)

    def _laid_out(self, gradient: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """The gradient in memory as the values are."""
        return gradient if (gradient.shape, gradient.stride()) == self.like else torch.empty_like(x).copy_(gradient)


def follow(weight: torch.Tensor, axis: int, scale: torch.Tensor, steps: float, least: float) -> bool:
    """Take scales from the largest magnitude of each channel: that over ``steps``, and 1 where it is zero.

    Args:
        weight: The weight.
        axis: Its axis of channels.
        scale: Is filled with the scales, shape (channels,).
        steps: Steps from zero to the largest magnitude.
        least: The smallest scale.

    Returns:
        Whether it was done; if not, the tensors have to go through torch's operators.
    """
    if axis != 0 or not (_is_plain(weight) and _is_plain(scale)) or _is_traced():
        return False
    if not (scale.is_contiguous() and _is_dense(weight)):
        return False
    _kernels.follow(weight.data_ptr(), len(weight), weight[0].numel(), scale.data_ptr(), steps, least)
    return True


def _is_traced() -> bool:
    """Whether somebody records operators, who would not see a compiled loop."""
    jit = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    return bool(jit or torch.compiler.is_compiling() or is_in_torch_dispatch_mode())


def _is_plain(tensor: torch.Tensor, dtype: torch.dtype = torch.float32) -> bool:
    return type(tensor) in _PLAIN and tensor.dtype is dtype and tensor.device.type == "cpu"


def _is_dense(x: torch.Tensor) -> bool:
    return x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))


def _is_one_each(values: torch.Tensor, channels: int) -> bool:
    return values.numel() == channels and values.is_contiguous()


def _rows(x: torch.Tensor, axis: int | None) -> tuple[int, int, int] | None:
    """How the memory of ``x`` falls into rows of one scale, or None if it does not."""
    count = x.numel()
    if count == 0 or not _is_dense(x):
        return None
    if axis is None:
        return (1, 1, count)
    channels = x.shape[axis]
    if axis == 0:
        return (1, channels, count // channels)
    if not x.is_contiguous():
        return None
    outer = math.prod(x.shape[:axis])
    return (outer, channels, count // (outer * channels))
