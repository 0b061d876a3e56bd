"""Which layers to quantize so that the whole is fastest in onnxruntime on this machine.

An integer kernel is not always the faster one: the activation function behind a convolution may lose more on integers
than the convolution gains, and every change between floats and integers costs a pass over the tensor. The model is
profiled in floats and in integers, each layer with the operators behind it. The best assignment, changes included, is
a minimum cut: layers stand on the side of floats or of integers, and the edges between them weigh what a change costs.
What comes of it is exported and measured whole, beside the all-float and the all-integer file, and the fastest wins.
"""

from __future__ import annotations

import math
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import fx

from fxopt.decisions import Capabilities, Policy, SearchSpace
from fxopt.export._clock import feed_for
from fxopt.export._export import export_onnx
from fxopt.export._kernels import KernelTime, kernel_times, names_of, stem
from fxopt.export._measure import measure
from fxopt.export._runtime import make_session
from fxopt.graph import shape
from fxopt.graph.matrix_products import matrix_products
from fxopt.passes import FoldBatchNorm, Quantize
from fxopt.passes.quantize import FLOAT

__all__ = ["INTEGER", "FastestBits", "fastest_bits"]

INTEGER = (8, 8)
"""Bits of weights and activations that onnxruntime has integer kernels for."""
_CHANGES = ("QuantizeLinear", "DequantizeLinear", "Transpose", "ReorderInput", "ReorderOutput")
_WEIGHTS_OF_CHANGES = (0.5, 2.0)
"""What a change costs is known least: it may hide in a kernel. Several weights give several assignments to measure."""


@dataclass(frozen=True)
class FastestBits:
    """What :func:`fastest_bits` found.

    Attributes:
        policy: ``(8, 8)`` or ``(32, 32)`` for every layer and product of activations that can be quantized.
        median_s: Measured seconds of a sample with this policy.
        float_s: The same for the file in floats.
        integer_s: The same for the file with all layers quantized.
    """

    policy: Policy
    median_s: float
    float_s: float
    integer_s: float


def fastest_bits(
    gm: fx.GraphModule, example_inputs: object, quantize: Quantize | None = None, *, threads: int = 1, runs: int = 25
) -> FastestBits:
    """Decide for every layer between floats and 8 bits by what onnxruntime takes on this machine.

    Products of activations stand on the side where values change least; all of them in floats is tried too.

    Args:
        gm: A graph from ``fxopt.trace``; it is not changed.
        example_inputs: As for ``fxopt.trace``; measured at a batch of one.
        quantize: The pass that quantizes, with its options; its calibration does not matter to speed.
        threads: Threads inside an operator.
        runs: Rounds in which the files are measured in turn.

    Returns:
        The fastest assignment that was measured. All in floats if nothing quantized is faster.

    Raises:
        FxoptError: If the graph cannot be quantized or exported.
    """
    one = quantize or Quantize()
    graph = FoldBatchNorm()(gm).graph_module
    space = one.search_space(graph, Capabilities({"*": (INTEGER, FLOAT)}))
    with tempfile.TemporaryDirectory(prefix="fxopt-") as folder:
        bench = _Bench(graph, one, example_inputs, space, Path(folder), threads)
        everything = frozenset(decision.site for decision in space)
        layers = frozenset(decision.site for decision in space if decision.operator != "matmul")
        files = {chosen: bench.file(chosen) for chosen in (frozenset[str](), everything)}
        if layers != everything:
            files[layers] = bench.file(layers)
        for chosen in _assignments(bench, everything, files) if everything else ():
            if chosen not in files:
                files[chosen] = bench.file(chosen)
        timed = measure(files[frozenset()], example_inputs, runs=runs, threads=threads, peers=list(files.values()))
    found = dict(zip(files, timed.peers, strict=True))
    best = min(found, key=lambda chosen: found[chosen].ratio)
    floats, integers = found[frozenset()], found[everything]
    return FastestBits(bench.policy(best), found[best].median_s, floats.median_s, integers.median_s)


class _Bench:
    """Files of one graph with different layers quantized, and what their kernels take."""

    def __init__(
        self,
        graph: fx.GraphModule,
        quantize: Quantize,
        example_inputs: object,
        space: SearchSpace,
        folder: Path,
        threads: int,
    ) -> None:
        self._graph = graph
        self._quantize = quantize
        self._inputs = example_inputs
        self._space = space
        self._folder = folder
        self._threads = threads
        self._written = 0

    def policy(self, integer: frozenset[str]) -> Policy:
        """The policy that quantizes these layers."""
        return Policy({decision.key: INTEGER if decision.site in integer else FLOAT for decision in self._space})

    def file(self, integer: frozenset[str]) -> Path:
        """The exported graph with these layers quantized."""
        self._written += 1
        made = self._quantize.with_policy(self.policy(integer))(self._graph).graph_module
        return export_onnx(made, self._folder / f"{self._written}.onnx", self._inputs, check=False).path

    def times(self, file: Path) -> tuple[dict[str, float], list[KernelTime]]:
        """Seconds of each layer with all that runs behind it until the next, and all kernels."""
        import onnx

        session = make_session(file, threads=self._threads)
        feed = feed_for(session, file, self._inputs, 1)
        times = kernel_times(file, feed, threads=self._threads)
        site_of = names_of(onnx.load(file, load_external_data=False), {decision.site for decision in self._space})
        seconds: dict[str, float] = defaultdict(float)
        last = ""
        for kernel in times:
            last = site_of.get(stem(kernel.name), last)
            seconds[last] += kernel.seconds
        return seconds, times

    def values(self) -> Iterator[tuple[tuple[str, str], int]]:
        """Every value between two operators, with the elements of it that a sample has.

        A layer goes by its path, a product of activations by its site, any other operator by its node's name.
        """
        nodes = self._graph.graph.nodes
        names = {node: str(node.target) if node.op == "call_module" else node.name for node in nodes}
        names |= {product.node: product.site for product in matrix_products(self._graph)}
        for node in nodes:
            if not isinstance(node.meta.get("val"), torch.Tensor) or node.op == "get_attr":
                continue
            for reader in node.users:
                if reader.op != "output":
                    yield (names[node], names[reader]), math.prod(shape(node)[1:])


def _assignments(
    bench: _Bench, sites: frozenset[str], files: Mapping[frozenset[str], Path]
) -> Iterator[frozenset[str]]:
    """The layers to quantize by minimum cuts, changes weighed differently."""
    floats, before = bench.times(files[frozenset()])
    integers, after = bench.times(files[sites])
    changes = [(pair, _change_s([*before, *after], elements)) for pair, elements in bench.values()]
    for weight in _WEIGHTS_OF_CHANGES:
        yield _cut(sites, floats, integers, [(pair, weight * cost) for pair, cost in changes])


def _change_s(kernels: Sequence[KernelTime], elements: int) -> float:
    """What a change between floats and integers takes: two kernels, one that converts and one that reorders.

    The kernel that takes least says what any kernel takes; those that convert or move say what an element takes.
    """
    least = min(kernel.seconds for kernel in kernels)
    passes = [kernel for kernel in kernels if kernel.operator in _CHANGES]
    moved = sum(kernel.elements for kernel in passes)
    rate = sum(max(kernel.seconds - least, 0.0) for kernel in passes) / moved if moved else 0.0
    return 2.0 * (least + rate * elements)


def _cut(
    sites: Iterable[str],
    floats: Mapping[str, float],
    integers: Mapping[str, float],
    changes: Sequence[tuple[tuple[str, str], float]],
) -> frozenset[str]:
    """The layers on the side of integers in the cheapest assignment."""
    import networkx as nx

    flow = nx.DiGraph()
    for site in sites:
        flow.add_edge("float", site, capacity=integers.get(site, 0.0))
        flow.add_edge(site, "integer", capacity=floats.get(site, 0.0))
    for (one, other), cost in changes:
        for pair in ((one, other), (other, one)):
            known = flow.get_edge_data(*pair, {"capacity": 0.0})["capacity"]
            flow.add_edge(*pair, capacity=known + cost)
    _, (_, side) = nx.minimum_cut(flow, "float", "integer")
    return frozenset(site for site in sites if site in side)
