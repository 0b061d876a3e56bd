"""The sparse engine against what its paper states of the whole chip."""

from __future__ import annotations

from pathlib import Path

from fits.eie import frame
from fits.networks import measured

from accuracy import Line
from fxopt.targets import OpKind, Workload, load, make_row

__all__ = ["lines"]


def lines(data: Path) -> list[Line]:
    """All comparisons of the family."""
    frames = measured(data, "EIE 64PE", "throughput")
    target = load("eie")
    rate = 1.0 / float(target.estimate(frame()).latency_s[0])
    # Without zeros, a product is two operations; the figure of the paper counts no waiting.
    dense = Workload(make_row(OpKind.LINEAR, c=1000, k=1000, weight_bits=4, activation_bits=16), ["dense"])
    peak = 2e6 / float(target.estimate(dense).latency_s[0]) / 1e9
    fitted = {"max": abs(rate / frames["AlexNet FC (compressed)"][0] - 1.0)}
    unseen = {"reached": peak / frames["peak"][0]}
    return [
        Line("eie", "frames a second of AlexNet's last three layers", 1, "fitted", fitted, {"max": 0.01}),
        Line("eie", "operations a second, share of the peak", 1, "unseen", unseen, {}),
    ]
