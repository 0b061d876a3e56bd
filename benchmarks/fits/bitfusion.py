"""The one fitted figure of BitFusion: static power, by least squares on relative errors of published energies.

Everything else stands in the sources of the preset. Run from benchmarks/: ``python -m fits.bitfusion FOLDER``.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from accuracy._costs import costs, model, points

from fxopt.targets.rows import Floats, OpKind, Rows, default_rows

__all__ = ["Operators", "fit", "operators"]


class Operators(NamedTuple):
    """Published operators: rows, seconds, joules."""

    rows: Rows
    latency_s: Floats
    energy_j: Floats


def operators(path: Path) -> Operators:
    """The operators of a table: pointwise and depthwise convolutions at batch 1."""
    table = points(path)
    column = {name: np.array([int(point[name]) for point in table]) for name in list(table[0])[:9]}
    rows = default_rows(len(table))
    rows["kind"] = np.where(column["groups"] > 1, OpKind.DEPTHWISE, OpKind.CONV)
    rows["c"], rows["k"], rows["groups"] = column["in_channels"], column["out_channels"], column["groups"]
    size = (column["in_size"] + 2 * column["padding"] - column["kernel"]) // column["stride"] + 1
    for axis in "hw":
        rows[f"in_{axis}"], rows[f"out_{axis}"] = column["in_size"], size
        rows[f"kernel_{axis}"], rows[f"stride_{axis}"] = column["kernel"], column["stride"]
    rows["weight_bits"] = column["weight_bits"]
    rows["activation_bits"] = rows["output_bits"] = column["activation_bits"]
    latency = np.array([float(point["latency_ms"]) for point in table]) * 1e-3
    return Operators(rows, latency, np.array([float(point["energy_mj"]) for point in table]) * 1e-3)


def fit(found: Operators) -> float:
    """Static power in W."""
    latency, dynamic = costs(model("bitfusion", static_power=0.0), found.rows)
    weight, missing = latency / found.energy_j, 1.0 - dynamic / found.energy_j
    return float(weight @ missing / (weight @ weight))


if __name__ == "__main__":
    print(f"static_power {fit(operators(Path(sys.argv[1]) / 'bitfusion_operators_sample.csv')) * 1e3:.1f} mW")
