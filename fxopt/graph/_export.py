"""The one place that calls torch.export, and that turns its refusals into a TraceError."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import io
import linecache
import re
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from fxopt.errors import TraceError, VerifyError
from fxopt.graph._copies import CanonicalGraph
from fxopt.graph._inputs import ExampleInputs
from fxopt.graph._quiet import quiet_loggers
from fxopt.graph.shapes import eval_mode

__all__ = ["data_dependent", "export_program", "export_training", "location", "not_canonical", "unlift"]

_TORCH = str(Path(torch.__file__).parent)
_OURS = str(Path(__file__).parent)
_FRAME = re.compile(r'File "([^"]+)", line (\d+)')
_GRAPHS_OWN = {*dir(fx.GraphModule), "meta", "shape_env", "range_constraints"} - set(dir(nn.Module))
_UNKNOWN_TYPE = "not a known type"
_VALUES = (
    "the control flow depends on the values of a tensor",
    "Trace the submodule before it and do the data-dependent part outside, or write it with torch.where.",
)
_NUMBERS = (
    "it leaves torch for numpy or plain Python numbers",
    "Write this part with tensor operations, or do it outside the traced module.",
)
_REMEDIES = (
    (("data-dependent", "DataDependent", "Could not guard on", "DynamicOutputShape"), *_VALUES),
    (
        ("specialized", "Constraints violated", "ConstraintViolation"),
        "the batch size is fixed by the model's own code",
        "Use tensor operations in place of Python loops or numbers that depend on the batch size.",
    ),
    (
        (_UNKNOWN_TYPE,),
        "it takes or gives an object of a class that torch does not know",
        "Give tensors, tuples, dicts or dataclasses, or trace the submodule that computes them.",
    ),
    ((".numpy()", "tolist", "tensor subclasses"), *_NUMBERS),
)
_DEFAULT_REMEDY = (
    "torch.export cannot follow this code",
    "Trace a submodule, or wrap the pre- or post-processing outside the model.",
)


def export_program(model: nn.Module, inputs: ExampleInputs) -> tuple[ExportedProgram, bool]:
    """Export a module as it is in eval mode, its batch dimension dynamic where the model allows it.

    Returns:
        The program, and whether its batch dimension is dynamic.

    Raises:
        TraceError: If torch.export refuses the model.
    """
    with eval_mode(model):
        if not all(leaf.is_floating_point() for leaf in inputs.tensors()):
            # Fake tensors look neither at indices nor, everywhere, at types.
            _check_eagerly(model, inputs)
        try:
            return _export(model, inputs, dynamic=inputs.batch > 0), inputs.batch > 0
        except Exception as failure:
            first = failure
        outputs = _check_eagerly(model, inputs)
        known = _UNKNOWN_TYPE in str(first) and _register_dataclasses((inputs.args, inputs.kwargs, outputs))
        if _is_value_dependent(first):
            raise TraceError(_export_message(model, first)) from first
        for dynamic in (True, False) if known else (False,):
            try:
                return _export(model, inputs, dynamic=dynamic and inputs.batch > 0), dynamic and inputs.batch > 0
            except Exception as failure:
                first = failure
        raise TraceError(_export_message(model, first)) from first


def export_training(model: nn.Module, inputs: ExampleInputs, dynamic: bool) -> ExportedProgram:
    """The program of train mode.

    Raises:
        TraceError: If torch.export refuses it.
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = True
        return _export(model, inputs, dynamic=dynamic)
    except Exception as failure:
        raise TraceError(_export_message(model, failure)) from failure
    finally:
        for module, training in modes:
            module.training = training


def unlift(program: ExportedProgram) -> CanonicalGraph:
    """The program as a GraphModule of ATen calls whose state is attributes, without torch.export's checks and hooks."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            unlifted = program.module(check_guards=False)
        except Exception as failure:
            raise TraceError(_unlift_message(program, failure)) from failure
    if not isinstance(unlifted, fx.GraphModule):
        raise TraceError("torch.export gave no GraphModule; the installed torch is not supported, use torch >= 2.9.")
    gm = CanonicalGraph(nn.Module(), fx.Graph())
    for name in ("_parameters", "_buffers", "_non_persistent_buffers_set", "_modules"):
        setattr(gm, name, getattr(unlifted, name))
    for node in unlifted.graph.find_nodes(op="get_attr"):
        if str(node.target) in unlifted.__dict__:
            setattr(gm, str(node.target), unlifted.__dict__[str(node.target)])
    gm.graph = unlifted.graph
    return gm


def _unlift_message(program: ExportedProgram, failure: Exception) -> str:
    names = {key.partition(".")[0] for key in (*program.state_dict, *program.constants)}
    taken = sorted(names & _GRAPHS_OWN)
    if taken:
        return (
            f"The model has an attribute {taken[0]!r}, and so has every torch.fx.GraphModule: rename it, or trace a "
            "module that holds the model as an attribute of its own and calls it, such as nn.Sequential(model)."
        )
    first = (str(failure).splitlines() or [""])[0]
    return f"torch.export made a program that is no GraphModule: {type(failure).__name__}: {first}"


def location(model: nn.Module, node: fx.Node) -> str:
    """File and line of the model's code that made a node."""
    named = _user_frames(_FRAME.findall(node.stack_trace or ""))
    return f"{named[-1][0]}:{named[-1][1]}" if named else _forward_location(model)


def data_dependent(model: nn.Module, node: fx.Node) -> TraceError:
    """The error for a node whose shape depends on the values of a tensor, or that takes a number out of one."""
    where = location(model, node)
    why, what = _NUMBERS
    if isinstance(node.meta.get("val"), torch.Tensor):
        why = f"the shape that {node.target} gives depends on the values of a tensor"
        what = "Trace the submodule before it and do the data-dependent part outside."
    return TraceError(f"Cannot trace {type(model).__name__} at {where}: {why}.{_code(where)} {what}")


def not_canonical(model: nn.Module, gm: fx.GraphModule, failure: VerifyError) -> TraceError:
    """The error for a graph whose node breaks a rule of canonical graphs."""
    nodes = [node for node in gm.graph.nodes if node.name == failure.node]
    where = location(model, nodes[0]) if nodes else _forward_location(model)
    return TraceError(
        f"Cannot trace {type(model).__name__} at {where}: {str(failure).rstrip('.')}.{_code(where)} "
        f"{_DEFAULT_REMEDY[1]}"
    )


def _check_eagerly(model: nn.Module, inputs: ExampleInputs) -> Any:
    """Tell a mistake in the inputs as such: run the model once, its buffers and the random state restored afterwards.

    Returns:
        The model's outputs.
    """
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return model(*inputs.args, **inputs.kwargs)
    except Exception as failure:
        raise TraceError(_eager_message(model, failure, inputs)) from failure
    finally:
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


def _register_dataclasses(values: Any) -> bool:
    """Make torch know the dataclasses in some inputs and outputs, as torch.export asks for."""
    found = False
    for leaf in pytree.tree_leaves(values):
        if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            torch.export.register_dataclass(type(leaf))
            _register_dataclasses([getattr(leaf, each.name) for each in dataclasses.fields(leaf)])
            found = True
    return found


def _export(model: nn.Module, inputs: ExampleInputs, *, dynamic: bool) -> ExportedProgram:
    spec: Any = None
    if dynamic:
        sizes = lambda leaf: {0: Dim.DYNAMIC} if inputs.is_batched(leaf) else None  # noqa: E731
        args, kwargs = pytree.tree_map(sizes, (inputs.args, inputs.kwargs))
        spec = dict(inspect.signature(model.forward).bind(*args, **kwargs).arguments)
    # torch.export leaves marks on tensors whose sizes were to be dynamic; the next attempt would read them.
    args, kwargs = pytree.tree_map_only(torch.Tensor, _alias, (inputs.args, inputs.kwargs))
    with _quiet(), _no_fast_path(), torch.enable_grad():
        return torch.export.export(model, args, kwargs, dynamic_shapes=spec, strict=False)


def _alias(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().requires_grad_(tensor.requires_grad)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch.export's graph dumps and warnings to itself: a TraceError says it all."""
    with quiet_loggers(), warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def _no_fast_path() -> Iterator[None]:
    """Have attention layers compute by plain operators, which a frozen one does not do in eval mode."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def _is_value_dependent(failure: Exception) -> bool:
    return any(key in f"{type(failure).__name__} {failure}" for key in _REMEDIES[0][0])


def _user_location(model: nn.Module, failure: BaseException) -> str:
    """File and line of the innermost frame that is not torch's own; failing that, of the model's forward."""
    frames = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(failure.__traceback__)]
    found = _user_frames(frames) or _user_frames(_FRAME.findall(str(failure)))
    return f"{found[-1][0]}:{found[-1][1]}" if found else _forward_location(model)


def _user_frames(frames: Any) -> list[tuple[str, Any]]:
    return [(file, line) for file, line in frames if not file.startswith((_TORCH, _OURS, "<"))]


def _forward_location(model: nn.Module) -> str:
    """Where the class of the model, or of the first submodule that is not torch's own, has its forward."""
    for module in model.modules():
        code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
        if code is not None and not code.co_filename.startswith((_TORCH, "<")):
            return f"{code.co_filename}:{code.co_firstlineno}"
    return f"{type(model).__name__}.forward"


def _code(location: str) -> str:
    """The line of code at a location, to be shown in a message."""
    file, _, line = location.rpartition(":")
    text = linecache.getline(file, int(line)).strip() if line.isdigit() else ""
    return f" The code is `{text}`." if text else ""


def _first_line(failure: BaseException) -> str:
    lines = [line.strip() for line in str(failure).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(failure).__name__


def _export_message(model: nn.Module, failure: Exception) -> str:
    text = f"{type(failure).__name__} {failure}"
    where = _user_location(model, failure)
    said = _code(where).replace("{", "{{").replace("}", "}}") + " {}"
    for keys, why, what in _REMEDIES:
        if any(key in text for key in keys):
            return f"Cannot trace {type(model).__name__} at {where}: {why}.{said.format(what)}"
    reason, remedy = _DEFAULT_REMEDY
    return f"Cannot trace {type(model).__name__} at {where}: {reason} ({_first_line(failure)}).{said.format(remedy)}"


def _eager_message(model: nn.Module, failure: Exception, inputs: ExampleInputs) -> str:
    shapes = ", ".join(
        f"{tuple(leaf.shape)} {leaf.dtype}" if isinstance(leaf, torch.Tensor) else repr(leaf)
        for leaf in inputs.leaves()
    )
    return (
        f"{type(model).__name__} fails on its example inputs ({shapes}) at {_user_location(model, failure)}: "
        f"{_first_line(failure)}. Check the shapes and types of example_inputs against the model's forward."
    )
