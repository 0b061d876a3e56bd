"""Fake quantization: float tensors held to an integer grid, with straight-through gradients.

Activations lie on an asymmetric unsigned grid, one scale a tensor: ``x = scale * (q - zero_point)`` with ``q`` in
``0 .. 2^bits - 1``. Weights lie on a symmetric signed grid, one scale an output channel: ``w = scale * q`` with ``q``
in ``-(2^(bits-1) - 1) .. 2^(bits-1) - 1`` (-127..127 at 8 bits); at one bit ``q`` is -1 or 1. Rounding is half to even
and the quotient is a true division, as ONNX's QuantizeLinear has it, so that the integers in an exported file are
these integers.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional
from typing_extensions import Self

from fxopt.errors import DataError, PassError
from fxopt.graph.ops import OpSemantics, register_module

__all__ = [
    "MAX_BITS",
    "QUANTIZED_LAYERS",
    "ActivationQuantizer",
    "QuantConv1d",
    "QuantConv2d",
    "QuantConv3d",
    "QuantConvTranspose1d",
    "QuantConvTranspose2d",
    "QuantConvTranspose3d",
    "QuantLinear",
    "QuantizedLayer",
    "WeightQuantizer",
    "observing",
    "quantize_layer",
]

MAX_BITS = 8
"""Most bits of a grid; wider values stay in floating point."""

MIN_SCALE = 2.0**-60
"""Smallest scale. The product of two is still a normal float32, as the scale of a bias has to be."""


class _HoldToGrid(torch.autograd.Function):
    """Round to the grid ``scale * (q - offset)``, ``q`` in ``low .. high``; gradients pass where nothing is clipped.

    Constant bounds and the saved input make this three times faster than torch's own fake quantization.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor | None, low: int, high: int
    ) -> torch.Tensor:
        steps = torch.div(x, scale).round_()
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(x, scale, offset)
            ctx.bounds = (low - 0.5, high + 0.5)
        if offset is None:
            return steps.clamp_(low, high).mul_(scale)
        return steps.add_(offset).clamp_(low, high).sub_(offset).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        x, scale, offset = ctx.saved_tensors
        steps = torch.div(x, scale)
        if offset is not None:
            steps.add_(offset)
        passed = torch.ops.aten.hardtanh_backward.default(gradients[0], steps, *ctx.bounds)
        return passed, None, None, None, None


class _HoldToSigns(torch.autograd.Function):
    """``scale`` with the sign of the value; gradients pass everywhere."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return torch.where(x >= 0, scale, -scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return gradients[0], None


class ActivationQuantizer(nn.Module):
    """Holds a tensor to an unsigned grid of one scale and zero point.

    While ``calibrating`` is set, the module passes values on unchanged and widens its observed range; else it
    quantizes. The grid covers the observed range and zero.

    Args:
        bits: Bits of the grid, 1 to 8.

    Attributes:
        scale: Size of a step; float32 buffer without dimensions.
        zero_point: The integer that stands for zero; int32 buffer without dimensions.
        minimum: Least value observed (infinity before any).
        maximum: Largest value observed (minus infinity before any).
        calibrating: Whether the module observes.

    Raises:
        PassError: If ``bits`` is out of range.
    """

    scale: torch.Tensor
    zero_point: torch.Tensor
    minimum: torch.Tensor
    maximum: torch.Tensor

    def __init__(self, bits: int = MAX_BITS) -> None:
        super().__init__()
        self.bits = _checked_bits(bits, "an activation")
        self.calibrating = False
        self.register_buffer("scale", torch.tensor(1.0))
        self.register_buffer("zero_point", torch.tensor(0, dtype=torch.int32))
        self.register_buffer("minimum", torch.tensor(float("inf")))
        self.register_buffer("maximum", torch.tensor(float("-inf")))

    @property
    def largest(self) -> int:
        """The largest integer of the grid; the least is 0."""
        return int(2**self.bits - 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` held to the grid, or ``x`` itself while calibrating; same shape and type."""
        if self.calibrating:
            self.observe(x)
            return x
        held = _HoldToGrid.apply(x, self.scale, self.zero_point, 0, self.largest)  # type: ignore[no-untyped-call]
        return held  # type: ignore[no-any-return]

    @torch.no_grad()
    def observe(self, x: torch.Tensor) -> None:
        """Widen the observed range to hold every value of ``x``; a NaN stays in the range until :meth:`settle`."""
        low, high = torch.aminmax(x.detach().float())
        # torch.minimum and not min(): it keeps a NaN.
        self.minimum.copy_(torch.minimum(self.minimum, low))
        self.maximum.copy_(torch.maximum(self.maximum, high))

    @torch.no_grad()
    def settle(self, site: str = "an activation") -> None:
        """Take scale and zero point from the observed range.

        Args:
            site: What is quantized, for messages.

        Raises:
            DataError: If nothing was observed, or a value that is not finite.
        """
        low, high = float(self.minimum), float(self.maximum)
        if low == float("inf") and high == float("-inf"):
            raise DataError(f"No calibration data reached {site}; give a loader that yields at least one batch.")
        self.set_range(low, high, site)

    @torch.no_grad()
    def set_range(self, low: float, high: float, site: str = "an activation") -> None:
        """Take scale and zero point from a range, which is widened to hold zero. A range of zeros gets scale 1.

        Raises:
            DataError: If the range is not finite or is empty.
        """
        if not (abs(low) < float("inf") and abs(high) < float("inf") and low <= high):
            raise DataError(
                f"{site[:1].upper()}{site[1:]} ranges from {low} to {high} in calibration; it has to be finite. "
                "Look for NaN or infinity in the calibration data and in the model's weights."
            )
        low, high = min(low, 0.0), max(high, 0.0)
        step = (high - low) / self.largest if high > low else 1.0
        scale = torch.tensor(max(step, MIN_SCALE), dtype=torch.float32)
        self.scale.copy_(scale)
        self.zero_point.fill_(min(max(round(-low / float(scale)), 0), self.largest))

    def integers(self, x: torch.Tensor) -> torch.Tensor:
        """The integers that stand for ``x``: uint8, same shape."""
        steps = torch.div(x.detach(), self.scale).round_().add_(self.zero_point)
        return steps.clamp_(0, self.largest).to(torch.uint8)

    def extra_repr(self) -> str:
        """The bits."""
        return f"bits={self.bits}"


class WeightQuantizer(nn.Module):
    """Holds a weight to a symmetric signed grid, one scale an output channel.

    Args:
        bits: Bits of the grid, 1 to 8.
        channels: Number of scales.
        axis: The weight's axis that they belong to.

    Attributes:
        scale: Sizes of a step; float32 buffer of shape (channels,).

    Raises:
        PassError: If ``bits`` is out of range.
    """

    scale: torch.Tensor

    def __init__(self, bits: int, channels: int, axis: int = 0) -> None:
        super().__init__()
        self.bits = _checked_bits(bits, "a weight")
        self.axis = axis
        self.register_buffer("scale", torch.ones(channels))

    @property
    def largest(self) -> int:
        """The largest integer of the grid; the least is its negative."""
        return max(int(2 ** (self.bits - 1) - 1), 1)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """``weight`` held to the grid."""
        scale = self._spread(weight)
        if self.bits == 1:
            signed = _HoldToSigns.apply(weight, scale)  # type: ignore[no-untyped-call]
            return signed  # type: ignore[no-any-return]
        held = _HoldToGrid.apply(weight, scale, None, -self.largest, self.largest)  # type: ignore[no-untyped-call]
        return held  # type: ignore[no-any-return]

    @torch.no_grad()
    def calibrate(self, weight: torch.Tensor) -> None:
        """Take the scales from ``weight``: its largest magnitude (at one bit: its mean one) is the largest integer.

        A channel of zeros gets scale 1.
        """
        others = [axis for axis in range(weight.dim()) if axis != self.axis]
        sizes = weight.detach().float().abs()
        reach = sizes.mean(dim=others) if self.bits == 1 else sizes.amax(dim=others)
        steps = (reach / self.largest).clamp_(min=MIN_SCALE)
        self.scale.copy_(torch.where(reach > 0, steps, torch.ones_like(steps)))

    @torch.no_grad()
    def integers(self, weight: torch.Tensor) -> torch.Tensor:
        """The integers that stand for ``weight``: int8, same shape."""
        if self.bits == 1:
            return torch.where(weight >= 0, 1, -1).to(torch.int8)
        steps = torch.div(weight, self._spread(weight)).round_()
        return steps.clamp_(-self.largest, self.largest).to(torch.int8)

    def extra_repr(self) -> str:
        """The bits and the axis."""
        return f"bits={self.bits}, axis={self.axis}"

    def _spread(self, weight: torch.Tensor) -> torch.Tensor:
        return self.scale.view([-1 if axis == self.axis else 1 for axis in range(weight.dim())])


class QuantizedLayer(nn.Module):
    """What the quantized layers share: a layer of torch whose weight goes through a :class:`WeightQuantizer`.

    Parameters keep their names and are shared with the layer that it was made from; ``weight_quantizer.scale`` is
    all that a state_dict gains. In training mode the scales follow the weight.

    Attributes:
        weight_quantizer: Holds the weight to its grid.
        activation_bits: Bits that the layer reads its input at, 32 if in floating point.
    """

    float_class: ClassVar[type[nn.Module]] = nn.Module
    weight_axis: ClassVar[int] = 0
    weight: torch.Tensor
    weight_quantizer: WeightQuantizer
    activation_bits: int

    @classmethod
    def from_float(cls, module: nn.Module, bits: int = MAX_BITS, activation_bits: int = MAX_BITS) -> Self:
        """The quantized form of ``module``, sharing its parameters; ``module`` itself is left alone.

        Args:
            module: A layer of the class that this one derives from.
            bits: Bits of the weight, 1 to 8.
            activation_bits: Bits of the input, for which a quantizer stands elsewhere; 32 if there is none.

        Raises:
            PassError: If ``module`` is of another class or ``bits`` out of range.
        """
        if not isinstance(module, cls.float_class):
            raise PassError(f"{cls.__name__} is made from a {cls.float_class.__name__}, not {type(module).__name__}.")
        layer = cls.__new__(cls)
        layer.__dict__ = copy.copy(module.__dict__)
        for name in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            layer.__dict__[name] = copy.copy(module.__dict__[name])
        channels = layer.weight.shape[cls.weight_axis]
        layer.weight_quantizer = WeightQuantizer(bits, channels, cls.weight_axis).to(layer.weight.device)
        layer.weight_quantizer.train(module.training)
        layer.weight_quantizer.calibrate(layer.weight)
        layer.activation_bits = activation_bits
        return layer

    def to_float(self) -> nn.Module:
        """The layer without quantization, sharing its parameters."""
        layer = self.float_class.__new__(self.float_class)
        layer.__dict__ = copy.copy(self.__dict__)
        for name in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            layer.__dict__[name] = copy.copy(self.__dict__[name])
        del layer._modules["weight_quantizer"], layer.__dict__["activation_bits"]
        return layer

    def quantized_weight(self) -> torch.Tensor:
        """The weight held to its grid; in training mode the scales are taken from it first."""
        if self.training and isinstance(self.weight_quantizer, WeightQuantizer):
            self.weight_quantizer.calibrate(self.weight)
        return self.weight_quantizer(self.weight)  # type: ignore[no-any-return]

    def train(self, mode: bool = True) -> Self:
        """Set the mode; when training ends, the scales are taken from the weight a last time."""
        if self.training and not mode:
            self.weight_quantizer.calibrate(self.weight)
        return super().train(mode)


class _QuantConv(QuantizedLayer):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The convolution of ``x`` with the quantized weight."""
        return self._conv_forward(x, self.quantized_weight(), self.bias)  # type: ignore[operator, no-any-return]


class QuantConv1d(_QuantConv, nn.Conv1d):
    """``nn.Conv1d`` with a quantized weight."""

    float_class = nn.Conv1d


class QuantConv2d(_QuantConv, nn.Conv2d):
    """``nn.Conv2d`` with a quantized weight."""

    float_class = nn.Conv2d


class QuantConv3d(_QuantConv, nn.Conv3d):
    """``nn.Conv3d`` with a quantized weight."""

    float_class = nn.Conv3d


class _QuantConvTranspose(QuantizedLayer):
    """Weights have shape (in, out / groups, ...): the groups share the scales of axis 1."""

    weight_axis = 1
    dimensions: ClassVar[int]

    def forward(self, x: torch.Tensor, output_size: list[int] | None = None) -> torch.Tensor:
        """The transposed convolution of ``x`` with the quantized weight."""
        layer: Any = self
        padding = layer._output_padding(
            x, output_size, layer.stride, layer.padding, layer.kernel_size, self.dimensions, layer.dilation
        )
        convolve = getattr(functional, f"conv_transpose{self.dimensions}d")
        weight = self.quantized_weight()
        return convolve(  # type: ignore[no-any-return]
            x, weight, self.bias, layer.stride, layer.padding, padding, layer.groups, layer.dilation
        )


class QuantConvTranspose1d(_QuantConvTranspose, nn.ConvTranspose1d):
    """``nn.ConvTranspose1d`` with a quantized weight."""

    float_class = nn.ConvTranspose1d
    dimensions = 1


class QuantConvTranspose2d(_QuantConvTranspose, nn.ConvTranspose2d):
    """``nn.ConvTranspose2d`` with a quantized weight."""

    float_class = nn.ConvTranspose2d
    dimensions = 2


class QuantConvTranspose3d(_QuantConvTranspose, nn.ConvTranspose3d):
    """``nn.ConvTranspose3d`` with a quantized weight."""

    float_class = nn.ConvTranspose3d
    dimensions = 3


class QuantLinear(QuantizedLayer, nn.Linear):
    """``nn.Linear`` with a quantized weight."""

    float_class = nn.Linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The product of ``x`` with the quantized weight."""
        return functional.linear(x, self.quantized_weight(), self.bias)


QUANTIZED_LAYERS: dict[type[nn.Module], type[QuantizedLayer]] = {
    cls.float_class: cls
    for cls in (
        QuantConv1d,
        QuantConv2d,
        QuantConv3d,
        QuantConvTranspose1d,
        QuantConvTranspose2d,
        QuantConvTranspose3d,
        QuantLinear,
    )
}
"""The quantized layer for each class of float layer."""


def quantize_layer(module: nn.Module, bits: int = MAX_BITS, activation_bits: int = MAX_BITS) -> QuantizedLayer:
    """The quantized form of a float layer, sharing its parameters; see :meth:`QuantizedLayer.from_float`.

    Raises:
        PassError: If there is none for the layer's class, or ``bits`` is out of range.
    """
    for base in type(module).__mro__:
        if base in QUANTIZED_LAYERS:
            return QUANTIZED_LAYERS[base].from_float(module, bits, activation_bits)
    known = ", ".join(cls.__name__ for cls in QUANTIZED_LAYERS)
    raise PassError(f"There is no quantized form of {type(module).__name__}; there is one of {known}.")


@contextlib.contextmanager
def observing(module: nn.Module) -> Iterator[None]:
    """Let every activation quantizer inside ``module`` observe instead of quantize."""
    quantizers = [child for child in module.modules() if isinstance(child, ActivationQuantizer)]
    before = [quantizer.calibrating for quantizer in quantizers]
    try:
        for quantizer in quantizers:
            quantizer.calibrating = True
        yield
    finally:
        for quantizer, calibrating in zip(quantizers, before, strict=True):
            quantizer.calibrating = calibrating


def _checked_bits(bits: int, what: str) -> int:
    if bits not in range(1, MAX_BITS + 1):
        raise PassError(f"{bits!r} bits for {what}: there is a grid for 1 to {MAX_BITS} bits; 32 bits stay in float.")
    return bits


register_module(ActivationQuantizer, OpSemantics("ActivationQuantizer", "none", "unary", fuses=True))
