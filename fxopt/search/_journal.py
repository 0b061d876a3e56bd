"""The journal that makes a search resumable: one JSON line per trial, on disk before the next begins."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

import fxopt
from fxopt._files import locked
from fxopt.decisions import Policy
from fxopt.errors import JournalError, PolicyError
from fxopt.search._engine import Engine
from fxopt.search._trial import Trial

__all__ = ["JOURNAL_SCHEMA", "Journal", "journal_header", "read_journal"]

JOURNAL_SCHEMA = 1
"""The version of the journal's form that this release writes and reads."""

_COMPARED = ("space", "constraint", "engine", "options", "seed", "parallel", "context")
_TRIAL_FIELDS = {"trial", "status", "score", "error", "cached", "elapsed_s", "policy"}


def journal_header(engine: Engine, parallel: int, context: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What identifies a search: its space, budget, engine, options, seed, number of parallel trials and context."""
    constraint = engine.constraint
    limits = None if constraint is None else dict(zip(constraint.metrics, constraint.limits.tolist(), strict=True))
    return {
        "journal": "fxopt.search",
        "schema": JOURNAL_SCHEMA,
        "space": engine.space.fingerprint,
        "constraint": limits,
        "engine": engine.name,
        "options": engine.options,
        "seed": engine.seed,
        "parallel": parallel,
        "context": dict(context or {}),
        "versions": {"fxopt": fxopt.__version__, "numpy": np.__version__, "python": platform.python_version()},
    }


def read_journal(path: str | os.PathLike[str]) -> tuple[dict[str, Any], tuple[Trial, ...]]:
    """The header and the trials of a journal; a last line that was cut short is left out.

    Raises:
        JournalError: If the file cannot be read or is no journal of this schema version.
    """
    file = Path(path)
    try:
        content = file.read_bytes()
    except OSError as failure:
        raise JournalError(f"Cannot read the journal {file}: {failure.strerror}.") from failure
    parsed = _parse(file, content)
    if parsed.header is None:
        raise JournalError(f"{file} holds no search journal: it is empty or was cut short in its first line.")
    return parsed.header, parsed.trials


class Journal:
    """A journal open for a search; a context manager.

    Opening reads what is there, checks that it belongs to the search, drops a last line that was cut
    short, and locks the file against other processes.

    Args:
        path: The file; its folder is made if need be.
        header: What :func:`journal_header` gave for the search.

    Attributes:
        path: The file.
        trials: The trials that the file held when it was opened.

    Raises:
        JournalError: If the file cannot be written, is in use, is no journal, or belongs to another search.
    """

    def __init__(self, path: str | os.PathLike[str], header: Mapping[str, Any]) -> None:
        self.path = Path(path)
        first_line = _line(self.path, header)
        self._file = _open_locked(self.path)
        try:
            self.trials = self._take_over(first_line)
        except OSError as failure:
            self._file.close()
            raise JournalError(_cannot_write(self.path, failure)) from failure
        except JournalError:
            self._file.close()
            raise

    def __enter__(self) -> Journal:
        """The journal."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file and with it the lock."""
        self._file.close()

    def append(self, trial: Trial) -> None:
        """Write a trial; it is on disk when this returns.

        Raises:
            JournalError: If it cannot be written; what was written before is safe.
        """
        line = _line(self.path, _trial_data(trial))
        try:
            self._write(line)
        except OSError as failure:
            raise JournalError(
                f"{_cannot_write(self.path, failure)} The {trial.number} trials before are safe; "
                "run the search again to go on from there."
            ) from failure

    def _take_over(self, first_line: bytes) -> tuple[Trial, ...]:
        content = self._file.readall()
        if first_line.startswith(content):
            # A new file, or one that was cut short in the middle of its first line.
            self._file.truncate(0)
            self._file.seek(0)
            self._write(first_line)
            return ()
        parsed = _parse(self.path, content)
        if parsed.header is None:
            raise JournalError(_not_a_journal(self.path))
        _check_same_search(self.path, parsed.header, json.loads(first_line))
        self._file.truncate(parsed.length)
        self._file.seek(parsed.length)
        return parsed.trials

    def _write(self, line: bytes) -> None:
        rest = memoryview(line)
        while rest:
            rest = rest[self._file.write(rest) :]
        os.fsync(self._file.fileno())


@dataclass(frozen=True)
class _Parsed:
    """A journal's content: its header, if whole, its trials, and how many bytes of it are good."""

    header: dict[str, Any] | None
    trials: tuple[Trial, ...]
    length: int


def _parse(path: Path, content: bytes) -> _Parsed:
    *lines, tail = content.split(b"\n")
    if lines and not tail and _as_object(lines[-1]) is None:
        # Space that was reserved and never written, after a crash of the machine: the line was cut short too.
        lines.pop()
    if not lines:
        return _Parsed(None, (), 0)
    header = _as_object(lines[0])
    if header is None or header.get("journal") != "fxopt.search":
        raise JournalError(_not_a_journal(path))
    if header.get("schema") != JOURNAL_SCHEMA:
        raise JournalError(
            f"{path} has journal schema {header.get('schema')!r} and this release of fxopt reads {JOURNAL_SCHEMA}. "
            "Resume it with the release that wrote it, or start a new journal."
        )
    trials = tuple(_parse_trial(path, number, line) for number, line in enumerate(lines[1:]))
    return _Parsed(header, trials, sum(len(line) + 1 for line in lines))


def _parse_trial(path: Path, number: int, line: bytes) -> Trial:
    data = _as_object(line)
    where = f"{path}, line {number + 2}"
    advice = "The file was edited or damaged: keep only the lines before to resume from there, or start anew"
    if data is None or not set(data) >= _TRIAL_FIELDS or data["trial"] != number:
        raise JournalError(f"{where} is not trial {number} of a search. {advice}.")
    try:
        policy = Policy.from_data(data["policy"])
    except PolicyError as failure:
        raise JournalError(f"{where}: {failure} {advice}.") from failure
    score = data["score"]
    is_score = isinstance(score, (int, float)) and not isinstance(score, bool) and math.isfinite(score)
    if (data["status"] != "ok" or not is_score) and (data["status"] != "failed" or score is not None):
        raise JournalError(f"{where} has the status {data['status']!r} and the score {score!r}. {advice}.")
    return Trial(
        number=number,
        policy=policy,
        score=None if score is None else float(score),
        error=None if data["error"] is None else str(data["error"]),
        cached=bool(data["cached"]),
        elapsed_s=float(data["elapsed_s"]),
    )


def _trial_data(trial: Trial) -> dict[str, Any]:
    return {
        "trial": trial.number,
        "status": "failed" if trial.failed else "ok",
        "score": trial.score,
        "error": trial.error,
        "cached": trial.cached,
        "elapsed_s": round(trial.elapsed_s, 6),
        "policy": trial.policy.to_data(),
    }


def _as_object(line: bytes) -> dict[str, Any] | None:
    try:
        data = json.loads(line)
    except ValueError:
        return None
    return data if isinstance(data, dict) else None


def _line(path: Path, data: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(data, allow_nan=False).encode() + b"\n"
    except (TypeError, ValueError) as failure:
        raise JournalError(f"{path}: an engine's options have to be JSON-ready data: {failure}.") from failure


def _check_same_search(path: Path, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    there, here = (_flat({name: header.get(name) for name in _COMPARED}) for header in (there, here))
    different = [name for name in dict.fromkeys((*here, *there)) if there.get(name) != here.get(name)]
    if not different:
        return
    details = "; ".join(f"{name}: {there.get(name)!r} in the journal, {here.get(name)!r} now" for name in different)
    raise JournalError(
        f"{path} is the journal of another search ({details}). Search with the journal's own settings to resume it, "
        "or give another file to start anew."
    )


def _flat(header: Mapping[str, Any]) -> dict[str, Any]:
    """A header whose context is spread out: its entries stand for themselves."""
    context = header.get("context") or {}
    return {**{name: value for name, value in header.items() if name != "context"}, **context}


def _open_locked(path: Path) -> FileIO:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = FileIO(os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666), "r+b")
    except OSError as failure:
        raise JournalError(_cannot_write(path, failure)) from failure
    if locked(file.fileno()) is False:
        file.close()
        raise JournalError(f"{path} is in use by another search; wait for it, or give another file.")
    return file


def _not_a_journal(path: Path) -> str:
    return f"{path} exists and is no search journal; it was left alone. Give another file."


def _cannot_write(path: Path, failure: OSError) -> str:
    reason = failure.strerror or str(failure)
    return f"Cannot write the journal {path}: {reason}. Give a file in a folder that is writable and has space."
