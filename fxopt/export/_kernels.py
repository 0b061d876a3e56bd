"""How long each kernel of a model takes, by onnxruntime's own profile."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fxopt.export._runtime import make_session

__all__ = ["KernelTime", "kernel_times"]

_WARM_UP = 3
_SHORTEST_S = 0.5e-6
"""onnxruntime counts whole microseconds; half of one stands for what takes less."""


@dataclass(frozen=True)
class KernelTime:
    """One kernel of the graph that onnxruntime runs, in the order in which they run.

    Attributes:
        name: Its name; it begins with that of a node of the file or of that node's output.
        operator: Its operator, such as ``QLinearConv``.
        seconds: The mean over the lower half of the runs, which other load disturbs least.
        elements: Elements of its first output.
    """

    name: str
    operator: str
    seconds: float
    elements: int


def kernel_times(
    model: str | os.PathLike[str] | bytes, feed: Mapping[str, NDArray[Any]], *, threads: int = 1, runs: int = 20
) -> list[KernelTime]:
    """Run a model under onnxruntime's profiler.

    Args:
        model: A file, or a serialized model.
        feed: Its inputs by name.
        threads: Threads inside an operator.
        runs: Runs that count, after a few that do not.

    Raises:
        ExportError: If onnxruntime cannot load the model.
    """
    with tempfile.TemporaryDirectory(prefix="fxopt-") as folder:
        session = make_session(model, threads=threads, profile_prefix=str(Path(folder, "profile")))
        for _ in range(_WARM_UP + runs):
            session.run(None, dict(feed))
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    seen: dict[str, tuple[str, int, list[float]]] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            name = event["name"].removesuffix("_kernel_time")
            entry = seen.setdefault(name, (event["args"]["op_name"], _elements(event["args"]), []))
            entry[2].append(max(event["dur"] * 1e-6, _SHORTEST_S))
    return [KernelTime(name, kind, _lower_mean(times[_WARM_UP:]), size) for name, (kind, size, times) in seen.items()]


def _elements(arguments: Mapping[str, Any]) -> int:
    shapes = arguments.get("output_type_shape") or [{}]
    return int(np.prod(next(iter(shapes[0].values()), [0])))


def _lower_mean(times: list[float]) -> float:
    ordered = np.sort(times)
    return float(ordered[: (len(ordered) + 1) // 2].mean())
