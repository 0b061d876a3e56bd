"""Training a supernet and its architecture, in steps that can be stopped and resumed anywhere."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from fxopt.data import Loader, TensorLoader, batch_for, call_model, class_numbers, class_scores, first_batch, read
from fxopt.decisions import Policy
from fxopt.errors import DataError, FxoptError, UnknownNameError
from fxopt.lowering import OperatorTable
from fxopt.nas._architecture import BinaryGates, Reinforce, Relaxed, Step, sample
from fxopt.nas._checkpoint import restore, store
from fxopt.nas._objective import Cost, CostTerm
from fxopt.nas._parallel import Workers
from fxopt.nas._supernet import Supernet
from fxopt.passes.select_operators import IDENTITY, ZERO
from fxopt.progress import Progress, Silent
from fxopt.training import make_optimizer, rising_cosine

__all__ = ["Epoch", "SupernetResult", "SupernetSettings", "split", "train_supernet"]

_METHODS = ("binary", "binary-all", "relaxed", "reinforce", "uniform")
_COLLAPSED = 0.8


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
        alpha_learning_rate: Learning rate of the architecture (Adam, betas 0 and 0.999).
        momentum: Nesterov momentum of the weights.
        weight_decay: Decay of weights with more than one dimension.
        label_smoothing: Of the weights' loss; the architecture's has none.
        seed: Seed of everything random.

    Raises:
        FxoptError: If a number is out of range.
        UnknownNameError: If there is no such method.
    """

    method: Literal["binary", "binary-all", "relaxed", "reinforce", "uniform"] = "binary"
    warm_up: int = 2
    epochs: int = 8
    weight_steps: int = 1
    learning_rate: float = 0.05
    alpha_learning_rate: float = 0.02
    momentum: float = 0.9
    weight_decay: float = 4e-5
    label_smoothing: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the numbers."""
        if self.method not in _METHODS:
            raise UnknownNameError("method", self.method, _METHODS)
        if min(self.warm_up, self.epochs, self.seed) < 0 or self.warm_up + self.epochs < 1 or self.weight_steps < 1:
            raise FxoptError(
                f"A supernet needs at least one epoch and one weight step, got warm_up={self.warm_up}, "
                f"epochs={self.epochs}, weight_steps={self.weight_steps}, seed={self.seed}."
            )
        for name in ("learning_rate", "alpha_learning_rate"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0.0):
                raise FxoptError(f"{name} has to be above zero and finite, got {value}.")
        if not 0.0 <= self.label_smoothing < 1.0:
            raise FxoptError(f"label_smoothing lies in [0, 1), got {self.label_smoothing}.")


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


def split(loader: Loader, share: float = 0.2, seed: int = 0) -> tuple[Loader, Loader]:
    """Part a loader in two: for weights, and for the architecture.

    Args:
        loader: Batches of (input, label). Of a :class:`TensorLoader` samples are parted, of any other loader batches,
            by their number; it then has to give them in one order.
        share: The part that the architecture gets.
        seed: Seed of who goes where.

    Raises:
        DataError: If a part would have no batch of at least two samples.
    """
    samples = isinstance(loader, TensorLoader)
    count = len(loader.inputs) if isinstance(loader, TensorLoader) else _count(loader, "train")
    held, least = round(count * share), 2 if samples else 1
    if not 0.0 < share < 1.0 or min(held, count - held) < least:
        raise DataError(
            f"{count} {'samples' if samples else 'batches'} cannot be split into {count - held} for weights and {held} "
            f"for the architecture: each needs {least} or more. Give more of them, another share, or two loaders."
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    rest, own = order[held:], order[:held]
    if not isinstance(loader, TensorLoader):
        return _Batches(loader, frozenset(rest.tolist())), _Batches(loader, frozenset(own.tolist()))
    source = loader

    def part(chosen: torch.Tensor) -> TensorLoader:
        inputs, labels = source.inputs[chosen], source.labels[chosen]
        return TensorLoader(inputs, labels, source.batch_size, shuffle=True, seed=source.seed)

    return part(rest), part(own)


@dataclass(frozen=True)
class _Batches:
    """Those batches of a loader that have certain numbers."""

    loader: Loader
    numbers: frozenset[int]

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[Any]:
        return (batch for number, batch in enumerate(self.loader) if number in self.numbers)


def train_supernet(
    supernet: Supernet,
    train: Loader,
    val: Loader,
    table: OperatorTable,
    terms: Sequence[CostTerm] = (),
    *,
    settings: SupernetSettings | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_steps: int = 200,
    progress: Progress | None = None,
    stop_after: int | None = None,
) -> SupernetResult:
    """Train weights and architecture in turn, in place.

    Under ``torchrun`` (an initialized ``torch.distributed``) every process takes its share of every batch; weights are
    averaged by DistributedDataParallel, the architecture's gradients by this function.

    Args:
        supernet: The supernet.
        train: Batches of (input, label) for the weights. Resuming needs an order that depends on the epoch alone.
        val: Batches of (input, label) for the architecture, which ``train`` should not hold.
        table: Costs of all candidates.
        terms: How costs enter the architecture's loss; none for accuracy alone.
        settings: How to train.
        checkpoint: A file without suffix: every ``checkpoint_steps`` steps, and at the end of every epoch, everything
            is written to ``<checkpoint>.safetensors``, and the same call resumes there. Resumed equals uninterrupted.
        checkpoint_steps: Steps from one checkpoint to the next.
        progress: Told of every epoch.
        stop_after: Stop when so many steps are done, as if killed; None to go on to the end.

    Returns:
        The result; the network computes the most probable path, in eval mode.

    Raises:
        DataError: If a loader is empty or does not fit the network.
        InfeasibleError: If no architecture meets a budget.
        FxoptError: If the loss or a weight is not finite; says where, and the checkpoint stays at the last good state.
    """
    chosen = settings or SupernetSettings()
    for loader, name in ((train, "train"), (val, "val")):
        first_batch(loader, name)
    with torch.random.fork_rng():
        torch.manual_seed(chosen.seed)
        run = _Run(supernet, train, val, Cost(table, terms), chosen)
        stem = Path(checkpoint) if checkpoint is not None else None
        start = restore(run, stem)
        run.go(start, stem, checkpoint_steps, progress or Silent(), stop_after)
    supernet.choose_policy(supernet.most_likely())
    supernet.net.eval()
    return SupernetResult(supernet, supernet.most_likely(), run.history, run.notes(), start)


class _Run:
    """A supernet in training: all that a checkpoint holds."""

    def __init__(self, supernet: Supernet, train: Loader, val: Loader, cost: Cost, settings: SupernetSettings) -> None:
        self.supernet = supernet
        self.cost = cost
        self.settings = settings
        self.history: list[Epoch] = []
        self.sums = [0.0, 0.0, 0.0, 0.0]  # of this epoch: weight losses, their number, architecture losses, theirs
        self.optimizer = make_optimizer(
            supernet.net, settings.learning_rate, momentum=settings.momentum, weight_decay=settings.weight_decay
        )
        self.alpha_optimizer = torch.optim.Adam([supernet.alpha], settings.alpha_learning_rate, betas=(0.0, 0.999))
        self.steps = _count(train, "train")
        self._val_steps = _count(val, "val")
        self._train, self._val = train, val
        self._workers = Workers(supernet.net)
        methods: dict[str, BinaryGates | Relaxed | Reinforce] = {
            "binary": BinaryGates(2),
            "binary-all": BinaryGates(None),
            "relaxed": Relaxed(),
            "reinforce": Reinforce(),
        }
        self.method = methods.get(settings.method)

    @property
    def total(self) -> int:
        """All steps of weights."""
        return self.steps * (self.settings.warm_up + self.settings.epochs)

    def go(self, start: int, stem: Path | None, every: int, show: Progress, stop_after: int | None) -> None:
        """All steps from a number on."""
        show.start("supernet", self.settings.warm_up + self.settings.epochs)
        show.advance("supernet", len(self.history))
        for step, batch in self._batches(self._train, "train", self.steps, start, self.total):
            if stop_after is not None and step >= stop_after:
                return
            self._weight_step(step, batch)
            if self._has_architecture_step(step):
                self._architecture_step(step)
            last = (step + 1) % self.steps == 0
            if last:
                self._end_epoch(show)
            if stem is not None and (last or (step + 1) % every == 0):
                self._check_weights(step)
                if self._workers.is_first:
                    store(self, stem, step + 1)
        self._check_weights(self.total - 1)
        show.finish("supernet")

    def notes(self) -> tuple[str, ...]:
        """What to know of the result."""
        if self.history and self.history[-1].skipped >= _COLLAPSED and self.settings.method != "uniform":
            return (
                f"The search collapsed to skips: {self.history[-1].skipped:.0%} of what can be left out is. "
                "Raise the budget, lower alpha_learning_rate or the weight of costs, or warm up for longer.",
            )
        return ()

    def _weight_step(self, step: int, batch: Any) -> None:
        settings = self.settings
        torch.manual_seed(settings.seed * 1_000_003 + step)
        rng = np.random.default_rng([settings.seed, 0, step])
        self._set_path(step, rng)
        self.supernet.net.train()
        for group in self.optimizer.param_groups:
            group["lr"] = settings.learning_rate * rising_cosine(step, self.total)
        self.optimizer.zero_grad()
        loss = self._loss(self._workers.net, batch, settings.label_smoothing)
        self._check_finite(loss, step, "weights")
        torch.autograd.backward(loss)
        self.optimizer.step()
        self.sums[0] += float(loss.detach())
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
        ((_, batch),) = self._batches(self._val, "val", self._val_steps, number, number + 1)
        rng = np.random.default_rng([settings.seed, 1, step])
        if self.method is None:
            return
        found = self.method(supernet, self.cost, lambda one: self._loss(supernet.net, one, 0.0), batch, rng)
        self._check_finite(torch.tensor(found.loss), step, "architecture")
        self._move_alpha(found)
        self.cost.raise_duals(found.costs)
        self.sums[2] += found.loss
        self.sums[3] += 1

    def _move_alpha(self, found: Step) -> None:
        """A step of Adam; the probability mass of the candidates it is about stays as it was (Cai et al. 2019)."""
        alpha = self.supernet.alpha
        before = alpha.detach().clone()
        alpha.grad = self._workers.mean(found.gradient)
        self.alpha_optimizer.step()
        alpha.grad = None
        if found.touched is None:
            return
        with torch.no_grad():
            inside = ~found.touched
            shift = alpha.masked_fill(inside, -torch.inf).logsumexp(1) - before.masked_fill(
                inside, -torch.inf
            ).logsumexp(1)
            alpha.sub_(torch.where(found.touched, shift[:, None], torch.zeros(())))

    def _loss(self, net: nn.Module, batch: Any, smoothing: float) -> torch.Tensor:
        inputs, label = batch_for(self.supernet.net, self._workers.share(batch), "train")
        scores = class_scores(call_model(net, inputs, "train"), "a supernet is trained as a classifier")
        numbers = class_numbers(label, scores, "train", "a supernet is trained as a classifier")
        return nn.functional.cross_entropy(scores, numbers, label_smoothing=smoothing)

    def _batches(self, loader: Loader, what: str, steps: int, start: int, stop: int) -> Iterator[tuple[int, Any]]:
        """Numbered batches, pass after pass."""
        number = start
        while number < stop:
            epoch, first = divmod(number, steps)
            torch.manual_seed(self.settings.seed * 7_368_787 + epoch)
            batches = loader.at_epoch(epoch) if isinstance(loader, TensorLoader) else loader
            found = 0
            for batch in itertools.islice(read(batches, what), first, min(steps, first + stop - number)):
                yield number, batch
                number, found = number + 1, found + 1
            if not found:
                raise DataError(f"{what} yields fewer batches than at first; give a loader that can be read again.")

    def _end_epoch(self, show: Progress) -> None:
        shares = self.supernet.alpha.detach().double().cpu().softmax(1)
        sizes = torch.from_numpy(self.supernet.space.sizes.astype(np.float64))
        entropy = -(shares * shares.clamp(min=1e-300).log()).sum(1) / sizes.log()
        weights, count, architecture, others = self.sums
        epoch = Epoch(
            loss=weights / max(count, 1.0),
            architecture_loss=architecture / others if others else math.nan,
            entropy=float(entropy.mean()),
            costs=[float(one(shares)) for one in self.cost.expected],
            duals=list(self.cost.duals),
            skipped=self._skipped(),
        )
        self.history.append(epoch)
        self.sums = [0.0, 0.0, 0.0, 0.0]
        show.advance("supernet", 1, f"loss {epoch.loss:.4f}, entropy {epoch.entropy:.2f}")

    def _skipped(self) -> float:
        policy = self.supernet.most_likely()
        found = [
            policy[decision.key] in (ZERO, IDENTITY)
            for decision in self.supernet.space
            if ZERO in decision.choices or IDENTITY in decision.choices
        ]
        return sum(found) / len(found) if found else 0.0

    def _check_finite(self, loss: torch.Tensor, step: int, what: str) -> None:
        value = float(loss.detach())
        if not math.isfinite(value):
            raise FxoptError(self._stopped(step, f"The loss of the {what} is {value}"))

    def _check_weights(self, step: int) -> None:
        for name, tensor in self.supernet.net.state_dict().items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise FxoptError(self._stopped(step, f"{name!r} is NaN or infinite"))

    def _stopped(self, step: int, what: str) -> str:
        epoch, batch = divmod(step, self.steps)
        chosen = self.supernet.space.decode([mixed.active for mixed in self.supernet.mixed.values()])
        path = chosen.of_kind("operator")
        return (
            f"{what} in epoch {epoch + 1}, batch {batch + 1} (step {step + 1}), on the path {path}. "
            "The checkpoint, if there is one, is of the last good state. Lower learning_rate, or check the data."
        )


def _count(loader: Loader, what: str) -> int:
    try:
        return len(loader)  # type: ignore[arg-type]
    except TypeError:
        return sum(1 for _ in read(loader, what))
