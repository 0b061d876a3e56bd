"""Reports for terminals and plain text."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from fxopt.decisions import format_quantity
from fxopt.report._data import Report
from fxopt.report._summary import (
    EXPORT_COLUMNS,
    STEP_COSTS,
    budget_words,
    change_words,
    export_layers,
    export_words,
    score_words,
    step_cells,
    story,
    summary,
)

__all__ = ["export_tables", "layer_table", "metrics_table", "report_text", "slow_table", "steps_table", "view"]

_WIDTH = 110
_MOST_LINES = 8


def report_text(report: Report) -> str:
    """The report as plain text."""
    out = io.StringIO()
    Console(file=out, width=_WIDTH, color_system=None, force_terminal=False).print(view(report))
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def view(report: Report) -> RenderableType:
    """What a terminal shows of a report."""
    return Group(*_parts(report))


def metrics_table(report: Report) -> Table:
    """Metrics before and after."""
    rows = [(row.label, row.source, row.before, row.after, row.change) for row in summary(report)]
    return _table(report.title, ("Metric", "How known", ">Before", ">After", ">Change"), rows)


def layer_table(report: Report) -> Table:
    """Layers before and after."""
    rows = [
        (
            layer.site,
            layer.kind,
            f"{layer.channels_before} > {layer.channels_after}",
            f"{layer.weight_bits}/{layer.activation_bits}",
            format_quantity("macs", layer.macs_before),
            format_quantity("macs", layer.macs_after),
            format_quantity("latency", layer.latency_before_s),
            format_quantity("latency", layer.latency_after_s),
            change_words(layer.latency_before_s, layer.latency_after_s),
        )
        for layer in report.layers
    ]
    columns = ("Layer", "Kind", ">Channels", ">Bits w/a", ">MACs", ">after", ">Latency", ">after", ">Change")
    return _table(f"Layers, latency predicted for {report.target.told}", columns, rows)


def steps_table(report: Report) -> Table:
    """Score and costs after each step."""
    columns = ("Step", "What", f">{report.score_name.capitalize()} after it", *(f">{name}" for name in STEP_COSTS))
    rows = [(one.name, one.detail, score_words(report, one.accuracy), *step_cells(one)) for one in story(report)]
    return _table(None, columns, rows)


def slow_table(report: Report, most: int) -> Table:
    """The result's costliest operators, and what would help."""
    rows: list[tuple[str, ...]] = []
    for one in report.slow[:most]:
        told = one.remedy and any(one.remedy in row for row in rows)
        latency, share = format_quantity("latency", one.latency_s), f"{one.share:.0%}"
        rows.append((one.site, latency, share, one.bound, "as above" if told else one.remedy))
    columns = ("Costliest operator", ">Predicted", ">Of all", "Bound by", "What would help")
    return _table(None, columns, rows)


def export_tables(data: Mapping[str, Any]) -> Iterator[Table]:
    """What was exported and how it was checked, and its layers."""
    yield _table(None, ("Exported", ""), export_words(data))
    layers = export_layers(data)
    if layers:
        site, bits, size, *others = EXPORT_COLUMNS
        yield _table("Layers of the file", (site, f">{bits}", f">{size}", *others), layers)


def _parts(report: Report) -> Iterator[RenderableType]:
    yield Text(report.verdict, style="bold")
    for note in report.notes:
        yield Text(f"Note: {note}", style="yellow")
    yield metrics_table(report)
    if report.budgets:
        columns = (f"Budget for {report.target.told}", ">Limit", ">Before", ">Achieved", "")
        yield _table(None, columns, [budget_words(budget) for budget in report.budgets])
    if report.passes:
        yield steps_table(report)
    if report.slow:
        yield slow_table(report, _MOST_LINES)
    if report.export is not None:
        yield from export_tables(report.export)
    yield Text(f"{report.target.title}: {report.target.status}. {report.target.error}")
    yield from _lines("Caveat", report.target.caveats)
    yield from _lines("Without a cost model, in no figure above", report.uncosted)
    yield from _lines("Unknown operator, left alone", report.barriers)
    yield from _lines("Channels left alone", [f"{site} ({reason})" for site, reason in report.frozen])
    yield Text(f"Search: {report.engine}, {report.trials} trials, seed {report.seed}.")


def _lines(label: str, items: Sequence[str]) -> Iterator[Text]:
    for item in items[:_MOST_LINES]:
        yield Text(f"{label}: {item}")
    if len(items) > _MOST_LINES:
        yield Text(f"{label}: and {len(items) - _MOST_LINES} more; the saved report has them all")


def _table(title: str | None, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """A table; a column whose name begins with > is aligned to the right. Cells are taken literally."""
    table = Table(title=Text(title) if title else None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(Text(column.removeprefix(">")), justify="right" if column.startswith(">") else "left")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table
