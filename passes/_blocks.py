"""Where a graph falls into blocks: parts that a single tensor enters and leaves."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import fx

__all__ = ["Block", "blocks_of"]


@dataclass(frozen=True)
class Block:
    """A part of a graph.

    Attributes:
        nodes: Its nodes, in order.
        layers: Paths of the layers in it that were asked for.
        end: The node whose value is all that the rest of the graph learns of these layers.
    """

    nodes: tuple[fx.Node, ...]
    layers: tuple[str, ...]
    end: fx.Node


def blocks_of(gm: fx.GraphModule, layers: Collection[str]) -> list[Block]:
    """The blocks of a graph that hold some layers, in order.

    A block ends where one value alone carries on what these layers computed: behind a residual sum, behind the
    concatenations of a dense block, and behind each layer of a chain. What follows a layer without being one, such as
    its activation function and quantizer, belongs to the layer's block; what comes before the first, to the first.

    Args:
        gm: The graph.
        layers: Paths of modules.
    """
    nodes = list(gm.graph.nodes)
    last = {source: index for index, node in enumerate(nodes) for source in node.all_input_nodes}
    parts: list[tuple[list[fx.Node], list[str], fx.Node]] = []
    nodes_now: list[fx.Node] = []
    layers_now: list[str] = []
    alive: set[fx.Node] = set()
    told: set[fx.Node] = set()
    for index, node in enumerate(nodes):
        if node.op in ("placeholder", "output"):
            continue
        nodes_now.append(node)
        is_layer = node.op == "call_module" and str(node.target) in layers
        if is_layer:
            layers_now.append(str(node.target))
        if is_layer or any(source in told for source in node.all_input_nodes):
            told.add(node)
            alive.add(node)
        alive = {one for one in alive if last.get(one, -1) > index}
        if len(alive) > 1:
            continue
        if layers_now:
            parts.append((nodes_now, layers_now, next(iter(alive), node)))
        elif parts and alive:
            parts[-1] = ([*parts[-1][0], *nodes_now], parts[-1][1], next(iter(alive)))
        else:
            continue
        nodes_now, layers_now = [], []
    return [Block(tuple(part), tuple(paths), end) for part, paths, end in parts]
