"""How to train, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias, get_args

from fxopt._numbers import check_below_one, check_not_negative, check_positive, check_whole
from fxopt._schedules import SCHEDULES
from fxopt.errors import FxoptError, UnknownNameError

__all__ = ["Distillation", "EarlyStop", "FineTuning", "History", "OptimizerName", "ScalesName", "ScheduleName"]

_DIVERGED = 1e3

OptimizerName: TypeAlias = Literal["sgd", "adamw"]
ScheduleName: TypeAlias = Literal["cosine", "step", "one-cycle", "constant"]

ScalesName: TypeAlias = Literal["lsq", "pact", "fixed"]

_OPTIMIZERS, _SCALES = get_args(OptimizerName), get_args(ScalesName)


def check_types(kinds: Mapping[str, tuple[object, type]]) -> None:
    """Options are what they should be.

    Args:
        kinds: By the option's name, what was given and what is taken; None is taken, too.

    Raises:
        FxoptError: Naming the first that is something else.
    """
    for name, (given, kind) in kinds.items():
        if given is not None and not isinstance(given, kind):
            wanted = f"{kind.__module__}.{kind.__name__}".replace("._options", "").replace(".modules.module", "")
            raise FxoptError(f"{name} is a {type(given).__name__}; give a {wanted}.")


@dataclass(frozen=True)
class Distillation:
    """What a student learns from its teacher, usually the model before it was pruned.

    The loss is ``(1 - logits) * own + logits * soft + features * F + attention * A``, where

    - ``soft`` is the divergence of the class scores, softened by the temperature (Hinton et al. 2015, section 2);
    - ``F`` is the squared error of a feature map relative to the teacher's, ``|s - t|^2 / |t|^2``, which needs maps of
      equal shape;
    - ``A`` is the squared distance of attention maps (Zagoruyko & Komodakis 2017, equation 2): the sum of the squared
      channels at each position, divided by its norm over all positions of a sample. Channels may differ in number.

    ``F``, taken over the whole batch, and ``A``, a mean over samples, are means over places. Places are nodes that the
    graphs of teacher and student share by name; those whose shapes do not allow it are left out, and :class:`History`
    names the others.

    Attributes:
        logits: Share of the teacher's class scores in the loss, in [0, 1].
        temperature: Temperature of the class scores.
        features: Weight of the feature maps, at least 0.
        attention: Weight of the attention maps, at least 0.
        sites: Patterns (``fnmatch``) of module paths or names of nodes to compare at. None takes the outputs of blocks:
            sums of a residual stream, and the last value of each spatial size.

    Raises:
        FxoptError: If an option is out of range.
    """

    logits: float = 0.5
    temperature: float = 2.0
    features: float = 0.0
    attention: float = 0.0
    sites: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        """Check the options."""
        if not 0.0 <= self.logits <= 1.0:
            raise FxoptError(f"logits, the share of the teacher's class scores, lies in [0, 1]; got {self.logits!r}.")
        check_positive(temperature=self.temperature)
        check_not_negative(features=self.features, attention=self.attention)
        if self.sites is not None:
            given: Any = self.sites
            patterns = (given,) if isinstance(given, str) else tuple(given)
            if not patterns or not all(isinstance(pattern, str) for pattern in patterns):
                raise FxoptError(f"sites takes patterns of module paths or names of nodes, got {self.sites!r}.")
            object.__setattr__(self, "sites", patterns)

    def of_scores(self) -> Distillation:
        """The same without feature and attention maps."""
        return replace(self, features=0.0, attention=0.0, sites=None)

    @property
    def looks_inside(self) -> bool:
        """Whether values inside the graphs are compared."""
        return self.features > 0.0 or self.attention > 0.0

    @property
    def needs_teacher(self) -> bool:
        """Whether a teacher is asked for anything."""
        return self.looks_inside or self.logits > 0.0


@dataclass(frozen=True)
class EarlyStop:
    """When training ends before its last epoch; the weights of the best epoch are then put back.

    Attributes:
        patience: Epochs that the score may go without being better than the best one.
        min_delta: By how much it has to be better, at least 0.

    Raises:
        FxoptError: If an option is out of range.
    """

    patience: int = 3
    min_delta: float = 0.0

    def __post_init__(self) -> None:
        """Check the options."""
        given: Any = self.patience
        if not isinstance(given, int) or isinstance(given, bool) or given < 1:
            raise FxoptError(f"patience is a whole number of epochs, at least 1; got {self.patience!r}.")
        check_not_negative(min_delta=self.min_delta)

    def best(self, scores: Sequence[float]) -> int:
        """The number, from 1, of the epoch with the best score; 0 if there is none yet."""
        found = 0
        for number, score in enumerate(scores, start=1):
            if not found or score > scores[found - 1] + self.min_delta:
                found = number
        return found

    def is_over(self, scores: Sequence[float]) -> bool:
        """Whether the scores have gone without a better one for too long."""
        return len(scores) - self.best(scores) >= self.patience


@dataclass(frozen=True)
class FineTuning:
    """How ``fxopt.optimize`` fine-tunes; see :func:`fit`.

    Where there is something to judge by, ``val`` or ``evaluate``, training that ends below the score it started from is
    taken back, and the report says so; so is training whose loss has :attr:`diverged <History.diverged>`.

    Attributes:
        optimizer: "sgd" or "adamw".
        schedule: How the learning rate goes.
        momentum: Momentum of SGD, and the first beta of AdamW.
        weight_decay: Decay of parameters with more than one dimension.
        distillation: What is learnt from the model as it was before; None for nothing.
        early_stop: When to end before the last epoch, by the score that the search goes by; None for never.
        scales: What becomes of the scales of quantizers where the quantized network is trained: "lsq" learns step sizes
            (Esser et al. 2020), "pact" the clipping bounds of activations and step sizes of weights (Choi et al. 2018),
            "fixed" leaves those of activations, and those of weights follow the weights. Scales that are powers of two
            are never learned.
        quantized_rate: Its highest learning rate, relative to that in floats: it has only to make up for rounding.
        quantized_clip: Its largest norm of gradients, as a multiple of the median of the steps before: with batch norm
            folded into the weights, one large step can throw a network off for good. None for no limit.

    Raises:
        UnknownNameError: If there is no such optimizer, schedule or way with scales.
        FxoptError: If a number is out of range.
    """

    optimizer: OptimizerName = "sgd"
    schedule: ScheduleName = "cosine"
    momentum: float = 0.9
    weight_decay: float = 1e-4
    distillation: Distillation | None = Distillation()
    early_stop: EarlyStop | None = None
    scales: ScalesName = "lsq"
    quantized_rate: float = 0.25
    quantized_clip: float | None = 2.0

    def __post_init__(self) -> None:
        """Check the options."""
        check_names(self.optimizer, self.schedule)
        if self.scales not in _SCALES:
            raise UnknownNameError("way with scales", self.scales, _SCALES)
        check_positive(quantized_rate=self.quantized_rate)
        check_clip(self.quantized_clip)
        check_below_one(momentum=self.momentum)
        check_not_negative(weight_decay=self.weight_decay)


@dataclass
class History:
    """What happened in training.

    Attributes:
        loss: Mean training loss of every epoch.
        learning_rate: Learning rate at the end of every epoch.
        gradient_norm: Median norm of the gradients of every epoch, before they were scaled down; 0 without ``clip``.
        score: Score of the model after every epoch, if it was judged.
        best_epoch: The epoch, from 1, whose weights the model has, if an early stop was asked for; else 0.
        features: Places where feature maps were compared with a teacher's.
        attention: Places where attention maps were.
        resumed_at: How many epochs came from a checkpoint; 0 for a fresh start.
        first_loss: Loss of the first batch; 0 without any.
    """

    loss: list[float] = field(default_factory=list)
    learning_rate: list[float] = field(default_factory=list)
    gradient_norm: list[float] = field(default_factory=list)
    score: list[float] = field(default_factory=list)
    best_epoch: int = 0
    features: list[str] = field(default_factory=list)
    attention: list[str] = field(default_factory=list)
    resumed_at: int = 0
    first_loss: float = 0.0

    @property
    def diverged(self) -> bool:
        """Whether the loss ended a thousand times as high as it began: finite, but nothing was learnt."""
        return bool(self.loss) and self.loss[-1] > _DIVERGED * max(abs(self.first_loss), 1.0)


def check_names(optimizer: str, schedule: str) -> None:
    """An optimizer and a schedule are known.

    Raises:
        UnknownNameError: If not; suggests the nearest name.
    """
    if optimizer not in _OPTIMIZERS:
        raise UnknownNameError("optimizer", optimizer, _OPTIMIZERS)
    if schedule not in SCHEDULES:
        raise UnknownNameError("schedule", schedule, SCHEDULES)


def check_clip(clip: float | None) -> None:
    """A limit of gradients is a positive number, or none.

    Raises:
        FxoptError: If not.
    """
    if clip is not None:
        check_positive(clip=clip)


def check_training(epochs: int, learning_rate: float) -> None:
    """Epochs and learning rate are in range.

    Raises:
        FxoptError: If not.
    """
    check_whole(0, epochs=epochs)
    check_positive(learning_rate=learning_rate)
