"""Fit the rates of the presets of the family ``mcu``, one for each library, and print them.

One figure a library: T = MACs / (clock * mac_per_cycle), least squares on relative errors over whole networks.
Usage: ``python fits/mcu.py DATA`` from the folder of the benchmarks.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from fits.networks import measured
from fxopt.targets.rows import Floats

__all__ = ["CLOCK_HZ", "DEVICES", "MEGA_MACS", "cycles_of", "rate"]

CLOCK_HZ = 480e6
DEVICES = {
    "stm32h743-x-cube-ai": "STM32H743-480MHz/X-CUBE-AI",
    "stm32h743-tflm": "STM32H743-480MHz/TFLite-Micro",
}

# Multiply-accumulates in millions that github.com/mit-han-lab/mcunet states of its models, whose layers it keeps in
# files of their own. What is compared with measurements is the time that follows.
MEGA_MACS = {
    "mcunet-vww0": 6.0,
    "mcunet-vww1": 11.6,
    "mcunet-vww2": 55.8,
    "mcunet-in0": 6.4,
    "mcunet-in1": 12.8,
    "mcunet-in2": 67.3,
    "mcunet-in3": 81.8,
    "proxyless-w0.3-r176": 38.3,
}


def cycles_of(data: Path, device: str) -> tuple[tuple[str, ...], Floats, Floats]:
    """Names, MACs and measured cycles of the networks whose MACs are stated."""
    totals = measured(data, device)
    names = tuple(name for name in totals if name in MEGA_MACS)
    work = np.array([MEGA_MACS[name] * 1e6 for name in names])
    return names, work, np.array([totals[name][0] * 1e-3 * CLOCK_HZ for name in names])


def rate(work: Floats, cycles: Floats) -> float:
    """MACs a cycle of least squared relative error of the cycles."""
    ratios = work / cycles
    return float(np.sum(ratios**2) / np.sum(ratios))


def main() -> None:
    data = Path(sys.argv[1])
    presets: Mapping[str, str] = DEVICES
    for preset, device in presets.items():
        names, work, cycles = cycles_of(data, device)
        found = rate(work, cycles)
        errors = work / found / cycles - 1.0
        print(f"{preset}: mac_per_cycle.8 = {found:.4g} ({len(names)} networks)")
        print("  " + ", ".join(f"{name} {error:+.1%}" for name, error in zip(names, errors, strict=True)))


if __name__ == "__main__":
    main()
