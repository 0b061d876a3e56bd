"""Choose what each block of a network computes."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx, nn

from fxopt._numbers import check_whole
from fxopt._seeding import seeded
from fxopt.decisions import Capabilities, Choice, Decision, SearchSpace
from fxopt.errors import PassError, PolicyError, UnknownNameError
from fxopt.graph import verify
from fxopt.passes._calibrate import refuse_quantized, refuse_sparse
from fxopt.passes._operator_matching import find_blocks
from fxopt.passes._operator_patterns import PATTERNS, Block, Pattern, register_pattern
from fxopt.passes._operator_rewrite import SITE_META, Chosen, make, offered, replace_blocks
from fxopt.passes._operator_weights import inherit, initialize, restart, seed_of
from fxopt.passes._operators import IDENTITY, ZERO, Shape, Style, check_names, known, register_candidate
from fxopt.passes.base import PassResult, Refusal, TunablePass

__all__ = [
    "IDENTITY",
    "SITE_META",
    "ZERO",
    "Block",
    "FoundBlock",
    "Pattern",
    "SelectOperators",
    "Shape",
    "Style",
    "initialize",
    "register_candidate",
    "register_pattern",
    "restart",
]


@dataclass(frozen=True)
class FoundBlock:
    """A block that other operators can stand in for.

    Attributes:
        site: Module path, as the policy names it.
        pattern: The pattern that it matches.
        operator: What it computes now.
        candidates: What it can compute.
        layers: Paths of its layers.
    """

    site: str
    pattern: str
    operator: str
    candidates: tuple[str, ...]
    layers: tuple[str, ...]


def _is_name(value: object) -> bool:
    return isinstance(value, str)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


_OPTIONS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "patterns": (_is_name, "names of patterns"),
    "kernels": (lambda value: _is_count(value) and value % 2 == 1, "odd numbers above zero"),
    "expansions": (_is_count, "whole numbers above zero"),
    "candidates": (_is_name, "names of candidates"),
    "ignore": (_is_name, "patterns of sites"),
}
"""What the values of options have to be."""


@dataclass(frozen=True)
class SelectOperators(TunablePass):
    """Put another operator in the place of a block: another kernel, another expansion, a cheaper kind, or nothing.

    A decision ``("operator", site)`` is the name of what the block at a module path computes:

    - ``mb6-k5``: an inverted residual (expansion 6, kernel 5), with the block's squeeze-and-excite gate if it has one;
    - ``fused4-k3``: the same with its first two layers in one, a dense convolution;
    - ``conv-k3``, ``separable-k3``, ``grouped4-k3``: dense, depthwise and pointwise, grouped;
    - ``basic-k3``, ``bottleneck-k3``, ``thin-k3`` (a bottleneck with a depthwise middle): bodies of residual blocks;
    - ``own-k5``: the block's own layers with another kernel, where none of these names says what the block computes
      (``original``): a width that is no multiple, groups, a stride in another place;
    - ``avgpool-k3``, ``maxpool-k3``, ``identity`` (only where input and output have one shape);
    - ``zero``: nothing beside the block's shortcut (only where there is one).

    Candidates imitate the norm and activation of the block. A candidate of the block's own layers gets the block's
    weights: larger kernels begin as the block's in the middle of zeros, larger expansions compute what the block
    computes, smaller expansions keep the channels that weigh most. A fused one for an inverted residual gets the
    product of its first two layers, which it computes without the activation between them. All others get weights
    from a seed.

    Attributes:
        policy: What each block computes; what is left out stays as it is.
        patterns: Names of the patterns to look for; empty for all (see :func:`register_pattern`).
        kernels: Kernels of the candidates.
        expansions: Expansions of the inverted residuals.
        candidates: Names of candidates to offer in place of each pattern's own, in which ``{k}`` and ``{e}`` stand for
            every kernel and expansion; empty for the pattern's own.
        ignore: Patterns (``fnmatch``) of sites that stay as they are.
        seed: Seed of the weights that no block gives.
    """

    name: ClassVar[str] = "select-operators"
    kinds: ClassVar[tuple[str, ...]] = ("operator",)
    patterns: tuple[str, ...] = ()
    kernels: tuple[int, ...] = (3, 5, 7)
    expansions: tuple[int, ...] = (3, 6)
    candidates: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            PassError: If kernels are not odd, expansions below 1, the seed below 0, or an option is of another kind.
            UnknownNameError: If there is no such pattern or candidate.
        """
        super().__post_init__()
        for option, (right, words) in _OPTIONS.items():
            given: Any = getattr(self, option)
            several = isinstance(given, Iterable) and not isinstance(given, str)
            found: tuple[Any, ...] = tuple(given) if several else (given,)
            if not all(right(one) for one in found):
                raise PassError(f"{option} takes {words}, got {given!r}.")
            object.__setattr__(self, option, found)
        for name in self.patterns:
            if name not in PATTERNS:
                raise UnknownNameError("pattern", name, PATTERNS)
        check_names(self.candidates)
        check_whole(0, PassError, seed=self.seed)

    def search_space(self, graph_module: fx.GraphModule, capabilities: Capabilities | None = None) -> SearchSpace:
        """One decision for every block that has more than one candidate; the default is what the block computes.

        Raises:
            PassError: If layers are quantized or sparse already, or a pattern of ``ignore`` matches no site.
        """
        verify(graph_module)
        self.requires(graph_module)
        decisions = []
        for block in self.blocks(graph_module):
            choices = self.choices(graph_module, block)
            if len(choices) > 1:
                shape = block.shape
                features = {"inputs": shape.inputs, "outputs": shape.outputs, "stride": shape.stride}
                told = {name: float(value) for name, value in features.items()}
                name = block.pattern.name
                decisions.append(Decision("operator", block.site, choices, block.operator, told, name))
        space = SearchSpace(decisions)
        return space if capabilities is None else space.restrict(capabilities)

    def blocks(self, graph_module: fx.GraphModule) -> list[Block]:
        """The blocks that are not ignored, in graph order.

        Raises:
            PassError: If a pattern of ``ignore`` matches no site.
        """
        found = self._find(graph_module)[0]
        for pattern in self.ignore:
            if not fnmatch.filter([block.site for block in found], pattern):
                raise PassError(f"The pattern {pattern!r} of ignore matches no block; see explain().")
        return [block for block in found if not any(fnmatch.fnmatchcase(block.site, one) for one in self.ignore)]

    def choices(self, graph_module: fx.GraphModule, block: Block) -> tuple[str, ...]:
        """The names of what can stand in the place of a block; what is there now is one of them."""
        names: dict[str, None] = {}
        for name in self.candidates or block.pattern.candidates:
            for kernel in self.kernels if "{k}" in name else (0,):
                for expansion in self.expansions if "{e}" in name else (0,):
                    names[name.format(k=kernel, e=expansion)] = None
        found = [name for name in names if offered(graph_module, block, name)]
        return tuple(found if block.operator in found else [block.operator, *found])

    def explain(self, graph_module: fx.GraphModule) -> list[FoundBlock]:
        """The blocks that were found and what each can be."""
        verify(graph_module)
        return [
            FoundBlock(
                block.site,
                block.pattern.name,
                block.operator,
                self.choices(graph_module, block),
                tuple(str(one.conv.target) for one in block.units),
            )
            for block in self.blocks(graph_module)
        ]

    def refusals(self, graph_module: fx.GraphModule) -> list[Refusal]:
        """The convolutions that are part of no block, and why."""
        verify(graph_module)
        return self._find(graph_module)[1]

    def requires(self, graph_module: fx.GraphModule) -> None:
        """Nothing is quantized or sparse yet.

        Raises:
            PassError: If something is.
        """
        refuse_quantized(graph_module, self.name)
        refuse_sparse(graph_module, self.name)

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Replace the blocks that the policy decides otherwise than they are.

        Raises:
            PolicyError: If the policy does not fit the graph.
            PassError: If a candidate of a user's own does not keep the block's shape.
        """
        return PassResult(graph_module, self.rewrite(graph_module))

    def rewrite(
        self,
        graph_module: fx.GraphModule,
        modules: Mapping[tuple[str, str], nn.Module] | None = None,
        *,
        weights: bool = True,
        mark: bool = False,
    ) -> bool:
        """Replace blocks in place, with modules that are there already or with new ones; whether there was one.

        Args:
            graph_module: A graph of one's own.
            modules: Candidates by site and name, for instance trained ones; what is missing is made.
            weights: Whether candidates need weights; those of a graph that is only to be costed do not.
            mark: Whether every node that depends on a choice tells its site under :data:`SITE_META` of its meta.

        Raises:
            PolicyError: If the policy does not fit the graph.
            PassError: If a candidate of a user's own does not keep the block's shape.
        """
        blocks = {block.site: block for block in self.blocks(graph_module)}
        chosen: dict[str, Chosen] = {}
        for (_, site), choice in self.own_choices.items():
            block, name = self._checked(graph_module, blocks, site, choice)
            if name == block.operator:
                continue
            made = (modules or {}).get((site, name))
            if made is None and name not in (IDENTITY, ZERO):
                made = self.candidate(graph_module, block, name, weights=weights)
            chosen[site] = Chosen(block, name, made)
        if mark:
            for block in blocks.values():
                for node in block.span:
                    node.meta[SITE_META] = block.site
        if chosen:
            replace_blocks(graph_module, {site: chosen[site] for site in blocks if site in chosen})
        return bool(chosen)

    def candidate(self, graph_module: fx.GraphModule, block: Block, name: str, *, weights: bool = True) -> nn.Module:
        """A candidate as the pass would put it in the place of a block: on its device and of its type.

        Raises:
            PassError: If it does not keep the block's shape.
        """
        with seeded(seed_of(self.seed, "built", block.site, name)):
            module = make(name, block)
        if weights:
            initialize(module, self.seed, block.site, name)
        like = block.units[0].module.weight
        module.to(like.device, like.dtype)
        if weights:
            inherit(module, graph_module, block, name)
        return module.train(graph_module.training)

    def _checked(self, gm: fx.GraphModule, blocks: Mapping[str, Block], site: str, choice: Choice) -> tuple[Block, str]:
        block = blocks.get(site)
        if block is None:
            nearest = difflib.get_close_matches(site, blocks, n=1, cutoff=0.5)
            hint = f" Did you mean {nearest[0]!r}?" if nearest else " The policy may be of another model."
            raise PolicyError(f"The graph has no block to choose an operator for at {site!r}.{hint}")
        choices = self.choices(gm, block)
        custom = isinstance(choice, str) and known(choice) and offered(gm, block, choice)
        if choice in choices or custom:
            return block, str(choice)
        raise PolicyError(f"{choice!r} cannot stand at {site!r}; its candidates are {', '.join(choices)}.")

    def _find(self, gm: fx.GraphModule) -> tuple[list[Block], list[Refusal]]:
        wanted = [pattern for name, pattern in PATTERNS.items() if not self.patterns or name in self.patterns]
        return find_blocks(gm, wanted)
