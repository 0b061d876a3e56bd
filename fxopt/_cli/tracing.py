"""``fxopt trace``: what the canonical graph of a model holds, and whether it computes what the model does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxopt._cli.loading import PROGRAM
from fxopt._cli.output import table
from fxopt.decisions import format_quantity
from fxopt.errors import FxoptError

if TYPE_CHECKING:
    from rich.table import Table
    from torch import fx, nn

__all__ = ["told", "trace"]

_CODE = (".py", ".txt")
_ROUNDING = 1e-6


def trace(reference: str, inputs: Sequence[str], out: Path | None) -> dict[str, Any]:
    """Trace the model that ``reference`` names, compare it with its graph, and write the graph if that is asked for.

    Returns:
        What was found, as plain data.

    Raises:
        FxoptError: If the model cannot be loaded or traced, or the file cannot be written.
    """
    if out is not None and out.suffix not in (PROGRAM, *_CODE):
        raise FxoptError(
            f"--out is {out}; give a file that ends in {PROGRAM} for the graph with its weights, or in "
            f"{' or '.join(_CODE)} for its code."
        )
    from torch import nn

    from fxopt._cli.loading import load_source
    from fxopt.graph import trace as to_graph

    source, example = load_source(reference, inputs)
    model = source.eval() if isinstance(source, nn.Module) else source.module()
    graph = to_graph(source, example)
    data = {"schema": 1, "model": reference, **_contents(graph), **_compared(model, graph, example)}
    if out is not None:
        _write(graph, out, example)
    return data | {"out": None if out is None else str(out)}


def told(data: dict[str, Any]) -> list[Table | str]:
    """What was found, for people."""
    rows = [
        (
            layer["name"],
            layer["operator"],
            " x ".join(str(size) for size in layer["shape"]),
            f"{layer['parameters']:,}" if layer["parameters"] else "",
            format_quantity("macs", layer["macs"]) if layer["macs"] else "",
        )
        for layer in data["layers"]
    ]
    columns = ("layer", "operator", f"output at a batch of {data['shapes_at']}", "parameters", "MACs")
    batch = "takes any batch" if data["dynamic_batch"] else f"takes a batch of {data['batch']} only"
    said: list[Table | str] = [
        table(f"The graph of {data['model']}", columns, rows, left=2),
        f"{len(rows)} operators, {data['parameters']:,} parameters, "
        f"{format_quantity('macs', data['macs'])} MACs a sample; {batch}.",
        f"{_VERDICTS[data['equal']]}, tried at a batch of {data['compared_at']}"
        + (f": {data['difference']}" if data["difference"] else "."),
    ]
    said += [f"{one['name']} ({one['operator']}) is a barrier: its channels stay as they are." for one in _met(data)]
    return said if data["out"] is None else [*said, f"Written: {data['out']}"]


_VERDICTS = {
    "exactly": "Graph and model give the same outputs to the last bit",
    "but for rounding": "Graph and model give the same outputs but for rounding",
    "no": "Graph and model give different outputs",
}


def _met(data: dict[str, Any]) -> list[dict[str, Any]]:
    return [layer for layer in data["layers"] if layer["barrier"]]


def _contents(graph: fx.GraphModule) -> dict[str, Any]:
    """Operators in the order of the graph, and sums."""
    from fxopt.graph.shapes import TRACE_META, values_at_batch
    from fxopt.lowering import lower
    from fxopt.targets.rows import macs

    known = graph.meta[TRACE_META]
    batch = 1 if known["dynamic_batch"] else known["batch"]
    workload = lower(graph, batch=batch)
    counts = macs(workload.bind().rows)[0] / max(batch, 1)
    values = {node.name: value for node, value in values_at_batch(graph, batch).items()}
    modules = dict(graph.named_modules())
    layers = []
    for row, count in zip(workload.rows, counts, strict=True):
        owned = modules[row.name].parameters() if row.name in modules else ()
        layers.append(
            {
                "name": row.name,
                "operator": row.operator,
                "kind": row.kind.name.lower(),
                "shape": [int(size) for size in getattr(values.get(row.node), "shape", ())],
                "parameters": sum(parameter.numel() for parameter in owned),
                "macs": float(count),
                "barrier": row.node in workload.barriers,
            }
        )
    return {
        "layers": layers,
        "parameters": sum(parameter.numel() for parameter in graph.parameters()),
        "macs": float(counts.sum()),
        "barriers": list(workload.barriers),
        "batch": known["batch"],
        "shapes_at": batch,
        "dynamic_batch": known["dynamic_batch"],
    }


def _compared(model: nn.Module, graph: fx.GraphModule, example: object) -> dict[str, Any]:
    """Whether graph and model give the same outputs, at a batch that the graph was not traced at where it takes one."""
    from fxopt.graph.shapes import TRACE_META

    known = graph.meta[TRACE_META]
    other = known["batch"] + 1 if known["dynamic_batch"] else None
    exact = _difference(model, graph, example, 0.0, other)
    loose = None if exact is None else _difference(model, graph, example, _ROUNDING, other)
    verdict = "exactly" if exact is None else "but for rounding" if loose is None else "no"
    return {"equal": verdict, "difference": loose or exact, "compared_at": other or known["batch"]}


def _difference(
    model: nn.Module, graph: fx.GraphModule, example: object, relative: float, batch: int | None
) -> str | None:
    """Where and by how much outputs differ more than ``relative``; None if nowhere."""
    from fxopt.testing import assert_equivalent

    try:
        assert_equivalent(model, graph, example, relative=relative, batch=batch)
    except AssertionError as failure:
        return str(failure)
    return None


def _write(graph: fx.GraphModule, out: Path, example: object) -> None:
    from fxopt._files import write_text
    from fxopt.graph import save_program

    if out.suffix == PROGRAM:
        save_program(graph, out, example)
    else:
        write_text(out, graph.code)
