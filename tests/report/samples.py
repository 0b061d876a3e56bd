"""Reports to test with."""

from __future__ import annotations

from typing import Any

from fxopt.report import BudgetLine, LayerLine, Metrics, PassLine, Report, TargetLine


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
