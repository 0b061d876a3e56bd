"""The layers that can be quantized, what is to be decided about them, and what keeps a choice from being made."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from fxopt.decisions import FLOAT_BITS, Decision
from fxopt.errors import DataError, PolicyError
from fxopt.graph import shape
from fxopt.graph.fake_quantize import MAX_BITS, QUANTIZED_LAYERS, QuantizedLayer
from fxopt.graph.matrix_products import MatrixProduct

__all__ = [
    "BITS",
    "FLOAT",
    "PRODUCT",
    "PRODUCT_BITS",
    "check_sharing",
    "check_weights",
    "decide",
    "decide_product",
    "kind_of",
    "layers",
    "other_types",
    "tied",
]

FLOAT = (FLOAT_BITS, FLOAT_BITS)

_WIDTHS = range(1, MAX_BITS + 1)
BITS: tuple[tuple[int, int], ...] = (
    *((weight, activation) for weight in _WIDTHS for activation in _WIDTHS),
    *((weight, FLOAT_BITS) for weight in _WIDTHS),
    FLOAT,
)
"""The pairs of weight and activation bits on offer: 1 to 8 of each, weights alone, and floating point."""

PRODUCT = "matmul"
"""What targets call a product of activations."""

PRODUCT_BITS: tuple[tuple[int, int], ...] = (*((bits, bits) for bits in _WIDTHS), FLOAT)
"""The choices for a product of activations: the bits of all its operands, twice, and floating point."""


def layers(gm: fx.GraphModule) -> list[fx.Node]:
    """The first call of every float layer that has a quantized form, in graph order."""
    found: dict[str, fx.Node] = {}
    for node in gm.graph.find_nodes(op="call_module"):
        module = gm.get_submodule(str(node.target))
        known = isinstance(module, tuple(QUANTIZED_LAYERS)) and not isinstance(module, QuantizedLayer)
        if known and isinstance(module.weight, torch.Tensor) and module.weight.dtype == torch.float32:
            found.setdefault(str(node.target), node)
    return list(found.values())


def other_types(gm: fx.GraphModule) -> list[str]:
    """The types of weights other than float32, which keep layers that have a quantized form from being quantized."""
    modules = [gm.get_submodule(str(node.target)) for node in gm.graph.find_nodes(op="call_module")]
    found = (module.weight for module in modules if isinstance(module, tuple(QUANTIZED_LAYERS)))
    types = {str(one.dtype).removeprefix("torch.") for one in found if isinstance(one, torch.Tensor)}
    return sorted(types - {"float32"})


def kind_of(gm: fx.GraphModule, node: fx.Node) -> str:
    """What targets call a layer: "conv", "depthwise", "conv_transpose" or "linear"."""
    module: Any = gm.get_submodule(str(node.target))
    if isinstance(module, nn.Linear):
        return "linear"
    if module.transposed:
        return "conv_transpose"
    return "depthwise" if module.groups == module.in_channels > 1 else "conv"


def decide(gm: fx.GraphModule, node: fx.Node, index: int) -> Decision:
    """The decision on a layer's bits.

    Its features are those that HAQ's agent sees (Wang et al. 2019, section 3.2), and a few more: ``is_depthwise``,
    ``in_channels``, ``out_channels``, ``kernel`` and ``stride`` (products over dimensions), ``groups``, ``input_size``
    and ``positions`` (places of the input and of the result), ``weights``, ``macs`` and ``index`` among the layers.

    Args:
        gm: A canonical graph.
        node: The layer's first call.
        index: Its place among the layers.
    """
    module: Any = gm.get_submodule(str(node.target))
    kind = kind_of(gm, node)
    linear = kind == "linear"
    size, read = shape(node), shape(node.all_input_nodes[0])
    weights = module.weight.numel()
    positions = math.prod(size[1:-1]) if linear else math.prod(size[2:])
    input_size = math.prod(read[1:-1]) if linear else math.prod(read[2:])
    features = {
        "is_depthwise": float(kind == "depthwise"),
        "in_channels": module.in_features if linear else module.in_channels,
        "out_channels": module.out_features if linear else module.out_channels,
        "kernel": 1 if linear else math.prod(module.kernel_size),
        "stride": 1 if linear else math.prod(module.stride),
        "groups": 1 if linear else module.groups,
        "input_size": input_size,
        "positions": positions,
        "weights": weights,
        "macs": weights * (input_size if kind == "conv_transpose" else positions),
        "index": index,
    }
    return Decision("bits", str(node.target), BITS, FLOAT, features, operator=kind)


def decide_product(product: MatrixProduct, index: int) -> Decision:
    """The decision on the bits of a matrix product of activations, or of the two of an attention.

    Its features are those of layers: a product has as many channels as what it sums over and no weights.

    Args:
        product: The product.
        index: Its place among all that is decided.
    """
    left, right = product.operands[:2]
    rows, inner = shape(left)[-2:]
    attention = len(product.operands) > 2
    columns = shape(right)[-2 if attention else -1]
    out = shape(product.operands[2])[-1] if attention else columns
    heads = math.prod(shape(product.node)[1:-2])
    features = {
        "is_depthwise": 0.0,
        "in_channels": inner,
        "out_channels": out,
        "kernel": 1,
        "stride": 1,
        "groups": 1,
        "input_size": heads * rows,
        "positions": heads * rows,
        "weights": 0,
        "macs": heads * rows * columns * (inner + out if attention else inner),
        "index": index,
    }
    return Decision("bits", product.site, PRODUCT_BITS, FLOAT, features, operator=PRODUCT)


def check_weights(gm: fx.GraphModule, chosen: Iterable[str]) -> None:
    """Refuse parameters that are not finite.

    Raises:
        DataError: Naming one.
    """
    for path in chosen:
        for name, tensor in gm.get_submodule(path).named_parameters(recurse=False):
            if not bool(torch.isfinite(tensor).all()):
                raise DataError(f"Parameter '{path}.{name}' holds NaN or infinity; load finite weights.")


def tied(gm: fx.GraphModule, decisions: Iterable[Decision]) -> list[Decision]:
    """The decisions, of which those on layers that share a weight are left one width for it, the widest that all have.

    It is stored once, and decisions are chosen one by one.
    """
    found = list(decisions)
    sharing: dict[int, list[int]] = {}
    for index, decision in enumerate(found):
        if decision.operator != PRODUCT:
            sharing.setdefault(id(gm.get_submodule(decision.site).weight), []).append(index)
    for group in sharing.values():
        pairs: list[list[Any]] = [[choice for choice in found[index].choices if choice != FLOAT] for index in group]
        common = set.intersection(*({weight for weight, _ in choices} for choices in pairs))
        for index, choices in zip(group, pairs, strict=True) if len(group) > 1 else ():
            kept = [choice for choice in choices if choice[0] == max(common, default=0)]
            kept += [FLOAT] if FLOAT in found[index].choices or not kept else []
            default = FLOAT if FLOAT in kept else kept[-1]
            found[index] = replace(found[index], choices=tuple(kept), default=default)
    return found


def check_sharing(gm: fx.GraphModule, chosen: Mapping[str, tuple[int, int]]) -> None:
    """Refuse different widths for a weight that two layers share: it is stored once.

    A layer that stays in floating point may share with one that does not; the weight is then stored twice.

    Raises:
        PolicyError: Naming both layers.
    """
    first: dict[int, tuple[str, int]] = {}
    for path, (bits, _) in chosen.items():
        other, other_bits = first.setdefault(id(gm.get_submodule(path).weight), (path, bits))
        if bits != other_bits:
            raise PolicyError(
                f"{other!r} and {path!r} share a weight, and the policy gives it {other_bits} and {bits} bits; "
                "choose the same number for both."
            )
