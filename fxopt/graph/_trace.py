"""From a model to the canonical graph."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram

from fxopt.errors import TraceError, VerifyError
from fxopt.graph import _export
from fxopt.graph._functionalize import functionalize
from fxopt.graph._inputs import ExampleInputs, normalize
from fxopt.graph._raise import raise_modules
from fxopt.graph.edit import finish, free_path
from fxopt.graph.shapes import TRACE_META
from fxopt.graph.verify import verify

__all__ = ["trace"]

_aten = torch.ops.aten
_ASSERTIONS = frozenset(
    (
        _aten._assert_tensor_metadata.default,
        _aten._assert_async.msg,
        _aten._assert_scalar.default,
        _aten.sym_constrain_range_for_size.default,
    )
)


def trace(model: nn.Module | ExportedProgram, example_inputs: object = None) -> fx.GraphModule:
    """Trace a model to the canonical graph: the user's own modules, functional ATen calls, shapes on every node.

    The graph shares its leaf modules and parameters with the model, as ``torch.fx.symbolic_trace`` does; fxopt's
    passes never change a module in place, so the model stays as it was.

    Args:
        model: A module, a GraphModule from any tracer, or an ExportedProgram. A graph from ``trace`` comes back
            unchanged.
        example_inputs: One input of the model: a tensor, a tuple of arguments, a dict of keyword arguments, or
            ``(args, kwargs)``. A batch of one is repeated. May be left out for an ExportedProgram.

    Returns:
        A GraphModule that takes and gives what the model does, at any batch size where the model allows it; its
        state_dict has the model's keys and values. ``gm.meta["fxopt"]`` says the example batch and whether the
        batch dimension is dynamic.

    Raises:
        TraceError: If the model or its inputs cannot be traced; the message says where, why and what to do.
    """
    if isinstance(model, fx.GraphModule) and TRACE_META in model.meta:
        verify(model)
        return model
    if isinstance(model, ExportedProgram):
        return _from_program(model, example_inputs)
    if not isinstance(model, nn.Module):
        raise TraceError(f"Cannot trace a {type(model).__name__}; give an nn.Module or an ExportedProgram.")
    if example_inputs is None:
        raise TraceError("example_inputs is missing; give one sample of what the model's forward takes.")
    inputs = normalize(example_inputs)
    program, dynamic = _export.export_program(model, inputs)
    return _canonical(_export.unlift(program), model, inputs, dynamic)


def _from_program(program: ExportedProgram, example_inputs: object) -> fx.GraphModule:
    held = program.example_inputs if example_inputs is None else example_inputs
    if held is None:
        raise TraceError("The ExportedProgram keeps no example inputs; give example_inputs.")
    gm = _export.unlift(program)
    inputs = _as_exported(normalize(held), gm)
    dynamic = any(
        isinstance(size, torch.SymInt)
        for node in gm.graph.find_nodes(op="placeholder")
        if isinstance(node.meta.get("val"), torch.Tensor)
        for size in node.meta["val"].shape[:1]
    )
    return _canonical(gm, gm, inputs, dynamic)


def _as_exported(inputs: ExampleInputs, gm: fx.GraphModule) -> ExampleInputs:
    """Inputs at the batch that the program was exported for, if that is fixed."""
    for node in gm.graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and value.dim() and isinstance(value.shape[0], int):
            return inputs.with_batch(value.shape[0])
    return inputs


def _canonical(gm: fx.GraphModule, model: nn.Module, inputs: ExampleInputs, dynamic: bool) -> fx.GraphModule:
    for node in list(gm.graph.nodes):
        if node.target in _ASSERTIONS and not node.users:
            gm.graph.erase_node(node)
    _erase_batch_counters(gm)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        raise_modules(gm, model)
    _raise_functional_dropout(gm, model)
    functionalize(gm)
    _adopt_state(gm, model)
    gm.meta = {TRACE_META: {"batch": inputs.batch, "dynamic_batch": dynamic}}
    _set_example_values(gm, inputs)
    try:
        finish(gm)
        verify(gm)
    except VerifyError as failure:
        raise TraceError(f"The graph of {type(model).__name__} is not canonical: {failure}") from failure
    return gm


def _erase_batch_counters(gm: fx.GraphModule) -> None:
    """Batch norm counts its batches itself once it is a module again."""
    for node in gm.graph.find_nodes(op="call_function", target=_aten.add_.Tensor):
        source = node.args[0]
        counts = isinstance(source, fx.Node) and source.op == "get_attr"
        if counts and not node.users and str(source.target).endswith("num_batches_tracked"):
            gm.graph.erase_node(node)


def _raise_functional_dropout(gm: fx.GraphModule, model: nn.Module) -> None:
    """``F.dropout(x, p, self.training)`` becomes an nn.Dropout, so that train() and eval() reach it."""
    for node in gm.graph.find_nodes(op="call_function", target=_aten.dropout.default):
        source, rate, active = node.args
        stack = node.meta.get("nn_module_stack")
        path = str(list(stack.values())[-1][0]).split("@")[0] if stack else ""
        try:
            owner = model.get_submodule(path)
        except AttributeError:
            continue
        if not isinstance(source, fx.Node) or bool(active) != owner.training:
            continue
        name = free_path(gm, f"{path}.functional_dropout" if path else "functional_dropout")
        gm.add_submodule(name, nn.Dropout(float(rate)).train(owner.training))
        with gm.graph.inserting_before(node):
            raised = gm.graph.call_module(name, (source,))
        raised.meta = dict(node.meta)
        node.replace_all_uses_with(raised)
        gm.graph.erase_node(node)


def _adopt_state(gm: fx.GraphModule, model: nn.Module) -> None:
    """Register every parameter and buffer of the model at its own path: the very objects, used or not."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        holder, leaf = _holder(gm, name)
        if holder._parameters.get(leaf) is not parameter:
            _forget(holder, leaf)
            holder.register_parameter(leaf, parameter)
    for path, module in model.named_modules(remove_duplicate=False):
        for leaf, buffer in module._buffers.items():
            holder, _ = _holder(gm, f"{path}.{leaf}" if path else leaf)
            if buffer is not None and holder._buffers.get(leaf) is not buffer:
                _forget(holder, leaf)
                holder.register_buffer(leaf, buffer, persistent=leaf not in module._non_persistent_buffers_set)
    present = dict(gm.named_modules())
    for path, module in model.named_modules():
        if path in present:
            present[path].training = module.training
    gm.training = model.training


def _holder(gm: fx.GraphModule, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    module: nn.Module = gm
    for part in path.split(".") if path else []:
        if part not in module._modules:
            module.add_module(part, nn.Module())
        module = module._modules[part]  # type: ignore[assignment]
    return module, leaf


def _forget(holder: nn.Module, leaf: str) -> None:
    if leaf in holder._parameters or leaf in holder._buffers or hasattr(holder, leaf):
        delattr(holder, leaf)


def _set_example_values(gm: fx.GraphModule, inputs: ExampleInputs) -> None:
    """Give every placeholder a fake value of concrete size."""
    mode = FakeTensorMode()
    for node in gm.graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor):
            continue
        extents: list[Any] = list(value.shape)
        size = [inputs.batch if isinstance(extent, torch.SymInt) else extent for extent in extents]
        with mode:
            node.meta["val"] = torch.empty(size, dtype=value.dtype, device=value.device)
