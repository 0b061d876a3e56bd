"""Eyeriss and systolic arrays in plain Python, row by row, with whole numbers."""

from __future__ import annotations

import math

import numpy as np

from fxopt.targets import rows as r
from fxopt.targets.rows import Floats, OpKind, Rows
from tests.targets.oracle import Values

WITH_MACS = (OpKind.CONV, OpKind.DEPTHWISE, OpKind.LINEAR, OpKind.MATMUL)


def _narrowed(rows: Rows, least: int, most: int) -> Rows:
    narrow = rows.copy()
    for name in ("weight_bits", "activation_bits", "output_bits"):
        narrow[name] = np.clip(narrow[name], least, most)
    return narrow


def _sizes(row: np.void, what: str) -> tuple[int, int, int]:
    d, h, w = (int(row[f"{what}_{axis}"]) for axis in "dhw")
    return d, h, w


def _energy(rows: Rows, values: Values, work: Floats, moved: Floats, latency: Floats) -> Floats:
    dynamic = work * values["mac_energy"] + moved * values["dram_energy"]
    return np.asarray(dynamic + values["static_power"] * latency, np.float64)


def eyeriss_cycles(row: np.void, values: Values) -> float:
    grid_rows, grid_columns = int(values["rows"]), int(values["columns"])
    n, groups = int(row["n"]), int(row["groups"])
    c, k = int(row["c"]) // groups, int(row["k"]) // groups
    kernel = _sizes(row, "kernel")
    depth, height, width = _sizes(row, "in" if row["transposed"] else "out")
    if row["kind"] in (OpKind.LINEAR, OpKind.MATMUL):
        depth, height, width = height, 1, 1
    stacked = max(1, grid_rows // kernel[1])
    sets = stacked * max(1, grid_columns // height)
    turns = min(math.ceil(c / sets) * k, c * math.ceil(k / sets)) if groups == 1 else math.ceil(groups * c * k / sets)
    folds = math.ceil(kernel[1] / grid_rows) * math.ceil(height / grid_columns)
    psums = min(height, grid_columns) * width * min(values["filters"] * stacked, k)
    crowding = max(1.0, min(psums / (values["buffer"] / 4), values["filters"] / 4))
    return n * depth * kernel[0] * turns * folds * width * kernel[2] * crowding


def eyeriss(rows: Rows, values: Values) -> tuple[Floats, Floats, Floats]:
    """(latency, energy, bytes moved) of each row; NaN where there is no model."""
    moved = r.traffic_bytes(_narrowed(rows, 16, 16))
    seconds = moved / values["bandwidth"]
    with_macs = np.isin(rows["kind"], WITH_MACS)
    cycles = np.array(
        [eyeriss_cycles(row, values) if known else 0.0 for row, known in zip(rows, with_macs, strict=True)]
    )
    edges = np.minimum(2 * r.in_elements(rows), values["buffer"]) + np.minimum(
        2 * r.out_elements(rows), values["buffer"]
    )
    latency = np.maximum(cycles / (values["clock"] * values["efficiency"]), seconds)
    latency = latency + np.where(with_macs, edges, 0.0) / values["bandwidth"]
    latency = np.where(rows["kind"] == OpKind.UNKNOWN, np.nan, latency)
    return latency, _energy(rows, values, r.macs(rows), moved, latency), moved


def systolic_row(row: np.void, values: Values) -> tuple[float, float]:
    """(cycles of one pass, bytes moved beyond each operand once) of a row with MACs."""
    groups, kernel = int(row["groups"]), math.prod(_sizes(row, "kernel"))
    m = int(row["n"]) * math.prod(_sizes(row, "in" if row["transposed"] else "out"))
    red, k = int(row["c"]) // groups, int(row["k"]) // groups
    red, k = (red, k * kernel) if row["transposed"] else (red * kernel, k)
    count = groups
    if row["kind"] == OpKind.MATMUL:
        count, m = int(row["n"]), int(row["out_h"])
    down, across, streamed = {1: (red, k, m), 2: (red, m, k), 3: (m, k, red)}[int(values["dataflow"])]
    folds = math.ceil(down / values["rows"]), math.ceil(across / values["columns"])
    over_m = {1: 1, 2: folds[1], 3: folds[0]}[int(values["dataflow"])]
    over_red = {1: folds[0], 2: folds[0], 3: 1}[int(values["dataflow"])]
    over_k = {1: folds[1], 2: 1, 3: folds[1]}[int(values["dataflow"])]
    cycles = count * (folds[0] * folds[1] * (2 * values["rows"] + values["columns"] + streamed - 2) - 1)
    one = np.array([row], row.dtype)
    activation_bits, weight_bits = min(int(row["activation_bits"]), 16), min(int(row["weight_bits"]), 16)
    inputs, held = r.in_elements(one)[0] * activation_bits / 8, r.weights(one)[0] * weight_bits / 8
    if row["kind"] == OpKind.MATMUL:
        inputs, held = count * m * red * activation_bits / 8, count * red * k * activation_bits / 8
    psums = r.out_elements(one)[0] * 4
    half = values["activation_buffer"] / 2
    extra = (over_k - 1) * inputs if inputs > half * count else 0.0
    extra += (over_m - 1) * held if held > values["weight_buffer"] * count else 0.0
    extra += 2 * (over_red - 1) * psums if psums > half * count else 0.0
    return cycles, extra


def systolic(rows: Rows, values: Values) -> tuple[Floats, Floats, Floats]:
    """(latency, energy, bytes moved) of each row; NaN where there is no model."""
    narrow = _narrowed(rows, 1, 16)
    moved = r.traffic_bytes(narrow)
    cycles, passes = np.zeros(len(rows)), np.ones(len(rows))
    for i, row in enumerate(narrow):
        if row["kind"] in WITH_MACS:
            cycles[i], extra = systolic_row(row, values)
            moved[i] += extra
            wide = row["activation_bits"] if row["kind"] == OpKind.MATMUL else row["weight_bits"]
            passes[i] = math.ceil(wide / values["native_bits"])
            passes[i] *= math.ceil(row["activation_bits"] / values["native_bits"])
    latency = np.maximum(cycles * passes / values["clock"], moved / values["bandwidth"])
    latency = np.where(rows["kind"] == OpKind.UNKNOWN, np.nan, latency)
    return latency, _energy(rows, values, r.macs(rows) * passes, moved, latency), moved
