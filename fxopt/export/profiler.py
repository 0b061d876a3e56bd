"""The profiler behind the measured host target: what single operators take in onnxruntime on this machine."""

from __future__ import annotations

import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fxopt.errors import ExportError
from fxopt.export._kernels import lower_mean
from fxopt.export._micro import Micro, build
from fxopt.export._runtime import host_fingerprint, make_session
from fxopt.targets.rows import ROW_DTYPE, Rows

if TYPE_CHECKING:
    import onnxruntime

__all__ = ["host_fingerprint", "onnxruntime_profiler"]

_WARM_UP = 3
_SHORTEST_S = 1e-6
"""onnxruntime counts whole microseconds; what takes less is not resolved."""
EVICTED_BYTES = 2 << 20
_UNDISTURBED = 0.95


def onnxruntime_profiler(rows: Rows, *, threads: int = 1, runs: int = 20) -> NDArray[np.float64]:
    """Time operators in onnxruntime, each in a small model of its own.

    Only the operator's kernels count, by onnxruntime's profile: conversions of type and layout around them would not
    be there inside a network (but behind a convolution an activation with a curve pays for leaving its layout, which it
    does there too). Operators run in turn, round by round, and the second-level cache is emptied before each, so that
    they find the caches as a network leaves them; and a machine that is faster or slower for a while is so for all of
    them. The figure is the mean of the lower half of the rounds, which other load disturbs least; on one
    thread, runs in which the system gave the processor to others are left out.

    Args:
        rows: Operators, structured array of ``fxopt.targets.rows.ROW_DTYPE``, any shape. With 8-bit activations (and
            weights of at most 8 bits) the integer kernel is timed, with 32 bits the float kernel.
        threads: Threads inside an operator.
        runs: Runs of each operator.

    Returns:
        Seconds, in the shape of ``rows``; NaN for an operator that has no kernel at these bits.

    Raises:
        ExportError: If the array has another type, or ``threads`` or ``runs`` is below 1.
    """
    if rows.dtype != ROW_DTYPE:
        raise ExportError(f"The profiler needs rows of ROW_DTYPE, got {rows.dtype}.")
    if min(threads, runs) < 1:
        raise ExportError(f"threads and runs have to be at least 1, got {threads} and {runs}.")
    seconds = np.full(rows.size, np.nan)
    micros = [(index, micro) for index, row in enumerate(rows.reshape(-1)) if (micro := build(row)) is not None]
    for (index, _), found in zip(micros, _times([micro for _, micro in micros], threads, runs), strict=True):
        seconds[index] = found
    return seconds.reshape(rows.shape)


def _times(micros: Sequence[Micro], threads: int, runs: int) -> list[float]:
    others = np.zeros(EVICTED_BYTES // 8)
    shares: list[list[float]] = [[] for _ in micros]
    with tempfile.TemporaryDirectory(prefix="fxopt-") as folder:
        sessions = [
            make_session(micro.model.SerializeToString(), threads=threads, profile_prefix=str(Path(folder, str(index))))
            for index, micro in enumerate(micros)
        ]
        for _ in range(_WARM_UP + runs):
            for session, micro, share in zip(sessions, micros, shares, strict=True):
                others += 1.0
                share.append(run_once(session, micro))
        profiles = [Path(session.end_profiling()).read_text(encoding="utf-8") for session in sessions]
    if threads > 1:
        shares = [[1.0] * len(share) for share in shares]
    return [
        kernel_seconds(json.loads(profile), micro, share)
        for profile, micro, share in zip(profiles, micros, shares, strict=True)
    ]


def run_once(session: onnxruntime.InferenceSession, micro: Micro) -> float:
    """Run once; of the time that passed, the share in which this thread had a processor."""
    wall_s, processor_s = time.perf_counter(), time.thread_time()
    session.run(None, dict(micro.feed))
    processor_s, wall_s = time.thread_time() - processor_s, time.perf_counter() - wall_s
    return min(processor_s / max(wall_s, 1e-9), 1.0)


def kernel_seconds(events: Sequence[dict[str, Any]], micro: Micro, shares: Sequence[float] = ()) -> float:
    """What an operator took in a profile of its model, whose first runs were to warm up.

    Args:
        events: The profile, as onnxruntime writes it.
        micro: The model.
        shares: For each run, the share of time in which it had a processor; by default all of it.
    """
    durations: dict[str, list[float]] = defaultdict(list)
    for event in events:
        if event.get("cat") != "Node" or not event["name"].endswith("_kernel_time"):
            continue
        if event["args"]["op_name"] not in micro.ignored:
            durations[event["name"]].append(event["dur"] * 1e-6)
    total = 0.0
    for times in durations.values():
        known = np.array(shares) if len(shares) == len(times) else np.ones(len(times))
        total += lower_mean(_undisturbed(np.array(times)[_WARM_UP:], known[_WARM_UP:]))
    return max(total, _SHORTEST_S)


def _undisturbed(times: NDArray[np.float64], shares: NDArray[np.float64]) -> NDArray[np.float64]:
    """Times of runs that kept their processor; at least the quarter that kept it best."""
    # Which part of a run the processor was away in is not known: such times cannot be put right, only left out.
    least = np.sort(shares)[::-1][(len(shares) - 1) // 4]
    kept: NDArray[np.float64] = times[shares >= min(least, _UNDISTURBED)]
    return kept
