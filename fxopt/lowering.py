"""From the canonical graph to a parametric workload, and from policies to the rows that targets cost.

:func:`lower` walks the graph once. Sizes that a policy can change are kept as *forms*, sums of kept channel counts;
bit-widths as references to the decisions of the layers that read a value. :meth:`ParametricWorkload.bind` then fills
rows for thousands of policies at once, with no graph in sight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import fx

from fxopt._lowering.build import Builder
from fxopt._lowering.forms import Forms
from fxopt.decisions import Policy
from fxopt.errors import PolicyError
from fxopt.targets import Workload
from fxopt.targets.rows import FLOAT_BITS, OpKind, default_rows

__all__ = ["ParametricWorkload", "RowInfo", "lower"]

Ints = npt.NDArray[np.int64]


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


def lower(gm: fx.GraphModule, batch: int = 1) -> ParametricWorkload:
    """Lower a canonical graph to a workload whose rows refer to decisions.

    Args:
        gm: A graph from ``fxopt.trace``.
        batch: Batch size that costs are for.

    Returns:
        The parametric workload. Its parameters are the channel counts of every channel group that can be cut and
        the bits of every layer; binding the empty policy gives the graph as it is.
    """
    builder = Builder(gm, batch)
    builder.walk()
    return ParametricWorkload(builder)


class ParametricWorkload:
    """Rows that refer to decisions.

    Attributes:
        rows: What each row stands for.
        channel_sites: Size of every channel group, by site.
        bit_sites: Current ``(weight_bits, activation_bits)`` of every layer, by site.
        barriers: Operators that fxopt does not know, by node name.
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
            for name, value in row.fields.items():
                self._template[index][name] = value.constant
            self._template[index]["held"] = sum(value.constant for value in row.held)
        self._sized = [
            (index, name, value)
            for index, row in enumerate(builder.rows)
            for name, value in row.fields.items()
            if value.forms
        ]
        self._holding = [
            (index, row.held) for index, row in enumerate(builder.rows) if any(value.forms for value in row.held)
        ]
        self._layer_of_row = [row.layer for row in builder.rows]
        self._output_of_row = [row.output for row in builder.rows]
        self._inputs_of_row = [row.inputs for row in builder.rows]
        self._values = builder.values
        self._lives = np.array([(value.first, value.last + 1) for value in builder.values], np.int64).reshape(-1, 2)
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
            PolicyError: If a policy decides channels or bits of a site that the graph does not have.
        """
        many = [policies] if isinstance(policies, Policy) else list(policies) or [Policy({})]
        kept, bits = self._arrays(many)
        sizes = self._forms.evaluate(kept)
        rows = np.repeat(self._template[None, :], len(many), axis=0)
        for index, name, value in self._sized:
            rows[name][:, index] = value.evaluate(sizes)
        for index, held in self._holding:
            rows["held"][:, index] = sum(value.evaluate(sizes) for value in held)
        _settle_groups(rows)
        self._bind_bits(rows, bits, sizes)
        return Workload(rows, self.names)

    def _arrays(self, policies: Sequence[Policy]) -> tuple[Ints, Ints]:
        """Kept channels (policies, sites) and bits (policies, layers, 2)."""
        kept = np.tile(np.array(list(self.channel_sites.values()), dtype=np.int64), (len(policies), 1))
        bits = np.tile(np.array(list(self.bit_sites.values()), dtype=np.int64).reshape(-1, 2), (len(policies), 1, 1))
        for index, policy in enumerate(policies):
            for (kind, site), choice in policy.items():
                if kind == "channels":
                    kept[index, self._index(self._site_index, kind, site)] = choice
                elif kind == "bits":
                    bits[index, self._index(self._layer_index, kind, site)] = choice
        return kept, bits

    def _index(self, table: Mapping[str, int], kind: str, site: str) -> int:
        if site not in table:
            raise PolicyError(
                f"The policy decides {kind} of {site!r}, which this graph does not have; is it of another model?"
            )
        return table[site]

    def _bind_bits(self, rows: npt.NDArray[np.void], bits: Ints, sizes: Ints) -> None:
        """Bits of every value from those of the layers that read it, then of every row, then the live bytes."""
        count = len(rows)
        demand = np.zeros((count, len(self._values)), dtype=np.int64)
        for index in range(len(self._values) - 1, -1, -1):
            value = self._values[index]
            if value.needs_float:
                demand[:, index] = FLOAT_BITS
            for layer in value.read_by_layers:
                np.maximum(demand[:, index], bits[:, layer, 1], out=demand[:, index])
            for follower in value.read_by_values:
                np.maximum(demand[:, index], demand[:, follower], out=demand[:, index])
        demand[demand == 0] = FLOAT_BITS
        for index, own in enumerate(self._layer_of_row):
            if own is not None:
                rows["weight_bits"][:, index] = bits[:, own, 0]
                rows["activation_bits"][:, index] = bits[:, own, 1]
            elif self._inputs_of_row[index]:
                read = demand[:, list(self._inputs_of_row[index])]
                rows["activation_bits"][:, index] = read.max(axis=1)
            rows["output_bits"][:, index] = demand[:, self._output_of_row[index]]
        stored = np.stack([value.size.evaluate(sizes) for value in self._values], axis=1)
        # Bits that begin and cease to live at each row; whole numbers, so that sums are exact.
        change = np.zeros((rows.shape[1] + 1, count), np.int64)
        np.add.at(change, self._lives[:, 0], (stored * demand).T)
        np.subtract.at(change, self._lives[:, 1], (stored * demand).T)
        rows["live_bytes"] = change[:-1].cumsum(axis=0).T / 8.0


def _settle_groups(rows: npt.NDArray[np.void]) -> None:
    """A depthwise convolution cut to one channel is a plain one."""
    single = (rows["kind"] == OpKind.DEPTHWISE) & (rows["groups"] == 1)
    rows["kind"][single] = OpKind.CONV
