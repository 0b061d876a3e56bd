"""``fxopt export``: a model, quantized on the way or as ``fxopt optimize`` left it, to a proved ONNX file."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxopt._cli.output import emit_json, show
from fxopt.errors import FxoptError

if TYPE_CHECKING:
    from torch import fx

    from fxopt.export import ExportReport

__all__ = ["export", "tell"]


def export(
    reference: str,
    out: Path,
    *,
    form: str,
    opset: int | None,
    saved: Path | None,
    bits: str | None,
    train: str | None,
    inputs: Sequence[str],
) -> ExportReport:
    """Export the model that ``reference`` names.

    Args:
        reference: ``MODULE:FUNCTION``.
        out: The file.
        form: The form of the file.
        opset: Its opset, or None.
        saved: A folder that ``fxopt optimize`` wrote for this model, or None for the model as it is.
        bits: Bits of weights and activations for all layers, such as ``8,8``; None for none.
        train: ``MODULE:FUNCTION`` that returns the loader to calibrate on, or None.
        inputs: Shapes of example inputs.

    Raises:
        FxoptError: On bad input; the message says what to do.
    """
    wanted = None if bits is None else _bits(bits)
    if saved is not None and wanted is not None:
        raise FxoptError("--saved has bits of its own; leave out --bits, or --saved to quantize the original.")
    if train is not None and wanted is None:
        raise FxoptError("--train is what bits are calibrated on; give --bits too, such as --bits 8,8.")
    from fxopt import api
    from fxopt._cli.loading import load_model
    from fxopt.export import export_onnx
    from fxopt.graph import trace

    model, example = load_model(reference, inputs)
    graph = trace(model.eval(), example) if saved is None else api.load(saved, model)
    if wanted is not None:
        graph = _quantized(graph, wanted, train)
    return export_onnx(graph, out, example, format=form, opset=opset)  # type: ignore[arg-type]


def tell(made: ExportReport, *, as_json: bool) -> None:
    """Print what was exported."""
    from fxopt._reporting import export_data
    from fxopt.report._text import export_tables

    data = export_data(made)
    if as_json:
        emit_json(data | {"path": str(made.path), "operators": dict(made.operators), "notes": list(made.notes)})
        return
    show(*export_tables(data), *made.notes)


def _bits(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+),(\d+)", text.replace(" ", ""))
    if found is None:
        raise FxoptError(f"--bits is {text!r}; give bits of weights and of activations, such as 8,8 or 4,32.")
    return int(found[1]), int(found[2])


def _quantized(graph: fx.GraphModule, bits: tuple[int, int], train: str | None) -> fx.GraphModule:
    """The graph with every layer that can be quantized at these bits."""
    from fxopt._cli.loading import call
    from fxopt.decisions import Policy
    from fxopt.passes import FoldBatchNorm, Quantize

    folded = FoldBatchNorm()(graph).graph_module
    space = Quantize().search_space(folded)
    if not len(space):
        raise FxoptError("The model has no layer that can be quantized; leave out --bits.")
    data: Any = None if train is None else call(train)
    made: fx.GraphModule = Quantize(Policy({one.key: bits for one in space}), calibration=data)(folded).graph_module
    return made
