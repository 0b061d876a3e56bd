"""Which channel groups an option of PruneChannels is about, and how many of their units may stay."""

from __future__ import annotations

import difflib
import fnmatch
import math
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import numpy as np
from torch import fx

from fxopt.errors import PassError, PolicyError
from fxopt.graph import ops
from fxopt.graph.channels import ChannelGraph, ChannelGroup, ParameterUse

__all__ = ["Bounds", "allowed", "as_bounds", "checked", "choices", "matched", "operator_at"]

_LAYERS = ("conv", "linear", "matmul", "embedding")

Bounds: TypeAlias = tuple[tuple[str, tuple[float, float]], ...]


def as_bounds(given: Any) -> Bounds:
    """Bounds by pattern, from a mapping or from pairs.

    Raises:
        PassError: If a bound is no pair of fractions in order.
    """
    pairs: Iterable[Any] = given.items() if isinstance(given, Mapping) else given
    found = []
    try:
        for pattern, (low, high) in pairs:
            found.append((str(pattern), (float(low), float(high))))
    except (TypeError, ValueError) as failure:
        raise PassError(
            f"bounds map patterns of module paths to (least, largest) fractions, got {given!r}."
        ) from failure
    for pattern, (low, high) in found:
        if not (0.0 <= low <= high <= 1.0 and high > 0.0):
            raise PassError(f"The bounds of {pattern!r} are {(low, high)}; give 0 <= least <= largest <= 1.")
    return tuple(found)


def matched(gm: fx.GraphModule, channels: ChannelGraph, patterns: Iterable[str], option: str) -> dict[str, list[str]]:
    """The patterns that are about each site: they match a module that makes its channels or one around it.

    Raises:
        PassError: If a pattern matches no module.
    """
    patterns = tuple(patterns)
    if not patterns:
        return {}
    paths = [path for path, _ in gm.named_modules() if path]
    for pattern in patterns:
        if not fnmatch.filter(paths, pattern):
            nearest = difflib.get_close_matches(pattern, paths, n=1, cutoff=0.5)
            hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
            raise PassError(f"The pattern {pattern!r} of {option} matches no module.{hint}")
    found: dict[str, list[str]] = {}
    for group in channels.groups:
        around = {path for use in group.members if use.role != "in" for path in _ancestry(use.path)}
        hits = [one for one in patterns if any(fnmatch.fnmatchcase(path, one) for path in around)]
        if hits:
            found[group.site] = hits
    return found


def allowed(size: int, bounds: Iterable[tuple[float, float]]) -> tuple[int, int]:
    """The least and the largest number of units to keep, of ``size``, within all bounds; at least one.

    Raises:
        PassError: If the bounds leave nothing.
    """
    low, high = 1, size
    for least, largest in bounds:
        low = max(low, math.ceil(least * size - 1e-9))
        high = min(high, math.floor(largest * size + 1e-9))
    if low > high:
        raise PassError(f"The bounds leave nothing between {low} and {high} of {size} channels; widen one of them.")
    return low, high


def choices(group: ChannelGroup, tile: int, low: int, high: int) -> tuple[int, ...]:
    """Counts of units with a multiple of ``tile`` channels in the site's layer, and the full size, within bounds.

    If none is within, the nearest multiple above the lower bound, or the full size.
    """
    per_unit = max(1, int((maker(group).atoms == group.units[0]).sum()))
    step = tile // math.gcd(tile, per_unit)
    counts = sorted({*range(step, group.size + 1, step), group.size})
    return tuple(count for count in counts if low <= count <= high) or tuple(c for c in counts if c >= low)[:1]


def maker(group: ChannelGroup) -> ParameterUse:
    """The parameter that gives a group its site."""
    return next(use for use in group.members if use.role == "out" and np.isin(group.units[0], use.atoms))


def operator_at(gm: fx.GraphModule, group: ChannelGroup) -> str:
    """Kind of the layer that makes a group's channels, called as a module or as a function of its weight."""
    first = maker(group)
    for node in gm.graph.find_nodes(op="call_module", target=first.path):
        return ops.semantics(gm, node).kind
    for node in gm.graph.find_nodes(op="get_attr", target=f"{first.path}.{first.name}".removeprefix(".")):
        pending = list(node.users)
        while pending:
            kind = ops.semantics(gm, pending[0]).kind
            if kind in _LAYERS:
                return "linear" if kind == "matmul" else kind
            pending = [*pending[1:], *pending[0].users]
    return ""


def checked(
    site: str, choice: Any, channels: ChannelGraph, kept_out: Mapping[str, str], limits: tuple[int, int] | None
) -> int:
    """The count that a policy keeps at a site.

    Raises:
        PolicyError: If the site is unknown or frozen, or the count out of range.
    """
    groups = channels.by_site()
    frozen = {group.site: group for group in channels.frozen}
    group = groups.get(site) or frozen.get(site)
    if group is None:
        nearest = difflib.get_close_matches(site, groups, n=1, cutoff=0.5)
        hint = f" Did you mean {nearest[0]!r}?" if nearest else " The policy may be of another model."
        raise PolicyError(f"The graph has no channels to cut at {site!r}.{hint}")
    if isinstance(choice, bool) or not isinstance(choice, int) or not 1 <= choice <= group.size:
        raise PolicyError(f"Cannot keep {choice!r} channels at {site!r}; it has {group.size}, keep 1 to {group.size}.")
    if choice == group.size:
        return choice
    if group.frozen_by is not None:
        raise PolicyError(f"The channels at {site!r} cannot be cut: {group.frozen_by} freezes them.")
    if site in kept_out:
        raise PolicyError(f"The policy cuts channels at {site!r}, which is {kept_out[site]}.")
    if limits is not None and choice < limits[0]:
        raise PolicyError(
            f"The policy keeps {choice} of {group.size} channels at {site!r}; bounds ask for {limits[0]}."
        )
    return choice


def _ancestry(path: str) -> list[str]:
    """A module path and those of the modules around it."""
    parts = path.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
