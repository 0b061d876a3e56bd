"""Operators first: a supernet is trained, and what is left of the work goes on from the network it gives."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import fx

from fxopt._digests import digest_of
from fxopt._tuning import Tuning
from fxopt.data import Loader
from fxopt.decisions import Policy, SearchSpace
from fxopt.errors import DataError, InfeasibleError, PassError
from fxopt.lowering import OperatorTable, lower_operators
from fxopt.nas import (
    CostTerm,
    ExpectedCost,
    Supernet,
    SupernetResult,
    SupernetSettings,
    check_budget,
    fine_tune,
    policy_within,
    split,
    train_supernet,
)
from fxopt.passes import SelectOperators, TunablePass
from fxopt.progress import Progress, during
from fxopt.report import EpochLine, SupernetLine
from fxopt.targets import Target

__all__ = ["Selection", "Selector", "bits_are_left", "parted"]

_SEARCH_EPOCHS = 2
"""Epochs of the search for each epoch of fine-tuning; the warm-up has as many as fine-tuning."""

_COLLAPSED = "The search may have collapsed: of the blocks that can be left out {:.0%} are. {}"
_ALONE = "Raise the budget, or train for more epochs."
_WITH_OTHERS = "Raise the budget, train for more epochs, or let the other passes go a larger share of the way."
_FELL_BACK = (
    "The other passes can bring no network that the search ranks high within the budget: {} taken instead of what it "
    "found. Raise the budget, or let them go another share of the way."
)
_UNDECIDED = 0.9
"""The entropy, of at most 1, above which what is chosen is close to chance."""
_CHANCE = (
    "The search of operators ended undecided, with an entropy of {:.2f} of at most 1: what it chose is close to "
    "chance. Train for more epochs, or with more data."
)
_COSTING = "costing operators"
_STEP_DOWN = 0.95
"""What a limit is multiplied by until the other passes can do the rest."""
_BELOW = 0.999
"""And what was found, where that is less than the limit so."""


class Completed(Protocol):
    """Whether the other passes can do the rest."""

    def __call__(self, graph: fx.GraphModule, *, anyhow: bool = True) -> None:
        """Look whether they can bring a network within the budget, anyhow or without going too far.

        Raises:
            InfeasibleError: If they cannot.
        """


@dataclass(frozen=True)
class Selection:
    """What was selected.

    Attributes:
        graph: The network, trained if other passes follow.
        policy: The operator of every block.
        notes: What to know of the search.
        supernet: How the search went.
    """

    graph: fx.GraphModule
    policy: Policy
    notes: tuple[str, ...]
    supernet: SupernetLine


@dataclass(frozen=True)
class Selector:
    """How to choose operators before anything else.

    Attributes:
        step: The pass.
        tuning: How networks are trained: the warm-up has its epochs, the search twice as many, and what was selected
            as many again, the supernet as its teacher, before other passes go on from there.
        following: The other passes.
        folder: Where checkpoints are; None for none.
        show: Told of the epochs.
    """

    step: SelectOperators
    tuning: Tuning
    following: tuple[TunablePass, ...]
    folder: Path | None
    show: Progress

    @property
    def alone(self) -> bool:
        """Whether no other pass follows."""
        return not self.following

    def select(
        self,
        graph: fx.GraphModule,
        target: Target,
        limits_of: Callable[[], Mapping[str, float]],
        completed: Completed,
        decisions: Callable[[fx.GraphModule], SearchSpace],
    ) -> Selection:
        """Train a supernet of ``graph`` and derive the most probable network within limits.

        Where the cheapest candidates do not reach a limit, and other passes follow, the search goes as far as they do;
        where the others cannot do the rest, a cheaper network is derived.

        Args:
            graph: The original graph.
            target: The target.
            limits_of: What this pass may leave, by metric; asked once the target knows all candidates.
            completed: Looks whether the others can do the rest.
            decisions: What the others have to decide about a network.

        Raises:
            DataError: If there is nothing to train on.
            PassError: If the graph has no block to choose an operator for.
            InfeasibleError: If no architecture is within the limits, or the other passes cannot do the rest even of the
                cheapest; before anything is trained.
        """
        train = self.tuning.train
        if train is None:
            raise DataError("select-operators trains a supernet; give train, a loader of (input, label).")
        with during(self.show, _COSTING):
            workload = lower_operators(graph, self.step, target.capabilities.batch)
            workload.prepare(target)
            table = workload.table(target)
            supernet = Supernet(graph, self.step)
            limits = limits_of()
            wanted, last = limits, None
            if self.alone and len(limits) > 1:
                # Limits that can be met one by one, but not together, are told before anything is trained.
                policy_within(supernet, table, limits)
            elif not self.alone and limits:
                least = {metric: max(limit, ExpectedCost(table, metric).least) for metric, limit in limits.items()}
                wanted = _together(supernet, table, least)
                last, completed = _last(supernet, table, limits, completed)
        found = self._train(supernet, table, wanted, train)
        policy, fell_back = self._within(supernet, table, wanted, completed, found.duals, last)
        derived = supernet.derive(policy)
        # Another supernet may choose the same operators with other weights.
        name = "" if self.folder is None else f"selected-{digest_of(derived)}"
        final = bits_are_left(decisions(derived))
        network = fine_tune(
            supernet,
            policy,
            train,
            epochs=0 if self.alone else self.tuning.epochs_of(on_grids=False, final=final),
            distil=self.tuning.loss is None,
            learning_rate=self.tuning.learning_rate,
            loss=self.tuning.loss,
            seed=self.tuning.seed,
            checkpoint=self._place(name),
            progress=self.show,
        )
        row = supernet.space.encode(policy)[None]
        told = {metric: max(limit, float(table.score(row, metric)[0])) for metric, limit in wanted.items()}
        check_budget(network, table, wanted if self.alone else told, target.capabilities.batch)
        notes = self._notes(supernet, policy, found.history[-1].entropy, fell_back=fell_back)
        return Selection(network, policy, notes, _told(found, wanted))

    def _notes(self, supernet: Supernet, policy: Policy, entropy: float, *, fell_back: bool) -> tuple[str, ...]:
        """What to know of a search."""
        notes = []
        if fell_back:
            original = policy == supernet.space.default()
            notes.append(_FELL_BACK.format("the original was" if original else "the cheapest operators were"))
        elif supernet.collapsed(policy):
            notes.append(_COLLAPSED.format(supernet.skipped(policy), _ALONE if self.alone else _WITH_OTHERS))
        return (*notes, *([_CHANCE.format(entropy)] if entropy > _UNDECIDED else []))

    def _train(
        self, supernet: Supernet, table: OperatorTable, limits: Mapping[str, float], train: Loader
    ) -> SupernetResult:
        weights, architecture = split(train, seed=self.tuning.seed)
        return train_supernet(
            supernet,
            weights,
            architecture,
            table,
            [CostTerm(metric, limit) for metric, limit in limits.items()],
            settings=SupernetSettings(
                warm_up=max(1, self.tuning.epochs),
                epochs=max(1, _SEARCH_EPOCHS * self.tuning.epochs),
                learning_rate=self.tuning.learning_rate,
                seed=self.tuning.seed,
            ),
            loss=self.tuning.loss,
            checkpoint=self._place("supernet"),
            progress=self.show,
        )

    def _within(
        self,
        supernet: Supernet,
        table: OperatorTable,
        limits: Mapping[str, float],
        completed: Completed,
        duals: Sequence[float],
        last: Policy | None,
    ) -> tuple[Policy, bool]:
        """The most probable policy within limits, lowered until the others can do the rest.

        If they never can it is ``last``, and True is returned with it. With None the limits are not lowered.
        """
        while True:
            try:
                policy = policy_within(supernet, table, limits, duals=duals)
            except InfeasibleError:
                if last is None:
                    raise
                return last, True
            if last is None or policy == last:
                return policy, False
            try:
                completed(supernet.derive(policy))
            except InfeasibleError as failure:
                # What the others bring down far enough stays as it is.
                short = (failure.metric,) if failure.metric in limits else tuple(limits)
                costs = {metric: float(table.score(supernet.space.encode(policy)[None], metric)[0]) for metric in short}
                lower = {metric: min(limits[metric] * _STEP_DOWN, costs[metric] * _BELOW) for metric in short}
                limits = {**limits, **lower}
            else:
                return policy, False

    def _place(self, name: str) -> Path | None:
        return None if self.folder is None else self.folder / name


def _told(found: SupernetResult, limits: Mapping[str, float]) -> SupernetLine:
    """The history of a search within limits, for the report."""
    epochs = (
        EpochLine(
            loss=one.loss,
            architecture_loss=None if math.isnan(one.architecture_loss) else one.architecture_loss,
            entropy=one.entropy,
            costs=dict(zip(limits, one.costs, strict=True)),
        )
        for one in found.history
    )
    return SupernetLine(limits, tuple(epochs))


def _together(supernet: Supernet, table: OperatorTable, limits: Mapping[str, float]) -> dict[str, float]:
    """Those of the limits that can be met together, the farthest from the original's costs first.

    A metric that cannot be so low beside the others is held at what the original costs; if it cannot be, it is left to
    the other passes.
    """
    row = supernet.space.encode(supernet.space.default())[None]
    original = {metric: float(table.score(row, metric)[0]) for metric in limits}
    found: dict[str, float] = {}
    for metric in sorted(limits, key=lambda name: limits[name] / original[name]):
        for limit in (limits[metric], max(limits[metric], original[metric])):
            with contextlib.suppress(InfeasibleError):
                policy_within(supernet, table, {**found, metric: limit})
                found[metric] = limit
                break
    return {metric: found[metric] for metric in limits if metric in found}


def _last(
    supernet: Supernet, table: OperatorTable, limits: Mapping[str, float], completed: Completed
) -> tuple[Policy, Completed]:
    """A network that the others can bring within the budget, to fall back on, and how far they may go for it.

    Mostly it is that of the cheapest candidates. What is the cheapest as it is need not be so when it is cut and
    quantized: otherwise it is the original.

    Raises:
        InfeasibleError: If they can bring neither.
    """
    ends = (_cheapest(supernet, table, limits), supernet.space.default())
    failures: list[InfeasibleError] = []
    for anyhow in (False, True):
        for end in ends:
            try:
                completed(supernet.derive(end), anyhow=anyhow)
            except InfeasibleError as failure:
                failures.append(failure)
            else:
                return end, functools.partial(completed, anyhow=anyhow)
    raise min(failures[-len(ends) :], key=lambda failure: failure.least / (failure.limit or 1.0))


def _cheapest(supernet: Supernet, table: OperatorTable, limits: Mapping[str, float]) -> Policy:
    """The policy of the cheapest candidates, with several metrics by their sum relative to the limits."""
    costs = sum(table.of(metric)[0] / limit for metric, limit in limits.items())
    indices = [row[:size].argmin() for row, size in zip(costs, supernet.space.sizes, strict=True)]  # type: ignore[arg-type]
    return supernet.space.decode(indices)


def bits_are_left(space: SearchSpace, deciding: Sequence[TunablePass] = ()) -> bool:
    """Whether at most bits are left to decide in a space, besides what some passes decide."""
    known = {"bits"}.union(*(one.kinds for one in deciding))
    return all(decision.kind in known for decision in space)


def parted(passes: tuple[TunablePass, ...]) -> tuple[SelectOperators | None, tuple[TunablePass, ...]]:
    """The pass that selects operators, if there is one, and the others.

    Raises:
        PassError: If it does not come first.
    """
    first = passes[0] if isinstance(passes[0], SelectOperators) else None
    rest = passes[1:] if first is not None else passes
    if any(isinstance(one, SelectOperators) for one in rest):
        raise PassError("'select-operators' decides what there is to prune and to quantize; put it first.")
    return first, rest
