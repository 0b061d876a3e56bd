"""``fxopt profile`` and ``fxopt targets``: what hardware there is and what a model costs on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxopt import targets
from fxopt._cli.output import table
from fxopt._host import load_target
from fxopt.decisions import format_quantity
from fxopt.progress import Progress, reporter

if TYPE_CHECKING:
    from rich.table import Table

    from fxopt.lowering import ParametricWorkload
    from fxopt.report import Roofline

__all__ = ["Profile", "list_targets", "profile", "targets_table"]


@dataclass(frozen=True)
class Profile:
    """What a model costs on some targets.

    Attributes:
        model: Its reference.
        layers: For every operator: name, operator, kind, MACs of one sample, and latency in seconds by target.
        totals: For every target: its batch, status and error, and the model's figures.
        caveats: What deserves caution, by target.
        rooflines: The operators under the roofs of each target.
    """

    model: str
    layers: list[dict[str, Any]]
    totals: list[dict[str, Any]]
    caveats: list[str]
    rooflines: list[Roofline]

    def draw(self, path: Path) -> None:
        """Draw the rooflines beside each other.

        Raises:
            FxoptError: If the suffix is neither .svg nor .png, or the file cannot be written.
        """
        from fxopt.report import save_rooflines

        save_rooflines(self.rooflines, path)

    def to_data(self) -> dict[str, Any]:
        """As plain data for JSON."""
        return {"schema": 1, "model": self.model, "targets": self.totals, "layers": self.layers}

    def tables(self) -> tuple[Table, Table]:
        """Operators that cost something, and totals, for rich."""
        names = [total["target"] for total in self.totals]
        rows = [_layer_row(layer, self.totals) for layer in self.layers if _costs_something(layer)]
        shares = [heading for name in names for heading in (f"{name} latency", "share")]
        layers = table("Operators", ("layer", "operator", "MACs", *shares), rows, left=2)
        figures = ("latency_s", "fixed_s", "energy_j", "macs", "weight_bytes", "peak_activation_bytes")
        metrics = ("latency", "latency", "energy", "macs", "size", "memory")
        lines = [
            (
                total["target"],
                str(total["batch"]),
                *(
                    "not known" if total[figure] is None else format_quantity(metric, total[figure])
                    for figure, metric in zip(figures, metrics, strict=True)
                ),
                f"{total['uncosted_macs_share']:.1%}",
                total["status"],
            )
            for total in self.totals
        ]
        heads = (
            *("target", "batch", "latency", "of it for a run as such", "energy", "MACs", "weights"),
            *("peak activations", "MACs without a model", "status"),
        )
        return layers, table(f"{self.model} in all", heads, lines)


def profile(reference: str, names: Sequence[str], inputs: Sequence[str], show: Progress | None = None) -> Profile:
    """What the model that ``reference`` names costs on the targets, operator by operator.

    Raises:
        FxoptError: If the model cannot be loaded or traced, or a target is unknown.
    """
    from fxopt._cli.loading import load_model
    from fxopt.graph import trace
    from fxopt.lowering import lower
    from fxopt.passes import Canonicalize
    from fxopt.report import roofline

    chosen = [load_target(name, show or reporter(None)) for name in names]
    model, example = load_model(reference, inputs)
    graph = Canonicalize()(trace(model.eval(), example)).graph_module
    single = lower(graph, batch=1)
    layers = _operators(single)
    totals, caveats, rooflines = [], [], []
    for target in chosen:
        batch = target.capabilities.batch
        workload = (single if batch == 1 else lower(graph, batch=batch)).bind()
        target.prepare(workload)
        estimate = target.estimate(workload)
        for layer, latency_s in zip(layers, estimate.rows.latency_s[0], strict=True):
            layer["latency_s"][target.name] = float(latency_s)
        totals.append(_total(target, batch, estimate))
        rooflines.append(roofline(target, workload))
        caveats += [f"{target.name}: {caveat}" for caveat in target.caveats(workload)]
        if estimate.uncosted:
            share = f"{estimate.uncosted_macs_share:.1%} of the MACs"
            names_left = ", ".join(estimate.uncosted)
            caveats.append(f"{target.name}: no model, so not in the sums ({share}): {names_left}")
    caveats += [f"fxopt does not know {name} and leaves it alone" for name in single.barriers]
    return Profile(reference, layers, totals, caveats, rooflines)


def list_targets() -> list[dict[str, Any]]:
    """Every target by name."""
    loaded = [targets.load(name) for name in targets.names()]
    return [
        {"name": one.name, "title": one.title, "status": one.status, "error": one.error, **_reach(one)}
        for one in loaded
    ]


def targets_table(found: Sequence[dict[str, Any]]) -> Table:
    """The targets for rich."""
    rows = [(one["name"], one["title"], one["status"], one["bits"], one["error"]) for one in found]
    return table("Targets", ("name", "device", "status", "bits", "error"), rows, left=5)


def _reach(target: targets.Target) -> dict[str, Any]:
    offered = {pair for pairs in target.capabilities.bits.values() for pair in pairs}
    bits = ", ".join(f"{weight}/{activation}" for weight, activation in sorted(offered))
    return {"bits": bits, "batch": target.capabilities.batch}


def _operators(workload: ParametricWorkload) -> list[dict[str, Any]]:
    from fxopt.targets.rows import macs

    counts = macs(workload.bind().rows)[0]
    return [
        {
            "name": row.name,
            "operator": row.operator,
            "kind": row.kind.name.lower(),
            "macs": float(count),
            "latency_s": {},
        }
        for row, count in zip(workload.rows, counts, strict=True)
    ]


def _total(target: targets.Target, batch: int, estimate: targets.Estimate) -> dict[str, Any]:
    return {
        "target": target.name,
        "title": target.title,
        "status": target.status,
        "error": target.error,
        "batch": batch,
        "latency_s": float(estimate.latency_s[0]),
        "energy_j": None if estimate.energy_j is None else float(estimate.energy_j[0]),
        "macs": float(estimate.macs[0]),
        "weight_bytes": float(estimate.weight_bytes[0]),
        "peak_activation_bytes": float(estimate.peak_activation_bytes[0]),
        "fixed_s": float(target.model.fixed_s),
        "uncosted": list(estimate.uncosted),
        "uncosted_macs_share": estimate.uncosted_macs_share,
    }


def _costs_something(layer: dict[str, Any]) -> bool:
    return layer["macs"] > 0.0 or any(latency_s > 0.0 for latency_s in layer["latency_s"].values())


def _layer_row(layer: dict[str, Any], totals: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    cells = []
    for total in totals:
        if layer["name"] in total["uncosted"]:
            cells += ["no model", ""]
            continue
        latency_s, whole_s = layer["latency_s"][total["target"]], total["latency_s"]
        cells += [format_quantity("latency", latency_s), f"{latency_s / whole_s:.1%}" if whole_s > 0.0 else ""]
    count = format_quantity("macs", layer["macs"]) if layer["macs"] else ""
    return (layer["name"], layer["operator"], count, *cells)
