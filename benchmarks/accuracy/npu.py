"""Neural processors of phones against the times that Qualcomm publishes with qai-hub-models.

Each network's time is predicted by a fit to all networks, by one without it, and by one without its family. All of that
adds up the features of the published table; "end to end" lines start from the network itself: it is built with random
weights, traced and lowered, and its rows are costed by the compiled model with the figures of a fit without it. They
leave out what the published networks do before the first layer (normalizing the image), and need torchvision and timm.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
from fits import npu as fits
from numpy.typing import NDArray
from scipy.stats import spearmanr

from accuracy import Line
from fxopt.targets import Workload
from fxopt.targets.models.npu import Model

AGAINST = "qai-hub-models 0.65.0, qnn_dlc"
BITS = {"float": (32, 32), "w8a16": (8, 16), "w8a8": (8, 8)}
PER_FAMILY = 2
"""Networks of a family that are built for the lines from end to end: its smallest."""


def bar(device: str, precision: str) -> dict[str, float]:
    """What is wanted on networks that were not used in the fit."""
    if precision == "float":
        return {"mean": 0.22 if device == "galaxy-s26" else 0.20, "spearman": 0.97}
    if precision == "w8a16":
        return {"mean": 0.20} if device in ("galaxy-s24", "galaxy-s25", "galaxy-s26") else {}
    return {"spearman": 0.93}


def figures(predicted: NDArray[np.float64], measured: NDArray[np.float64]) -> dict[str, float]:
    off = np.abs(predicted / measured - 1.0)
    ranks = float(spearmanr(predicted, measured).statistic)
    return {"mean": float(off.mean()), "max": float(off.max()), "spearman": ranks}


def networks(data: Path) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Name, source and input shape of the networks that are built: classifiers and video of torchvision and timm."""
    found: dict[str, dict[str, tuple[float, str, tuple[int, ...]]]] = {}
    with (data / fits.FILE).open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            package, _, _ = row["source"].partition(":")
            if package in ("torchvision", "timm") and row["kind"] != "dense-out" and " " not in row["source"]:
                shape = tuple(int(size) for size in row["input"].split("x")[1:])
                found.setdefault(row["family"], {})[row["model"]] = (float(row["macs"]), row["source"], shape)
    for members in found.values():
        for name in sorted(members, key=lambda name: members[name][0])[:PER_FAMILY]:
            yield name, members[name][1], members[name][2]


@cache
def lowered(source: str, shape: tuple[int, ...]) -> Workload:
    """The rows of a network at batch 1 in float."""
    from common.networks import of_timm, of_torchvision

    from fxopt.graph import trace
    from fxopt.lowering import lower

    package, _, name = source.partition(":")
    network = of_timm(name, shape) if package == "timm" else of_torchvision(name.removeprefix("video."), shape)
    return lower(trace(network.build(), (network.example(2),)), batch=1).bind()


def in_precision(work: Workload, precision: str) -> Workload:
    rows = work.rows.copy()
    rows["weight_bits"], rows["activation_bits"] = BITS[precision]
    rows["output_bits"] = rows["activation_bits"]
    return Workload(rows, work.names)


def total_ms(model: Model, work: Workload) -> float:
    totals = np.empty((5, 1))
    model.totals(work.rows, *totals, np.zeros(len(work), np.uint8))
    return float(totals[0, 0]) * 1e3


def end_to_end(data: Path, timings: fits.Timings) -> Iterator[Line]:
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for name, source, shape in networks(data):
        work = lowered(source, shape)
        values = fits.fit(timings.without(lambda network, name=name: network.name == name))  # type: ignore[misc]
        for precision in fits.PRECISIONS:
            rows = in_precision(work, precision)
            for device, times in timings.ms[precision].items():
                if name in times:
                    predicted = total_ms(Model(fits.to_si(values[device]), True), rows)
                    found.setdefault((device, precision), []).append((predicted, times[name]))
    for (device, precision), pairs in found.items():
        predicted, measured = np.array(pairs).T
        against = f"{AGAINST}, {precision}, end to end, without the network"
        wanted = bar(device, precision)
        yield Line(device, against, len(pairs), "left out", figures(predicted, measured), wanted)


def lines(data: Path) -> list[Line]:
    """All comparisons; those from end to end last, where torchvision and timm are installed."""
    if not (data / fits.FILE).is_file():
        return []
    timings = fits.read(data)
    found = []
    fitted = fits.fit(timings)
    for device, values in fitted.items():
        for precision in fits.PRECISIONS:
            times = timings.ms[precision][device]
            predicted = np.array([fits.predict(values, timings.networks[name], precision) for name in times])
            against = f"{AGAINST}, {precision}"
            found.append(
                Line(device, against, len(times), "fitted", figures(predicted, np.array([*times.values()])), {})
            )
    for what, left in (
        ("network", fits.left_out(timings, lambda network: network.name)),
        ("family", fits.left_out(timings, lambda network: network.family)),
    ):
        for (device, precision), (predicted, measured) in left.items():
            against = f"{AGAINST}, {precision}, without the {what}"
            wanted = bar(device, precision)
            found.append(Line(device, against, len(measured), "left out", figures(predicted, measured), wanted))
    try:
        return [*found, *end_to_end(data, timings)]
    except ImportError:
        return found
