"""ONNX files that were proved in onnxruntime, and how fast they run.

onnx and onnxruntime are imported when they are used, not before.
"""

from __future__ import annotations

from fxopt.export._export import ExportReport, export_onnx
from fxopt.export._fastest import FastestBits, fastest_bits
from fxopt.export._forms import Format
from fxopt.export._measure import Measurement, Timing, measure
from fxopt.export._module import OnnxModule
from fxopt.export._runtime import host_fingerprint
from fxopt.export.profiler import onnxruntime_profiler

__all__ = [
    "ExportReport",
    "FastestBits",
    "Format",
    "Measurement",
    "OnnxModule",
    "Timing",
    "export_onnx",
    "fastest_bits",
    "host_fingerprint",
    "measure",
    "onnxruntime_profiler",
]
