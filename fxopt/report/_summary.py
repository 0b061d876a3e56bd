"""Figures in words, for the terminal and the page alike."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from fxopt.decisions import format_quantity, format_score
from fxopt.report._data import BudgetLine, Metrics, Report

__all__ = [
    "EXPORT_COLUMNS",
    "MISSING",
    "STEP_COSTS",
    "Stage",
    "SummaryRow",
    "asked",
    "budget_of",
    "budget_words",
    "change_words",
    "export_kernels",
    "export_layers",
    "export_words",
    "on_disk",
    "parted",
    "percent",
    "score_words",
    "step_cells",
    "story",
    "summary",
    "tiles",
    "trust",
    "verdict",
]

STEP_COSTS = ("Predicted latency", "Predicted energy", "Size", "MACs")
"""What is told of the costs after each step."""

EXPORT_COLUMNS = ("Layer", "Bits w/a", "In the file", "Kernel in onnxruntime", "Computes on")
"""What is told of each layer of an exported file."""

_EXPORT_TABLES = ("layers", "kernels")
_EXPORT_QUANTITIES = {"file_bytes": ("file size", "size"), "latency_s": ("latency measured on this machine", "latency")}
MISSING = "n/a"
"""What stands for a figure that is not known."""

_BEGINNING = 100
"""Characters of a long text that are told in any case."""
_END = re.compile(r"[.;,] ")
_Pick: TypeAlias = Callable[[Metrics], float | None]

_COSTS: tuple[tuple[str, str, str, _Pick], ...] = (
    ("MACs", "macs", "counted", lambda metrics: metrics.macs),
    ("Parameters", "macs", "counted", lambda metrics: float(metrics.parameters)),
    ("Size of weights", "size", "counted", lambda metrics: metrics.size_bytes),
    ("Latency", "latency", "predicted", lambda metrics: metrics.latency_s),
    ("Energy", "energy", "predicted", lambda metrics: metrics.energy_j),
    ("Peak activations", "memory", "predicted", lambda metrics: metrics.memory_bytes),
    ("Latency on this machine", "latency", "measured", lambda metrics: metrics.measured_latency_s),
)


_STAGE_COSTS: tuple[tuple[str, _Pick], ...] = (
    ("latency", lambda metrics: metrics.latency_s),
    ("energy", lambda metrics: metrics.energy_j),
    ("size", lambda metrics: metrics.size_bytes),
    ("macs", lambda metrics: metrics.macs),
)


@dataclass(frozen=True)
class Stage:
    """The model after a step.

    Attributes:
        name: The step; "original" before the first.
        detail: What it did.
        accuracy: The score after it, or None.
        gain: What it brought the score, in words.
        costs: What the model costs after it, in the order of :data:`STEP_COSTS`, and the change that the step made.
        shares: The costs as parts of the original's, by metric.
    """

    name: str
    detail: str
    accuracy: float | None
    gain: str
    costs: tuple[tuple[str, str], ...]
    shares: Mapping[str, float]

    @property
    def words(self) -> tuple[str, ...]:
        """The costs in words."""
        pairs = zip(STEP_COSTS, self.costs, strict=True)
        return tuple(f"{name} {cost}" for name, (cost, _) in pairs if cost != MISSING)


@dataclass(frozen=True)
class SummaryRow:
    """One metric in words.

    Attributes:
        label: What it is.
        source: How it is known: "counted", "predicted", "measured", or what judged the model.
        before: The original's.
        after: The result's.
        change: The difference in words, or "n/a".
    """

    label: str
    source: str
    before: str
    after: str
    change: str


def summary(report: Report) -> tuple[SummaryRow, ...]:
    """The metrics that are known, the score first."""
    rows = []
    if report.before.accuracy is not None or report.after.accuracy is not None:
        rows.append(_score_row(report))
    for label, metric, source, pick in _COSTS:
        before, after = pick(report.before), pick(report.after)
        if before is None and after is None:
            continue
        how = f"predicted for {report.target.told}" if source == "predicted" else source
        if label == "MACs":
            how += report.target.told.removeprefix(report.target.name)
        rows.append(
            SummaryRow(label, how, _quantity(metric, before), _quantity(metric, after), change_words(before, after))
        )
    return tuple(rows)


def verdict(report: Report) -> str:
    """What came of it, in one sentence."""
    before, after = report.before, report.after
    parts = [
        _budget_verdict(report),
        _score_verdict(report),
        f"{percent(after.macs, before.macs)} of the MACs",
        f"{percent(after.size_bytes, before.size_bytes)} of the size",
        f"{percent(after.latency_s, before.latency_s)} of the latency predicted for {report.target.name}",
    ]
    if before.measured_latency_s and after.measured_latency_s is not None:
        measured = percent(after.measured_latency_s, before.measured_latency_s)
        parts.append(f"{measured} of the latency measured on this machine")
    return f"{parts[0]}: {', '.join(parts[1:])}."


def tiles(report: Report) -> tuple[tuple[str, str, str], ...]:
    """The figures to see first: label, the result's value and the original's."""
    before, after = report.before, report.after
    pairs = (
        (f"Latency predicted for {report.target.told}", "latency", before.latency_s, after.latency_s),
        ("Latency measured on this machine", "latency", before.measured_latency_s, after.measured_latency_s),
    )
    score = (_score_label(report), score_words(report, after.accuracy), score_words(report, before.accuracy))
    costs = [(label, _quantity(metric, now), _quantity(metric, was)) for label, metric, was, now in pairs]
    return (score, *costs, (*on_disk(report), f"{format_quantity('size', before.size_bytes)} of weights"))


def score_words(report: Report, value: float | None) -> str:
    """A score, or what stands for none."""
    if value is None or math.isnan(value):
        return MISSING
    return format_score(report.score_name, value)


def budget_words(budget: BudgetLine) -> tuple[str, str, str, str, str]:
    """Asked, limit, before, achieved, and whether it is met."""
    amounts = (format_quantity(budget.metric, value) for value in (budget.limit, budget.before, budget.achieved))
    limit, before, achieved = amounts
    return budget.asked, limit, before, achieved, "met" if budget.met else "over budget"


def change_words(before: float | None, after: float | None) -> str:
    """How much more or less ``after`` is than ``before``."""
    if before is None or after is None or not before or not math.isfinite(before) or not math.isfinite(after):
        return MISSING
    change = (after / before - 1.0) * 100.0
    return "unchanged" if change == 0.0 else f"{change:+.1f}%"


def percent(after: float, before: float) -> str:
    """``after`` in percent of ``before``."""
    return f"{after / before:.0%}" if before and math.isfinite(after / before) else MISSING


def story(report: Report) -> tuple[Stage, ...]:
    """The model as it was and after each step: its score, its costs, and what the step changed in each."""
    stages: list[Stage] = []
    last_score, last = report.before.accuracy, report.before
    for name, detail, score, metrics in (
        ("original", "as it was given", report.before.accuracy, report.before),
        *((one.name, one.detail, one.accuracy, one.metrics) for one in report.passes),
    ):
        costs = tuple(
            (MISSING, "")
            if metrics is None
            else (_quantity(metric, pick(metrics)), change_words(pick(last), pick(metrics)) if stages else "")
            for metric, pick in _STAGE_COSTS
        )
        gain = _gain(report, last_score, score) if stages else ""
        stages.append(Stage(name, detail, score, gain, costs, _shares(report.before, metrics)))
        last_score = score if score is not None else last_score
        last = metrics if metrics is not None else last
    return tuple(stages)


def step_cells(stage: Stage) -> tuple[str, ...]:
    """What a stage costs, each with the change that the step made, for tables of text."""
    return tuple(f"{cost} ({change})" if _told(change) else cost for cost, change in stage.costs)


def asked(report: Report) -> str:
    """What was asked for, in words."""
    limits = " and ".join(budget.asked for budget in report.budgets) or "no budget"
    search = f"{report.trials} trials of {report.engine}" if report.trials else "no search"
    return f"{limits}, for {report.target.told}; {search}, judged by {report.score_name}"


def budget_of(report: Report, metric: str) -> BudgetLine | None:
    """The budget of a metric, or None."""
    return next((budget for budget in report.budgets if budget.metric == metric), None)


def on_disk(report: Report) -> tuple[str, str]:
    """What lies on disk: what it is, and how large."""
    written = (report.export or {}).get("file_bytes")
    if isinstance(written, (int, float)):
        return "Size on disk, ONNX file", format_quantity("size", float(written))
    return "Size on disk, weights as stored", format_quantity("size", report.after.size_bytes)


def parted(text: str) -> tuple[str, str]:
    """The beginning of a long text, up to where a clause or sentence ends, and the rest of it."""
    found = _END.search(text, _BEGINNING)
    return (text, "") if found is None else (text[: found.start() + 1], text[found.end() :])


def trust(report: Report) -> str:
    """How predictions compare with what was measured, in words."""
    predicted, measured = report.after.latency_s, report.after.measured_latency_s
    if not measured:
        return "Nothing was measured: latency is the target's prediction alone."
    words = f"{format_quantity('latency', predicted)} predicted, {format_quantity('latency', measured)} measured"
    if report.target.status == "measured":
        return f"{words} in onnxruntime on this machine: {change_words(measured, predicted)} against the measurement."
    return f"{words} in onnxruntime on this machine, which is another device than {report.target.name}."


def export_words(data: Mapping[str, Any] | None) -> tuple[tuple[str, str], ...]:
    """What was exported and how it was checked: (what, value)."""
    return tuple(
        _export_pair(key, value)
        for key, value in (data or {}).items()
        if value is not None and key not in _EXPORT_TABLES
    )


def export_layers(data: Mapping[str, Any] | None) -> tuple[tuple[str, ...], ...]:
    """Layers of the exported file, in the order of :data:`EXPORT_COLUMNS`."""
    return tuple(
        (
            str(line["site"]),
            f"{line['weight_bits']}/{line['activation_bits']}",
            format_quantity("size", float(line["stored_bytes"])),
            str(line["kernel"]) or MISSING,
            MISSING if line["integer"] is None else _arithmetic(bool(line["integer"])),
        )
        for line in (data or {}).get("layers", ())
    )


def export_kernels(data: Mapping[str, Any] | None) -> tuple[tuple[str, str, str], ...]:
    """Every node that computes in the runtime's graph of the exported file: (name, operator, arithmetic)."""
    return tuple(
        (str(line["name"]), str(line["operator"]), _arithmetic(bool(line["integer"])))
        for line in (data or {}).get("kernels", ())
    )


def _arithmetic(integer: bool) -> str:
    return "integers" if integer else "floats"


def _export_pair(key: str, value: object) -> tuple[str, str]:
    if key in _EXPORT_QUANTITIES and isinstance(value, (int, float)):
        words, metric = _EXPORT_QUANTITIES[key]
        return words, format_quantity(metric, float(value))
    if key == "accuracy" and isinstance(value, float):
        return "accuracy in onnxruntime", f"{value:.2%}"
    return key.replace("_", " "), f"{value:.4g}" if isinstance(value, float) else str(value)


def _score_row(report: Report) -> SummaryRow:
    before, after = report.before.accuracy, report.after.accuracy
    words = [score_words(report, value) for value in (before, after)]
    change = _gain(report, before, after)
    source = "validation data" if report.score_name == "accuracy" else report.score_name
    return SummaryRow(_score_label(report), source, words[0], words[1], change)


def _gain(report: Report, before: float | None, after: float | None) -> str:
    if before is None or after is None or not (math.isfinite(before) and math.isfinite(after)):
        return MISSING
    return f"{(after - before) * 100:+.2f} points" if report.score_name == "accuracy" else f"{after - before:+.4g}"


def _shares(before: Metrics, after: Metrics | None) -> dict[str, float]:
    shares = {}
    for metric, pick in _STAGE_COSTS:
        was, now = pick(before), None if after is None else pick(after)
        if was and now is not None and math.isfinite(now / was):
            shares[metric] = now / was
    return shares


def _told(change: str) -> bool:
    return change not in ("", MISSING, "unchanged")


def _score_label(report: Report) -> str:
    return "Accuracy" if report.score_name == "accuracy" else "Score"


def _quantity(metric: str, value: float | None) -> str:
    return MISSING if value is None else format_quantity(metric, value)


def _budget_verdict(report: Report) -> str:
    missed = [budget.metric for budget in report.budgets if not budget.met]
    if missed:
        return f"Over budget in {' and '.join(missed)}"
    if not report.budgets:
        return "No budget was set"
    return "The budget is met" if len(report.budgets) == 1 else "Every budget is met"


def _score_verdict(report: Report) -> str:
    before, after = report.before.accuracy, report.after.accuracy
    if report.score_name.startswith("data-free"):
        return "accuracy unknown for want of data"
    if before is None or after is None:
        return "accuracy unknown"
    name = _score_label(report).lower()
    return f"{name} {score_words(report, after)} after {score_words(report, before)}"
