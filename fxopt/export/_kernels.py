"""The kernels that onnxruntime runs a model by, and how long each takes by its own profile."""

from __future__ import annotations

import json
import os
import tempfile
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fxopt.export._runtime import CARRIERS, is_integer, make_session

if TYPE_CHECKING:
    import onnx

__all__ = ["Kernel", "KernelTime", "kernel_times", "kernels_of", "lower_mean", "names_of", "stem"]

_GIVE_WEIGHTS = ("DequantizeLinear", "Cast", "Mul", "Gather")
"""Operators that make a layer's weight of what is stored."""

_WARM_UP = 3
_SHORTEST_S = 0.5e-6
"""onnxruntime counts whole microseconds; half of one stands for what takes less."""


@dataclass(frozen=True)
class Kernel:
    """One node that computes in the graph that onnxruntime really runs.

    Attributes:
        name: The node's name.
        operator: Its operator, such as ``QLinearConv``.
        integer: Whether it computes on integers.
        layer: The layer whose weight it reads, or behind which it stands alone; empty for others.
    """

    name: str
    operator: str
    integer: bool
    layer: str


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
    return [KernelTime(name, kind, lower_mean(times[_WARM_UP:]), size) for name, (kind, size, times) in seen.items()]


def _elements(arguments: Mapping[str, Any]) -> int:
    shapes = arguments.get("output_type_shape") or [{}]
    return int(np.prod(next(iter(shapes[0].values()), [0])))


def lower_mean(times: Sequence[float] | NDArray[np.float64]) -> float:
    """The mean of the faster half of some times: what other work on the machine adds is left out."""
    ordered = np.sort(times)
    return float(ordered[: (len(ordered) + 1) // 2].mean())


def kernels_of(model: onnx.ModelProto, optimized: onnx.ModelProto, sites: Collection[str]) -> tuple[Kernel, ...]:
    """The nodes of an optimized graph that compute, in order; conversions and moves are left out.

    Args:
        model: The model as it was written.
        optimized: What onnxruntime made of it.
        sites: Paths of the layers.
    """
    names = names_of(model, sites)
    makers = {name: node for node in optimized.graph.node for name in node.output}
    found = []
    for node in optimized.graph.node:
        if node.op_type in CARRIERS:
            continue
        layer = names.get(stem(node.name), names.get(stem(node.output[0]), ""))
        found.append(Kernel(node.name, node.op_type, _computes_on_integers(node, makers), layer))
    return tuple(found)


def _computes_on_integers(node: onnx.NodeProto, makers: Mapping[str, onnx.NodeProto]) -> bool:
    """Whether an operator does, or is a clip between a Q and its DQ: that one is there for integers and floats."""
    if node.op_type != "Clip":
        return is_integer(node.op_type)
    maker = makers.get(node.input[0])
    while maker is not None and maker.op_type in (CARRIERS | {"Clip"}) - {"QuantizeLinear", "DequantizeLinear"}:
        maker = makers.get(maker.input[0])
    return maker is not None and (maker.op_type == "QuantizeLinear" or is_integer(maker.op_type))


def stem(name: str) -> str:
    """The name of a file's node or value within the name that an optimized kernel got."""
    return name.removeprefix("fused ").partition("_token_")[0].removesuffix("_nchwc").partition("/")[0]


def names_of(model: onnx.ModelProto, sites: Collection[str]) -> dict[str, str]:
    """The layer behind every name that its kernel may bear: its node's, its output's, those of the node behind it."""
    wanted = set(sites)
    readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
    for node in model.graph.node:
        for name in node.input:
            readers[name].append(node)
    found: dict[str, str] = {}
    for node in model.graph.node:
        owners = {name.rpartition(".weight")[0] for name in node.input} & wanted
        if node.op_type in _GIVE_WEIGHTS or len(owners) != 1:
            continue
        (site,) = owners
        behind = readers[node.output[0]]
        for one in (node, *(behind if len(behind) == 1 else ())):
            found |= {stem(one.name): site, stem(one.output[0]): site}
    return found
