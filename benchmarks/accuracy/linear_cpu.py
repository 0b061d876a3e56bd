"""Phones and a server processor against published profiles and totals."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from fits.linear_cpu import FORMS, IN_FLOAT, Points, int8_points, left_out, pixel1_points, predict, xeon_points
from fits.networks import blocks_of, measured, rescaled, tables, workload

from accuracy import Line
from fxopt.targets import PresetTarget, Workload, load

__all__ = ["NETWORKS", "lines", "summary"]

NETWORKS = {
    "MobileNetV2": "mobilenet_v2",
    "NASNet-A": "nasnet_a",
    "MnasNet": "mnasnet_b1",
    "ProxylessNAS-Mobile": "proxyless_mobile",
    "ProxylessNAS-GPU": "proxyless_gpu",
    "ProxylessNAS-CPU": "proxyless_cpu",
    "MobileNetV3-Large": "mobilenet_v3_large",
}
"""Names of networks in the measurements and in the layer tables."""

RUNTIME_OF_2020 = ("MobileNetV2", "MnasNet", "ProxylessNAS-Mobile", "MobileNetV3-Large")


def summary(errors: Mapping[str, float]) -> dict[str, float]:
    """Mean and largest magnitude, and the mean with its sign."""
    values = np.array([*errors.values()])
    return {
        "mean": float(np.abs(values).mean()),
        "max": float(np.abs(values).max()),
        "bias": float(values.mean()),
    }


def lines(data: Path) -> list[Line]:
    """All comparisons of the family."""
    return [*_pixel1(data), *_int8(data), *_xeon(data)]


def _error(target: str, work: Workload, milliseconds: float) -> float:
    return float(load(target).estimate(work).latency_s[0] * 1e3 / milliseconds - 1.0)


def _of_preset(target: str, points: Points) -> dict[str, float]:
    preset = load(target)
    if not isinstance(preset, PresetTarget):
        raise TypeError(f"{target} is no preset")
    predicted = predict({key: figure.si for key, figure in preset.preset.figures.items()}, points)
    return dict(zip(points.names, (predicted / points.seconds - 1.0).tolist(), strict=True))


def _pixel1(data: Path) -> list[Line]:
    networks = tables(data)
    totals = measured(data, "Pixel1-CPU")
    points = pixel1_points(data)
    blocks = blocks_of(networks["mobilenet_v2"])
    wide = rescaled(blocks, 1.4, 224, bits=32, classes=1001)
    old = {"MobileNetV2-1.4": _error("pixel1", wide, totals["MobileNetV2-1.4"][0])}
    new = {}
    for name, table in NETWORKS.items():
        # The table of MobileNetV2 expands the first block too, which the network as published does not.
        is_v2 = name == "MobileNetV2"
        work = rescaled(blocks, 1.0, 224, bits=32, classes=1001) if is_v2 else workload(networks[table])
        if name != "MobileNetV3-Large":
            old[name] = _error("pixel1", work, totals[name][0])
        if name in RUNTIME_OF_2020:
            new[name] = _error("pixel1", work, totals[name][-1])
    variants = summary(left_out(FORMS["pixel1"], points))
    operators = summary(_of_preset("pixel1", points))
    count = len(points.names)
    return [
        Line("pixel1", "totals of MobileNetV1 (AMC), by variant", 4, "left out", variants, {"max": 0.04}),
        Line("pixel1", "operators of MobileNetV1 (AMC)", count, "fitted", operators, {}),
        Line("pixel1", "totals of other networks, 2018", len(old), "unseen", summary(old), {"mean": 0.08}),
        Line("pixel1", "totals under a runtime of 2020", len(new), "unseen", summary(new), {}),
    ]


def _int8(data: Path) -> list[Line]:
    points = int8_points(data)
    # One total is in float, and has a coefficient to itself: leaving it out would leave nothing.
    found = left_out(FORMS["phone-int8"], points, always=[IN_FLOAT])
    fitted = _of_preset("phone-int8", points)
    what = "totals of quantized MobileNetV2"
    return [
        Line("phone-int8", f"{what}, and one in float", len(fitted), "fitted", summary(fitted), {}),
        Line("phone-int8", what, len(found), "left out", summary(found), {}),
    ]


def _xeon(data: Path) -> list[Line]:
    points = xeon_points(data)
    name = "xeon-e5-2640v4"
    fitted, found = summary(_of_preset(name, points)), summary(left_out(FORMS[name], points))
    return [
        Line(name, "totals of ProxylessNAS", 3, "fitted", fitted, {}),
        Line(name, "totals of ProxylessNAS", 3, "left out", found, {}),
    ]
