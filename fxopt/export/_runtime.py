"""onnxruntime, always with the same settings: spinning off, a fixed number of threads, nothing on the console."""

from __future__ import annotations

import os
import platform
import re
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from fxopt.errors import ExportError

if TYPE_CHECKING:
    import onnx
    import onnxruntime

__all__ = [
    "CARRIERS",
    "cpu_name",
    "exact_integers",
    "has_integer_instructions",
    "host_fingerprint",
    "is_integer",
    "make_session",
    "optimized",
]

CARRIERS = frozenset(
    name
    for names in (
        "QuantizeLinear DequantizeLinear Transpose Reshape Flatten Squeeze Unsqueeze Identity Constant Expand",
        "ReorderInput ReorderOutput Cast Shape Gather Concat Slice Split",
    )
    for name in names.split()
)
"""Operators that move or convert values and compute nothing."""

_INTEGER = frozenset(
    (
        "NhwcMaxPool",
        "QGemm",
        "MatMulInteger",
        "MatMulIntegerToFloat",
        "MatMulNBits",
        "ConvInteger",
        "DynamicQuantizeMatMul",
        "QAttention",
    )
)
_DOT_PRODUCTS = ("avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm")
_ISA_FLAGS = ("avx2", "avx512f", "sve", *_DOT_PRODUCTS)


def make_session(
    model: str | os.PathLike[str] | bytes,
    *,
    threads: int = 1,
    profile_prefix: str | None = None,
    optimized_path: str | None = None,
    settings: Mapping[str, str] | None = None,
) -> onnxruntime.InferenceSession:
    """An onnxruntime session on the CPU.

    Args:
        model: A file, or a serialized model.
        threads: Threads inside an operator.
        profile_prefix: Where to write a profile, or None for none.
        optimized_path: Where to write the optimized graph, or None.
        settings: Further session settings.

    Raises:
        ExportError: If onnxruntime cannot load the model.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    for name, value in (settings or {}).items():
        options.add_session_config_entry(name, value)
    if profile_prefix is not None:
        options.enable_profiling = True
        options.profile_file_prefix = profile_prefix
    if optimized_path is not None:
        options.optimized_model_filepath = optimized_path
    source = model if isinstance(model, bytes) else os.fspath(model)
    try:
        return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as failure:
        what = "the model" if isinstance(model, bytes) else os.fspath(model)
        missing = re.search(r"NOT_IMPLEMENTED.*implementation for (\w+)", str(failure))
        if missing is not None:
            raise ExportError(
                f"onnxruntime {onnxruntime.__version__} has no kernel for {missing[1]} in the types that {what} has; "
                "what is in float64, convert with .float()."
            ) from failure
        raise ExportError(f"onnxruntime {onnxruntime.__version__} cannot load {what}: {failure}") from failure


def optimized(model: str | os.PathLike[str] | bytes, settings: Mapping[str, str] | None = None) -> onnx.ModelProto:
    """The graph that onnxruntime really runs.

    Raises:
        ExportError: If onnxruntime cannot load the model.
    """
    import onnx

    with tempfile.TemporaryDirectory(prefix="fxopt-") as folder:
        path = str(Path(folder, "optimized.onnx"))
        make_session(model, optimized_path=path, settings=settings)
        return onnx.load(path, load_external_data=False)


def is_integer(operator: str) -> bool:
    """Whether an operator of an optimized graph computes on integers."""
    return operator.startswith("QLinear") or operator in _INTEGER


@cache
def cpu_flags() -> tuple[str, ...]:
    """The instruction sets that matter to integer arithmetic, as far as the system tells."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return ()
    words = {word for line in text.splitlines() if line.startswith(("flags", "Features")) for word in line.split()}
    return tuple(flag for flag in _ISA_FLAGS if flag in words)


def has_integer_instructions() -> bool:
    """Whether the CPU has 8-bit dot products; true where the system does not tell."""
    flags = cpu_flags()
    return not flags or any(flag in _DOT_PRODUCTS for flag in flags)


def exact_integers() -> dict[str, str]:
    """Session settings for exact integers: on x86 without VNNI the fast 8-bit kernel saturates in between."""
    return {} if has_integer_instructions() else {"session.x64quantprecision": "1"}


def host_fingerprint(threads: int = 1) -> str:
    """What measured times depend on, in one line: processor, cores, instruction sets, runtime, threads.

    Args:
        threads: Threads inside an operator.
    """
    import onnxruntime

    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parts = (
        cpu_name(),
        f"{available} cores",
        " ".join(cpu_flags()) or "no 8-bit instructions known",
        f"{platform.system()} {platform.machine()}",
        f"onnxruntime {onnxruntime.__version__}",
        f"{threads} threads",
    )
    return ", ".join(parts)


def cpu_name() -> str:
    """The processor's name, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith(("model name", "Model")):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
