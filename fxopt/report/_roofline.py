"""Rooflines: what each operator reaches, under what its target could."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from fxopt.targets import OpKind, Target, Workload
from fxopt.targets.roofs import Roof, roofs

__all__ = ["MOST_PEAKS", "Roofline", "RooflinePoint", "roofline", "save_rooflines"]

MOST_PEAKS = 5
"""Peaks in a picture."""


@dataclass(frozen=True)
class RooflinePoint:
    """An operator with multiply-accumulates.

    Attributes:
        site: Module path, or the node's name.
        kind: Operator kind, such as "conv".
        bits: Bits of weights and activations, as "8/8".
        when: Whether it is the operator of the original or of the result.
        macs: Multiply-accumulates.
        moved_bytes: Bytes to and from memory.
        latency_s: Predicted latency.
    """

    site: str
    kind: str
    bits: str
    when: Literal["before", "after"]
    macs: float
    moved_bytes: float
    latency_s: float

    @property
    def intensity(self) -> float:
        """MACs for each byte moved."""
        return self.macs / self.moved_bytes

    @property
    def macs_per_s(self) -> float:
        """MACs in a second."""
        return self.macs / self.latency_s


@dataclass(frozen=True)
class Roofline:
    """The roofs of a target and the operators under them.

    Attributes:
        target: Name of the target.
        status: "calibrated", "uncalibrated" or "measured".
        peaks: Peaks by widths, the highest first; may be none.
        bandwidth_bytes_per_s: Bandwidth of the memory, or None where the target's model has no such figure.
        note: What the roofs are, or why some are missing.
        points: The operators that take time and move bytes, first those before.
    """

    target: str
    status: str
    peaks: tuple[Roof, ...]
    bandwidth_bytes_per_s: float | None
    note: str
    points: tuple[RooflinePoint, ...]

    @property
    def shown_peaks(self) -> tuple[Roof, ...]:
        """The peaks that a picture has room for: all, or some from the highest to the lowest."""
        count = len(self.peaks)
        if count <= MOST_PEAKS:
            return self.peaks
        return tuple(self.peaks[round(index * (count - 1) / (MOST_PEAKS - 1))] for index in range(MOST_PEAKS))

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Draw it, whole or not at all.

        Args:
            path: A file ending in ``.svg`` or ``.png``.

        Returns:
            The path.

        Raises:
            FxoptError: If the suffix is another one, or the file cannot be written.
        """
        return save_rooflines([self], path)


def save_rooflines(rooflines: Sequence[Roofline], path: str | os.PathLike[str]) -> Path:
    """Draw rooflines beside each other, whole or not at all.

    Args:
        rooflines: One or more.
        path: A file ending in ``.svg`` or ``.png``.

    Returns:
        The path.

    Raises:
        FxoptError: If the suffix is another one, or the file cannot be written.
    """
    from fxopt.report._plot import save

    return save(rooflines, Path(path))


def roofline(target: Target, before: Workload, after: Workload | None = None) -> Roofline:
    """What the operators of a workload reach on a target: operational intensity against throughput.

    Source: Williams, Waterman, Patterson, "Roofline", CACM 52(4), 2009, with a MAC for two of its operations.

    Args:
        target: The target.
        before: One policy: the model as it was.
        after: One policy: the same model optimized, if there is one.

    Returns:
        The roofs and a point for each operator with MACs that the target has a model for.
    """
    points = _points(target, before, "before")
    if after is not None:
        points += _points(target, after, "after")
    widths = [tuple(map(int, point.bits.split("/"))) for point in points]
    found = roofs(target, [(weight, activation) for weight, activation in widths])
    return Roofline(target.name, target.status, found.peaks, found.bandwidth_bytes_per_s, found.note, tuple(points))


def _points(target: Target, workload: Workload, when: Literal["before", "after"]) -> list[RooflinePoint]:
    costs = target.estimate(workload).rows
    amounts = np.stack([costs.macs[0], costs.dram_bytes[0], costs.latency_s[0]], axis=1)
    found = []
    for name, row, (macs, moved, latency_s) in zip(workload.names, workload.rows[0], amounts.tolist(), strict=True):
        if not (macs > 0.0 and moved > 0.0 and latency_s > 0.0 and math.isfinite(latency_s)):
            continue
        weight_bits, activation_bits = int(row["weight_bits"]), int(row["activation_bits"])
        kind = OpKind(int(row["kind"]))
        if kind == OpKind.MATMUL:  # the second factor, in the place of weights, is of activations
            weight_bits = activation_bits
        bits = f"{weight_bits}/{activation_bits}"
        found.append(RooflinePoint(name, kind.name.lower(), bits, when, macs, moved, latency_s))
    return found
