"""export_onnx: a graph becomes an ONNX file that was loaded, run and compared."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import fx, nn
from torch.nn.modules.conv import _ConvNd

from fxopt._files import replacing
from fxopt.decisions import format_quantity
from fxopt.errors import ExportError
from fxopt.export._clock import interleave, runner
from fxopt.export._forms import IR_VERSIONS, Form, Format, check_opset, form_of, opset_for, prepared
from fxopt.export._kernels import Kernel, kernels_of
from fxopt.export._layers import ExportedLayer, layers_in, sites_in
from fxopt.export._parity import check_integers, compare, random_like
from fxopt.export._rewriter import Rewritten
from fxopt.export._runtime import has_integer_instructions, optimized
from fxopt.export._torch_onnx import export_marked, with_parameters
from fxopt.graph import ExampleInputs, normalize, trace
from fxopt.graph.fake_quantize import QuantizedLayer
from fxopt.graph.shapes import TRACE_META
from fxopt.passes.quantize import CALIBRATION_META

if TYPE_CHECKING:
    import onnx

__all__ = ["ExportReport", "export_onnx"]

_MAX_BYTES = 2**31 - 2**20
"""A single ONNX file ends at 2 GiB."""

_OTHER_BATCH = 3
_RUNS = 15
_MUCH = 0.05


@dataclass(frozen=True)
class ExportReport:
    """What was written and how it was checked.

    Attributes:
        path: The file.
        format: "qdq", "qdq-native", "qonnx" or "float".
        opset: ONNX opset.
        file_bytes: Size of the file.
        batches: Batch sizes that file and graph were compared at; empty if not checked.
        max_abs_diff: Largest absolute difference of an output from the model's, what rounded biases change included, or
            None if not checked; so for all that follow.
        mean_abs_diff: Largest mean absolute difference of an output.
        relative: Largest absolute difference over the largest magnitude of the same output.
        top1_agreement: Part of the positions where the best class (dimension 1) agrees; None without classes.
        integers_differing: Part of all integers in the file that lie a step beside the graph's, each computed from the
            same integers before it; None without quantizers.
        integer_nodes: Nodes that compute on integers in onnxruntime's optimized graph.
        float_nodes: Nodes that compute on floats there; conversions and moves are not counted.
        operators: How often each operator stands in that graph.
        kernels: The nodes that compute there, in order; none for "qonnx".
        layers: Convolutions and linear layers: bits, bytes in the file, and the kernel.
        latency_s: Median time of a batch of one in onnxruntime on this machine, with one thread, processor time. None
            for "qonnx", which onnxruntime has no kernels for.
        accuracy: Accuracy of the file in onnxruntime, where validation data was given to judge it by.
        notes: What a reader should know: synthetic calibration, a CPU without 8-bit instructions.
    """

    path: Path
    format: str
    opset: int
    file_bytes: int
    batches: tuple[int, ...] = ()
    max_abs_diff: float | None = None
    mean_abs_diff: float | None = None
    relative: float | None = None
    top1_agreement: float | None = None
    integers_differing: float | None = None
    integer_nodes: int | None = None
    float_nodes: int | None = None
    operators: tuple[tuple[str, int], ...] = ()
    kernels: tuple[Kernel, ...] = ()
    layers: tuple[ExportedLayer, ...] = ()
    latency_s: float | None = None
    accuracy: float | None = None
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """The file and its proof in a line; the attributes have every layer and kernel."""
        parts = [f"{self.path} ({format_quantity('size', self.file_bytes)}, opset {self.opset})"]
        if self.max_abs_diff is None:
            parts.append("not compared with the graph")
        else:
            parts.append(f"ran in onnxruntime, largest difference {self.max_abs_diff:.2g}")
        if self.top1_agreement is not None:
            parts.append(f"same class for {self.top1_agreement:.1%} of the compared outputs")
        if self.accuracy is not None:
            parts.append(f"accuracy {self.accuracy:.2%}")
        if self.integer_nodes is not None and self.kernels:
            parts.append(f"{self.integer_nodes} of {len(self.kernels)} nodes compute on integers")
        if self.latency_s is not None:
            parts.append(f"{format_quantity('latency', self.latency_s)} at a batch of one on this machine")
        return "; ".join(parts)


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: object,
    *,
    format: Format = "qdq",  # noqa: A002
    opset: int | None = None,
    check: bool = True,
) -> ExportReport:
    """Write a model to an ONNX file, and prove it in onnxruntime before it gets its name.

    A model without quantized layers is written in floating point. Initializers keep the names of the parameters, the
    batch dimension is called "batch". Quantized layers are written in one of these forms:

    - ``"qdq"``: integer initializers with DequantizeLinear, activations as QuantizeLinear and DequantizeLinear pairs,
      by which onnxruntime selects integer kernels. Grids of fewer than 8 bits keep their steps in 8-bit integers, but
      for linear layers whose weights alone are quantized: those of up to 4 bits are packed, for onnxruntime has a
      kernel.
    - ``"qdq-native"``: the same in the narrowest integers that ONNX has: 2, 4 or 8 bits, packed. For runtimes that have
      such types, and as small as it gets. onnxruntime loads it with ``session.disable_quant_qdq=1``, and computes in
      floats.
    - ``"qonnx"``: Quant and BipolarQuant nodes, for FPGA flows. Files hold floats.
    - ``"float"``: weights as the floats that their grids hold, activations in floats.

    Args:
        model: A graph from ``fxopt.trace`` or a pass, or any module, which is traced first. On the CPU.
        path: The file; what stands there is replaced only by a file that passed all checks.
        example_inputs: As for ``fxopt.trace``; the file is compared with the graph on them.
        format: The form; see above.
        opset: ONNX opset, 18 to 25. None is 21, or 25 if integers of 2 bits are packed.
        check: Whether to load and run the file in onnxruntime and compare it with the graph, on the example and on
            random inputs at another batch size, and to take its time. ``onnx.checker`` runs in any case.

    Returns:
        The report.

    Raises:
        TraceError: If a plain module cannot be traced.
        ExportError: If the model cannot be exported, or the file not be written or loaded.
        ParityError: If the file computes something else than the graph; nothing is left under ``path``.
    """
    form = form_of(format)
    check_opset(opset)
    gm = model if isinstance(model, fx.GraphModule) and TRACE_META in model.meta else trace(model, example_inputs)
    inputs = normalize(example_inputs)
    _check_graph(gm, inputs)
    check_types(gm, run=check)
    graph = prepared(gm, form)
    version = opset_for(graph, form, opset)
    marked = export_marked(graph, _at_traced_batch(gm, inputs), version)
    made = form.rewrite(marked, version)
    proto = marked.model
    proto.ir_version = IR_VERSIONS[version]
    final = Path(path)
    with replacing(final, ExportError) as scratch:
        _write(proto, scratch)
        file_bytes = scratch.stat().st_size
        checked = _checked(graph, proto, made, form, inputs) if check else {}
        if check and form.runs:
            checked["latency_s"] = _latency(scratch, _at_traced_batch(gm, inputs), form)
    quantized = any(isinstance(module, QuantizedLayer) for module in gm.modules())
    layers = layers_in(gm, proto, checked.get("kernels"), baked=form.baked)
    notes = (*_notes(gm, form, quantized), *_apart(checked, rounded=bool(made.rounded)))
    return ExportReport(final, format, version, file_bytes, layers=layers, notes=notes, **checked)


def _latency(file: Path, inputs: ExampleInputs, form: Form) -> float:
    run = runner(file, (inputs.args, inputs.kwargs), 1, 1, form.settings if form.native else None)
    return float(np.median(interleave([run], _RUNS, time.thread_time)))


def check_types(model: nn.Module, *, run: bool = True) -> None:
    """Refuse a model that is known to end in a file that onnxruntime cannot run, by the types of its tensors.

    Args:
        model: The model, before or after it is traced.
        run: Whether the file is run; where it is not, it may hold convolutions in double precision.

    Raises:
        ExportError: Naming the type.
    """
    if any(tensor.dtype is torch.bfloat16 for tensor in (*model.parameters(), *model.buffers())):
        raise ExportError("The model is in bfloat16, which onnxruntime does not compute in; convert it with .float().")
    layers = (one for one in model.modules() if isinstance(one, _ConvNd))
    if run and any(layer.weight.dtype is torch.float64 for layer in layers):
        raise ExportError(
            "The model has convolutions in float64, which onnxruntime has no kernel for; convert it with .float()."
        )


def _check_graph(gm: fx.GraphModule, inputs: ExampleInputs) -> None:
    tensors = [*gm.parameters(), *gm.buffers()]
    elsewhere = {str(tensor.device) for tensor in tensors if tensor.device.type != "cpu"}
    if elsewhere:
        raise ExportError(f"The model is on {', '.join(sorted(elsewhere))}; move it with .cpu() before the export.")
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    if size > _MAX_BYTES:
        raise ExportError(
            f"The model holds {size / 1e9:.2f} GB and a single ONNX file at most 2.1 GB. "
            "Export its parts, or prune it first."
        )
    wanted, given = len(gm.graph.find_nodes(op="placeholder")), len(inputs.leaves())
    if wanted != given:
        raise ExportError(f"example_inputs holds {given} values; the graph was traced with {wanted}.")


def _at_traced_batch(gm: fx.GraphModule, inputs: ExampleInputs) -> ExampleInputs:
    traced = gm.meta.get(TRACE_META, {})
    return inputs if traced.get("dynamic_batch") else inputs.with_batch(traced.get("batch", inputs.batch))


def _write(proto: onnx.ModelProto, scratch: Path) -> None:
    import onnx

    try:
        onnx.checker.check_model(proto)
        scratch.write_bytes(proto.SerializeToString())
    except onnx.checker.ValidationError as failure:
        raise ExportError(f"The exported model is not valid ONNX: {failure}") from failure
    except ValueError as failure:
        raise ExportError(f"The exported model cannot be stored in one file: {failure}") from failure


def _checked(
    given: fx.GraphModule, proto: onnx.ModelProto, made: Rewritten, form: Form, inputs: ExampleInputs
) -> dict[str, Any]:
    """Run the file beside its graph; what the report tells of it."""
    gm = with_parameters(given, made.rounded)
    example = _at_traced_batch(gm, inputs)
    trials = [example]
    if gm.meta.get(TRACE_META, {}).get("dynamic_batch"):
        trials.append(random_like(inputs, _OTHER_BATCH if example.batch != _OTHER_BATCH else _OTHER_BATCH + 1))
    else:
        trials.append(random_like(example, example.batch))
    quantized = any(isinstance(module, QuantizedLayer) for module in gm.modules())
    runnable = form.runnable(proto)
    stepped = check_integers(gm, runnable, made.held, example, form.settings) if made.held else None
    packed = runnable.SerializeToString()
    difference = compare(
        gm, packed, trials, quantized=quantized, settings=form.settings, given=given if made.rounded else None
    )
    running = optimized(packed, form.settings if form.native else None)
    operators = Counter(node.op_type for node in running.graph.node)
    kernels = kernels_of(runnable, running, sites_in(gm))
    return {
        "batches": tuple(trial.batch for trial in trials),
        "max_abs_diff": difference.max_abs,
        "mean_abs_diff": difference.mean_abs,
        "relative": difference.relative,
        "top1_agreement": difference.top1_agreement,
        "integers_differing": stepped,
        "integer_nodes": sum(kernel.integer for kernel in kernels),
        "float_nodes": sum(not kernel.integer for kernel in kernels),
        "operators": tuple(sorted(operators.items())),
        "kernels": kernels if form.runs else (),
    }


def _apart(checked: Mapping[str, Any], *, rounded: bool) -> Iterator[str]:
    """What rounding does to the outputs, where it is much."""
    if checked.get("relative", 0.0) > _MUCH:
        biases = "biases are rounded to the integers that kernels add, and " if rounded else ""
        yield (
            f"Outputs of the file are up to {checked['relative']:.0%} of the largest one away from the model's: "
            f"{biases}sums are added in another order, and this network carries on what that changes. Judge accuracy "
            "by the file."
        )


def _notes(gm: fx.GraphModule, form: Form, quantized: bool) -> tuple[str, ...]:
    notes = []
    if quantized and form.native:
        notes.append("onnxruntime runs this file in floats, with the session setting session.disable_quant_qdq=1.")
    source = gm.meta.get(CALIBRATION_META, {}).get("source", "")
    if quantized and source.startswith("synthetic"):
        notes.append(f"Calibrated on synthetic data ({source}): judge speed and size by this file, not accuracy.")
    if quantized and not (form.native or form.baked) and not has_integer_instructions():
        notes.append(
            "This CPU has no 8-bit dot product instructions; integer kernels may be no faster than float ones."
        )
    return tuple(notes)
