"""What bounds the throughput of a target: its arithmetic, by widths, and its memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from fxopt.targets._presets import PresetTarget
from fxopt.targets.base import Target
from fxopt.targets.parameters import by_bits

__all__ = ["Roof", "Roofs", "roofs"]

Values = Mapping[str, float]
_Peak = Callable[[Values, int, int], "float | None"]

_WIDEST_FUSED = 8


@dataclass(frozen=True)
class Roof:
    """The most MACs in a second at some widths.

    Attributes:
        label: The widths, as "8/8, 6/8 bits", weights first.
        macs_per_s: The peak.
    """

    label: str
    macs_per_s: float


@dataclass(frozen=True)
class Roofs:
    """What bounds a target.

    Attributes:
        peaks: The peaks of the widths asked for, the highest first; none where the target's model has no such figures.
        bandwidth_bytes_per_s: Bytes between memory and processor in a second, or None where the model has no such
            figure.
        note: What the figures are, or why some are missing.
    """

    peaks: tuple[Roof, ...]
    bandwidth_bytes_per_s: float | None
    note: str


def roofs(target: Target, widths: Iterable[tuple[int, int]]) -> Roofs:
    """The roofs of a target for operators of the given widths.

    They are those of the target's own model: what it charges for a MAC or a byte when nothing else holds it up, so no
    estimate of a convolution or linear layer passes them; but the model of a phone's CPU charges some depthwise and
    linear layers by elements or weights alone, and overlays write results in no time, besides what their ports fetch.

    Args:
        target: The target.
        widths: Bits of weights and of activations, any order.
    """
    found = _FAMILIES.get(target.info.family)
    if not isinstance(target, PresetTarget) or found is None:
        return Roofs((), None, f"{target.name} is measured operator by operator, so it has no roofs, only points.")
    values = {name: figure.si for name, figure in target.preset.figures.items()}
    labels: dict[float, list[str]] = {}
    for weight_bits, activation_bits in sorted(set(widths), reverse=True):
        peak = found.peak(values, weight_bits, activation_bits)
        if peak is not None:
            labels.setdefault(peak, []).append(f"{weight_bits}/{activation_bits}")
    peaks = tuple(Roof(_joined(labels[peak]), peak) for peak in sorted(labels, reverse=True))
    bandwidth = found.bandwidth(values) if found.bandwidth is not None else None
    return Roofs(peaks, bandwidth, found.note)


def _joined(labels: list[str]) -> str:
    if len(labels) <= 3:
        return ", ".join(labels) + " bits"
    return f"{labels[0]} to {labels[-1]} bits ({len(labels)} pairs)"


@dataclass(frozen=True)
class _Family:
    peak: _Peak
    bandwidth: Callable[[Values], float] | None
    note: str


def _rate(values: Values, prefix: str, weight_bits: int, activation_bits: int) -> float | None:
    """The rate of the narrowest class that holds both widths."""
    found = by_bits(values, prefix, rising=False)[max(weight_bits, activation_bits)]
    return None if math.isnan(found) else found


def _roofline(values: Values, weight_bits: int, activation_bits: int) -> float | None:
    return _rate(values, "peak", weight_bits, activation_bits)


def _gpu(values: Values, weight_bits: int, activation_bits: int) -> float | None:
    each = _rate(values, "mac_per_sm_cycle", weight_bits, activation_bits)
    return None if each is None else each * values["sm_count"] * values["clock"]


def _mcu(values: Values, weight_bits: int, activation_bits: int) -> float:
    each = _rate(values, "mac_per_cycle", weight_bits, activation_bits)
    # What is wider than all classes runs in the widest.
    widest = min(rate for rate in by_bits(values, "mac_per_cycle", rising=False) if not math.isnan(rate))
    return (widest if each is None else each) * values["clock"]


def _bismo(values: Values, weight_bits: int, activation_bits: int) -> float:
    passes = min(weight_bits, values["widest_bits"]) * min(activation_bits, values["widest_bits"])
    return values["rows"] * values["columns"] * values["depth"] * values["clock"] / passes


def _bitfusion(values: Values, weight_bits: int, activation_bits: int) -> float:
    fused = [_WIDEST_FUSED // min(max(bits, 2), _WIDEST_FUSED) for bits in (weight_bits, activation_bits)]
    return values["rows"] * values["columns"] * values["clock"] * fused[0] * fused[1]


def _grid(values: Values, weight_bits: int, activation_bits: int) -> float:
    return values["rows"] * values["columns"] * values["clock"]


def _eie(values: Values, weight_bits: int, activation_bits: int) -> float:
    return values["elements"] * values["clock"]


def _cpu(values: Values, weight_bits: int, activation_bits: int) -> float | None:
    """The least time per MAC of any kind of operator, in any class that is wide enough."""
    bits = max(weight_bits, activation_bits)
    classes = ("int8", "int16", "float")[(bits > 8) + (bits > 16) :]
    times = [time for name, time in values.items() if name.endswith(".mac") and name.split(".")[0] in classes]
    least = min((time for time in times if time > 0.0), default=0.0)
    return 1.0 / least if least else None


def _npu(values: Values, weight_bits: int, activation_bits: int) -> float | None:
    precision = "float"
    if weight_bits <= 8 and activation_bits <= 16:
        precision = "w8a8" if activation_bits <= 8 else "w8a16"
    kinds = ("dense", "volume", "depthwise")
    share = values.get(f"{precision}.of_float", 0.0)
    times = [values.get(f"{precision}.{kind}", 0.0) + share * values.get(f"float.{kind}", 0.0) for kind in kinds]
    least = min((time for time in times if time > 0.0), default=0.0)
    return 1.0 / least if least else None


def _without_slope(text: str) -> str:
    return f"{text} There is no slope, for the model has no bandwidth."


_FAMILIES: Mapping[str, _Family] = {
    "roofline": _Family(_roofline, lambda values: values["bandwidth"], "Sustained rate and bandwidth."),
    "gpu": _Family(_gpu, lambda values: values["bandwidth"], "Peaks of the data sheet, which kernels stay below."),
    "bismo": _Family(
        _bismo,
        lambda values: 2.0 * values["port"] * values["clock"],
        "All dot units busy, and the ports of weights and activations; results are written besides, in no time.",
    ),
    "bitfusion": _Family(
        _bitfusion, lambda values: values["bandwidth"] * values["clock"], "All fusion units busy; the port to memory."
    ),
    "eyeriss": _Family(_grid, lambda values: values["bandwidth"], "All elements of the grid busy; memory's bandwidth."),
    "systolic": _Family(_grid, lambda values: values["bandwidth"], "All multipliers busy; memory's bandwidth."),
    "eie": _Family(_eie, None, _without_slope("All elements busy with products of what is not zero.")),
    "mcu": _Family(_mcu, None, _without_slope("The rate of the library, from memory on the chip.")),
    "linear_cpu": _Family(
        _cpu, None, _without_slope("The least time per MAC of operators that are charged by MACs, as fitted.")
    ),
    "npu": _Family(_npu, None, _without_slope("The least time per MAC of any kind of operator, as fitted.")),
}
