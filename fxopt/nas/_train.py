"""Training a supernet and its architecture, which can be stopped and resumed anywhere."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fxopt._numbers import check_whole
from fxopt._seeding import seeded
from fxopt.data import Loader, first_batch
from fxopt.decisions import Policy
from fxopt.errors import FxoptError
from fxopt.lowering import OperatorTable
from fxopt.nas._checkpoint import restore, store
from fxopt.nas._objective import Cost, CostTerm
from fxopt.nas._parallel import Workers
from fxopt.nas._run import Run
from fxopt.nas._settings import Epoch, SupernetSettings
from fxopt.nas._supernet import Supernet, check_table
from fxopt.progress import Progress, Silent, reporter
from fxopt.training import Loss
from fxopt.training._checkpoint import file_of, stem_of

__all__ = ["SupernetResult", "train_supernet"]


@dataclass
class SupernetResult:
    """A trained supernet.

    Attributes:
        supernet: The supernet; any of its networks can be derived from it.
        policy: The most probable candidate of every block.
        history: The epochs.
        notes: What to know of the result, such as a collapse to skips, or a policy over a limit.
        resumed_at: Number of the step that a checkpoint was resumed at; 0 for a fresh start.
    """

    supernet: Supernet
    policy: Policy
    history: list[Epoch] = field(default_factory=list)
    notes: tuple[str, ...] = ()
    resumed_at: int = 0

    @property
    def duals(self) -> list[float]:
        """The largest dual variable of every term at the end of an epoch: zero where a cost never weighed."""
        return [max(found) for found in zip(*(epoch.duals for epoch in self.history), strict=True)]


def train_supernet(
    supernet: Supernet,
    train: Loader,
    val: Loader,
    table: OperatorTable,
    terms: Sequence[CostTerm] = (),
    *,
    settings: SupernetSettings | None = None,
    loss: Loss | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_steps: int = 200,
    progress: bool | Progress | None = None,
    stop_after: int | None = None,
) -> SupernetResult:
    """Train weights and architecture in turn, in place.

    Under ``torchrun`` (an initialized ``torch.distributed``) every process takes its share of every batch; weights are
    averaged by DistributedDataParallel, the architecture's gradients by this function. All processes are given the same
    loaders, in the same order, and end with the same supernet; without batch norm it is that of one process.

    Args:
        supernet: The supernet.
        train: Batches of (input, label) for the weights. Resuming needs batches that depend on their number alone, or
            on torch's global generator, which is seeded for every batch.
        val: Batches of (input, label) for the architecture, which ``train`` should not hold.
        table: Costs of all candidates.
        terms: How costs enter the architecture's loss; none for accuracy alone.
        settings: How to train.
        loss: ``loss(output, label)`` for weights and architecture; cross entropy of class scores, smoothed for weights,
            by default.
        checkpoint: A file without suffix: at once, every ``checkpoint_steps`` steps, and at the end of every epoch,
            everything is written to ``<checkpoint>.safetensors``, and the same call resumes there. Resumed equals
            uninterrupted.
        checkpoint_steps: Steps from one checkpoint to the next.
        progress: True shows progress on a terminal; or a reporter of one's own, told of every step, with loss,
            entropy and expected costs of the epoch before.
        stop_after: Stop when so many steps are done, as if killed; None to go on to the end.

    Returns:
        The result; the network computes the most probable path, in eval mode.

    Raises:
        DataError: If a loader is empty or does not fit the network.
        InfeasibleError: If no architecture meets a budget.
        FxoptError: If the loss, a weight or a gradient of the architecture is not finite: says where, and the
            checkpoint stays at the last good state. If the checkpoint cannot be written or is of another training, or
            the table is of other decisions; if an argument is of another kind or out of range.
    """
    chosen: Any = SupernetSettings() if settings is None else settings
    if not isinstance(chosen, SupernetSettings):
        raise FxoptError(f"settings is a {type(chosen).__name__}; give a fxopt.nas.SupernetSettings.")
    show = reporter(progress)
    check_table(supernet, table)
    check_whole(1, checkpoint_steps=checkpoint_steps)
    check_whole(0, stop_after=0 if stop_after is None else stop_after)
    for loader, name in ((train, "train"), (val, "val")):
        first_batch(loader, name)
    with seeded(chosen.seed):
        stem = stem_of(checkpoint) if checkpoint is not None else None
        with Workers(supernet.net) as workers:
            run = Run(supernet, train, val, Cost(table, terms), chosen, workers, loss)
            run.checkpoint = None if stem is None else file_of(stem)
            keep = None if stem is None else functools.partial(store, run, stem)
            start = _begin(run, stem)
            try:
                run.go(start, stop_after, show if workers.is_first else Silent(), checkpoint_steps, keep)
            finally:
                show.finish("supernet")
                if stem is not None:
                    supernet.leave()
                supernet.choose_policy(supernet.most_likely())
                supernet.net.eval()
    return SupernetResult(supernet, supernet.most_likely(), run.history, run.notes(), start)


def _begin(run: Run, stem: Path | None) -> int:
    """Go to where the checkpoint is, if there is one; the number of steps that were done.

    A first checkpoint is written at once, so that a folder that cannot be written to is noticed before any work.
    """
    # In every process, and before anything is put in the place of the weights.
    run.origin = "" if stem is None else run.supernet.origin()
    start = restore(run, stem)
    run.workers.begin(run.supernet.alpha, start)
    if stem is not None and start == 0:
        store(run, stem, 0)
    return start
