"""``fxopt measure``: how long files and models take in onnxruntime here, beside what targets predict."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxopt._cli.output import table
from fxopt._files import MODEL, REPORT
from fxopt.decisions import format_quantity
from fxopt.errors import FxoptError
from fxopt.progress import Progress

if TYPE_CHECKING:
    from rich.table import Table
    from torch import nn

    from fxopt.targets import Target

__all__ = ["measure", "told"]

_ONNX = ".onnx"


def measure(
    names: Sequence[str],
    targets: Sequence[str],
    inputs: Sequence[str],
    show: Progress,
    *,
    batch: int,
    runs: int,
    threads: int,
) -> dict[str, Any]:
    """Measure everything that ``names`` say, in turn, and let the targets predict what is a model.

    Args:
        names: ONNX files, folders of saved results, or models.
        targets: Names of targets, or TOML files.
        inputs: Shapes of example inputs; by default those of the first model that brings some.
        show: Told how far measuring of a target is.
        batch: Samples in a batch.
        runs: Rounds.
        threads: Threads inside an operator.

    Returns:
        Times and predictions, as plain data.

    Raises:
        FxoptError: If something cannot be found, loaded or run; the message says which.
    """
    from fxopt import export
    from fxopt._cli.loading import parse_input
    from fxopt._host import load_target

    chosen = [load_target(name, show) for name in targets]
    found = [_found(name, inputs) for name in names]
    given: Any = tuple(parse_input(text) for text in inputs)
    example = given or next((example for _, example in found if example is not None), None)
    first, *peers = (thing for thing, _ in found)
    timed = export.measure(first, example, batch=batch, runs=runs, threads=threads, peers=peers)
    own = {"median_s": timed.median_s, "q25_s": timed.q25_s, "q75_s": timed.q75_s, "ratio": 1.0}
    times = [own, *({key: getattr(peer, key) for key in own} for peer in timed.peers)]
    models = [
        {"model": name, **time, "predicted_s": _predicted(thing, chosen, batch)}
        for name, time, (thing, _) in zip(names, times, found, strict=True)
    ]
    setting = {"batch": timed.batch, "threads": timed.threads, "runs": timed.runs, "clock": timed.clock}
    trust = [{"target": one.name, "status": one.status, "error": one.error} for one in chosen]
    return {"schema": 1, **setting, "models": models, "targets": trust}


def told(data: dict[str, Any]) -> list[Table | str]:
    """What was measured, for people."""
    names = [one["target"] for one in data["targets"]]
    rows = [_row(one, names) for one in data["models"]]
    predicted = [f"{name} predicts" for name in names]
    heads = ("model", "median", "first quartile", "third quartile", "times the first", *predicted)
    samples = f"a batch of {data['batch']}, {data['threads']} thread{'s' if data['threads'] > 1 else ''}"
    clock = "processor time of the thread" if data["clock"] == "thread" else "wall time"
    return [
        table("In onnxruntime on this machine", heads, rows),
        f"{samples}, {data['runs']} rounds, {clock}.",
        *(f"{one['target']} is {one['status']}: {one['error']}" for one in data["targets"]),
    ]


def _row(one: dict[str, Any], names: Sequence[str]) -> list[str]:
    times = [format_quantity("latency", one[key]) for key in ("median_s", "q25_s", "q75_s")]
    found = [one["predicted_s"][name] for name in names]
    predicted = ["not known" if time is None else format_quantity("latency", time) for time in found]
    return [one["model"], *times, f"{one['ratio']:.2f}", *predicted]


def _found(name: str, inputs: Sequence[str]) -> tuple[Path | nn.Module, Any]:
    """A file, or a model as a graph with its example inputs."""
    from fxopt._cli.loading import is_program, load_model
    from fxopt.graph import trace

    if name.endswith(_ONNX):
        return _existing(Path(name)), None
    if Path(name).is_dir():
        return _existing(Path(name, MODEL)), None
    if ":" not in name and not is_program(name):
        raise FxoptError(
            f"There is no folder {name}; give one that `fxopt optimize` wrote, an .onnx or .pt2 file, or "
            "MODULE:FUNCTION."
        )
    model, example = load_model(name, inputs)
    return trace(model.eval(), example), example


def _existing(file: Path) -> Path:
    if not file.is_file():
        raise FxoptError(f"There is no file {file}; export a model with `fxopt export`, or give one that exists.")
    return file


def _predicted(thing: Path | nn.Module, targets: Sequence[Target], batch: int) -> dict[str, float | None]:
    """Seconds by target; of a file those in the report beside it, and None where there is none for the target."""
    from torch import fx

    if not isinstance(thing, fx.GraphModule):
        return {target.name: _reported(thing, target, batch) for target in targets}
    from fxopt.lowering import lower
    from fxopt.passes import Canonicalize

    workload = lower(Canonicalize()(thing).graph_module, batch=batch).bind()
    for target in targets:
        target.prepare(workload)
    return {target.name: float(target.estimate(workload).latency_s[0]) for target in targets}


def _reported(thing: Path | nn.Module, target: Target, batch: int) -> float | None:
    """What the report of a saved result says of it."""
    from fxopt import report

    if not isinstance(thing, Path) or thing.name != MODEL or not thing.with_name(REPORT).is_file():
        return None
    if batch != target.capabilities.batch:
        return None
    found = report.load(thing.parent)
    return found.after.latency_s if found.target.name == target.name else None
