"""Fold batch norms in eval mode into the layers next to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils import parametrize

from fxopt.graph import edit, ops
from fxopt.passes._calibrate import OUTPUT_MOMENTS
from fxopt.passes._fork import fork
from fxopt.passes.base import Pass, PassResult, Refusal

__all__ = ["FoldBatchNorm"]

_Layer: TypeAlias = "_ConvNd | nn.Linear"


@dataclass(frozen=True)
class FoldBatchNorm(Pass):
    """Fold batch norms in eval mode into the convolution or linear layer before them, or else after them.

    A batch norm in eval mode is ``y = s * x + t`` per channel, with ``s = weight / sqrt(running_var + eps)`` and
    ``t = bias - s * running_mean``. Folding is exact: it is done in float64 and rounded once.

    1. After a layer that nothing else reads: ``W' = s * W`` over the output channels, ``b' = s * b + t``.
    2. Before a layer, if nothing else reads the norm: ``W' = W * s`` over the input channels, ``b' = b + W t``. Where
       the layer pads with zeros, and for a transposed convolution, this is exact only if ``t`` is zero.

    All dimensions, groups and strides are handled, and norms without affine parameters. What is not exact is refused:
    :meth:`explain` says where and why. The layer is replaced by a copy with new parameters at the same path, the norm's
    state leaves the state dict. A layer that a norm behind it was folded into remembers what the norm says of its
    outputs, mean and standard deviation by channel; Quantize without data goes by that.
    """

    name: ClassVar[str] = "fold-batch-norm"

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Fold what can be folded."""
        folded, _ = _fold(graph_module)
        if folded:
            edit.finish(graph_module)
        return PassResult(graph_module, folded > 0)

    def explain(self, graph_module: fx.GraphModule) -> tuple[Refusal, ...]:
        """The batch norms that would be left, in graph order, each with the reason; the graph is not changed."""
        return _fold(fork(graph_module))[1]


def _fold(gm: fx.GraphModule) -> tuple[int, tuple[Refusal, ...]]:
    folded, refusals = 0, []
    for node in list(gm.graph.nodes):
        norm = _module(gm, node)
        if not isinstance(norm, _BatchNorm):
            continue
        reason = _why_unfit(gm, node, norm)
        if reason is None:
            after = _fold_into_producer(gm, node, norm)
            before = _fold_into_consumer(gm, node, norm) if after else None
            reason = f"{after}; {before}" if after and before else None
        if reason is None:
            folded += 1
        else:
            refusals.append(Refusal(node.name, str(node.target), reason))
    return folded, tuple(refusals)


def _module(gm: fx.GraphModule, node: fx.Node | None) -> nn.Module | None:
    return gm.get_submodule(str(node.target)) if node is not None and node.op == "call_module" else None


def _why_unfit(gm: fx.GraphModule, node: fx.Node, norm: _BatchNorm) -> str | None:
    """Why a batch norm is no fixed scale and shift."""
    if norm.running_mean is None or norm.running_var is None:
        return "it keeps no running statistics, so that it normalizes every batch by itself"
    if norm.training:
        return "it is in training mode; call eval() on the graph first"
    if not isinstance(node.args[0], fx.Node):
        return "its input is not positional"
    return _why_not_plain(gm, str(node.target), norm)


def _why_not_plain(gm: fx.GraphModule, path: str, module: nn.Module) -> str | None:
    """Why a module does more than its class, or is not alone with its state."""
    if module._forward_hooks or module._forward_pre_hooks:
        return f"{path!r} has forward hooks"
    if parametrize.is_parametrized(module) or not type(module).forward.__module__.startswith("torch.nn.modules"):
        return f"{path!r} is not a plain {type(module).__name__}"
    own = [f"{path}.{name}" for name in (*module._parameters, *module._buffers)]
    if any(str(read.target) in own for read in gm.graph.find_nodes(op="get_attr")):
        return f"the state of {path!r} is also read directly"
    return None


def _layer_or_reason(gm: fx.GraphModule, node: fx.Node | None, norm: fx.Node, side: str) -> _Layer | str:
    """The layer that a node calls if it can take a norm in, otherwise why it cannot."""
    layer = _module(gm, node)
    if node is None or not isinstance(layer, (_ConvNd, nn.Linear)):
        what = "an input" if node is None else ops.semantics(gm, node).name
        return f"{side} it is {what}, no convolution or linear layer"
    path = str(node.target)
    if len(gm.graph.find_nodes(op="call_module", target=path)) > 1:
        return f"{path!r} is called more than once"
    tensors = {id(tensor) for tensor in layer._parameters.values() if tensor is not None}
    for name, tensor in gm.named_parameters(remove_duplicate=False):
        if id(tensor) in tensors and name.rpartition(".")[0] != path:
            return f"{path!r} shares a parameter with {name!r}"
    if len(edit.shape(norm)) != (2 if isinstance(layer, nn.Linear) else layer.weight.dim()):
        return f"the channels of {path!r} are not in the dimension that is normalized"
    return _why_not_plain(gm, path, layer) or layer


def _readers(gm: fx.GraphModule, node: fx.Node) -> list[fx.Node]:
    """Who reads the values of a node, and not only its shape."""
    return [user for user in node.users if ops.semantics(gm, user).flow != "scalar"]


def _fold_into_producer(gm: fx.GraphModule, node: fx.Node, norm: _BatchNorm) -> str | None:
    """Fold into the layer before; None if done, otherwise why not."""
    producer = node.args[0]
    layer = _layer_or_reason(gm, producer if isinstance(producer, fx.Node) else None, node, "before")
    if isinstance(layer, str) or not isinstance(producer, fx.Node):
        return str(layer)
    others = [reader.name for reader in _readers(gm, producer) if reader is not node]
    if others:
        return f"{producer.name!r} before it is also read by {others[0]!r}"
    scale, shift = _scale_and_shift(norm)
    weight = layer.weight.detach().double() * _along_outputs(layer, scale)
    bias = shift if layer.bias is None else layer.bias.detach().double() * scale + shift
    reason = _install(gm, producer, layer, weight, bias, norm)
    if reason is None:
        affine: Any = norm
        size = torch.ones_like(shift) if affine.weight is None else affine.weight.detach().abs()
        centre = torch.zeros_like(shift) if affine.bias is None else affine.bias.detach()
        gm.get_submodule(str(producer.target)).__dict__[OUTPUT_MOMENTS] = (centre, size)
        _bypass(gm, node, producer)
    return reason


def _fold_into_consumer(gm: fx.GraphModule, node: fx.Node, norm: _BatchNorm) -> str | None:
    """Fold into the layer after; None if done, otherwise why not."""
    readers = _readers(gm, node)
    if len(readers) != 1 or readers[0].args[:1] != (node,):
        return f"{len(readers)} operators read it"
    layer = _layer_or_reason(gm, readers[0], node, "after")
    if isinstance(layer, str):
        return layer
    scale, shift = _scale_and_shift(norm)
    if bool(shift.any()):
        if isinstance(layer, _ConvTransposeNd):
            return f"{str(readers[0].target)!r} is transposed, so that its borders see less of the shift"
        if isinstance(layer, _ConvNd) and _pads_with_zeros(layer):
            return f"{str(readers[0].target)!r} pads with zeros after the shift"
    weight = layer.weight.detach().double()
    bias = torch.zeros(_outputs(layer)).double() if layer.bias is None else layer.bias.detach().double()
    if not isinstance(layer, _ConvTransposeNd):
        bias = bias + (weight * _along_inputs(layer, shift)).flatten(1).sum(1)
    reason = _install(gm, readers[0], layer, weight * _along_inputs(layer, scale), bias, norm)
    if reason is None:
        _bypass(gm, node, node.args[0])
    return reason


def _scale_and_shift(norm: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm in float64 as ``y = scale * x + shift``, each of shape (channels,)."""
    scale = torch.rsqrt(norm.running_var.detach().double() + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double()
    shift = -scale * norm.running_mean.detach().double()
    return scale, shift if norm.bias is None else shift + norm.bias.detach().double()


def _outputs(layer: _Layer) -> int:
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels


def _along_outputs(layer: _Layer, values: torch.Tensor) -> torch.Tensor:
    """One number per output channel, shaped to multiply the weight."""
    kernel = [1] * (layer.weight.dim() - 2)
    if not isinstance(layer, _ConvTransposeNd):
        return values.reshape(-1, 1, *kernel)
    rows = values.reshape(layer.groups, 1, -1).expand(-1, layer.in_channels // layer.groups, -1)
    return rows.reshape(layer.in_channels, -1, *kernel)


def _along_inputs(layer: _Layer, values: torch.Tensor) -> torch.Tensor:
    """One number per input channel, shaped to multiply the weight."""
    kernel = [1] * (layer.weight.dim() - 2)
    if isinstance(layer, _ConvTransposeNd):
        return values.reshape(-1, 1, *kernel)
    if isinstance(layer, nn.Linear):
        return values.reshape(1, -1)
    rows = values.reshape(layer.groups, 1, -1).expand(-1, layer.out_channels // layer.groups, -1)
    return rows.reshape(layer.out_channels, -1, *kernel)


def _pads_with_zeros(layer: _ConvNd) -> bool:
    padding: Any = layer.padding
    if layer.padding_mode != "zeros" or padding == "valid":
        return False
    return padding == "same" or any(width != 0 for width in padding)


def _install(
    gm: fx.GraphModule, node: fx.Node, layer: _Layer, weight: torch.Tensor, bias: torch.Tensor, norm: Any
) -> str | None:
    """Put a copy of the layer with new parameters in its place; None if done, otherwise why not."""
    kind = layer.weight.dtype
    weight, rounded = weight.to(kind), bias.to(kind)
    if not bool(torch.isfinite(weight).all()) or not bool(torch.isfinite(rounded).all()):
        return f"the folded parameters of {str(node.target)!r} are not finite in {kind}"
    trainable = layer.weight.requires_grad
    sources: tuple[Any, ...] = (layer.bias, norm.bias)
    trains_bias = next((source.requires_grad for source in sources if source is not None), trainable)
    copy = edit.clone_module(layer)
    copy.register_parameter("weight", nn.Parameter(weight.contiguous(), trainable))
    copy.register_parameter("bias", nn.Parameter(rounded.contiguous(), trains_bias))
    edit.replace_module(gm, str(node.target), copy)
    return None


def _bypass(gm: fx.GraphModule, node: fx.Node, source: Any) -> None:
    """Let the norm's readers read ``source``; submodules at the norm's path stay where they are."""
    edit.replace_uses(node, source)
    path = str(node.target)
    children = dict(gm.get_submodule(path).named_children())
    edit.erase(gm, node)
    for name, child in children.items():
        if not gm.graph.find_nodes(op="call_module", target=path):
            gm.add_submodule(f"{path}.{name}", child)
