"""Training a supernet and its architecture, in steps that can be stopped and resumed anywhere."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
from torch import nn

from fxopt._numbers import check_below_one, check_not_negative, check_positive, check_whole
from fxopt._seeding import seeded
from fxopt.data import (
    IGNORED_LABEL,
    Loader,
    batch_for,
    call_model,
    class_numbers,
    class_scores,
    first_batch,
    split_batch,
)
from fxopt.decisions import Policy
from fxopt.errors import FxoptError, UnknownNameError
from fxopt.lowering import OperatorTable
from fxopt.nas._architecture import BinaryGates, Reinforce, Relaxed, sample
from fxopt.nas._batches import Numbered
from fxopt.nas._checkpoint import restore, store
from fxopt.nas._objective import Cost, CostTerm
from fxopt.nas._parallel import Workers, tensors_of
from fxopt.nas._supernet import Supernet, check_table
from fxopt.progress import Progress, Silent
from fxopt.training import Loss, make_optimizer, own_loss, rising_cosine
from fxopt.training._checkpoint import stem_of

__all__ = ["Epoch", "SupernetResult", "SupernetSettings", "train_supernet"]

_Method: TypeAlias = Literal["binary", "binary-all", "relaxed", "reinforce", "uniform"]
_METHODS = get_args(_Method)
_FASTEST = 0.1
_TRAVEL = 6.0
"""How far the parameters of an architecture may go in a search, and in a step."""


@dataclass(frozen=True)
class SupernetSettings:
    """How to train a supernet.

    Attributes:
        method: ``binary`` (two gates a block, the paper's), ``binary-all`` (all gates), ``relaxed`` (DARTS),
            ``reinforce``, or ``uniform``: weights alone, on paths drawn with equal probability.
        warm_up: Epochs of weights alone, on paths drawn with equal probability.
        epochs: Epochs of weights and architecture in turn.
        weight_steps: Steps of weights for each step of the architecture.
        learning_rate: Highest learning rate of the weights; a short rise and half a cosine over all epochs.
        alpha_learning_rate: Learning rate of the architecture (Adam, betas 0 and 0.999). None for one with which a
            candidate that all steps favour gains 6 in the logarithm of its odds, 0.1 at most; that is about what 1e-3
            comes to in the 120 epochs of ImageNet of Cai et al. (2019).
        momentum: Nesterov momentum of the weights.
        weight_decay: Decay of weights with more than one dimension.
        label_smoothing: Of the weights' loss; the architecture's has none.
        seed: Seed of everything random.

    Raises:
        FxoptError: If a number is out of range.
        UnknownNameError: If there is no such method.
    """

    method: _Method = "binary"
    warm_up: int = 2
    epochs: int = 8
    weight_steps: int = 1
    learning_rate: float = 0.05
    alpha_learning_rate: float | None = None
    momentum: float = 0.9
    weight_decay: float = 4e-5
    label_smoothing: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the numbers."""
        if self.method not in _METHODS:
            raise UnknownNameError("method", self.method, _METHODS)
        check_whole(0, warm_up=self.warm_up, epochs=self.epochs, seed=self.seed)
        check_whole(1, weight_steps=self.weight_steps)
        if self.warm_up + self.epochs < 1:
            raise FxoptError("A supernet needs at least one epoch, got warm_up=0 and epochs=0.")
        check_positive(learning_rate=self.learning_rate)
        if self.alpha_learning_rate is not None:
            check_positive(alpha_learning_rate=self.alpha_learning_rate)
        check_not_negative(weight_decay=self.weight_decay)
        check_below_one(momentum=self.momentum, label_smoothing=self.label_smoothing)
        for name, value in vars(self).items():
            if isinstance(value, Real):  # As JSON has them, whatever library they come from.
                object.__setattr__(self, name, int(value) if isinstance(value, Integral) else float(value))


@dataclass
class Epoch:
    """What happened in an epoch.

    Attributes:
        loss: Mean loss of the weights.
        architecture_loss: Mean loss of the architecture steps, without costs; NaN if there were none.
        entropy: Mean entropy of a block's probabilities, relative to that of equal ones: 1 is undecided, 0 decided.
        costs: Expected cost of every term at the end, in SI units.
        duals: Dual variable of every term at the end.
        skipped: Part of the blocks that can be left out whose most probable candidate leaves them out.
    """

    loss: float
    architecture_loss: float
    entropy: float
    costs: list[float]
    duals: list[float]
    skipped: float


@dataclass
class SupernetResult:
    """A trained supernet.

    Attributes:
        supernet: The supernet; any of its networks can be derived from it.
        policy: The most probable candidate of every block.
        history: The epochs.
        notes: What to know of the result, such as a collapse to skips.
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
    progress: Progress | None = None,
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
        progress: Told of every step, with loss, entropy and expected costs of the epoch before.
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
    check_table(supernet, table)
    check_whole(1, checkpoint_steps=checkpoint_steps)
    check_whole(0, stop_after=0 if stop_after is None else stop_after)
    for loader, name in ((train, "train"), (val, "val")):
        first_batch(loader, name)
    with seeded(chosen.seed):
        stem = stem_of(checkpoint) if checkpoint is not None else None
        with Workers(supernet.net) as workers:
            run = Run(supernet, train, val, Cost(table, terms), chosen, workers, loss)
            start = run.begin(stem)
            try:
                run.go(start, stem, checkpoint_steps, progress or Silent(), stop_after)
            finally:
                if stem is not None:
                    supernet.leave()
    supernet.choose_policy(supernet.most_likely())
    supernet.net.eval()
    return SupernetResult(supernet, supernet.most_likely(), run.history, run.notes(), start)


class Run:
    """A supernet in training: all that a checkpoint holds."""

    def __init__(
        self,
        supernet: Supernet,
        train: Loader,
        val: Loader,
        cost: Cost,
        settings: SupernetSettings,
        workers: Workers,
        loss: Loss | None = None,
    ) -> None:
        self.supernet = supernet
        self.cost = cost
        self.settings = settings
        self.history: list[Epoch] = []
        self.sums = [0.0, 0.0, 0.0, 0.0]  # of this epoch: weight losses, their number, architecture losses, theirs
        self.optimizer = make_optimizer(
            supernet.net, settings.learning_rate, momentum=settings.momentum, weight_decay=settings.weight_decay
        )
        self.train = Numbered(train, "train", settings.seed)
        self.val = Numbered(val, "val", settings.seed)
        self.steps = self.train.steps
        self._workers = workers
        self._own_loss = loss
        self.loss_name = None if loss is None else getattr(loss, "__qualname__", type(loss).__name__)
        self.origin = ""
        methods: dict[str, BinaryGates | Relaxed | Reinforce] = {
            "binary": BinaryGates(2),
            "binary-all": BinaryGates(None),
            "relaxed": Relaxed(),
            "reinforce": Reinforce(),
        }
        self.method = methods.get(settings.method)
        self.alpha_optimizer = torch.optim.Adam([supernet.alpha], self._alpha_rate(), betas=(0.0, 0.999))

    def _alpha_rate(self) -> float:
        """The learning rate of the architecture: as asked for, or by how many steps move a candidate."""
        if self.settings.alpha_learning_rate is not None:
            return self.settings.alpha_learning_rate
        steps = self.steps * self.settings.epochs / self.settings.weight_steps
        touched = 2.0 / float(self.supernet.space.sizes.mean()) if self.settings.method == "binary" else 1.0
        return min(_FASTEST, _TRAVEL / max(1.0, steps * touched))

    @property
    def total(self) -> int:
        """All steps of weights."""
        return self.steps * (self.settings.warm_up + self.settings.epochs)

    def begin(self, stem: Path | None) -> int:
        """Go to where the checkpoint is, if there is one; the number of steps that were done.

        A first checkpoint is written at once, so that a folder that cannot be written to is noticed before any work.
        """
        # In every process, and before anything is put in the place of the weights.
        self.origin = "" if stem is None else self.supernet.origin()
        start = restore(self, stem)
        self._workers.begin(self.supernet.alpha, start)
        if stem is not None and start == 0 and self._workers.is_first:
            store(self, stem, 0)
        return start

    def go(self, start: int, stem: Path | None, every: int, show: Progress, stop_after: int | None) -> None:
        """All steps from a number on."""
        show.start("supernet", self.total)
        show.advance("supernet", start, self._told())
        for step in range(start, self.total if stop_after is None else min(stop_after, self.total)):
            self._weight_step(step)
            if self._has_architecture_step(step):
                self._architecture_step(step)
            last = (step + 1) % self.steps == 0
            if last:
                self._end_epoch()
            if stem is not None and (last or (step + 1) % every == 0):
                self._check_weights(step)
                if self._workers.is_first:
                    store(self, stem, step + 1)
            show.advance("supernet", 1, self._told())
        self._check_weights(self.total - 1)
        self._workers.end()
        show.finish("supernet")

    def notes(self) -> tuple[str, ...]:
        """What to know of the result."""
        if self.history and self.settings.method != "uniform" and self.supernet.collapsed(self.supernet.most_likely()):
            return (
                f"The search collapsed to skips: {self.history[-1].skipped:.0%} of what can be left out is. "
                "Raise the budget, lower alpha_learning_rate or the weight of costs, or warm up for longer.",
            )
        return ()

    def _weight_step(self, step: int) -> None:
        settings, batch = self.settings, self.train.at(step)
        torch.manual_seed(settings.seed * 1_000_003 + step)
        rng = np.random.default_rng([settings.seed, 0, step])
        self._set_path(step, rng)
        self.supernet.net.train()
        for group in self.optimizer.param_groups:
            group["lr"] = settings.learning_rate * rising_cosine(step, self.total)
        self.optimizer.zero_grad()
        loss = self._loss(self._workers.net, batch, "train", settings.label_smoothing)
        value = self._finite(float(self._workers.mean(loss.detach())), step, "weights")
        if not loss.requires_grad:
            raise FxoptError(
                f"No parameter of the network of step {step + 1} can be trained; call requires_grad_() on the model's "
                "parameters, of which a supernet trains all."
            )
        torch.autograd.backward(loss)
        self.optimizer.step()
        self.sums[0] += value
        self.sums[1] += 1

    def _set_path(self, step: int, rng: np.random.Generator) -> None:
        warm = step < self.settings.warm_up * self.steps or self.settings.method == "uniform"
        if self.settings.method == "relaxed" and not warm:
            with torch.no_grad():
                self.supernet.mix()
            return
        shares = self.supernet.mask.double() if warm else self.supernet.probabilities().detach().double().cpu()
        self.supernet.choose(sample(shares.numpy(), rng))

    def _has_architecture_step(self, step: int) -> bool:
        behind = step - self.settings.warm_up * self.steps
        return self.method is not None and behind >= 0 and (behind + 1) % self.settings.weight_steps == 0

    def _architecture_step(self, step: int) -> None:
        settings, supernet = self.settings, self.supernet
        number = (step - settings.warm_up * self.steps) // settings.weight_steps
        batch = self.val.at(number)
        torch.manual_seed(settings.seed * 1_000_003 + step)
        rng = np.random.default_rng([settings.seed, 1, step])
        if self.method is None:
            return
        self.cost.tighten((number + 1) * settings.weight_steps / (settings.epochs * self.steps))
        found = self.method(supernet, self.cost, self._architecture_loss, batch, rng)
        value = self._finite(float(self._workers.mean(torch.tensor(found.loss))), step, "architecture")
        gradient = self._workers.mean(found.gradient)
        if not bool(torch.isfinite(gradient).all()):
            raise FxoptError(self._stopped(step, "A gradient of the architecture is NaN or infinite"))
        self._move_alpha(gradient, found.touched)
        self.cost.raise_duals(found.costs)
        self.sums[2] += value
        self.sums[3] += 1

    def _architecture_loss(self, batch: Any) -> torch.Tensor:
        """The loss of a batch; where it is all that is wanted, rather than its gradient, that of all processes."""
        loss = self._loss(self.supernet.net, batch, "val", 0.0)
        return loss if torch.is_grad_enabled() else self._workers.mean(loss)

    def _move_alpha(self, gradient: torch.Tensor, touched: torch.Tensor | None) -> None:
        """A step of Adam; the probability mass of the candidates it is about stays as it was (Cai et al. 2019)."""
        alpha = self.supernet.alpha
        before = alpha.detach().clone()
        alpha.grad = gradient
        self.alpha_optimizer.step()
        alpha.grad = None
        if touched is None:
            return
        with torch.no_grad():
            others = ~touched
            mass, wanted = (one.masked_fill(others, -torch.inf).logsumexp(1) for one in (alpha, before))
            alpha.sub_(torch.where(touched, (mass - wanted)[:, None], torch.zeros(())))

    def _loss(self, net: nn.Module, batch: Any, what: str, smoothing: float) -> torch.Tensor:
        """The loss of this process's part of a batch; the mean over processes is that of the whole."""
        inputs, label = batch_for(self.supernet.net, self._workers.share(batch, what), what)
        output = call_model(net, inputs, what)
        if self._own_loss is not None:
            weight = self._workers.weight(batch, what)
            if weight:
                return own_loss(self._own_loss, output, label) * weight
            # A process without a sample of its own: what it is given in place of one counts for nothing.
            return sum((leaf.sum() for leaf in tensors_of(output)), torch.zeros(())) * 0.0
        remedy = "a supernet is trained as a classifier unless it is given a loss"
        scores = class_scores(output, remedy)
        numbers = class_numbers(label, scores, what, remedy)
        total = nn.functional.cross_entropy(scores, numbers, reduction="sum", label_smoothing=smoothing)
        labelled = int((split_batch(batch, what)[1] != IGNORED_LABEL).sum())
        return total * (self._workers.size / labelled) if labelled else total * math.nan

    def _end_epoch(self) -> None:
        shares = self.supernet.alpha.detach().double().cpu().softmax(1)
        sizes = torch.from_numpy(self.supernet.space.sizes.astype(np.float64))
        entropy = -(shares * shares.clamp(min=1e-300).log()).sum(1) / sizes.log()
        weights, count, architecture, others = self.sums
        self.history.append(
            Epoch(
                loss=weights / max(count, 1.0),
                architecture_loss=architecture / others if others else math.nan,
                entropy=float(entropy.mean()),
                costs=[float(one(shares)) for one in self.cost.expected],
                duals=list(self.cost.duals),
                skipped=self.supernet.skipped(self.supernet.most_likely()),
            )
        )
        self.sums = [0.0, 0.0, 0.0, 0.0]

    def _told(self) -> str:
        """The last epoch in a few words."""
        if not self.history:
            return ""
        epoch = self.history[-1]
        costs = zip(self.cost.terms, epoch.costs, strict=True)
        words = [f"{term.metric} {cost / term.reference:.2f} of {term.reference:.4g}" for term, cost in costs]
        return ", ".join([f"loss {epoch.loss:.4f}", f"entropy {epoch.entropy:.2f}", *words])

    def _finite(self, value: float, step: int, what: str) -> float:
        if not math.isfinite(value):
            raise FxoptError(self._stopped(step, f"The loss of the {what} is {value}"))
        return value

    def _check_weights(self, step: int) -> None:
        tensors = self.supernet.net.state_dict().items()
        wrong = [name for name, one in tensors if one.is_floating_point() and not bool(torch.isfinite(one).all())]
        if self._workers.any(bool(wrong)):
            name = repr(wrong[0]) if wrong else "A weight of another process"
            raise FxoptError(self._stopped(step, f"{name} is NaN or infinite"))

    def _stopped(self, step: int, what: str) -> str:
        epoch, batch = divmod(step, self.steps)
        chosen = self.supernet.space.decode([mixed.active for mixed in self.supernet.mixed.values()])
        path = chosen.of_kind("operator")
        return (
            f"{what} in epoch {epoch + 1}, batch {batch + 1} (step {step + 1}), on the path {path}. "
            "The checkpoint, if there is one, is of the last good state. Check the data; or remove the checkpoint, or "
            "name another place, and lower learning_rate."
        )
