"""A target file out of measured times: what ``fxopt calibrate`` writes.

Operators that were not measured are predicted by the linear model of :mod:`fxopt.targets.models.measured`, whose
coefficients are fitted to those that were, in float and in 8 bits each; the file holds the coefficients and no times.
What layouts cost is within the times: they are of operators as they stand between convolutions (see
:func:`fxopt.export.profiler.onnxruntime_profiler`).
"""

from __future__ import annotations

import datetime
import json
import os
import re
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import numpy as np

from fxopt.errors import TargetError
from fxopt.targets._fit import coefficients, held_out_errors
from fxopt.targets._presets import SCHEMA, builtin_presets
from fxopt.targets.rows import FLOAT_BITS, Floats, Rows, compute_bits

__all__ = ["board_file", "check_board", "describe_errors"]

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
_CHANNEL_TILE = 8


def check_board(path: str | os.PathLike[str], name: str | None) -> tuple[Path, str]:
    """The path of a target file and the name in it, by default that of the file.

    Raises:
        TargetError: If the file does not end in ``.toml`` or the name is no name, or a preset's.
    """
    final = Path(path)
    if final.suffix != ".toml":
        raise TargetError(f"{final} is no name of a target file; it has to end in .toml, as my_board.toml does.")
    chosen = final.stem if name is None else name
    if not _NAME.fullmatch(chosen):
        raise TargetError(f"{chosen!r} cannot name a target; use letters, digits, '.', '_' and '-', as in my_board.")
    if chosen == "host" or chosen in builtin_presets():
        raise TargetError(f"{chosen!r} is the name of a target that comes with fxopt; choose another.")
    return final, chosen


def board_file(name: str, fingerprint: str, rows: Rows, seconds: Floats, date: datetime.date) -> str:
    """The text of a target file.

    Args:
        name: The target's name.
        fingerprint: Machine and runtime that were measured, in words.
        rows: Measured operators, shape (n,).
        seconds: Their times, above 0.
        date: The day of the measurement.

    Raises:
        TargetError: If nothing was measured in float.
    """
    found = coefficients(rows, seconds) if len(rows) else {}
    widths = sorted({8 if bits <= 8 else FLOAT_BITS for bits in compute_bits(rows).tolist()})
    if FLOAT_BITS not in widths:
        raise TargetError("No operator in float could be measured; see that onnxruntime runs on this machine.")
    lines = [
        f"# Measured by fxopt calibrate on {date.isoformat()}.",
        "",
        f"schema = {SCHEMA}",
        f"name = {json.dumps(name)}",
        f"title = {json.dumps(fingerprint)}",
        'family = "measured"',
        "fuses = true",
        "",
        "[calibration]",
        'status = "measured"',
        f"bits = {widths}",
        f"error = {json.dumps(describe_errors(rows, seconds, by_family=False))}",
        "",
        "[capabilities]",
        f"channel_tile = {_CHANNEL_TILE}",
        "batch = 1",
        f'bits."*" = {[[bits, bits] for bits in reversed(widths)]}',
        "",
        "[energy]",
        'unavailable = "time was measured on this machine, energy was not."',
        "",
        "[sources]",
        f"fit = {json.dumps(_source(fingerprint, len(rows), date))}",
        *_figures(found),
    ]
    return "\n".join(lines) + "\n"


def describe_errors(rows: Rows, seconds: Floats, *, by_family: bool) -> str:
    """How well half of the measured operators predict the other half, in words."""
    errors = held_out_errors(rows, seconds, by_family=by_family) if len(rows) else np.empty(0, np.float64)
    if not errors.size:
        return f"{len(rows)} operators measured, too few to hold some out." if len(rows) else "Nothing measured yet."
    return (
        f"Of {len(rows)} operators measured, half predict the other half ({errors.size}) within "
        f"{np.median(errors):.0%} in the median and {np.quantile(errors, 0.9):.0%} for nine in ten."
    )


def _source(fingerprint: str, count: int, date: datetime.date) -> str:
    return (
        f"Non-negative fit of relative errors to the times of {count} operators, measured one by one on "
        f"{date.isoformat()}: {fingerprint}."
    )


def _figures(values: dict[str, float]) -> Iterator[str]:
    for table, names in groupby(sorted(values), key=lambda name: name.rpartition(".")[0]):
        yield from ("", f"[parameters.{table}]")
        for name in names:
            short = name.rpartition(".")[2]
            scale, unit = (1e6, "us") if short == "const" else (1e9, "ns/item")
            yield f'{short} = {{ value = {values[name] * scale:.6g}, unit = "{unit}", source = "fit" }}'
