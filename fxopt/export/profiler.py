"""The profiler behind the measured host target: what single operators take in onnxruntime on this machine."""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fxopt.errors import ExportError
from fxopt.export._micro import Micro, build
from fxopt.export._runtime import host_fingerprint, make_session
from fxopt.targets.rows import ROW_DTYPE, Rows

__all__ = ["host_fingerprint", "onnxruntime_profiler"]

_WARM_UP = 3
_SHORTEST_S = 1e-6
"""onnxruntime counts whole microseconds; what takes less is not resolved."""


def onnxruntime_profiler(rows: Rows, *, threads: int = 1, runs: int = 20) -> NDArray[np.float64]:
    """Time operators in onnxruntime, each in a small model of its own.

    Only the operator's kernels count, by onnxruntime's profile: conversions of type and layout around them would not
    be there inside a network. The figure is the mean of the lower half of the runs, which other load disturbs least.

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
    flat = rows.reshape(-1)
    seconds = np.full(len(flat), np.nan)
    for index, row in enumerate(flat):
        micro = build(row)
        if micro is not None:
            seconds[index] = _time(micro, threads, runs)
    return seconds.reshape(rows.shape)


def _time(micro: Micro, threads: int, runs: int) -> float:
    with tempfile.TemporaryDirectory(prefix="fxopt-") as folder:
        prefix = str(Path(folder, "profile"))
        session = make_session(micro.model.SerializeToString(), threads=threads, profile_prefix=prefix)
        for _ in range(_WARM_UP + runs):
            session.run(None, dict(micro.feed))
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    durations: dict[str, list[float]] = defaultdict(list)
    for event in events:
        if event.get("cat") != "Node" or not event["name"].endswith("_kernel_time"):
            continue
        if event["args"]["op_name"] not in micro.ignored:
            durations[event["name"]].append(event["dur"] * 1e-6)
    return max(sum(_lower_mean(times[_WARM_UP:]) for times in durations.values()), _SHORTEST_S)


def _lower_mean(times: list[float]) -> float:
    ordered = np.sort(times)
    return float(ordered[: (len(ordered) + 1) // 2].mean())
