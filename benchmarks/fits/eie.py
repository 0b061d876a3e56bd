"""Fit the balance of the preset ``eie``, the share of cycles that its elements do not wait, and print it.

One point: the frames a second that the paper states of the compressed fully connected layers of AlexNet.
Usage: ``python fits/eie.py DATA`` from the folder of the benchmarks.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from fits.networks import measured
from fxopt.targets import OpKind, Workload, make_row
from fxopt.targets.rows import macs

__all__ = ["LAYERS", "balance", "frame"]

CLOCK_HZ = 800e6
ELEMENTS = 64

LAYERS = {"fc6": (9216, 4096, 0.09, 0.35), "fc7": (4096, 4096, 0.09, 0.35), "fc8": (4096, 1000, 0.25, 0.375)}
"""Inputs, outputs, density of weights and of activations (Han et al., 'EIE', table 3)."""


def frame() -> Workload:
    """One sample through the three layers."""
    rows = [
        make_row(OpKind.LINEAR, c=c, k=k, weight_density=w, activation_density=a, weight_bits=4, activation_bits=16)
        for c, k, w, a in LAYERS.values()
    ]
    return Workload(np.concatenate(rows), list(LAYERS))


def balance(frames_per_s: float) -> float:
    """Cycles of products over cycles of a frame."""
    rows = frame().rows[0]
    products = float(np.sum(macs(rows) * rows["weight_density"] * rows["activation_density"]))
    return products / ELEMENTS / CLOCK_HZ * frames_per_s


def main() -> None:
    frames = measured(Path(sys.argv[1]), "EIE 64PE", "throughput")["AlexNet FC (compressed)"][0]
    print(f"eie: balance = {balance(frames):.3g}")


if __name__ == "__main__":
    main()
