"""The one place that calls torch.onnx: a graph becomes a float ONNX model, its quantizers marker nodes.

Every quantizer is exported as a node ``fxopt::Marker`` with the quantizer's path. The exporter knows nothing of the
domain, so neither its decompositions nor its constant folding look into or across a marker.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from numpy.typing import NDArray
from torch import fx, nn
from torch.export import Dim
from torch.utils import _pytree as pytree

from fxopt.errors import ExportError
from fxopt.graph import ExampleInputs, edit, eval_mode
from fxopt.graph.fake_quantize import ActivationQuantizer, CodebookQuantizer, QuantizedLayer, WeightQuantizer
from fxopt.graph.shapes import TRACE_META

if TYPE_CHECKING:
    import onnx

__all__ = [
    "MARKER",
    "MARKER_DOMAIN",
    "Marked",
    "export_marked",
    "input_names",
    "output_names",
    "with_baked_weights",
    "with_parameters",
]

MARKER, MARKER_DOMAIN = "Marker", "fxopt"
BATCH_NAME = "batch"

_NEWEST_EXPORTED = 23
"""The newest opset that torch.onnx writes. Later ones have added types to the operators that it uses, nothing else."""

Quantizers = dict[str, ActivationQuantizer | WeightQuantizer]


@dataclass(frozen=True)
class Marked:
    """A float ONNX model with markers.

    Attributes:
        model: The model.
        quantizers: The quantizer of each marker, by the marker's site.
        codebooks: The codebook that each such weight was written out of, by the weight's name.
    """

    model: onnx.ModelProto
    quantizers: Quantizers
    codebooks: Mapping[str, CodebookQuantizer]


class _Mark(nn.Module):
    """Stands in for the quantizer ``site``, called under ``path``: one quantizer may stand at several paths."""

    def __init__(self, site: str, path: str) -> None:
        super().__init__()
        self.attributes: dict[str, Any] = {"site": site, "path": path}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.onnx.ops.symbolic(
            f"{MARKER_DOMAIN}::{MARKER}", (x,), self.attributes, dtype=x.dtype, shape=x.shape, version=1
        )


def export_marked(gm: fx.GraphModule, inputs: ExampleInputs, opset: int) -> Marked:
    """Export a graph in evaluation mode, markers in the place of its quantizers.

    Args:
        gm: A canonical graph; not changed.
        inputs: Example inputs at the batch that the graph was traced with.
        opset: ONNX opset.

    Raises:
        ExportError: If torch.onnx cannot export the graph.
    """
    marked, quantizers, codebooks = _mark(gm)
    dynamic = bool(gm.meta.get(TRACE_META, {}).get("dynamic_batch"))
    leaves = inputs.leaves()
    spec = None
    if dynamic:
        args, kwargs = pytree.tree_map(
            lambda leaf: {0: Dim.DYNAMIC} if inputs.is_batched(leaf) else None, (inputs.args, inputs.kwargs)
        )
        spec = _by_name(gm, args, kwargs)
    with _quiet(), eval_mode(marked):
        try:
            program = torch.onnx.export(
                marked,
                inputs.args,
                kwargs=inputs.kwargs or None,
                dynamo=True,
                verbose=False,
                opset_version=min(opset, _NEWEST_EXPORTED),
                dynamic_shapes=spec,
            )
        except Exception as failure:
            raise ExportError(f"torch.onnx cannot export the graph: {_reason(failure)}") from failure
    if program is None:
        raise ExportError("torch.onnx gave no model; use torch >= 2.9.")
    model = program.model_proto
    for entry in model.opset_import:
        if not entry.domain:
            entry.version = opset
    _name_ends(model, input_names(gm, leaves), output_names(gm))
    _name_batch(model, dynamic)
    return Marked(model, quantizers, codebooks)


def with_baked_weights(gm: fx.GraphModule) -> fx.GraphModule:
    """The same graph in floats: weights as their grids hold them, activations as they come.

    The graph itself if it has no quantizers; else other parameters are shared with it.
    """
    if not any(isinstance(module, (ActivationQuantizer, QuantizedLayer)) for module in gm.modules()):
        return gm
    plain = _copy(gm)
    for path, module in list(plain.named_modules(remove_duplicate=False)):
        if isinstance(module, ActivationQuantizer):
            edit.replace_module(plain, path, nn.Identity())
        elif isinstance(module, QuantizedLayer):
            layer = module.to_float()
            with torch.no_grad():
                layer._parameters["weight"] = nn.Parameter(module.weight_quantizer(module.weight))
            edit.replace_module(plain, path, layer)
    for node in plain.graph.find_nodes(op="call_module"):
        if isinstance(plain.get_submodule(str(node.target)), nn.Identity):
            node.replace_all_uses_with(node.args[0])
    plain.graph.eliminate_dead_code()
    plain.recompile()
    return plain


def with_parameters(gm: fx.GraphModule, values: Mapping[str, NDArray[Any]]) -> fx.GraphModule:
    """The same graph with other values of some parameters; the others are shared with it."""
    twin = _copy(gm)
    for name, array in values.items():
        path, _, own = name.rpartition(".")
        module = edit.clone_module(twin.get_submodule(path))
        module._parameters[own] = nn.Parameter(torch.from_numpy(array), requires_grad=False)
        edit.replace_module(twin, path, module)
    return twin


def input_names(gm: fx.GraphModule, leaves: list[Any]) -> list[str]:
    """Names of the tensor inputs: those of the model's own arguments."""
    nodes = gm.graph.find_nodes(op="placeholder")
    return [str(node.target) for node, leaf in zip(nodes, leaves, strict=True) if isinstance(leaf, torch.Tensor)]


def output_names(gm: fx.GraphModule) -> list[str]:
    """Names of the tensor outputs, from the keys of the model's own result; "output" if there is but one tensor."""
    nodes = pytree.tree_leaves(next(iter(gm.graph.find_nodes(op="output"))).args[0])
    info = getattr(gm.graph._codegen, "pytree_info", None)
    if info is None or info.out_spec is None:
        names = ["output"] if len(nodes) == 1 else [f"output_{index}" for index in range(len(nodes))]
    else:
        tree = pytree.tree_unflatten(list(range(len(nodes))), info.out_spec)
        names = [_key_name(path) for path, _ in pytree.tree_flatten_with_path(tree)[0]]
    tensors = [name for name, node in zip(names, nodes, strict=True) if isinstance(node, fx.Node)]
    return _distinct(tensors, taken=input_names(gm, [node.meta.get("val") for node in _placeholders(gm)]))


def _placeholders(gm: fx.GraphModule) -> list[fx.Node]:
    return list(gm.graph.find_nodes(op="placeholder"))


def _key_name(path: tuple[Any, ...]) -> str:
    parts = [
        re.sub(r"\W+", "_", str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key))))) for key in path
    ]
    if not parts:
        return "output"
    return f"output_{'_'.join(parts)}" if parts[0].isdigit() else "_".join(parts)


def _distinct(names: list[str], taken: list[str]) -> list[str]:
    used, found = set(taken), []
    for name in names:
        free = name if name not in used else f"{name}_output"
        while free in used:
            free += "_"
        used.add(free)
        found.append(free)
    return found


def _copy(gm: fx.GraphModule) -> fx.GraphModule:
    """A graph of its own on the same modules; containers are new."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = copy.deepcopy(gm.graph)
    twin = fx.GraphModule(gm, graph)
    twin.meta = dict(gm.meta)
    return twin


def _mark(gm: fx.GraphModule) -> tuple[fx.GraphModule, Quantizers, dict[str, CodebookQuantizer]]:
    marked = _copy(gm)
    _separate_views(marked)
    quantizers: Quantizers = {}
    codebooks: dict[str, CodebookQuantizer] = {}
    sites: dict[int, str] = {}
    for path, module in list(marked.named_modules(remove_duplicate=False)):
        if isinstance(module, ActivationQuantizer):
            site = sites.setdefault(id(module), path)
            quantizers[site] = module
            edit.replace_module(marked, path, _Mark(site, path))
        elif isinstance(module, QuantizedLayer):
            quantizer = module.weight_quantizer
            if isinstance(quantizer, CodebookQuantizer):
                codebooks[f"{path}.weight"] = quantizer
                edit.replace_module(marked, path, module.baked())
                continue
            layer = edit.clone_module(module)
            site = f"{path}.weight_quantizer"
            layer._modules["weight_quantizer"] = _Mark(site, site)
            quantizers[site] = quantizer
            edit.replace_module(marked, path, layer)
    return marked, quantizers, codebooks


def _separate_views(gm: fx.GraphModule) -> None:
    """Let no view depend on strides: torch.onnx spells attention out, whose result then has others than in the trace.

    A copy ahead of a view is one to torch.export alone; the file has none.
    """
    aten = torch.ops.aten
    attention = aten.scaled_dot_product_attention.default
    if not gm.graph.find_nodes(op="call_function", target=attention):
        return
    for target in (aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints):
        for node in gm.graph.find_nodes(op="call_function", target=target):
            source: Any = node.args[0]
            with gm.graph.inserting_before(node):
                options: dict[str, Any] = {"memory_format": torch.contiguous_format}
                copied = gm.graph.call_function(aten.clone.default, (source,), options)
            copied.meta = dict(source.meta)
            node.update_arg(0, copied)
    gm.recompile()


def _by_name(gm: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if not kwargs:
        return args
    info = gm.graph._codegen.pytree_info  # type: ignore[attr-defined]
    return {**dict(zip(info.orig_args, args, strict=False)), **kwargs}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Nothing printed, logged below an error, or warned: torch.onnx tells of packages that are not needed."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "torch.export")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _reason(failure: BaseException) -> str:
    cause: BaseException = failure
    while cause.__cause__ is not None:
        cause = cause.__cause__
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return lines[0] if lines else type(cause).__name__


def _name_ends(model: onnx.ModelProto, inputs: list[str], outputs: list[str]) -> None:
    """Give the model's inputs and outputs readable names."""
    graph = model.graph
    if len(graph.input) != len(inputs) or len(graph.output) != len(outputs):
        raise ExportError(
            f"torch.onnx gave {len(graph.input)} inputs and {len(graph.output)} outputs for a graph with {len(inputs)} "
            f"and {len(outputs)}; return tensors alone, each of them once."
        )
    old = [value.name for value in (*graph.input, *graph.output)]
    if len(set(old)) != len(old):
        raise ExportError("An output of the model is an input or another output itself; return a copy of it.")
    wanted = dict(zip(old, [*inputs, *outputs], strict=True))
    names = {name for node in graph.node for name in (*node.input, *node.output)}
    names |= {tensor.name for tensor in graph.initializer}
    moved = {name: f"{name}_inner" for name in wanted.values() if name in names and name not in wanted}
    rename_values(model, moved | wanted)


def rename_values(model: onnx.ModelProto, renamed: dict[str, str]) -> None:
    """Rename tensors wherever they are named."""
    graph = model.graph
    for node in graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
        node.output[:] = [renamed.get(name, name) for name in node.output]
    for value in (*graph.input, *graph.output, *graph.value_info):
        value.name = renamed.get(value.name, value.name)
    for tensor in graph.initializer:
        tensor.name = renamed.get(tensor.name, tensor.name)


def _name_batch(model: onnx.ModelProto, dynamic: bool) -> None:
    """Call the batch dimension "batch", and drop what the exporter noted of the source code."""
    graph = model.graph
    symbols: dict[str, str] = {}
    if dynamic:
        for value in graph.input:
            dimensions = value.type.tensor_type.shape.dim
            if dimensions and dimensions[0].dim_param:
                symbols[dimensions[0].dim_param] = BATCH_NAME
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param:
                dimension.dim_param = _substitute(dimension.dim_param, symbols)
        del value.metadata_props[:]
    for node in graph.node:
        del node.metadata_props[:]
    del graph.metadata_props[:]
    del model.metadata_props[:]
    model.graph.name = "fxopt"
    model.producer_name = "fxopt"
    model.producer_version = ""


def _substitute(expression: str, symbols: dict[str, str]) -> str:
    for symbol, name in symbols.items():
        expression = re.sub(rf"\b{re.escape(symbol)}\b", name, expression)
    return expression
