"""Integers of a block's weights by gradients: each weight is put on one of two neighbours of its grid.

With ``h(V) = clip(1.2 sigmoid(V) - 0.1, 0, 1)``, a weight is ``scale * (low + h(V) - zero_point)`` while it is learned,
and ``1 - |2 h(V) - 1|^beta`` is what being undecided costs (Nagel et al. 2020, AdaRound, equations 22 to 24).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx
from torch.func import functional_call

from fxopt.graph._hold import hold_learned, spread
from fxopt.graph.fake_quantize import ActivationQuantizer, QuantizedLayer

__all__ = ["SoftBlock", "SoftWeight", "beta_at", "learnable"]

_STRETCH = 0.1
_BETAS = (20.0, 2.0)


class SoftWeight:
    """A layer's weight on its way to its grid.

    Args:
        layer: The quantized layer, with a weight on its grid.
        wanted: Its weight in floating point.
        trust: How far it starts on the side of the integers that the layer has, 0 to 1; the rest is the float weight's.

    Attributes:
        logits: What is learned, of the weight's shape.
        bias: The layer's bias, learned too, or None.
    """

    def __init__(self, layer: QuantizedLayer, wanted: torch.Tensor, trust: float) -> None:
        quantizer: Any = layer.weight_quantizer
        dims = wanted.dim()
        self._scale = spread(quantizer.scale.detach(), quantizer.axis, dims)
        shift = 0.0 if quantizer.zero_point is None else spread(quantizer.zero_point, quantizer.axis, dims).float()
        least, largest = quantizer.bounds
        start = quantizer.integers(layer.weight.detach()).float()
        aim = wanted.detach() / self._scale + shift
        self._low = torch.where(aim > start, start, start - 1.0).clamp_(least, largest - 1)
        share = trust * (start - self._low) + (1.0 - trust) * (aim - self._low).clamp(0.0, 1.0)
        part = (share.clamp(0.02, 0.98) + _STRETCH) / (1.0 + 2.0 * _STRETCH)
        self._shift = shift
        self.logits = torch.logit(part).requires_grad_()
        has_bias = isinstance(layer.bias, torch.Tensor)
        self.bias = layer.bias.detach().clone().requires_grad_() if has_bias else None  # type: ignore[operator]
        self._plain = layer.to_float()

    @property
    def share(self) -> torch.Tensor:
        """How far each weight is from the lower of its integers to the upper one."""
        return (torch.sigmoid(self.logits) * (1.0 + 2.0 * _STRETCH) - _STRETCH).clamp(0.0, 1.0)

    def undecided(self, beta: float) -> torch.Tensor:
        """The mean cost of being between two integers."""
        return 1.0 - (2.0 * self.share - 1.0).abs().pow(beta).mean()

    def rounded(self) -> torch.Tensor:
        """The weight on its grid, with the nearer integers."""
        return (self._low + (self.logits.detach() > 0).float() - self._shift) * self._scale

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """What the layer makes of its input."""
        tensors = {"weight": (self._low + self.share - self._shift) * self._scale}
        if self.bias is not None:
            tensors["bias"] = self.bias
        return functional_call(self._plain, tensors, (x,))  # type: ignore[no-any-return]


class SoftBlock(fx.Interpreter):
    """A part of a graph with weights and step sizes that are learned.

    Args:
        gm: The graph.
        weights: What is learned in the place of layers, by path.
        scales: Step sizes that are learned, by path of the quantizer.
    """

    def __init__(self, gm: fx.GraphModule, weights: dict[str, SoftWeight], scales: dict[str, torch.Tensor]) -> None:
        super().__init__(gm)
        self.weights, self.scales = weights, scales

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Call a module, or what is learned in its place."""
        if target in self.weights:
            return self.weights[target](*args, **kwargs)
        if target in self.scales:
            quantizer: Any = self.fetch_attr(target)
            return hold_learned(args[0], self.scales[target], quantizer.zero_point, quantizer.bounds, rounding=True)
        return super().call_module(target, args, kwargs)

    def outcome(self, nodes: tuple[fx.Node, ...], values: dict[fx.Node, Any], end: fx.Node) -> Any:
        """The value of a node, from the values that are alive before some nodes."""
        self.env = dict(values)
        for node in nodes:
            self.env[node] = self.run_node(node)
        return self.env[end]

    def advance(self, nodes: tuple[fx.Node, ...], values: dict[fx.Node, Any], *, keep: bool = False) -> None:
        """Turn the values that are alive before some nodes into those that are alive behind them.

        Args:
            nodes: The nodes.
            values: The values; changed.
            keep: Whether values stay that nobody reads any more, until :meth:`forget`.
        """
        self.env = values
        for node in nodes:
            values[node] = self.run_node(node)
            if not keep:
                self.forget(node, values)

    def forget(self, node: fx.Node, values: dict[fx.Node, Any]) -> None:
        """Drop what a node was the last to read."""
        for done in self.user_to_last_uses.get(node, ()):
            values.pop(done, None)


def beta_at(part: float) -> float:
    """The exponent at a part of the way: high at first, so that weights may be undecided, then lower."""
    return _BETAS[1] + 0.5 * (_BETAS[0] - _BETAS[1]) * (1.0 + math.cos(math.pi * part))


def learnable(gm: fx.GraphModule, nodes: tuple[fx.Node, ...]) -> dict[str, ActivationQuantizer]:
    """The quantizers of activations that are called once in a graph, and there, with scales that may be anything."""
    calls: dict[int, int] = {}
    for node in gm.graph.find_nodes(op="call_module"):
        called = id(gm.get_submodule(str(node.target)))
        calls[called] = calls.get(called, 0) + 1
    found = {}
    for node in nodes:
        module = gm.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, ActivationQuantizer) and calls[id(module)] == 1 and not module.scheme.power_of_two:
            found[str(node.target)] = module
    return found
