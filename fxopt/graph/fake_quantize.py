"""Fake quantization: float tensors held to an integer grid, with straight-through gradients.

Unless a scheme says otherwise, activations lie on an asymmetric unsigned grid, one scale a tensor:
``x = scale * (q - zero_point)`` with ``q`` in ``0 .. 2^bits - 1``; weights on a symmetric signed grid, one scale an
output channel: ``w = scale * q`` with ``q`` in ``-(2^(bits-1) - 1) .. 2^(bits-1) - 1`` (-127..127 at 8 bits); at one
bit ``q`` is -1 or 1. :mod:`fxopt.graph.grids` has all grids. Rounding is half to even and the quotient is a true
division, as ONNX's QuantizeLinear has it, so that the integers in an exported file are these integers.
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

from fxopt.errors import PassError
from fxopt.graph._codebook import CodebookQuantizer
from fxopt.graph._quantizers import ActivationQuantizer, WeightQuantizer, learn_scales
from fxopt.graph.grids import MAX_BITS, PLAIN_WEIGHTS, ActivationScheme, WeightScheme

__all__ = [
    "MAX_BITS",
    "QUANTIZED_LAYERS",
    "ActivationQuantizer",
    "ActivationScheme",
    "CodebookQuantizer",
    "QuantConv1d",
    "QuantConv2d",
    "QuantConv3d",
    "QuantConvTranspose1d",
    "QuantConvTranspose2d",
    "QuantConvTranspose3d",
    "QuantLinear",
    "QuantizedLayer",
    "WeightQuantizer",
    "WeightScheme",
    "learn_scales",
    "observing",
    "quantize_layer",
]


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
    weight_quantizer: WeightQuantizer | CodebookQuantizer
    activation_bits: int

    @classmethod
    def from_float(
        cls,
        module: nn.Module,
        bits: int = MAX_BITS,
        activation_bits: int = MAX_BITS,
        scheme: WeightScheme = PLAIN_WEIGHTS,
    ) -> Self:
        """The quantized form of ``module``, sharing its parameters; ``module`` itself is left alone.

        Args:
            module: A layer of the class that this one derives from.
            bits: Bits of the weight, 1 to 8.
            activation_bits: Bits of the input, for which a quantizer stands elsewhere; 32 if there is none.
            scheme: The form of the weight's grid and how its range is chosen.

        Raises:
            PassError: If ``module`` is of another class or ``bits`` out of range.
        """
        if not isinstance(module, cls.float_class):
            raise PassError(f"{cls.__name__} is made from a {cls.float_class.__name__}, not {type(module).__name__}.")
        layer = cls.__new__(cls)
        layer.__dict__ = copy.copy(module.__dict__)
        for name in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            layer.__dict__[name] = copy.copy(module.__dict__[name])
        size = layer.weight.shape
        if scheme.method == "kmeans":
            layer.weight_quantizer = CodebookQuantizer(bits, size)
        else:
            layer.weight_quantizer = WeightQuantizer(bits, size[cls.weight_axis], cls.weight_axis, scheme)
        layer.weight_quantizer.to(layer.weight.device)
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

    def baked(self) -> nn.Module:
        """A float layer that computes the same: its weight is the quantized one, its bias shared."""
        layer: Any = self.to_float()
        with torch.no_grad():
            layer.weight = nn.Parameter(self.weight_quantizer(self.weight).detach().clone())
        return layer  # type: ignore[no-any-return]

    def quantized_weight(self) -> torch.Tensor:
        """The weight held to its grid; in training mode the scales are taken from it first."""
        if self.training and isinstance(self.weight_quantizer, (WeightQuantizer, CodebookQuantizer)):
            self.weight_quantizer.follow(self.weight)
        return self.weight_quantizer(self.weight)  # type: ignore[no-any-return]

    def train(self, mode: bool = True) -> Self:
        """Set the mode; when training ends, the scales are taken from the weight a last time, as the scheme says."""
        if self.training and not mode:
            self.weight_quantizer.settle(self.weight)
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


def quantize_layer(
    module: nn.Module,
    bits: int = MAX_BITS,
    activation_bits: int = MAX_BITS,
    scheme: WeightScheme = PLAIN_WEIGHTS,
) -> QuantizedLayer:
    """The quantized form of a float layer, sharing its parameters; see :meth:`QuantizedLayer.from_float`.

    Raises:
        PassError: If there is none for the layer's class, or ``bits`` is out of range.
    """
    for base in type(module).__mro__:
        if base in QUANTIZED_LAYERS:
            return QUANTIZED_LAYERS[base].from_float(module, bits, activation_bits, scheme)
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
