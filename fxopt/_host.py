"""Targets as people name them: this machine comes with the means to measure it. There need be no torch on it."""

from __future__ import annotations

import os
from collections.abc import Callable

from fxopt import targets
from fxopt.errors import TargetError
from fxopt.progress import Progress

__all__ = ["load_target", "measuring"]

_TASK = "measuring this machine"


def load_target(target: str | os.PathLike[str] | targets.Target, show: Progress) -> targets.Target:
    """A target by name or from its file; ``"host"`` measures what it does not know yet.

    Args:
        target: A name, the path of a TOML file, or a target, which is given back.
        show: Told how far measuring is.

    Raises:
        TargetError: If it is something else, or the file is wrong.
        UnknownNameError: If there is no target of that name.
    """
    if not isinstance(target, (str, os.PathLike, targets.Target)):
        raise TargetError(f"target is a {type(target).__name__}; give a name, the path of a TOML file, or a target.")
    if str(target) != targets.HOST:
        return targets.load(target)
    from fxopt.export import host_fingerprint, onnxruntime_profiler

    found = host_fingerprint()
    return targets.load(targets.HOST, profiler=onnxruntime_profiler, fingerprint=found, progress=measuring(show))


def measuring(show: Progress) -> Callable[[int, int, str], None]:
    """What the host target tells how far measuring is, passed on to ``show``."""

    def measured(done: int, total: int, what: str) -> None:
        if done == 1:
            show.start(_TASK, total)
        show.advance(_TASK, 1, what)
        if done == total:
            show.finish(_TASK)

    return measured
