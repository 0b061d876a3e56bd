"""The one place that calls torch.export, and that turns its refusals into a TraceError."""

from __future__ import annotations

import inspect
import re
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from fxopt.errors import TraceError
from fxopt.graph._inputs import ExampleInputs

__all__ = ["export_program", "unlift"]

_LIBRARY = tuple(str(Path(module.__file__).parent) for module in (torch,) if module.__file__)
_FRAME = re.compile(r'File "([^"]+)", line (\d+)')

_REMEDIES = (
    (
        ("data-dependent", "DataDependent", "Could not guard on"),
        "the control flow depends on the values of a tensor",
        "Trace the submodule before it and do the data-dependent part outside, or write it with torch.where.",
    ),
    (
        ("specialized", "Constraints violated", "ConstraintViolation"),
        "the batch size is fixed by the model's own code",
        "Use tensor operations in place of Python loops or numbers that depend on the batch size.",
    ),
)
_DEFAULT_REMEDY = (
    "torch.export cannot follow this code",
    "Trace a submodule, or wrap the pre- or post-processing outside the model.",
)


def export_program(model: nn.Module, inputs: ExampleInputs) -> tuple[ExportedProgram, bool]:
    """Export a module, its batch dimension dynamic where the model allows it.

    Returns:
        The program, and whether its batch dimension is dynamic.

    Raises:
        TraceError: If torch.export refuses the model.
    """
    try:
        return _export(model, inputs, dynamic=inputs.batch > 0), inputs.batch > 0
    except Exception as first:
        _check_eagerly(model, inputs)
        if not inputs.batch or _is_value_dependent(first):
            raise TraceError(_export_message(model, first)) from first
    try:
        return _export(model, inputs, dynamic=False), False
    except Exception as failure:
        raise TraceError(_export_message(model, failure)) from failure


def unlift(program: ExportedProgram) -> fx.GraphModule:
    """The program as a GraphModule of ATen calls whose state is attributes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gm = program.module(check_guards=False)
    if not isinstance(gm, fx.GraphModule):
        raise TraceError("torch.export gave no GraphModule; the installed torch is not supported, use torch >= 2.9.")
    for name in ("train", "eval"):
        gm.__dict__.pop(name, None)
    gm._forward_pre_hooks.clear()
    return gm


def _check_eagerly(model: nn.Module, inputs: ExampleInputs) -> None:
    """Tell a mistake in the inputs as such: run the model once as it is, its buffers restored afterwards."""
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    try:
        with torch.no_grad():
            model(*inputs.args, **inputs.kwargs)
    except Exception as failure:
        raise TraceError(_eager_message(model, failure, inputs)) from failure
    finally:
        for name, value in buffers.items():
            model.get_buffer(name).copy_(value)


def _export(model: nn.Module, inputs: ExampleInputs, *, dynamic: bool) -> ExportedProgram:
    spec = None
    if dynamic:
        spec = pytree.tree_map(
            lambda leaf: {0: Dim.DYNAMIC} if inputs.is_batched(leaf) else None, (inputs.args, inputs.kwargs)
        )
        spec = _merge_spec(model, spec[0], spec[1])
    with warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")
        return torch.export.export(model, inputs.args, inputs.kwargs, dynamic_shapes=spec, strict=False)


def _merge_spec(model: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    if not kwargs:
        return args
    names = list(inspect.signature(model.forward).parameters)
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _is_value_dependent(failure: Exception) -> bool:
    return any(key in f"{type(failure).__name__} {failure}" for key in _REMEDIES[0][0])


def _user_location(failure: BaseException) -> str:
    """File and line of the innermost frame that is not torch's own."""
    frames = [
        (frame.filename, frame.lineno)
        for frame in traceback.extract_tb(failure.__traceback__)
        if not _is_library(frame.filename)
    ]
    if frames:
        return f"{frames[-1][0]}:{frames[-1][1]}"
    named = [(file, line) for file, line in _FRAME.findall(str(failure)) if not _is_library(file)]
    return f"{named[-1][0]}:{named[-1][1]}" if named else "an unknown line"


def _is_library(filename: str) -> bool:
    return filename.startswith((*_LIBRARY, "<")) or filename.startswith(str(Path(__file__).parent))


def _first_line(failure: BaseException) -> str:
    lines = [line.strip() for line in str(failure).splitlines() if line.strip()]
    return lines[0] if lines else type(failure).__name__


def _export_message(model: nn.Module, failure: Exception) -> str:
    text = f"{type(failure).__name__} {failure}"
    reason, remedy = _DEFAULT_REMEDY
    for keys, why, what in _REMEDIES:
        if any(key in text for key in keys):
            reason, remedy = why, what
            break
    return (
        f"Cannot trace {type(model).__name__} at {_user_location(failure)}: {reason}. {remedy} "
        f"(torch.export: {_first_line(failure)})"
    )


def _eager_message(model: nn.Module, failure: Exception, inputs: ExampleInputs) -> str:
    shapes = ", ".join(
        f"{tuple(leaf.shape)} {leaf.dtype}" if isinstance(leaf, torch.Tensor) else repr(leaf)
        for leaf in inputs.leaves()
    )
    return (
        f"{type(model).__name__} fails on its example inputs ({shapes}) at {_user_location(failure)}: "
        f"{_first_line(failure)}. Check the shapes and types of example_inputs against the model's forward."
    )
