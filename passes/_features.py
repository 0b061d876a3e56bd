"""What AMC's agent sees of a layer that does not depend on what was decided before (He et al. 2018, section 3.1)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from fxopt.graph import ops
from fxopt.graph.channels import ChannelGroup

__all__ = ["LayerFeatures"]

_LAYERS = ("conv", "linear")


class LayerFeatures:
    """Features of the layers of a graph, in graph order.

    The paper's state has 11 numbers: index t, outputs n, inputs c, height h, width w, stride, kernel k, FLOPs[t], and
    three that the search adds as it goes (reduced, rest, last action). Its code leaves out h, w and FLOPs[t] and adds
    the type of the layer and its number of weights. Here both are given, so an engine can build either.

    Args:
        gm: A canonical graph.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        self._of: dict[str, dict[str, float]] = {}
        for node in gm.graph.nodes:
            if ops.semantics(gm, node).kind in _LAYERS and _weight_path(node) not in self._of:
                found = _features(gm, node)
                if found is not None:
                    self._of[_weight_path(node)] = {"t": float(len(self._of)), **found}

    def of(self, group: ChannelGroup) -> dict[str, float]:
        """The features of the layer whose inputs a group decides: the first that reads it, else the one that makes it.

        ``t`` (index among convolutions and linear layers), ``type`` (0 convolution, 1 linear), ``n`` and ``c``
        (channels out and in), ``h`` and ``w`` (height and width of its input in pixels; positions and 1 for a linear
        layer), ``stride`` (0 for a linear layer), ``k`` (kernel; 1 for a linear layer), ``macs`` (of one sample) and
        ``weights`` (their number) of that layer, and ``channels``: the units of the group. Raw numbers: an engine
        scales them. The original takes the same layer, for it decides the inputs of each.
        """
        paths = [use.path for role in ("in", "out") for use in group.members if use.role == role]
        known = sorted((self._of[path]["t"], path) for path in paths[:1] or () if path in self._of)
        readers = [path for path in paths if path in self._of]
        chosen = known[0][1] if known else next(iter(readers), None)
        features = self._of[chosen] if chosen is not None else dict.fromkeys(_NAMES, 0.0)
        return {**features, "channels": float(group.size)}


_NAMES = ("t", "type", "n", "c", "h", "w", "stride", "k", "macs", "weights")


def _weight_path(node: fx.Node) -> str:
    """Path of the module that holds a layer's weight."""
    if node.op == "call_module":
        return str(node.target)
    weight: Any = ops.arguments(node).get("weight")
    found = isinstance(weight, fx.Node) and weight.op == "get_attr"
    return str(weight.target).rpartition(".")[0] if found else f"({node.name})"


def _features(gm: fx.GraphModule, node: fx.Node) -> dict[str, float] | None:
    source, made = node.args[0], node.meta.get("val")
    read = source.meta.get("val") if isinstance(source, fx.Node) else None
    weight, stride = _weight(gm, node)
    if not isinstance(read, torch.Tensor) or not isinstance(made, torch.Tensor) or weight is None:
        return None
    kind = ops.semantics(gm, node).kind
    macs = math.prod(made.shape[1:]) * weight.numel() / made.shape[1 if kind == "conv" else -1]
    shared = {"macs": float(macs), "weights": float(weight.numel())}
    if kind == "linear":
        positions = float(math.prod(read.shape[1:-1])) if read.dim() > 1 else 1.0
        size = {"n": made.shape[-1], "c": read.shape[-1], "h": positions, "w": 1, "stride": 0, "k": 1}
        return {"type": 1.0, **{name: float(value) for name, value in size.items()}, **shared}
    height = read.shape[-2] if read.dim() > 3 else 1
    size = {"n": made.shape[1], "c": read.shape[1], "h": height, "w": read.shape[-1], "stride": stride}
    return {"type": 0.0, **{name: float(value) for name, value in size.items()}, "k": float(weight.shape[-1]), **shared}


def _weight(gm: fx.GraphModule, node: fx.Node) -> tuple[torch.Tensor | None, int]:
    """The weight of a layer and its stride."""
    if node.op == "call_module":
        module: Any = gm.get_submodule(str(node.target))
        stride = getattr(module, "stride", (0,))
        return getattr(module, "weight", None), int(stride[-1] if isinstance(stride, tuple) else stride)
    given = ops.arguments(node)
    weight: Any = given.get("weight")
    stride = given.get("stride") or (0,)
    held = weight.meta.get("val") if isinstance(weight, fx.Node) else None
    return held, int(stride[-1] if isinstance(stride, (list, tuple)) else stride)
