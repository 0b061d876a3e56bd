"""Where activation quantizers go, so that a runtime's integer kernels run in unbroken chains.

The rules are a table, :data:`ROLES`, by operator name. A quantized layer reads integers and writes integers after the
activation function that the runtime fuses into it. An operator with an integer kernel joins the chain if all that it
reads is quantized and something behind it needs integers. All others stay in floating point and get no quantizer.

Every reader takes a value at the bits it asks for: a layer at its activation bits, any other integer operator at the
most that its own result is asked for, floating point at 8. A value that is asked for at several widths gets a quantizer
for each.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from fxopt.errors import PassError
from fxopt.graph import ops
from fxopt.graph.grids import MAX_BITS
from fxopt.graph.matrix_products import QuantMatMul

__all__ = ["ROLES", "Point", "Role", "place"]


class Role(enum.Enum):
    """What an operator does to the grid of what it reads."""

    CLIP = "a piecewise linear activation function, which the grid of its result subsumes"
    KEEP = "gives back values that it reads: the grid stays the same"
    PASS = "gives back what it reads in evaluation: no quantizer stands behind it"
    SPLIT = "gives a tuple of parts of what it reads, each on the same grid"
    NEW = "computes new values: the result has a grid of its own"


_TABLE = {
    Role.CLIP: "ReLU ReLU6 Hardtanh relu relu6 hardtanh clamp clamp_min",
    Role.KEEP: (
        "MaxPool1d MaxPool2d MaxPool3d max_pool1d max_pool2d max_pool3d Flatten flatten view reshape _unsafe_view "
        "squeeze unsqueeze unflatten permute transpose t slice select getitem upsample_nearest1d upsample_nearest2d "
        "PixelShuffle pixel_shuffle"
    ),
    Role.PASS: "Identity Dropout Dropout1d Dropout2d Dropout3d dropout feature_dropout contiguous clone alias detach",
    Role.SPLIT: "chunk split split_with_sizes",
    Role.NEW: (
        "add mul cat AvgPool1d AvgPool2d AvgPool3d AdaptiveAvgPool1d AdaptiveAvgPool2d AdaptiveAvgPool3d avg_pool1d "
        "avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d mean Sigmoid sigmoid "
        "LeakyReLU leaky_relu"
    ),
}
ROLES: Mapping[str, Role] = {name: role for role, names in _TABLE.items() for name in names.split()}
"""The role of every operator that has an integer kernel, by its name in :mod:`fxopt.graph.ops`."""


@dataclass(frozen=True)
class Point:
    """A quantizer to insert.

    Attributes:
        node: The node whose value is quantized.
        bits: Bits of the grid.
        readers: The nodes that read the quantized value.
        grid_of: The node whose quantizer this one shares, or None for one of its own.
    """

    node: fx.Node
    bits: int
    readers: tuple[fx.Node, ...]
    grid_of: fx.Node | None


def place(gm: fx.GraphModule, layers: Mapping[str, int]) -> list[Point]:
    """Decide where quantizers go.

    Args:
        gm: A canonical graph.
        layers: Bits that each layer to quantize, and each product of activations, reads values at, by module path.

    Returns:
        The points, in the order of the graph.

    Raises:
        PassError: If batch normalization follows a layer directly.
    """
    return _Placement(gm, layers).points()


class _Placement:
    """The state of one placement: which nodes compute on integers, and which activation is fused into which."""

    def __init__(self, gm: fx.GraphModule, layers: Mapping[str, int]) -> None:
        self._gm = gm
        self._layers = layers
        self._fused: dict[fx.Node, fx.Node] = {}
        # A layer reads one tensor, a product of activations two.
        self._demanded = {
            self._origin(source)
            for node in gm.graph.nodes
            if self._is_layer(node)
            for source in node.args[:2]
            if isinstance(source, fx.Node) and _is_tensor(source)
        }
        self._integer: set[fx.Node] = set()
        self._grow()
        self._prune()
        self._asked = self._demands()

    def points(self) -> list[Point]:
        found: list[Point] = []
        inside = set(self._fused.values())
        for node in self._gm.graph.nodes:
            if not _is_tensor(node) or node in inside or self._role(node) is Role.PASS:
                continue
            readers = self._readers(node)
            if readers:
                found += self._points_at(node, readers)
        return found

    def _points_at(self, node: fx.Node, readers: Sequence[fx.Node]) -> Iterator[Point]:
        for bits in sorted({self._bits(reader) for reader in readers}):
            mine = [reader for reader in readers if self._bits(reader) == bits]
            yield Point(node, bits, tuple(mine), self._grid_of(node))

    def _readers(self, node: fx.Node) -> list[fx.Node]:
        """Who reads the quantized value: integer users, and all others too if the producer writes integers."""
        integer = [user for user in node.users if user in self._integer]
        if node not in self._integer:
            return integer
        producer = self._producer(node)
        # A matrix product has a kernel that writes floats; every other integer kernel needs a grid to write to.
        if self._is_linear(producer) and not integer:
            return []
        return list(node.users)

    def _grid_of(self, node: fx.Node) -> fx.Node | None:
        """The node that defines the grid of a node which gives back what it reads."""
        if node not in self._integer or self._role(node) is not Role.KEEP:
            return None
        return self._origin(node.args[0], (Role.PASS, Role.SPLIT))

    def _origin(self, value: Any, through: Sequence[Role] = (Role.PASS,)) -> fx.Node:
        """The node that made a value, before those that only pass it on."""
        node: fx.Node = value
        while self._role(node) in through:
            node = node.args[0]  # type: ignore[assignment]
        return node

    def _bits(self, reader: fx.Node) -> int:
        """The bits that a node reads values at."""
        return self._asked.get(reader, MAX_BITS)

    def _demands(self) -> dict[fx.Node, int]:
        """The bits of every integer operator: a layer's own, and of others the most that their result is read at."""
        found: dict[fx.Node, int] = {}
        for node in reversed(self._gm.graph.nodes):
            if self._is_layer(node):
                found[node] = self._layers[str(node.target)]
            elif node in self._integer:
                found[node] = max((found.get(user, MAX_BITS) for user in node.users), default=MAX_BITS)
        return found

    def _grow(self) -> None:
        for node in self._gm.graph.nodes:
            if self._is_layer(node):
                self._refuse_batch_norm(node)
                self._integer.add(node)
            elif self._fuses(node):
                self._fused[node] = node.args[0]
                self._integer.add(node)
            elif self._has_integer_kernel(node):
                self._integer.add(node)

    def _prune(self) -> None:
        """Back to floats: what no integer reader is behind of."""
        for node in reversed(self._gm.graph.nodes):
            if node not in self._integer or self._is_layer(node):
                continue
            if node in self._fused and self._is_layer(self._fused[node]):
                continue
            if not any(user in self._integer for user in node.users):
                self._integer.discard(node)
                self._fused.pop(node, None)

    def _fuses(self, node: fx.Node) -> bool:
        """Whether the runtime takes this activation into the kernel that makes its input."""
        if self._role(node) is not Role.CLIP or len(node.all_input_nodes) != 1:
            return False
        source = node.args[0]
        if not isinstance(source, fx.Node) or source not in self._integer or len(source.users) != 1:
            return False
        return self._is_layer(source) or self._role(source) is Role.NEW

    def _has_integer_kernel(self, node: fx.Node) -> bool:
        role = self._role(node)
        if role is None or not _QUALIFIED.get(self._name(node), _always)(node):
            return False
        sources = [source for source in node.all_input_nodes if not _is_number(source)]
        return bool(sources) and all(self._is_quantized(source) for source in sources)

    def _is_quantized(self, node: fx.Node) -> bool:
        return node in self._integer or (node in self._demanded and node.op != "get_attr")

    def _producer(self, node: fx.Node) -> fx.Node:
        return self._fused.get(node, node)

    def _is_layer(self, node: fx.Node) -> bool:
        return node.op == "call_module" and str(node.target) in self._layers

    def _is_linear(self, node: fx.Node) -> bool:
        return self._is_layer(node) and isinstance(self._gm.get_submodule(str(node.target)), (nn.Linear, QuantMatMul))

    def _name(self, node: fx.Node) -> str:
        return ops.semantics(self._gm, node).name

    def _role(self, node: fx.Node) -> Role | None:
        if node.op not in ("call_module", "call_function") or self._is_layer(node):
            return None
        return ROLES.get(self._name(node))

    def _refuse_batch_norm(self, node: fx.Node) -> None:
        for user in node.users:
            if user.op == "call_module" and isinstance(self._gm.get_submodule(str(user.target)), _BATCH_NORMS):
                raise PassError(
                    f"Batch normalization {str(user.target)!r} follows {str(node.target)!r}, which is to be quantized. "
                    "Run the pass FoldBatchNorm first."
                )


_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def _is_number(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), (int, float))


def _always(_: fx.Node) -> bool:
    return True


def _is_plain_add(node: fx.Node) -> bool:
    return _has_two_tensors(node) and node.kwargs.get("alpha") in (None, 1)


def _has_two_tensors(node: fx.Node) -> bool:
    return len(node.args) == 2 and all(isinstance(arg, fx.Node) and _is_tensor(arg) for arg in node.args)


def _is_global_mean(node: fx.Node) -> bool:
    """Whether a mean goes over all dimensions behind batch and channels, as global average pooling does."""
    source = node.args[0]
    value = source.meta.get("val") if isinstance(source, fx.Node) else None
    axes = node.args[1] if len(node.args) > 1 else None
    if not isinstance(value, torch.Tensor) or not isinstance(axes, (list, tuple)) or node.kwargs.get("dtype"):
        return False
    found = {axis % value.dim() for axis in axes if isinstance(axis, int)}
    return value.dim() > 2 and found == set(range(2, value.dim()))


_QUALIFIED: Mapping[str, Callable[[fx.Node], bool]] = {
    "add": _is_plain_add,
    "mul": _has_two_tensors,
    "mean": _is_global_mean,
}
"""Operators that have an integer kernel in certain forms alone."""
