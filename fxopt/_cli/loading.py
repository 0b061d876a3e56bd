"""The user's own models, loaders and functions, named as MODULE:FUNCTION."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from fxopt.errors import FxoptError, UnknownNameError

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.export import ExportedProgram

__all__ = ["PROGRAM", "call", "is_program", "load_function", "load_model", "load_source", "parse_input"]

_FORM = "'package.module:function' or 'path/file.py:function'"
PROGRAM = ".pt2"
"""The suffix of an exported program."""
_INPUT = re.compile(r"(?P<shape>\d+(?:,\d+)*)(?::(?P<dtype>\w+))?")
_DTYPES = ("float32", "float64", "float16", "int64", "int32", "bool")


def load_function(reference: str) -> Callable[..., Any]:
    """The function that ``reference`` names.

    Args:
        reference: ``package.module:function``, importable from here, or ``path/file.py:function``.

    Raises:
        FxoptError: If the reference has another form, or the module cannot be imported; says where it failed.
        UnknownNameError: If the module has no such function; suggests the nearest one.
    """
    place, _, name = reference.rpartition(":")
    if not place or not name:
        raise FxoptError(f"{reference!r} names no function; give {_FORM}.")
    is_file = place.endswith(".py") or os.sep in place
    module = _load_file(Path(place)) if is_file else _load_module(place)
    found: Any = getattr(module, name, None)
    if found is None:
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise UnknownNameError(f"function in {place}", name, known)
    if not callable(found):
        raise FxoptError(f"{reference!r} is a {type(found).__name__}; name a function that returns it.")
    function: Callable[..., Any] = found
    return function


def call(reference: str) -> Any:
    """What the function that ``reference`` names returns, called without arguments.

    Raises:
        FxoptError: If it cannot be loaded, needs arguments, or raises; says where.
    """
    function = load_function(reference)
    _check_no_arguments(function, reference)
    try:
        return function()
    except FxoptError:
        raise
    except Exception as failure:
        raise FxoptError(f"{reference} raised {_told(failure)} Correct it and run again.") from failure


def load_source(reference: str, inputs: Sequence[str] = ()) -> tuple[nn.Module | ExportedProgram, Any]:
    """A model, as it was made or saved, and its example inputs.

    Args:
        reference: A function that returns a model, or a pair of model and example inputs; or a ``.pt2`` file. A model
            is an nn.Module or an ExportedProgram, which brings its own example inputs.
        inputs: Shapes to make example inputs of in place of those, such as ``"1,3,224,224"``.

    Raises:
        FxoptError: If the file cannot be read, the function returns something else, or there are no example inputs.
    """
    from torch import nn
    from torch.export import ExportedProgram

    made = _program(reference) if is_program(reference) else call(reference)
    model, example = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, (nn.Module, ExportedProgram)):
        raise FxoptError(
            f"{reference} returned a {type(made).__name__}; return a torch.nn.Module, or (module, example_inputs)."
        )
    if inputs:
        tensors = tuple(parse_input(text) for text in inputs)
        return model, tensors if len(tensors) > 1 else tensors[0]
    if example is None and isinstance(model, ExportedProgram):
        example = model.example_inputs
    if example is None:
        raise FxoptError(
            f"{reference} gives a model and no example inputs; return (model, example_inputs), "
            "or give a shape such as --input 1,3,224,224."
        )
    return model, example


def load_model(reference: str, inputs: Sequence[str] = ()) -> tuple[nn.Module, Any]:
    """A model as a module, and its example inputs: :func:`load_source`, a program of it as its graph.

    Raises:
        FxoptError: As :func:`load_source`; and if a program cannot be traced.
    """
    from torch import nn

    source, example = load_source(reference, inputs)
    if isinstance(source, nn.Module):
        return source, example
    from fxopt.graph import trace

    return trace(source, example), example


def is_program(reference: str) -> bool:
    """Whether a reference is a saved program rather than a function."""
    return reference.endswith(PROGRAM)


def _program(path: str) -> ExportedProgram:
    from fxopt.graph import load_program

    return load_program(path)


def parse_input(text: str) -> torch.Tensor:
    """An example input from its shape: ``"1,3,224,224"``, or with a type, ``"1,128:int64"``.

    Floating-point tensors hold normal random numbers, the same each time; others zeros.

    Raises:
        FxoptError: If the text has another form; says which is accepted.
    """
    import torch

    match = _INPUT.fullmatch(text.replace(" ", ""))
    dtype = (match["dtype"] or "float32") if match else ""
    shape = [int(size) for size in match["shape"].split(",")] if match else [0]
    if dtype not in _DTYPES or 0 in shape:
        raise FxoptError(
            f"Input {text!r} is no shape; write sizes above zero such as 1,3,224,224, "
            f"or with a type 1,128:int64 (one of {', '.join(_DTYPES)})."
        )
    kind: torch.dtype = getattr(torch, dtype)
    if not kind.is_floating_point:
        return torch.zeros(shape, dtype=kind)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(kind)


def _load_module(name: str) -> ModuleType:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as failure:
        if failure.name is None or not (name == failure.name or name.startswith(failure.name + ".")):
            raise FxoptError(f"Importing {name} raised {_told(failure)} Install what is missing.") from failure
        raise FxoptError(
            f"There is no module {name!r}: {failure.name!r} is neither installed nor in {here}. Give {_FORM}."
        ) from failure
    except Exception as failure:
        raise FxoptError(f"Importing {name} raised {_told(failure)} Correct it and run again.") from failure


def _load_file(path: Path) -> ModuleType:
    """The module in a file, executed once; its folder becomes importable, as for a script."""
    path = path.resolve()
    name = f"_fxopt_file_{path.stem}_{abs(hash(str(path))):x}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise FxoptError(f"There is no Python file {path}; give {_FORM}.")
    module = importlib.util.module_from_spec(spec)
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as failure:
        del sys.modules[name]
        raise FxoptError(f"Running {path} raised {_told(failure)} Correct it and run again.") from failure
    return module


def _check_no_arguments(function: Callable[..., Any], reference: str) -> None:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return
    try:
        signature.bind()
    except TypeError:
        raise FxoptError(
            f"{reference} takes arguments {signature}; name a function that can be called without any."
        ) from None


def _told(failure: Exception) -> str:
    """An error of the user's code, and the line that raised it."""
    if isinstance(failure, SyntaxError):
        return f"SyntaxError: {failure.msg} ({failure.filename}:{failure.lineno})."
    frames = [frame for frame in traceback.extract_tb(failure.__traceback__) if "importlib" not in frame.filename]
    where = f" ({frames[-1].filename}:{frames[-1].lineno})" if len(frames) > 1 else ""
    return f"{type(failure).__name__}: {failure}{where}."
