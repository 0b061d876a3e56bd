"""Eyeriss against the published figures of the chip; BitFusion's comparison with a simulated one is with BitFusion."""

from __future__ import annotations

from pathlib import Path

from fits.eyeriss import alexnet, frames_per_s, vgg16, watts

from accuracy import Line
from accuracy._costs import figures, points

__all__ = ["lines"]


def lines(data: Path) -> list[Line]:
    """The comparisons that the folder ``data`` has figures for."""
    path = data / "validation.csv"
    if not path.is_file():
        return []
    chip = {
        (point["model"], point["metric"]): float(point["value"])
        for point in points(path)
        if point["device"].startswith("Eyeriss chip")
    }
    static_power = figures("eyeriss")["static_power"]
    result = []
    for name, rows, batch in (("AlexNet conv", alexnet(4), 4), ("VGG-16 conv", vgg16(3), 3)):
        rate = frames_per_s(rows, batch)
        figure = {
            "rate": abs(rate / chip[name, "throughput"] - 1.0),
            "power": abs(watts(rows, batch, rate, static_power) / (chip[name, "power"] * 1e-3) - 1.0),
        }
        what = f"the chip's rate and power, {name} at batch {batch}"
        result.append(Line("eyeriss", what, 2, "fitted" if batch == 4 else "unseen", figure, {}))
    return result
