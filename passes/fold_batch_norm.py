"""Fold batch norms in eval mode into the layers next to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from fxopt.graph import edit, ops
from fxopt.graph.edit import fork
from fxopt.passes._calibrate import OUTPUT_MOMENTS
from fxopt.passes._scaling import (
    Layer,
    along_inputs,
    along_outputs,
    outputs_of,
    readers_of,
    scale_and_shift,
    why_not_alone,
    why_not_plain,
    with_parameters,
)
from fxopt.passes.base import Pass, PassResult, Refusal

__all__ = ["FoldBatchNorm"]


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
    return why_not_plain(gm, str(node.target), norm)


def _layer_or_reason(gm: fx.GraphModule, node: fx.Node | None, norm: fx.Node, side: str) -> Layer | str:
    """The layer that a node calls if it can take a norm in, otherwise why it cannot."""
    layer = _module(gm, node)
    if node is None or not isinstance(layer, (_ConvNd, nn.Linear)):
        what = "an input" if node is None else ops.semantics(gm, node).name
        return f"{side} it is {what}, no convolution or linear layer"
    path = str(node.target)
    if len(edit.shape(norm)) != (2 if isinstance(layer, nn.Linear) else layer.weight.dim()):
        return f"the channels of {path!r} are not in the dimension that is normalized"
    return why_not_alone(gm, path, layer) or layer


def _fold_into_producer(gm: fx.GraphModule, node: fx.Node, norm: _BatchNorm) -> str | None:
    """Fold into the layer before; None if done, otherwise why not."""
    producer = node.args[0]
    layer = _layer_or_reason(gm, producer if isinstance(producer, fx.Node) else None, node, "before")
    if isinstance(layer, str) or not isinstance(producer, fx.Node):
        return str(layer)
    others = [reader.name for reader in readers_of(gm, producer) if reader is not node]
    if others:
        return f"{producer.name!r} before it is also read by {others[0]!r}"
    scale, shift = scale_and_shift(norm)
    weight = layer.weight.detach().double() * along_outputs(layer, scale)
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
    readers = readers_of(gm, node)
    if len(readers) != 1 or readers[0].args[:1] != (node,):
        return f"{len(readers)} operators read it"
    layer = _layer_or_reason(gm, readers[0], node, "after")
    if isinstance(layer, str):
        return layer
    scale, shift = scale_and_shift(norm)
    if bool(shift.any()):
        if isinstance(layer, _ConvTransposeNd):
            return f"{str(readers[0].target)!r} is transposed, so that its borders see less of the shift"
        if isinstance(layer, _ConvNd) and _pads_with_zeros(layer):
            return f"{str(readers[0].target)!r} pads with zeros after the shift"
    weight = layer.weight.detach().double()
    bias = torch.zeros(outputs_of(layer)).double() if layer.bias is None else layer.bias.detach().double()
    if not isinstance(layer, _ConvTransposeNd):
        bias = bias + (weight * along_inputs(layer, shift)).flatten(1).sum(1)
    reason = _install(gm, readers[0], layer, weight * along_inputs(layer, scale), bias, norm)
    if reason is None:
        _bypass(gm, node, node.args[0])
    return reason


def _pads_with_zeros(layer: _ConvNd) -> bool:
    padding: Any = layer.padding
    if layer.padding_mode != "zeros" or padding == "valid":
        return False
    return padding == "same" or any(width != 0 for width in padding)


def _install(
    gm: fx.GraphModule, node: fx.Node, layer: Layer, weight: torch.Tensor, bias: torch.Tensor, norm: Any
) -> str | None:
    """Put a copy of the layer with new parameters in its place; None if done, otherwise why not."""
    kind = layer.weight.dtype
    weight, rounded = weight.to(kind), bias.to(kind)
    if not bool(torch.isfinite(weight).all()) or not bool(torch.isfinite(rounded).all()):
        return f"the folded parameters of {str(node.target)!r} are not finite in {kind}"
    trainable = layer.weight.requires_grad
    sources: tuple[Any, ...] = (layer.bias, norm.bias)
    trains_bias = next((source.requires_grad for source in sources if source is not None), trainable)
    edit.replace_module(gm, str(node.target), with_parameters(layer, weight, rounded, trains_bias))
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
