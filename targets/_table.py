"""Measured times of operators, kept on disk so that a machine is measured once."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs

from fxopt import _files
from fxopt.errors import TargetError
from fxopt.targets.rows import ROW_DTYPE, Floats, Rows

__all__ = ["MeasurementTable", "cache_folder", "distinct"]

SCHEMA = 4
_INTEGERS = [name for name in ROW_DTYPE.names or () if ROW_DTYPE[name] == np.int32]


def cache_folder() -> Path:
    """Folder of all tables: the environment variable FXOPT_CACHE_DIR, or the user's cache folder."""
    return Path(os.environ.get("FXOPT_CACHE_DIR") or platformdirs.user_cache_dir("fxopt"))


def distinct(rows: Rows) -> Rows:
    """The different operators among ``rows``, shape (n,), in order of first appearance.

    What does not change a measured time is set to one value: whether the row is fused, densities, amounts.
    """
    flat = np.ravel(rows)
    # Rows are compared by their bytes, of which those between fields are nobody's: they stay zero here.
    plain = np.zeros(len(flat), ROW_DTYPE)
    for name in ROW_DTYPE.names or ():
        plain[name] = flat[name]
    plain["fused"] = plain["reused"] = 0
    plain["weight_density"] = plain["activation_density"] = 1.0
    plain["held"] = plain["live_bytes"] = plain["position_bytes"] = 0.0
    _, first = np.unique(plain.view(np.dtype((np.void, ROW_DTYPE.itemsize))), return_index=True)
    return plain[np.sort(first)]


class MeasurementTable:
    """Seconds by operator for one machine and runtime, in a JSON file.

    Every :meth:`add` writes the file whole, so an interrupted sweep goes on where it stopped.

    Args:
        fingerprint: What tells this machine and runtime from others.
        folder: Folder of the file.

    Raises:
        TargetError: If the file is there and is not such a table.
    """

    def __init__(self, fingerprint: str, folder: Path) -> None:
        digest = hashlib.sha256(f"{SCHEMA} {fingerprint}".encode()).hexdigest()[:16]
        self.fingerprint = fingerprint
        self.path = folder / f"host-{digest}.json"
        self._seconds: dict[tuple[int, ...], float | None] = {}
        if self.path.exists():
            self._seconds = _read(self.path)

    def __len__(self) -> int:
        """Number of operators that were tried."""
        return len(self._seconds)

    def seconds_of(self, row: Any) -> float | None:
        """The time of one operator, None if it was not tried or cannot be measured."""
        return self._seconds.get(_signature(row))

    def missing(self, rows: Rows) -> Rows:
        """Those of ``rows`` (distinct ones) that were not tried yet."""
        return rows[[_signature(row) not in self._seconds for row in rows]]

    def add(self, rows: Rows, seconds: Floats) -> None:
        """Keep the times of some operators, NaN for what cannot be measured, and write the file.

        Raises:
            TargetError: If the file cannot be written.
        """
        for row, time in zip(rows, seconds.tolist(), strict=True):
            self._seconds[_signature(row)] = None if math.isnan(time) else time
        content = {
            "schema": SCHEMA,
            "fingerprint": self.fingerprint,
            "fields": _INTEGERS,
            "rows": [[*signature, seconds] for signature, seconds in self._seconds.items()],
        }
        _files.write_text(self.path, json.dumps(content), TargetError)

    def measured(self, first: int | None = None) -> tuple[Rows, Floats]:
        """Rows that have a time, and their seconds, in an order that does not depend on when they were measured.

        Args:
            first: How many, of those that were tried first; None for all.
        """
        tried = itertools.islice(self._seconds.items(), first)
        known = sorted((key, seconds) for key, seconds in tried if seconds is not None)
        rows = np.zeros(len(known), ROW_DTYPE)
        for name, values in zip(_INTEGERS, zip(*(key for key, _ in known), strict=True), strict=False):
            rows[name] = values
        rows["weight_density"] = rows["activation_density"] = 1.0
        return rows, np.array([seconds for _, seconds in known], np.float64)


def _signature(row: Any) -> tuple[int, ...]:
    return tuple(int(row[name]) for name in _INTEGERS)


def _read(path: Path) -> dict[tuple[int, ...], float | None]:
    try:
        entries = _parse(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as failure:
        entries, reason = None, str(failure)
    else:
        reason = "another schema or malformed rows"
    if entries is None:
        raise TargetError(f"The table of measured times {path} cannot be read ({reason}). Delete it to measure anew.")
    return entries


def _parse(content: Any) -> dict[tuple[int, ...], float | None] | None:
    """The entries of a table, or None if it is not one."""
    if content["schema"] != SCHEMA or content["fields"] != _INTEGERS:
        return None
    entries = {tuple(int(value) for value in entry[:-1]): entry[-1] for entry in content["rows"]}
    sound = all(len(key) == len(_INTEGERS) and _is_time(seconds) for key, seconds in entries.items())
    return entries if sound else None


def _is_time(seconds: object) -> bool:
    return seconds is None or (isinstance(seconds, float) and 0.0 < seconds < math.inf)
