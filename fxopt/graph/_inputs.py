"""Example inputs in every form that users have them, brought to ``(args, kwargs)`` with a batch of at least two."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from fxopt.errors import TraceError

__all__ = ["ExampleInputs", "as_args", "normalize"]

Args = tuple[Any, ...]
Kwargs = dict[str, Any]


@dataclass(frozen=True)
class ExampleInputs:
    """Example inputs of a model.

    Attributes:
        args: Positional arguments.
        kwargs: Keyword arguments.
        batch: Size of dimension 0 that the batched tensors share, or 0 if there is no batch dimension.
    """

    args: Args
    kwargs: Kwargs
    batch: int

    def leaves(self) -> list[Any]:
        """All leaves of ``(args, kwargs)`` in pytree order."""
        return list(pytree.tree_leaves((self.args, self.kwargs)))

    def tensors(self) -> list[torch.Tensor]:
        """The tensors among the leaves."""
        return [leaf for leaf in self.leaves() if isinstance(leaf, torch.Tensor)]

    def is_batched(self, leaf: object) -> bool:
        """Whether a leaf is a tensor whose dimension 0 is the batch."""
        return _is_batched(leaf, self.batch)

    def with_batch(self, batch: int) -> ExampleInputs:
        """The same inputs, their batched tensors repeated or cut to ``batch`` samples."""
        if self.batch in (0, batch):
            return self
        resize = lambda leaf: _resize(leaf, batch) if self.is_batched(leaf) else leaf  # noqa: E731
        args, kwargs = pytree.tree_map(resize, (self.args, self.kwargs))
        return ExampleInputs(args, kwargs, batch)


def as_args(example_inputs: object) -> tuple[Args, Kwargs]:
    """Split example inputs into positional and keyword arguments.

    Args:
        example_inputs: A tensor, a tuple or list of arguments, a mapping of keyword arguments, or ``(args, kwargs)``
            with a tuple or list first and a dict second.

    Raises:
        TraceError: If the inputs have none of these forms.
    """
    if isinstance(example_inputs, torch.Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, Mapping):
        return (), {str(name): value for name, value in example_inputs.items()}
    if isinstance(example_inputs, (tuple, list)):
        if _is_args_kwargs(example_inputs):
            return tuple(example_inputs[0]), dict(example_inputs[1])
        return tuple(example_inputs), {}
    raise TraceError(
        f"example_inputs is of type {type(example_inputs).__name__}; "
        "give a tensor, a tuple of arguments, a dict of keyword arguments, or (args, kwargs)."
    )


def normalize(example_inputs: object) -> ExampleInputs:
    """Bring example inputs to one form and a batch of at least two samples.

    torch.export specializes a dimension of size 1, so a single sample is repeated.

    Raises:
        TraceError: If the inputs hold no tensor or have an unknown form.
    """
    args, kwargs = as_args(example_inputs)
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    if not tensors:
        raise TraceError("example_inputs holds no tensor; give one sample of what the model's forward takes.")
    empty = next((tensor for tensor in tensors if not tensor.numel()), None)
    if empty is not None:
        raise TraceError(
            f"example_inputs holds an empty tensor of shape {tuple(empty.shape)}; give at least one sample."
        )
    batch = tensors[0].shape[0] if tensors[0].dim() else 0
    inputs = ExampleInputs(args, kwargs, batch)
    return inputs.with_batch(2) if batch == 1 else inputs


def _is_args_kwargs(value: tuple[Any, ...] | list[Any]) -> bool:
    return (
        len(value) == 2
        and isinstance(value[0], (tuple, list))
        and isinstance(value[1], dict)
        and all(isinstance(name, str) for name in value[1])
    )


def _is_batched(leaf: object, batch: int) -> bool:
    return batch > 0 and isinstance(leaf, torch.Tensor) and leaf.dim() > 0 and leaf.shape[0] == batch


def _resize(tensor: torch.Tensor, batch: int) -> torch.Tensor:
    copies = -(-batch // tensor.shape[0])
    return tensor.repeat(copies, *([1] * (tensor.dim() - 1)))[:batch]
