"""Cut channels out of a network: coupled layers together, the least important channels first."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias, cast

import numpy as np
from torch import fx

from fxopt.decisions import Capabilities, Decision, Policy, SearchSpace
from fxopt.errors import PassError
from fxopt.graph import verify
from fxopt.graph.channels import ChannelGraph, analyze
from fxopt.graph.edit import fork
from fxopt.passes._calibrate import refuse_quantized, refuse_sparse
from fxopt.passes._channel_sites import allowed, as_bounds, checked, choices, matched, operator_at
from fxopt.passes._cutting import Units, choose_removed, cut, kept_indices, mask, parameter_share, saved_elements
from fxopt.passes._explain import COLUMNS, ChannelCut, Explanation
from fxopt.passes._features import LayerFeatures
from fxopt.passes._importance import as_importance, checked_scores
from fxopt.passes.base import PassResult, TunablePass

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["COLUMNS", "ChannelCut", "CutResult", "Explanation", "PruneChannels"]

_ATTENTION = ("heads", "width")

_OPTIONAL = {"saved": False}
"""Marks a field that a saved result does without."""


Kept: TypeAlias = dict[tuple[str, str], dict[int, Units]]
"""Indices that stay, by dimension, by module path and name of a tensor."""


class CutResult(PassResult):
    """The result of a cut, which also knows what was kept, so that nobody has to find the groups again."""

    def __new__(cls, graph_module: fx.GraphModule, channels: ChannelGraph, removed: Units) -> Self:
        """A graph that was cut, with the analysis from before and the units that went."""
        made = cast("Self", super().__new__(cls, graph_module, True))
        made._cut = (channels, removed)
        return made

    _cut: tuple[ChannelGraph, Units]

    @property
    def kept(self) -> Kept:
        """The indices that stayed of every parameter and buffer that was cut; see :meth:`PruneChannels.kept`."""
        return kept_indices(*self._cut)


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
        bounds: By pattern of module paths, the least and the largest fraction of a group's units to keep, such as
            ``{"stem*": (0.5, 1.0)}``. Where several patterns match, all hold.
        round_to: Kept channel counts are offered in multiples of this, and of the target's tile.
        residual_stream: Whether the residual stream of a transformer may be cut: channels that additions make and a
            layer or RMS norm averages over. They are the width of the whole network.
        attention: Whether attention loses whole ``"heads"``, or ``"width"``: as many channels of each head, those of
            queries and keys apart from those of values. Products are scaled by the original width in either case.
            Where only one of both can be cut, that is.
        importance: What ranks the units of a group: ``"l1"`` (AMC's), ``"l2"``, ``"batch-norm"``,
            ``"geometric-median"``, ``"random"``, an :class:`~fxopt.passes.Importance` such as ``Taylor(loader)``, or a
            function of a graph and a group. Scores are compared within a group only.
    """

    name: ClassVar[str] = "prune-channels"
    kinds: ClassVar[tuple[str, ...]] = ("channels",)
    ignore: tuple[str, ...] = ()
    bounds: Any = ()
    round_to: int = 1
    importance: Any = field(default="l1", metadata=_OPTIONAL)
    residual_stream: bool = False
    attention: str = "heads"

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            PassError: If ``round_to`` is no whole number of at least 1, ``ignore`` holds no patterns, bounds are no
                fractions, or attention cannot be cut by what is asked for.
            UnknownNameError: If there is no such importance.
        """
        super().__post_init__()
        given: Any = self.ignore
        patterns = (given,) if isinstance(given, str) or not isinstance(given, Iterable) else tuple(given)
        if not all(isinstance(pattern, str) for pattern in patterns):
            raise PassError(f"ignore takes patterns of module paths, got {self.ignore!r}.")
        object.__setattr__(self, "ignore", patterns)
        if self.attention not in _ATTENTION:
            raise PassError(f"attention is cut by {' or by '.join(map(repr, _ATTENTION))}, got {self.attention!r}.")
        tile: Any = self.round_to
        if not isinstance(tile, int) or isinstance(tile, bool) or tile < 1:
            raise PassError(f"round_to has to be a whole number of at least 1, got {tile!r}.")
        object.__setattr__(self, "bounds", as_bounds(self.bounds))
        as_importance(self.importance)

    def search_space(self, graph_module: fx.GraphModule, capabilities: Capabilities | None = None) -> SearchSpace:
        """One decision for every group that can be cut and is large enough for more than one choice.

        The choices are the kept counts within the bounds for which the channels of the site's layer are a multiple of
        ``round_to`` and of the target's tile, and the full size, which is the default where the bounds allow it; else
        the largest choice is. The features are those of AMC; see :class:`fxopt.passes._features.LayerFeatures`.

        Raises:
            PassError: If a pattern matches no module, bounds contradict each other, or layers are quantized or sparse
                already.
        """
        refuse_quantized(graph_module, self.name)
        refuse_sparse(graph_module, self.name)
        tile = math.lcm(self.round_to, capabilities.channel_tile if capabilities else 1)
        verify(graph_module)
        channels = self._analyze(graph_module)
        kept_out, limits = self._kept_out(graph_module, channels), self._limits(graph_module, channels)
        features = LayerFeatures(graph_module)
        decisions = []
        for group in channels.groups:
            counts = choices(group, tile, *limits.get(group.site, (1, group.size)))
            if group.site not in kept_out and (len(counts) > 1 or counts[-1] < group.size):
                operator = operator_at(graph_module, group)
                decisions.append(Decision("channels", group.site, counts, counts[-1], features.of(group), operator))
        return SearchSpace(decisions)

    def ranked(self, graph_module: fx.GraphModule, fraction: float, capabilities: Capabilities | None = None) -> Policy:
        """A policy under which groups compete: the most important part of all units stays, wherever it is.

        Each group's scores are divided by their mean first, for layers differ in scale; a group then loses many units
        if its importance is uneven. Counts move to the nearest choice.

        Args:
            graph_module: A graph from ``fxopt.trace``.
            fraction: The part of all units to keep, in (0, 1].
            capabilities: What the target can run; None for no restriction.

        Raises:
            PassError: If the fraction is out of range, or the importance gives no finite numbers.
        """
        given: Any = fraction
        if not isinstance(given, (int, float)) or not 0.0 < given <= 1.0:
            raise PassError(f"A fraction of the channels lies in (0, 1], got {fraction!r}.")
        space = self.search_space(graph_module, capabilities)
        groups = self._analyze(graph_module).by_site()
        importance = as_importance(self.importance)
        found = {}
        every_score = checked_scores(importance, graph_module, [groups[decision.site] for decision in space])
        for decision, scores in zip(space, every_score, strict=True):
            found[decision] = scores / max(float(np.abs(scores).mean()), 1e-300)
        every = np.sort(np.concatenate(list(found.values()) or [np.zeros(1)]))[::-1]
        threshold = every[min(len(every), max(1, round(fraction * len(every)))) - 1]
        policy = {}
        for decision, scores in found.items():
            wanted = int((scores >= threshold).sum())
            counts = [count for count in decision.choices if isinstance(count, int)]
            policy[decision.key] = min(counts, key=lambda count: abs(count - wanted))
        return Policy(policy)

    def requires(self, graph_module: fx.GraphModule) -> None:
        """Nothing is quantized or sparse yet.

        Raises:
            PassError: If something is.
        """
        refuse_quantized(graph_module, self.name)
        refuse_sparse(graph_module, self.name)

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Cut what the policy says; the result is a :class:`CutResult` where something went.

        Raises:
            PolicyError: If the policy does not fit the graph.
            PassError: If an importance is not finite, or a pattern matches no module.
        """
        channels = self._analyze(graph_module)
        removed = self._removed(graph_module, channels)
        if not removed.size:
            return PassResult(graph_module, False)
        cut(graph_module, channels, removed)
        return CutResult(graph_module, channels, removed)

    def masked(self, graph_module: fx.GraphModule) -> fx.GraphModule:
        """The same policy by masks: weights that make or read what would be cut are zero, all sizes stay.

        What the masked graph computes equals, up to rounding, what the pruned graph computes: norms over channels
        average over those that stay, and where channels are summed without weights, as in attention, they are
        multiplied by zero.

        Returns:
            A new graph; tensors that are not masked are shared with the given one.

        Raises:
            PolicyError: If the policy does not fit the graph.
            PassError: If an importance is not finite, or a pattern matches no module.
        """
        verify(graph_module)
        twin = fork(graph_module)
        channels = self._analyze(twin)
        mask(twin, channels, self._removed(twin, channels))
        return twin

    def kept(self, graph_module: fx.GraphModule) -> Kept:
        """The indices that stay of every parameter and buffer that the policy cuts.

        Returns:
            Indices by dimension, by module path and name of the tensor.

        Raises:
            PolicyError: If the policy does not fit the graph.
            PassError: If an importance is not finite, or a pattern of ``ignore`` matches no module.
        """
        verify(graph_module)
        channels = self._analyze(graph_module)
        return kept_indices(channels, self._removed(graph_module, channels))

    def explain(self, graph_module: fx.GraphModule) -> Explanation:
        """What would be cut: one entry for every group, those that cannot be cut at the end with the reason.

        Raises:
            PolicyError: If the policy does not fit the graph.
            PassError: If an importance is not finite, or a pattern matches no module.
        """
        verify(graph_module)
        channels = self._analyze(graph_module)
        removed = self._removed(graph_module, channels)
        kept_out = self._kept_out(graph_module, channels)
        cuts = []
        for group in (*channels.groups, *channels.frozen):
            gone = np.intersect1d(group.units, removed)
            reason = kept_out.get(group.site) or (f"frozen by {group.frozen_by}" if group.frozen_by else None)
            cuts.append(
                ChannelCut(
                    site=group.site,
                    operator=operator_at(graph_module, group),
                    size=group.size,
                    kept=group.size - len(gone),
                    layers=tuple(dict.fromkeys(use.path for use in group.members)) if gone.size else (),
                    saved_elements=saved_elements(graph_module, group, gone) if gone.size else 0,
                    share=parameter_share(graph_module, group),
                    reason=reason,
                )
            )
        return Explanation(sorted(cuts, key=lambda cut: cut.reason is not None))

    def _analyze(self, gm: fx.GraphModule) -> ChannelGraph:
        return analyze(gm, self.attention)

    def _kept_out(self, gm: fx.GraphModule, channels: ChannelGraph) -> dict[str, str]:
        """Sites that could be cut and are not to be, with the reason."""
        found = {}
        for site, patterns in matched(gm, channels, self.ignore, "ignore").items():
            found[site] = f"ignored by {patterns[0]!r}"
        for group in channels.groups:
            if group.residual is not None and not self.residual_stream:
                reason = (
                    f"of the residual stream that {group.residual} averages over; residual_stream=True lets it be cut"
                )
                found.setdefault(group.site, reason)
        return found

    def _limits(self, gm: fx.GraphModule, channels: ChannelGraph) -> dict[str, tuple[int, int]]:
        """The least and largest counts of the sites that bounds are about."""
        by_pattern = dict(self.bounds)
        sizes = {group.site: group.size for group in channels.groups}
        about = matched(gm, channels, by_pattern, "bounds")
        return {site: allowed(sizes[site], [by_pattern[one] for one in hits]) for site, hits in about.items()}

    def _removed(self, gm: fx.GraphModule, channels: ChannelGraph) -> Units:
        """Ids of the units that go."""
        kept_out, limits = self._kept_out(gm, channels), self._limits(gm, channels)
        groups, importance = channels.by_site(), as_importance(self.importance)
        cut_to: dict[str, int] = {}
        for (_, site), choice in self.own_choices.items():
            kept = checked(site, choice, channels, kept_out, limits.get(site))
            if site in groups and kept < groups[site].size:
                cut_to[site] = kept
        smaller = [groups[site] for site in cut_to]
        scores = checked_scores(importance, gm, smaller)
        removed = [
            choose_removed(group, its, kept) for group, its, kept in zip(smaller, scores, cut_to.values(), strict=True)
        ]
        return np.concatenate(removed) if removed else np.zeros(0, dtype=np.int64)
