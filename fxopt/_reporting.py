"""Filling in the report of an optimization."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import numpy as np
import torch
from torch import fx

from fxopt.decisions import Policy, SearchSpace
from fxopt.export import ExportReport
from fxopt.graph.channels import analyze
from fxopt.graph.fake_quantize import ActivationQuantizer, CodebookQuantizer, WeightQuantizer
from fxopt.lowering import ParametricWorkload
from fxopt.report import BudgetLine, LayerLine, Metrics, PassLine, Report, TargetLine, lagging, roofline
from fxopt.search import SearchResult
from fxopt.targets import Estimate, OpKind, Target
from fxopt.targets.rows import macs

__all__ = ["build_report", "changes_in", "export_data", "metrics_of", "notes_on"]

_PACKAGES = ("fxopt", "torch", "onnx", "onnxruntime", "numpy")
_QUANTIZERS = (ActivationQuantizer, WeightQuantizer, CodebookQuantizer)
_LAYERS = (OpKind.CONV, OpKind.DEPTHWISE, OpKind.LINEAR, OpKind.MATMUL)


def metrics_of(graph: fx.GraphModule, estimate: Estimate, accuracy: float | None) -> Metrics:
    """Metrics of a graph from its estimate."""
    return Metrics(
        accuracy=accuracy,
        macs=float(estimate.macs[0]),
        parameters=_parameters(graph),
        size_bytes=float(estimate.weight_bytes[0]),
        latency_s=float(estimate.latency_s[0]),
        energy_j=None if estimate.energy_j is None else float(estimate.energy_j[0]),
        memory_bytes=float(estimate.peak_activation_bytes[0]),
    )


def _parameters(graph: fx.GraphModule) -> int:
    """How many parameters a graph has; what quantizers have learned is none of the network's."""
    quantizers = (module for module in graph.modules() if isinstance(module, _QUANTIZERS))
    learned = {id(parameter) for quantizer in quantizers for parameter in quantizer.parameters()}
    return sum(parameter.numel() for parameter in graph.parameters() if id(parameter) not in learned)


def build_report(
    *,
    title: str,
    target: Target,
    workload: ParametricWorkload,
    final: ParametricWorkload,
    policy: Policy,
    budgets: Sequence[tuple[str, str, float, float, float]],
    before: Metrics,
    after: Metrics,
    steps: Sequence[PassLine],
    graph: fx.GraphModule,
    search: SearchResult | None,
    score_name: str,
    notes: Sequence[str],
    seed: int,
) -> Report:
    """Everything that a reader wants to know of an optimization."""
    bound = workload.bind(policy)
    estimate = target.estimate(workload.bind())
    channels = analyze(graph)
    return Report(
        title=title,
        target=TargetLine(target.name, target.title, target.status, target.error, tuple(target.caveats(bound))),
        before=before,
        after=after,
        budgets=tuple(BudgetLine(*line) for line in budgets),
        passes=tuple(steps),
        layers=_layers(target, workload, policy),
        frozen=tuple((group.site, group.frozen_by or "") for group in channels.frozen),
        barriers=final.barriers,
        uncosted=estimate.uncosted,
        engine=search.engine if search is not None else "none",
        trials=len(search.trials) if search is not None else 0,
        curve=tuple(search.curve) if search is not None else (),
        score_name=score_name,
        notes=(*notes, *lagging(target, before, after, bound)),
        seed=seed,
        versions=_versions(),
        export=None,
        roofline=roofline(target, workload.bind(), bound),
    )


def export_data(made: ExportReport) -> dict[str, Any]:
    """What a report tells of an export; its notes are told with the export."""
    data = {name: value for name, value in dataclasses.asdict(made).items() if name != "notes"}
    data["path"] = made.path.name
    data["batches"] = ", ".join(map(str, made.batches))
    data["operators"] = ", ".join(f"{count} {name}" for name, count in made.operators)
    return data | {name: list(data[name]) for name in ("layers", "kernels")}


def changes_in(space: SearchSpace, policy: Policy) -> str:
    """How many of the decisions that are not about bits differ from the original."""
    others = [decision for decision in space if decision.kind != "bits"]
    changed = sum(policy.get(decision.key, decision.default) != decision.default for decision in others)
    return f"{changed} of {len(others)} decisions"


def notes_on(train: object, val: object, evaluate: object, found: SearchResult | None) -> list[str]:
    """What a reader should know first: which data were missing, and what went wrong on the way."""
    notes = []
    if val is None and evaluate is None:
        notes.append(
            "No validation data was given: policies were judged by how little they change the outputs on random "
            "inputs, and no accuracy is known."
        )
    if train is None:
        notes.append("No training data was given: nothing was fine-tuned, and ranges come from random inputs.")
    if found is None:
        notes.append("The passes find nothing to decide in this model; it was left as it is.")
    elif found.failed:
        first = next(trial.error for trial in found.trials if trial.failed)
        notes.append(f"{found.failed} of {len(found.trials)} trials failed; the first with: {first}")
    return notes


def _layers(target: Target, workload: ParametricWorkload, policy: Policy) -> tuple[LayerLine, ...]:
    first, last = workload.bind(), workload.bind(policy)
    times = [target.estimate(one).rows.latency_s[0] for one in (first, last)]
    counts = [np.asarray(macs(one.rows))[0] for one in (first, last)]
    return tuple(
        LayerLine(
            site=row.name,
            kind=row.kind.name.lower(),
            macs_before=float(counts[0][index]),
            macs_after=float(counts[1][index]),
            channels_before=int(first.rows["k"][0, index]),
            channels_after=int(last.rows["k"][0, index]),
            weight_bits=int(last.rows["weight_bits"][0, index]),
            activation_bits=int(last.rows["activation_bits"][0, index]),
            latency_before_s=float(times[0][index]),
            latency_after_s=float(times[1][index]),
        )
        for index, row in enumerate(workload.rows)
        if row.kind in _LAYERS
    )


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for package in _PACKAGES:
        try:
            found.setdefault(package, metadata.version(package))
        except metadata.PackageNotFoundError:
            continue
    return found
