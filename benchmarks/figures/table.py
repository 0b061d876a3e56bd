"""The table of figures in a page of Markdown: reading what stands there and writing it anew."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

from figures.bar import Bar, Document
from fxopt._files import write_text
from fxopt.errors import FxoptError

__all__ = ["BEGIN", "END", "FigureError", "Row", "read_documents", "render", "rewrite", "rows_of", "updated"]

BEGIN = "<!-- figures: begin (written by `make bench`; what is changed by hand stays until the benchmark is run) -->"
END = "<!-- figures: end -->"
HEADINGS = ("what", "wanted", "figure", "met", "benchmark", "date", "processor")
NOT_RUN = "not run"
_CELL = re.compile(r"(?<!\\)\|")


class FigureError(FxoptError):
    """A page without the table, or a result that cannot be read."""


@dataclass(frozen=True)
class Row:
    """One line of the table, its fields in the order of the columns."""

    what: str
    wanted: str
    figure: str = NOT_RUN
    met: str = ""
    benchmark: str = ""
    date: str = ""
    processor: str = ""


def read_documents(folder: Path) -> dict[str, Document]:
    """What the benchmarks printed, by the name of the file without its ending.

    Raises:
        FigureError: If a file holds no JSON, or that of another benchmark.
    """
    found: dict[str, Document] = {}
    for path in sorted(folder.glob("*.json")):
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            name = document["benchmark"]
        except (ValueError, LookupError, TypeError) as failure:
            raise FigureError(f"{path} is not what a benchmark prints; remove it and run `make bench`.") from failure
        if name != path.stem.partition("-")[0]:
            raise FigureError(f"{path} holds figures of {name!r}; remove it and run `make bench`.")
        found[path.stem] = document
    return found


def rows_of(page: str) -> dict[tuple[str, str], Row]:
    """The rows that stand in a page, by benchmark and what they are about.

    Raises:
        FigureError: If the page has no table, or a row of it has not seven cells.
    """
    _, table, _ = _parts(page)
    rows = {}
    for line in table.splitlines()[2:]:
        cells = [cell.strip().replace("\\|", "|") for cell in _CELL.split(line.strip())[1:-1]]
        if len(cells) != len(HEADINGS):
            raise FigureError(f"A row of the table of figures needs {len(HEADINGS)} cells: {line!r}.")
        row = Row(*cells)
        rows[row.benchmark, row.what] = row
    return rows


def updated(
    bars: Sequence[Bar],
    documents: Mapping[str, Document],
    old: Mapping[tuple[str, str], Row],
    say: Callable[[str], None],
) -> list[Row]:
    """A row for each bar: from its document, or as it stood where there is none.

    Args:
        bars: What is wanted.
        documents: What benchmarks printed, by name.
        old: The rows that stand in the page.
        say: Is told of figures that a document lacks.
    """
    rows = []
    for bar in bars:
        stood = old.get((bar.benchmark, bar.what), Row(bar.what, "", benchmark=bar.benchmark))
        row = Row(bar.what, bar.wanted.text, stood.figure, stood.met, bar.benchmark, stood.date, stood.processor)
        document = documents.get(bar.benchmark)
        if document is not None:
            try:
                row = _measured(bar, document)
            except LookupError as failure:
                say(f"{bar.benchmark} has nothing about {bar.what!r} ({failure}): its row stays as it is.")
        rows.append(row)
    return rows


def _measured(bar: Bar, document: Document) -> Row:
    found = bar.of(document)
    told = {None: "", True: "yes", False: "no"}[bar.met(found)]
    environment = document["environment"]
    date = environment["date"].partition("T")[0]
    return Row(bar.what, bar.wanted.text, found.text, told, bar.benchmark, date, environment["processor"])


def render(rows: Sequence[Row]) -> str:
    """The table in Markdown."""
    lines = [HEADINGS, ("---",) * len(HEADINGS)]
    lines += [tuple(cell.replace("|", "\\|") for cell in astuple(row)) for row in rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def rewrite(
    page: Path, bars: Sequence[Bar], documents: Mapping[str, Document], say: Callable[[str], None]
) -> list[Row]:
    """Bring the table in a page up to date; the rest of the page stays, and the page is replaced as a whole.

    Returns:
        The rows of the table.

    Raises:
        FigureError: If the page has no table, or cannot be written; it is left as it was.
    """
    text = page.read_text(encoding="utf-8")
    before, _, after = _parts(text)
    rows = updated(bars, documents, rows_of(text), say)
    write_text(page, f"{before}{render(rows)}{after}", FigureError)
    return rows


def _parts(page: str) -> tuple[str, str, str]:
    """What stands before the table, with its mark; the table; and what stands behind it."""
    if page.count(BEGIN) != 1 or page.count(END) != 1 or page.index(BEGIN) > page.index(END):
        raise FigureError(f"The page needs the lines {BEGIN!r} and {END!r} around the table of figures, each once.")
    start, stop = page.index(BEGIN) + len(BEGIN), page.index(END)
    return f"{page[:start]}\n\n", page[start:stop].strip(), f"\n{page[stop:]}"
