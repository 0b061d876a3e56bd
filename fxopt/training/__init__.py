"""Fine-tuning: a plain training loop that stops on nonsense and resumes where it was."""

from __future__ import annotations

from fxopt._schedules import rising_cosine
from fxopt.training._checkpoint import read_tensors, write_tensors
from fxopt.training._fit import EpochDone, fit, own_loss, rehearse
from fxopt.training._losses import Loss
from fxopt.training._optimizers import keep_zeros, make_optimizer
from fxopt.training._options import Distillation, EarlyStop, FineTuning, History

__all__ = [
    "Distillation",
    "EarlyStop",
    "EpochDone",
    "FineTuning",
    "History",
    "Loss",
    "fit",
    "keep_zeros",
    "make_optimizer",
    "own_loss",
    "read_tensors",
    "rehearse",
    "rising_cosine",
    "write_tensors",
]
