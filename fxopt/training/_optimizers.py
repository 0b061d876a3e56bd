"""What moves the weights, and what keeps some of them where they are."""

from __future__ import annotations

import bisect
import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from fxopt.errors import DataError
from fxopt.graph.sparsity import sparse_sites

__all__ = ["GradientLimit", "keep_zeros", "make_optimizer"]


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


class GradientLimit:
    """Keeps the norm of a step's gradients within a multiple of the median of those before it.

    As AutoClip (Seetharaman et al., MLSP 2020), which takes a percentile of all norms: no scale of loss or network has
    to be known. Quantized networks have their norms folded into the weights, and one large step can throw them off for
    good.

    Args:
        multiple: The multiple; None for no limit.
        model: The model.
    """

    def __init__(self, multiple: float | None, model: nn.Module) -> None:
        self._multiple = multiple
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._norms: list[float] = []

    @property
    def median(self) -> float:
        """The median of the norms so far, each as it was before it was limited; 0 if there is none."""
        return self._norms[len(self._norms) // 2] if self._norms else 0.0

    def start(self, median: float) -> None:
        """Begin an epoch with the median of the one before it, 0 if there is none."""
        self._norms = [median] if median else []

    def __call__(self) -> None:
        """Limit the gradients that the parameters have."""
        if self._multiple is None:
            return
        most = self._multiple * self.median if self._norms else math.inf
        norm = float(nn.utils.clip_grad_norm_(self._parameters, most))
        if 0.0 < norm < math.inf:
            bisect.insort(self._norms, norm)
