"""A plain NumPy twin of fxopt/targets/models/npu.pyx, and figures to run both with."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fxopt.targets import rows as r
from fxopt.targets.rows import Activation, Floats, OpKind, Rows

__all__ = ["VALUES", "latency", "precision"]

Values = Mapping[str, float]

VALUES: Values = {
    **{"run": 7e-5, "grouped": 3.0, "dilated": 2.5},
    **{"float.dense": 9e-14, "float.volume": 12e-14, "float.depthwise": 25e-14, "float.element": 1.2e-11},
    **{"float.stem": 1.5e-10, "float.resize": 2e-10, "float.moved": 5e-11, "float.weight": 6e-12},
    **{"float.matmul": 2e-5, "float.operator": 3e-7, "float.arithmetic": 1e-12},
    **{"w8a16.of_float": 0.6, "w8a16.operator": 1e-6, "w8a16.dense": 1e-14},
    **{"w8a8.dense": 3e-14, "w8a8.depthwise": 1.5e-12, "w8a8.arithmetic": 8e-12, "w8a8.moved": 1e-11},
    **{"w8a8.matmul": 1e-4, "w8a8.operator": 2e-6},
}
WEIGHTED = (OpKind.CONV, OpKind.DEPTHWISE, OpKind.LINEAR)


def precision(row: np.void) -> str:
    if row["activation_bits"] > 16 or (row["kind"] in WEIGHTED and row["weight_bits"] > 8):
        return "float"
    return "w8a16" if row["activation_bits"] > 8 else "w8a8"


def figure(values: Values, name: str, term: str) -> float:
    """A figure of a precision that is given; with what it has of the float figures."""

    def own(of: str) -> float:
        spare = values.get(f"{of}.dense", 0.0) if term in ("volume", "depthwise") else 0.0
        return values.get(f"{of}.{term}", spare)

    return own(name) + values.get(f"{name}.of_float", 0.0) * (own("float") if name != "float" else 0.0)


def tiled(size: int, tile: int) -> int:
    return -(-int(size) // tile) * tile


def arithmetic_s(row: np.void, values: Values, name: str) -> float:
    """Seconds of the MACs of a convolution or linear layer."""
    plain = float(r.macs(np.array([row]))[0])
    taps = int(row["kernel_d"]) * int(row["kernel_h"]) * int(row["kernel_w"])
    slow = values["dilated"] if row["dilation"] > 1 and taps > 1 else 1.0
    if row["kind"] == OpKind.DEPTHWISE:
        return slow * plain * figure(values, name, "depthwise")
    if row["kind"] == OpKind.CONV and row["groups"] > 1:
        return slow * plain * values["grouped"] * figure(values, name, "dense")
    side = "in" if row["transposed"] else "out"
    depth, height, width = (int(row[f"{side}_{axis}"]) for axis in "dhw")
    pixels = int(row["n"]) * depth * (1 if height == 1 and width > 1 else tiled(height, 8)) * tiled(width, 8)
    if row["kind"] == OpKind.LINEAR:
        pixels = tiled(int(row["n"]) * int(row["out_h"]), 8)
    padded = tiled(row["c"], 32) * tiled(row["k"], 32) * taps * pixels
    is_volume = max(row["kernel_d"], row["in_d"], row["out_d"]) > 1
    return slow * padded * figure(values, name, "volume" if is_volume else "dense")


def row_latency(row: np.void, values: Values, merges: bool) -> float:
    kind = row["kind"]
    if kind == OpKind.UNKNOWN:
        return np.nan
    if merges and kind == OpKind.NORM and row["fused"]:
        return 0.0
    if merges and kind == OpKind.ELEMENTWISE and row["activation"] == Activation.CLAMP:
        return 0.0
    wider = {"w8a8": ("w8a8", "w8a16"), "w8a16": ("w8a16",), "float": ()}[precision(row)]
    name = next((one for one in wider if any(key.startswith(one) for key in values)), "float")
    alone = np.array([row])
    elements = float(r.in_elements(alone)[0] + r.out_elements(alone)[0])
    rates = {"element": kind != OpKind.COPY}
    rates["moved"] = kind == OpKind.COPY and bool(row["transposed"])
    rates["resize"] = kind == OpKind.RESIZE
    rates["arithmetic"] = kind == OpKind.ELEMENTWISE and row["activation"] == Activation.NONE
    rates["stem"] = kind in (OpKind.CONV, OpKind.DEPTHWISE) and row["c"] == 3 and row["in_d"] == 1
    seconds = figure(values, name, "operator")
    seconds += elements * sum(figure(values, name, term) for term, applies in rates.items() if applies)
    if kind == OpKind.MATMUL:
        seconds += figure(values, name, "matmul")
    if kind in WEIGHTED:
        seconds += arithmetic_s(row, values, name) + figure(values, name, "weight") * float(r.weights(alone)[0])
    return seconds


def latency(rows: Rows, values: Values, *, merges: bool) -> Floats:
    """Latency of each row; NaN where there is no model."""
    return np.array([row_latency(row, values, merges) for row in rows])
