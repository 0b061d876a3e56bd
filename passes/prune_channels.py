"""Cut channels out of a network: coupled layers together, the least important channels first."""

from __future__ import annotations

import difflib
import fnmatch
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from torch import fx

from fxopt.decisions import Capabilities, Decision, SearchSpace
from fxopt.errors import PassError, PolicyError, UnknownNameError
from fxopt.graph import ops, verify
from fxopt.graph.channels import ChannelGraph, ChannelGroup, analyze
from fxopt.passes._calibrate import refuse_quantized
from fxopt.passes._cutting import Scores, Units, choose_removed, cut, kept_indices, l1_importance, mask, saved_elements
from fxopt.passes._fork import fork
from fxopt.passes.base import PassResult, TunablePass

__all__ = ["ChannelCut", "PruneChannels"]

_IMPORTANCES: dict[str, Callable[[fx.GraphModule, ChannelGroup], Scores]] = {"l1": l1_importance}


@dataclass(frozen=True)
class ChannelCut:
    """What is cut from one channel group.

    Attributes:
        site: The group's site, as the policy names it.
        operator: Kind of the layer there: ``conv``, ``linear`` or ``embedding``.
        size: Number of units before.
        kept: Number of units after.
        layers: Module paths whose parameters or buffers shrink, in graph order.
        saved_elements: Elements of parameters and buffers that go if this group alone is cut.
        reason: Why the group cannot be cut, or None if it can.
    """

    site: str
    operator: str
    size: int
    kept: int
    layers: tuple[str, ...]
    saved_elements: int
    reason: str | None = None


@dataclass(frozen=True)
class PruneChannels(TunablePass):
    """Cut channels, all layers of a coupled group together.

    A decision ``("channels", site)`` is the number of *units* to keep in a group of coupled channels. A unit is what
    can only be cut as one: a single channel, or one channel in every group of a grouped convolution. The site is the
    module path of the first layer that makes the channels. The units with the largest importance stay; of two equal
    ones the first stays. Layers keep their classes and paths; their parameters are replaced by smaller ones.

    Attributes:
        policy: How many units each site keeps; what is left out keeps all.
        ignore: Patterns (``fnmatch``) of module paths. The channels that a matching module makes, or one inside it,
            are not cut.
        round_to: Kept channel counts are offered in multiples of this, and of the target's tile.
        importance: ``"l1"``: the summed magnitude of the weights that read the unit, in all layers behind it (AMC,
            He et al. 2018, section 3.2). Scores are compared within a group only.
    """

    name: ClassVar[str] = "prune-channels"
    kinds: ClassVar[tuple[str, ...]] = ("channels",)
    ignore: tuple[str, ...] = ()
    round_to: int = 1
    importance: str = "l1"

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            PassError: If ``round_to`` is below 1 or ``ignore`` holds no patterns.
            UnknownNameError: If there is no such importance.
        """
        super().__post_init__()
        given: Any = self.ignore
        patterns = (given,) if isinstance(given, str) else tuple(given)
        if not all(isinstance(pattern, str) for pattern in patterns):
            raise PassError(f"ignore takes patterns of module paths, got {self.ignore!r}.")
        object.__setattr__(self, "ignore", patterns)
        if self.round_to < 1:
            raise PassError(f"round_to has to be at least 1, got {self.round_to}.")
        if self.importance not in _IMPORTANCES:
            raise UnknownNameError("importance", self.importance, _IMPORTANCES)

    def search_space(self, graph_module: fx.GraphModule, capabilities: Capabilities | None = None) -> SearchSpace:
        """One decision for every group that can be cut and is large enough for more than one choice.

        The choices are the kept counts for which the channels of the site's layer are a multiple of ``round_to`` and
        of the target's tile, and the full size, which is the default.

        Raises:
            PassError: If a pattern of ``ignore`` matches no module, or layers are quantized already.
        """
        refuse_quantized(graph_module, self.name)
        tile = math.lcm(self.round_to, capabilities.channel_tile if capabilities else 1)
        verify(graph_module)
        channels = analyze(graph_module)
        ignored = self._ignored(graph_module, channels)
        decisions = []
        for group in channels.groups:
            choices = _choices(group, tile)
            if group.site not in ignored and len(choices) > 1:
                features = {"channels": float(group.size), "weights": float(_weights(graph_module, group))}
                operator = _operator(graph_module, group.site)
                decisions.append(Decision("channels", group.site, choices, group.size, features, operator))
        return SearchSpace(decisions)

    def requires(self, graph_module: fx.GraphModule) -> None:
        """Nothing is quantized yet.

        Raises:
            PassError: If something is.
        """
        refuse_quantized(graph_module, self.name)

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Cut what the policy says.

        Raises:
            PolicyError: If the policy does not fit the graph.
            PassError: If weights are not finite, or a pattern of ``ignore`` matches no module.
        """
        channels = analyze(graph_module)
        removed = self._removed(graph_module, channels)
        if not removed.size:
            return PassResult(graph_module, False)
        cut(graph_module, channels, removed)
        return PassResult(graph_module, True)

    def masked(self, graph_module: fx.GraphModule) -> fx.GraphModule:
        """The same policy by masks: weights that make or read what would be cut are zero, all sizes stay.

        What the masked graph computes equals, up to rounding, what the pruned graph computes.

        Returns:
            A new graph; tensors that are not masked are shared with the given one.

        Raises:
            PolicyError: If the policy does not fit the graph.
            PassError: If weights are not finite, or a pattern of ``ignore`` matches no module.
        """
        verify(graph_module)
        twin = fork(graph_module)
        channels = analyze(twin)
        mask(twin, channels, self._removed(twin, channels))
        return twin

    def kept(self, graph_module: fx.GraphModule) -> dict[tuple[str, str], dict[int, Units]]:
        """The indices that stay of every parameter and buffer that the policy cuts.

        Returns:
            Indices by dimension, by module path and name of the tensor.

        Raises:
            PolicyError: If the policy does not fit the graph.
            PassError: If weights are not finite, or a pattern of ``ignore`` matches no module.
        """
        verify(graph_module)
        channels = analyze(graph_module)
        return kept_indices(channels, self._removed(graph_module, channels))

    def explain(self, graph_module: fx.GraphModule) -> list[ChannelCut]:
        """What would be cut: one entry for every group, those that cannot be cut at the end with the reason.

        Raises:
            PolicyError: If the policy does not fit the graph.
            PassError: If weights are not finite, or a pattern of ``ignore`` matches no module.
        """
        verify(graph_module)
        channels = analyze(graph_module)
        removed = self._removed(graph_module, channels)
        ignored = self._ignored(graph_module, channels)
        cuts = []
        for group in (*channels.groups, *channels.frozen):
            gone = np.intersect1d(group.units, removed)
            reason = ignored.get(group.site) or (f"frozen by {group.frozen_by}" if group.frozen_by else None)
            layers = tuple(dict.fromkeys(use.path for use in group.members)) if gone.size else ()
            saved = saved_elements(graph_module, group, gone) if gone.size else 0
            operator = _operator(graph_module, group.site)
            kept = group.size - len(gone)
            cuts.append(ChannelCut(group.site, operator, group.size, kept, layers, saved, reason))
        return cuts

    def _ignored(self, gm: fx.GraphModule, channels: ChannelGraph) -> dict[str, str]:
        """Sites that are not to be cut, with the reason."""
        paths = [path for path, _ in gm.named_modules() if path]
        for pattern in self.ignore:
            if not fnmatch.filter(paths, pattern):
                nearest = difflib.get_close_matches(pattern, paths, n=1, cutoff=0.5)
                hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
                raise PassError(f"The pattern {pattern!r} of ignore matches no module.{hint}")
        found: dict[str, str] = {}
        for group in channels.groups:
            makers = {use.path for use in group.members if use.role != "in"}
            for pattern in self.ignore:
                if any(fnmatch.fnmatchcase(path, pattern) for maker in makers for path in _ancestry(maker)):
                    found.setdefault(group.site, f"ignored by {pattern!r}")
        return found

    def _removed(self, gm: fx.GraphModule, channels: ChannelGraph) -> Units:
        """Ids of the units that go."""
        ignored = self._ignored(gm, channels)
        groups = channels.by_site()
        removed: list[Units] = []
        for (_, site), choice in self.own_choices.items():
            kept = _checked(site, choice, groups, channels, ignored)
            group = groups.get(site)
            if group is not None and kept < group.size:
                removed.append(choose_removed(group, _IMPORTANCES[self.importance](gm, group), kept))
        return np.concatenate(removed) if removed else np.zeros(0, dtype=np.int64)


def _checked(
    site: str, choice: Any, groups: dict[str, ChannelGroup], channels: ChannelGraph, ignored: dict[str, str]
) -> int:
    """The count that a policy keeps at a site.

    Raises:
        PolicyError: If the site is unknown or frozen, or the count out of range.
    """
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
    if site in ignored:
        raise PolicyError(f"The policy cuts channels at {site!r}, which is {ignored[site]}; change one of them.")
    return choice


def _ancestry(path: str) -> list[str]:
    """A module path and those of the modules around it."""
    parts = path.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]


def _layer_path(site: str) -> str:
    """The module path of a site; a layer with several groups has sites ``path``, ``path#2``, ..."""
    return site.partition("#")[0]


def _choices(group: ChannelGroup, tile: int) -> tuple[int, ...]:
    """Kept counts of units with a multiple of ``tile`` channels in the site's layer, and the full size."""
    per_unit = 1
    for use in group.members:
        if use.role == "out" and use.path == _layer_path(group.site):
            per_unit = max(1, int((use.atoms == group.units[0]).sum()))
            break
    step = tile // math.gcd(tile, per_unit)
    return tuple(sorted({*range(step, group.size + 1, step), group.size}))


def _operator(gm: fx.GraphModule, site: str) -> str:
    for node in gm.graph.find_nodes(op="call_module", target=_layer_path(site)):
        return ops.semantics(gm, node).kind
    return ""


def _weights(gm: fx.GraphModule, group: ChannelGroup) -> int:
    """Elements of the parameters that the group's channels run through."""
    tensors = {(use.path, use.name) for use in group.members}
    return sum(getattr(gm.get_submodule(path), name).numel() for path, name in tensors)
