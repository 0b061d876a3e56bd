"""From a model to the canonical graph."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils import _pytree as pytree

from fxopt.errors import TraceError, VerifyError
from fxopt.graph import _export, ops
from fxopt.graph._decompose import decompose
from fxopt.graph._functionalize import functionalize
from fxopt.graph._inputs import ExampleInputs, normalize
from fxopt.graph._modes import depends_on_mode, merge_modes
from fxopt.graph._raise import raise_modules
from fxopt.graph._regions import inline_regions
from fxopt.graph.edit import finish, free_path, insert_get_attr
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
    gm = _raised(_export.unlift(program), model)
    if depends_on_mode(gm, model):
        _add_training(gm, model, inputs, dynamic)
    return _canonical(gm, model, inputs, dynamic)


def _add_training(gm: fx.GraphModule, model: nn.Module, inputs: ExampleInputs, dynamic: bool) -> None:
    """Let the graph, which is that of eval mode, do in train mode what the model does there."""
    name = type(model).__name__
    try:
        trained = _raised(_export.unlift(_export.export_training(model, inputs, dynamic)), model)
    except TraceError as failure:
        problem = f"{name} cannot be traced in train mode: {failure}"
    else:
        different = merge_modes(gm, trained, model)
        if different is None:
            return
        problem = f"{name} computes something else in train mode ({_export.location(model, different)})."
    warnings.warn(
        f"{problem} The graph does in both modes what the model does in eval mode. Make this part a module of its own "
        "and trace the rest, or train without it.",
        stacklevel=3,
    )


def _from_program(program: ExportedProgram, example_inputs: object) -> fx.GraphModule:
    held = program.example_inputs if example_inputs is None else example_inputs
    if held is None:
        raise TraceError("The ExportedProgram keeps no example inputs; give example_inputs.")
    gm = _export.unlift(program)
    _set_programs_mode(gm)
    _raise_programs_dropout(gm)
    inputs = _as_exported(normalize(held), gm)
    dynamic = any(
        isinstance(size, torch.SymInt)
        for node in gm.graph.find_nodes(op="placeholder")
        if isinstance(node.meta.get("val"), torch.Tensor)
        for size in node.meta["val"].shape[:1]
    )
    _raised(gm, gm)
    return _canonical(gm, gm, inputs, dynamic)


def _as_exported(inputs: ExampleInputs, gm: fx.GraphModule) -> ExampleInputs:
    """Inputs at the batch that the program was exported for, if that is fixed."""
    for node in gm.graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and value.dim() and isinstance(value.shape[0], int):
            return inputs.with_batch(value.shape[0])
    return inputs


def _raised(gm: fx.GraphModule, model: nn.Module) -> fx.GraphModule:
    """The unlifted program with the user's modules in it, edited in place."""
    inline_regions(gm)
    for node in list(gm.graph.nodes):
        if node.target in _ASSERTIONS and not node.users:
            gm.graph.erase_node(node)
    gm.graph.eliminate_dead_code()
    _compute_places(gm)
    for node in gm.graph.nodes:
        if node.target is _aten.item.default or _has_loose_shape(node):
            raise _export.data_dependent(model, node)
    _erase_batch_counters(gm)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        raise_modules(gm, model)
    gm.graph.eliminate_dead_code()
    return gm


def _compute_places(gm: fx.GraphModule) -> None:
    """Compute what depends on no input but is as large as some values say: the places of ones in a triangle, say."""
    fixed: set[fx.Node] = set()
    places = []
    for node in gm.graph.nodes:
        tags = node.target.tags if isinstance(node.target, torch._ops.OpOverload) else ()
        calls = node.op == "call_function" and torch.Tag.nondeterministic_seeded not in tags
        if calls and fixed.issuperset(node.all_input_nodes):
            fixed.add(node)
            if torch.Tag.dynamic_output_shape in tags:
                places.append(node)
    for node in places:
        held = insert_get_attr(gm, free_path(gm, "places"), _computed(node))
        held.meta = dict(node.meta)
        node.replace_all_uses_with(held)
        gm.graph.erase_node(node)
    gm.graph.eliminate_dead_code()


def _computed(node: fx.Node) -> Any:
    """The value of a node that depends on no input."""
    args, kwargs = fx.map_arg((node.args, node.kwargs), _computed)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _has_loose_shape(node: fx.Node) -> bool:
    """Whether a result is as large as the values in some tensor say."""
    return any(
        isinstance(value, torch.Tensor) and free_unbacked_symbols(value)
        for value in pytree.tree_leaves(node.meta.get("val"))
    )


def _canonical(gm: fx.GraphModule, model: nn.Module, inputs: ExampleInputs, dynamic: bool) -> fx.GraphModule:
    functionalize(gm)
    decompose(gm)
    _adopt_state(gm, model)
    gm.meta = {TRACE_META: {"batch": inputs.batch, "dynamic_batch": dynamic}}
    _set_example_values(gm, inputs)
    try:
        finish(gm)
        verify(gm)
    except VerifyError as failure:
        raise _export.not_canonical(model, gm, failure) from failure
    if inputs.batch and not dynamic:
        gm.register_forward_pre_hook(_FixedBatch(inputs), with_kwargs=True)
    return gm


class _FixedBatch:
    """Refuses other batch sizes than the one that is written into a graph, which would give wrong numbers silently."""

    def __init__(self, inputs: ExampleInputs) -> None:
        self.batch = inputs.batch
        self.batched = [inputs.is_batched(tensor) for tensor in inputs.tensors()]

    def __call__(self, module: nn.Module, args: object, kwargs: object) -> None:
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        for tensor, batched in zip(tensors, self.batched, strict=False):
            if batched and tensor.dim() and tensor.shape[0] != self.batch:
                raise TraceError(
                    f"This graph was traced at a batch of {self.batch}, which the model's code fixes (a loop over the "
                    f"samples, for one), and got {tensor.shape[0]} samples. Give {self.batch} at a time, trace again "
                    "with as many as you need, or write the model in operations on the whole batch."
                )


def _erase_batch_counters(gm: fx.GraphModule) -> None:
    """Batch norm counts its batches itself once it is a module again."""
    for node in reversed(gm.graph.find_nodes(op="call_function", target=_aten.add_.Tensor)):
        source = node.args[0]
        while isinstance(source, fx.Node) and source.target is _aten.add_.Tensor:
            source = source.args[0]
        counts = isinstance(source, fx.Node) and source.op == "get_attr"
        if counts and not node.users and str(source.target).endswith("num_batches_tracked"):
            gm.graph.erase_node(node)


def _set_programs_mode(gm: fx.GraphModule) -> None:
    """Put modules in the mode that the program's calls were exported in: train mode if any call says so."""
    training = False
    norms: dict[str, bool] = {}
    for node in gm.graph.nodes:
        said = ops.arguments(node)
        active = bool(said.get("train", said.get("training", False)))
        training = training or active
        if node.target is _aten.batch_norm.default and isinstance(said["running_mean"], fx.Node):
            norms[str(said["running_mean"].target).rpartition(".")[0]] = active
    gm.train(training)
    for path, active in norms.items():
        gm.get_submodule(path).training = active


def _raise_programs_dropout(gm: fx.GraphModule) -> None:
    """A program exported in train mode has lost its dropout layers; make them anew where they were."""
    for node in gm.graph.find_nodes(op="call_function", target=_aten.dropout.default):
        source, rate, active = node.args
        stack = node.meta.get("nn_module_stack")
        path, owner = list(stack.values())[-1] if stack else ("", "")
        path = str(path).split("@")[0]
        if not path or "torch.nn.modules.dropout.Dropout" not in str(owner) or not isinstance(source, fx.Node):
            continue
        if path not in dict(gm.named_modules()):
            gm.add_submodule(path, nn.Dropout(float(rate)).train(bool(active)))
        with gm.graph.inserting_before(node):
            raised = gm.graph.call_module(path, (source,))
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
