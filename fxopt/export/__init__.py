"""ONNX files that were proved in onnxruntime, and how fast they run.

onnx and onnxruntime are imported when they are used, not before. So is torch: the profiler runs on boards without it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fxopt.export._export import ExportReport as ExportReport
    from fxopt.export._export import export_onnx as export_onnx
    from fxopt.export._fastest import FastestBits as FastestBits
    from fxopt.export._fastest import fastest_bits as fastest_bits
    from fxopt.export._forms import Format as Format
    from fxopt.export._kernels import Kernel as Kernel
    from fxopt.export._layers import ExportedLayer as ExportedLayer
    from fxopt.export._measure import Measurement as Measurement
    from fxopt.export._measure import Timing as Timing
    from fxopt.export._measure import measure as measure
    from fxopt.export._module import OnnxModule as OnnxModule
    from fxopt.export._runtime import host_fingerprint as host_fingerprint
    from fxopt.export.profiler import onnxruntime_profiler as onnxruntime_profiler

_LAZY = {
    "ExportReport": "_export",
    "ExportedLayer": "_layers",
    "FastestBits": "_fastest",
    "Format": "_forms",
    "Kernel": "_kernels",
    "Measurement": "_measure",
    "OnnxModule": "_module",
    "Timing": "_measure",
    "export_onnx": "_export",
    "fastest_bits": "_fastest",
    "host_fingerprint": "_runtime",
    "measure": "_measure",
    "onnxruntime_profiler": "profiler",
}

__all__ = [*_LAZY]


def __getattr__(name: str) -> Any:
    module = _LAZY.get(name)
    if module is None:
        raise AttributeError(f"module 'fxopt.export' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"fxopt.export.{module}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
