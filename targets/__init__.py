"""Hardware targets: what every operator costs on a device.

A :class:`Workload`, a row for each operator, goes to :meth:`Target.estimate`, which gives latency, energy, sizes and
MACs for thousands of policies at once. A target is one of the presets, a TOML file of one's own, or this machine,
measured.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from fxopt.errors import TargetError, UnknownNameError
from fxopt.targets._presets import (
    Figure,
    Preset,
    PresetTarget,
    builtin_presets,
    find_preset,
    modes_of,
    read_preset,
)
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
    """Names that :func:`load` knows: the presets, their modes as ``name:mode``, and the measured host."""
    presets = builtin_presets()
    modes = [f"{name}:{mode}" for name, path in presets.items() for mode in modes_of(path)]
    return sorted([*presets, *modes, HOST])


def load(
    target: str | os.PathLike[str] | Target,
    *,
    mode: str = "",
    profiler: Profiler | None = None,
    fingerprint: str | None = None,
    progress: Progress | None = None,
) -> Target:
    """Load a target.

    Args:
        target: One of :func:`names`, the path of a ``.toml`` file, or a target, which comes back as it is.
        mode: Another way to run the device, of those its file describes: ``load("v100", mode="compiled")`` is
            ``load("v100:compiled")``.
        profiler: For "host": times operators (see :data:`fxopt.targets.host.Profiler`).
        fingerprint: For "host": tells this machine and runtime from others.
        progress: For "host": told how far measuring is.

    Raises:
        UnknownNameError: If there is no target of that name, or no such mode of it.
        TargetError: If a file cannot be read or is wrong (with the line and the reason), the options of "host" are
            given to another target, or a mode to what has none.
    """
    if mode and (isinstance(target, Target) or str(target) == HOST):
        raise TargetError(f"{target!r} has no modes; name a preset or a file, as in load('v100', mode={mode!r}).")
    if isinstance(target, (str, os.PathLike)) and str(target) == HOST:
        from fxopt.targets.host import HostTarget

        return HostTarget(profiler, fingerprint, progress)
    if profiler is not None or fingerprint is not None or progress is not None:
        raise TargetError(f"Only the target {HOST!r} is measured; {target!r} takes no profiler.")
    if isinstance(target, Target):
        return target
    name = f"{target}:{mode}" if mode else str(target)
    found = find_preset(name)
    if found is None:
        raise UnknownNameError("target", name, names())
    return PresetTarget(read_preset(*found))


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
        modes = loaded.preset.modes
        base = next((info.name.removesuffix(f":{mode}") for mode in modes if info.name.endswith(f":{mode}")), info.name)
        if modes:
            lines.append("modes: " + ", ".join([base, *(f"{base}:{mode}" for mode in modes)]))
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
