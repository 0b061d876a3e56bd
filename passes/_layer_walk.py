"""Many batches through a graph at once, layer by layer: how weights are fitted to what the layers see."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import torch
from torch import fx
from torch.utils import _pytree as pytree

from fxopt.errors import DataError
from fxopt.graph.shapes import TRACE_META
from fxopt.passes._calibrate import batches as batches_of
from fxopt.passes._calibrate import feed

__all__ = ["Leaves", "Values", "draw_positions", "read_inputs", "walk"]

Leaves: TypeAlias = list[Any]
"""Values of a graph's inputs for one batch, in order."""

Values: TypeAlias = dict[fx.Node, Any]
"""Values of the nodes that are still read, for one batch."""


def read_inputs(gm: fx.GraphModule, data: Iterable[Any], samples: int, memory: int = 2**30) -> list[Leaves]:
    """Values of the graph's inputs, batch by batch.

    Args:
        gm: The graph.
        data: Batches as the graph takes them; what comes behind its inputs, such as labels, is left out.
        samples: Samples to read; fewer are, if the values of one layer for all of them would not fit in ``memory``.
        memory: Bytes.

    Raises:
        DataError: If there is no batch or one does not fit the graph.
    """
    most = max(1, min(samples, memory // (4 * _peak_elements(gm))))
    found: list[Leaves] = []
    left = most
    for number, batch in enumerate(batches_of(data, gm)):
        args, kwargs = feed(gm, batch, f"Reconstruction batch {number}")
        leaves = pytree.tree_leaves((args, kwargs))
        count = _samples(leaves)
        if gm.meta.get(TRACE_META, {}).get("dynamic_batch") and 1 < left < count:
            leaves = [one[:left] if isinstance(one, torch.Tensor) and len(one) == count else one for one in leaves]
        found.append(leaves)
        left -= count
        if left < 1:
            break
    if not found:
        raise DataError("There is no batch to reconstruct from; give a loader that yields at least one.")
    return found


def draw_positions(path: str, count: int, batches: Sequence[Leaves], rows: int, seed: int) -> tuple[torch.Tensor, ...]:
    """Output positions of a layer to look at, drawn at random for each batch, in rising order.

    Args:
        path: The layer's path; layers draw apart.
        count: Output positions of one sample.
        batches: The batches.
        rows: Positions of all samples of all batches to look at; all of a sample's at most.
        seed: The seed.
    """
    taken = min(count, -(-rows // sum(_samples(leaves) for leaves in batches)))
    generator = torch.Generator().manual_seed(zlib.crc32(path.encode()) + seed)
    return tuple(torch.randperm(count, generator=generator)[:taken].sort().values for _ in batches)


def walk(
    gm: fx.GraphModule,
    batches: Sequence[Leaves],
    before: Callable[[fx.Node, Sequence[Values]], None] | None = None,
    after: Callable[[fx.Node, Sequence[Values]], None] | None = None,
) -> None:
    """Run a graph node by node, every node for all batches before the next one.

    Args:
        gm: The graph.
        batches: Values of the graph's inputs.
        before: Told each node before it runs, with the values of every batch; it may change the node's module.
        after: Told each node when it has run.
    """
    interpreter = fx.Interpreter(gm)
    values: list[Values] = [{} for _ in batches]
    inputs = {node: index for index, node in enumerate(gm.graph.find_nodes(op="placeholder"))}
    for node in gm.graph.nodes:
        if node.op == "output":
            return
        if before is not None:
            before(node, values)
        for one, leaves in zip(values, batches, strict=True):
            interpreter.env = one
            one[node] = leaves[inputs[node]] if node in inputs else interpreter.run_node(node)
        if after is not None:
            after(node, values)
        for done in interpreter.user_to_last_uses.get(node, ()):
            for one in values:
                one.pop(done, None)


def _samples(leaves: Leaves) -> int:
    sizes = [one.shape[0] for one in leaves if isinstance(one, torch.Tensor) and one.dim()]
    return int(sizes[0]) if sizes else 1


def _peak_elements(gm: fx.GraphModule) -> int:
    """The most elements of one sample that are alive at once, at the example's sizes."""
    last: dict[fx.Node, int] = {}
    nodes = list(gm.graph.nodes)
    for index, node in enumerate(nodes):
        last |= dict.fromkeys(node.all_input_nodes, index)
    dying: dict[int, int] = {}
    alive = peak = 1
    for index, node in enumerate(nodes):
        tensors = [one for one in pytree.tree_leaves(node.meta.get("val")) if isinstance(one, torch.Tensor)]
        size = sum(one.numel() for one in tensors) if node.op != "get_attr" else 0
        alive += size
        dying[last.get(node, index)] = dying.get(last.get(node, index), 0) + size
        peak = max(peak, alive)
        alive -= dying.pop(index, 0)
    batch = gm.meta.get(TRACE_META, {}).get("batch", 1)
    return max(1, int(peak) // max(1, int(batch)))
