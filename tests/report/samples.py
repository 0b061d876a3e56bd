"""Reports to test with."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np

from fxopt.report import (
    BudgetLine,
    CandidateLine,
    CurveLine,
    EpochLine,
    LayerLine,
    Metrics,
    OperatorLine,
    PassLine,
    Report,
    Roofline,
    SlowLine,
    SupernetLine,
    TargetLine,
    TimeLine,
    roofline,
)
from fxopt.targets import OpKind, Target, Workload, load, make_row
from tests.targets.oracle import conv


def metrics(**changes: Any) -> Metrics:
    known: dict[str, Any] = {
        "accuracy": 0.98,
        "macs": 4.0e6,
        "parameters": 50_000,
        "size_bytes": 200_000.0,
        "latency_s": 4.0e-3,
        "energy_j": None,
        "memory_bytes": 64_000.0,
        "measured_latency_s": 1.0e-3,
    }
    return Metrics(**(known | changes))


def layer(site: str = "stem.0", **changes: Any) -> LayerLine:
    known: dict[str, Any] = {
        "site": site,
        "kind": "conv",
        "macs_before": 1e6,
        "macs_after": 5e5,
        "channels_before": 16,
        "channels_after": 8,
        "weight_bits": 8,
        "activation_bits": 8,
        "latency_before_s": 1e-3,
        "latency_after_s": 4e-4,
    }
    return LayerLine(**(known | changes))


def report(**changes: Any) -> Report:
    after = metrics(accuracy=0.975, macs=2.0e6, parameters=24_000, size_bytes=50_000.0, latency_s=2.0e-3)
    known: dict[str, Any] = {
        "title": "Net for pixel1",
        "target": TargetLine("pixel1", "Google Pixel 1, one thread", "calibrated", "Mean error 2.1%.", ("At 8 bits.",)),
        "before": metrics(),
        "after": after,
        "budgets": (BudgetLine("latency", "latency <= 0.6 of the original", 2.4e-3, 4.0e-3, 2.0e-3),),
        "passes": (PassLine("prune-channels", "after the cut", 0.9, None), PassLine("quantize", "", None, after)),
        "layers": (layer("stem.0"), layer("head", latency_before_s=3e-3, weight_bits=32, activation_bits=32)),
        "frozen": (("blocks.0", "reaches the output"),),
        "barriers": ("custom_op",),
        "uncosted": ("roll",),
        "engine": "evolution",
        "trials": 4,
        "curve": (None, 0.5, 0.5, 0.9),
        "score_name": "accuracy",
        "notes": ("No training data was given.",),
        "seed": 3,
        "versions": {"python": "3.11.2", "torch": "2.13.0"},
        "export": {
            "path": "model.onnx",
            "file_bytes": 12_300,
            "max_abs_diff": 0.0123456,
            "top1_agreement": None,
            "latency_s": 0.00123,
            "layers": [
                {
                    "site": "conv<1>",
                    "weight_bits": 4,
                    "activation_bits": 8,
                    "stored_bytes": 640,
                    "kernel": "QLinearConv",
                    "integer": True,
                },
                {
                    "site": "last",
                    "weight_bits": 32,
                    "activation_bits": 32,
                    "stored_bytes": 99,
                    "kernel": "",
                    "integer": None,
                },
            ],
            "kernels": [{"name": "node_a<b>", "operator": "QLinearConv", "integer": True, "layer": "conv"}],
        },
    }
    return Report(**(known | changes))


def workload(bits: int = 8) -> Workload:
    widths = {"weight_bits": bits, "activation_bits": bits, "output_bits": bits}
    rows = [conv(16, 32, 14, 3, **widths), make_row(OpKind.POOL, c=32, k=32, in_h=14, out_h=1, kernel_h=14)]
    rows.append(make_row(OpKind.LINEAR, c=32, k=10, **widths))
    return Workload(np.concatenate(rows), ["stem<0>", "pool", "head"])


def roofs_of(target: str | Target = "vu9p") -> Roofline:
    return roofline(load(target), workload(), workload(4))


def whole() -> Report:
    """A report that has something in every section."""
    bounds = ("compute", "memory", "launch", "")
    layers = tuple(
        layer(
            f"blocks.{index}.conv",
            channels_after=16 - index,
            latency_before_s=1e-3 / (index + 1),
            latency_after_s=5e-4 / (index + 1),
            weight_bits=(2, 4, 8)[index % 3],
            bound=bounds[index % 4],
            frozen_by="cat (blocks.cat)" if index == 5 else "",
        )
        for index in range(12)
    )
    costs = [metrics(accuracy=score, latency_s=latency) for score, latency in ((0.9, 2.4e-3), (0.96, 2.4e-3))]
    return report(
        layers=layers,
        passes=(
            PassLine("prune-channels", "7 of 12 decisions", 0.9, costs[0]),
            PassLine("fine-tune", "epochs: 2", 0.96, costs[1]),
            PassLine("quantize", "calibrated on: loader", 0.975, report().after),
        ),
        roofline=roofs_of(),
        operators=(OperatorLine("blocks.0", "mb6-k3", "mb3-k5", ("mb3-k3", "mb3-k5", "mb6-k3", "zero")),),
        supernet=SupernetLine(
            {"latency": 3e-3},
            (
                EpochLine(2.1, None, 1.0, {"latency": 4.5e-3}),
                EpochLine(1.2, 1.4, 0.8, {"latency": 3.6e-3}),
                EpochLine(0.7, 1.1, 0.3, {"latency": 2.7e-3}),
            ),
        ),
        times=(TimeLine("compute", 3e-3, 1e-3), TimeLine("memory", 8e-4, 8e-4), TimeLine("every run", 2e-4, 2e-4)),
        slow=(
            SlowLine("blocks.0.conv", "conv", 5e-4, 0.25, "memory", "5% of the peak", "cat (blocks.cat)", "Cut bits."),
        ),
        trials=12,
        curve=tuple(None if trial == 0 else 0.9 - 0.4 * math.exp(-trial / 3) for trial in range(12)),
        curves=(
            CurveLine("uniform", 0, (0.7,) * 12),
            *(CurveLine("random", seed, tuple(0.6 + 0.01 * (trial + seed) for trial in range(12))) for seed in (0, 1)),
        ),
        candidates=tuple(
            CandidateLine(
                trial, 0.5 + 0.04 * trial, 1e-3 + 1e-4 * trial * (-1) ** trial, 5e4, 2e6, None, chosen=trial == 9
            )
            for trial in range(12)
        ),
    )


@functools.cache
def page_of_whole() -> str:
    return whole().to_html()
