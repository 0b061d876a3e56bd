"""The modules that hold values to grids: of activations, and of weights."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn
from typing_extensions import Self

from fxopt.errors import DataError, PassError
from fxopt.graph._hold import hold, hold_learned, hold_signs, positive, spread
from fxopt.graph._in_memory import follow
from fxopt.graph.grids import (
    MAX_BITS,
    MIN_SCALE,
    PLAIN_ACTIVATIONS,
    PLAIN_WEIGHTS,
    ActivationScheme,
    Histogram,
    WeightScheme,
    affine,
    checked_bits,
    weight_scales,
)
from fxopt.graph.ops import OpSemantics, register_module

__all__ = ["ActivationQuantizer", "WeightQuantizer", "learn_scales"]

_SAMPLED = 1 << 16
"""Values of a tensor that its histogram counts; the extremes are those of all."""


class _Quantizer(nn.Module):
    """What both quantizers share: a grid, and a scale that may be learned, and stays positive."""

    bits: int
    scheme: ActivationScheme | WeightScheme
    scale: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.learned = ""

    @property
    def bounds(self) -> tuple[int, int]:
        """The least and the largest integer of the grid."""
        return self.scheme.bounds(self.bits)

    @property
    def largest(self) -> int:
        """The largest integer of the grid."""
        return self.bounds[1]

    def train(self, mode: bool = True) -> Self:
        """Set the mode; in evaluation a learned scale is what training used, whether it was trained or read."""
        if self.learned and not mode:
            with torch.no_grad():
                self.scale.copy_(positive(self.scale))
        return super().train(mode)


class ActivationQuantizer(_Quantizer):
    """Holds a tensor to an unsigned grid of one scale and zero point.

    While ``calibrating`` is set, the module passes values on unchanged and widens its observed range; else it
    quantizes. The grid covers the range chosen from what was observed, and zero.

    Args:
        bits: Bits of the grid, 1 to 8.
        scheme: The form of the grid and how its range is chosen.

    Attributes:
        scale: Size of a step; float32 without dimensions. A buffer, or a parameter once :func:`learn_scales` ran.
        zero_point: The integer that stands for zero; int32 buffer without dimensions.
        minimum: Least value observed (infinity before any).
        maximum: Largest value observed (minus infinity before any).
        calibrating: Whether the module observes.
        learned: "" if the scale is fixed, else how it is learned.

    Raises:
        PassError: If ``bits`` is out of range.
    """

    scheme: ActivationScheme
    zero_point: torch.Tensor
    minimum: torch.Tensor
    maximum: torch.Tensor

    def __init__(self, bits: int = MAX_BITS, scheme: ActivationScheme = PLAIN_ACTIVATIONS) -> None:
        super().__init__()
        self.bits = checked_bits(bits, "an activation")
        self.scheme = scheme
        self.calibrating = False
        self._histogram: Histogram | None = None
        self.register_buffer("scale", torch.tensor(1.0))
        self.register_buffer("zero_point", torch.tensor(0, dtype=torch.int32))
        self.register_buffer("minimum", torch.tensor(float("inf")))
        self.register_buffer("maximum", torch.tensor(float("-inf")))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` held to the grid, or ``x`` itself while calibrating; same shape and type."""
        if self.calibrating:
            self.observe(x)
            return x
        if self.learned:
            rounding = self.learned == "lsq"
            return hold_learned(x, self.scale, self.zero_point, self.bounds, rounding=rounding)
        return hold(x, self.scale, self.zero_point, self.bounds)

    @torch.no_grad()
    def observe(self, x: torch.Tensor) -> None:
        """Widen the observed range to hold every value of ``x``; a NaN stays in the range until :meth:`settle`."""
        values = x.detach().float()
        low, high = torch.aminmax(values)
        # torch.minimum and not min(): it keeps a NaN.
        self.minimum.copy_(torch.minimum(self.minimum, low))
        self.maximum.copy_(torch.maximum(self.maximum, high))
        if self.scheme.method != "max":
            self._histogram = self._histogram or Histogram()
            values = values.reshape(-1)
            self._histogram.add(values[:: -(-values.numel() // _SAMPLED)].cpu())

    @property
    def observed(self) -> tuple[float, float, Histogram | None]:
        """What was observed: least and largest value, and how often each occurred. Another quantizer can take it."""
        return float(self.minimum), float(self.maximum), self._histogram

    @observed.setter
    def observed(self, found: tuple[float, float, Histogram | None]) -> None:
        self.minimum.fill_(found[0])
        self.maximum.fill_(found[1])
        self._histogram = found[2]

    @torch.no_grad()
    def settle(self, site: str = "an activation") -> None:
        """Take scale and zero point from what was observed.

        Args:
            site: What is quantized, for messages.

        Raises:
            DataError: If nothing was observed, or a value that is not finite.
        """
        low, high = float(self.minimum), float(self.maximum)
        if low == float("inf") and high == float("-inf"):
            raise DataError(f"No calibration data reached {site}; give a loader that yields at least one batch.")
        self._check_range(low, high, site)
        if self._histogram is not None:
            low, high = self._histogram.range(self.bits, self.scheme)
            self._histogram = None
        self.set_range(low, high, site)

    def settle_like(self, other: ActivationQuantizer) -> None:
        """Take scale, zero point and observed range of another quantizer that has settled."""
        self.load_state_dict(other.state_dict())
        self._histogram = None

    @torch.no_grad()
    def set_range(self, low: float, high: float, site: str = "an activation") -> None:
        """Take scale and zero point from a range, which is widened to hold zero. A range of zeros gets scale 1.

        Raises:
            DataError: If the range is not finite or is empty.
        """
        self._check_range(low, high, site)
        ends = [torch.tensor(end, dtype=torch.float64) for end in (low, high)]
        scale, zero = affine(ends[0], ends[1], self.bits, self.scheme)
        self.scale.copy_(scale)
        self.zero_point.copy_(zero)

    def integers(self, x: torch.Tensor) -> torch.Tensor:
        """The integers that stand for ``x``: uint8, same shape."""
        steps = torch.div(x.detach(), self.scale.detach()).round_().add_(self.zero_point)
        return steps.clamp_(*self.bounds).to(torch.uint8)

    def extra_repr(self) -> str:
        """The bits."""
        return f"bits={self.bits}"

    def _check_range(self, low: float, high: float, site: str) -> None:
        if not (abs(low) < float("inf") and abs(high) < float("inf") and low <= high):
            raise DataError(
                f"{site[:1].upper()}{site[1:]} ranges from {low} to {high} in calibration; it has to be finite. "
                "Look for NaN or infinity in the calibration data and in the model's weights."
            )


class WeightQuantizer(_Quantizer):
    """Holds a weight to a signed grid, one scale an output channel (all equal if the scheme has one grid a tensor).

    In training the scales follow the weight. Where a scheme searches for its ranges, training takes for a range the
    part of the weight's extent that it had at the start, and searches anew when it ends.

    Args:
        bits: Bits of the grid, 1 to 8.
        channels: Number of scales.
        axis: The weight's axis that they belong to.
        scheme: The form of the grid and how its range is chosen.

    Attributes:
        scale: Sizes of a step; float32 of shape (channels,). A buffer, or a parameter once :func:`learn_scales` ran.
        zero_point: The integers that stand for zero, an int32 buffer of shape (channels,); None if the grid is
            symmetric.
        learned: "" if the scales follow the weight in training, else how they are learned.

    Raises:
        PassError: If ``bits`` is out of range.
    """

    scheme: WeightScheme
    zero_point: torch.Tensor | None
    _part: torch.Tensor | None

    def __init__(self, bits: int, channels: int, axis: int = 0, scheme: WeightScheme = PLAIN_WEIGHTS) -> None:
        super().__init__()
        self.bits = checked_bits(bits, "a weight")
        self.axis = axis
        self.scheme = scheme
        self.register_buffer("scale", torch.ones(channels))
        self.register_buffer("zero_point", None if scheme.symmetric else torch.zeros(channels, dtype=torch.int32))
        self.register_buffer("_part", None, persistent=False)

    @property
    def is_binary(self) -> bool:
        """Whether the grid is -1 and 1, without zero."""
        return self.bits == 1 and self.scheme.symmetric

    @property
    def _holds_all(self) -> bool:
        """Whether scales follow from the largest magnitude of each channel and nothing else."""
        plain = self.scheme.method == "max" and self.scheme.per_channel and self.scheme.symmetric
        return plain and not self.scheme.power_of_two and not self.is_binary

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """``weight`` held to the grid."""
        if self.is_binary:
            return hold_signs(weight, spread(self.scale, self.axis, weight.dim()))
        if self.learned:
            return hold_learned(weight, self.scale, self.zero_point, self.bounds, self.axis, rounding=True)
        return hold(weight, self.scale, self.zero_point, self.bounds, self.axis)

    @torch.no_grad()
    def calibrate(self, weight: torch.Tensor) -> None:
        """Take the scales from ``weight``, as the scheme says. A channel of zeros gets scale 1."""
        self._part = None
        if self._holds_all and follow(weight, self.axis, self.scale, (self.largest - self.bounds[0]) / 2, MIN_SCALE):
            return
        self._take(*weight_scales(self._rows(weight), self.bits, self.scheme))

    @torch.no_grad()
    def follow(self, weight: torch.Tensor) -> None:
        """Take the scales from a weight that training changed, unless they are learned."""
        if self.learned:
            return
        if self.scheme.method == "max" or self.scheme.power_of_two or self.is_binary:
            self.calibrate(weight)
            return
        rows = self._rows(weight)
        rows = rows if self.scheme.per_channel else rows.reshape(1, -1)
        low, high = rows.amin(1), rows.amax(1)
        if self._part is None:
            whole, _ = affine(low, high, self.bits, self.scheme)
            self._part = torch.where(low < high, self.scale[: len(whole)] / whole, 1.0)  # Rows of zeros had no range.
        self._take(*affine(low * self._part, high * self._part, self.bits, self.scheme))

    def settle(self, weight: torch.Tensor) -> None:
        """Take the scales from a weight that training leaves, unless they are learned."""
        if not self.learned:
            self.calibrate(weight)

    @torch.no_grad()
    def integers(self, weight: torch.Tensor) -> torch.Tensor:
        """The integers that stand for ``weight``: int8, same shape."""
        if self.is_binary:
            return torch.where(weight >= 0, 1, -1).to(torch.int8)
        steps = torch.div(weight, spread(self.scale, self.axis, weight.dim())).round_()
        if self.zero_point is not None:
            steps.add_(spread(self.zero_point, self.axis, weight.dim()))
        return steps.clamp_(*self.bounds).to(torch.int8)

    def extra_repr(self) -> str:
        """The bits and the axis."""
        return f"bits={self.bits}, axis={self.axis}"

    def _rows(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.detach().float().movedim(self.axis, 0).flatten(1)

    def _take(self, scale: torch.Tensor, zero: torch.Tensor) -> None:
        self.scale.copy_(scale)
        if self.zero_point is not None:
            self.zero_point.copy_(zero)


def learn_scales(module: nn.Module, activations: Literal["lsq", "pact"] = "lsq", *, weights: bool = True) -> None:
    """Let training learn the scales of the quantizers inside a module, from where calibration left them.

    Args:
        module: A quantized graph; changed in place.
        activations: "lsq" learns step sizes (Esser et al. 2020), "pact" clipping bounds (Choi et al. 2018).
        weights: Whether the scales of weights are learned, as step sizes; else they follow the weights.

    Raises:
        PassError: If ``activations`` is neither, or scales are to be powers of two.
    """
    if activations not in ("lsq", "pact"):
        raise PassError(f"Scales are learned by 'lsq' or 'pact', not by {activations!r}.")
    for child in module.modules():
        if isinstance(child, ActivationQuantizer):
            child.learned = activations
        elif isinstance(child, WeightQuantizer) and weights and not child.is_binary:
            child.learned = "lsq"
        else:
            continue
        if child.scheme.power_of_two:
            raise PassError("Scales that are powers of two cannot be learned; quantize without power_of_two.")
        if not isinstance(child.scale, nn.Parameter):
            scale = child.scale
            del child._buffers["scale"]
            child.register_parameter("scale", nn.Parameter(scale.clone()))


register_module(ActivationQuantizer, OpSemantics("ActivationQuantizer", "none", "unary", fuses=True))
