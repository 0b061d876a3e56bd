"""What became of each layer: its bits, its bytes in the file, the kernel that runs it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import fx, nn

from fxopt.decisions import FLOAT_BITS
from fxopt.export._kernels import Kernel
from fxopt.graph import ops
from fxopt.graph.fake_quantize import QUANTIZED_LAYERS, ActivationQuantizer, QuantizedLayer
from fxopt.passes._placement import ROLES, Role

if TYPE_CHECKING:
    import onnx

__all__ = ["ExportedLayer", "layers_in", "sites_in"]


@dataclass(frozen=True)
class ExportedLayer:
    """One convolution or linear layer in a file.

    Attributes:
        site: Its path.
        weight_bits: Bits of its weights' grid; 32 is floating point.
        activation_bits: Bits of its input's grid.
        stored_bytes: Bytes of weights, biases and their scales in the file.
        kernel: The operator that runs it in onnxruntime's optimized graph, such as ``QLinearConv``; empty if unknown.
        integer: Whether that computes on integers; None if unknown.
    """

    site: str
    weight_bits: int
    activation_bits: int
    stored_bytes: int
    kernel: str
    integer: bool | None


def sites_in(gm: fx.GraphModule) -> tuple[str, ...]:
    """Paths of the convolutions and linear layers, in graph order."""
    return tuple(dict.fromkeys(str(node.target) for node in _layers(gm)))


def layers_in(
    gm: fx.GraphModule, model: onnx.ModelProto, kernels: Sequence[Kernel] | None, *, baked: bool
) -> tuple[ExportedLayer, ...]:
    """Every convolution and linear layer of a graph in the file that was made of it, in graph order.

    Args:
        gm: The graph.
        model: The file.
        kernels: The kernels of its optimized graph, or None if it was not loaded.
        baked: Whether the file computes in floats, on weights that lie on their grids.
    """
    sizes: dict[str, int] = {}
    sites = sites_in(gm)
    for tensor in model.graph.initializer:
        owner = _owner(tensor.name, sites)
        sizes[owner] = sizes.get(owner, 0) + _bytes(tensor)
    runs: dict[str, Kernel] = {}
    for kernel in kernels or ():
        runs.setdefault(kernel.layer, kernel)
    found: dict[str, ExportedLayer] = {}
    for node in _layers(gm):
        site = str(node.target)
        weights, activations = _bits(gm, node)
        own = runs.get(site)
        line = ExportedLayer(
            site,
            weights,
            FLOAT_BITS if baked else activations,
            sizes.get(site, 0),
            own.operator if own is not None else "",
            own.integer if own is not None else None,
        )
        found.setdefault(site, line)
    return tuple(found.values())


def _layers(gm: fx.GraphModule) -> Iterator[fx.Node]:
    known: tuple[Any, ...] = (QuantizedLayer, *QUANTIZED_LAYERS)
    for node in gm.graph.find_nodes(op="call_module"):
        if isinstance(gm.get_submodule(str(node.target)), known):
            yield node


def _bits(gm: fx.GraphModule, node: fx.Node) -> tuple[int, int]:
    """Bits of weights and of what a layer reads."""
    layer: Any = gm.get_submodule(str(node.target))
    if not isinstance(layer, QuantizedLayer):
        return FLOAT_BITS, FLOAT_BITS
    source: Any = node.args[0]
    while isinstance(source, fx.Node) and source.op in ("call_module", "call_function"):
        module: nn.Module | None = gm.get_submodule(str(source.target)) if source.op == "call_module" else None
        if isinstance(module, ActivationQuantizer):
            return layer.weight_quantizer.bits, module.bits
        if ROLES.get(ops.semantics(gm, source).name) is not Role.PASS:
            break
        source = source.args[0]
    return layer.weight_quantizer.bits, FLOAT_BITS


def _owner(name: str, sites: Sequence[str]) -> str:
    """The layer that an initializer belongs to: the longest path that it begins with."""
    owners: Mapping[str, None] = dict.fromkeys(sites)
    path = name
    while path:
        path = path.rpartition(".")[0]
        if path in owners:
            return path
    return ""


def _bytes(tensor: onnx.TensorProto) -> int:
    from onnx import numpy_helper

    return len(tensor.raw_data) or int(numpy_helper.to_array(tensor).nbytes)
