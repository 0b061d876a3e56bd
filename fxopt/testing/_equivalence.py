"""Whether two modules compute the same."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from fxopt.graph import ExampleInputs, eval_mode, normalize

__all__ = ["assert_equivalent"]


def assert_equivalent(
    one: nn.Module,
    other: nn.Module,
    example_inputs: object,
    *,
    relative: float = 1e-6,
    draws: int = 2,
    batch: int | None = None,
    seed: int = 0,
) -> None:
    """Check that two modules give the same outputs, both in eval mode, on the example and on random inputs like it.

    Args:
        one: A module.
        other: A module that takes the same inputs.
        example_inputs: A tensor, a tuple of arguments, a dict of keyword arguments, or ``(args, kwargs)``.
        relative: The largest difference allowed in an output tensor, as a part of the largest magnitude in it. At 0
            the outputs have to be equal; at infinity only their structure, types and shapes.
        draws: How many random inputs to try besides the example. Floating-point inputs are standard normal, integer
            inputs lie within the example's range.
        batch: A batch size to try as well, or None.
        seed: Seed of the random inputs.

    Raises:
        AssertionError: If the outputs differ in structure, type, shape or value; tells where and by how much.
    """
    generator = torch.Generator().manual_seed(seed)
    example = normalize(example_inputs)
    trials = [example, *(_like(example, generator) for _ in range(draws))]
    if batch is not None:
        trials.append(_like(example.with_batch(batch), generator))
    for number, trial in enumerate(trials):
        with torch.no_grad():
            with eval_mode(one):
                expected = one(*trial.args, **trial.kwargs)
            with eval_mode(other):
                found = other(*trial.args, **trial.kwargs)
        what = "the example" if number == 0 else f"random input {number} (batch {trial.batch}, seed {seed})"
        _compare(expected, found, relative, what)


def _like(inputs: ExampleInputs, generator: torch.Generator) -> ExampleInputs:
    args, kwargs = pytree.tree_map(lambda leaf: _random(leaf, generator), (inputs.args, inputs.kwargs))
    return ExampleInputs(args, kwargs, inputs.batch)


def _random(leaf: Any, generator: torch.Generator) -> Any:
    if not isinstance(leaf, torch.Tensor) or not leaf.numel():
        return leaf
    if leaf.is_floating_point():
        return torch.randn(leaf.shape, generator=generator, dtype=torch.float64).to(leaf)
    if leaf.dtype == torch.bool:
        return leaf
    low, high = int(leaf.min()), int(leaf.max())
    return torch.randint(low, high + 1, leaf.shape, generator=generator).to(leaf)


def _compare(expected: Any, found: Any, relative: float, what: str) -> None:
    mine, structure = pytree.tree_flatten(expected)
    yours, other_structure = pytree.tree_flatten(found)
    if structure != other_structure:
        raise AssertionError(f"On {what} the outputs have another structure: {structure} and {other_structure}.")
    for number, (one, other) in enumerate(zip(mine, yours, strict=True)):
        where = f"On {what}, output {number}"
        if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor):
            if one != other:
                raise AssertionError(f"{where} differs: {one!r} and {other!r}.")
            continue
        if one.shape != other.shape or one.dtype != other.dtype:
            raise AssertionError(
                f"{where} is {tuple(one.shape)} {one.dtype} in one and {tuple(other.shape)} {other.dtype} in the other."
            )
        if relative == math.inf or torch.equal(one, other):
            continue
        difference = float((one.double() - other.double()).abs().max())
        largest = float(one.double().abs().max())
        if not difference <= relative * largest:
            raise AssertionError(
                f"{where} differs by {difference:.3g}; its largest magnitude is {largest:.3g} and {relative:.3g} of it "
                "is allowed."
            )
