"""Shapes after channels were cut, by rule where the operator is known, by fake tensors where it is not.

:func:`fxopt.graph.propagate` runs every operator on fake tensors. Where an edit has changed nothing but numbers of
channels, most results follow from the sizes of the inputs, those of the parameters, and the result as it was: a rule
says so for layers that are modules, and calls of functions that only rearrange or combine values run on *meta* tensors,
which is what a fake tensor does with them in the end. All else is run as before. What is found is the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.utils import _pytree as pytree

from fxopt.graph import ops
from fxopt.graph._quiet import quiet_loggers
from fxopt.graph.shapes import ShapeInterpreter, placeholder_values

__all__ = ["propagate_sizes"]

Sizes: TypeAlias = tuple[int, ...]

_RUN_ON_META = frozenset(
    ("unary", "broadcast", "cat", "permute", "reshape", "split", "getitem", "slice", "select", "unbind", "expand")
)
"""Functions of these flows compute no sizes from the device of their inputs, nor make tensors on a device."""
_KEEPS_LAST = frozenset(("conv", "norm_channels", "unary", "spatial"))
"""Modules of these flows make images that are channels last of images that are."""
_TOLD_DEVICE = ("device", "pin_memory", "layout")


def propagate_sizes(gm: fx.GraphModule) -> None:
    """Recompute ``node.meta["val"]`` of every node after an edit that changed numbers of channels and nothing else.

    Args:
        gm: A graph whose nodes carry their values from before the edit. Since then parameters may have become smaller,
            and with them the attributes and arguments that tell sizes; kernels, strides and the like are as they were.

    Raises:
        VerifyError: If an input has no value or a node does not fit its inputs; the message names the node.
    """
    interpreter = _SizeInterpreter(gm)
    for node, value in interpreter.values(placeholder_values(gm)).items():
        node.meta["val"] = value


class _SizeInterpreter(ShapeInterpreter):
    """Finds values by rule and on meta tensors, and runs on fake tensors what neither can tell.

    No mode is active but while a node is run on fake tensors, so that meta tensors are made for nothing.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self._graph_module = gm
        self._meta: dict[fx.Node, Any] = {}

    def values(self, inputs: Mapping[fx.Node, Any]) -> dict[fx.Node, Any]:
        with torch.no_grad(), quiet_loggers():
            self.run(*[self.fresh(value) for value in inputs.values()], enable_io_processing=False)
        return self.found

    def run_node(self, n: fx.Node) -> Any:
        meta = self._by_rule(n) if n.op in ("call_module", "call_function") else None
        if meta is None:
            with self.mode:
                value = super().run_node(n)
            self._meta[n] = pytree.tree_map_only(torch.Tensor, _as_meta, value)
            return value
        self._meta[n] = meta
        self.found[n] = self._faked_like(meta, n.meta["val"])
        return self.found[n]

    def fresh(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return FakeTensor(self.mode, _as_meta(value), value.device)

    def _faked_like(self, meta: Any, old: Any) -> Any:
        """Fake tensors of these layouts, on the devices that the old ones were on."""
        if isinstance(meta, torch.Tensor):
            return FakeTensor(self.mode, meta, old.device)
        return type(old)(self._faked_like(one, other) for one, other in zip(meta, old, strict=True))

    def _by_rule(self, node: fx.Node) -> Any:
        """The value of a node as meta tensors; None if it has to be run."""
        old = node.meta.get("val")
        if node.op == "call_module":
            return self._of_module(node, old) if isinstance(old, torch.Tensor) else None
        flow = ops.semantics(self._graph_module, node).flow
        if flow not in _RUN_ON_META or not _is_pure(node):
            return None
        meta = self._on_meta(node, old)
        # The stride of a dimension of one index is a matter of taste after a view, and fake tensors have their own.
        return None if flow == "reshape" and isinstance(meta, torch.Tensor) and 1 in meta.shape else meta

    def _of_module(self, node: fx.Node, old: torch.Tensor) -> torch.Tensor | None:
        """What a module makes of one tensor that is dense, channels first or last, as a meta tensor."""
        source = node.args[0] if len(node.args) == 1 and not node.kwargs else None
        if not isinstance(source, fx.Node):
            return None
        before, x = source.meta.get("val"), self._meta[source]
        if not isinstance(before, torch.Tensor) or not isinstance(x, torch.Tensor):
            return None
        module = self._graph_module.get_submodule(str(node.target))
        flow = ops.semantics(self._graph_module, node).flow
        rule, layout = _MODULE_RULES.get(flow), _layout(module, x, old, flow)
        sizes = None
        if rule is not None and layout is not None:
            sizes = rule(module, tuple(before.shape), tuple(x.shape), tuple(old.shape))
        return None if sizes is None else torch.empty(sizes, dtype=old.dtype, device="meta", memory_format=layout)

    def _on_meta(self, node: fx.Node, old: Any) -> Any:
        """What a function makes of meta tensors; None if that fails, is of another kind, or of parameters."""
        if any(_of_parameters(self.found[source]) for source in node.all_input_nodes):
            return None
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self._meta.__getitem__)
        try:
            found = node.target(*args, **kwargs)  # type: ignore[operator]
        except (RuntimeError, NotImplementedError, ValueError, TypeError, IndexError):
            return None
        return found if _is_alike(found, old) else None


def _as_meta(value: torch.Tensor) -> torch.Tensor:
    offset = int(value.storage_offset())
    if not offset:
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    extent = sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
    whole = torch.empty(offset + extent + 1, dtype=value.dtype, device="meta")
    return whole.as_strided(value.shape, value.stride(), offset)


def _layout(module: nn.Module, x: torch.Tensor, old: torch.Tensor, flow: str) -> torch.memory_format | None:
    """The order in memory of a result: that of the input, if the result had it before; None where it is not plain."""
    if x.is_contiguous():
        held = [one for one in module._parameters.values() if one is not None]
        return torch.contiguous_format if all(map(_is_plain, (x, old, *held))) else None
    last = torch.channels_last
    dense = x.dim() == old.dim() == 4 and x.is_contiguous(memory_format=last) and old.is_contiguous(memory_format=last)
    return last if dense and flow in _KEEPS_LAST and not old.is_contiguous() else None


def _is_plain(value: torch.Tensor) -> bool:
    """Whether strides are those of a fresh tensor, of dimensions of one index too: they tell an order as well."""
    expected, strides = 1, []
    for size in reversed(value.shape):
        strides.append(expected)
        expected *= max(int(size), 1)
    return value.stride() == tuple(reversed(strides))


def _is_pure(node: fx.Node) -> bool:
    """Whether a function takes tensors and is not told where its result is to be."""
    told = any(node.kwargs.get(name) is not None for name in _TOLD_DEVICE)
    return bool(node.all_input_nodes) and not told and not any(isinstance(one, torch.device) for one in node.args)


def _of_parameters(value: Any) -> bool:
    """Whether gradients flow into a value although none are recorded: views of parameters say so of themselves."""
    return isinstance(value, torch.Tensor) and value.requires_grad


def _is_alike(found: Any, old: Any) -> bool:
    """Whether a value has the structure, types and ranks that it had."""
    if isinstance(old, torch.Tensor):
        same = isinstance(found, torch.Tensor) and found.dtype == old.dtype and found.dim() == old.dim()
        return bool(same and found.device.type == "meta")
    if not isinstance(old, (list, tuple)) or type(found) is not type(old) or len(found) != len(old):
        return False
    return all(_is_alike(one, other) for one, other in zip(found, old, strict=True))


def _conv(module: nn.Module, before: Sizes, x: Sizes, old: Sizes) -> Sizes | None:
    if not isinstance(module, _ConvNd) or not isinstance(module.weight, torch.Tensor):
        return None
    weight = tuple(module.weight.shape)
    if len(x) != len(weight) or x[2:] != before[2:] or (x[0], len(x)) != (old[0], len(old)):
        return None
    groups = module.groups
    transposed = isinstance(module, _ConvTransposeNd)
    inputs, outputs = (weight[0], weight[1] * groups) if transposed else (weight[1] * groups, weight[0])
    fits = x[1] == inputs and inputs % groups == 0 and outputs % groups == 0
    return (x[0], outputs, *old[2:]) if fits and _is_vector(module.bias, outputs) else None


def _linear(module: nn.Module, before: Sizes, x: Sizes, old: Sizes) -> Sizes | None:
    if not isinstance(module, nn.Linear) or not isinstance(module.weight, torch.Tensor):
        return None
    outputs, inputs = module.weight.shape
    fits = len(x) > 1 and x[-1] == inputs and before[:-1] == old[:-1] and _is_vector(module.bias, outputs)
    return (*x[:-1], outputs) if fits else None


def _norm_channels(module: nn.Module, before: Sizes, x: Sizes, old: Sizes) -> Sizes | None:
    if isinstance(module, nn.PReLU):
        return x if before == old and module.weight.numel() in (1, x[1]) else None
    held = [*module._parameters.values(), *module._buffers.values()]
    tensors = [one for one in held if one is not None and one.dim()]
    fits = isinstance(module, _BatchNorm) and all(_is_vector(one, x[1]) for one in tensors)
    return x if fits and before == old else None


def _norm_across(module: nn.Module, before: Sizes, x: Sizes, old: Sizes) -> Sizes | None:
    if not isinstance(module, (nn.LayerNorm, nn.RMSNorm)) or before != old:
        return None
    over = tuple(module.normalized_shape)
    fits = all(one is None or tuple(one.shape) == over for one in module._parameters.values())
    return x if fits and x[len(x) - len(over) :] == over else None


def _norm_groups(module: nn.Module, before: Sizes, x: Sizes, old: Sizes) -> Sizes | None:
    if not isinstance(module, nn.GroupNorm) or before != old or x[1] != module.num_channels:
        return None
    fits = all(_is_vector(one, x[1]) for one in module._parameters.values())
    return x if fits and x[1] % module.num_groups == 0 else None


def _embedding(module: nn.Module, before: Sizes, x: Sizes, old: Sizes) -> Sizes | None:
    if not isinstance(module, nn.Embedding) or old[:-1] != x:
        return None
    return (*x, module.weight.shape[1])


def _pointwise(module: nn.Module, before: Sizes, x: Sizes, old: Sizes) -> Sizes | None:
    return x if before == old and not _has_tensors(module) else None


def _spatial(module: nn.Module, before: Sizes, x: Sizes, old: Sizes) -> Sizes | None:
    """Pooling, padding and resizing of images: channels as they come, height and width as they were."""
    fits = len(x) == len(old) == 4 and x[2:] == before[2:] and before[:2] == old[:2] and math.prod(old) > 0
    return (*x[:2], *old[2:]) if fits and not _has_tensors(module) else None


def _has_tensors(module: nn.Module) -> bool:
    return any(True for _ in module.parameters()) or any(True for _ in module.buffers())


def _is_vector(tensor: Any, size: int) -> bool:
    return tensor is None or tuple(tensor.shape) == (size,)


_MODULE_RULES: dict[str, Callable[[nn.Module, Sizes, Sizes, Sizes], Sizes | None]] = {
    "conv": _conv,
    "conv_transpose": _conv,
    "linear": _linear,
    "norm_channels": _norm_channels,
    "norm_across": _norm_across,
    "norm_groups": _norm_groups,
    "embedding": _embedding,
    "unary": _pointwise,
    "softmax": _pointwise,
    "spatial": _spatial,
}
