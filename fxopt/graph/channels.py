"""Channel groups: which channels of which layers can only be cut together, index-exact.

The analysis says what is coupled; how important a channel is belongs to the passes. Every index of every tensor
dimension carries the id of the *unit* that it falls with, or ``-1`` if nothing may cut it; cutting a set of units is
then indexing, whatever the wiring between the layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from torch import fx

from fxopt.graph._labels import FROZEN, Constant, Flow, Mixing, ParameterUse, flow_labels
from fxopt.graph._products import resolve

__all__ = ["ChannelGraph", "ChannelGroup", "Constant", "Mixing", "ParameterUse", "analyze"]

Units: TypeAlias = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """Channels of one or more layers that are cut in the same units.

    Attributes:
        site: Module path of the first layer that makes the channels.
        units: Ids of the group's units, in the order of that layer's channels.
        members: Every parameter dimension that follows the group, with the unit of every index.
        frozen_by: The operator that froze the group, or None if it can be cut.
        residual: The norm that averages over a residual stream, if these channels are one: additions make it, and
            a layer or RMS norm runs over it; None for all other groups.
    """

    site: str
    units: Units
    members: tuple[ParameterUse, ...]
    frozen_by: str | None
    residual: str | None = None

    @property
    def size(self) -> int:
        """Number of units."""
        return len(self.units)


@dataclass(frozen=True, eq=False)
class ChannelGraph:
    """The channel groups of a graph and the unit of every index in it.

    Attributes:
        groups: Groups that can be cut, in graph order; their sites are unique.
        frozen: Groups that cannot, with the operator that froze them.
        constants: Numbers in the graph that count channels.
        mixings: Sums over channels without weights; their atoms are unit ids here.
        parameters: Every labelled parameter dimension; its atoms are unit ids here.
    """

    groups: tuple[ChannelGroup, ...]
    frozen: tuple[ChannelGroup, ...]
    constants: tuple[Constant, ...]
    mixings: tuple[Mixing, ...]
    parameters: tuple[ParameterUse, ...]
    _labels: Mapping[fx.Node, Any]

    def labels(self, node: fx.Node, dim: int) -> Units | None:
        """Unit of every index of one dimension of a node's (first) tensor; None if nothing of it can be cut."""
        labels = self._labels[node]
        while labels and isinstance(labels[0], list):
            labels = labels[0]
        found: Units | None = labels[dim] if labels else None
        return found

    def by_site(self) -> dict[str, ChannelGroup]:
        """The groups that can be cut, by site."""
        return {group.site: group for group in self.groups}


def analyze(gm: fx.GraphModule, attention: str = "heads") -> ChannelGraph:
    """Find the channel groups of a canonical graph.

    Args:
        gm: A graph from ``fxopt.trace``.
        attention: Whether attention is cut by whole ``"heads"`` or by the ``"width"`` of all its heads, where both can
            be.

    Returns:
        Its channel groups. An operator that the table does not know freezes the channels it reads.
    """
    flow = flow_labels(gm)
    _link_shared_parameters(gm, flow)
    component = resolve(flow, heads=attention == "heads")
    reasons = _frozen_reasons(flow, component)
    signatures = _signatures(flow, component)
    unit_of = _renumber(flow, component)
    groups, frozen = _groups(flow, component, unit_of, signatures, reasons, _residual_streams(flow, component))
    loose = np.zeros(flow.atoms + 1, dtype=np.int64)
    if groups:
        cuttable = np.concatenate([group.units for group in groups])
        loose = np.where(np.isin(unit_of, cuttable), unit_of, FROZEN)
    else:
        loose[:] = FROZEN
    cut = _Translation(loose)
    return ChannelGraph(
        groups=groups,
        frozen=frozen,
        constants=tuple(_translate_constants(flow.constants, cut)),
        mixings=tuple(replace(m, atoms=cut.of(m.atoms)) for m in flow.mixings),
        parameters=tuple(cut.of_use(use) for use in flow.uses),
        _labels={node: _translate_labels(labels, cut) for node, labels in flow.labels.items()},
    )


def _link_shared_parameters(gm: fx.GraphModule, flow: Flow) -> None:
    """One tensor under several names is cut the same way everywhere, or not at all."""
    names = {(use.path, use.name) for use in flow.uses}
    tensor_of = {(path, name): id(getattr(gm.get_submodule(path), name)) for path, name in names}
    seen: dict[tuple[int, int], ParameterUse] = {}
    holders: dict[int, list[tuple[str, str]]] = {}
    for use in flow.uses:
        tensor = tensor_of[use.path, use.name]
        first = seen.setdefault((tensor, use.dim), use)
        if first is not use:
            flow.link(first.atoms, use.atoms, f"shared parameter {use.path}.{use.name}")
    for holder, tensor in sorted(tensor_of.items()):
        holders.setdefault(tensor, []).append(holder)
    shared = {tensor for tensor, held in holders.items() if len(held) > 1}
    labelled = {(use.path, use.name, use.dim) for use in flow.uses}
    for use in flow.uses if shared else ():
        for path, name in holders[tensor_of[use.path, use.name]]:
            if (path, name, use.dim) not in labelled:
                flow.freeze(use.atoms, f"shared parameter {path}.{name}")


def _frozen_reasons(flow: Flow, component: Units) -> dict[int, str]:
    reasons: dict[int, str] = {}
    for atoms, reason in flow.frozen:
        for index in np.unique(component[atoms]):
            reasons.setdefault(int(index), reason)
    return reasons


def _residual_streams(flow: Flow, component: Units) -> dict[int, str]:
    """Components that additions make and that a layer or RMS norm averages over, with the norm."""
    added = np.zeros(int(component.max(initial=-1)) + 1, dtype=bool)
    for atoms in flow.added:
        added[component[atoms[atoms != FROZEN]]] = True
    found: dict[int, str] = {}
    for atoms, reason in flow.normalized:
        for index in np.unique(component[atoms[atoms != FROZEN]]):
            if added[index]:
                found.setdefault(int(index), reason)
    return found


def _site(maker: ParameterUse) -> str:
    """The name of the channels that a parameter makes: its layer's, or its own where no layer holds it as weight."""
    return maker.path if maker.name == "weight" and maker.path else f"{maker.path}.{maker.name}".removeprefix(".")


def _signatures(flow: Flow, component: Units) -> npt.NDArray[np.uint64]:
    """A hash of where a component's indices stand: equal for units that are interchangeable in size.

    Every labelled dimension adds its own random 64-bit number for each of its indices, so that two components agree
    only if they have the same number of indices in the same dimensions.
    """
    dimensions = [atoms[atoms != FROZEN] for atoms in _all_dimensions(flow)]
    numbers = np.random.default_rng(0).integers(1, 2**63, size=len(dimensions), dtype=np.uint64)
    signature = np.zeros(int(component.max(initial=-1)) + 1, dtype=np.uint64)
    if dimensions:
        lengths = [len(atoms) for atoms in dimensions]
        np.add.at(signature, component[np.concatenate(dimensions)], np.repeat(numbers, lengths))
    return signature


def _all_dimensions(flow: Flow) -> list[Units]:
    found = [use.atoms for use in flow.uses]
    pending = list(flow.labels.values())
    while pending:
        for item in pending.pop():
            if isinstance(item, list):
                pending.append(item)
            elif item is not None:
                found.append(item)
    found += [constant.atoms for constant in flow.constants]
    return found


def _renumber(flow: Flow, component: Units) -> Units:
    """Unit id of every atom: components numbered by their first atom."""
    first = np.full(int(component.max(initial=-1)) + 1, flow.atoms, dtype=np.int64)
    np.minimum.at(first, component, np.arange(flow.atoms))
    rank = np.empty_like(first)
    rank[np.argsort(first)] = np.arange(len(first))
    return rank[component]


def _groups(
    flow: Flow,
    component: Units,
    unit_of: Units,
    signatures: npt.NDArray[np.uint64],
    reasons: Mapping[int, str],
    residual: Mapping[int, str],
) -> tuple[tuple[ChannelGroup, ...], tuple[ChannelGroup, ...]]:
    makers = [use for use in flow.uses if use.role == "out"]
    if not makers:
        return (), ()
    made = np.concatenate([component[use.atoms] for use in makers])
    maker = np.repeat(np.arange(len(makers)), [len(use.atoms) for use in makers])
    frozen_component = np.zeros(len(signatures), dtype=bool)
    frozen_component[list(reasons)] = True
    components, position = np.unique(made, return_index=True)
    # A signature and its complement tell groups that can be cut from those that cannot.
    keys = np.where(frozen_component[components], ~signatures[components], signatures[components])
    _, group_of = np.unique(keys, return_inverse=True)
    order = np.argsort(group_of, kind="stable")
    pieces = np.split(order, np.flatnonzero(np.diff(group_of[order])) + 1)
    pieces.sort(key=lambda piece: int(position[piece].min()))
    chosen = components[[int(piece[0]) for piece in pieces]]
    members = _members(flow, component, chosen)
    unit_of_component = np.empty(len(signatures), dtype=np.int64)
    unit_of_component[component] = unit_of
    found: tuple[list[ChannelGroup], list[ChannelGroup]] = ([], [])
    taken: dict[str, int] = {}
    units_of, held_by = _Translation(unit_of), {}
    for piece, first in zip(pieces, chosen.tolist(), strict=True):
        site = _site(makers[int(maker[position[piece].min()])])
        taken[site] = taken.get(site, 0) + 1
        name = site if taken[site] == 1 else f"{site}#{taken[site]}"
        units = np.sort(unit_of_component[components[piece]])
        for index in members[first]:
            if index not in held_by:
                held_by[index] = units_of.of_use(flow.uses[index])
        held = tuple(held_by[index] for index in members[first])
        group = ChannelGroup(name, units, held, reasons.get(first), residual.get(first))
        found[first in reasons].append(group)
    return tuple(found[0]), tuple(found[1])


def _members(flow: Flow, component: Units, chosen: Units) -> dict[int, list[int]]:
    """The uses that each of some components stands in, in order."""
    uses = [component[use.atoms[use.atoms != FROZEN]] for use in flow.uses]
    found = np.concatenate(uses)
    index = np.repeat(np.arange(len(uses)), [len(atoms) for atoms in uses])
    wanted = np.zeros(int(component.max(initial=-1)) + 1, dtype=bool)
    wanted[chosen] = True
    pairs = np.unique(np.stack([index[wanted[found]], found[wanted[found]]], axis=1), axis=0)
    members: dict[int, list[int]] = {int(one): [] for one in chosen}
    for use, one in pairs.tolist():
        members[one].append(use)
    return members


class _Translation:
    """Unit ids for atoms by a table. Operators hand the same arrays on; each is translated once."""

    def __init__(self, table: Units) -> None:
        self._table = np.append(table, FROZEN)
        self._known: dict[int, tuple[Units, Units]] = {}

    def of(self, atoms: Units) -> Units:
        """The unit of every atom."""
        known = self._known.get(id(atoms))
        if known is None:
            # The atoms are kept with what they became, so that nothing else gets their id.
            known = self._known[id(atoms)] = (atoms, self._table[atoms])
        return known[1]

    def of_use(self, use: ParameterUse) -> ParameterUse:
        return ParameterUse(use.path, use.name, use.dim, use.role, self.of(use.atoms))


def _translate_constants(constants: Sequence[Constant], cut: _Translation) -> list[Constant]:
    found = []
    for constant in constants:
        atoms = cut.of(constant.atoms)
        if (atoms != FROZEN).any():
            found.append(Constant(constant.node, constant.argument, constant.position, atoms))
    return found


def _translate_labels(labels: Any, cut: _Translation) -> Any:
    result = []
    for item in labels:
        if isinstance(item, list):
            result.append(_translate_labels(item, cut))
            continue
        atoms = None if item is None else cut.of(item)
        result.append(None if atoms is None or not (atoms != FROZEN).any() else atoms)
    return result
