"""GPUs against published times at small and large batches, and whether a network made for one wins there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from fits.gpu import FREE, HOST_BOUND, Case, cases_of, figures_of, jetson_cases, left_out, ofa_cases, power, predict

from accuracy import Line
from accuracy.linear_cpu import summary

__all__ = ["lines"]

BAR = {"max": 0.10}
# A line through four networks stands for them where their layers are not at hand.
LINES = {"v100:eager-2020": "the line through four networks at batch 64", "gtx1080ti": "the same at batch 64"}
SPECIALIZED = "ProxylessNAS-GPU"

Evidence = Literal["fitted", "left out", "unseen"]


def lines(data: Path) -> list[Line]:
    """All comparisons of the family."""
    return [
        *_networks(data, "v100", "networks at batch 8 (tables 1 and 2)"),
        _specialized(cases_of(data, "v100")),
        *(_line(data, target) for target in LINES),
        _totals("gtx1080ti", "one of the four networks", "fitted", ofa_cases("1080ti"), BAR),
        *_networks(data, "titan-xp", "networks at batch 50 (table 3)"),
        *_networks(data, "jetson-tx2", "networks at batch 16, TensorRT and eager"),
        *_jetson(data),
    ]


def _errors(target: str, cases: Sequence[Case]) -> dict[str, float]:
    found = predict(figures_of(target), cases) / np.array([case.seconds for case in cases]) - 1.0
    return dict(zip([case.name for case in cases], found.tolist(), strict=True))


def _networks(data: Path, target: str, against: str) -> list[Line]:
    cases = cases_of(data, target)
    held = left_out(figures_of(target), FREE[target], cases)
    fitted = _errors(target, cases)
    return [
        Line(target, against, len(cases), "fitted", summary(fitted) | fitted, BAR),
        Line(target, against, len(cases), "left out", summary(held) | held, BAR),
    ]


def _line(data: Path, target: str) -> Line:
    errors = _errors(target, cases_of(data, target))
    return Line(target, LINES[target], len(errors), "fitted", summary(errors), BAR)


def _totals(target: str, against: str, evidence: Evidence, cases: Sequence[Case], bar: Mapping[str, float]) -> Line:
    errors = _errors(target, cases)
    return Line(target, against, len(errors), evidence, summary(errors) | errors, dict(bar))


def _specialized(cases: Sequence[Case]) -> Line:
    """Whether the network searched for this GPU is the cheapest of all published, as it was measured to be."""
    seconds = dict(zip([case.name for case in cases], predict(figures_of("v100"), cases).tolist(), strict=True))
    own = seconds.pop(SPECIALIZED)
    best = min(seconds.values())
    figure = {"order": float(own < best), "margin": best / own - 1.0}
    return Line("v100", f"{SPECIALIZED} is the cheapest of all (table 1)", len(cases), "fitted", figure, {"order": 1.0})


def _jetson(data: Path) -> list[Line]:
    cases = jetson_cases(data)
    small = [case for case in cases if case.name in HOST_BOUND]
    _, watts = power(data, cases_of(data, "jetson-tx2"))
    set_w = figures_of("jetson-tx2")["power"]
    fitted = {name: set_w / value - 1.0 for name, value in watts.items()}
    return [
        _totals("jetson-tx2:compiled", "two small networks, which wait for the host", "unseen", small, {}),
        Line("jetson-tx2:compiled", "power in networks at batch 16", len(fitted), "fitted", summary(fitted), {}),
    ]
