"""One form of result for every benchmark: JSON on standard output, progress on standard error."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from fxopt.export._runtime import cpu_name

PACKAGES = ("torch", "numpy", "onnx", "onnxruntime", "pytorchcv", "timm", "torchvision", "transformers")


def environment() -> dict[str, Any]:
    """Versions, cores and processor that the figures depend on, and the time (UTC); no package is imported for it."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    has_affinity = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "processor": cpu_name(),
        "cores": cores,
        "machine": platform.machine(),
        "versions": versions,
    }


def keep_memory() -> None:
    """Let glibc keep freed memory: fresh pages for every activation took a third of the time of training here."""
    never_trim, no_maps = (-1, 2**31 - 1), (-4, 0)
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        for option, value in (never_trim, no_maps):
            libc.mallopt(option, value)


def finish(benchmark: str, results: Mapping[str, Any], **setting: Any) -> None:
    """Print a benchmark's results with its setting and the environment."""
    document = {"benchmark": benchmark, "environment": environment(), **setting, "results": results}
    print(json.dumps(document, indent=2))


def progress(line: str) -> None:
    """Show one line of progress."""
    print(line, file=sys.stderr, flush=True)
