"""Why fewer multiply-accumulates may not mean less time."""

from __future__ import annotations

from fxopt.report._data import Metrics
from fxopt.report._roofline import roofline
from fxopt.targets import Target, Workload
from fxopt.targets.roofs import roofs

__all__ = ["lagging"]

_TELLING_SAVING = 0.1
"""Of the MACs; where less is saved, nothing is said."""

_PART = 0.5
"""A saving of time lags if it is less than this part of the saving of MACs."""


def lagging(target: Target, before: Metrics, after: Metrics, result: Workload) -> tuple[str, ...]:
    """Notes on a result whose time fell much less than its MACs: how much less, and where the time is spent.

    Args:
        target: The target.
        before: Metrics of the model as it was.
        after: Metrics of the result.
        result: The result, one policy.
    """
    if not (before.macs and before.latency_s):
        return ()
    work, time = after.macs / before.macs, after.latency_s / before.latency_s
    found = []
    if _lags(work, time):
        found.append(
            f"The MACs fell to {work:.0%}, the latency predicted for {target.name} to {time:.0%}: "
            f"{_where(target, result)}. Fewer channels help little there; a budget of latency in place of MACs finds "
            "what does help."
        )
    if before.measured_latency_s and after.measured_latency_s is not None:
        measured = after.measured_latency_s / before.measured_latency_s
        if _lags(work, measured):
            found.append(
                f"The MACs fell to {work:.0%}, the latency measured on this machine to {measured:.0%}: with "
                f"{after.macs / 1e6:.3g} M MACs left, much of a run is starting operators and moving data."
            )
    return tuple(found)


def _lags(work: float, time: float) -> bool:
    return 1.0 - work >= _TELLING_SAVING and 1.0 - time < _PART * (1.0 - work)


def _where(target: Target, result: Workload) -> str:
    """What the time that is left is spent on, besides arithmetic."""
    estimate = target.estimate(result)
    costs, whole = estimate.rows, float(estimate.latency_s[0])
    times = costs.latency_s[0]
    shares = (
        (whole - float(times.sum()), "what every run costs"),
        (float(times[costs.macs[0] == 0.0].sum()), "operators without multiply-accumulates"),
        (_waiting(target, result), "layers that wait for memory"),
    )
    parts = [f"{share / whole:.0%} of it is {what}" for share, what in shares if share >= 0.01 * whole]
    return ", ".join(parts) or "the layers that are left make poor use of it"


def _waiting(target: Target, result: Workload) -> float:
    """Time of the layers with fewer MACs for each byte than the target has, by its roofline."""
    waiting = 0.0
    for point in roofline(target, result).points:
        weight, activation = map(int, point.bits.split("/"))
        found = roofs(target, [(weight, activation)])
        if found.peaks and found.bandwidth_bytes_per_s:
            enough = found.peaks[0].macs_per_s / found.bandwidth_bytes_per_s
            waiting += point.latency_s if point.intensity < enough else 0.0
    return waiting
