"""Plain NumPy twins of the compiled models, random sound rows, and short ways to make rows, for the tests here."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from fxopt.targets import rows as r
from fxopt.targets.rows import Activation, Floats, OpKind, Rows, Workload, default_rows, make_row

Values = Mapping[str, float]

CLASS_BITS = {"int8": 8, "int16": 16, "float": 32}
GROUPS = (
    *("pointwise", "dense", "depthwise", "linear", "matmul", "elementwise", "pool", "norm", "softmax", "embedding"),
    "copy",
    "resize",
    "curve",
)
WITH_WINDOW = (OpKind.CONV, OpKind.DEPTHWISE, OpKind.POOL)


BOARD = """
schema = 1
name = "board"
title = "A board with energy figures"
family = "roofline"
fuses = true
[calibration]
status = "uncalibrated"
error = "no measurements"
bits = []
[capabilities]
channel_tile = 1
batch = 1
bits."*" = [[32, 32]]
[sources]
sheet = "data sheet"
[parameters]
bandwidth = { value = 1, unit = "GB/s", source = "sheet" }
overhead = { value = 0, unit = "us", source = "sheet" }
peak.32 = { value = 1, unit = "GMAC/s", source = "sheet" }
mac_energy.32 = { value = 2, unit = "pJ/MAC", source = "sheet" }
byte_energy = { value = 10, unit = "pJ/B", source = "sheet" }
static_power = { value = 100, unit = "mW", source = "sheet" }
"""
"""A board of one width of arithmetic, with energy figures."""


def conv(c: int, k: int, size: int, kernel: int = 1, stride: int = 1, **more: float) -> Rows:
    """A square convolution with ``size`` output pixels a side and input size * stride."""
    groups = int(more.get("groups", 1))
    kind = OpKind.DEPTHWISE if groups == c and c > 1 else OpKind.CONV
    sides = {"in_h": size * stride, "in_w": size * stride, "out_h": size, "out_w": size}
    window = {"kernel_h": kernel, "kernel_w": kernel, "stride_h": stride, "stride_w": stride}
    return make_row(kind, c=c, k=k, **{**sides, **window, **more})


def workload(*rows: Rows) -> Workload:
    joined = np.concatenate(rows)
    return Workload(joined, [f"row{i}" for i in range(len(joined))])


def random_rows(rng: np.random.Generator, count: int) -> Rows:
    """Sound rows of all kinds; sizes and bits of every row are its own."""
    rows = default_rows(count)
    rows["kind"] = rng.integers(0, len(OpKind), count)
    for name in ("fused", "transposed", "bias", "reused"):
        rows[name] = rng.integers(0, 2, count)
    rows["inputs"] = rng.integers(1, 4, count)
    rows["n"] = rng.integers(1, 9, count)
    for name in ("in_h", "out_h"):
        rows[name] = rng.integers(1, 120, count)
    for name in ("weight_bits", "activation_bits", "output_bits"):
        rows[name] = rng.choice([1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 32], count)
    for name in ("weight_density", "activation_density"):
        rows[name] = rng.uniform(0.01, 1.0, count)
    rows["live_bytes"] = rng.uniform(0.0, 1e7, count)
    rows["held"] = rng.integers(0, 1000, count)
    rows["position_bytes"] = rng.choice([0, 0, 10, 1000, 100_000], count)
    groups = rng.choice([1, 1, 2, 3, 8], count)
    flat = np.isin(rows["kind"], [OpKind.LINEAR, OpKind.MATMUL, OpKind.EMBEDDING])
    rows["groups"] = np.where(flat, 1, groups)
    for name in ("c", "k"):
        rows[name] = rows["groups"] * rng.integers(1, 200, count)
    window = np.isin(rows["kind"], WITH_WINDOW)
    for axis in "dhw":
        rows[f"kernel_{axis}"] = np.where(window, rng.choice([1, 1, 3, 5], count), 1)
        rows[f"stride_{axis}"] = np.where(window, rng.integers(1, 3, count), 1)
    gemm = np.isin(rows["kind"], [OpKind.LINEAR, OpKind.MATMUL])
    rows["in_h"] = np.where(gemm, rows["out_h"], rows["in_h"])
    for axis in "dw":
        for side in ("in", "out"):
            rows[f"{side}_{axis}"] = np.where(gemm, 1, rng.integers(1, 60, count))
    rows["transposed"] &= np.isin(rows["kind"], [OpKind.CONV, OpKind.DEPTHWISE, OpKind.COPY])
    rows["activation"] = np.where(rows["kind"] == OpKind.ELEMENTWISE, rng.integers(0, len(r.Activation), count), 0)
    return rows


def narrowest(values: Values, prefix: str, bits: int) -> float:
    """The figure of the narrowest class that holds ``bits``; NaN if none does."""
    classes = [width for width in (1, 2, 4, 8, 16, 32) if width >= bits and f"{prefix}.{width}" in values]
    return values[f"{prefix}.{classes[0]}"] if classes else np.nan


def roofline(rows: Rows, values: Values) -> tuple[Floats, Floats]:
    """(latency, energy) by the formulas in fxopt/targets/models/roofline.pyx; NaN where there is no model."""
    bits = r.compute_bits(rows)
    work = r.macs(rows)
    moved = r.traffic_bytes(rows)
    rate = np.array([narrowest(values, "peak", width) for width in bits])
    compute = np.where(work > 0.0, work / rate, 0.0)
    latency = values["overhead"] + np.maximum(compute, moved / values["bandwidth"])
    per_mac = np.array([narrowest(values, "mac_energy", width) for width in bits])
    energy = np.where(work > 0.0, work * per_mac, 0.0)
    energy = energy + moved * values.get("byte_energy", np.nan) + values.get("static_power", np.nan) * latency
    unknown = rows["kind"] == OpKind.UNKNOWN
    return np.where(unknown, np.nan, latency), np.where(unknown, np.nan, energy)


def group_name(row: np.void, curves: bool) -> str | None:
    taps = row["kernel_d"] * row["kernel_h"] * row["kernel_w"]
    if curves and row["kind"] == OpKind.ELEMENTWISE and row["activation"] == Activation.CURVE:
        return "curve"
    if row["kind"] == OpKind.CONV:
        return "pointwise" if taps == 1 and row["groups"] == 1 else "dense"
    return None if row["kind"] == OpKind.UNKNOWN else OpKind(int(row["kind"])).name.lower()


def linear_cpu(rows: Rows, values: Values) -> Floats:
    """Latency by the formula in fxopt/targets/models/linear_cpu.pyx; NaN where there is no model."""
    read = r.in_elements(rows)
    spilled = np.maximum(0.0, read * rows["activation_bits"] / 8.0 - values.get("spill_threshold", np.inf)) / 4.0
    tile = values.get("channel_tile", 1.0)
    curves = any(".curve." in key for key in values)
    names = np.array([group_name(row, curves) or "" for row in rows])
    padded_k = np.where(np.isin(names, ["pointwise", "depthwise"]), np.ceil(rows["k"] / tile) * tile, rows["k"])
    padded_c = np.where(names == "pointwise", np.ceil(rows["c"] / tile) * tile, rows["c"])
    quantities = {
        "mac": r.macs(rows) / (rows["k"] * rows["c"].astype(float)) * padded_k * padded_c,
        "weight": r.weights(rows),
        "in": read,
        "out": r.out_elements(rows),
        "spill": spilled,
        "kernel_out": rows["kernel_h"] * r.out_elements(rows),
        "channel": rows["k"],
        "const": np.ones(len(rows)),
    }
    bits = r.compute_bits(rows)
    latency = np.full(len(rows), np.nan)
    for i, row in enumerate(rows):
        candidates = []
        for name, width in CLASS_BITS.items():
            prefix = f"{name}.{group_name(row, curves)}."
            given = {key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)}
            if width >= bits[i] and given:
                candidates.append(sum(value * quantities[key][i] for key, value in given.items()))
        if candidates:
            latency[i] = min(candidates)
    return latency


def gpu(rows: Rows, values: Values) -> Floats:
    """Latency by the formulas in fxopt/targets/models/gpu.pyx; NaN where there is no model."""
    bits = r.compute_bits(rows)
    rate = np.array([narrowest(values, "mac_per_sm_cycle", width) for width in bits]) * values["clock"]
    taps = _volume(rows, "kernel")
    transposed = rows["transposed"] == 1
    matmul = rows["kind"] == OpKind.MATMUL
    m = rows["n"] * np.where(transposed, _volume(rows, "in"), _volume(rows, "out"))
    m = np.where(matmul, rows["out_h"], m)
    n = rows["k"] // rows["groups"] * np.where(transposed, taps, 1)
    k = rows["c"] // rows["groups"] * np.where(transposed, 1, taps)
    split = int(values.get("split_k", 1))
    tiles = _ceil(m, values["tile_m"]) * _ceil(n, values["tile_n"]) * split * rows["groups"]
    tiles = tiles * np.where(matmul, rows["n"], 1)
    waves = _ceil(tiles, values["sm_count"] * values.get("blocks_per_sm", 1))
    tiled = waves * values["tile_m"] * values["tile_n"] * _ceil(k, split) / (rate * values["dense_efficiency"])
    widest = min(value for key, value in values.items() if key.startswith("mac_per_sm_cycle")) * values["clock"]
    lanes = np.where(np.isnan(rate), np.nan, widest) * values["sm_count"]
    depthwise = r.macs(rows) / (lanes * values["depthwise_efficiency"])
    with_macs = np.isin(rows["kind"], [OpKind.CONV, OpKind.LINEAR, OpKind.MATMUL])
    compute = np.where(with_macs, tiled, np.where(rows["kind"] == OpKind.DEPTHWISE, depthwise, 0.0))
    memory = r.traffic_bytes(rows) / (values["bandwidth"] * values["bandwidth_efficiency"])
    latency = np.maximum(np.maximum(compute, memory), values["launch_floor"])
    return np.where(rows["kind"] == OpKind.UNKNOWN, np.nan, latency)


def _volume(rows: Rows, what: str) -> NDArray[np.int64]:
    return rows[f"{what}_d"].astype(np.int64) * rows[f"{what}_h"] * rows[f"{what}_w"]


def _ceil(whole: NDArray[np.int64], part: float) -> NDArray[np.int64]:
    return -(-whole.astype(np.int64) // int(part))
