"""Networks whose measurements are published, as rows: out of the layer tables, or rescaled in width and resolution."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fxopt.targets import OpKind, Workload, make_row
from fxopt.targets.rows import Rows

__all__ = ["Block", "blocks_of", "measured", "operator", "rescaled", "tables", "workload"]

KINDS = {
    "bn": OpKind.NORM,
    "act": OpKind.ELEMENTWISE,
    "add": OpKind.ELEMENTWISE,
    "pool": OpKind.POOL,
    "cat": OpKind.COPY,
}
Entry = Mapping[str, Any]


@dataclass(frozen=True)
class Block:
    """An inverted residual block: expand, filter by depth, project."""

    expansion: float
    kernel: int
    stride: int
    outputs: int


def measured(data: Path, device: str, metric: str = "latency") -> dict[str, list[float]]:
    """Published values of a device by model, in the order of the sources (the oldest runtime first)."""
    found: dict[str, list[float]] = {}
    with (data / "validation.csv").open(encoding="utf-8") as file:
        for point in csv.DictReader(file):
            if point["device"] == device and point["metric"] == metric:
                found.setdefault(point["model"], []).append(float(point["value"]))
    return found


def tables(data: Path) -> dict[str, list[Entry]]:
    """The layer tables, by network."""
    found: dict[str, list[Entry]] = json.loads((data / "layer_tables.json").read_text(encoding="utf-8"))
    return found


def conv(c: int, k: int, kernel: int, stride: int, size: int, groups: int = 1, **more: float) -> Rows:
    """A square convolution of an input of ``size`` pixels a side, padded to keep it."""
    out = -(-size // stride)
    sides = {"in_h": size, "in_w": size, "out_h": out, "out_w": out}
    window = {"kernel_h": kernel, "kernel_w": kernel, "stride_h": stride, "stride_w": stride}
    kind = OpKind.DEPTHWISE if groups == c and c > 1 else OpKind.CONV
    return make_row(kind, c=c, k=k, groups=groups, **sides, **window, **more)


def operator(entry: Entry, batch: int = 1) -> Rows:
    """One row of a layer table."""
    if entry["op"] == "fc":
        return make_row(OpKind.LINEAR, n=batch, c=entry["C"], k=entry["K"], bias=1)
    if entry["op"] == "conv":
        row = conv(entry["C"], entry["K"], entry["R"], entry["stride"], entry["H"], entry["groups"], n=batch)
        row["kernel_w"] = entry["S"]
        row["out_h"], row["out_w"] = entry["P"], entry["Q"]
        return row
    return make_row(
        KINDS[entry["op"]],
        n=batch,
        in_h=entry["elems"],
        out_h=entry.get("out", entry["elems"]),
        inputs=2 if entry["op"] == "add" else 1,
        fused=entry["op"] in ("bn", "act"),
    )


def workload(entries: Sequence[Entry], batch: int = 1) -> Workload:
    """A layer table as a workload in floating point."""
    names = [str(entry.get("name", entry["op"])) for entry in entries]
    return Workload(np.concatenate([operator(entry, batch) for entry in entries]), names)


def blocks_of(entries: Sequence[Entry]) -> list[Block]:
    """The inverted residual blocks of a layer table."""
    convs = [entry for entry in entries if entry["op"] == "conv"]
    found = []
    for before, filtering, after in zip(convs, convs[1:], convs[2:], strict=False):
        if filtering["groups"] > 1:
            expands = before["R"] == 1 and len(found) > 0
            expansion = filtering["C"] / before["C"] if expands else 1.0
            found.append(Block(expansion, filtering["R"], filtering["stride"], after["K"]))
    return found


def divisible(channels: float, by: int = 8) -> int:
    """Channels rounded as Sandler et al. (2018) do: to a multiple, not by more than a tenth down."""
    rounded = max(by, int(channels + by / 2) // by * by)
    return rounded + by if rounded < 0.9 * channels else rounded


def rescaled(
    blocks: Sequence[Block], width: float, size: int, *, bits: int = 8, classes: int = 1000, least_last: int = 1280
) -> Workload:
    """A network of inverted residual blocks at another width and resolution, with the bytes alive at each row.

    First and last convolutions are those of MobileNetV2: 32 channels, and 1280 that do not get fewer than
    ``least_last``.
    """
    channels = divisible(32 * width)
    rows: list[Rows] = []
    kept = 0.0

    def append(row: Rows) -> None:
        sizes = [float(row[side + axis][0]) for side in ("in_", "out_") for axis in "hw"]
        elements = row["c"][0] * sizes[0] * sizes[1] + row["k"][0] * sizes[2] * sizes[3]
        row["live_bytes"] = elements * bits / 8 + kept
        for name in ("weight_bits", "activation_bits", "output_bits"):
            row[name] = bits
        rows.append(row)

    append(conv(3, channels, 3, 2, size, bias=1))
    size = -(-size // 2)
    for block in blocks:
        outputs, wide = divisible(block.outputs * width), divisible(channels * block.expansion)
        adds = block.stride == 1 and outputs == channels
        if block.expansion > 1:
            append(conv(channels, wide, 1, 1, size, bias=1))
        kept = channels * size * size * bits / 8 if adds else 0.0
        append(conv(wide, wide, block.kernel, block.stride, size, wide, bias=1))
        size = -(-size // block.stride)
        append(conv(wide, outputs, 1, 1, size, bias=1))
        if adds:
            append(make_row(OpKind.ELEMENTWISE, c=outputs, k=outputs, inputs=2, in_h=size**2, out_h=size**2))
        kept, channels = 0.0, outputs
    last = max(least_last, divisible(1280 * width))
    append(conv(channels, last, 1, 1, size, bias=1))
    append(make_row(OpKind.POOL, c=last, k=last, in_h=size, in_w=size, kernel_h=size, kernel_w=size))
    append(make_row(OpKind.LINEAR, c=last, k=classes, bias=1))
    return Workload(np.concatenate(rows), [f"row{i}" for i in range(len(rows))])
