"""What training makes small."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import nn

from fxopt.data import class_labels, class_scores
from fxopt.errors import DataError

__all__ = ["Loss", "attention_distance", "attention_map", "cross_entropy", "feature_distance", "score_distance"]

Loss: TypeAlias = Callable[[Any, Any], torch.Tensor]
"""``loss(output, label)``, a tensor of one element."""

_OTHER_TASKS = "give loss=callable(output, label) -> scalar"
_NOT_SCORES = (
    "only class scores can be distilled, so leave the teacher out (distil=False), or give Distillation(logits=0)"
)
_LEAST = 1e-12


def cross_entropy(output: Any, label: Any) -> torch.Tensor:
    """Cross entropy of class scores, with class numbers or probabilities for labels.

    Raises:
        DataError: If there are no class scores, or labels do not fit them.
    """
    scores = class_scores(output, _OTHER_TASKS)
    labels = class_labels(label, scores, "train", f"for another task {_OTHER_TASKS}")
    return nn.functional.cross_entropy(scores, labels)


def score_distance(output: Any, wanted: Any, temperature: float) -> torch.Tensor:
    """Mean divergence of softened class scores, times the temperature squared (Hinton et al. 2015, section 2).

    Raises:
        DataError: If there are no class scores, or the teacher has others.
    """
    mine, other = (class_scores(one, _NOT_SCORES) / temperature for one in (output, wanted))
    if mine.shape != other.shape:
        raise DataError(
            f"The model gives class scores of shape {tuple(mine.shape)} and its teacher of {tuple(other.shape)}; give "
            "a teacher of the same classes, or Distillation(logits=0)."
        )
    divergence = nn.functional.kl_div(mine.log_softmax(1), other.log_softmax(1), log_target=True, reduction="none")
    return temperature**2 * divergence.sum(1).mean()


def feature_distance(mine: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Squared error relative to what is wanted, ``|s - t|^2 / |t|^2`` over the whole batch.

    Args:
        mine: A value, shape (samples, ...).
        wanted: The teacher's, of the same shape.
    """
    return (mine - wanted).square().sum() / wanted.square().sum().clamp(min=_LEAST)


def attention_map(value: torch.Tensor, channels: int) -> torch.Tensor:
    """The sum of the squared channels at each position, divided by its norm over the positions of a sample.

    Zagoruyko & Komodakis 2017, section 3.1, ``F_sum^2`` and equation 2.

    Args:
        value: A value, shape (samples, ...).
        channels: The dimension of its channels.

    Returns:
        Shape (samples, positions).
    """
    return nn.functional.normalize(value.square().sum(channels).flatten(1), dim=1, eps=_LEAST)


def attention_distance(mine: torch.Tensor, wanted: torch.Tensor, channels: int) -> torch.Tensor:
    """Squared distance of two attention maps, mean over samples; in [0, 2]."""
    return (attention_map(mine, channels) - attention_map(wanted, channels)).square().sum(1).mean()
