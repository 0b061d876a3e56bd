"""Operators first: a supernet is trained, and what is left of the work goes on from the network it gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import fx

from fxopt.data import Loader
from fxopt.decisions import Policy
from fxopt.errors import DataError, PassError
from fxopt.lowering import lower_operators
from fxopt.nas import (
    CostTerm,
    ExpectedCost,
    Supernet,
    SupernetSettings,
    check_budget,
    fine_tune,
    policy_within,
    split,
    train_supernet,
)
from fxopt.passes import SelectOperators, TunablePass
from fxopt.progress import Progress
from fxopt.targets import Target

__all__ = ["Selection", "Selector", "parted"]

_SEARCH_EPOCHS = 2
"""Epochs of the search for each epoch of fine-tuning; the warm-up has as many as fine-tuning."""


@dataclass(frozen=True)
class Selection:
    """What was selected.

    Attributes:
        graph: The network, with the supernet's weights.
        policy: The operator of every block.
        notes: What to know of the search.
    """

    graph: fx.GraphModule
    policy: Policy
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Selector:
    """How to choose operators before anything else.

    Attributes:
        step: The pass.
        train: Batches of (input, label), of which a fifth trains the architecture.
        epochs: Epochs of warm-up; the search has twice as many.
        learning_rate: The weights' highest learning rate.
        seed: The seed.
        share: The part of the way to the budget that operators go: with k passes each takes a k-th of it, as a factor.
    """

    step: SelectOperators
    train: Loader | None
    epochs: int
    learning_rate: float
    seed: int
    share: float

    def select(
        self,
        graph: fx.GraphModule,
        target: Target,
        budgets: Mapping[str, float],
        original: Mapping[str, float],
        folder: Path | None,
        show: Progress,
    ) -> Selection:
        """Train a supernet of ``graph`` and derive the most probable network within this pass's share of the budgets.

        Args:
            graph: The original graph.
            target: The target.
            budgets: The limits of the final network, by metric.
            original: What the original costs in these metrics.
            folder: Where the supernet's checkpoint is; None for none.
            show: Told of the epochs.

        Raises:
            DataError: If there is nothing to train on.
            PassError: If the graph has no block to choose an operator for.
            InfeasibleError: If no architecture is within the budgets and no other pass follows.
        """
        if self.train is None:
            raise DataError("select-operators trains a supernet; give train, a loader of (input, label).")
        batch = target.capabilities.batch
        workload = lower_operators(graph, self.step, batch)
        workload.prepare(target)
        table = workload.table(target)
        limits = {}
        for metric, limit in budgets.items():
            own = original[metric] * min(1.0, limit / original[metric]) ** self.share
            least = ExpectedCost(table, metric).least
            limits[metric] = max(own, least) if self.share < 1.0 else own
        supernet = Supernet(graph, self.step)
        weights, architecture = split(self.train, seed=self.seed)
        found = train_supernet(
            supernet,
            weights,
            architecture,
            table,
            [CostTerm(metric, limit) for metric, limit in limits.items()],
            settings=SupernetSettings(
                warm_up=max(1, self.epochs),
                epochs=max(1, _SEARCH_EPOCHS * self.epochs),
                learning_rate=self.learning_rate,
                seed=self.seed,
            ),
            checkpoint=None if folder is None else folder / "supernet",
            progress=show,
        )
        policy = policy_within(supernet, table, limits, duals=found.history[-1].duals)
        network = fine_tune(supernet, policy, self.train, epochs=0)
        check_budget(network, table, limits, batch)
        return Selection(network, policy, found.notes)


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
