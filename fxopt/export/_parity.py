"""Does a file compute what its graph computes? Compared in onnxruntime, with tolerances that are stated.

Float files: every output within :data:`FLOAT_TOLERANCE` of the largest magnitude of that output, or within
:data:`FLOAT_STEPS` steps of the coarsest float type that the graph computes in, if that is more: in half precision.

Quantized files are compared twice.

*Integer by integer.* The integers behind every quantizer come out of the file; the graph runs beside, and after each
comparison goes on from the file's integers, so that no difference is carried along. File and graph add and round in
different orders, so a value near the middle of two steps may land one step apart: :data:`LARGEST_STEP` is allowed, for
at most :data:`STEPPED_PART` of a tensor's values. The outputs then agree as in a float file.

*From end to end.* One step apart in an early layer is carried on by all later ones, in some networks to the size of the
quantization noise itself. How far is measured: the graph runs once more with every value nudged by up to
:data:`NUDGE_STEPS` of a step before it is rounded, and the outputs of the file may be no further away than
:data:`NUDGE_FACTOR` times what that moves them, and :data:`FLOOR_STEPS` 255ths of the output's range.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx
from torch.utils import _pytree as pytree

from fxopt.errors import ExportError, ParityError
from fxopt.export._runtime import exact_integers, make_session
from fxopt.graph import ExampleInputs, eval_mode
from fxopt.graph.fake_quantize import ActivationQuantizer

if TYPE_CHECKING:
    import onnx

__all__ = ["Difference", "check_integers", "compare", "random_like", "run_graph"]

FLOAT_TOLERANCE = 1e-3
FLOAT_STEPS = 16
"""Half a step to 5 steps of float16 is what a dozen networks in half precision are away from themselves in float32."""
LARGEST_STEP = 1
STEPPED_PART = 0.02
NUDGE_STEPS = 0.01
NUDGE_FACTOR = 4.0
FLOOR_STEPS = 1.0

Array = NDArray[Any]


@dataclass(frozen=True)
class Difference:
    """How far apart a file and its graph are, over all outputs and inputs compared.

    Attributes:
        max_abs: Largest absolute difference.
        mean_abs: Largest mean absolute difference of an output.
        relative: Largest absolute difference over the largest magnitude of the same output.
        top1_agreement: Part of the positions where the best class is the same, or None if no output has classes.
        positions: How many of them there are.
    """

    max_abs: float
    mean_abs: float
    relative: float
    top1_agreement: float | None
    positions: int = 0


def random_like(inputs: ExampleInputs, batch: int, seed: int = 0) -> ExampleInputs:
    """Inputs of another batch size: normal numbers with the example's mean and deviation, or integers drawn from it."""
    generator = torch.Generator().manual_seed(seed)
    resized = inputs.with_batch(batch)

    def draw(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or not leaf.numel():
            return leaf
        if leaf.is_floating_point():
            noise = torch.randn(leaf.shape, generator=generator)
            deviation = leaf.float().std() if leaf.numel() > 1 else torch.tensor(1.0)
            return (noise * deviation + leaf.float().mean()).to(leaf.dtype)
        flat = leaf.reshape(-1)
        return flat[torch.randint(len(flat), leaf.shape, generator=generator)]

    args, kwargs = pytree.tree_map(draw, (resized.args, resized.kwargs))
    return ExampleInputs(args, kwargs, resized.batch)


def run_graph(gm: fx.GraphModule, inputs: ExampleInputs, interpreter: fx.Interpreter | None = None) -> list[Array]:
    """The tensor outputs of a graph in evaluation mode."""
    runner = interpreter or fx.Interpreter(gm)
    with torch.no_grad(), eval_mode(gm):
        result = runner.run(*inputs.leaves(), enable_io_processing=False)
    return [leaf.detach().numpy() for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]


def compare(
    gm: fx.GraphModule,
    model: str | bytes,
    trials: Sequence[ExampleInputs],
    *,
    quantized: bool,
    settings: Mapping[str, str] | None = None,
    given: fx.GraphModule | None = None,
) -> Difference:
    """Run a file and its graph on the same inputs, from end to end.

    Args:
        gm: The graph that the file was made from, with the biases that the file holds.
        model: The file, or a serialized model.
        trials: Inputs to compare on.
        quantized: Which tolerance holds.
        settings: Session settings.
        given: The graph with the biases from before they were rounded; None if none were. What the rounding does to the
            outputs is no fault of the file, but part of the difference that is told.

    Raises:
        ParityError: If they differ by more than the tolerance; says where and by how much.
        ExportError: If onnxruntime cannot load or run the file.
    """
    session = make_session(model, settings=exact_integers() | dict(settings or {}))
    names = [value.name for value in session.get_outputs()]
    tolerance = _tolerance(gm)
    found = []
    for trial in trials:
        expected = run_graph(gm, trial)
        actual = _run_session(session, trial)
        nudged = run_graph(gm, trial, _Nudged(gm)) if quantized else expected
        asked = expected if given is None else run_graph(given, trial)
        for name, one, other, moved, wanted in zip(names, expected, actual, nudged, asked, strict=True):
            where = f"output {name!r} at batch {trial.batch}"
            _check(one, other, where, tolerance, _allowed(one, moved) if quantized else None)
            found.append(_difference(wanted, other))
    agreements = [entry.top1_agreement for entry in found if entry.top1_agreement is not None]
    weights = [entry.positions for entry in found if entry.top1_agreement is not None]
    return Difference(
        max((entry.max_abs for entry in found), default=0.0),
        max((entry.mean_abs for entry in found), default=0.0),
        max((entry.relative for entry in found), default=0.0),
        float(np.average(agreements, weights=weights)) if agreements else None,
        sum(weights),
    )


def check_integers(
    gm: fx.GraphModule,
    model: onnx.ModelProto,
    held: Mapping[str, str],
    trial: ExampleInputs,
    settings: Mapping[str, str] | None = None,
) -> float:
    """Compare the integers behind every quantizer, each on the same integers before it.

    Args:
        gm: The graph that the model was made from.
        model: The model.
        held: The value behind each quantizer, floats on its grid, by the quantizer's path.
        trial: Inputs to compare on.
        settings: Session settings.

    Returns:
        The part of all integers that differ (by one step).

    Raises:
        ParityError: If the integers of a quantizer, or an output, differ by more than the tolerance; names it.
        ExportError: If onnxruntime cannot load or run the model.
    """
    from onnx import TensorProto, helper

    outputs = [value.name for value in model.graph.output]
    shown = type(model)()
    shown.CopyFrom(model)
    calls = [str(node.target) for node in gm.graph.find_nodes(op="call_module")]
    once = {path: name for path, name in held.items() if calls.count(path) == 1}
    extra = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in once.values() if name not in outputs
    ]
    shown.graph.output.extend(extra)
    session = make_session(shown.SerializeToString(), settings=exact_integers() | dict(settings or {}))
    values = dict(zip([value.name for value in session.get_outputs()], _run_session(session, trial), strict=True))
    forced = _Forced(gm, {path: values[name] for path, name in once.items()})
    expected = run_graph(gm, trial, forced)
    tolerance = _tolerance(gm)
    for name, one in zip(outputs, expected, strict=True):
        _check(one, values[name], f"output {name!r}, on equal integers before it", tolerance, None)
    return forced.stepped / max(forced.compared, 1)


class _Nudged(fx.Interpreter):
    """Moves every value by a small part of a step before it is rounded."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self._generator = torch.Generator().manual_seed(0)

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        quantizer = self.fetch_attr(str(target))
        if isinstance(quantizer, ActivationQuantizer):
            noise = torch.rand(args[0].shape, generator=self._generator).mul_(2.0).sub_(1.0)
            args = (args[0] + noise * (NUDGE_STEPS * quantizer.scale), *args[1:])
        return super().call_module(target, args, kwargs)


class _Forced(fx.Interpreter):
    """Goes on from the file's values behind each quantizer, once their integers were compared with its own."""

    def __init__(self, gm: fx.GraphModule, values: Mapping[str, Array]) -> None:
        super().__init__(gm)
        # What differs is said in full here; the interpreter would add the node's source code to it.
        self.extra_traceback = False
        self._values = values
        self.stepped = self.compared = 0

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        quantizer = self.fetch_attr(str(target))
        if target not in self._values or not isinstance(quantizer, ActivationQuantizer):
            return super().call_module(target, args, kwargs)
        steps = torch.from_numpy(self._values[str(target)]).to(torch.float64) / quantizer.scale.double()
        theirs = (steps.round() + quantizer.zero_point).to(torch.int32)
        ours = quantizer.integers(args[0]).to(torch.int32)
        if theirs.shape != ours.shape:
            raise ParityError(f"The file has shape {tuple(theirs.shape)} at {target!r}, the graph {tuple(ours.shape)}.")
        gap = (theirs - ours).abs()
        stepped, farthest = int((gap > 0).sum()), int(gap.max()) if gap.numel() else 0
        self.stepped, self.compared = self.stepped + stepped, self.compared + gap.numel()
        # A tensor of a few values may well have one of them near the middle of two steps.
        if farthest > LARGEST_STEP or stepped > max(math.ceil(STEPPED_PART * gap.numel()), 2):
            raise ParityError(
                f"The file does not compute what its graph computes: {stepped} of {gap.numel()} integers at {target!r} "
                f"differ, by up to {farthest} steps (allowed: {STEPPED_PART:.0%}, by {LARGEST_STEP})."
            )
        return (theirs - quantizer.zero_point).to(args[0].dtype) * quantizer.scale


def _run_session(session: Any, trial: ExampleInputs) -> list[Array]:
    tensors = [leaf.detach().numpy() for leaf in trial.leaves() if isinstance(leaf, torch.Tensor)]
    wanted = [value.name for value in session.get_inputs()]
    try:
        found = session.run(None, dict(zip(wanted, tensors, strict=True)))
    except Exception as failure:
        raise ExportError(f"onnxruntime cannot run the file at batch {trial.batch}: {failure}") from failure
    return [np.asarray(value) for value in found]


def _allowed(expected: Array, nudged: Array) -> tuple[float, float]:
    """Largest and mean absolute difference that rounding may cause at an output."""
    gap = np.abs(nudged.astype(np.float64) - expected.astype(np.float64))
    floor = FLOOR_STEPS * float(np.ptp(expected)) / 255.0 if expected.size else 0.0
    return (
        NUDGE_FACTOR * (float(gap.max(initial=0.0)) + floor),
        NUDGE_FACTOR * (float(gap.mean()) if gap.size else 0.0) + floor,
    )


def _tolerance(gm: fx.GraphModule) -> float:
    """The float tolerance, relative to an output's largest magnitude."""
    values = pytree.tree_leaves([node.meta.get("val") for node in gm.graph.nodes])
    steps = [torch.finfo(one.dtype).eps for one in values if isinstance(one, torch.Tensor) and one.is_floating_point()]
    return max(FLOAT_TOLERANCE, FLOAT_STEPS * max(steps, default=0.0))


def _check(expected: Array, actual: Array, where: str, tolerance: float, allowed: tuple[float, float] | None) -> None:
    """Compare one output; ``allowed`` holds its largest and mean difference, None stands for the float tolerance."""
    if expected.shape != actual.shape:
        raise ParityError(f"The file gives shape {actual.shape} for {where}, the graph {expected.shape}.")
    if not np.array_equal(np.isfinite(expected), np.isfinite(actual)):
        raise ParityError(f"The file and the graph have NaN or infinity at different places of {where}.")
    found = _difference(expected, actual)
    largest, mean, magnitude = found.max_abs, found.mean_abs, _magnitude(expected)
    # Outputs near zero throughout have no magnitude to compare with.
    limit = tolerance * max(magnitude, FLOAT_TOLERANCE)
    most, most_mean = (limit, limit) if allowed is None else (max(allowed[0], limit), max(allowed[1], limit))
    if largest > most or mean > most_mean:
        raise ParityError(
            f"The file does not compute what its graph computes: a difference of {largest:.3g} (mean {mean:.3g}) for "
            f"{where}, where {most:.3g} (mean {most_mean:.3g}) is allowed and the largest magnitude is {magnitude:.3g}."
        )


def _difference(expected: Array, actual: Array) -> Difference:
    """How far apart two outputs are, where both are finite."""
    one, other = expected.astype(np.float64), actual.astype(np.float64)
    valid = np.isfinite(one) & np.isfinite(other)
    gap = np.abs(np.where(valid, one, 0.0) - np.where(valid, other, 0.0))
    largest, mean, magnitude = float(gap.max(initial=0.0)), float(gap.mean()) if gap.size else 0.0, _magnitude(one)
    agreement = _agreement(one, other)
    positions = one.size // one.shape[1] if agreement is not None else 0
    return Difference(largest, mean, largest / magnitude if magnitude else largest, agreement, positions)


def _magnitude(values: Array) -> float:
    return float(np.abs(values[np.isfinite(values)]).max(initial=0.0))


def _agreement(one: Array, other: Array) -> float | None:
    if one.ndim < 2 or one.shape[1] < 2 or not one.size:
        return None
    return float(np.mean(one.argmax(axis=1) == other.argmax(axis=1)))
