"""Zero single weights: those of least magnitude, by a fraction, in blocks as 2:4, or in each kernel."""

from __future__ import annotations

import difflib
import fnmatch
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import fx

from fxopt.decisions import Capabilities, Choice, Decision, SearchSpace
from fxopt.errors import PassError, PolicyError
from fxopt.graph import edit, ops, verify
from fxopt.graph.packing import packed_bytes
from fxopt.graph.sparsity import SPARSITY_META, pattern_of, sparse_sites
from fxopt.passes._calibrate import refuse_quantized
from fxopt.passes._least_squares import is_linear
from fxopt.passes.base import PassResult, TunablePass

__all__ = ["SparseLayer", "SparsifyWeights"]


@dataclass(frozen=True)
class SparseLayer:
    """What becomes of the weight of one layer.

    Attributes:
        site: Module path.
        choice: What the policy says, or what the layer is already.
        weights: Number of weights.
        kept: How many stay.
        dense_bytes: What they all take.
        stored_bytes: What is stored: values and positions, or all where that is no more.
        reason: Why the layer cannot be decided about, or None if it can.
    """

    site: str
    choice: Choice
    weights: int
    kept: int
    dense_bytes: int
    stored_bytes: int
    reason: str | None = None


@dataclass(frozen=True)
class SparsifyWeights(TunablePass):
    """Zero weights of convolutions and linear layers, the least ones by magnitude (Han et al. 2015).

    A decision ``("sparsity", path)`` is what becomes of a layer's weight: a fraction of zeros, such as 0.8; ``"2:4"``
    and the like, in which two of every four consecutive weights of an output stay; or ``"kernel:4"``, in which four
    weights of every kernel stay. Shapes do not change. The graph remembers which layers are sparse: fine-tuning by
    ``fxopt.training`` keeps the zeros, and ``fxopt.lower`` tells targets of them.

    Attributes:
        policy: What becomes of each layer; what is left out stays dense.
        fractions: Fractions of zeros on offer, besides none.
        patterns: Patterns on offer.
        ignore: Patterns (``fnmatch``) of module paths that are left alone.
    """

    name: ClassVar[str] = "sparsify-weights"
    kinds: ClassVar[tuple[str, ...]] = ("sparsity",)
    fractions: tuple[float, ...] = (0.5, 0.625, 0.75, 0.8125, 0.875, 0.9375)
    patterns: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            PassError: If a fraction or pattern is none.
        """
        super().__post_init__()
        for name in ("fractions", "patterns", "ignore"):
            given: Any = getattr(self, name)
            object.__setattr__(self, name, (given,) if isinstance(given, (str, float, int)) else tuple(given))
        for choice in (*self.fractions, *self.patterns):
            try:
                pattern_of(choice)
            except PolicyError as failure:
                raise PassError(str(failure)) from failure

    def search_space(self, graph_module: fx.GraphModule, capabilities: Capabilities | None = None) -> SearchSpace:
        """One decision for every layer with a weight of its own: to stay as it is, or to have more zeros than it has.

        Raises:
            PassError: If a pattern of ``ignore`` matches no module, or layers are quantized already.
        """
        del capabilities
        verify(graph_module)
        refuse_quantized(graph_module, self.name)
        ignored = self._ignored(graph_module)
        sparse = sparse_sites(graph_module)
        decisions = []
        for path, node in _layers(graph_module).items():
            if path in ignored:
                continue
            weight: Any = graph_module.get_submodule(path).weight
            taps = weight[0, 0].numel()
            fitting = [one for one in self.patterns if taps > 1 or not one.startswith("kernel")]
            current = sparse.get(path, 0.0)
            offered: tuple[Choice, ...] = (*self.fractions, *fitting)
            fewer = [one for one in offered if _kept(weight, one) < _kept(weight, current)]
            choices: tuple[Choice, ...] = tuple(dict.fromkeys((current, *fewer)))
            features = {"weights": weight.numel(), "outputs": len(weight), "kernel": taps}
            kind = ops.semantics(graph_module, node).kind
            decisions.append(Decision("sparsity", path, choices, current, features, kind))
        return SearchSpace(decisions)

    def explain(self, graph_module: fx.GraphModule) -> list[SparseLayer]:
        """What the policy makes of every layer with weights, in graph order, before anything is zeroed.

        Raises:
            PolicyError: If the policy does not fit the graph.
            PassError: If a pattern of ``ignore`` matches no module.
        """
        chosen = self._chosen(graph_module)
        own, ignored, sparse = _layers(graph_module), self._ignored(graph_module), sparse_sites(graph_module)
        found = {}
        for node in graph_module.graph.find_nodes(op="call_module"):
            path = str(node.target)
            if ops.semantics(graph_module, node).kind not in ("conv", "linear") or path in found:
                continue
            module: Any = graph_module.get_submodule(path)
            reason = "ignored" if path in ignored else None
            if path not in own:
                reason = (
                    "its weight is another's too" if is_linear(module) else f"{type(module).__name__} is not zeroed"
                )
            choice = chosen.get(path, sparse.get(path, 0.0))
            weight: torch.Tensor = module.weight
            size = packed_bytes(pattern_of(choice), weight.shape, 8 * weight.element_size())
            whole = weight.numel() * weight.element_size()
            found[path] = SparseLayer(path, choice, weight.numel(), _kept(weight, choice), whole, size, reason)
        return list(found.values())

    def requires(self, graph_module: fx.GraphModule) -> None:
        """Nothing is quantized yet.

        Raises:
            PassError: If something is.
        """
        refuse_quantized(graph_module, self.name)

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Zero what the policy says.

        Raises:
            PolicyError: If the policy names a layer that has no weight of its own, or no pattern.
            PassError: If a weight is not finite, or a pattern of ``ignore`` matches no module.
        """
        sparse = sparse_sites(graph_module)
        changed = {site: one for site, one in self._chosen(graph_module).items() if one != sparse.get(site, 0.0)}
        if not changed:
            return PassResult(graph_module, False)
        for site, choice in changed.items():
            _zero(graph_module, site, choice)
        graph_module.meta[SPARSITY_META] = dict(sorted({**sparse, **changed}.items()))
        edit.finish(graph_module)
        return PassResult(graph_module, True)

    def _chosen(self, graph_module: fx.GraphModule) -> dict[str, Choice]:
        """What the policy chooses for each layer, which the graph was found to have."""
        layers = _layers(graph_module)
        ignored = self._ignored(graph_module)
        sparse = sparse_sites(graph_module)
        chosen = {site: choice for (_, site), choice in self.own_choices.items()}
        for site, choice in chosen.items():
            if site not in layers:
                nearest = difflib.get_close_matches(site, layers, n=1, cutoff=0.5)
                hint = f" Did you mean {nearest[0]!r}?" if nearest else " The policy may be of another model."
                raise PolicyError(f"The graph has no weights to zero at {site!r}.{hint}")
            if site in ignored and choice != sparse.get(site, 0.0):
                raise PolicyError(f"The policy zeros weights of {site!r}, which is ignored; change one of them.")
            try:
                pattern_of(choice)
            except PolicyError as failure:
                raise PolicyError(f"At {site!r}: {failure}") from failure
        return chosen

    def _ignored(self, gm: fx.GraphModule) -> set[str]:
        paths = [path for path, _ in gm.named_modules() if path]
        found: set[str] = set()
        for pattern in self.ignore:
            matching = fnmatch.filter(paths, pattern)
            if not matching:
                raise PassError(f"The pattern {pattern!r} of ignore matches no module.")
            found |= {path for path in paths for match in matching if path == match or path.startswith(f"{match}.")}
        return found


def _zero(gm: fx.GraphModule, site: str, choice: Choice) -> None:
    weight: Any = gm.get_submodule(site).weight
    if not bool(torch.isfinite(weight).all()):
        raise PassError(
            f"The weight of {site!r} holds NaN or infinite values, so that it cannot be ranked; repair it, or leave "
            "the layer out with ignore."
        )
    edit.replace_tensor(gm, f"{site}.weight", weight.detach() * pattern_of(choice).mask(weight))


def _kept(weight: torch.Tensor, choice: Choice) -> int:
    """How many weights stay."""
    sizes = (np.array([size]) for size in (len(weight), weight[0].numel(), weight[0, 0].numel()))
    return int(pattern_of(choice).count(*sizes)[0])


def _layers(gm: fx.GraphModule) -> dict[str, fx.Node]:
    """First call of every layer whose weight nobody else holds or reads, by path."""
    holders: dict[int, int] = {}
    for _, module in gm.named_modules():
        for tensor in module._parameters.values():
            holders[id(tensor)] = holders.get(id(tensor), 0) + 1
    read = {str(node.target) for node in gm.graph.find_nodes(op="get_attr")}
    found: dict[str, fx.Node] = {}
    for node in gm.graph.find_nodes(op="call_module"):
        path = str(node.target)
        module = gm.get_submodule(path)
        if is_linear(module) and holders[id(module.weight)] == 1 and f"{path}.weight" not in read:
            found.setdefault(path, node)
    return found
