"""Microcontrollers against published times and peaks of memory, by library."""

from __future__ import annotations

from pathlib import Path

from fits.mcu import CLOCK_HZ, DEVICES, cycles_of, rate
from fits.networks import Block, blocks_of, measured, rescaled, tables

from accuracy import Line
from accuracy.linear_cpu import summary
from fxopt.targets import OpKind, Workload, load, make_row
from fxopt.targets.rows import Floats

__all__ = ["lines"]

BAR = {"max": 0.13}

# MACs in millions that github.com/mit-han-lab/mcunet states of the largest model, which no rate was fitted to.
LARGEST = ("mcunet-in4", 125.9)
SMALLEST = "mbv2-w0.3-r64"
ACCOUNTED = "MCU (TFLite-Micro-style accounting, repo table)"


def lines(data: Path) -> list[Line]:
    """All comparisons of the family."""
    networks = tables(data)
    mobilenet, proxyless = blocks_of(networks["mobilenet_v2"]), blocks_of(networks["proxyless_mobile"])
    found = []
    for preset, device in DEVICES.items():
        found += _latency(data, preset, device, mobilenet)
    return found + _memory(data, mobilenet, proxyless)


def _latency(data: Path, preset: str, device: str, mobilenet: list[Block]) -> list[Line]:
    names, work, cycles = cycles_of(data, device)
    seconds = zip(names, work, cycles / CLOCK_HZ, strict=True)
    fitted = {name: _time_of(preset, macs) / each - 1.0 for name, macs, each in seconds}
    held: dict[str, float] = {}
    for index, name in enumerate(names):
        others = [i for i in range(len(names)) if i != index]
        held[name] = float(work[index] / rate(work[others], cycles[others]) / cycles[index] - 1.0)
    totals = measured(data, device)
    unseen = {}
    if LARGEST[0] in totals:
        unseen[LARGEST[0]] = _time_of(preset, LARGEST[1] * 1e6) * 1e3 / totals[LARGEST[0]][0] - 1.0
    small = rescaled(mobilenet, 0.3, 64, least_last=0)
    unseen[SMALLEST] = float(load(preset).estimate(small).latency_s[0]) * 1e3 / totals[SMALLEST][0] - 1.0
    shown = summary(unseen) | unseen
    return [
        Line(preset, "times of networks", len(names), "fitted", summary(fitted), BAR),
        Line(preset, "times of networks", len(names), "left out", summary(held), BAR),
        Line(preset, "times of the smallest and largest", len(unseen), "unseen", shown, BAR),
    ]


def _time_of(preset: str, macs: float) -> float:
    """Seconds of a network of which the MACs alone are known."""
    row = make_row(OpKind.LINEAR, c=int(macs), k=1, weight_bits=8, activation_bits=8, output_bits=8)
    return float(load(preset).estimate(Workload(row, ["all"])).latency_s[0])


def _memory(data: Path, mobilenet: list[Block], proxyless: list[Block]) -> list[Line]:
    built = {
        "mbv2-w0.35": rescaled(mobilenet, 0.35, 144, least_last=0),
        "proxyless-w0.3": rescaled(proxyless, 0.3, 176, least_last=0),
        SMALLEST: rescaled(mobilenet, 0.3, 64, least_last=0),
        "proxyless-w0.3-r176": rescaled(proxyless, 0.3, 176, least_last=0),
    }
    # The accounts of the publication keep input and output apart, as the preset does that is named with them.
    found = []
    for preset, device in (("stm32h743-tflm", ACCOUNTED), *DEVICES.items()):
        peaks = measured(data, device, "peak_sram")
        errors = {name: _peak(preset, built[name]) / peaks[name][0] - 1.0 for name in built if name in peaks}
        figure = summary(errors) | errors
        where = "as accounted" if device == ACCOUNTED else "measured, buffers of the library among them"
        found.append(Line(preset, f"peaks of memory {where}", len(errors), "unseen", figure, {}))
    return found


def _peak(preset: str, work: Workload) -> Floats:
    """KiB of activations at the peak."""
    peak: Floats = load(preset).estimate(work).peak_activation_bytes[0] / 1024.0
    return peak
