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

from fxopt._course import Course, Outcome
from fxopt._job import Job
from fxopt.decisions import Policy, SearchSpace, format_quantity
from fxopt.export import ExportReport
from fxopt.graph.channels import ChannelGroup, analyze
from fxopt.lowering import ParametricWorkload, lower
from fxopt.report import (
    BudgetLine,
    CandidateLine,
    LayerLine,
    Metrics,
    OperatorLine,
    Report,
    TargetLine,
    lagging,
    roofline,
)
from fxopt.report._bounds import BoundOf, bounds, slow_lines, time_lines
from fxopt.report._journals import curves_beside
from fxopt.search import SearchResult
from fxopt.targets import OpKind, Target, Workload
from fxopt.targets.rows import FLOAT_BITS, macs

__all__ = ["build_report", "export_data"]

_PACKAGES = ("fxopt", "torch", "onnx", "onnxruntime", "numpy")
_Key: TypeAlias = tuple[str, int]
_LAYERS = (OpKind.CONV, OpKind.DEPTHWISE, OpKind.LINEAR, OpKind.MATMUL)


def build_report(course: Course, job: Job, made: Outcome, *, title: str, before: Metrics, after: Metrics) -> Report:
    """Everything that a reader wants to know of an optimization.

    Args:
        course: What was done.
        job: What it was done to.
        made: What came of it.
        title: Model and target in words.
        before: What the given model is worth and costs.
        after: What the result is worth and costs.
    """
    target, workload, search = job.target, job.workload, made.search
    source = job.lowered(job.source)
    first, bound = source.bind(), workload.bind(made.policy)
    channels = analyze(job.graph)
    frozen = _frozen(channels.frozen)
    found = bounds(target, bound)
    return Report(
        title=title,
        target=TargetLine(
            target.name,
            target.title,
            target.status,
            target.error,
            tuple(target.caveats(bound)),
            target.capabilities.batch,
        ),
        before=before,
        after=after,
        budgets=tuple(BudgetLine(*line) for line in job.budget_lines(made.graph)),
        passes=tuple(course.steps),
        layers=_layers(target, source, first, workload, bound, found, frozen),
        frozen=tuple((group.site, group.frozen_by or "") for group in channels.frozen),
        barriers=lower(made.graph).barriers,
        uncosted=target.estimate(workload.bind()).uncosted,
        engine=search.engine if search is not None else "none",
        trials=len(search.trials) if search is not None else 0,
        curve=tuple(search.curve) if search is not None else (),
        score_name=made.score_name,
        notes=(*_notes(course, job, made), *lagging(target, before, after, bound)),
        seed=course.tuning.seed,
        versions=_versions(),
        export=None,
        roofline=roofline(target, first, bound),
        operators=_operator_lines(job.operators, job.selected),
        times=time_lines(target, first, bound),
        slow=slow_lines(target, bound, found, frozen),
        curves=() if course.folder is None or len(made.found) > 1 else curves_beside(course.folder),
        candidates=_candidates(target, workload, search),
        supernet=job.supernet,
    )


def export_data(made: ExportReport) -> dict[str, Any]:
    """What a report tells of an export; its notes are told with the export."""
    data = {name: value for name, value in dataclasses.asdict(made).items() if name != "notes"}
    data["path"] = made.path.name
    data["batches"] = ", ".join(map(str, made.batches))
    data["operators"] = ", ".join(f"{count} {name}" for name, count in made.operators)
    return data | {name: list(data[name]) for name in ("layers", "kernels")}


def _operator_lines(space: SearchSpace, policy: Policy) -> tuple[OperatorLine, ...]:
    """What a policy chooses for each block whose operator is decided."""
    return tuple(
        OperatorLine(one.site, str(one.default), str(policy.get(one.key, one.default)), tuple(map(str, one.choices)))
        for one in space
    )


def _notes(course: Course, job: Job, made: Outcome) -> list[str]:
    """What a reader should know first: which data were missing, and what went wrong on the way."""
    notes = []
    if not course.judging.by_data:
        notes.append(
            "No validation data was given: policies were judged by how little they change the outputs on random "
            "inputs, and no accuracy is known."
        )
    if course.tuning.train is None:
        notes.append("No training data was given: nothing was fine-tuned, and ranges come from random inputs.")
    notes += _of_a_batch(job)
    if not made.policy and not job.selected:
        notes.append("The passes find nothing to decide in this model; it was left as it is.")
    for one in made.found:
        if one.failed:
            first = next(trial.error for trial in one.trials if trial.failed)
            notes.append(f"{one.failed} of {len(one.trials)} trials failed; the first with: {first}")
    return [*notes, *job.notes, *course.notes, *filter(None, (made.note,))]


def _of_a_batch(job: Job) -> list[str]:
    """What absolute limits are of, where the target runs several samples at a time."""
    batch = job.target.capabilities.batch
    told = [
        f"{budget}, {format_quantity(budget.metric, budget.limit / batch)} each"
        for budget in job.budgets
        if batch > 1 and not budget.relative and budget.metric != "size"
    ]
    return [f"{job.target.name} takes {batch} samples at a time, and limits are of all of them: {one}." for one in told]


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
