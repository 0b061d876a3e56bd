"""What each operator's time goes to on a target, and what would make it shorter."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fxopt.report._data import BOUNDS, Bound, SlowLine, TimeLine
from fxopt.targets import OpKind, Target, Workload, make_row
from fxopt.targets._presets import PresetTarget
from fxopt.targets.base import RowCosts
from fxopt.targets.roofs import Roofs, roofs

__all__ = ["MOST_SLOW", "BoundOf", "bounds", "slow_lines", "time_lines"]

MOST_SLOW = 12
"""Operators that are told why they are slow."""

_PART = 0.5
"""Of an operator's time; what takes less does not bound it."""

_LITTLE_WORK = 8.0
"""MACs for each byte; with less, values are fetched and hardly used. Asked where a target has no bandwidth."""

_LAYOUT = (OpKind.COPY, OpKind.RESIZE, OpKind.EMBEDDING, OpKind.UNKNOWN)
_FIXED = "every run"

_ALIKE = ("weight_bits", "activation_bits", "output_bits", "kernel_d", "kernel_h", "kernel_w")
"""Besides its kind, what the smallest operator has in common with one: targets cost kernels of one position apart."""

_REMEDIES: Mapping[Bound, str] = {
    "compute": "Fewer channels or bits shorten it; far below the peak, a dense operator uses the device better.",
    "memory": "Fewer bits of weights and activations, or a lower resolution; fewer MACs alone do not help.",
    "launch": "It takes this long however small it is: leave it out, or choose another operator.",
    "layout": "It only moves values: arrange the layers around it so that it is not needed.",
    "": "",
}


@dataclass(frozen=True)
class BoundOf:
    """What an operator's time goes to.

    Attributes:
        bound: The kind.
        why: The figures that say so.
    """

    bound: Bound
    why: str


def bounds(target: Target, workload: Workload) -> tuple[BoundOf, ...]:
    """What the time of every operator goes to.

    An operator is bound by *launch* if one of its kind and kernel with one channel and one output would take at least
    half as long; else by *layout* if it computes nothing; by *memory* if it has no multiply-accumulates or if its bytes
    take at least half of its time at the target's bandwidth (the slope of its roofline: Williams et al., CACM 52(4),
    2009); and else by *compute*, however little of the peak it reaches. Where the target has no bandwidth, an operator
    waits for memory that reaches less than half of the peak at fewer than 8 multiply-accumulates for each byte.

    Args:
        target: The target.
        workload: One policy.
    """
    costs = target.estimate(workload).rows
    least = _least(target, workload, costs)
    return tuple(_bound(target, workload, costs, index, least[index]) for index in range(len(workload.names)))


def time_lines(target: Target, before: Workload, after: Workload) -> tuple[TimeLine, ...]:
    """The predicted latency by what it goes to; parts that take no time are left out."""
    parts = [_parts(target, one) for one in (before, after)]
    lines = (TimeLine(part, parts[0][part], parts[1][part]) for part in (*BOUNDS, _FIXED))
    return tuple(line for line in lines if line.before_s or line.after_s)


def slow_lines(
    target: Target, workload: Workload, found: Sequence[BoundOf], frozen: Mapping[str, str]
) -> tuple[SlowLine, ...]:
    """The costliest operators of a workload of one policy, the costliest first.

    Args:
        target: The target.
        workload: One policy.
        found: What :func:`bounds` says of it.
        frozen: What keeps the channels of a layer from being cut, by site.
    """
    estimate = target.estimate(workload)
    whole, times = float(estimate.latency_s[0]), estimate.rows.latency_s[0]
    lines = []
    for index in np.argsort(-times, kind="stable")[:MOST_SLOW].tolist():
        seconds, one, site = float(times[index]), found[index], workload.names[index]
        if not (one.bound and whole > 0.0):
            continue
        kind = OpKind(int(workload.rows["kind"][0, index])).name.lower()
        barrier = frozen.get(site, "")
        lines.append(
            SlowLine(site, kind, seconds, seconds / whole, one.bound, one.why, barrier, _remedy(one.bound, barrier))
        )
    return tuple(lines)


def _remedy(bound: Bound, barrier: str) -> str:
    if bound == "compute" and barrier:
        return "Fewer bits, or another operator in the place of what freezes its channels."
    return _REMEDIES[bound]


def _parts(target: Target, workload: Workload) -> dict[str, float]:
    estimate = target.estimate(workload)
    times = estimate.rows.latency_s[0]
    parts: dict[str, float] = dict.fromkeys((*BOUNDS, _FIXED), 0.0)
    for seconds, one in zip(times.tolist(), bounds(target, workload), strict=True):
        if one.bound:
            parts[one.bound] += seconds
    fixed = float(estimate.latency_s[0]) - float(times.sum())
    parts[_FIXED] = fixed if fixed > 1e-9 * float(estimate.latency_s[0]) else 0.0
    return parts


def _least(target: Target, workload: Workload, costs: RowCosts) -> list[float]:
    """What an operator of each row's kind and widths costs however small it is.

    A target that is measured is not asked about operators that nobody has: there it is the least that any operator of
    the workload takes.
    """
    times = costs.latency_s[0]
    if not isinstance(target, PresetTarget):
        taken = times[times > 0.0]
        return [float(taken.min()) if taken.size > 1 else 0.0] * len(times)

    @functools.cache
    def smallest(kind: int, *values: int) -> float:
        row = make_row(OpKind(kind), **dict(zip(_ALIKE, values, strict=True)))
        return float(target.estimate(Workload(row, ["smallest"])).rows.latency_s[0, 0])

    return [smallest(*(int(row[name]) for name in ("kind", *_ALIKE))) for row in workload.rows[0]]


def _bound(target: Target, workload: Workload, costs: RowCosts, index: int, least: float) -> BoundOf:
    seconds, work, moved = (float(part[0, index]) for part in (costs.latency_s, costs.macs, costs.dram_bytes))
    row = workload.rows[0, index]
    kind = OpKind(int(row["kind"]))
    if not seconds > 0.0:
        return BoundOf("", "")
    if least >= _PART * seconds:
        return BoundOf("launch", f"the smallest operator of its kind takes {least / seconds:.0%} of its time")
    if kind in _LAYOUT:
        return BoundOf("layout", f"it moves {moved / 1e3:.3g} KB and computes nothing")
    if not work > 0.0:
        return BoundOf("memory", f"it has no multiply-accumulates and moves {moved / 1e3:.3g} KB")
    weight_bits = int(row["activation_bits"] if kind == OpKind.MATMUL else row["weight_bits"])
    return _by_roofs(_roofs(target, weight_bits, int(row["activation_bits"])), seconds, work, moved)


def _roofs(target: Target, weight_bits: int, activation_bits: int) -> Roofs:
    return roofs(target, [(weight_bits, activation_bits)])


def _by_roofs(found: Roofs, seconds: float, work: float, moved: float) -> BoundOf:
    intensity = work / moved if moved > 0.0 else float("inf")
    words = f"{intensity:.3g} MACs for each byte moved" if moved > 0.0 else "nothing is moved"
    if not found.peaks:
        return BoundOf("memory" if intensity < _LITTLE_WORK else "compute", f"{words}; the target has no roofs to tell")
    peak, bandwidth = found.peaks[0].macs_per_s, found.bandwidth_bytes_per_s
    reached = work / seconds / peak
    words = f"{f'{reached:.0%}' if reached >= 0.01 else 'under 1%'} of the peak rate, {words}"
    if bandwidth is None:
        slow = work / peak < _PART * seconds and intensity < _LITTLE_WORK
        return BoundOf("memory" if slow else "compute", words)
    waiting = moved / bandwidth / seconds
    words += f"; moving them takes {min(waiting, 1.0):.0%} of its time"
    return BoundOf("memory" if waiting >= _PART else "compute", words)
