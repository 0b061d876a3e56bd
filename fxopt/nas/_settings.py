"""How a supernet is trained, and what happens in an epoch of it."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral, Real
from typing import Literal, TypeAlias, get_args

from fxopt._numbers import check_below_one, check_not_negative, check_positive, check_whole
from fxopt.errors import FxoptError, UnknownNameError

__all__ = ["Epoch", "SupernetSettings"]

_Method: TypeAlias = Literal["binary", "binary-all", "relaxed", "reinforce", "uniform"]
_METHODS = get_args(_Method)


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
