"""Composite calls written out in operators that every pass, target and export knows: einsum, gated linear units."""

from __future__ import annotations

import math
import operator
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxopt.graph import ops

__all__ = ["decompose"]

_aten = torch.ops.aten


def decompose(gm: fx.GraphModule) -> None:
    """Replace composite calls of ``gm`` by the calls that they stand for, in place.

    ``einsum`` of one or two tensors becomes permutations and a matrix product (or a product of elements where nothing
    is summed), ``glu`` its two halves. An einsum that takes a diagonal, stretches a dimension of size one or has more
    than two operands stays, as a barrier.
    """
    for node in list(gm.graph.nodes):
        write = _WRITERS.get(node.target) if node.op == "call_function" else None
        if write is None:
            continue
        with gm.graph.inserting_before(node):
            result = write(_Writer(gm.graph, node))
        if result is not None:
            node.replace_all_uses_with(result)
            gm.graph.erase_node(node)


@dataclass(frozen=True)
class _Writer:
    """Writes calls in place of one node; they say that they come from where it does."""

    graph: fx.Graph
    node: fx.Node

    def call(self, target: Any, *args: Any) -> fx.Node:
        made = self.graph.call_function(target, args)
        made.meta = {key: self.node.meta[key] for key in ("nn_module_stack", "stack_trace") if key in self.node.meta}
        return made


def _glu(writer: _Writer) -> fx.Node:
    given = ops.arguments(writer.node)
    halves = writer.call(_aten.chunk.default, given["self"], 2, given["dim"])
    value, gate = (writer.call(operator.getitem, halves, index) for index in range(2))
    return writer.call(_aten.mul.Tensor, value, writer.call(_aten.sigmoid.default, gate))


@dataclass(frozen=True)
class _Term:
    """A tensor of an einsum with a letter for each of its dimensions."""

    node: fx.Node
    letters: str


def _einsum(writer: _Writer) -> fx.Node | None:
    given = ops.arguments(writer.node)
    sources: Sequence[fx.Node] = given["tensors"]
    spelled = _spelled(str(given["equation"]), [source.meta["val"].dim() for source in sources])
    if spelled is None or len(sources) > 2:
        return None
    inputs, output = spelled
    terms = [_Term(source, letters) for source, letters in zip(sources, inputs, strict=True)]
    extents: dict[str, tuple[Any, fx.Node, int]] = {}
    for term in terms:
        for dim, letter in enumerate(term.letters):
            extent = term.node.meta["val"].shape[dim]
            if letter in extents and extents[letter][0] != extent:
                return None
            extents.setdefault(letter, (extent, term.node, dim))
    equation = _Equation(writer, output, extents)
    term = equation.product(*terms) if len(terms) == 2 else equation.summed(terms[0], output)
    return equation.permuted(term, output)


def _spelled(equation: str, ranks: Sequence[int]) -> tuple[list[str], str] | None:
    """Letters of all dimensions of the operands and of the output; None if an operand takes a diagonal."""
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    spare = [letter for letter in string.ascii_letters if letter not in equation]
    hidden = [
        rank - len(term.replace("...", "")) if "..." in term else 0 for term, rank in zip(terms, ranks, strict=True)
    ]
    dots = "".join(spare[: max(hidden, default=0)])
    terms = [term.replace("...", dots[len(dots) - count :]) for term, count in zip(terms, hidden, strict=True)]
    if not arrow:
        every = "".join(terms)
        output = "..." + "".join(sorted(letter for letter in set(every) - set(dots) if every.count(letter) == 1))
    if any(len(set(term)) != len(term) for term in terms):
        return None
    return terms, output.replace("...", dots)


@dataclass(frozen=True)
class _Equation:
    """An einsum of one or two tensors.

    Attributes:
        writer: Where its calls go.
        output: The letters of its result.
        extents: Of every letter the size, and a tensor and dimension that has it.
    """

    writer: _Writer
    output: str
    extents: dict[str, tuple[Any, fx.Node, int]]

    def permuted(self, term: _Term, letters: str) -> fx.Node:
        """The tensor with its dimensions in another order."""
        if letters == term.letters:
            return term.node
        return self.writer.call(_aten.permute.default, term.node, [term.letters.index(letter) for letter in letters])

    def summed(self, term: _Term, kept: str) -> _Term:
        """The tensor summed over all letters that are not ``kept``."""
        gone = [dim for dim, letter in enumerate(term.letters) if letter not in kept]
        if not gone:
            return term
        left = "".join(letter for letter in term.letters if letter in kept)
        return _Term(self.writer.call(_aten.sum.dim_IntList, term.node, gone), left)

    def product(self, left: _Term, right: _Term) -> _Term:
        """The product of two tensors, summed over the letters that the output lacks."""
        if left.node.op == "get_attr":
            left, right = right, left
        left, right = self.summed(left, self.output + right.letters), self.summed(right, self.output + left.letters)
        shared = "".join(letter for letter in self.output if letter in left.letters and letter in right.letters)
        inner = "".join(letter for letter in left.letters if letter not in self.output)
        rows = "".join(letter for letter in left.letters if letter not in shared + inner)
        columns = "".join(letter for letter in right.letters if letter not in shared + inner)
        one = self.permuted(left, shared + rows + inner)
        other = self.permuted(right, shared + inner + columns)
        if not inner:
            one = self._reshaped(one, shared + rows, "1" * len(columns)) if columns else one
            other = self._reshaped(other, shared, "1" * len(rows), columns) if rows else other
            return _Term(self.writer.call(_aten.mul.Tensor, one, other), shared + rows + columns)
        # Without shared letters the second operand is a matrix, which the product applies to rows of any rank.
        joined = len(rows) != 1 and bool(shared or not rows)
        if joined or len(inner) > 1:
            one = self._reshaped(one, shared, *([[rows]] if joined else [rows]), [inner])
        if len(inner) > 1 or len(columns) != 1:
            other = self._reshaped(other, shared, [inner], [columns])
        made = self.writer.call(_aten.matmul.default, one, other)
        if joined or len(columns) != 1:
            made = self._reshaped(made, shared, rows, columns)
        return _Term(made, shared + rows + columns)

    def _reshaped(self, node: fx.Node, *parts: str | list[str]) -> fx.Node:
        """A tensor in another shape, by letters; those in a list are merged, and a ``1`` is a dimension of one."""
        size: list[Any] = []
        for part in parts:
            size += [self._merged(part[0])] if isinstance(part, list) else [self._size(letter) for letter in part]
        return self.writer.call(_aten.reshape.default, node, size)

    def _size(self, letter: str) -> Any:
        if letter == "1":
            return 1
        extent, node, dim = self.extents[letter]
        return extent if isinstance(extent, int) else self.writer.call(_aten.sym_size.int, node, dim)

    def _merged(self, letters: str) -> int:
        """The product of sizes; left to the view to infer if it depends on the batch."""
        extents = [self.extents[letter][0] for letter in letters]
        return math.prod(extents) if all(isinstance(extent, int) for extent in extents) else -1


_WRITERS = {_aten.glu.default: _glu, _aten.einsum.default: _einsum}
