"""The training loop."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.utils import _pytree as pytree

from fxopt._schedules import SCHEDULES
from fxopt._seeding import seeded
from fxopt.data import Loader, batch_for, blaming, call_model, count_batches, first_batch, pass_of, read
from fxopt.errors import DataError, FxoptError
from fxopt.graph import eval_mode
from fxopt.training._checkpoint import Checkpoint, stem_of
from fxopt.training._distilling import Distiller
from fxopt.training._losses import Loss, cross_entropy
from fxopt.training._optimizers import GradientLimit, keep_zeros, make_optimizer
from fxopt.training._options import (
    Distillation,
    EarlyStop,
    History,
    OptimizerName,
    ScheduleName,
    check_clip,
    check_names,
    check_training,
    check_types,
)

__all__ = ["EpochDone", "fit", "own_loss", "rehearse"]

EpochDone: TypeAlias = Callable[[int, int, float], None]
"""Told after every epoch: its number from 1, how many there are, and its mean loss."""

Judge: TypeAlias = Callable[[nn.Module], float]

_PLAIN = Distillation()


@dataclass(frozen=True)
class _Settings:
    """What has to be the same for training to be resumed."""

    epochs: int
    steps: int
    learning_rate: float
    optimizer: str = "sgd"
    momentum: float = 0.9
    weight_decay: float = 1e-4
    distillation: Distillation | None = None
    early_stop: EarlyStop | None = None
    judged: bool = False
    seed: int = 0
    schedule: str = "cosine"
    clip: float | None = None

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of a step."""
        return self.learning_rate * SCHEDULES[self.schedule](step, self.steps * self.epochs)


def fit(
    model: nn.Module,
    train: Loader,
    *,
    epochs: int,
    loss: Loss | None = None,
    learning_rate: float = 0.02,
    optimizer: OptimizerName = "sgd",
    schedule: ScheduleName = "cosine",
    momentum: float = 0.9,
    weight_decay: float = 1e-4,
    clip: float | None = None,
    teacher: nn.Module | None = None,
    distillation: Distillation = _PLAIN,
    evaluate: Judge | None = None,
    early_stop: EarlyStop | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    seed: int = 0,
    progress: EpochDone | None = None,
) -> History:
    """Train a model in place, by default under a cosine schedule with a short warm-up.

    Weights that :class:`fxopt.passes.SparsifyWeights` zeroed stay zero.

    Args:
        model: The model; left in eval mode.
        train: Batches of (input, label). A :class:`TensorLoader` is given the number of each epoch.
        epochs: Passes over the loader; 0 does nothing.
        loss: ``loss(output, label) -> scalar``; cross entropy of the class scores by default.
        learning_rate: The highest learning rate.
        optimizer: "sgd" (with Nesterov momentum) or "adamw".
        schedule: How the learning rate goes: "cosine" from the highest to zero, "step" to a tenth at a half and at
            three quarters of the steps, or "constant", each after a linear rise over the first twentieth; or
            "one-cycle", up over the first three tenths and down to zero.
        momentum: Momentum of SGD, and the first beta of AdamW.
        weight_decay: Decay of parameters with more than one dimension.
        clip: The largest norm of a step's gradients, as a multiple of the median of the steps before it; larger ones
            are scaled down (as AutoClip, Seetharaman et al. 2020). None for no limit.
        teacher: A model to learn from, or None. It is not changed, and no gradient reaches it.
        distillation: What is learnt from it: by default its class scores, with weight one half. Feature and attention
            maps need graphs from :func:`fxopt.trace` for both.
        evaluate: Judges the model after every epoch, in eval mode; higher is better.
        early_stop: When to end before the last epoch, by ``evaluate``. The weights of the best epoch are put back.
        checkpoint: A file without suffix: after every epoch everything is written to ``<checkpoint>.safetensors``, and
            the same call resumes there. Resumed equals uninterrupted, for loaders whose order depends on nothing but
            the epoch, torch's global generator or a DataLoader's own, which are seeded anew for every epoch.
        seed: Seed of torch's global generator (dropout, augmentation) in training; the generator's state outside is
            left alone.
        progress: Told after every epoch.

    Returns:
        The history.

    Raises:
        DataError: If the loader is empty, can be read only once or does not fit the model, ``evaluate`` fails, or
            there is nothing to train.
        FxoptError: If an option is out of range, the checkpoint is of another training, or the loss or a parameter is
            not finite; the model is then as it was after the last good epoch, and so is the checkpoint.
    """
    check_names(optimizer, schedule)
    check_training(epochs, learning_rate)
    check_clip(clip)
    check_types({**_kinds(model, teacher, distillation), "early_stop": (early_stop, EarlyStop)})
    if early_stop is not None and evaluate is None:
        raise FxoptError("early_stop goes by a score; give evaluate, a function of a module, higher is better.")
    if epochs == 0:
        return History()
    first_batch(train, "train")
    teacher = teacher if distillation.needs_teacher else None
    watched = contextlib.nullcontext() if teacher is None else eval_mode(teacher)
    with seeded(seed), watched, keep_zeros(model):
        settings = _Settings(
            epochs=epochs,
            steps=count_batches(train, "train"),
            learning_rate=learning_rate,
            optimizer=optimizer,
            momentum=momentum,
            weight_decay=weight_decay,
            distillation=None if teacher is None else distillation,
            early_stop=early_stop,
            judged=evaluate is not None,
            seed=seed,
            schedule=schedule,
            clip=clip,
        )
        training = _Training(model, train, settings, loss, teacher)
        saved = None if checkpoint is None else Checkpoint(stem_of(checkpoint), asdict(settings))
        history = _Course(training, evaluate, saved).run(progress)
    model.eval()
    return history


def rehearse(
    model: nn.Module,
    train: Loader,
    *,
    epochs: int,
    loss: Loss | None = None,
    learning_rate: float = 0.02,
    teacher: nn.Module | None = None,
    distillation: Distillation = _PLAIN,
) -> None:
    """Look at everything that :func:`fit` needs, on the first batch and without training.

    Args:
        model: The model; it is not changed.
        train: As for ``fit``; so for the others.
        epochs: As for ``fit``; nothing is looked at if 0.
        loss: The loss.
        learning_rate: The learning rate.
        teacher: The teacher.
        distillation: What is learnt from it.

    Raises:
        FxoptError: As ``fit`` would on its first step.
    """
    check_training(epochs, learning_rate)
    check_types(_kinds(model, teacher, distillation))
    if epochs == 0:
        return
    batch = first_batch(train, "train")
    settings = _Settings(epochs=epochs, steps=1, learning_rate=learning_rate, distillation=distillation)
    training = _Training(model, train, settings, loss, teacher if distillation.needs_teacher else None)
    watched = contextlib.nullcontext() if teacher is None else eval_mode(teacher)
    with seeded(0), torch.no_grad(), eval_mode(model), watched:
        training.loss(batch)


def _kinds(model: object, teacher: object, distillation: object) -> dict[str, tuple[object, type]]:
    return {
        "model": (model, nn.Module),
        "teacher": (teacher, nn.Module),
        "distillation": (distillation, Distillation),
    }


class _Course:
    """A training from its first or its next epoch to its end."""

    def __init__(self, training: _Training, evaluate: Judge | None, checkpoint: Checkpoint | None) -> None:
        self._training = training
        self._evaluate = evaluate
        self._checkpoint = checkpoint
        self._stop = training.settings.early_stop
        self._best: dict[str, torch.Tensor] = {}

    def run(self, progress: EpochDone | None) -> History:
        """All epochs that are left; the model has the best weights at the end, if an early stop was asked for."""
        epochs = self._training.settings.epochs
        history = self._resumed()
        for epoch in range(len(history.loss), epochs):
            if self._stop is not None and self._stop.is_over(history.score):
                break
            self._training.limit.start(history.gradient_norm[-1] if history.gradient_norm else 0.0)
            history.loss.append(self._training.run_epoch(epoch))
            history.first_loss = history.first_loss if epoch else self._training.first_loss
            history.gradient_norm.append(self._training.limit.median)
            history.learning_rate.append(self._training.optimizer.param_groups[0]["lr"])
            self._judge(history)
            if self._checkpoint is not None:
                self._checkpoint.save(self._training.model, self._training.optimizer, history, self._best)
            if progress is not None:
                progress(epoch + 1, epochs, history.loss[-1])
        if self._best:
            self._training.model.load_state_dict(self._best)
        return history

    def _resumed(self) -> History:
        history = History()
        if self._checkpoint is not None:
            history, self._best = self._checkpoint.load(self._training.model, self._training.optimizer)
        history.features, history.attention = self._training.features, self._training.attention
        return history

    def _judge(self, history: History) -> None:
        """Note the score of the model, and its weights if they are the best so far."""
        if self._evaluate is None:
            return
        model = self._training.model.eval()
        with blaming("evaluate", "Correct it and run again."), torch.no_grad():
            score = float(self._evaluate(model))
        if not math.isfinite(score):
            raise DataError(f"evaluate gives {score} after epoch {len(history.loss)}; it has to give a finite number.")
        history.score.append(score)
        if self._stop is not None and self._stop.best(history.score) == len(history.score):
            history.best_epoch = len(history.score)
            self._best = _copied(model.state_dict())


class _Training:
    """A model in training."""

    def __init__(
        self, model: nn.Module, train: Loader, settings: _Settings, loss: Loss | None, teacher: nn.Module | None
    ) -> None:
        self.model = model
        self.settings = settings
        self.optimizer = make_optimizer(
            model,
            settings.learning_rate,
            optimizer=settings.optimizer,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
        )
        self.limit = GradientLimit(settings.clip, model)
        self._train = train
        self._loss = loss if loss is not None else cross_entropy
        how = settings.distillation
        self._distiller = None if teacher is None or how is None else Distiller(model, teacher, how)
        self.first_loss = 0.0

    @property
    def features(self) -> list[str]:
        """Places where feature maps are compared."""
        return [] if self._distiller is None else [place.name for place in self._distiller.features]

    @property
    def attention(self) -> list[str]:
        """Places where attention maps are compared."""
        return [] if self._distiller is None else [place.name for place in self._distiller.attention]

    def run_epoch(self, epoch: int) -> float:
        """One pass over the data; its mean loss.

        Raises:
            FxoptError: If a batch does not fit, or the loss or a parameter stops being finite; the model is as it was
                before the epoch, as it is after whatever else stops it.
        """
        good = _copied(self.model.state_dict())
        torch.manual_seed(self.settings.seed + epoch)
        try:
            return self._go_through(epoch)
        except BaseException:
            self.model.load_state_dict(good)
            self.model.eval()
            raise

    def _go_through(self, epoch: int) -> float:
        self.model.train()
        batches = pass_of(self._train, epoch, self.settings.seed)
        total, value, count = 0.0, 0.0, 0
        for index, batch in enumerate(read(batches, "train")):
            value = self._step(epoch * self.settings.steps + index, batch)
            total, count = total + value, count + 1
            if epoch == index == 0:
                self.first_loss = value
            if not math.isfinite(value):
                break
        if not count:
            raise DataError(f"train yields nothing in epoch {epoch + 1}; give a loader that can be read again.")
        if math.isfinite(total) and self._finite():
            return total / count
        what = f"The loss is {value}" if not math.isfinite(value) else "A parameter or buffer is NaN or infinite"
        raise FxoptError(
            f"{what} in epoch {epoch + 1} of {self.settings.epochs}, batch {count}; the model is back at the state "
            f"before that epoch. Lower learning_rate (it is {self.settings.learning_rate:g}) or check data and loss."
        )

    def _step(self, step: int, batch: Any) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate_at(step)
        self.optimizer.zero_grad()
        value = self.loss(batch)
        if bool(torch.isfinite(value.detach()).all()):
            torch.autograd.backward(value)
            self.limit()
            self.optimizer.step()
        return float(value.detach())

    def loss(self, batch: Any) -> torch.Tensor:
        """The loss of a batch, a tensor of one element.

        Raises:
            DataError: If the batch does not fit the model or the loss.
        """
        inputs, label = batch_for(self.model, batch, "train")
        output = _forward(self.model if self._distiller is None else self._distiller.student, inputs)
        own = own_loss(self._loss, output, label)
        return own if self._distiller is None else self._distiller.loss(own, output, inputs)

    def _finite(self) -> bool:
        tensors = (tensor for tensor in self.model.state_dict().values() if tensor.is_floating_point())
        return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)


def own_loss(loss: Loss, output: Any, label: Any) -> torch.Tensor:
    """What a function of output and label gives, a tensor of one element.

    Raises:
        DataError: If it fails, gives something else, or gives what does not depend on an output that has a gradient.
    """
    with blaming("loss", "Correct it, or the labels of train; it is called with the model's output and a label."):
        own: Any = loss(output, label)
    if not isinstance(own, torch.Tensor) or own.numel() != 1:
        raise DataError(f"loss gives {_described(own)}; it has to give a tensor of one element, such as a mean.")
    leaves = pytree.tree_leaves(output)
    if not own.requires_grad and any(isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in leaves):
        raise DataError("loss gives a tensor without a gradient; compute it from the model's output, not detached.")
    return own


def _forward(model: nn.Module, inputs: Any) -> Any:
    try:
        return call_model(model, inputs, "train")
    except DataError as failure:
        if "more than 1 value per channel" not in str(failure):
            raise
        raise DataError(
            "A batch of train holds a single sample, of which batch norm can take no variance; drop the last, smaller "
            "batch (drop_last=True) or choose another batch size."
        ) from failure


def _copied(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in state.items()}


def _described(value: object) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"
