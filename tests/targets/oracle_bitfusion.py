"""BitFusion in plain NumPy: every tiling under every order of loops, walked loop by loop.

The loops over batch, height and width stand together, in this order.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fxopt.targets import rows as r
from fxopt.targets.rows import Floats, OpKind, Rows
from tests.targets.oracle import Values

LOOPS = "BHWCK"
ORDERS = np.array([order for order in itertools.permutations(range(len(LOOPS))) if "012" in "".join(map(str, order))])
CONCERNS = {"weights": "CK", "inputs": "BHWC", "psums": "BHWK"}


@dataclass(frozen=True)
class Dense:
    """One dense convolution and how often it runs."""

    repeats: int
    batch: int
    height: int
    width: int
    channels: int
    out_channels: int
    kernel: tuple[int, int, int] = (1, 1, 1)
    stride: tuple[int, int] = (1, 1)
    dilation: int = 1
    patches: bool = False


@dataclass(frozen=True)
class Result:
    cycles: float
    compute: float
    traffic: float
    energy: float


def dense(row: np.void, values: Values, lanes: int) -> Dense:
    n, c, k, groups = (int(row[name]) for name in ("n", "c", "k", "groups"))
    if row["kind"] == OpKind.LINEAR:
        return Dense(1, n * int(row["out_h"]), 1, 1, c, k)
    if row["kind"] == OpKind.MATMUL:
        return Dense(n, int(row["out_h"]), 1, 1, c, k)
    c, k, repeats, packed = c // groups, k // groups, 1, 1
    if groups > 1:
        packed = int(values["depthwise_macs_per_cycle"] * (lanes // values["rows"])) // c
        packed = min(max(packed, 1), groups)
        repeats = -(-groups // packed)
    kernel = tuple(int(row[f"kernel_{axis}"]) for axis in "dhw")
    taps = math.prod(kernel)
    side = "in" if row["transposed"] else "out"
    d, h, w = (int(row[f"{side}_{axis}"]) for axis in "dhw")
    if row["transposed"]:
        return Dense(repeats, n * d, h, w, c * packed, k * taps * packed)
    return Dense(
        repeats,
        n * d,
        h,
        w,
        c * packed,
        k * packed,
        (kernel[0], kernel[1], kernel[2]),
        (int(row["stride_h"]), int(row["stride_w"])),
        int(row["dilation"]),
        groups == 1 and taps > 1 and c < values["rows"],
    )


def _powers(size: int, step: int = 1) -> list[int]:
    tiles = {size}
    while step < size:
        tiles.add(step)
        step *= 2
    return sorted(tiles)


def _ceil(whole: NDArray[np.int64] | int, part: NDArray[np.int64] | int) -> NDArray[np.int64]:
    return np.asarray(-(-np.asarray(whole, np.int64) // part), np.int64)


def _walk(
    name: str, trips: NDArray[np.int64], bits: NDArray[np.int64], held: NDArray[np.int64], half: float
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(bits in all, bits of the largest resident part), shape (orders, tilings), loops from the innermost outwards."""
    total = np.repeat(bits[None], len(ORDERS), axis=0)
    kept, resident = total.copy(), np.repeat(held[None], len(ORDERS), axis=0)
    stays = np.ones(total.shape, np.bool_)
    for position in reversed(range(len(LOOPS))):
        loop = ORDERS[:, position]
        turns = trips[loop]
        concerned = np.array([LOOPS[one] in CONCERNS[name] for one in loop])[:, None]
        resident = np.where(concerned, resident * turns, resident)
        stays &= ~concerned | (resident <= half)
        total = np.where(concerned | ~stays, total * turns, total)
        kept = np.where(concerned & stays, total, kept)
    return total, kept


def run(layer: Dense, values: Values, bits: tuple[int, int], slots: tuple[int, int]) -> Result | None:
    """The fastest tiling and order at given fused widths; bits and slots of (weights, inputs)."""
    columns = int(values["columns"])
    lanes = int(values["rows"]) * (8 // slots[0]) * (8 // slots[1])
    halves = {f"{name}_buffer": 4.0 * values[f"{name}_buffer"] for name in ("weight", "input", "output")}
    taps = math.prod(layer.kernel)
    held_taps = min(
        halves["weight_buffer"] // (lanes * columns * slots[0]), halves["input_buffer"] // (lanes * slots[1])
    )
    parts = math.ceil(taps / held_taps)
    some = -(-taps // parts)
    choices = itertools.product(
        _powers(layer.batch),
        _powers(max(layer.height, layer.width)),
        _powers(layer.channels),
        _powers(layer.out_channels, columns),
    )
    b, o, c, k = np.array(list(choices), np.int64).T
    h, w = np.minimum(o, layer.height), np.minimum(o, layer.width)
    pixels, positions = b * h * w, b * layer.kernel[0]
    gaps = [(size - 1) * layer.dilation + 1 for size in layer.kernel[1:]]
    positions = positions * (gaps[0] + (h - 1) * layer.stride[0]) * (gaps[1] + (w - 1) * layer.stride[1])
    if layer.dilation > 1:
        positions = np.minimum(positions, pixels * taps)
    if layer.patches or parts > 1:
        positions = pixels * some
    columns_used = _ceil(k, columns)
    steps = _ceil(some * c, lanes) if layer.patches else some * _ceil(c, lanes)
    weights, inputs, psums = some * c * k * bits[0], positions * c * bits[1], pixels * k * 32
    held_weights = steps * lanes * columns_used * columns * slots[0]
    held_inputs = (pixels * steps if layer.patches else positions * _ceil(c, lanes)) * lanes * slots[1]
    held_psums = pixels * columns_used * columns * 32
    fits = (held_weights <= halves["weight_buffer"]) & (held_inputs <= halves["input_buffer"])
    fits &= held_psums <= halves["output_buffer"]
    if not fits.any():
        return None
    trips = np.stack(
        [
            _ceil(layer.batch, b),
            _ceil(layer.height, h),
            _ceil(layer.width, w),
            _ceil(layer.channels, c) * parts,
            _ceil(layer.out_channels, k),
        ]
    )[:, fits]
    compute = (trips.prod(axis=0) * (pixels * steps * columns_used)[fits])[None]
    all_w, kept_w = _walk("weights", trips, weights[fits], held_weights[fits], halves["weight_buffer"])
    all_i, kept_i = _walk("inputs", trips, inputs[fits], held_inputs[fits], halves["input_buffer"])
    all_o, kept_o = _walk("psums", trips, psums[fits], held_psums[fits], halves["output_buffer"])
    per_cycle = 8 * values["bandwidth"]
    traffic = all_w + all_i + 2 * all_o
    cycles = np.maximum(compute + (kept_w + kept_i + 2 * kept_o) / per_cycle, traffic / per_cycle)
    work = np.broadcast_to(compute, cycles.shape)
    best = np.lexsort((work.ravel(), traffic.ravel(), np.round(cycles.ravel(), 6)))[0]
    at = np.unravel_index(best, cycles.shape)
    psum_energy = values["output_read_energy"] + values["output_write_energy"]
    array = lanes * columns * bits[0] * values["weight_read_energy"] + lanes * bits[1] * values["input_read_energy"]
    array += columns * 32 * psum_energy
    moved = float(all_w[at]) * values["weight_write_energy"] + float(all_i[at]) * values["input_write_energy"]
    moved += float(all_o[at]) * psum_energy + float(traffic[at]) * values["dram_energy"]
    energy = float(work[at]) * (values["cycle_energy"] + array / 8.0) + moved / 8.0
    return Result(float(cycles[at]), float(work[at]), float(traffic[at]), energy)


def bitfusion(rows: Rows, values: Values) -> tuple[Floats, Floats, Floats]:
    """(latency, energy, bytes moved) of each row; NaN where there is no model."""
    found = np.full((3, len(rows)), np.nan)
    for i, row in enumerate(rows):
        if row["kind"] == OpKind.UNKNOWN:
            continue
        if r.macs(rows[i : i + 1])[0] == 0.0:
            narrow = rows[i : i + 1].copy()
            for name in ("weight_bits", "activation_bits", "output_bits"):
                narrow[name] = np.minimum(narrow[name], 8)
            moved = r.traffic_bytes(narrow)[0]
            latency = moved / (values["bandwidth"] * values["clock"])
            found[:, i] = latency, moved * values["dram_energy"] + values["static_power"] * latency, moved
            continue
        wanted = [int(row["activation_bits" if row["kind"] == OpKind.MATMUL else "weight_bits"])]
        wanted.append(int(row["activation_bits"]))
        bits = (min(wanted[0], 8), min(wanted[1], 8))
        candidates = []
        for input_slot, weight_slot in itertools.product((2, 4, 8), repeat=2):
            if weight_slot < bits[0] or input_slot < bits[1]:
                continue
            layer = dense(row, values, int(values["rows"]) * (8 // weight_slot) * (8 // input_slot))
            result = run(layer, values, bits, (weight_slot, input_slot))
            if result is not None:
                candidates.append((layer.repeats, result))
        repeats, result = min(
            candidates,
            key=lambda one: (round(one[0] * one[1].cycles, 6), one[0] * one[1].traffic, one[0] * one[1].compute),
        )
        latency = repeats * math.ceil(round(result.cycles, 6)) / values["clock"]
        energy = repeats * result.energy + values["static_power"] * latency
        found[:, i] = latency, energy, repeats * result.traffic / 8.0
    return found[0], found[1], found[2]
