"""The machine that fxopt runs on: a target whose figures are measured here.

Operators of a standard sweep, and those of the workload at hand, are timed; a linear model for each kind is fitted to
the times, with a correction factor for each family of operators that was measured. Times stay on disk, by machine and
runtime, so this happens once.
"""

from __future__ import annotations

import copy
import datetime
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from fxopt import _files
from fxopt.decisions import Capabilities
from fxopt.errors import TargetError
from fxopt.targets._board import board_file, check_board, describe_errors
from fxopt.targets._core import CostModel
from fxopt.targets._fit import families_of, fit
from fxopt.targets._sweep import calibration_sweep, pace_row
from fxopt.targets._table import MeasurementTable, cache_folder, distinct
from fxopt.targets.base import Target, TargetInfo
from fxopt.targets.rows import FLOAT_BITS, Activation, Floats, OpKind, Rows, Workload, compute_bits

__all__ = ["HostTarget", "Profiler", "Progress", "check_board"]

Profiler: TypeAlias = Callable[[Rows], NDArray[np.float64]]
"""Takes rows, shape (n,), gives seconds for each, shape (n,); NaN for an operator that it cannot run."""

Progress: TypeAlias = Callable[[int, int, str], None]
"""Told after each measurement: how many are done, of how many, and what was measured."""

CAPABILITIES = Capabilities(bits={"*": ((FLOAT_BITS, FLOAT_BITS), (8, 8))}, channel_tile=8, batch=1)
_MOST_PER_FAMILY = 4
_AT_ONCE = 12


class HostTarget(Target):
    """This machine, measured.

    :meth:`prepare` measures what a workload needs: the standard sweep first, where it is not complete, then operators
    of families (kind, kernel, stride, sizes, bits) that are not in the table. An interrupted run loses nothing.

    Args:
        profiler: Times operators. Without it, what is on disk has to do.
        fingerprint: Tells this machine, runtime and thread count from others. Without it there is no table.
        progress: Told how far measuring is.
        folder: Folder of the table; by default the environment variable FXOPT_CACHE_DIR or the user's cache folder.

    Raises:
        TargetError: If there is a profiler and no fingerprint, or the table on disk cannot be read.
    """

    def __init__(
        self,
        profiler: Profiler | None = None,
        fingerprint: str | None = None,
        progress: Progress | None = None,
        folder: Path | None = None,
    ) -> None:
        if profiler is not None and not fingerprint:
            raise TargetError("A profiler needs a fingerprint of machine and runtime, or times of others would mix in.")
        self._profiler = profiler
        self._progress = progress
        self._table = MeasurementTable(fingerprint, folder or cache_folder()) if fingerprint else None
        self._model: CostModel | None = None
        self._error: str | None = None
        self._record: _Record | None = None
        self._known: int | None = None

    def recorded(self, path: Path) -> HostTarget:
        """This machine as a run knows it that can be resumed.

        What is measured on the way changes what was fitted before. So a file keeps how many operators were known at
        each :meth:`prepare`, and a run with the same file sees at each of them what the one before it saw.

        Args:
            path: The file; written whole or not at all.

        Raises:
            TargetError: If it cannot be read, or, later, written.
        """
        found = copy.copy(self)
        found._table, found._record = self._table, _Record(path)
        return found

    @property
    def info(self) -> TargetInfo:
        """What the target says of itself; the error is that on operators held out of the fit."""
        return TargetInfo(
            name="host",
            title="This machine, one operator at a time",
            family="measured",
            fuses=True,
            status="measured",
            error=self._describe_error(),
            calibrated_bits=(8, FLOAT_BITS),
            capabilities=CAPABILITIES,
            energy_reason="time is measured on this machine, energy is not.",
            sources={"table": f"times of {len(self._table)} operators in {self._table.path}"} if self._table else {},
        )

    @property
    def model(self) -> CostModel:
        """The model fitted to everything in the table; completes the standard sweep first.

        Raises:
            TargetError: If something has to be measured and there is no profiler.
        """
        self.calibrate()
        if self._model is None:
            rows, seconds = self._measured()
            if not len(rows):
                raise TargetError("The profiler could not run a single operator of the sweep; see that it works.")
            self._model = fit(rows, seconds)
        return self._model

    def calibrate(self, *, quick: bool = False) -> None:
        """Measure what is missing of the standard sweep.

        Args:
            quick: Every second operator of it is enough.

        Raises:
            TargetError: If something is missing and there is no profiler, or the profiler gives nonsense.
        """
        self._measure(calibration_sweep()[:: 2 if quick else 1], "the standard sweep")

    def save(self, path: str | os.PathLike[str], name: str | None = None) -> Path:
        """Write what was measured as a target file, which loads anywhere: ``fxopt.targets.load(path)``.

        The file predicts operators that were not measured by the fit alone; it has no factors for families.

        Args:
            path: A ``.toml`` file; written whole or not at all.
            name: The target's name; by default that of the file.

        Raises:
            TargetError: If nothing was measured, or the path or name is not sound.
        """
        final, known_as = check_board(path, name)
        rows, seconds = self._measured()
        fingerprint = self._table.fingerprint if self._table else ""
        text = board_file(known_as, fingerprint, rows, seconds, datetime.date.today())
        _files.write_text(final, text, TargetError)
        return final

    @property
    def pace_s(self) -> float:
        """Seconds of the operator that all others were timed beside, when it was first measured.

        Raises:
            TargetError: If it was not measured yet.
        """
        found = self._table.seconds_of(pace_row()[0]) if self._table else None
        if found is None:
            raise TargetError("The pace of this machine is not known yet: calibrate it first.")
        return found

    def prepare(self, workload: Workload) -> None:
        """Measure operators of ``workload`` whose families are not in the table, at most four of each family.

        Raises:
            TargetError: If something is missing and there is no profiler, or the profiler gives nonsense.
        """
        self.calibrate()
        total = 0 if self._table is None else len(self._table)
        known = None if self._record is None else self._record.next(total)
        if known != self._known:
            self._known, self._model, self._error = known, None, None
        if known is not None:
            return
        self._measure_families(workload)
        if self._record is not None and self._table is not None:
            self._record.add(len(self._table))

    def _measure_families(self, workload: Workload) -> None:
        rows = np.ravel(workload.rows)
        merged = (rows["fused"] == 1) & (rows["activation"] != Activation.CURVE)
        rows = distinct(rows[(rows["kind"] != OpKind.UNKNOWN) & ~merged])
        tried, _ = self._measured()
        fresh = rows[~np.isin(families_of(rows), families_of(tried))]
        keys = families_of(fresh)
        kept = [np.flatnonzero(keys == key)[:_MOST_PER_FAMILY] for key in dict.fromkeys(keys.tolist())]
        if kept:
            self._measure(fresh[np.sort(np.concatenate(kept))], "this workload")

    def __reduce__(self) -> tuple[type[HostTarget], tuple[object, ...]]:
        """Pickle by the constructor's arguments; the table is read again."""
        table = self._table
        where = (
            (table.fingerprint, self._progress, table.path.parent)
            if table is not None
            else (None, self._progress, None)
        )
        return (HostTarget, (self._profiler, *where))

    def __repr__(self) -> str:
        return f"<target host: {len(self._table) if self._table else 0} operators measured>"

    def _measured(self) -> tuple[Rows, NDArray[np.float64]]:
        if self._table is None:
            raise TargetError(
                "The host target has nothing measured: give load('host', ...) a profiler and a fingerprint."
            )
        return self._table.measured(self._known)

    def _measure(self, rows: Rows, what: str) -> None:
        """Time those of ``rows`` that are not in the table, some at a time, each kept at once."""
        missing = self._table.missing(rows) if self._table else rows
        if not len(missing):
            return
        if self._profiler is None or self._table is None:
            raise TargetError(
                f"The host target has to measure {len(missing)} operators of {what} and has no profiler. "
                "Call load('host', profiler=..., fingerprint=...), or use fxopt.optimize, which brings its own."
            )
        for start in range(0, len(missing), _AT_ONCE):
            some = missing[start : start + _AT_ONCE]
            self._table.add(*_paced(self._profiler, self._table, some))
            self._model = self._error = None
            for i in range(len(some)):
                if self._progress:
                    self._progress(start + i + 1, len(missing), _words(some[i : i + 1]))

    def _describe_error(self) -> str:
        if self._table is None:
            return "Nothing measured yet."
        if self._error is None:
            self._error = describe_errors(*self._measured(), by_family=True)
        return self._error


class _Record:
    """How many operators were known at each step of a run.

    Args:
        path: The file that keeps it.

    Raises:
        TargetError: If it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._step = path, 0
        self._counts: list[int] = []
        if not path.exists():
            return
        try:
            self._counts = [int(count) for count in json.loads(path.read_text(encoding="utf-8"))]
        except (OSError, ValueError, TypeError) as failure:
            raise TargetError(f"{path} cannot be read ({failure}). Delete it; the run is then another one.") from None

    def next(self, total: int) -> int | None:
        """How many were known at this step; None if it was not reached, or the table, now of ``total``, is another."""
        found = self._counts[self._step] if self._step < len(self._counts) else None
        if found is None or found > total:
            del self._counts[self._step :]
            return None
        self._step += 1
        return found

    def add(self, count: int) -> None:
        """Note the next step.

        Raises:
            TargetError: If it cannot be written.
        """
        self._counts.append(count)
        self._step += 1
        self._path.parent.mkdir(parents=True, exist_ok=True)
        _files.write_text(self._path, json.dumps(self._counts), TargetError)


def _paced(profiler: Profiler, table: MeasurementTable, rows: Rows) -> tuple[Rows, Floats]:
    """What to keep of ``rows``: times at the pace that the machine had when it was first measured.

    A machine is slower while others use it. One operator is timed before, among and after the others; by as much as it
    takes longer than the first time, by so much are times put right.
    """
    pace = pace_row()
    asked = np.concatenate([pace, rows[::2], pace, rows[1::2], pace])
    times = _checked(profiler(asked), asked)
    at = [0, (len(rows) + 1) // 2 + 1, len(asked) - 1]
    found = np.empty(len(rows), np.float64)
    found[::2], found[1::2] = times[1 : at[1]], times[at[1] + 1 : -1]
    now, first = float(times[at].mean()), table.seconds_of(pace[0])
    if np.isnan(now):
        return rows, found
    if first is None:
        return np.concatenate([rows, pace]), np.append(found, now)
    return rows, found * (first / now)


def _checked(seconds: NDArray[np.float64], rows: Rows) -> Floats:
    """A profiler's answer; NaN stands for an operator that it cannot run."""
    times = np.asarray(seconds, np.float64)
    if times.shape != rows.shape:
        raise TargetError(f"The profiler gave {seconds!r} for {len(rows)} rows; one time for each row is wanted.")
    wrong = np.flatnonzero(~(np.isnan(times) | ((times > 0.0) & (times < np.inf))))
    if wrong.size:
        raise TargetError(
            f"The profiler gave {times[wrong[0]]!r} for {_words(rows[wrong[:1]])}; a time above 0, or NaN, is wanted."
        )
    return times


def _words(row: Rows) -> str:
    kind = OpKind(int(row["kind"][0])).name.lower()
    c, k, height, width, kernel, stride = (
        int(row[name][0]) for name in ("c", "k", "out_h", "out_w", "kernel_h", "stride_h")
    )
    return f"{kind} {c}->{k} at {height}x{width}, kernel {kernel}, stride {stride}, {int(compute_bits(row)[0])} bits"
