"""The forms that a quantized graph can be written in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeAlias

from torch import fx

from fxopt.errors import ExportError
from fxopt.export._qdq import least_opset, to_qdq
from fxopt.export._qonnx import expanded, to_qonnx
from fxopt.export._rewriter import Rewritten
from fxopt.export._torch_onnx import Marked, with_baked_weights
from fxopt.graph.fake_quantize import ActivationQuantizer, CodebookQuantizer, WeightQuantizer

if TYPE_CHECKING:
    import onnx

__all__ = ["DEFAULT_OPSET", "FORMS", "IR_VERSIONS", "Form", "Format", "check_opset", "form_of", "opset_for", "prepared"]

Format: TypeAlias = Literal["qdq", "qdq-native", "qonnx", "float"]

IR_VERSIONS = {18: 8, 19: 9, 20: 9, 21: 10, 22: 10, 23: 11, 24: 11, 25: 13}
"""The opsets on offer, and the ONNX file version that each came with: newer ones are refused by older runtimes."""

DEFAULT_OPSET = 21


@dataclass(frozen=True)
class Form:
    """How a graph is written, and how the file is run to prove it.

    Attributes:
        rewrite: From a model with markers to the form, in place.
        native: Whether grids are packed into the narrowest integers.
        baked: Whether weights are written as the floats that they are held to, and activations left alone.
        runnable: From the model in this form to one that onnxruntime can run.
        runs: Whether onnxruntime runs the file itself, so that its kernels and its time say something.
        settings: Session settings under which onnxruntime computes what the file says.
    """

    rewrite: Callable[[Marked, int], Rewritten]
    native: bool = False
    baked: bool = False
    runnable: Callable[[onnx.ModelProto], onnx.ModelProto] = field(default=lambda model: model)
    runs: bool = True
    settings: Mapping[str, str] = field(default_factory=dict)


FORMS: Mapping[Format, Form] = {
    # Products of floats with integer weights round activations to 8 bits, unless told to be exact.
    "qdq": Form(
        lambda marked, opset: to_qdq(marked, native=False, opset=opset),
        settings={"session.qdq_matmulnbits_accuracy_level": "1"},
    ),
    # onnxruntime has no kernels for most pairs of narrow types, and fails where it takes them for 8 bits.
    "qdq-native": Form(
        lambda marked, opset: to_qdq(marked, native=True, opset=opset),
        native=True,
        settings={"session.disable_quant_qdq": "1"},
    ),
    "qonnx": Form(lambda marked, _: to_qonnx(marked), runnable=expanded, runs=False),
    "float": Form(lambda marked, opset: to_qdq(marked, native=False, opset=opset), baked=True),
}
"""What each form is for: ``qdq`` for onnxruntime's integer kernels; ``qdq-native`` for small files and runtimes with
types narrower than 8 bits; ``qonnx`` for FPGA flows; ``float`` for anything that runs ONNX."""


def form_of(name: str) -> Form:
    """The form of this name.

    Raises:
        ExportError: If there is none.
    """
    for known, form in FORMS.items():
        if known == name:
            return form
    raise ExportError(f"Unknown format {name!r}; choose one of {', '.join(map(repr, FORMS))}.")


def check_opset(asked: int | None) -> None:
    """The opset is on offer.

    Raises:
        ExportError: If it is not.
    """
    if asked is not None and asked not in IR_VERSIONS:
        raise ExportError(f"Opset {asked!r} is not on offer; choose one of {', '.join(map(str, IR_VERSIONS))}.")


def opset_for(graph: fx.GraphModule, form: Form, asked: int | None) -> int:
    """The opset to write: the one asked for, or the default one unless the types in the file need a later one.

    Raises:
        ExportError: If the one asked for has not the types.
    """
    kinds = (ActivationQuantizer, WeightQuantizer, CodebookQuantizer)
    bits = {module.bits for module in graph.modules() if isinstance(module, kinds)}
    least = 0 if form.baked else least_opset(bits, native=form.native)
    if asked is None:
        return max(DEFAULT_OPSET, least)
    if asked < least:
        raise ExportError(
            f"Integers of {min(bits)} bits are packed from opset {least} on, {asked} has none; leave opset out."
        )
    return asked


def prepared(graph: fx.GraphModule, form: Form) -> fx.GraphModule:
    """The graph as the form writes it."""
    return with_baked_weights(graph) if form.baked else graph
