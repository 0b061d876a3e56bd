"""``fxopt calibrate``: this machine, measured, as a target file. There need be no torch on it."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING

from fxopt._host import measuring
from fxopt.progress import Progress

if TYPE_CHECKING:
    from fxopt.targets import Target

__all__ = ["calibrate"]


def calibrate(out: Path, show: Progress, *, name: str | None, threads: int, runs: int, quick: bool) -> Target:
    """Measure what is missing of the standard sweep and write the target file.

    Args:
        out: The file, whose name ends in ``.toml``.
        show: Told how far measuring is.
        name: The target's name; by default that of the file.
        threads: Threads inside an operator.
        runs: Runs of each operator.
        quick: Measure every second operator alone.

    Returns:
        The target, as read from the file.

    Raises:
        FxoptError: If onnxruntime is missing or runs nothing, or the file cannot be written.
    """
    from fxopt import targets
    from fxopt.export.profiler import host_fingerprint, onnxruntime_profiler
    from fxopt.targets.host import HostTarget, check_board

    check_board(out, name)
    profiler = functools.partial(onnxruntime_profiler, threads=threads, runs=runs)
    host = HostTarget(profiler, host_fingerprint(threads), measuring(show))
    host.calibrate(quick=quick)
    return targets.load(host.save(out, name))
