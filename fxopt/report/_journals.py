"""Reports and journals that lie in a folder: a saved report, with what other engines found on the same problem."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from fxopt._files import JOURNAL, REPORT
from fxopt.errors import FxoptError, JournalError
from fxopt.report._data import CurveLine, Report
from fxopt.search import best_so_far, read_journal

__all__ = ["curves_beside", "load"]

_SAME = ("space", "constraint", "context")
"""What two searches have to share for their scores to be compared."""


def load(folder: str | os.PathLike[str]) -> Report:
    """Read the report that ``OptimizationResult.save`` wrote, and what journals beside it tell of other engines.

    Args:
        folder: The folder.

    Returns:
        The report. ``curves`` has the searches of ``fxopt compare-engines`` that were run there on the same problem.

    Raises:
        FxoptError: If there is no report, or none that this release can read.
    """
    path = Path(folder) / REPORT
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as failure:
        reason = failure.strerror if isinstance(failure, OSError) else "it is no text"
        raise FxoptError(
            f"Cannot read {path}: {reason}. Give the folder that OptimizationResult.save or `fxopt optimize` wrote."
        ) from failure
    report = Report.from_json(text)
    found = curves_beside(folder)
    return dataclasses.replace(report, curves=found) if found else report


def curves_beside(folder: str | os.PathLike[str]) -> tuple[CurveLine, ...]:
    """What journals in a folder tell of other searches of the space that ``journal.jsonl`` is about, by name.

    Journals of another space, budget or data are left out, and so is what is no journal.
    """
    place = Path(folder)
    try:
        own, _ = read_journal(place / JOURNAL)
    except JournalError:
        return ()
    found = []
    for path in sorted(place.glob("*.jsonl")):
        if path.name == JOURNAL:
            continue
        try:
            header, trials = read_journal(path)
        except JournalError:
            continue
        if trials and all(header.get(name) == own.get(name) for name in _SAME):
            found.append(CurveLine(str(header["engine"]), int(header["seed"]), best_so_far(trials)))
    return tuple(found)
