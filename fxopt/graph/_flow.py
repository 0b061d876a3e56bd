"""What carries channel labels through a graph: atoms, links between them, and what is frozen.

An *atom* is one index of a dimension that some layer makes (an output channel of a convolution). ``-1`` stands for an
index that nothing may cut. A dimension is ``None`` when all of it is so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import fx

__all__ = [
    "FROZEN",
    "Atoms",
    "Constant",
    "Flow",
    "Labels",
    "Mixing",
    "ParameterUse",
    "Product",
    "barrier",
    "first",
    "frozen_output",
    "replaced",
    "size_of",
    "tensor_inputs",
    "tie_rows",
]

FROZEN = -1
Atoms: TypeAlias = npt.NDArray[np.int64]
Labels: TypeAlias = "list[Atoms | None]"


@dataclass(frozen=True)
class ParameterUse:
    """One dimension of a parameter or buffer whose indices are atoms.

    Attributes:
        path: Module path of the owner.
        name: Name of the parameter or buffer in its owner.
        dim: The dimension.
        role: ``out`` where the layer makes the channels, ``in`` where it reads them, ``along`` where it follows them.
        atoms: The atom of every index.
    """

    path: str
    name: str
    dim: int
    role: str
    atoms: Atoms


@dataclass(frozen=True)
class Constant:
    """A number in the graph that counts atoms: a size in a view, the end of a slice.

    Attributes:
        node: The call that holds the number.
        argument: Index of the call's argument.
        position: Index in that argument if it is a list, else None.
        atoms: The atoms that the number counts; after cutting it is the number of those that stay.
    """

    node: fx.Node
    argument: int
    position: int | None
    atoms: Atoms


@dataclass(frozen=True)
class Product:
    """A dimension that stands for several: a view splits channels into heads, or merges heads into channels.

    Atom ``whole[i, j, ...]`` is cut if index ``i`` of the first factor is, or ``j`` of the second, and so on. To stay a
    box, the whole can shrink along one of its factors alone; :mod:`fxopt.graph._products` chooses it.

    Attributes:
        whole: The atoms of the large dimension in the shape of the factors.
        factors: The atoms of each factor; None for one that cannot be cut.
        reason: The operator, for people.
    """

    whole: Atoms
    factors: tuple[Atoms | None, ...]
    reason: str


@dataclass(frozen=True)
class Mixing:
    """A place without weights where channels are summed or compared: masking has to keep those that are cut out of it.

    Attributes:
        node: The call.
        argument: Index of the operand among its arguments.
        dim: The operand's dimension that is gone through.
        atoms: What stands there.
        neutral: What leaves the result as it is: zero in a sum, minus infinity in a maximum.
        average: Whether the sum is divided by the number of channels, which a mask has to make up for.
    """

    node: fx.Node
    argument: int
    dim: int
    atoms: Atoms
    neutral: float = 0.0
    average: bool = False


@dataclass
class Flow:
    """What the walk over the graph found.

    Attributes:
        labels: Atoms of every dimension of every node's tensor.
        uses: Parameter dimensions that hold atoms.
        constants: Numbers that count atoms.
        links: Pairs of arrays of atoms that can only be cut together.
        frozen: Atoms that nothing may cut, and why.
        products: Dimensions that stand for several.
        mixings: Sums over atoms without weights.
        heads: Atoms that are attention heads.
        normalized: Atoms that a norm averages over, and by which operator.
        added: Atoms where activations are added.
        atoms: How many there are.
        outs: Atoms that a layer makes, by its path.
    """

    labels: dict[fx.Node, Any] = field(default_factory=dict)
    uses: list[ParameterUse] = field(default_factory=list)
    constants: list[Constant] = field(default_factory=list)
    links: list[tuple[Atoms, Atoms]] = field(default_factory=list)
    frozen: list[tuple[Atoms, str]] = field(default_factory=list)
    products: list[Product] = field(default_factory=list)
    mixings: list[Mixing] = field(default_factory=list)
    heads: list[Atoms] = field(default_factory=list)
    normalized: list[tuple[Atoms, str]] = field(default_factory=list)
    added: list[Atoms] = field(default_factory=list)
    atoms: int = 0
    outs: dict[str, Atoms] = field(default_factory=dict)

    def fresh(self, size: int) -> Atoms:
        """New atoms for the output channels of a layer."""
        self.atoms += size
        return np.arange(self.atoms - size, self.atoms, dtype=np.int64)

    def link(self, one: Atoms | None, other: Atoms | None, reason: str) -> None:
        """Cut ``one[i]`` and ``other[i]`` only together."""
        if one is None or other is None:
            self.freeze(one if other is None else other, reason)
            return
        if one is other:
            return
        loose = (one != FROZEN) & (other != FROZEN)
        self.links.append((one[loose], other[loose]))
        self.freeze(one[other == FROZEN], reason)
        self.freeze(other[one == FROZEN], reason)

    def freeze(self, atoms: Atoms | None, reason: str) -> None:
        """Never cut these atoms."""
        if atoms is not None and atoms.size:
            self.frozen.append((atoms[atoms != FROZEN], reason))

    def freeze_all(self, labels: Sequence[Atoms | None], reason: str) -> None:
        """Never cut what these dimensions hold."""
        for atoms in labels:
            self.freeze(atoms, reason)


def _dims(value: object) -> Any:
    """All-frozen labels of a value."""
    if isinstance(value, torch.Tensor):
        return [None] * value.dim()
    if isinstance(value, (tuple, list)):
        return [_dims(item) for item in value]
    return []


def frozen_output(node: fx.Node) -> Any:
    return _dims(node.meta.get("val"))


def size_of(node: fx.Node) -> tuple[int, ...]:
    value = node.meta.get("val")
    return tuple(int(size) for size in value.shape) if isinstance(value, torch.Tensor) else ()


def tensor_inputs(node: fx.Node) -> list[fx.Node]:
    return [source for source in node.all_input_nodes if isinstance(source.meta.get("val"), torch.Tensor)]


def first(node: fx.Node) -> fx.Node | None:
    source = node.args[0] if node.args else None
    return source if isinstance(source, fx.Node) else None


def tie_rows(flow: Flow, rows: Atoms, reason: str) -> None:
    """Cut the same columns of every row."""
    if len(rows) > 1:
        flow.link(np.tile(rows[0], len(rows) - 1), rows[1:].reshape(-1), reason)


def replaced(labels: Labels, dim: int, atoms: Atoms | None) -> Labels:
    """The labels with those of one dimension replaced."""
    result = list(labels)
    result[dim] = atoms
    return result


def barrier(flow: Flow, gm: fx.GraphModule, node: fx.Node, reason: str) -> Any:
    for source in node.all_input_nodes:
        _freeze_value(flow, flow.labels[source], reason)
    return frozen_output(node)


def _freeze_value(flow: Flow, labels: Any, reason: str) -> None:
    for item in labels:
        if isinstance(item, list):
            _freeze_value(flow, item, reason)
        else:
            flow.freeze(item, reason)
