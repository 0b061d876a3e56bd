"""Integer grids: which integers stand for which numbers, and how a range is chosen from what was seen.

================  =================  ==========================================================================
what              grid               integers at ``b`` bits
================  =================  ==========================================================================
weights           symmetric, narrow  ``w = scale * q``, ``q`` in ``-(2^(b-1) - 1) .. 2^(b-1) - 1``; the default. At
                                     2 bits this is ternary: -1, 0, 1
weights           symmetric, full    ``w = scale * q``, ``q`` in ``-2^(b-1) .. 2^(b-1) - 1``
weights           asymmetric         ``w = scale * (q - zero_point)``, ``q`` in ``-2^(b-1) .. 2^(b-1) - 1``
weights, 1 bit    symmetric          binary: ``q`` is -1 or 1, and ``scale`` the mean magnitude, which is the scale of
                                     least squared error (Rastegari et al. 2016, XNOR-Net, equation 6)
activations       asymmetric         ``x = scale * (q - zero_point)``, ``q`` in ``0 .. 2^b - 1``; the default
activations       symmetric          the same, with ``zero_point`` 0 where nothing is negative and ``2^(b-1)`` else
================  =================  ==========================================================================

Every grid holds zero exactly, but the binary one. Rounding is half to even.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch

from fxopt.decisions._bits import MAX_BITS
from fxopt.errors import PassError

__all__ = [
    "MAX_BITS",
    "MIN_SCALE",
    "PLAIN_ACTIVATIONS",
    "PLAIN_WEIGHTS",
    "ActivationScheme",
    "Histogram",
    "Method",
    "WeightScheme",
    "affine",
    "checked_bits",
    "held",
    "weight_scales",
]

MIN_SCALE = 2.0**-60
"""Smallest scale. The product of two is still a normal float32, as the scale of a bias has to be."""

Method: TypeAlias = Literal["max", "percentile", "mse", "kl"]
_METHODS = get_args(Method)
_WEIGHT_METHODS = (*_METHODS, "kmeans")

_BINS = 4096
_COARSE = torch.cat([torch.tensor([0.01, 0.02, 0.05]), torch.linspace(0.1, 1.0, 19)])
_FINE = torch.linspace(-0.045, 0.045, 10)


def _check(method: str, percentile: float, known: tuple[str, ...]) -> None:
    if method not in known:
        raise PassError(f"There is no way {method!r} to choose a range; choose one of {', '.join(known)}.")
    if not 50.0 < percentile <= 100.0:
        raise PassError(f"percentile is {percentile}; give more than 50 and at most 100 percent.")


@dataclass(frozen=True)
class WeightScheme:
    """How weights are put on a grid.

    Attributes:
        method: How the range is chosen: ``"max"`` holds all values; ``"percentile"`` that part of the magnitudes;
            ``"mse"`` has the least squared error of the weight, at 2 bits therefore the best ternary weight for
            rounding to the nearest (Li et al. 2016); ``"kl"`` the least divergence of histograms (as in HAQ), per
            tensor alone. ``"kmeans"`` has no grid but a codebook of ``2^b`` values for the whole tensor (Han et al.
            2016, Deep Compression); the options below do not matter to it.
        per_channel: A scale for each output channel, or one for all of them.
        symmetric: Whether zero is the integer 0.
        narrow: Whether a symmetric grid leaves the least integer out.
        power_of_two: Whether scales are powers of two, so that hardware shifts instead of multiplying.
        percentile: For ``"percentile"``, in percent.

    Raises:
        PassError: If an option is out of range.
    """

    method: Method | Literal["kmeans"] = "max"
    per_channel: bool = True
    symmetric: bool = True
    narrow: bool = True
    power_of_two: bool = False
    percentile: float = 99.9

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        _check(self.method, self.percentile, _WEIGHT_METHODS)
        if self.method == "kl" and self.per_channel:
            raise PassError("Ranges of weights by KL need the histogram of a whole tensor; set per_channel=False.")

    def bounds(self, bits: int) -> tuple[int, int]:
        """The least and the largest integer."""
        if bits == 1 and self.symmetric:
            return (-1, 1)
        largest = 2 ** (bits - 1) - 1
        return (-max(largest, 1), max(largest, 1)) if self.symmetric and self.narrow else (-largest - 1, largest)


@dataclass(frozen=True)
class ActivationScheme:
    """How activations are put on a grid.

    Attributes:
        method: How the range is chosen, as for :class:`WeightScheme`; all but ``"max"`` go by a histogram of a part of
            the values.
        symmetric: Whether zero is at an end or in the middle of the grid.
        power_of_two: Whether the scale is a power of two.
        percentile: For ``"percentile"``, in percent; that part of the values lies within the range.

    Raises:
        PassError: If an option is out of range.
    """

    method: Method = "max"
    symmetric: bool = False
    power_of_two: bool = False
    percentile: float = 99.99

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        _check(self.method, self.percentile, _METHODS)

    def bounds(self, bits: int) -> tuple[int, int]:
        """The least and the largest integer."""
        return (0, 2**bits - 1)


Scheme: TypeAlias = "WeightScheme | ActivationScheme"

PLAIN_WEIGHTS = WeightScheme()
PLAIN_ACTIVATIONS = ActivationScheme()


def checked_bits(bits: int, what: str) -> int:
    """``bits``, if there is a grid of so many.

    Raises:
        PassError: If there is none.
    """
    if isinstance(bits, bool) or bits not in range(1, MAX_BITS + 1):
        raise PassError(f"{bits!r} bits for {what}: there is a grid for 1 to {MAX_BITS} bits; 32 bits stay in float.")
    return bits


def affine(low: torch.Tensor, high: torch.Tensor, bits: int, scheme: Scheme) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point of the grids that hold some ranges.

    Args:
        low: Least values; a range is widened to hold zero.
        high: Largest values, of the same shape.
        bits: Bits of the grid.
        scheme: The form of the grid.

    Returns:
        Scales and zero points (whole numbers as floats), of the shape of ``low``. An empty range gets scale 1.
    """
    least, largest = scheme.bounds(bits)
    low, high = low.double().clamp(max=0.0), high.double().clamp(min=0.0)
    if not scheme.symmetric:
        steps = (high - low) / (largest - least)
    elif isinstance(scheme, ActivationScheme):
        signed = torch.maximum(-low, high) / max(2 ** (bits - 1) - 0.5, 1.0)
        steps = torch.where(low < 0, signed, high / largest)
    else:
        steps = torch.maximum(-low, high) / max((largest - least) / 2, 1.0)
    if scheme.power_of_two:
        steps = torch.exp2(torch.ceil(torch.log2(steps.clamp(min=MIN_SCALE)) - 1e-6)).where(steps > 0, steps)
    scale = torch.where(steps > 0, steps.clamp(min=MIN_SCALE), torch.ones_like(steps)).float()
    if not scheme.symmetric:
        zero = (least + torch.round(-low / scale)).clamp(least, largest)
    elif isinstance(scheme, ActivationScheme):
        zero = torch.where(low < 0, 2.0 ** (bits - 1), 0.0)
    else:
        zero = torch.zeros_like(low)
    return scale, zero.float()


def held(x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bounds: tuple[int, int]) -> torch.Tensor:
    """Values on their grid, without gradients; ``scale`` and ``zero`` broadcast against ``x``."""
    return torch.div(x, scale).round_().add_(zero).clamp_(*bounds).sub_(zero).mul_(scale)


@torch.no_grad()
def weight_scales(weight: torch.Tensor, bits: int, scheme: WeightScheme) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zero points of a weight, by channel.

    Args:
        weight: The weight, shape (channels, others).
        bits: Bits of the grid.
        scheme: The form of the grid and how its range is chosen.

    Returns:
        Scales and zero points, each of shape (channels,), equal over channels if the scheme has one grid a tensor. A
        channel of zeros gets scale 1.
    """
    channels = len(weight)
    values = weight.float() if scheme.per_channel else weight.float().reshape(1, -1)
    if bits == 1 and scheme.symmetric:
        size = values.abs().mean(1)
        scale = affine(-size, size, bits, scheme)[0]
        return scale.expand(channels).clone(), torch.zeros(channels)
    low, high = values.amin(1), values.amax(1)
    if scheme.method == "percentile":
        low, high = _percentiles(values, scheme)
    elif scheme.method == "mse":
        low, high = _least_error(values, low, high, bits, scheme)
    elif scheme.method == "kl":
        histogram = Histogram()
        histogram.add(values.flatten())
        low, high = (torch.tensor([end]) for end in histogram.range(bits, scheme))
    scale, zero = affine(low, high, bits, scheme)
    return scale.expand(channels).clone(), zero.expand(channels).clone()


def _percentiles(values: torch.Tensor, scheme: WeightScheme) -> tuple[torch.Tensor, torch.Tensor]:
    """The ends of the part of each row's values, or magnitudes, that a scheme keeps."""
    count, share = values.shape[1], scheme.percentile / 100.0
    if scheme.symmetric:
        reach = values.abs().kthvalue(max(1, math.ceil(share * count)), dim=1).values
        return -reach, reach
    outside = math.floor((1.0 - share) / 2.0 * count)
    return values.kthvalue(outside + 1, dim=1).values, values.kthvalue(count - outside, dim=1).values


def _least_error(
    values: torch.Tensor, low: torch.Tensor, high: torch.Tensor, bits: int, scheme: WeightScheme
) -> tuple[torch.Tensor, torch.Tensor]:
    """The part of each row's range that the row is nearest to its grid with."""
    best = torch.full((len(values),), float("inf"))
    part = torch.ones(len(values))

    def attempt(factor: torch.Tensor) -> None:
        scale, zero = affine(low * factor, high * factor, bits, scheme)
        gap = held(values, scale[:, None], zero[:, None], scheme.bounds(bits)).sub_(values)
        error = gap.square_().sum(1)
        better = error < best
        best[better], part[better] = error[better], factor[better]

    for factor in _COARSE:
        attempt(factor.expand(len(values)).clone())
    centre = part.clone()
    for step in _FINE:
        attempt((centre + step).clamp(0.02, 1.0))
    return low * part, high * part


_Losses: TypeAlias = Callable[[torch.Tensor, torch.Tensor, int, Scheme], torch.Tensor]


class Histogram:
    """How often values occur, in bins of equal width about zero; the range doubles as values call for it."""

    def __init__(self) -> None:
        self.counts = torch.zeros(_BINS, dtype=torch.float64)
        self.reach = 0.0

    def add(self, values: torch.Tensor) -> None:
        """Count some values; those that are not finite are left out."""
        values = values.detach().flatten().float()
        values = values[torch.isfinite(values)]
        size = float(values.abs().max()) if values.numel() else 0.0
        if size == 0.0:
            self.counts[_BINS // 2] += values.numel()
            return
        if self.reach == 0.0:
            self.reach = size * 1.001
        while self.reach < size:
            merged = self.counts.view(-1, 2).sum(1)
            self.counts = torch.zeros_like(self.counts)
            self.counts[_BINS // 4 : -_BINS // 4] = merged
            self.reach *= 2.0
        self.counts += torch.histc(values, _BINS, -self.reach, self.reach).double()

    @property
    def centres(self) -> torch.Tensor:
        """The middle of every bin."""
        width = 2.0 * self.reach / _BINS
        return (torch.arange(_BINS, dtype=torch.float64) + 0.5) * width - self.reach

    def range(self, bits: int, scheme: Scheme) -> tuple[float, float]:
        """The range that a scheme chooses."""
        seen = self.counts.nonzero().flatten()
        if self.reach == 0.0 or not len(seen):
            return (0.0, 0.0)
        centres, width = self.centres, 2.0 * self.reach / _BINS
        low = min(float(centres[seen[0]]) - width / 2, 0.0)
        high = max(float(centres[seen[-1]]) + width / 2, 0.0)
        # What is of one sign leaves no trace of the other in the bin next to zero.
        low, high = (0.0 if abs(low) <= width else low), (0.0 if abs(high) <= width else high)
        if scheme.method == "percentile":
            return self._percentile(scheme.percentile / 100.0, low, high)
        if scheme.method == "mse":
            return self._search(low, high, bits, scheme, self._squared_errors)
        if scheme.method == "kl":
            return self._search(low, high, bits, scheme, self._divergences)
        return (low, high)

    def _percentile(self, share: float, low: float, high: float) -> tuple[float, float]:
        part = torch.cumsum(self.counts, 0) / self.counts.sum()
        outside = (1.0 - share) / (2.0 if low < 0.0 < high else 1.0)
        centres = self.centres
        first = float(centres[int((part > outside).nonzero()[0])])
        last = float(centres[int((part >= 1.0 - outside).nonzero()[0])])
        return (max(low, min(first, 0.0)), min(high, max(last, 0.0)))

    def _search(self, low: float, high: float, bits: int, scheme: Scheme, losses: _Losses) -> tuple[float, float]:
        """Shrink both ends by one factor, then each by its own."""
        best_low, best_high = torch.tensor(low), torch.tensor(high)
        for ends in ((True, True), (True, False), (False, True)):
            for factors in (_COARSE, None):
                base = _FINE + 1.0 if factors is None else factors
                lows = best_low * base if ends[0] else best_low.expand(len(base))
                highs = best_high * base if ends[1] else best_high.expand(len(base))
                lows, highs = lows.clamp(min=low), highs.clamp(max=high)
                at = int(losses(lows, highs, bits, scheme).argmin())
                best_low, best_high = lows[at], highs[at]
            if low == 0.0 or high == 0.0 or scheme.symmetric:
                break
        return (float(best_low), float(best_high))

    def _squared_errors(self, low: torch.Tensor, high: torch.Tensor, bits: int, scheme: Scheme) -> torch.Tensor:
        seen = self.counts > 0
        centres, counts = self.centres[seen], self.counts[seen]
        scale, zero = affine(low, high, bits, scheme)
        gap = held(centres[None].expand(len(low), -1), scale[:, None], zero[:, None], scheme.bounds(bits)) - centres
        return (gap.square() * counts).sum(1)

    def _divergences(self, low: torch.Tensor, high: torch.Tensor, bits: int, scheme: Scheme) -> torch.Tensor:
        """KL of the values clipped to each range from the values at the middle of their level.

        As Migacz (8-bit inference with TensorRT, 2017): levels spread evenly over the bins that are not empty.
        """
        centres, counts = self.centres, self.counts
        scale, zero = affine(low, high, bits, scheme)
        least, largest = scheme.bounds(bits)
        found = []
        for each in range(len(low)):
            lowest, highest = (float((end - zero[each]) * scale[each]) for end in (least, largest))
            inside = (centres >= lowest - float(scale[each]) / 2) & (centres <= highest + float(scale[each]) / 2)
            if not bool(inside.any()):
                found.append(float("inf"))
                continue
            kept = counts[inside]
            clipped = kept.clone()
            first = int(inside.nonzero()[0])
            clipped[0] += counts[:first].sum()
            clipped[-1] += counts[first + len(kept) :].sum()
            level = torch.div(centres[inside], scale[each]).round().add(zero[each]).clamp(least, largest).long() - least
            mass = torch.zeros(largest - least + 1, dtype=torch.float64).index_add(0, level, kept)
            full = torch.zeros_like(mass).index_add(0, level, (kept > 0).double())
            spread = torch.where(kept > 0, mass[level] / full[level].clamp(min=1.0), 0.0)
            p, q = clipped / clipped.sum(), spread / spread.sum().clamp(min=1e-300)
            both = (p > 0) & (q > 0)
            lost = p[(p > 0) & (q == 0)].sum() * 50.0
            found.append(float((p[both] * torch.log(p[both] / q[both])).sum() + lost))
        return torch.tensor(found)
