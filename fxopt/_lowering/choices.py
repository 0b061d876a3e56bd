"""Rows of every candidate of every block, and policies of operators as sums of looked-up costs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from torch import fx

from fxopt._named import check_known
from fxopt.decisions import Policy, SearchSpace
from fxopt.errors import PassError, PolicyError, TargetError, UnsupportedError
from fxopt.graph.edit import fork
from fxopt.passes import SelectOperators
from fxopt.passes.select_operators import SITE_META
from fxopt.targets import METRICS, Estimate, Target, Workload
from fxopt.targets.rows import Floats, Rows, default_rows

if TYPE_CHECKING:
    from fxopt.lowering import ParametricWorkload

__all__ = ["OperatorTable", "OperatorWorkload", "encoded", "lower_choices", "no_blocks"]


@dataclass(frozen=True, eq=False)
class _Part:
    """Rows: those of a block for each of its candidates, or consecutive ones that no choice changes.

    Attributes:
        site: Index of the decision, or -1.
        rows: Rows of each candidate; one entry where no choice changes them.
        names: Their names.
    """

    site: int
    rows: tuple[Rows, ...]
    names: tuple[tuple[str, ...], ...]


class OperatorWorkload:
    """A workload that refers to decisions of operators.

    The cost of a block depends on its own choice alone, so that each candidate is lowered once: the rows of a policy
    are those of its choices, put together, and equal the rows of the rewritten graph.

    Attributes:
        space: The decisions.
    """

    def __init__(self, space: SearchSpace, parts: Sequence[_Part]) -> None:
        self.space = space
        self._parts = tuple(parts)

    def bind(self, policy: Policy | None = None) -> Workload:
        """The rows of one policy; decisions that it leaves out stay as the graph has them.

        Raises:
            PolicyError: If the policy does not fit the space.
        """
        chosen = encoded(self.space, Policy({}) if policy is None else policy)
        picked = [(part, int(chosen[part.site]) if part.site >= 0 else 0) for part in self._parts]
        names = [name for part, index in picked for name in part.names[index]]
        return Workload(np.concatenate([part.rows[index] for part, index in picked]), names)

    def table(self, target: Target) -> OperatorTable:
        """What every candidate of every block costs on a target.

        Raises:
            TargetError: If the target has no model for a candidate; says which.
        """
        return OperatorTable(self, target)

    def estimate(self, target: Target, policies: Policy | Sequence[Policy]) -> Estimate:
        """Cost policies of operators on a target; see :meth:`OperatorTable.estimate`."""
        return self.table(target).estimate(policies)

    def prepare(self, target: Target) -> None:
        """Let a measured target measure what it does not know yet of any candidate."""
        whole = [rows for part in self._parts for rows in part.rows if len(rows)]
        target.prepare(Workload(np.concatenate(whole), [str(index) for index in range(sum(map(len, whole)))]))

    @property
    def parts(self) -> tuple[_Part, ...]:
        """The rows, in order."""
        return self._parts


class OperatorTable:
    """Costs of every candidate of every block on one target, built in one call of the target.

    Attributes:
        space: The decisions.
        target: The target.
        costs: By metric, cost of every candidate, shape (decisions, most candidates); zero where there is none. What
            is alive at a block's most demanding row for memory, sums over its rows for the other metrics.
        fixed: By metric, the cost of everything that no choice changes.
    """

    def __init__(self, workload: OperatorWorkload, target: Target) -> None:
        given: object = target
        if not isinstance(given, Target):
            raise TargetError(f"target is a {type(given).__name__}; give what fxopt.targets.load(name) makes.")
        self.space = workload.space
        self.target = target
        flat = [(part, index) for part in workload.parts for index in range(len(part.rows))]
        lengths = [len(part.rows[index]) for part, index in flat]
        names = [name for part, index in flat for name in part.names[index]]
        estimate = target.estimate(Workload(np.concatenate([part.rows[index] for part, index in flat]), names))
        self._estimate = estimate.without_rows()
        found = estimate.rows
        rows: Mapping[str, Floats | None] = {
            "latency": found.latency_s,
            "energy": found.energy_j,
            "size": found.weight_bytes,
            "macs": found.macs,
            "memory": found.activation_bytes,
        }
        self.fixed = {metric: 0.0 for metric, values in rows.items() if values is not None}
        self.fixed["latency"] += target.model.fixed_s
        width = max((len(decision.choices) for decision in self.space), default=1)
        self.costs = {metric: np.zeros((len(self.space), width)) for metric in self.fixed}
        edges = np.cumsum([0, *lengths])
        for (part, index), start, stop in zip(flat, edges, edges[1:], strict=False):
            for metric in self.fixed:
                values = rows[metric]
                self._add(metric, part.site, index, np.zeros(0) if values is None else values[0, start:stop])
        self._refuse_uncosted(estimate.uncosted, flat)

    def _add(self, metric: str, site: int, index: int, values: Floats) -> None:
        """Count the rows of a part; a block may have several, where something else is computed in between."""
        if metric == "memory":
            most = float(values.max(initial=0.0))
            if site < 0:
                self.fixed[metric] = max(self.fixed[metric], most)
            else:
                self.costs[metric][site, index] = max(self.costs[metric][site, index], most)
        elif site < 0:
            self.fixed[metric] += float(values.sum())
        else:
            self.costs[metric][site, index] += float(values.sum())

    def _refuse_uncosted(self, uncosted: Sequence[str], flat: Sequence[tuple[_Part, int]]) -> None:
        missing = set(uncosted)
        for part, index in flat:
            lacking = missing.intersection(part.names[index])
            if part.site >= 0 and lacking:
                decision = self.space[part.site]
                always = lacking.intersection(part.names[decision.choices.index(decision.default)])
                if always:
                    raise TargetError(
                        f"Target {self.target.name!r} cannot cost the block at {decision.site!r}: it has no model for "
                        f"{min(always)!r}, which the original network needs, too. Choose another target."
                    )
                raise TargetError(
                    f"Target {self.target.name!r} cannot cost {decision.choices[index]!r} at {decision.site!r}: it has "
                    f"no model for {min(lacking)!r}. Leave the candidate out, or choose another target."
                )

    def of(self, metric: str) -> tuple[Floats, float]:
        """Costs of every candidate, shape (decisions, most candidates), and what comes on top of them.

        Raises:
            UnknownNameError: If there is no such metric.
            UnsupportedError: If the target has no figures for it.
        """
        check_known("metric", metric, METRICS)
        if metric not in self.costs:
            raise UnsupportedError(
                f"Target {self.target.name!r} cannot estimate {metric}: {self._estimate.energy_reason}"
            )
        return self.costs[metric], self.fixed[metric]

    def score(self, indices: npt.ArrayLike, metric: str = "latency") -> Floats:
        """Cost of every policy, given by choice indices of shape (policies, decisions), as ``space.encode`` gives.

        Raises:
            PolicyError: If the indices have another shape or are out of range.
            UnknownNameError: If there is no such metric.
            UnsupportedError: If the target has no figures for it.
        """
        costs, fixed = self.of(metric)
        sizes = self.space.sizes
        chosen = np.asarray(indices)
        if not np.issubdtype(chosen.dtype, np.integer):
            raise PolicyError(f"Choice indices are whole numbers, got an array of {chosen.dtype}.")
        if chosen.ndim != 2 or chosen.shape[1] != len(sizes):
            raise PolicyError(f"Choice indices need the shape (policies, {len(sizes)}), got {chosen.shape}.")
        if chosen.size and ((chosen < 0) | (chosen >= sizes)).any():
            raise PolicyError("A choice of an operator is out of range.")
        picked = costs[np.arange(len(sizes)), chosen]
        found: Floats = np.maximum(picked.max(1, initial=0.0), fixed) if metric == "memory" else picked.sum(1) + fixed
        return found

    def estimate(self, policies: Policy | Sequence[Policy]) -> Estimate:
        """Costs of policies, thousands at once: sums of looked-up costs, so equal to the target's but for rounding.

        Raises:
            PolicyError: If a policy decides operators that the space does not have, or is none.
        """
        given: Any = policies
        many = list(given) if isinstance(given, Iterable) and not isinstance(given, Mapping) else [given]
        own = [encoded(self.space, one) for one in many]
        indices = np.array(own, dtype=np.intp).reshape(len(own), len(self.space))
        scores = {metric: self.score(indices, metric) for metric in self.costs}
        return Estimate(
            target=self.target.name,
            latency_s=scores["latency"],
            energy_j=scores.get("energy"),
            weight_bytes=scores["size"],
            peak_activation_bytes=scores["memory"],
            macs=scores["macs"],
            uncosted=self._estimate.uncosted,
            uncosted_macs_share=self._estimate.uncosted_macs_share,
            energy_reason=self._estimate.energy_reason,
            _per_row=self._estimate._per_row,
        )


def encoded(space: SearchSpace, policy: Policy) -> npt.NDArray[np.intp]:
    """The index of a candidate for every block; decisions of other kinds are left out.

    Raises:
        PolicyError: If the policy does not fit, or is none.
    """
    given: object = policy
    if not isinstance(given, Mapping):
        raise PolicyError(f"policy is a {type(given).__name__}; give a Policy, such as that of a search.")
    own = given if isinstance(given, Policy) else Policy(given)
    return space.encode(own.only(SelectOperators.kinds))


def lower_choices(
    gm: fx.GraphModule, step: SelectOperators, lower: Callable[[fx.GraphModule], ParametricWorkload]
) -> OperatorWorkload:
    """Lower the graph as it is, and as many more graphs as the most candidates of a block.

    In the graph of a number every block is its candidate of that number. Candidates have no weights here, and every
    node that depends on a choice tells its site.

    Raises:
        PassError: If there is no block to decide about, or a choice changes what its block does not hold; if ``step``
            is something else.
    """
    given: object = step
    if not isinstance(given, SelectOperators):
        raise PassError(f"step is a {type(given).__name__}; give what fxopt.passes.SelectOperators() makes.")
    space = step.search_space(gm)
    if not len(space):
        raise PassError(no_blocks(gm, step))
    index_of = {decision.site: index for index, decision in enumerate(space)}

    def runs_of(policy: Policy) -> list[_Run]:
        return _runs(gm, step, policy, index_of, lower)

    layout = runs_of(Policy({}))
    fixed = _outside(layout)
    candidates: list[list[_Run]] = [[] for _ in space]
    for number in range(max(len(decision.choices) for decision in space)):
        policy = Policy({one.key: one.choices[min(number, len(one.choices) - 1)] for one in space})
        runs = runs_of(policy)
        if not np.array_equal(_outside(runs), fixed):
            single = {f"{key[1]} ({choice})": Policy({key: choice}) for key, choice in policy.items()}
            alone = [told for told, one in single.items() if not np.array_equal(_outside(runs_of(one)), fixed)]
            sites = ", ".join(alone)
            raise PassError(
                f"Costs outside of blocks depend on what these compute: {sites or 'several blocks together'}. Leave "
                "them out with SelectOperators(ignore=(...)), and report this."
            )
        for index, decision in enumerate(space):
            if number < len(decision.choices):
                candidates[index].append(_joined(index, [one for one in runs if one.site == index]))
    parts: list[_Part] = []
    seen: set[int] = set()
    for run in layout:
        if run.site < 0:
            parts.append(_Part(-1, (run.rows,), (run.names,)))
        elif run.site not in seen:
            seen.add(run.site)
            found = candidates[run.site]
            parts.append(_Part(run.site, tuple(one.rows for one in found), tuple(one.names for one in found)))
    return OperatorWorkload(space, parts)


def no_blocks(gm: fx.GraphModule, step: SelectOperators) -> str:
    """Why there is nothing to decide in a graph, in words."""
    refused = [f"{one.site}: {one.reason}" for one in step.refusals(gm)[:3]]
    found = [f"{one.site} ({one.pattern}) has no candidate but its own" for one in step.explain(gm)[:3]]
    ignored = [one.site for one in replace(step, ignore=()).explain(gm)] if step.ignore else []
    if ignored and not found:
        refused.insert(0, f"ignore={step.ignore!r} leaves out all {len(ignored)} that there are, such as {ignored[0]}")
    reasons = "; ".join(refused + found) or "it has no convolution"
    return (
        f"The graph has no block to choose an operator for: {reasons}. See SelectOperators.refusals for all, and "
        "register_pattern for blocks of your own."
    )


@dataclass(frozen=True, eq=False)
class _Run:
    """Consecutive rows of one block (by the index of its decision), or of none (-1)."""

    site: int
    rows: Rows
    names: tuple[str, ...]


def _runs(
    gm: fx.GraphModule,
    step: SelectOperators,
    policy: Policy,
    index_of: Mapping[str, int],
    lower: Callable[[fx.GraphModule], ParametricWorkload],
) -> list[_Run]:
    twin = fork(gm)
    step.with_policy(policy).rewrite(twin, weights=False, mark=True)
    sites = {node.name: index_of.get(node.meta.get(SITE_META, ""), -1) for node in twin.graph.nodes}
    workload = lower(twin)
    rows = workload.bind().rows[0]
    owners = np.array([sites[row.node] for row in workload.rows])
    edges = [0, *(np.flatnonzero(np.diff(owners)) + 1).tolist(), len(owners)]
    return [
        _Run(int(owners[start]), rows[start:stop], workload.names[start:stop])
        for start, stop in itertools.pairwise(edges)
    ]


def _outside(runs: Sequence[_Run]) -> Rows:
    """The rows that are of no block."""
    return _joined(-1, [one for one in runs if one.site < 0]).rows


def _joined(site: int, runs: Sequence[_Run]) -> _Run:
    rows = np.concatenate([run.rows for run in runs]) if runs else default_rows(0)
    return _Run(site, rows, tuple(name for run in runs for name in run.names))
