"""Bits for each layer that cost least on a target, at one loss of precision for all targets."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from accuracy.bismo import layers, with_bits
from fxopt.search.solver import solve
from fxopt.targets import Workload, load

__all__ = ["ACCELERATORS", "crossed"]

Floats = NDArray[np.float64]

# HW1, HW2 and HW3 of Wang et al., 'HAQ'.
ACCELERATORS = ("bitfusion", "zynq7020", "vu9p")
WIDTHS = range(2, 9)
PAIRS = [(w, a) for w in WIDTHS for a in WIDTHS]


@cache
def noise(bits: int, *, positive: bool) -> float:
    """Noise over signal of the best uniform quantizer of a normal variable, or of its positive half (after a ReLU)."""
    values = np.linspace(0.0, 8.0, 8001)
    density = np.exp(-(values**2) / 2.0)
    levels = 2**bits
    errors = []
    for step in np.geomspace(1.0 / levels, 16.0 / levels, 100):
        if positive:
            nearest = np.clip(np.round(values / step), 0, levels - 1) * step
        else:
            nearest = np.minimum(np.floor(values / step) + 0.5, levels / 2 - 0.5) * step
        errors.append(float(((values - nearest) ** 2 * density).sum()))
    return min(errors) / float((values**2 * density).sum())


def losses() -> Floats:
    """The loss of a layer with each pair of widths: the noise that its weights and its activations add to its output.

    Relative to the signal these are what the two have, whatever the layer's size; norms then bring the signal back to
    one scale, so that the noise of layers adds up.
    """
    return np.array([noise(w, positive=False) + noise(a, positive=True) for w, a in PAIRS])


def times(data: Path, network: str, target: str) -> Floats:
    """Seconds of every layer with each pair of widths, its output in 8 bits, shape (layers, pairs)."""
    found = load(target)
    rows = layers(data, network, found.capabilities.batch)
    rows["output_bits"] = 8
    names = [str(index) for index in range(len(rows))]
    workload = Workload(np.stack([with_bits(rows, *pair) for pair in PAIRS]), names)
    latency_s: Floats = found.estimate(workload).rows.latency_s
    return latency_s.T


def crossed(data: Path, network: str, bits: int, targets: Sequence[str] = ACCELERATORS) -> Floats:
    """Seconds of the policy made for each target (rows) on each target (columns).

    A policy has the least latency of all whose loss is at most that of a uniform network of ``bits``; that is solved
    exactly, over all layers and all pairs of 2 to 8 bits.
    """
    loss, costs = losses(), [times(data, network, target) for target in targets]
    count = len(costs[0])
    limit = count * loss[PAIRS.index((bits, bits))]
    made = [solve([*cost], [loss] * count, [limit]).indices for cost in costs]
    return np.array([[cost[np.arange(count), policy].sum() for cost in costs] for policy in made])
