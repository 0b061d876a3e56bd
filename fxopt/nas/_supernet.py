"""A network in which every block is all of its candidates, of which a step computes one."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fxopt._digests import digest_of
from fxopt.decisions import Decision, Policy, SearchSpace
from fxopt.errors import FxoptError, PassError, PolicyError
from fxopt.graph import edit
from fxopt.lowering import OperatorTable, encoded, no_blocks
from fxopt.passes import SelectOperators
from fxopt.passes.select_operators import IDENTITY, ZERO, Block, restart

__all__ = ["MixedOperator", "Supernet"]

_COLLAPSED = 0.8
_TELLING = 2
"""Blocks that can be left out, at least, of which leaving out most tells that a search has collapsed."""
_SKIPS = frozenset((ZERO, IDENTITY))
Indices = npt.NDArray[np.intp]


class MixedOperator(nn.Module):
    """The candidates of one block, of which one is computed (Cai et al. 2019, equation 2).

    Attributes:
        candidates: What the block can be.
        active: Index of the candidate that is computed.
        others: Indices of further candidates whose gates get a gradient.
        gates: A leaf of as many gates as ``active`` and ``others``, 1 and 0, whose gradient is wanted; or None.
        mixture: The weight of every candidate, of which then all are computed (the relaxation); or None.
    """

    def __init__(self, candidates: Sequence[nn.Module]) -> None:
        super().__init__()
        self.candidates = nn.ModuleList(candidates)
        self.active = 0
        self.others: tuple[int, ...] = ()
        self.gates: torch.Tensor | None = None
        self.mixture: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """What the active candidate makes of ``x``, or the weighted sum of all."""
        if self.mixture is not None:
            parts = [weight * one(x) for weight, one in zip(self.mixture, self.candidates, strict=True)]
            mixed: torch.Tensor = functools.reduce(torch.add, parts)
            return mixed
        y: torch.Tensor = self.candidates[self.active](x)
        if self.gates is None:
            return y
        others = [self.candidates[one] for one in self.others]
        gated: torch.Tensor = _Gate.apply(y, self.gates, x.detach(), others)  # type: ignore[no-untyped-call]
        return gated


class _Gate(torch.autograd.Function):
    """Pass a path's output on, and give every gate the inner product of its path's output with the gradient.

    The outputs of inactive paths are computed on the way back, one after the other and without gradients, so that no
    more than one of them is ever held.
    """

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, gates: torch.Tensor, x: torch.Tensor, others: list[nn.Module]) -> Any:
        ctx.save_for_backward(y, x)
        ctx.others = others
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,) = gradients
        y, x = ctx.saved_tensors
        found = [(gradient * y).sum()]
        with torch.no_grad():
            for other in ctx.others:
                with _keeping_statistics(other):
                    found.append((gradient * other(x)).sum())
        return gradient, torch.stack(found), None, None


@contextlib.contextmanager
def _keeping_statistics(module: nn.Module) -> Iterator[None]:
    """Let batch norms normalize by the batch without remembering it."""
    norms = [one for one in module.modules() if isinstance(one, _BatchNorm) and one.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


class _Nothing(nn.Module):
    """Zeros of the shape that a block gives: the ZeroOp, without anything that could be learned."""

    def __init__(self, outputs: int, stride: int) -> None:
        super().__init__()
        self.outputs = outputs
        self.stride = stride

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        height, width = (-(-size // self.stride) for size in x.shape[2:])
        return x.new_zeros(()).expand(x.shape[0], self.outputs, height, width)


def choose_path(mixed: Iterable[MixedOperator], path: Sequence[int] | Indices) -> None:
    """Compute one path from now on: the index of a candidate for every mixed operator.

    Raises:
        PolicyError: If there is another number of them, or an index is out of range.
    """
    mixed = tuple(mixed)
    sizes = [len(one.candidates) for one in mixed]
    chosen = np.asarray(path)
    whole = chosen.shape == (len(sizes),) and (np.issubdtype(chosen.dtype, np.integer) or not sizes)
    if not whole or not ((chosen >= 0) & (chosen < sizes)).all():
        raise PolicyError(f"A path has an index below {sizes}, one for each block; got {path!r}.")
    for one, index in zip(mixed, chosen, strict=True):
        one.active = int(index)
        one.others, one.gates, one.mixture = (), None, None


class Supernet:
    """A graph with all candidates of all of its blocks.

    Args:
        graph: A canonical graph; it is copied.
        step: The pass that says what each block can be.

    Attributes:
        net: The network, which computes one path at a time; train it as any module.
        space: The decisions, one for each block.
        alpha: Architecture parameters, shape (blocks, most candidates); a block's probabilities are their softmax.
            Where a block has fewer candidates they are minus infinity.

    Raises:
        PassError: If there is no block to decide about; says why not; or if graph or step is something else.
    """

    def __init__(self, graph: fx.GraphModule, step: SelectOperators) -> None:
        check_kinds(step=step)
        self.step = step
        self.space: SearchSpace = step.search_space(graph)
        if not len(self.space):
            raise PassError(no_blocks(graph, step))
        self._base = edit.own_copy(graph)
        self._mixed: dict[str, MixedOperator] = {}
        self.net = self._make_net()
        sizes = self.space.sizes
        self._origin = self._left = ""
        self.mask = torch.from_numpy(np.arange(sizes.max()) < sizes[:, None])
        start = torch.zeros(self.mask.shape).masked_fill(~self.mask, -torch.inf)
        self.alpha = nn.Parameter(start)

    def origin(self) -> str:
        """A short name of the model and the weights that training began with: those of now, or of before it."""
        now = digest_of(self.net)
        if now != self._left:
            self._origin = self._left = now
        return self._origin

    def leave(self) -> None:
        """Remember the weights as those that a training has left, so that it can go on from them."""
        self._left = digest_of(self.net)

    @property
    def mixed(self) -> Mapping[str, MixedOperator]:
        """The mixed operators by site, in the order of the decisions."""
        return self._mixed

    def probabilities(self) -> torch.Tensor:
        """Probability of every candidate, shape (blocks, most candidates)."""
        return self.alpha.softmax(1)

    def skipped(self, policy: Policy) -> float:
        """The part of the blocks that can be left out which a policy leaves out; 0 if there are none."""
        can = self._can_skip()
        return sum(policy[one.key] in _SKIPS for one in can) / max(1, len(can))

    def collapsed(self, policy: Policy) -> bool:
        """Whether a policy leaves out so many of the blocks that can be left out that the search has told nothing."""
        return len(self._can_skip()) >= _TELLING and self.skipped(policy) >= _COLLAPSED

    def _can_skip(self) -> list[Decision]:
        return [one for one in self.space if not _SKIPS.isdisjoint(one.choices)]

    def most_likely(self) -> Policy:
        """The policy of every block's most probable candidate."""
        return self.space.decode(self.alpha.detach().argmax(1).cpu().numpy())

    def choose(self, path: Sequence[int] | Indices) -> None:
        """Compute one path from now on: the index of a candidate for every block.

        Raises:
            PolicyError: If there is another number of them, or an index is out of range.
        """
        choose_path(self._mixed.values(), path)

    def choose_policy(self, policy: Policy) -> None:
        """Compute the path of a policy from now on.

        Raises:
            PolicyError: If the policy does not fit.
        """
        self.choose(encoded(self.space, policy))

    def open_gates(self, active: Sequence[int] | Indices, others: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """Compute one path and want the gradients of gates: of the active candidate and some others of every block.

        Returns:
            The gates of every block; after a backward pass their ``grad`` is the gradient.
        """
        self.choose(active)
        device = next(self.net.parameters()).device
        gates = []
        for mixed, more in zip(self._mixed.values(), others, strict=True):
            mixed.others = tuple(int(one) for one in more)
            values = torch.zeros(1 + len(mixed.others), device=device)
            values[0] = 1.0
            mixed.gates = values.requires_grad_()
            gates.append(mixed.gates)
        return gates

    def mix(self) -> None:
        """Compute all candidates, weighted by their probabilities (the relaxation of DARTS)."""
        for row, mixed in zip(self.probabilities(), self._mixed.values(), strict=True):
            mixed.mixture = row[: len(mixed.candidates)]

    @contextlib.contextmanager
    def frozen_weights(self) -> Iterator[None]:
        """Compute no gradients of weights."""
        trained = [parameter for parameter in self.net.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in trained:
                parameter.requires_grad_(True)

    def derive(self, policy: Policy, *, keep_weights: bool = True) -> fx.GraphModule:
        """The network of a policy, a graph of its own in eval mode, that the pass gives from the original graph too.

        Args:
            policy: The policy.
            keep_weights: Whether it gets the supernet's weights; all of it begins anew from the pass's seed if not.

        Raises:
            PolicyError: If the policy does not fit.
            PassError: If all is to begin anew, and nothing tells how a parameter begins.
        """
        encoded(self.space, policy)
        self._follow_net()
        twin = edit.fork(self._base)
        modules = {
            (decision.site, str(name)): module
            for decision, mixed in zip(self.space, self._mixed.values(), strict=True)
            for name, module in zip(decision.choices, mixed.candidates, strict=True)
        }
        self.step.with_policy(policy).rewrite(twin, modules)
        found = edit.own_copy(twin)
        if not keep_weights:
            left = restart(found, self.step.seed)
            if left:
                raise PassError(
                    f"Nothing in the graph tells how {', '.join(left)} began; keep the weights, or build the model "
                    "anew and give its graph to the pass with this policy."
                )
        return found.eval()

    def _follow_net(self) -> None:
        """Take the tensors that graphs read themselves from the net: where it was moved or cast, they are others."""
        ours = _tensors_of(self.net)
        for path, tensor in _tensors_of(self._base).items():
            if ours.get(path, tensor) is not tensor:
                edit.replace_tensor(self._base, path, ours[path])

    def _make_net(self) -> fx.GraphModule:
        """The graph with a mixed operator for every block; its other modules are those of the base graph."""
        twin = edit.fork(self._base)
        blocks = {block.site: block for block in self.step.blocks(twin)}
        inner = {block.site: block for block in self.step.blocks(self._base)}
        for decision in self.space:
            block = blocks[decision.site]
            candidates = [self._candidate(inner[decision.site], str(name)) for name in decision.choices]
            mixed = MixedOperator(candidates)
            mixed.active = decision.choices.index(decision.default)
            self._mixed[decision.site] = mixed
            path = edit.free_path(twin, f"{decision.site.replace('.', '_')}_mixed")
            new = edit.insert_module(twin, path, mixed, block.exit, (block.entry,))
            edit.replace_uses(block.exit, new)
            order = {node: index for index, node in enumerate(twin.graph.nodes)}
            for node in sorted(block.body, key=order.__getitem__, reverse=True):
                edit.erase(twin, node)
        edit.finish(twin)
        for node in twin.graph.find_nodes(op="call_module"):
            path = str(node.target)
            if not isinstance(twin.get_submodule(path), MixedOperator):
                twin.set_submodule(path, self._base.get_submodule(path))
        return twin

    def _candidate(self, block: Block, name: str) -> nn.Module:
        if name == block.operator:
            return _body(self._base, block)
        if name == ZERO:
            return _Nothing(block.shape.outputs, block.shape.stride)
        if name == IDENTITY:
            return nn.Identity()
        return self.step.candidate(self._base, block, name)


_KINDS: Mapping[str, tuple[type, str]] = {
    "step": (SelectOperators, "fxopt.passes.SelectOperators()"),
    "supernet": (Supernet, "fxopt.nas.Supernet(graph, step)"),
    "table": (OperatorTable, "fxopt.lowering.lower_operators(graph, step).table(target)"),
}
"""What arguments are, and what makes them."""


def check_kinds(**given: object) -> None:
    """Arguments are what their names say.

    Raises:
        PassError: Naming the first that is something else, and what makes one.
    """
    for name, value in given.items():
        kind, maker = _KINDS[name]
        if not isinstance(value, kind):
            raise PassError(f"{name} is a {type(value).__name__}; give what {maker} makes.")


def check_table(supernet: Supernet, table: OperatorTable) -> None:
    """A table is of the decisions of a supernet.

    Raises:
        PassError: If one of them is something else.
        FxoptError: If they are of different decisions.
    """
    check_kinds(supernet=supernet, table=table)
    own, other = ([(one.key, one.choices) for one in space] for space in (supernet.space, table.space))
    if own != other:
        missing = next((key for key, _ in own if key not in dict(other)), own[0][0])
        raise FxoptError(
            f"The table is of other decisions than the supernet, such as {missing[1]!r}; make it from the same graph "
            "and the same pass, with lower_operators(graph, step).table(target)."
        )


def _body(base: fx.GraphModule, block: Block) -> fx.GraphModule:
    """What a block computes now, on the base graph's own modules."""
    graph = fx.Graph()
    values = {block.entry: graph.placeholder("x")}
    inside = set(block.body)
    for node in base.graph.nodes:
        if node in inside:
            values[node] = graph.node_copy(node, values.__getitem__)
    graph.output(values[block.exit])
    return fx.GraphModule(base, graph)


def _tensors_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by path."""
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }
