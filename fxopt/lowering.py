"""From the canonical graph to a parametric workload, and from policies to the rows that targets cost.

:func:`lower` walks the graph once. Sizes that a policy can change are kept as *forms*, sums of kept channel counts;
bit-widths as references to the decisions of the layers that read a value. :meth:`ParametricWorkload.bind` then fills
rows for thousands of policies at once, with no graph in sight.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import fx

from fxopt._lowering.bits import BitTable
from fxopt._lowering.build import Builder, Row
from fxopt._lowering.by_index import IndexCosts
from fxopt._lowering.choices import OperatorTable, OperatorWorkload, encoded, lower_choices, no_blocks
from fxopt._lowering.forms import Forms, Size
from fxopt._numbers import check_whole
from fxopt.decisions import Policy, SearchSpace
from fxopt.errors import PolicyError
from fxopt.graph.packing import position_bytes
from fxopt.graph.sparsity import Pattern, pattern_of
from fxopt.passes import SelectOperators
from fxopt.targets import ColumnWorkload, Estimate, Target, Workload
from fxopt.targets.base import join_estimates
from fxopt.targets.rows import FLOAT_BITS, Floats, OpKind, default_rows

__all__ = [
    "BitTable",
    "Choices",
    "IndexCosts",
    "OperatorTable",
    "OperatorWorkload",
    "ParametricWorkload",
    "RowInfo",
    "encoded",
    "lower",
    "lower_operators",
    "no_blocks",
]

Ints = npt.NDArray[np.int64]

_BLOCK = 4096
"""Policies that are bound at once: as many as keep the columns of a row in a processor's cache."""


@dataclass(frozen=True, eq=False)
class Choices:
    """What policies decide, as arrays.

    Attributes:
        kept: Kept channels, shape (channel sites, policies), or (channel sites, 1) where all policies agree.
        bits: Weight and activation bits, shape (bit sites, 2, policies), or (bit sites, 2, 1).
        policies: Number of policies.
        sparsity: For each layer the index into ``patterns``, or -1 where it stays as the graph has it; shape (bit
            sites, policies), or (bit sites, 1).
        patterns: The patterns of zeros that are chosen anywhere.
    """

    kept: npt.NDArray[np.int32]
    bits: npt.NDArray[np.int32]
    policies: int
    sparsity: npt.NDArray[np.int32] | None = None
    patterns: tuple[Pattern, ...] = ()

    def part(self, start: int, stop: int) -> Choices:
        """The policies from ``start`` to ``stop``."""
        kept = self.kept if self.kept.shape[-1] == 1 else self.kept[:, start:stop]
        bits = self.bits if self.bits.shape[-1] == 1 else self.bits[:, :, start:stop]
        sparsity = self.sparsity
        if sparsity is not None and sparsity.shape[-1] > 1:
            sparsity = sparsity[:, start:stop]
        return Choices(kept, bits, min(stop, self.policies) - start, sparsity, self.patterns)


@dataclass(frozen=True)
class RowInfo:
    """What a row stands for.

    Attributes:
        name: Module path, or the node's name for a functional call.
        operator: The operator's name.
        kind: The row's kind.
        node: Name of the graph's node.
    """

    name: str
    operator: str
    kind: OpKind
    node: str


def lower(gm: fx.GraphModule, batch: int = 1, attention: str = "heads") -> ParametricWorkload:
    """Lower a canonical graph to a workload whose rows refer to decisions.

    Args:
        gm: A graph from ``fxopt.trace``.
        batch: Batch size that costs are for.
        attention: What policies cut attention by, whole ``"heads"`` or ``"width"``; as ``PruneChannels`` says.

    Returns:
        The parametric workload. Its parameters are the channel counts of every channel group that can be cut and
        the bits of every layer; binding the empty policy gives the graph as it is.
    """
    check_whole(1, batch=batch)
    builder = Builder(gm, batch, attention)
    builder.walk()
    return ParametricWorkload(builder)


def lower_operators(gm: fx.GraphModule, step: SelectOperators, batch: int = 1) -> OperatorWorkload:
    """Lower a canonical graph to a workload whose rows refer to decisions of operators.

    Args:
        gm: A graph from ``fxopt.trace``.
        step: The pass that says what each block can be.
        batch: Batch size that costs are for.

    Returns:
        The workload; binding a policy gives the rows of the rewritten graph, without a graph being rewritten.

    Raises:
        PassError: If there is no block to decide about.
    """
    return lower_choices(gm, step, functools.partial(lower, batch=batch))


class ParametricWorkload:
    """Rows that refer to decisions.

    Attributes:
        rows: What each row stands for.
        channel_sites: Size of every channel group, by site.
        bit_sites: Current ``(weight_bits, activation_bits)`` of every layer, by site.
        barriers: Operators that fxopt does not know, by node name.
        drafts: The rows as they were written down, sizes as forms.
        values: The tensors that are stored, in graph order.
    """

    def __init__(self, builder: Builder) -> None:
        self.rows = tuple(RowInfo(row.name, row.operator, row.kind, row.node) for row in builder.rows)
        self.channel_sites: Mapping[str, int] = dict(builder.channel_sites)
        self.bit_sites: Mapping[str, tuple[int, int]] = dict(builder.bit_sites)
        self.barriers = tuple(builder.barriers)
        self._forms: Forms = builder.forms
        self._template = default_rows(len(builder.rows))
        for index, row in enumerate(builder.rows):
            self._template[index]["kind"] = row.kind
            self._template[index]["held"] = sum(value.constant for value in row.held)
            for name, value in row.fields.items():
                self._template[index][name] = value.constant
        self.drafts = builder.rows
        self.values = builder.values
        self._sparse = [builder.sparse.get(site) for site in self.bit_sites]
        self._site_index = {site: index for index, site in enumerate(self.channel_sites)}
        self._layer_index = {site: index for index, site in enumerate(self.bit_sites)}

    @property
    def names(self) -> tuple[str, ...]:
        """Name of every row."""
        return tuple(row.name for row in self.rows)

    def bind(self, policies: Policy | Sequence[Policy] = ()) -> Workload:
        """Fill the rows for some policies.

        Args:
            policies: One policy or many; decisions that a policy leaves out stay as the graph has them.

        Returns:
            A workload of shape (policies, rows).

        Raises:
            PolicyError: If a policy decides channels or bits of a site that the graph does not have, or more
                channels than there are.
        """
        many = [policies] if isinstance(policies, Policy) else list(policies) or [Policy({})]
        return self.columns(self._choices(many)).expand()

    def estimate(self, target: Target, policies: Iterable[Policy] | Choices, *, threads: int = 1) -> Estimate:
        """Cost policies on a target, block by block: what is kept of each policy is its totals.

        Args:
            target: The target.
            policies: Policies, or their choices as arrays; millions are no trouble.
            threads: Threads that share each block.

        Returns:
            The totals of every policy. Costs by operator are to be had from ``target.estimate(workload.bind(...))``.

        Raises:
            PolicyError: As :meth:`bind` does, or if there is no policy.
        """
        found: list[Estimate] = []
        for block in self._blocks(policies):
            if len(found) == 1:
                found = [found[0].without_rows()]
            estimate = target.estimate(self.columns(block), threads=threads)
            found.append(estimate.without_rows() if found else estimate)
        if not found:
            raise PolicyError("There is no policy to estimate; give at least one.")
        return join_estimates(found)

    def bit_table(self, target: Target, space: SearchSpace) -> BitTable:
        """A table of costs for policies that decide bits alone: the quickest way to score millions.

        Args:
            target: The target.
            space: Decisions of bits.

        Raises:
            PolicyError: If the space decides something else, or layers that the graph does not have.
        """
        return BitTable(self, target, space)

    def index_costs(self, target: Target, space: SearchSpace, metrics: Sequence[str]) -> IndexCosts:
        """Costs of policies by choice indices, for :class:`fxopt.decisions.Constraint`; see :class:`IndexCosts`.

        Args:
            target: The target.
            space: What policies decide: channels, bits or sparsity.
            metrics: What is costed, by the names that budgets use.

        Raises:
            PolicyError: If the space decides sites that the graph does not have.
            UnsupportedError: If the target has no figures for a metric.
        """
        return IndexCosts(self, target, space, metrics)

    def sites_of(self, size: Size) -> set[str]:
        """The channel sites that a size depends on."""
        sites = list(self.channel_sites)
        return {sites[group] for form in size.forms for group in self._forms.groups_of(form)}

    def columns(self, choices: Choices) -> ColumnWorkload:
        """The rows of some policies, kept as what differs between them.

        Raises:
            PolicyError: If a choice is out of range.
        """
        self._check(choices)
        count = choices.policies
        bits = choices.bits.astype(np.int64)
        sizes = self._forms.evaluate(choices.kept.astype(np.int64))
        known: dict[Size, Ints] = {}
        template = self._template.copy()
        columns: list[dict[str, npt.NDArray[np.generic]]] = []
        demands = self.demands(bits)
        lives = self._live_bits(sizes, demands, known)
        for index, (row, live) in enumerate(zip(self.drafts, lives, strict=True)):
            fields: dict[str, Ints] = {
                name: _evaluated(value, sizes, known) for name, value in row.fields.items() if value.forms
            }
            if row.kind == OpKind.DEPTHWISE and "groups" in fields:
                # Cut to one channel it is a plain convolution.
                fields["kind"] = np.where(fields["groups"] == 1, OpKind.CONV, OpKind.DEPTHWISE)
            if row.layer is not None:
                fields["weight_bits"], fields["activation_bits"] = bits[row.layer]
            elif row.inputs:
                fields["activation_bits"] = functools.reduce(np.maximum, (demands[value] for value in row.inputs))
            fields["output_bits"] = demands[row.output]
            held = sum((_evaluated(value, sizes, known) for value in row.held), np.zeros(1, np.int64))
            amounts = {"held": held.astype(np.float64), "live_bytes": live / 8.0}
            if row.layer is not None:
                amounts |= self._sparsity(row, fields, choices)
            varying = {}
            for name, column in ({name: column.astype(np.int32) for name, column in fields.items()} | amounts).items():
                if len(column) == count > 1:
                    varying[name] = np.ascontiguousarray(column)
                else:
                    template[index][name] = column[0]
            columns.append(varying)
        return ColumnWorkload(template, columns, self.names, count)

    def _choices(self, policies: Sequence[Policy]) -> Choices:
        """Kept channels and bits of some policies; of one alone where all agree to leave them as they are."""
        kept = np.array(list(self.channel_sites.values()), dtype=np.int32).reshape(-1, 1)
        bits = np.array(list(self.bit_sites.values()), dtype=np.int32).reshape(-1, 2, 1)
        kinds = {kind for policy in policies for kind, _ in policy}
        sparsity = np.full((len(self.bit_sites), len(policies)), -1, np.int32) if "sparsity" in kinds else None
        patterns: dict[Pattern, int] = {}
        kept = np.repeat(kept, len(policies), axis=1) if "channels" in kinds else kept
        bits = np.repeat(bits, len(policies), axis=2) if "bits" in kinds else bits
        for index, policy in enumerate(policies):
            for (kind, site), choice in policy.items():
                if kind == "channels":
                    kept[self._index(self._site_index, kind, site), index] = choice
                elif kind == "bits":
                    bits[self._index(self._layer_index, kind, site), :, index] = choice
                elif kind == "sparsity" and sparsity is not None:
                    code = patterns.setdefault(pattern_of(choice), len(patterns))
                    sparsity[self._index(self._layer_index, kind, site), index] = code
        return Choices(kept, bits, len(policies), sparsity, tuple(patterns))

    def choices(self, space: SearchSpace, indices: npt.NDArray[np.integer]) -> Choices:
        """The choices of policies that are given by choice indices, with no policy made of them.

        Args:
            space: The search space that the indices belong to.
            indices: Index of the choice of every decision, shape (policies, decisions), as ``space.encode`` gives.

        Raises:
            PolicyError: If the space decides sites that the graph does not have, or an index is out of range.
        """
        if indices.ndim != 2 or indices.shape[1] != len(space):
            raise PolicyError(f"Choice indices need the shape (policies, {len(space)}), got {indices.shape}.")
        one = self._choices([space.default()])
        count = len(indices)
        kept, bits = np.repeat(one.kept, count, axis=1), one.bits
        if any(decision.kind == "bits" for decision in space):
            bits = np.repeat(one.bits, count, axis=2)
        sparse = any(decision.kind == "sparsity" for decision in space)
        sparsity = np.full((len(self.bit_sites), count if sparse else 0), -1, np.int32)
        patterns: dict[Pattern, int] = {}
        for decision, column in zip(space, indices.T, strict=True):
            if column.size and not 0 <= column.min() <= column.max() < len(decision.choices):
                raise PolicyError(f"A choice of {decision.kind} of {decision.site!r} is out of range.")
            if decision.kind == "sparsity":
                found = [pattern_of(choice) for choice in decision.choices]
                codes = np.array([patterns.setdefault(one, len(patterns)) for one in found], np.int32)
                sparsity[self._index(self._layer_index, decision.kind, decision.site)] = codes[column]
                continue
            table = np.array(decision.choices, dtype=np.int32)
            if decision.kind == "channels":
                kept[self._index(self._site_index, decision.kind, decision.site)] = table[column]
            elif decision.kind == "bits":
                bits[self._index(self._layer_index, decision.kind, decision.site)] = table[column].T
        return Choices(kept, bits, count, sparsity if patterns else None, tuple(patterns))

    def _sparsity(self, row: Row, fields: Mapping[str, Ints], choices: Choices) -> dict[str, npt.NDArray[np.float64]]:
        """Part of a layer's weights that stay and bytes of their positions, for every policy; (1,) where all agree."""
        now = self._sparse[row.layer] if row.layer is not None else None
        codes = None if choices.sparsity is None else choices.sparsity[row.layer]
        if codes is None and now is None:
            return {}
        known = {name: np.array([value.constant], np.int64) for name, value in row.fields.items()} | dict(fields)
        one = np.ones(1, np.int64)
        depth, height, width = (known.get(f"kernel_{side}", one) for side in "dhw")
        taps = depth * height * width
        unknowns, outputs = known["c"] // known.get("groups", one) * taps, known["k"]
        found = (np.ones(1), np.zeros(1)) if now is None else _stored(now, outputs, unknowns, taps)
        for code, pattern in enumerate(choices.patterns):
            if codes is not None and (codes == code).any():
                mine = _stored(pattern, outputs, unknowns, taps)
                found = np.where(codes == code, mine[0], found[0]), np.where(codes == code, mine[1], found[1])
        return {"weight_density": found[0], "position_bytes": found[1]}

    def _blocks(self, policies: Iterable[Policy] | Choices) -> Iterator[Choices]:
        if isinstance(policies, Choices):
            for start in range(0, policies.policies, _BLOCK):
                yield policies.part(start, start + _BLOCK)
            return
        pending = iter(policies)
        while block := list(itertools.islice(pending, _BLOCK)):
            yield self._choices(block)

    def _index(self, table: Mapping[str, int], kind: str, site: str) -> int:
        if site not in table:
            raise PolicyError(
                f"The policy decides {kind} of {site!r}, which this graph does not have; is it of another model?"
            )
        return table[site]

    def _check(self, choices: Choices) -> None:
        for (site, size), kept in zip(self.channel_sites.items(), choices.kept, strict=True):
            if not 1 <= kept.min() <= kept.max() <= size:
                raise PolicyError(f"{site!r} has {size} channels; a policy keeps {kept.min()} to {kept.max()} of them.")
        for site, bits in zip(self.bit_sites, choices.bits, strict=True):
            if not 1 <= bits.min() <= bits.max() <= FLOAT_BITS:
                raise PolicyError(f"Bits of {site!r} go from 1 to {FLOAT_BITS}; a policy chooses {bits.min()}.")

    def demands(self, bits: Ints) -> list[Ints]:
        """Bits of every value: the most that a layer reads it with, floating point where something else reads it."""
        demands: list[Ints] = [np.zeros(1, np.int64)] * len(self.values)
        for index in range(len(self.values) - 1, -1, -1):
            value = self.values[index]
            read = [bits[layer, 1] for layer in value.read_by_layers] + [demands[each] for each in value.read_by_values]
            if value.needs_float or not read:
                read = [np.full(1, FLOAT_BITS)]
            demands[index] = functools.reduce(np.maximum, read)
        return demands

    def _live_bits(self, sizes: Ints, demands: Sequence[Ints], known: dict[Size, Ints]) -> Iterator[Ints]:
        """Bits of all values that are alive while each row runs; whole numbers, so that sums are exact."""
        born: dict[int, list[int]] = {}
        dying: dict[int, list[int]] = {}
        for index, value in enumerate(self.values):
            born.setdefault(value.first, []).append(index)
            dying.setdefault(value.last, []).append(index)
        alive = np.zeros(1, np.int64)
        for row in range(len(self.drafts)):
            for index in born.get(row, ()):
                alive = alive + _evaluated(self.values[index].size, sizes, known) * demands[index]
            yield alive
            for index in dying.get(row, ()):
                alive = alive - _evaluated(self.values[index].size, sizes, known) * demands[index]


def _stored(pattern: Pattern, outputs: Ints, unknowns: Ints, taps: Ints) -> tuple[Floats, Floats]:
    """Part of the weights that stay, and bytes of their positions; none where all stay."""
    whole = outputs * unknowns
    kept = pattern.count(outputs, unknowns, taps)
    return kept / whole, np.where(kept < whole, position_bytes(pattern, outputs, unknowns, taps), 0.0)


def _evaluated(size: Size, sizes: Ints, known: dict[Size, Ints]) -> Ints:
    """A size for every policy, computed once for all fields that share it."""
    if size not in known:
        known[size] = size.evaluate(sizes)
    return known[size]
