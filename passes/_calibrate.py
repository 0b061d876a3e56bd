"""Feeding a graph from anybody's loader, before it is quantized."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from fxopt.errors import DataError, PassError, TraceError
from fxopt.graph import as_args
from fxopt.graph.fake_quantize import ActivationQuantizer, QuantizedLayer
from fxopt.graph.shapes import TRACE_META
from fxopt.graph.sparsity import sparse_sites

__all__ = ["OUTPUT_MOMENTS", "as_normalized", "batches", "feed", "refuse_quantized", "refuse_sparse", "synthetic_batch"]

OUTPUT_MOMENTS = "output_moments"
"""Attribute of a layer that batch norm was folded into: mean and standard deviation of its outputs, by channel."""

_SYNTHETIC_SAMPLES = 16


def refuse_quantized(gm: fx.GraphModule, name: str) -> None:
    """Refuse a graph whose values lie on integer grids already: those were found for the weights as they are.

    Raises:
        PassError: Naming a layer.
    """
    for path, module in gm.named_modules():
        if isinstance(module, (ActivationQuantizer, QuantizedLayer)):
            raise PassError(
                f"Pass {name!r} takes floating-point graphs, and {path!r} is quantized already; start from the graph "
                "before it was quantized."
            )


def refuse_sparse(gm: fx.GraphModule, name: str) -> None:
    """Refuse a graph with zeros among its weights that other weights would take the places of.

    Raises:
        PassError: Naming a layer.
    """
    for path in sparse_sites(gm):
        raise PassError(
            f"Pass {name!r} makes new weights, and those of {path!r} were zeroed by 'sparsify-weights' already; zero "
            "weights of its result instead."
        )


def batches(loader: Iterable[Any], gm: fx.GraphModule) -> Iterator[Any]:
    """The batches of a loader; a tensor, tuple or mapping is one batch.

    Args:
        loader: Batches, or one of them.
        gm: The graph that is to be fed.

    Raises:
        DataError: If the loader is no iterable, or a tuple that may be one batch or several.
    """
    if isinstance(loader, tuple):
        _refuse_ambiguous(loader, gm)
    if isinstance(loader, (torch.Tensor, Mapping, tuple)):
        return iter([loader])
    if not isinstance(loader, Iterable):
        raise DataError(
            f"Calibration data is a {type(loader).__name__}; give an iterable of batches, such as a DataLoader."
        )
    return iter(loader)


def _refuse_ambiguous(batch: tuple[Any, ...], gm: fx.GraphModule) -> None:
    """Refuse what ``tensor.split(32)`` gives: as one batch, all tensors but the first would be taken for labels."""
    taken = len(_signature(gm)[0])
    if not taken or len(batch) <= taken or not all(isinstance(one, torch.Tensor) for one in batch):
        return
    first = batch[0]
    if all(one.dtype == first.dtype and one.dim() > 1 and one.shape[1:] == first.shape[1:] for one in batch):
        raise DataError(
            f"A tuple of {len(batch)} tensors of one kind, such as one of shape {tuple(first.shape)}, may be one batch "
            f"or {len(batch)}, for the graph takes {taken}; give list(...) of it if each is a batch, or [...] around "
            "it if it is one."
        )


def feed(gm: fx.GraphModule, batch: Any, where: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Bring a batch to the arguments that a graph takes.

    Labels are left out: positional arguments beyond those that the graph takes, and keys that it does not know.

    Args:
        gm: A canonical graph.
        batch: A tensor, a sequence of arguments, a mapping by argument name, or ``(args, kwargs)``.
        where: What the batch is, for messages.

    Raises:
        DataError: If an argument is missing, of another shape or type than the graph was traced with, or not finite.
    """
    try:
        args, kwargs = as_args(batch)
    except TraceError as failure:
        raise DataError(f"{where}: {failure}") from failure
    positional, named = _signature(gm)
    kwargs = {name: value for name, value in kwargs.items() if name in (*positional, *named)}
    args = tuple(args[: len(positional)])
    for name in positional[len(args) :]:
        if name not in kwargs:
            raise DataError(f"{where} has no value for the input {name!r}; give one for each of {positional + named}.")
        args = (*args, kwargs.pop(name))
    missing = [name for name in named if name not in kwargs]
    if missing:
        raise DataError(f"{where} has no value for the input {missing[0]!r}; give a mapping that holds it.")
    _check_leaves(gm, (args, kwargs), where)
    device = next((parameter.device for parameter in gm.parameters()), torch.device("cpu"))
    moved = pytree.tree_map_only(torch.Tensor, lambda leaf: leaf.to(device), (args, kwargs))
    return moved[0], moved[1]


def synthetic_batch(gm: fx.GraphModule, seed: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Standard normal numbers for every float input, zeros for every other."""
    generator = torch.Generator().manual_seed(seed)
    example = gm.meta.get(TRACE_META, {})
    leaves = []
    for node in gm.graph.find_nodes(op="placeholder"):
        value = node.meta["val"]
        if not isinstance(value, torch.Tensor):
            leaves.append(value)
            continue
        size = list(value.shape)
        if example.get("dynamic_batch") and size and size[0] == example["batch"]:
            size[0] = _SYNTHETIC_SAMPLES
        if value.is_floating_point():
            leaves.append(torch.randn(size, generator=generator).to(value.dtype))
        else:
            leaves.append(torch.zeros(size, dtype=value.dtype))
    spec = _tree(gm)
    if spec is None:
        return tuple(leaves), {}
    args, kwargs = pytree.tree_unflatten(leaves, spec)
    return args, kwargs


@contextlib.contextmanager
def as_normalized(gm: fx.GraphModule) -> Iterator[int]:
    """Let the outputs of layers have the moments that the batch norms folded into them were trained to.

    With that, whatever the graph is fed, the values inside it are spread as batch-norm statistics say (Nagel et al.
    2019, data-free quantization), through additions, activation functions and poolings too.

    Yields:
        The number of such layers.
    """
    handles = []
    try:
        for module in gm.modules():
            moments = module.__dict__.get(OUTPUT_MOMENTS)
            if moments is not None:
                handles.append(module.register_forward_hook(_Normalized(*moments)))
        yield len(handles)
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class _Normalized:
    mean: torch.Tensor
    size: torch.Tensor

    def __call__(self, module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        del module, inputs
        form = [-1 if axis == 1 else 1 for axis in range(output.dim())]
        others = [axis for axis in range(output.dim()) if axis != 1]
        spread = output.std(others, keepdim=True, correction=0).clamp(min=1e-6)
        scale, shift = (one.to(output).view(form) for one in (self.size, self.mean))
        return (output - output.mean(others, keepdim=True)) / spread * scale + shift


def _tree(gm: fx.GraphModule) -> pytree.TreeSpec | None:
    info = getattr(gm.graph._codegen, "pytree_info", None)
    return info.in_spec if info is not None else None


def _signature(gm: fx.GraphModule) -> tuple[list[str], list[str]]:
    """Names of positional and of keyword-only arguments."""
    spec = _tree(gm)
    if spec is None:
        return [str(node.target) for node in gm.graph.find_nodes(op="placeholder")], []
    positional = spec.child(0).num_children
    names = [str(name) for name in gm.graph._codegen.pytree_info.orig_args]  # type: ignore[attr-defined]
    return names[:positional], [str(name) for name in spec.child(1).context]


def _check_leaves(gm: fx.GraphModule, inputs: Any, where: str) -> None:
    nodes = gm.graph.find_nodes(op="placeholder")
    leaves = pytree.tree_leaves(inputs)
    if len(leaves) != len(nodes):
        raise DataError(
            f"{where} holds {len(leaves)} values where the graph takes {len(nodes)}; see its example inputs."
        )
    example = gm.meta.get(TRACE_META, {})
    for node, leaf in zip(nodes, leaves, strict=True):
        wanted = node.meta["val"]
        if isinstance(wanted, torch.Tensor):
            problem = _problem(leaf, wanted, example)
            if problem:
                raise DataError(f"{where}, input {str(node.target)!r}: {problem}.")


def _problem(leaf: Any, wanted: torch.Tensor, example: Mapping[str, Any]) -> str | None:
    if not isinstance(leaf, torch.Tensor):
        return f"a {type(leaf).__name__} in the place of a tensor of shape {tuple(wanted.shape)}"
    size, expected = list(leaf.shape), list(wanted.shape)
    batched = bool(example.get("dynamic_batch")) and expected[:1] == [example.get("batch")]
    if len(size) != len(expected) or size[int(batched) :] != expected[int(batched) :]:
        return f"shape {tuple(size)}, where the graph was traced with {tuple(expected)}"
    if leaf.numel() == 0:
        return "it is empty"
    if leaf.is_floating_point() != wanted.is_floating_point():
        return f"type {leaf.dtype}, where the graph was traced with {wanted.dtype}"
    if leaf.is_floating_point() and not bool(torch.isfinite(leaf).all()):
        return "it holds NaN or infinity; clean the data"
    return None
