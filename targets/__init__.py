"""Hardware targets: what every operator costs on a device.

A :class:`Workload`, a row for each operator, goes to :meth:`Target.estimate`, which gives latency, energy, sizes and
MACs for thousands of policies at once. A target is one of the presets, a TOML file of one's own, or this machine,
measured.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxopt.errors import TargetError, UnknownNameError
from fxopt.targets._presets import Figure, Preset, PresetTarget, builtin_presets, read_preset
from fxopt.targets.base import METRICS, Estimate, RowCosts, Status, Target, TargetInfo
from fxopt.targets.rows import ROW_DTYPE, Activation, ColumnWorkload, OpKind, Workload, default_rows, make_row

if TYPE_CHECKING:
    from fxopt.targets.host import HostTarget as HostTarget
    from fxopt.targets.host import Profiler as Profiler
    from fxopt.targets.host import Progress as Progress

__all__ = [
    "METRICS",
    "ROW_DTYPE",
    "Activation",
    "ColumnWorkload",
    "Estimate",
    "Figure",
    "HostTarget",
    "OpKind",
    "Preset",
    "PresetTarget",
    "RowCosts",
    "Status",
    "Target",
    "TargetInfo",
    "Workload",
    "default_rows",
    "describe",
    "load",
    "make_row",
    "names",
    "read_preset",
]

HOST = "host"


def names() -> list[str]:
    """Names that :func:`load` knows: the presets, and the measured host."""
    return sorted([*builtin_presets(), HOST])


def load(
    target: str | os.PathLike[str] | Target,
    *,
    profiler: Profiler | None = None,
    fingerprint: str | None = None,
    progress: Progress | None = None,
) -> Target:
    """Load a target.

    Args:
        target: One of :func:`names`, the path of a ``.toml`` file, or a target, which comes back as it is.
        profiler: For "host": times operators (see :data:`fxopt.targets.host.Profiler`).
        fingerprint: For "host": tells this machine and runtime from others.
        progress: For "host": told how far measuring is.

    Raises:
        UnknownNameError: If there is no target of that name.
        TargetError: If a file cannot be read or is wrong (with the line and the reason), or the options of "host"
            are given to another target.
    """
    if isinstance(target, (str, os.PathLike)) and str(target) == HOST:
        from fxopt.targets.host import HostTarget

        return HostTarget(profiler, fingerprint, progress)
    if profiler is not None or fingerprint is not None or progress is not None:
        raise TargetError(f"Only the target {HOST!r} is measured; {target!r} takes no profiler.")
    if isinstance(target, Target):
        return target
    presets = builtin_presets()
    if str(target) in presets:
        return PresetTarget(read_preset(presets[str(target)]))
    if Path(target).suffix == ".toml":
        return PresetTarget(read_preset(Path(target)))
    raise UnknownNameError("target", str(target), names())


def describe(target: str | os.PathLike[str] | Target) -> str:
    """Everything a target says of itself, as text: device, status and error, bits, energy, figures, sources."""
    loaded = load(target)
    info = loaded.info
    widths = f" at {', '.join(map(str, info.calibrated_bits))} bits" if info.calibrated_bits else ""
    widths += f", ranks only at {', '.join(map(str, info.ranks_only_bits))}" if info.ranks_only_bits else ""
    lines = [
        f"{info.name}: {info.title}",
        f"model: {info.family}; {'fuses' if info.fuses else 'does not fuse'} operators",
        f"status: {info.status}{widths}. {info.error}",
        f"channels in multiples of {info.capabilities.channel_tile}; batch {info.capabilities.batch}",
    ]
    lines += [
        f"bits of {kind}: " + ", ".join(f"{weight}/{activation}" for weight, activation in pairs)
        for kind, pairs in info.capabilities.bits.items()
    ]
    lines.append(f"energy: {info.energy_reason or 'estimated'}")
    if isinstance(loaded, PresetTarget):
        lines += [
            f"{key} = {figure.value:g} {figure.unit if figure.unit != '1' else ''}".rstrip() + f" [{figure.source}]"
            for key, figure in loaded.preset.figures.items()
        ]
    lines += [f"[{key}] {text}" for key, text in info.sources.items()]
    return "\n".join(lines)


def __getattr__(name: str) -> Any:
    # The host target brings scipy: it is loaded when somebody asks for it.
    if name != "HostTarget":
        raise AttributeError(f"module 'fxopt.targets' has no attribute {name!r}")
    from fxopt.targets.host import HostTarget

    return HostTarget
