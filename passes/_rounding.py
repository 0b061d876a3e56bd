"""Integers for the weights of one layer by the second moments of its inputs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import nn

from fxopt.graph import edit
from fxopt.graph.fake_quantize import QuantizedLayer, WeightQuantizer
from fxopt.graph.grids import held
from fxopt.passes._least_squares import Moments, groups_of

__all__ = ["can_be_rounded", "rounded_layer"]

_Nearest: TypeAlias = Callable[[torch.Tensor], torch.Tensor]
_SWEEPS = 3


def can_be_rounded(layer: nn.Module, most_unknowns: int, most_bits: int) -> bool:
    """Whether a layer is a quantized one whose integers :func:`rounded_layer` can find.

    Args:
        layer: Any module.
        most_unknowns: Layers with more weights for one output are left out.
        most_bits: Layers with more bits are, too.
    """
    if not isinstance(layer, QuantizedLayer) or layer.weight_axis != 0:
        return False
    quantizer = layer.weight_quantizer
    if not isinstance(quantizer, WeightQuantizer) or quantizer.is_binary or quantizer.bits > most_bits:
        return False
    return layer.weight[0].numel() <= most_unknowns


def rounded_layer(given: QuantizedLayer, moments: Moments, ridge: float) -> QuantizedLayer | None:
    """A quantized layer with a weight on its grid, and a bias, for which its outputs stay near; see RoundWeights.

    Args:
        given: The layer; it is left alone.
        moments: Moments of what its weights are multiplied with, and of the outputs that are wanted.
        ridge: Penalty on the distance from the old weights, as a part of the inputs' mean second moment.

    Returns:
        The new layer, or None if the moments lead to numbers that are not finite.
    """
    layer: Any = given
    old = layer.weight.detach().double().flatten(1)
    old = old.reshape(groups_of(layer), -1, old.shape[1])
    has_bias = layer.bias is not None
    weight, _ = moments.fit(old, ridge, has_bias)
    second = moments.xx / moments.count
    mean = moments.x / moments.count
    if has_bias:
        second = torch.baddbmm(second, mean[:, :, None], mean[:, None, :], alpha=-1)
    quantizer = copy.deepcopy(layer.weight_quantizer)
    quantizer.calibrate(weight.flatten(0, 1).reshape(layer.weight.shape).float())
    rounded = _rounded(weight, _damped(second, ridge), quantizer)
    if not bool(torch.isfinite(rounded).all()):
        return None
    new: Any = edit.clone_module(layer)
    new._modules["weight_quantizer"] = quantizer
    # Once more through the quantizer, so that the weight is on its grid to the last bit.
    found = quantizer(rounded.flatten(0, 1).reshape(layer.weight.shape).to(layer.weight.dtype))
    new._parameters["weight"] = nn.Parameter(found, layer.weight.requires_grad)
    if has_bias and moments.y is not None:
        bias = moments.y / moments.count - (rounded @ mean[:, :, None]).squeeze(2)
        new._parameters["bias"] = nn.Parameter(bias.flatten().to(layer.bias.dtype), layer.bias.requires_grad)
    return new  # type: ignore[no-any-return]


def _damped(second: torch.Tensor, ridge: float) -> torch.Tensor:
    """Moments with something on the diagonal, so that they can be inverted and inputs that are dead do not matter."""
    diagonal = second.diagonal(dim1=1, dim2=2)
    unit = diagonal.mean(1, keepdim=True)
    unit = torch.where(unit > 0, unit, torch.ones_like(unit))
    damped = second.clone()
    damped.diagonal(dim1=1, dim2=2).add_(max(ridge, 1e-4) * unit)
    return damped


def _rounded(weight: torch.Tensor, second: torch.Tensor, quantizer: WeightQuantizer) -> torch.Tensor:
    """Weights on the grid of a quantizer, by second moments of their inputs; both by group, float64.

    Args:
        weight: Shape (groups, outputs of a group, unknowns).
        second: Shape (groups, unknowns, unknowns), positive definite.
        quantizer: The quantizer, calibrated.
    """
    groups, outputs, _ = weight.shape
    scale = quantizer.scale.detach().double().reshape(groups, outputs)
    zero = torch.zeros_like(scale)
    if quantizer.zero_point is not None:
        zero = quantizer.zero_point.double().reshape(groups, outputs)

    def nearest(column: torch.Tensor) -> torch.Tensor:
        return held(column, scale, zero, quantizer.bounds)

    order = second.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True)
    columns = order[:, None, :].expand_as(weight)
    moments = second.gather(1, order[:, :, None].expand_as(second)).gather(2, order[:, None, :].expand_as(second))
    sorted_weight = weight.gather(2, columns)
    one, other = (
        _descend(start, sorted_weight, moments, nearest)
        for start in (_by_columns(sorted_weight, moments, nearest), nearest(sorted_weight.movedim(2, 0)).movedim(0, 2))
    )
    losses = [
        (((found - sorted_weight) @ moments) * (found - sorted_weight)).sum(2, keepdim=True) for found in (one, other)
    ]
    return torch.empty_like(weight).scatter_(2, columns, torch.where(losses[0] <= losses[1], one, other))


def _by_columns(
    weight: torch.Tensor, moments: torch.Tensor, nearest: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """GPTQ: every column's error is taken over by the columns behind it."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moments))
    upper = torch.linalg.cholesky(inverse, upper=True)
    left, rounded = weight.clone(), torch.empty_like(weight)
    for column in range(weight.shape[2]):
        now = left[:, :, column]
        rounded[:, :, column] = nearest(now)
        error = (now - rounded[:, :, column]) / upper[:, column, column, None]
        left[:, :, column:] -= error[:, :, None] * upper[:, None, column, column:]
    return rounded


def _descend(
    rounded: torch.Tensor, weight: torch.Tensor, moments: torch.Tensor, nearest: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Every integer in turn to where the error is least with all others as they are."""
    rounded = rounded.clone()
    gradient = (rounded - weight) @ moments
    for _ in range(_SWEEPS):
        for column in range(weight.shape[2]):
            step = gradient[:, :, column] / moments[:, column, column, None]
            better = nearest(rounded[:, :, column] - step)
            change = better - rounded[:, :, column]
            gradient += change[:, :, None] * moments[:, None, column, :]
            rounded[:, :, column] = better
    return rounded
