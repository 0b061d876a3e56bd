"""Cross-layer equalization: let the channels between two layers have weights of like size, which one grid suits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx, nn
from torch.nn.modules.conv import _ConvNd

from fxopt.errors import PassError
from fxopt.graph import edit, ops
from fxopt.passes._calibrate import OUTPUT_MOMENTS
from fxopt.passes._scaling import (
    Layer,
    along_inputs,
    along_outputs,
    outputs_of,
    readers_of,
    why_not_alone,
    with_parameters,
)
from fxopt.passes.base import Pass, PassResult

__all__ = ["EqualizeWeights"]

_HOMOGENEOUS = frozenset(
    [
        "ReLU",
        "LeakyReLU",
        "relu",
        "leaky_relu",
        "Identity",
        "Dropout",
        "Dropout1d",
        "Dropout2d",
        "Dropout3d",
        "dropout",
        "feature_dropout",
        "clone",
        "contiguous",
        "alias",
        "detach",
    ]
)
"""Operators with ``f(s x) = s f(x)`` for positive ``s``, element by element."""

_SETTLED = 1e-3
_LARGEST = 2.0**10


@dataclass(frozen=True)
class EqualizeWeights(Pass):
    """Divide each output channel of a layer by a number and multiply what the next layer reads of it by the same.

    Between two layers with ReLU, pooling or nothing between them this changes no output. With
    ``s = sqrt(r1 / r2)``, where ``r1`` and ``r2`` are the largest weights of the channel in the first and in the second
    layer, both get the range ``sqrt(r1 r2)`` (Nagel et al. 2019, "Data-free quantization through weight equalization
    and bias correction", equation 11). Chains are swept until nothing moves. It helps where all channels share a grid:
    weights with one scale a tensor, and activations between depthwise layers.

    Convolutions (not transposed) and linear layers of any dimension take part, in any groups, if nothing else reads
    what is between them. Batch norm has to be folded first; it, ReLU6 and curved activation functions end a chain.

    Attributes:
        sweeps: Largest number of sweeps over all pairs.
    """

    name: ClassVar[str] = "equalize-weights"

    sweeps: int = 20

    def requires(self, graph_module: fx.GraphModule) -> None:
        """The option is in range.

        Raises:
            PassError: If it is not.
        """
        del graph_module
        if self.sweeps < 1:
            raise PassError(f"sweeps is {self.sweeps}; give at least 1.")

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Equalize every pair of layers."""
        pairs = _pairs(graph_module)
        held = {
            path: _Held.of(graph_module.get_submodule(path)) for pair in pairs for path in (pair.first, pair.second)
        }
        for _ in range(self.sweeps if pairs else 0):
            moved = max(_equalize(held[pair.first], held[pair.second], pair.repeats) for pair in pairs)
            if moved < _SETTLED:
                break
        changed = [path for path, one in held.items() if one.is_changed]
        for path in changed:
            edit.replace_module(graph_module, path, held[path].scaled())
        if changed:
            edit.finish(graph_module)
        return PassResult(graph_module, bool(changed))


@dataclass(frozen=True)
class _Pair:
    """Two layers, and how many inputs of the second each channel of the first makes (pixels that were flattened)."""

    first: str
    second: str
    repeats: int


@dataclass
class _Held:
    """A layer, the largest weight of each kernel, and what they are to be scaled by, all in float64.

    Attributes:
        layer: The layer.
        sizes: Shape (outputs, inputs of a group).
        outputs: What the weights of each output channel are divided by, shape (outputs,).
        inputs: What those of each input channel are multiplied with, shape (inputs,).
    """

    layer: Any
    sizes: torch.Tensor
    outputs: torch.Tensor
    inputs: torch.Tensor

    @classmethod
    def of(cls, layer: Any) -> _Held:
        inputs = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
        ones = [torch.ones(count, dtype=torch.float64) for count in (outputs_of(layer), inputs)]
        size = layer.weight.detach().double().abs()
        return cls(layer, size.flatten(2).amax(2) if size.dim() > 2 else size, *ones)

    @property
    def is_changed(self) -> bool:
        return bool((self.outputs != 1.0).any() or (self.inputs != 1.0).any())

    def ranges(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The largest weight, as scaled so far, that makes each output channel, and that reads each input channel."""
        width = self.sizes.shape[1]
        groups = len(self.inputs) // width
        rows = self.inputs.reshape(groups, 1, width).expand(-1, len(self.sizes) // groups, -1)
        scaled = self.sizes.reshape(groups, -1, width) * rows / self.outputs.reshape(groups, -1, 1)
        return scaled.amax(2).flatten(), scaled.amax(1).flatten()

    def scaled(self) -> nn.Module:
        """A copy of the layer with scaled parameters; it remembers the moments of its outputs, scaled too."""
        bias = self.layer.bias
        new = None if bias is None else (bias.detach().double() / self.outputs).to(bias.dtype)
        old = self.layer.weight.detach()
        weight = old.double() / along_outputs(self.layer, self.outputs) * along_inputs(self.layer, self.inputs)
        made = with_parameters(self.layer, weight.to(old.dtype), new, bias is not None and bias.requires_grad)
        moments = self.layer.__dict__.get(OUTPUT_MOMENTS)
        if moments is not None:
            made.__dict__[OUTPUT_MOMENTS] = tuple((one.double() / self.outputs).to(one.dtype) for one in moments)
        return made


def _equalize(first: _Held, second: _Held, repeats: int) -> float:
    """Bring the ranges of one pair together; how far the largest logarithm of a scale moved."""
    made = first.ranges()[0]
    read = second.ranges()[1].reshape(-1, repeats).amax(1)
    known = (made > 0) & (read > 0)
    ratio = torch.where(known, made, torch.ones_like(made)) / torch.where(known, read, torch.ones_like(read))
    before = first.outputs
    first.outputs = (before * ratio.sqrt()).clamp(1.0 / _LARGEST, _LARGEST)
    step = first.outputs / before
    second.inputs = second.inputs * step.repeat_interleave(repeats)
    return float(step.log().abs().max())


def _pairs(gm: fx.GraphModule) -> list[_Pair]:
    """Every layer with the one behind it, in graph order."""
    found = []
    for node in gm.graph.find_nodes(op="call_module"):
        layer = _layer(gm, node)
        second = (
            None if layer is None else _next(gm, node, 1 if isinstance(layer, _ConvNd) else len(edit.shape(node)) - 1)
        )
        if second is not None:
            found.append(_Pair(str(node.target), *second))
    return found


def _layer(gm: fx.GraphModule, node: fx.Node) -> Layer | None:
    """The layer that a node calls, if its weights can be scaled."""
    if node.op != "call_module":
        return None
    module = gm.get_submodule(str(node.target))
    if not isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)):
        return None
    return None if why_not_alone(gm, str(node.target), module) else module


def _next(gm: fx.GraphModule, node: fx.Node, dim: int) -> tuple[str, int] | None:
    """The layer that alone reads the channels in dimension ``dim`` of a node, and the inputs that each makes there."""
    repeats = 1
    while True:
        readers = readers_of(gm, node)
        if len(readers) != 1 or readers[0].args[:1] != (node,):
            return None
        reader = readers[0]
        layer = _layer(gm, reader)
        if layer is not None:
            last = len(edit.shape(node)) - 1
            fits = dim == last if isinstance(layer, nn.Linear) else dim == 1 and last == layer.weight.dim() - 1
            return (str(reader.target), repeats) if fits else None
        before, after = edit.shape(node), edit.shape(reader)
        meaning = ops.semantics(gm, reader)
        if meaning.flow == "reshape" and dim == 1 and before[0] == after[0] and len(after) == 2:
            repeats *= math.prod(before[2:])
        elif meaning.name == "mean" and dim == 1 and before[:2] == after[:2] and len(before) > 2:
            pass
        elif not (meaning.name in _HOMOGENEOUS or (meaning.flow == "spatial" and meaning.kind == "pool" and dim == 1)):
            return None
        node = reader
