"""Bit-serial overlays against HAQ's look-up table and the latencies that it reports."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from fits.networks import operator, tables
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.stats import spearmanr

from accuracy import Line
from fxopt.targets import PresetTarget, Workload, load
from fxopt.targets.models import family
from fxopt.targets.rows import Rows

WIDTHS = range(1, 9)
# Latencies by uniform bits: preset, network, batch, device in the list of published points.
PUBLISHED = (
    ("zynq7020", "mobilenet_v1", "MobileNetV1", 1, "Zynq7020-BISMO-edge"),
    ("vu9p", "mobilenet_v2", "MobileNetV2", 16, "VU9P-BISMO-cloud"),
)


def layers(data: Path, name: str, batch: int) -> Rows:
    """Convolutions and linear layers of a network, as HAQ has them; the classifier of MobileNetV2 is a linear layer."""
    # pytorchcv expands the first block of MobileNetV2 by one; the paper's network, and HAQ's, has no such layer.
    skipped = {"features.stage1.unit1.conv1.conv"} if name == "mobilenet_v2" else set()
    entries = [entry for entry in tables(data)[name] if entry["op"] in ("conv", "fc") and entry["name"] not in skipped]
    return np.concatenate(
        [operator({**entry, "op": "fc"} if entry.get("H") == 1 else entry, batch) for entry in entries]
    )


def with_bits(rows: Rows, weight_bits: Any, activation_bits: Any) -> Rows:
    changed = rows.copy()
    changed["weight_bits"], changed["activation_bits"] = weight_bits, activation_bits
    return changed


def figures(name: str) -> dict[str, float]:
    target = load(name)
    if not isinstance(target, PresetTarget):
        raise TypeError(f"{name} is no preset")
    return {key: figure.si for key, figure in target.preset.figures.items()}


def table(values: Mapping[str, float], rows: Rows) -> NDArray[np.float64]:
    """Cycles of every layer and pair of bits, shape (layers, 8, 8)."""
    model = family("bismo").Model({**values, "clock": 1.0}, True)
    pairs = [with_bits(rows, w, a) for w in WIDTHS for a in WIDTHS]
    cycles, none, moved = (np.empty((len(pairs), len(rows))) for _ in range(3))
    model.per_row(np.stack(pairs), cycles, none, moved)
    return cycles.T.reshape(len(rows), len(WIDTHS), len(WIDTHS))


def against_table(data: Path) -> list[Line]:
    published = np.load(data / "haq_cloud_mobilenetv2_cycles.npy").astype(float)
    rows = layers(data, "mobilenet_v2", 16)
    found = table(figures("vu9p-table"), rows)
    errors = np.abs(found / published - 1.0)
    rng = np.random.default_rng(0)
    w, a = rng.integers(0, 8, (2, 2000, len(rows)))
    index = np.arange(len(rows))
    mixed, wanted = found[index, w, a].sum(axis=1), published[index, w, a].sum(axis=1)
    gaps = np.abs(mixed / wanted - 1.0)
    source = "HAQ's released table of cycles"
    return [
        Line(
            "vu9p-table",
            f"{source}, 53 layers x 64 bit pairs",
            errors.size,
            "fitted",
            {"mean": float(errors.mean()), "max": float(errors.max())},
            {"mean": 0.03},
        ),
        Line(
            "vu9p-table",
            f"{source}, random mixed policies",
            len(gaps),
            "fitted",
            {"mean": float(gaps.mean()), "max": float(gaps.max()), "spearman": float(spearmanr(mixed, wanted)[0])},
            {"mean": 0.015, "spearman": 0.999},
        ),
    ]


def uniform(data: Path, device: str, network: str) -> dict[int, float]:
    """Published seconds by uniform bits."""
    with (data / "validation.csv").open(encoding="utf-8") as file:
        points = [point for point in csv.DictReader(file) if point["device"] == device and point["model"] == network]
    return {int(point["weight_bits"]): 1e-3 * float(point["value"]) for point in points}


def clock_without(cycles: Mapping[int, float], seconds: Mapping[int, float], left_out: int) -> float:
    """The clock that fits the other points best, in relative error."""
    others = [bits for bits in seconds if bits != left_out]
    ratios = np.array([cycles[bits] / seconds[bits] for bits in others])
    fitted = minimize_scalar(lambda clock: np.abs(ratios / clock - 1.0).max(), bounds=(ratios.min(), ratios.max()))
    return float(fitted.x)


def against_latencies(data: Path) -> list[Line]:
    lines = []
    for name, network, model, batch, device in PUBLISHED:
        rows, values = layers(data, network, batch), figures(name)
        seconds = uniform(data, device, model)
        names = [str(i) for i in range(len(rows))]
        work = Workload(np.stack([with_bits(rows, bits, bits) for bits in seconds]), names)
        found = load(name).estimate(work).latency_s
        errors = np.abs(found / np.array([*seconds.values()]) - 1.0)
        cycles = {bits: float(each * values["clock"]) for bits, each in zip(seconds, found, strict=True)}
        left = [abs(cycles[bits] / clock_without(cycles, seconds, bits) / seconds[bits] - 1.0) for bits in seconds]
        against = f"{model} at {', '.join(map(str, sorted(seconds)))} bits, batch {batch} (HAQ)"
        worst = {"max": 0.01}
        lines.append(Line(name, against, len(errors), "fitted", {"max": float(errors.max())}, worst))
        lines.append(Line(name, f"{against}; clock alone refitted", len(left), "left out", {"max": max(left)}, worst))
    return lines


def lines(data: Path) -> list[Line]:
    return [*against_table(data), *against_latencies(data)]
