"""Along which factor a dimension that stands for several shrinks, and what falls together after that."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from fxopt.graph._flow import FROZEN, Atoms, Flow, Product, tie_rows

__all__ = ["components", "resolve"]

Flags: TypeAlias = npt.NDArray[np.bool_]


def components(flow: Flow) -> Atoms:
    """Component of every atom under the links, shape (atoms,)."""
    if not flow.atoms:
        return np.zeros(0, np.int64)
    pairs = [pair for pair in flow.links if pair[0].size]
    rows = np.concatenate([one for one, _ in pairs]) if pairs else np.zeros(0, np.int64)
    columns = np.concatenate([other for _, other in pairs]) if pairs else np.zeros(0, np.int64)
    matrix = coo_array((np.ones(len(rows), np.int8), (rows, columns)), shape=(flow.atoms, flow.atoms)).tocsr()
    _, component = connected_components(matrix, directed=False)
    return component.astype(np.int64)


def resolve(flow: Flow, heads: bool = True) -> Atoms:
    """Choose a factor for every product, link the whole to it and freeze the others.

    What is forced comes first: where one factor alone can be cut. Of several, attention heads are taken (or, with
    ``heads`` false, what is not heads), else the factor that leaves the most to choose, the first of equals.

    Args:
        flow: What the walk found; links and frozen atoms are added.
        heads: Whether attention shrinks by whole heads or by the width of all heads.

    Returns:
        Component of every atom under all links.
    """
    pending = flow.products
    while pending:
        state = _State(flow, components(flow))
        forced = [product for product in pending if len(state.loose(product)) <= 1]
        settled = forced or state.independent(pending, heads)
        for product in settled:
            _settle(flow, product, state.chosen(product, heads))
        done = {id(product) for product in settled}
        pending = [product for product in pending if id(product) not in done]
    return components(flow)


def _settle(flow: Flow, product: Product, axis: int | None) -> None:
    for index, factor in enumerate(product.factors):
        if index != axis:
            flow.freeze(factor, product.reason)
    if axis is None:
        flow.freeze(product.whole.reshape(-1), product.reason)
        return
    columns = np.moveaxis(product.whole, axis, -1).reshape(-1, product.whole.shape[axis])
    tie_rows(flow, columns, product.reason)
    flow.link(columns[0], product.factors[axis], product.reason)


class _State:
    """What is linked and what is frozen at one moment."""

    def __init__(self, flow: Flow, component: Atoms) -> None:
        self._component = component
        size = int(component.max(initial=-1)) + 1
        self._frozen: Flags = np.zeros(size + 1, dtype=np.bool_)
        self._heads: Flags = np.zeros(size + 1, dtype=np.bool_)
        self._frozen[size] = True
        for atoms, _ in flow.frozen:
            self._frozen[component[atoms]] = True
        for atoms in flow.heads:
            self._heads[self._of(atoms)] = True
        self._heads[size] = False

    def _of(self, atoms: Atoms) -> Atoms:
        """Component of each atom; the last one for what is frozen from the start."""
        found: Atoms = np.where(atoms == FROZEN, len(self._frozen) - 1, self._component[atoms])
        return found

    def loose(self, product: Product) -> list[int]:
        """The factors along which something can be cut."""
        whole = ~self._frozen[self._of(product.whole)]
        found = []
        for axis, factor in enumerate(product.factors):
            if factor is None:
                continue
            others = tuple(dim for dim in range(whole.ndim) if dim != axis)
            if bool((whole.all(axis=others) & ~self._frozen[self._of(factor)]).any()):
                found.append(axis)
        return found

    def chosen(self, product: Product, heads: bool) -> int | None:
        """The factor to cut along, or None if none can be cut."""
        loose = self.loose(product)
        if len(loose) < 2:
            return loose[0] if loose else None
        marked = [axis for axis in loose if bool(self._heads[self._of(self._factor(product, axis))].any())]
        if marked:
            rest = [axis for axis in loose if axis not in marked]
            return marked[0] if heads or not rest else rest[0]
        return max(loose, key=lambda axis: (self._left(product, axis), -axis))

    def _factor(self, product: Product, axis: int) -> Atoms:
        factor = product.factors[axis]
        return np.zeros(0, np.int64) if factor is None else factor

    def _left(self, product: Product, axis: int) -> int:
        """How many components the whole falls into once it is tied to a factor."""
        found = self._of(product.whole)
        columns = np.moveaxis(found, axis, -1).reshape(-1, found.shape[axis])
        size = columns.shape[1]
        names, nodes = np.unique(columns, return_inverse=True)
        rows = np.tile(np.arange(size), len(columns))
        edges = coo_array(
            (np.ones(len(rows), np.int8), (rows, size + nodes.reshape(-1))), shape=(size + len(names),) * 2
        )
        count, _ = connected_components(edges, directed=False)
        return int(count)

    def independent(self, pending: list[Product], heads: bool) -> list[Product]:
        """Products to choose for at once: those at heads, or others that share nothing with one before them."""
        marked = [
            product
            for product in pending
            if any(bool(self._heads[self._of(self._factor(product, axis))].any()) for axis in self.loose(product))
        ]
        if marked:
            return marked
        touched: Flags = np.zeros_like(self._frozen)
        chosen = []
        for product in pending:
            factors = [self._of(factor) for factor in product.factors if factor is not None]
            mine = np.concatenate([self._of(product.whole).reshape(-1), *factors])
            if not touched[mine].any():
                chosen.append(product)
            touched[mine] = True
            touched[-1] = False
        return chosen
