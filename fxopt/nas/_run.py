"""A supernet in training: its steps, of weights and of the architecture in turn."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fxopt.data import IGNORED_LABEL, Loader, batch_for, call_model, class_labels, class_scores, split_batch
from fxopt.errors import FxoptError
from fxopt.nas._architecture import BinaryGates, Reinforce, Relaxed, sample
from fxopt.nas._batches import Numbered
from fxopt.nas._objective import Cost
from fxopt.nas._parallel import Workers, tensors_of
from fxopt.nas._settings import Epoch, SupernetSettings
from fxopt.nas._supernet import Supernet
from fxopt.progress import Progress
from fxopt.training import Loss, make_optimizer, own_loss, rising_cosine

__all__ = ["Run"]

_FASTEST = 0.1
_TRAVEL = 6.0
"""How far the parameters of an architecture may go in a search, and in a step."""


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
        self.workers = workers
        self._own_loss = loss
        self.loss_name = None if loss is None else getattr(loss, "__qualname__", type(loss).__name__)
        self.origin = ""
        self.checkpoint: Path | None = None
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

    def go(
        self, start: int, stop_after: int | None, show: Progress, every: int, keep: Callable[[int], None] | None
    ) -> None:
        """All steps from a number on.

        Args:
            start: The number.
            stop_after: Stop when so many steps are done; None to go on to the end.
            show: Told of every step.
            every: Steps from one time to keep the state to the next.
            keep: Keeps the state, given the number of steps that are done, there and at the end of every epoch.
        """
        show.start("supernet", self.total)
        show.advance("supernet", start, self._told())
        for step in range(start, self.total if stop_after is None else min(stop_after, self.total)):
            self._weight_step(step)
            if self._has_architecture_step(step):
                self._architecture_step(step)
            last = (step + 1) % self.steps == 0
            if last:
                self._end_epoch()
            if keep is not None and (last or (step + 1) % every == 0):
                self._check_weights(step)
                keep(step + 1)
            show.advance("supernet", 1, self._told())
        self._check_weights(self.total - 1)
        self.workers.end()

    def notes(self) -> tuple[str, ...]:
        """What to know of the result."""
        if self.method is None:
            return ("Weights alone were trained, no candidate is preferred: choose by PathScore and a search engine.",)
        policy = self.supernet.most_likely()
        found = []
        if not self.sums[3] and all(math.isnan(epoch.architecture_loss) for epoch in self.history):
            found.append(
                "The architecture took no step, so that no candidate is preferred: there are "
                f"{self.steps * self.settings.epochs} steps of weights behind the warm-up, and weight_steps is "
                f"{self.settings.weight_steps}. Raise epochs, or lower weight_steps."
            )
        elif self.history and self.supernet.collapsed(policy):
            found.append(
                f"The search collapsed to skips: {self.history[-1].skipped:.0%} of what can be left out is. "
                "Raise the budget, lower alpha_learning_rate or the weight of costs, or warm up for longer."
            )
        return (*found, *self.cost.exceeded(self.supernet.space.encode(policy)))

    def _weight_step(self, step: int) -> None:
        settings, batch = self.settings, self.train.at(step)
        torch.manual_seed((settings.seed * 1_000_003 + step) % 2**64)
        rng = np.random.default_rng([settings.seed, 0, step])
        self._set_path(step, rng)
        self.supernet.net.train()
        for group in self.optimizer.param_groups:
            group["lr"] = settings.learning_rate * rising_cosine(step, self.total)
        self.optimizer.zero_grad()
        loss = self._loss(self.workers.net, batch, "train", settings.label_smoothing)
        value = self._finite(float(self.workers.mean(loss.detach())), step, "weights")
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
        torch.manual_seed((settings.seed * 1_000_003 + step) % 2**64)
        rng = np.random.default_rng([settings.seed, 1, step])
        if self.method is None:
            return
        self.cost.tighten((number + 1) * settings.weight_steps / (settings.epochs * self.steps))
        found = self.method(supernet, self.cost, self._architecture_loss, batch, rng)
        value = self._finite(float(self.workers.mean(torch.tensor(found.loss))), step, "architecture")
        gradient = self.workers.mean(found.gradient)
        if not bool(torch.isfinite(gradient).all()):
            terms = "".join(f", the {one.metric} term's weight of {one.weight:g}" for one in self.cost.terms)
            what = "A gradient of the architecture is NaN or infinite"
            raise FxoptError(self._stopped(step, what, f"the data, the loss{terms}"))
        self._move_alpha(gradient, found.touched)
        self.cost.raise_duals(found.costs)
        self.sums[2] += value
        self.sums[3] += 1

    def _architecture_loss(self, batch: Any) -> torch.Tensor:
        """The loss of a batch; where it is all that is wanted, rather than its gradient, that of all processes."""
        loss = self._loss(self.supernet.net, batch, "val", 0.0)
        return loss if torch.is_grad_enabled() else self.workers.mean(loss)

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
        inputs, label = batch_for(self.supernet.net, self.workers.share(batch, what), what)
        output = call_model(net, inputs, what)
        weight = self.workers.weight(batch, what)
        if not weight:
            # A process without a sample of its own: what it is given in place of one counts for nothing.
            return sum((leaf.sum() for leaf in tensors_of(output)), torch.zeros(())) * 0.0
        if self._own_loss is not None:
            return own_loss(self._own_loss, output, label) * weight
        remedy = "a supernet is trained as a classifier unless it is given a loss"
        scores = class_scores(output, remedy)
        labels = class_labels(label, scores, what, remedy)
        total = nn.functional.cross_entropy(scores, labels, reduction="sum", label_smoothing=smoothing)
        whole = split_batch(batch, what)[1]
        # Probabilities have one number for each class.
        soft = labels.is_floating_point()
        labelled = whole.numel() // scores.shape[1] if soft else int((whole != IGNORED_LABEL).sum())
        return total * (self.workers.size / labelled) if labelled else total * math.nan

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
        if self.workers.any(bool(wrong)):
            name = repr(wrong[0]) if wrong else "A weight of another process"
            raise FxoptError(self._stopped(step, f"{name} is NaN or infinite"))

    def _stopped(self, step: int, what: str, suspects: str = "the data and the loss") -> str:
        epoch, batch = divmod(step, self.steps)
        chosen = self.supernet.space.decode([mixed.active for mixed in self.supernet.mixed.values()])
        path = chosen.of_kind("operator")
        place = self.checkpoint
        kept = "" if place is None else f"{place} holds the last good state, from which the same call goes on. "
        remedy = "lower the learning rate" if place is None else f"lower the learning rate and remove {place}"
        return (
            f"{what} in epoch {epoch + 1}, batch {batch + 1} (step {step + 1}), on the path {path}. {kept}Check "
            f"{suspects}; or {remedy}."
        )
