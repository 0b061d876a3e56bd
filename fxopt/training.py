"""Fine-tuning: a plain training loop that stops on nonsense and resumes where it was."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from fxopt._files import replacing
from fxopt._schedules import SCHEDULES, rising_cosine
from fxopt.data import (
    Loader,
    TensorLoader,
    batch_for,
    blaming,
    call_model,
    class_numbers,
    class_scores,
    first_batch,
    read,
)
from fxopt.errors import DataError, FxoptError, UnknownNameError
from fxopt.graph import eval_mode
from fxopt.graph.sparsity import sparse_sites

__all__ = [
    "History",
    "fit",
    "keep_zeros",
    "make_optimizer",
    "read_tensors",
    "rehearse",
    "rising_cosine",
    "write_tensors",
]

Loss: TypeAlias = Callable[[Any, Any], torch.Tensor]
"""``loss(output, label)``, a tensor of one element."""

EpochDone: TypeAlias = Callable[[int, int, float], None]
"""Told after every epoch: its number from 1, how many there are, and its mean loss."""

_OTHER_TASKS = "give loss=callable(output, label) -> scalar"
_OPTIMIZERS = ("sgd", "adamw")
_MODEL, _OPTIMIZER = "model.", "optimizer."
_TEMPERATURE = 2.0
_TEACHER_SHARE = 0.5


@dataclass
class History:
    """What happened in training.

    Attributes:
        loss: Mean training loss of every epoch.
        learning_rate: Learning rate at the end of every epoch.
        resumed_at: How many epochs came from a checkpoint; 0 for a fresh start.
    """

    loss: list[float] = field(default_factory=list)
    learning_rate: list[float] = field(default_factory=list)
    resumed_at: int = 0


@dataclass(frozen=True)
class _Settings:
    """What has to be the same for training to be resumed."""

    epochs: int
    steps: int
    learning_rate: float
    optimizer: str = "sgd"
    momentum: float = 0.9
    weight_decay: float = 1e-4
    temperature: float | None = _TEMPERATURE
    seed: int = 0

    schedule: str = "cosine"

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
    optimizer: Literal["sgd", "adamw"] = "sgd",
    schedule: Literal["cosine", "step", "one-cycle", "constant"] = "cosine",
    momentum: float = 0.9,
    weight_decay: float = 1e-4,
    teacher: nn.Module | None = None,
    temperature: float = _TEMPERATURE,
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
        teacher: A model whose class scores are distilled (Hinton et al. 2015) with weight one half, or None.
        temperature: Temperature of the distillation.
        checkpoint: A file without suffix: after every epoch everything is written to ``<checkpoint>.safetensors``, and
            the same call resumes there. Resumed equals uninterrupted, for loaders whose order depends on nothing but
            the epoch or torch's global generator, which is seeded anew for every epoch.
        seed: Seed of torch's global generator (dropout, augmentation) in training; the generator's state outside is
            left alone.
        progress: Told after every epoch.

    Returns:
        The history.

    Raises:
        DataError: If the loader is empty, can be read only once or does not fit the model, or there is nothing to
            train.
        FxoptError: If an option is out of range, the checkpoint is of another training, or the loss or a parameter is
            not finite; the model is then as it was after the last good epoch, and so is the checkpoint.
    """
    _check_options(epochs, learning_rate, optimizer, temperature)
    if schedule not in SCHEDULES:
        raise UnknownNameError("schedule", schedule, SCHEDULES)
    if epochs == 0:
        return History()
    first_batch(train, "train")
    stem = Path(checkpoint) if checkpoint is not None else None
    watched = contextlib.nullcontext() if teacher is None else eval_mode(teacher)
    with torch.random.fork_rng(), watched, keep_zeros(model):
        torch.manual_seed(seed)
        settings = _Settings(
            epochs=epochs,
            steps=_count(train),
            learning_rate=learning_rate,
            optimizer=optimizer,
            momentum=momentum,
            weight_decay=weight_decay,
            temperature=None if teacher is None else temperature,
            seed=seed,
            schedule=schedule,
        )
        training = _Training(model, train, settings, loss, teacher)
        history = _resume(training, stem)
        for epoch in range(len(history.loss), epochs):
            history.loss.append(training.run_epoch(epoch))
            history.learning_rate.append(training.optimizer.param_groups[0]["lr"])
            if stem is not None:
                _save(training, stem, history)
            if progress is not None:
                progress(epoch + 1, epochs, history.loss[-1])
    model.eval()
    return history


@contextlib.contextmanager
def keep_zeros(model: nn.Module) -> Iterator[None]:
    """Let no gradient reach the zeros in the weights of sparse layers, for a training loop of one's own.

    Under SGD, Adam and AdamW, with or without momentum and weight decay, a weight that is zero and whose gradient is
    zero stays zero; optimizers are to be made anew after the weights were zeroed.

    Args:
        model: The graph that ``SparsifyWeights`` gave; any other module is left as it is.
    """
    weights: list[Any] = [model.get_submodule(site).weight for site in sparse_sites(model)]
    handles = []
    for weight in weights:
        if weight.requires_grad:
            mask = weight.detach() != 0
            handles.append(weight.register_hook(lambda gradient, mask=mask: gradient * mask))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def rehearse(
    model: nn.Module,
    train: Loader,
    *,
    epochs: int,
    loss: Loss | None = None,
    learning_rate: float = 0.02,
    teacher: nn.Module | None = None,
) -> None:
    """Look at everything that :func:`fit` needs, on the first batch and without training.

    Args:
        model: The model; it is not changed.
        train: As for ``fit``; so for the others.
        epochs: As for ``fit``; nothing is looked at if 0.
        loss: The loss.
        learning_rate: The learning rate.
        teacher: The teacher.

    Raises:
        FxoptError: As ``fit`` would on its first step.
    """
    _check_options(epochs, learning_rate, "sgd", _TEMPERATURE)
    if epochs == 0:
        return
    batch = first_batch(train, "train")
    settings = _Settings(epochs=epochs, steps=1, learning_rate=learning_rate)
    training = _Training(model, train, settings, loss, teacher)
    with torch.random.fork_rng(), torch.no_grad(), eval_mode(model):
        training.loss(batch)


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
        self._train = train
        self._loss = loss if loss is not None else _cross_entropy
        self._teacher = teacher

    def run_epoch(self, epoch: int) -> float:
        """One pass over the data; its mean loss.

        Raises:
            FxoptError: If a batch does not fit, or the loss or a parameter stops being finite; the model is as it was
                before the epoch, as it is after whatever else stops it.
        """
        good = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        torch.manual_seed(self.settings.seed + epoch)
        try:
            return self._go_through(epoch)
        except BaseException:
            self.model.load_state_dict(good)
            self.model.eval()
            raise

    def _go_through(self, epoch: int) -> float:
        self.model.train()
        batches = self._train.at_epoch(epoch) if isinstance(self._train, TensorLoader) else self._train
        total, value, count = 0.0, 0.0, 0
        for index, batch in enumerate(read(batches, "train")):
            value = self._step(epoch * self.settings.steps + index, batch)
            total, count = total + value, count + 1
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
            self.optimizer.step()
        return float(value.detach())

    def loss(self, batch: Any) -> torch.Tensor:
        """The loss of a batch, a tensor of one element.

        Raises:
            DataError: If the batch does not fit the model or the loss.
        """
        inputs, label = batch_for(self.model, batch, "train")
        output = _forward(self.model, inputs)
        with blaming("loss", "Correct it, or the labels of train; it is called with the model's output and a label."):
            own: Any = self._loss(output, label)
        if not isinstance(own, torch.Tensor) or own.numel() != 1:
            raise DataError(f"loss gives {_described(own)}; it has to give a tensor of one element, such as a mean.")
        if self._teacher is None or self.settings.temperature is None:
            return own
        with torch.no_grad():
            wanted = call_model(self._teacher, inputs, "train")
        soft = _distance(output, wanted, self.settings.temperature)
        return torch.lerp(own.squeeze(), soft, _TEACHER_SHARE)

    def _finite(self) -> bool:
        tensors = (tensor for tensor in self.model.state_dict().values() if tensor.is_floating_point())
        return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)


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


def _cross_entropy(output: Any, label: Any) -> torch.Tensor:
    scores = class_scores(output, _OTHER_TASKS)
    if isinstance(label, torch.Tensor) and label.is_floating_point() and label.shape == scores.shape:
        return nn.functional.cross_entropy(scores, label)
    numbers = class_numbers(label, scores, "train", f"for another task {_OTHER_TASKS}")
    return nn.functional.cross_entropy(scores, numbers)


def _distance(output: Any, wanted: Any, temperature: float) -> torch.Tensor:
    """Mean divergence of softened class scores, times the temperature squared (Hinton et al. 2015, section 2)."""
    remedy = "only class scores can be distilled, so leave the teacher out"
    mine, other = (class_scores(one, remedy) / temperature for one in (output, wanted))
    divergence = nn.functional.kl_div(mine.log_softmax(1), other.log_softmax(1), log_target=True, reduction="none")
    return temperature**2 * divergence.sum(1).mean()


def make_optimizer(
    model: nn.Module,
    learning_rate: float,
    *,
    optimizer: str = "sgd",
    momentum: float = 0.9,
    weight_decay: float = 1e-4,
) -> torch.optim.Optimizer:
    """An optimizer of all trainable parameters, of which those of one dimension do not decay; see :func:`fit`.

    Raises:
        DataError: If there is nothing to train.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise DataError(
            "The model has no parameter to train; set requires_grad on what shall be trained, or ask for no epochs."
        )
    groups: list[dict[str, Any]] = [
        {"params": [one for one in parameters if one.dim() > 1], "weight_decay": weight_decay},
        {"params": [one for one in parameters if one.dim() <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=learning_rate, betas=(momentum, 0.999))
    return torch.optim.SGD(groups, lr=learning_rate, momentum=momentum, nesterov=momentum > 0.0)


def _check_options(epochs: int, learning_rate: float, optimizer: str, temperature: float) -> None:
    if epochs < 0:
        raise FxoptError(f"epochs has to be at least 0, got {epochs}.")
    if optimizer not in _OPTIMIZERS:
        raise UnknownNameError("optimizer", optimizer, _OPTIMIZERS)
    for name, value in (("learning_rate", learning_rate), ("temperature", temperature)):
        if not (math.isfinite(value) and value > 0.0):
            raise FxoptError(f"{name} has to be above zero and finite, got {value}.")


def _count(train: Loader) -> int:
    try:
        return len(train)  # type: ignore[arg-type]
    except TypeError:
        return sum(1 for _ in read(train, "train"))


def _described(value: object) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"


def write_tensors(stem: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write ``<stem>.safetensors`` whole or not at all.

    Raises:
        FxoptError: If it cannot be written; what stood there is untouched.
    """
    path = _file(stem)
    own = {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}
    with replacing(path) as scratch:
        try:
            save_file(own, scratch, metadata=dict(metadata or {}))
        except SafetensorError as failure:
            raise FxoptError(f"Cannot write {path}: {failure}. Choose a folder that has space.") from failure


def read_tensors(stem: Path) -> tuple[Path, dict[str, torch.Tensor], dict[str, str]] | None:
    """Path, tensors and metadata of ``<stem>.safetensors``; None if there is no such file.

    Raises:
        FxoptError: If it cannot be read.
    """
    path = _file(stem)
    if not path.exists():
        return None
    with _reading(path):
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        return path, load_file(path), metadata


def _save(training: _Training, stem: Path, history: History) -> None:
    tensors = {f"{_MODEL}{name}": tensor for name, tensor in training.model.state_dict().items()}
    for index, state in training.optimizer.state_dict()["state"].items():
        found = {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
        tensors |= {f"{_OPTIMIZER}{index}.{key}": value for key, value in found.items()}
    metadata = {"history": json.dumps(asdict(history)), "settings": json.dumps(asdict(training.settings))}
    write_tensors(stem, tensors, metadata)


def _resume(training: _Training, stem: Path | None) -> History:
    """Put the training at the state that was saved, if there is one."""
    found = None if stem is None else read_tensors(stem)
    if found is None:
        return History()
    path, tensors, metadata = found
    with _reading(path):
        saved, settings = json.loads(metadata["history"]), json.loads(metadata["settings"])
    _check_settings(path, settings, asdict(training.settings))
    with _reading(path):
        parts = {prefix: _with_prefix(tensors, prefix) for prefix in (_MODEL, _OPTIMIZER)}
        training.model.load_state_dict(parts[_MODEL])
        state = training.optimizer.state_dict()
        state["state"] = {}
        for name, tensor in parts[_OPTIMIZER].items():
            index, _, key = name.partition(".")
            state["state"].setdefault(int(index), {})[key] = tensor
        training.optimizer.load_state_dict(state)
        return History(saved["loss"], saved["learning_rate"], resumed_at=len(saved["loss"]))


def _check_settings(path: Path, saved: Mapping[str, Any], mine: Mapping[str, Any]) -> None:
    for name, value in mine.items():
        if saved.get(name) != value:
            raise FxoptError(
                f"{path} is a checkpoint of a training with {name} = {saved.get(name)}, this one has {value}. "
                "Give the same options to resume, or remove the file to start afresh."
            )


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError, KeyError, ValueError, RuntimeError) as failure:
        reason = (str(failure).splitlines() or [""])[0]
        raise FxoptError(f"{path} is no checkpoint of this model: {reason} Remove it to start afresh.") from failure


def _with_prefix(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _file(stem: Path) -> Path:
    return stem.with_name(f"{stem.name}.safetensors")
