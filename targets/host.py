"""The machine that fxopt runs on: a target whose figures are measured here.

Operators of a standard sweep, and those of the workload at hand, are timed one by one; a linear model for each kind is
fitted to the times, with a correction factor for each family of operators that was measured. Times stay on disk, by
machine and runtime, so this happens once.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from fxopt.decisions import Capabilities
from fxopt.errors import TargetError
from fxopt.targets._core import CostModel
from fxopt.targets._fit import families_of, fit, held_out_errors
from fxopt.targets._sweep import calibration_sweep
from fxopt.targets._table import MeasurementTable, cache_folder, distinct
from fxopt.targets.base import Target, TargetInfo
from fxopt.targets.rows import FLOAT_BITS, OpKind, Rows, Workload, compute_bits

__all__ = ["HostTarget", "Profiler", "Progress"]

Profiler: TypeAlias = Callable[[Rows], NDArray[np.float64]]
"""Takes rows, shape (n,), gives seconds for each, shape (n,); NaN for an operator that it cannot run."""

Progress: TypeAlias = Callable[[int, int, str], None]
"""Told after each measurement: how many are done, of how many, and what was measured."""

CAPABILITIES = Capabilities(bits={"*": ((FLOAT_BITS, FLOAT_BITS), (8, 8))}, channel_tile=8, batch=1)
_MOST_PER_FAMILY = 4


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

    def calibrate(self) -> None:
        """Measure what is missing of the standard sweep.

        Raises:
            TargetError: If something is missing and there is no profiler, or the profiler gives nonsense.
        """
        self._measure(calibration_sweep(), "the standard sweep")

    def prepare(self, workload: Workload) -> None:
        """Measure operators of ``workload`` whose families are not in the table, at most four of each family.

        Raises:
            TargetError: If something is missing and there is no profiler, or the profiler gives nonsense.
        """
        self.calibrate()
        rows = np.ravel(workload.rows)
        rows = distinct(rows[(rows["kind"] != OpKind.UNKNOWN) & (rows["fused"] == 0)])
        tried, _ = self._measured()
        fresh = rows[~np.isin(families_of(rows), families_of(tried))]
        keys = families_of(fresh)
        kept = [np.flatnonzero(keys == key)[:_MOST_PER_FAMILY] for key in dict.fromkeys(keys.tolist())]
        if kept:
            self._measure(fresh[np.sort(np.concatenate(kept))], "this workload")

    def __reduce__(self) -> tuple[type[HostTarget], tuple[object, ...]]:
        """Pickle by the constructor's arguments; the table is read again."""
        table = self._table
        where = (table.fingerprint, self._progress, table.path.parent) if table else (None, self._progress, None)
        return (HostTarget, (self._profiler, *where))

    def __repr__(self) -> str:
        return f"<target host: {len(self._table) if self._table else 0} operators measured>"

    def _measured(self) -> tuple[Rows, NDArray[np.float64]]:
        if self._table is None:
            raise TargetError(
                "The host target has nothing measured: give load('host', ...) a profiler and a fingerprint."
            )
        return self._table.measured()

    def _measure(self, rows: Rows, what: str) -> None:
        """Time those of ``rows`` that are not in the table, one by one, each kept at once."""
        missing = self._table.missing(rows) if self._table else rows
        if not len(missing):
            return
        if self._profiler is None or self._table is None:
            raise TargetError(
                f"The host target has to measure {len(missing)} operators of {what} and has no profiler. "
                "Call load('host', profiler=..., fingerprint=...), or use fxopt.optimize, which brings its own."
            )
        for i in range(len(missing)):
            row = missing[i : i + 1]
            self._table.add(row[0], _checked(self._profiler(row), row))
            self._model = self._error = None
            if self._progress:
                self._progress(i + 1, len(missing), _words(row))

    def _describe_error(self) -> str:
        if self._table is None:
            return "Nothing measured yet."
        if self._error is None:
            self._error = _summary(*self._table.measured())
        return self._error


def _checked(seconds: NDArray[np.float64], row: Rows) -> float:
    """The one time in a profiler's answer; NaN stands for an operator that it cannot run."""
    times = np.asarray(seconds, np.float64)
    if times.shape != (1,) or not (np.isnan(times[0]) or 0.0 < times[0] < np.inf):
        raise TargetError(
            f"The profiler gave {seconds!r} for {_words(row)}; one time above 0, or NaN, is wanted for each row."
        )
    return float(times[0])


def _words(row: Rows) -> str:
    kind = OpKind(int(row["kind"][0])).name.lower()
    c, k, height, width, kernel, stride = (
        int(row[name][0]) for name in ("c", "k", "out_h", "out_w", "kernel_h", "stride_h")
    )
    return f"{kind} {c}->{k} at {height}x{width}, kernel {kernel}, stride {stride}, {int(compute_bits(row)[0])} bits"


def _summary(rows: Rows, seconds: NDArray[np.float64]) -> str:
    errors = held_out_errors(rows, seconds) if len(rows) else np.empty(0, np.float64)
    if not errors.size:
        return f"{len(rows)} operators measured, too few to hold some out." if len(rows) else "Nothing measured yet."
    return (
        f"Of {len(rows)} operators measured, half predict the other half ({errors.size}) within "
        f"{np.median(errors):.0%} in the median and {np.quantile(errors, 0.9):.0%} for nine in ten."
    )
