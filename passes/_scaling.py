"""Scaling the channels of a layer's weight: what the passes that do so exactly have in common."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import fx, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils import parametrize

from fxopt.graph import edit, ops

__all__ = [
    "Layer",
    "along_inputs",
    "along_outputs",
    "outputs_of",
    "readers_of",
    "scale_and_shift",
    "why_not_alone",
    "why_not_plain",
    "with_parameters",
]

Layer: TypeAlias = "_ConvNd | nn.Linear"


def why_not_plain(gm: fx.GraphModule, path: str, module: nn.Module) -> str | None:
    """Why a module does more than its class, or is not alone with its state."""
    if module._forward_hooks or module._forward_pre_hooks:
        return f"{path!r} has forward hooks"
    if parametrize.is_parametrized(module) or not type(module).forward.__module__.startswith("torch.nn.modules"):
        return f"{path!r} is not a plain {type(module).__name__}"
    own = [f"{path}.{name}" for name in (*module._parameters, *module._buffers)]
    if any(str(read.target) in own for read in gm.graph.find_nodes(op="get_attr")):
        return f"the state of {path!r} is also read directly"
    return None


def why_not_alone(gm: fx.GraphModule, path: str, layer: nn.Module) -> str | None:
    """Why a layer's parameters cannot be replaced by others: it is called or read elsewhere, or does more."""
    if len(gm.graph.find_nodes(op="call_module", target=path)) > 1:
        return f"{path!r} is called more than once"
    tensors = {id(tensor) for tensor in layer._parameters.values() if tensor is not None}
    for name, tensor in gm.named_parameters(remove_duplicate=False):
        if id(tensor) in tensors and name.rpartition(".")[0] != path:
            return f"{path!r} shares a parameter with {name!r}"
    return why_not_plain(gm, path, layer)


def readers_of(gm: fx.GraphModule, node: fx.Node) -> list[fx.Node]:
    """Who reads the values of a node, and not only its shape."""
    return [user for user in node.users if ops.semantics(gm, user).flow != "scalar"]


def outputs_of(layer: Layer) -> int:
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels


def along_outputs(layer: Layer, values: torch.Tensor) -> torch.Tensor:
    """One number per output channel, shaped to multiply the weight."""
    kernel = [1] * (layer.weight.dim() - 2)
    if not isinstance(layer, _ConvTransposeNd):
        return values.reshape(-1, 1, *kernel)
    rows = values.reshape(layer.groups, 1, -1).expand(-1, layer.in_channels // layer.groups, -1)
    return rows.reshape(layer.in_channels, -1, *kernel)


def along_inputs(layer: Layer, values: torch.Tensor) -> torch.Tensor:
    """One number per input channel, shaped to multiply the weight."""
    kernel = [1] * (layer.weight.dim() - 2)
    if isinstance(layer, _ConvTransposeNd):
        return values.reshape(-1, 1, *kernel)
    if isinstance(layer, nn.Linear):
        return values.reshape(1, -1)
    rows = values.reshape(layer.groups, 1, -1).expand(-1, layer.out_channels // layer.groups, -1)
    return rows.reshape(layer.out_channels, -1, *kernel)


def with_parameters(layer: Layer, weight: torch.Tensor, bias: torch.Tensor | None, trains_bias: bool) -> nn.Module:
    """A copy of a layer with other parameters."""
    copy = edit.clone_module(layer)
    copy.register_parameter("weight", nn.Parameter(weight.contiguous(), layer.weight.requires_grad))
    copy.register_parameter("bias", None if bias is None else nn.Parameter(bias.contiguous(), trains_bias))
    return copy


def scale_and_shift(norm: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm in float64 as ``y = scale * x + shift``, each of shape (channels,)."""
    scale = torch.rsqrt(norm.running_var.detach().double() + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double()
    shift = -scale * norm.running_mean.detach().double()
    return scale, shift if norm.bias is None else shift + norm.bias.detach().double()
