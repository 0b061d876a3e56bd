"""Matrix products of activations: where a graph has them, and the form in which they multiply integers.

A product with a constant is a linear layer; of two tensors that depend on the model's input, as in attention, both have
to lie on grids if integers are to be multiplied. In a quantized graph such a product is a :class:`QuantMatMul`, which
says its bits; the quantizers of its operands stand in front of it. Attention that is one operator in the float graph is
spelled out: product, :class:`AttentionWeights` (scale, mask and softmax, in floating point), product.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn

from fxopt.decisions import FLOAT_BITS
from fxopt.graph import edit, ops
from fxopt.graph._quantizers import ActivationQuantizer
from fxopt.graph.grids import checked_bits
from fxopt.graph.ops import OpSemantics, register_module
from fxopt.graph.shapes import shape

__all__ = ["AttentionWeights", "MatrixProduct", "QuantMatMul", "matrix_products", "quantize_product"]

_PRODUCTS = ("matmul", "bmm", "mm")
_REARRANGING = ("transpose", "permute", "contiguous", "clone")
_PARTS = ("qk", "weights", "av")
"""Names of the parts of a spelled-out attention, below its site."""


class QuantMatMul(nn.Module):
    """The product of two tensors that quantizers hold to grids.

    Args:
        bits: Bits of both operands, 1 to 8.

    Raises:
        PassError: If ``bits`` is out of range.
    """

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = checked_bits(bits, "a product")

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """``left @ right``, shape (..., rows, columns)."""
        return torch.matmul(left, right)

    def extra_repr(self) -> str:
        """The bits."""
        return f"bits={self.bits}"


class AttentionWeights(nn.Module):
    """From the products of queries and keys to the weights of values, in floating point.

    Args:
        scale: What the products are multiplied by.
        is_causal: Whether a query sees no key behind its own position.
    """

    dim = -1

    def __init__(self, scale: float, is_causal: bool = False) -> None:
        super().__init__()
        self.scale = scale
        self.is_causal = is_causal

    def forward(self, scores: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Softmax over keys of shape (..., queries, keys); zeros where truth values hide all."""
        scores = scores * self.scale
        if self.is_causal:
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        if mask is None:
            return scores.softmax(-1)
        if mask.dtype is not torch.bool:
            return (scores + mask).softmax(-1)
        hidden = torch.logical_not(mask)
        # Not minus infinity, which makes NaN of a row that is hidden in whole.
        weights = scores.masked_fill(hidden, torch.finfo(scores.dtype).min).softmax(-1)
        return weights if self.is_causal else weights.masked_fill(hidden, 0.0)

    def extra_repr(self) -> str:
        """The scale."""
        return f"scale={self.scale:g}, is_causal={self.is_causal}"


register_module(QuantMatMul, OpSemantics("QuantMatMul", "matmul", "matmul"))
register_module(AttentionWeights, OpSemantics("AttentionWeights", "softmax", "softmax"))


@dataclass(frozen=True)
class MatrixProduct:
    """A matrix product of activations, or the two of an attention.

    Attributes:
        site: Path of the module in which it is computed and the operator's name: the same before and after it is
            quantized.
        node: The node that gives its result.
        operands: Left and right factor; or queries, keys and values.
        mask: The mask of an attention, or None.
        bits: Bits of all operands, 32 if in floating point.
        inner: The nodes of a spelled-out attention before ``node``.
    """

    site: str
    node: fx.Node
    operands: tuple[fx.Node, ...]
    mask: fx.Node | None = None
    bits: int = FLOAT_BITS
    inner: tuple[fx.Node, ...] = ()


def matrix_products(gm: fx.GraphModule) -> list[MatrixProduct]:
    """The matrix products of activations in a graph that have a quantized form, or are in it, in graph order.

    Attention with dropout or with several query heads for one head of keys has none.
    """
    live = _activations(gm)
    taken: set[str] = set()
    found: list[MatrixProduct] = []
    for node in gm.graph.nodes:
        if node.op == "call_module" and isinstance(gm.get_submodule(str(node.target)), QuantMatMul):
            product = _quantized(gm, node)
            if product is not None:
                taken.add(product.site)
                found.append(product)
        elif node.op == "call_function" and node in live:
            product = _floating(gm, node, live)
            if product is not None:
                found.append(product)
    return [_named(gm, product, taken) for product in found]


def _activations(gm: fx.GraphModule) -> set[fx.Node]:
    """The nodes whose tensors depend on an input of the model."""
    found: set[fx.Node] = set()
    for node in gm.graph.nodes:
        sources = [source for source in node.all_input_nodes if not isinstance(source.meta.get("val"), (int, float))]
        if node.op == "placeholder" or not found.isdisjoint(sources):
            found.add(node)
    return found


def _floating(gm: fx.GraphModule, node: fx.Node, live: set[fx.Node]) -> MatrixProduct | None:
    """The product that a call of an ATen operator computes, without its site."""
    name = ops.semantics(gm, node).name
    if name == "scaled_dot_product_attention":
        given = ops.arguments(node)
        operands: Any = tuple(given[one] for one in ("query", "key", "value"))
        mask = given["attn_mask"]
        refused = given["dropout_p"] or given["enable_gqa"] or len({len(shape(one)) for one in operands}) > 1
    elif name in _PRODUCTS:
        operands, mask, refused = tuple(node.args), None, len(node.args) != 2
    else:
        return None
    good = all(isinstance(one, fx.Node) and one in live and _is_matrix(one) for one in operands)
    return MatrixProduct("", node, operands, mask) if good and not refused else None


def _is_matrix(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dim() > 1 and value.dtype == torch.float32


def _quantized(gm: fx.GraphModule, node: fx.Node) -> MatrixProduct | None:
    """The product whose result a :class:`QuantMatMul` gives; None for the first one of a spelled-out attention."""
    left, right = (one for one in node.args if isinstance(one, fx.Node))
    bits = int(gm.get_submodule(str(node.target)).bits)  # type: ignore[arg-type]
    weights = _through(gm, left)
    if not _is_weights(gm, weights):
        shown = any(_is_weights(gm, user) for user in node.users)
        return None if shown else MatrixProduct(str(node.target), node, (left, right), bits=bits)
    scores, mask = (*weights.args, None)[:2]
    query, turned = (_through(gm, one) for one in scores.args)  # type: ignore[union-attr,arg-type]
    operands: Any = (query, turned.args[0], right)
    inner: Any = (turned, scores, weights)
    return MatrixProduct(str(node.target).rpartition(".")[0], node, operands, mask, bits, inner)  # type: ignore[arg-type]


def _is_weights(gm: fx.GraphModule, node: fx.Node) -> bool:
    return node.op == "call_module" and isinstance(gm.get_submodule(str(node.target)), AttentionWeights)


def _through(gm: fx.GraphModule, node: fx.Node) -> fx.Node:
    """The node whose value quantizers pass on, or itself."""
    while node.op == "call_module" and isinstance(gm.get_submodule(str(node.target)), ActivationQuantizer):
        node = node.all_input_nodes[0]
    return node


def _named(gm: fx.GraphModule, product: MatrixProduct, taken: set[str]) -> MatrixProduct:
    """The product with its site: those of one operator in one module are numbered."""
    if product.site:
        return product
    stack = list((product.node.meta.get("nn_module_stack") or {}).values())
    scope = str(stack[-1][0]) if stack else ""
    name = ops.semantics(gm, product.node).name
    stem = site = f"{scope}.{name}" if scope and not scope.startswith("_") else name
    count = 0
    while site in taken or edit.free_path(gm, site) != site:
        count += 1
        site = f"{stem}_{count}"
    taken.add(site)
    return replace(product, site=site)


def quantize_product(gm: fx.GraphModule, product: MatrixProduct, bits: int) -> list[str]:
    """Put the quantized form in the place of a product; quantizers of its operands are the caller's.

    Find all products before the first is replaced, and end with :func:`fxopt.graph.edit.finish`.

    Returns:
        Path of every :class:`QuantMatMul` that was put there.
    """
    node = product.node
    if len(product.operands) == 2:
        new = edit.insert_module(gm, product.site, QuantMatMul(bits), node, product.operands)
        made = [product.site]
    else:
        new, made = _spell_out(gm, product, bits)
    edit.replace_uses(node, new)
    edit.erase(gm, node)
    return made


def _spell_out(gm: fx.GraphModule, product: MatrixProduct, bits: int) -> tuple[fx.Node, list[str]]:
    given = ops.arguments(product.node)
    query, key, value = product.operands
    scale = given["scale"] if given["scale"] is not None else 1.0 / math.sqrt(shape(query)[-1])
    first, between, last = (f"{product.site}.{part}" for part in _PARTS)
    turned = edit.insert_function(gm, torch.ops.aten.transpose.int, product.node, (key, -2, -1))
    scores = edit.insert_module(gm, first, QuantMatMul(bits), turned, (query, turned))
    masks = (product.mask,) if product.mask is not None else ()
    weights = AttentionWeights(float(scale), bool(given["is_causal"]))
    weighed = edit.insert_module(gm, between, weights, scores, (scores, *masks))
    result = edit.insert_module(gm, last, QuantMatMul(bits), weighed, (weighed, value))
    for view in list(_views(gm, product.node)):
        # The operator's result has other strides than a product's.
        target = torch.ops.aten.reshape.default
        edit.replace_uses(view, edit.insert_function(gm, target, view, view.args, f"{view.name}_copy"))
        edit.erase(gm, view)
    return result, [first, last]


def _views(gm: fx.GraphModule, node: fx.Node) -> Iterator[fx.Node]:
    for user in node.users:
        name = ops.semantics(gm, user).name
        if user.op == "call_function" and name == "view":
            yield user
        elif user.op == "call_function" and name in _REARRANGING:
            yield from _views(gm, user)
