"""Where activation quantizers go, so that a runtime's integer kernels run in unbroken chains.

The rules are a table, :data:`ROLES`, by operator name; it says what onnxruntime does, and a target's
:class:`~fxopt.decisions.Placement` what is different there. A quantized layer reads integers and writes integers after
the activation function that the runtime fuses into it. An operator with an integer kernel joins the chain if all that
it reads is quantized and something behind it needs integers. All others stay in floating point and get no quantizer.

Every reader takes a value at the bits it asks for: a layer at its activation bits, any other integer operator at the
most that its own result is asked for, floating point at 8. A value that is asked for at several widths gets a quantizer
for each.

A grid belongs to all values that an operator gives back without computing new ones and, where the target asks for it,
to all operands of an addition, or all parts of a concatenation and its result.
"""

from __future__ import annotations

import enum
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import fx, nn

from fxopt.decisions import PLAIN_PLACEMENT, Placement, operator_key
from fxopt.errors import PassError
from fxopt.graph import eval_mode, ops
from fxopt.graph.grids import MAX_BITS
from fxopt.graph.matrix_products import QuantMatMul
from fxopt.passes.fold_batch_norm import FoldBatchNorm

__all__ = ["ROLES", "Point", "Role", "check_names", "place"]

_Place: TypeAlias = tuple[fx.Node, int]
_JOIN = "cat"


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
        grid: Points of the same number have one quantizer.
    """

    node: fx.Node
    bits: int
    readers: tuple[fx.Node, ...]
    grid: int


def place(gm: fx.GraphModule, layers: Mapping[str, int], how: Placement = PLAIN_PLACEMENT) -> list[Point]:
    """Decide where quantizers go.

    Args:
        gm: A canonical graph.
        layers: Bits that each layer to quantize, and each product of activations, reads values at, by module path.
        how: What the target asks for.

    Returns:
        The points, in the order of the graph.

    Raises:
        PassError: If batch normalization follows a layer directly.
    """
    return _Placement(gm, layers, how).points()


def check_names(how: Placement) -> None:
    """Refuse names of operators that mean nothing here.

    Raises:
        PassError: Naming one.
    """
    known = {operator_key(name) for name in ROLES}
    for name in how.floats:
        if name not in known:
            raise PassError(f"floats names {name!r}, which has no integer kernel; those that have: {', '.join(ROLES)}.")
    activations = ops.activation_names()
    for name in how.fuses:
        if name not in {operator_key(one) for one in activations}:
            raise PassError(f"fuses names {name!r}, which is no activation function: {', '.join(activations)}.")


class _Placement:
    """The state of one placement: which nodes compute on integers, and which activation is fused into which."""

    def __init__(self, gm: fx.GraphModule, layers: Mapping[str, int], how: Placement) -> None:
        self._gm = gm
        self._layers = layers
        self._how = how
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
        self._refuse_batch_norms()
        self._grow()
        self._prune()
        self._asked = self._demands()

    def points(self) -> list[Point]:
        found: dict[tuple[fx.Node, int], tuple[fx.Node, ...]] = {}
        inside = set(self._fused.values())
        for node in self._gm.graph.nodes:
            if not _is_tensor(node) or node in inside or self._role(node) is Role.PASS:
                continue
            readers = self._readers(node)
            for bits in sorted({self._bits(reader) for reader in readers}):
                found[node, bits] = tuple(reader for reader in readers if self._bits(reader) == bits)
        places = list(found)
        index_of = {place: index for index, place in enumerate(places)}
        pairs = [pair for pair in self._same_grid(places) if pair[0] in index_of and pair[1] in index_of]
        ends = np.array([(index_of[one], index_of[other]) for one, other in pairs], np.int64).reshape(-1, 2).T
        matrix = coo_array((np.ones(len(pairs), np.int8), (ends[0], ends[1])), shape=(len(places),) * 2)
        _, grids = connected_components(matrix, directed=False)
        return [
            Point(node, bits, readers, int(grid))
            for ((node, bits), readers), grid in zip(found.items(), grids, strict=True)
        ]

    def _same_grid(self, places: Sequence[_Place]) -> Iterator[tuple[_Place, _Place]]:
        """Pairs of a node and bits each whose values lie on one grid."""
        for node, bits in places:
            if node in self._integer and self._role(node) is Role.KEEP:
                yield (node, bits), (self._origin(node.args[0], (Role.PASS, Role.SPLIT)), bits)
        for node in self._integer:
            name = "" if self._role(node) is None else operator_key(self._name(node))
            if name in self._how.shared_grids:
                bits = self._bits(node)
                shared = [self._origin(source) for source in node.all_input_nodes if not _is_number(source)]
                if name == _JOIN:
                    shared.append(self._reader_of(node))
                yield from (((one, bits), (other, bits)) for one, other in itertools.pairwise(shared))

    def _reader_of(self, node: fx.Node) -> fx.Node:
        """The node behind which the quantizer of a result stands: an activation that is fused into it, or itself."""
        return next((other for other, source in self._fused.items() if source is node), node)

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
        calls = node.op in ("call_module", "call_function")
        fuses = self._role(node) is Role.CLIP or (calls and operator_key(self._name(node)) in self._how.fuses)
        if not fuses or len(node.all_input_nodes) != 1:
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
        name = self._name(node)
        return None if operator_key(name) in self._how.floats else ROLES.get(name)

    def _refuse_batch_norms(self) -> None:
        """See that no batch norm behind a layer is left that could be folded; others are computed in floats."""
        behind = {
            str(user.target): str(node.target)
            for node in self._gm.graph.nodes
            if self._is_layer(node)
            for user in node.users
            if user.op == "call_module" and isinstance(self._gm.get_submodule(str(user.target)), _BATCH_NORMS)
        }
        if not behind:
            return
        with eval_mode(self._gm):
            staying = {refusal.site for refusal in FoldBatchNorm().explain(self._gm)}
        for norm, layer in behind.items():
            if norm not in staying:
                mode = ", on the graph in eval mode: graph.eval()" if self._gm.training else ""
                raise PassError(
                    f"Batch normalization {norm!r} follows {layer!r}, which is to be quantized. "
                    f"Run the pass FoldBatchNorm first{mode}."
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
