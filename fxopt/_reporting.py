"""Filling in the report of an optimization."""

from __future__ import annotations

import dataclasses
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import fx

from fxopt.decisions import Policy, SearchSpace
from fxopt.export import ExportReport
from fxopt.graph.channels import ChannelGroup, analyze
from fxopt.graph.fake_quantize import ActivationQuantizer, CodebookQuantizer, WeightQuantizer
from fxopt.lowering import ParametricWorkload
from fxopt.report import (
    BudgetLine,
    CandidateLine,
    CurveLine,
    LayerLine,
    Metrics,
    OperatorLine,
    PassLine,
    Report,
    TargetLine,
    lagging,
    roofline,
)
from fxopt.report._bounds import BoundOf, bounds, slow_lines, time_lines
from fxopt.search import SearchResult
from fxopt.targets import Estimate, OpKind, Target, Workload
from fxopt.targets.rows import FLOAT_BITS, macs

__all__ = ["build_report", "changes_in", "export_data", "metrics_of", "notes_on", "operator_lines"]

_PACKAGES = ("fxopt", "torch", "onnx", "onnxruntime", "numpy")
_QUANTIZERS = (ActivationQuantizer, WeightQuantizer, CodebookQuantizer)
_Key: TypeAlias = tuple[str, int]
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
    source: ParametricWorkload,
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
    operators: Sequence[OperatorLine],
    curves: Sequence[CurveLine],
) -> Report:
    """Everything that a reader wants to know of an optimization.

    Args:
        title: Model and target in words.
        target: The target.
        source: The model as it was given.
        workload: The model as it was searched, with other operators where these were chosen.
        final: The result.
        policy: What makes the result of the given model.
        budgets: Metric, words, limit, before and achieved of each budget.
        before: What the given model is worth and costs.
        after: What the result is worth and costs.
        steps: What was done in between.
        graph: The graph that was searched.
        search: The search, if there was one.
        score_name: What judged the model.
        notes: What to know first.
        seed: Seed of everything random.
        operators: What was chosen for each block.
        curves: Other searches of the same space.
    """
    first, bound = source.bind(), workload.bind(policy)
    estimate = target.estimate(workload.bind())
    channels = analyze(graph)
    frozen = _frozen(channels.frozen)
    found = bounds(target, bound)
    return Report(
        title=title,
        target=TargetLine(target.name, target.title, target.status, target.error, tuple(target.caveats(bound))),
        before=before,
        after=after,
        budgets=tuple(BudgetLine(*line) for line in budgets),
        passes=tuple(steps),
        layers=_layers(target, source, first, workload, bound, found, frozen),
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
        roofline=roofline(target, first, bound),
        operators=tuple(operators),
        times=time_lines(target, first, bound),
        slow=slow_lines(target, bound, found, frozen),
        curves=tuple(curves),
        candidates=_candidates(target, workload, search),
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


def operator_lines(space: SearchSpace, policy: Policy) -> tuple[OperatorLine, ...]:
    """What a policy chooses for each block whose operator is decided."""
    return tuple(
        OperatorLine(one.site, str(one.default), str(policy.get(one.key, one.default)), tuple(map(str, one.choices)))
        for one in space
    )


def notes_on(train: object, val: object, evaluate: object, found: Sequence[SearchResult], policy: Policy) -> list[str]:
    """What a reader should know first: which data were missing, and what went wrong on the way."""
    notes = []
    if val is None and evaluate is None:
        notes.append(
            "No validation data was given: policies were judged by how little they change the outputs on random "
            "inputs, and no accuracy is known."
        )
    if train is None:
        notes.append("No training data was given: nothing was fine-tuned, and ranges come from random inputs.")
    if not policy:
        notes.append("The passes find nothing to decide in this model; it was left as it is.")
    for one in found:
        if one.failed:
            first = next(trial.error for trial in one.trials if trial.failed)
            notes.append(f"{one.failed} of {len(one.trials)} trials failed; the first with: {first}")
    return notes


def _candidates(target: Target, workload: ParametricWorkload, search: SearchResult | None) -> tuple[CandidateLine, ...]:
    """What was tried and scored, with what it costs."""
    if search is None:
        return ()
    trials = [trial for trial in search.trials if trial.score is not None and not trial.cached]
    if not trials:
        return ()
    costs = workload.estimate(target, [trial.policy for trial in trials])
    energy = costs.energy_j
    return tuple(
        CandidateLine(
            trial=trial.number,
            score=float(trial.score or 0.0),
            latency_s=float(costs.latency_s[index]),
            size_bytes=float(costs.weight_bytes[index]),
            macs=float(costs.macs[index]),
            energy_j=None if energy is None else float(energy[index]),
            chosen=trial.policy == search.policy,
        )
        for index, trial in enumerate(trials)
    )


def _frozen(groups: Sequence[ChannelGroup]) -> dict[str, str]:
    """What froze the channels that a layer makes or, where these are free, those that it reads; by module path."""
    found: dict[str, str] = {}
    for role in ("in", "out"):
        for group in groups:
            found.update({use.path: group.frozen_by or "" for use in group.members if use.role == role})
    return found


def _layers(
    target: Target,
    source: ParametricWorkload,
    first: Workload,
    workload: ParametricWorkload,
    last: Workload,
    found: Sequence[BoundOf],
    frozen: Mapping[str, str],
) -> tuple[LayerLine, ...]:
    """The result's layers, beside those of the same name before; and those that are gone."""
    before, after = _rows(target, source, first), _rows(target, workload, last)
    uncut = _rows(target, workload, workload.bind())
    bound = {name: one.bound for name, one in zip(workload.names, found, strict=True)}
    lines = []
    for key in _in_order(list(before), list(after)):
        was, now, site = before.get(key, _ABSENT), after.get(key, _ABSENT), key[0]
        lines.append(
            LayerLine(
                site=site,
                kind=now.kind or was.kind,
                macs_before=was.macs,
                macs_after=now.macs,
                channels_before=(was if key in before else uncut[key]).channels,
                channels_after=now.channels,
                weight_bits=now.weight_bits,
                activation_bits=now.activation_bits,
                latency_before_s=was.latency_s,
                latency_after_s=now.latency_s,
                bound=bound[site] if key in after else "",
                frozen_by=frozen.get(site, "") if key in after else "",
            )
        )
    return tuple(lines)


def _in_order(before: Sequence[_Key], after: Sequence[_Key]) -> list[_Key]:
    """Both lists as one: what only one of them has stands between what it stands between there."""
    kept, rest = set(after), list(before)
    merged: list[_Key] = []
    for key in after:
        if key in rest:
            place = rest.index(key)
            merged += [one for one in rest[:place] if one not in kept]
            rest = rest[place + 1 :]
        merged.append(key)
    return list(dict.fromkeys(merged + [one for one in rest if one not in kept]))


@dataclasses.dataclass(frozen=True)
class _Row:
    """A layer of one of two networks."""

    kind: str
    macs: float
    channels: int
    weight_bits: int
    activation_bits: int
    latency_s: float


_ABSENT = _Row("", 0.0, 0, FLOAT_BITS, FLOAT_BITS, 0.0)


def _rows(target: Target, workload: ParametricWorkload, bound: Workload) -> dict[_Key, _Row]:
    """The layers of a network by name and, where a module is called more than once, the number of the call."""
    times = target.estimate(bound).rows.latency_s[0]
    counts = np.asarray(macs(bound.rows))[0]
    found: dict[_Key, _Row] = {}
    calls: Counter[str] = Counter()
    for index, row in enumerate(workload.rows):
        if row.kind not in _LAYERS:
            continue
        channels, weight_bits, activation_bits = (
            int(bound.rows[name][0, index]) for name in ("k", "weight_bits", "activation_bits")
        )
        work, seconds = float(counts[index]), float(times[index])
        found[row.name, calls[row.name]] = _Row(
            row.kind.name.lower(), work, channels, weight_bits, activation_bits, seconds
        )
        calls[row.name] += 1
    return found


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for package in _PACKAGES:
        try:
            found.setdefault(package, metadata.version(package))
        except metadata.PackageNotFoundError:
            continue
    return found
