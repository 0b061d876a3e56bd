"""Choose the integers of weights by gradients, block by block, so that the outputs of blocks stay near."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx, nn

from fxopt.errors import PassError
from fxopt.graph import edit, eval_mode
from fxopt.graph._hold import positive
from fxopt.graph.fake_quantize import MAX_BITS
from fxopt.graph.shapes import TRACE_META
from fxopt.passes._blocks import Block, blocks_of
from fxopt.passes._calibrate import synthetic_batch
from fxopt.passes._layer_walk import Values, read_inputs
from fxopt.passes._soft_rounding import SoftBlock, SoftWeight, beta_at, learnable
from fxopt.passes.base import Pass, PassResult
from fxopt.passes.round_weights import RoundWeights, Wanted, float_twin, layers_to_round

__all__ = ["ReconstructBlocks"]

_WARM_UP = 0.2
"""Part of the steps before being undecided costs anything."""


@dataclass(frozen=True)
class ReconstructBlocks(Pass):
    """Round the weights of a quantized graph by gradients, block by block; a minute or so of training without labels.

    A block's layers are rounded as :class:`~fxopt.passes.RoundWeights` does first; then each weight is put on its
    integer or on its neighbour on the side of the float weight, by gradients of the squared error of the block's output
    (Nagel et al. 2020, AdaRound). A block is what a single tensor enters and leaves, and its inputs are those of the
    quantized graph, whose earlier blocks are done (Li et al. 2021, BRECQ); a random half of their values are those of
    the float graph (Wei et al. 2022, QDrop). Biases and step sizes of activations are learned along (Esser et al.
    2020). A block keeps what it had, unless its error on batches that were held back is less. Layers in front of
    several outputs, which no single tensor leaves, are rounded as ``RoundWeights`` does.

    What ``RoundWeights`` leaves as it is stays as it is.

    Attributes:
        calibration: As for :class:`~fxopt.passes.Quantize`; None takes standard normal numbers, for tests of speed.
        samples: Samples to read; an eighth of them, in whole batches, are held back.
        batch: Samples of a step, where the graph takes any number.
        steps: Steps for each block.
        rate: Learning rate of the weights; 0.1 of it is that of biases and of step sizes, relative to their size.
        weight: What being undecided costs, against the error that a block starts with.
        drop: Part of a block's inputs that are those of the float graph.
        trust: How far weights start on the side of what ``RoundWeights`` found; the rest is the float weight's side.
        most_layers: Blocks of more layers keep what ``RoundWeights`` found.
        most_bits: Layers whose weights have more bits are left as they are.
        seed: Seed of all that is drawn.

    Example:
        >>> from fxopt.passes import FoldBatchNorm, Pipeline, Quantize, ReconstructBlocks
        >>> pipeline = Pipeline((FoldBatchNorm(), Quantize(weights={"method": "mse"}), ReconstructBlocks()))
    """

    name: ClassVar[str] = "reconstruct-blocks"

    calibration: Iterable[Any] | None = field(default=None, compare=False, repr=False)
    samples: int = 1024
    batch: int = 32
    steps: int = 200
    rate: float = 1e-2
    weight: float = 1.0
    drop: float = 0.5
    trust: float = 0.5
    most_layers: int = 16
    most_bits: int = MAX_BITS
    seed: int = 0

    def requires(self, graph_module: fx.GraphModule) -> None:
        """The options are in range.

        Raises:
            PassError: If one is not.
        """
        del graph_module
        if min(self.samples, self.batch, self.steps, self.most_layers, self.most_bits) < 1:
            raise PassError("samples, batch, steps, most_layers and most_bits have to be at least 1.")
        if not (0.0 <= self.drop <= 1.0 and 0.0 <= self.trust <= 1.0):
            raise PassError("drop and trust are parts; give 0 to 1.")
        if not (0.0 < self.rate < float("inf") and 0.0 <= self.weight < float("inf")):
            raise PassError("rate has to be positive and weight not negative, and both finite.")

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Round every layer that can be.

        Raises:
            DataError: If the calibration data is empty or does not fit the graph.
            PassError: If an option is out of range.
        """
        layers = layers_to_round(graph_module, RoundWeights.most_unknowns, self.most_bits)
        if not layers:
            return PassResult(graph_module, False)
        data = synthetic_batch(graph_module, self.seed) if self.calibration is None else self.calibration
        original = float_twin(graph_module)
        leaves = [part for whole in read_inputs(original, data, self.samples) for part in self._split(original, whole)]
        with eval_mode(graph_module), eval_mode(original):
            _Reconstruction(self, graph_module, original, leaves).run(blocks_of(graph_module, layers))
        edit.finish(graph_module)
        RoundWeights(data, samples=self.samples, most_bits=self.most_bits, seed=self.seed).call(graph_module)
        return PassResult(graph_module, True)

    def _split(self, gm: fx.GraphModule, leaves: list[Any]) -> list[list[Any]]:
        """One batch in parts of the size of a step, if the graph takes any size."""
        sizes = {len(one) for one in leaves if isinstance(one, torch.Tensor) and one.dim()}
        if not gm.meta.get(TRACE_META, {}).get("dynamic_batch") or len(sizes) != 1:
            return [leaves]
        count = sizes.pop()
        starts = range(0, max(1, count - count % self.batch), self.batch)
        return [
            [one[start : start + self.batch] if isinstance(one, torch.Tensor) else one for one in leaves]
            for start in starts
        ]


class _Reconstruction:
    """One run: the values that are alive in both graphs, batch by batch, and the blocks one after the other."""

    def __init__(
        self, options: ReconstructBlocks, gm: fx.GraphModule, original: fx.GraphModule, leaves: Sequence[list[Any]]
    ) -> None:
        self._options, self._gm, self._original = options, gm, original
        self._twins = dict(zip(gm.graph.nodes, original.graph.nodes, strict=True))
        self._leaves, self._rounding = leaves, RoundWeights(seed=options.seed)
        self._generator = torch.Generator().manual_seed(options.seed)
        inputs = gm.graph.find_nodes(op="placeholder")
        self._quantized: list[Values] = [dict(zip(inputs, one, strict=True)) for one in leaves]
        twins = [self._twins[node] for node in inputs]
        self._floats: list[Values] = [dict(zip(twins, one, strict=True)) for one in leaves]
        held = max(1, len(leaves) // 8) if len(leaves) > 1 else 0
        self._learnt, self._held = range(len(leaves) - held), range(len(leaves) - held, len(leaves))

    def run(self, blocks: Sequence[Block]) -> None:
        """Reconstruct the blocks in order."""
        before: fx.Node | None = None
        for block in blocks:
            was = [] if before is None else [values[self._twins[before]] for values in self._floats]
            self._round(block, self._wanted(block))
            if len(block.layers) <= self._options.most_layers:
                self._reconstruct(block, before, was)
            run = SoftBlock(self._gm, {}, {})
            with torch.no_grad():
                for values in self._quantized:
                    run.advance(block.nodes, values)
            before = block.end

    @torch.no_grad()
    def _wanted(self, block: Block) -> dict[str, Wanted]:
        """Run a block of the float graph; the outputs of its layers, where they are looked at."""
        run, found = SoftBlock(self._original, {}, {}), {}
        for node in block.nodes:
            twin = self._twins[node]
            for values in self._floats:
                run.advance((twin,), values, keep=True)
            if node.op == "call_module" and str(node.target) in block.layers:
                found[str(node.target)] = self._rounding.wanted(self._original, twin, self._floats, self._leaves)
            for values in self._floats:
                run.forget(twin, values)
        return found

    @torch.no_grad()
    def _round(self, block: Block, wanted: dict[str, Wanted]) -> None:
        """Round the layers of a block by moments, for the inputs that they get now."""
        run = SoftBlock(self._gm, {}, {})
        alive = [dict(values) for values in self._quantized]
        for node in block.nodes:
            if node.op == "call_module" and str(node.target) in wanted:
                self._rounding.round(self._gm, node, alive, *wanted[str(node.target)])
            for values in alive:
                run.advance((node,), values)

    def _reconstruct(self, block: Block, before: fx.Node | None, was: Sequence[torch.Tensor]) -> None:
        targets = [values[self._twins[block.end]] for values in self._floats]
        if not isinstance(targets[0], torch.Tensor) or not targets[0].is_floating_point():
            return
        modules: dict[str, Any] = {path: self._gm.get_submodule(path) for path in block.layers}
        floats: dict[str, Any] = {path: self._original.get_submodule(path) for path in block.layers}
        weights = {
            path: SoftWeight(module, floats[path].weight, self._options.trust) for path, module in modules.items()
        }
        quantizers = learnable(self._gm, block.nodes)
        scales = {path: one.scale.detach().clone().requires_grad_() for path, one in quantizers.items()}
        judged = self._held or self._learnt
        started = self._error(SoftBlock(self._gm, {}, {}), block, targets, judged)
        if not 0.0 < started < float("inf"):
            return
        self._learn(SoftBlock(self._gm, weights, scales), block, (before, was), targets, started)
        kept = {path: self._gm.get_submodule(path) for path in (*weights, *scales)}
        for path, soft in weights.items():
            edit.replace_module(self._gm, path, _hardened(modules[path], soft))
        for path, scale in scales.items():
            changed = copy.deepcopy(quantizers[path])
            changed.scale.copy_(positive(scale.detach()))
            edit.replace_module(self._gm, path, changed)
        if not self._error(SoftBlock(self._gm, {}, {}), block, targets, judged) < started:
            for path, module in kept.items():
                edit.replace_module(self._gm, path, module)

    @torch.no_grad()
    def _error(self, run: SoftBlock, block: Block, targets: Sequence[torch.Tensor], judged: range) -> float:
        """The mean squared error of the block's output, on some batches."""
        errors = [
            (run.outcome(block.nodes, self._quantized[at], block.end) - targets[at]).double().square().mean()
            for at in judged
        ]
        return float(sum(errors)) / len(errors)

    def _learn(
        self,
        run: SoftBlock,
        block: Block,
        floats: tuple[fx.Node | None, Sequence[torch.Tensor]],
        targets: Sequence[torch.Tensor],
        started: float,
    ) -> None:
        """Train what a block learns."""
        how = self._options
        groups: list[dict[str, Any]] = [{"params": [soft.logits for soft in run.weights.values()], "lr": how.rate}]
        for soft in run.weights.values():
            if soft.bias is not None:
                size = float(soft.bias.detach().square().mean().sqrt())
                groups.append({"params": [soft.bias], "lr": 0.1 * how.rate * max(size, 1e-6)})
        for scale in run.scales.values():
            groups.append({"params": [scale], "lr": 0.1 * how.rate * float(scale.detach())})
        optimizer = torch.optim.Adam(groups)
        learnt = [one for group in groups for one in group["params"]]
        for step in range(how.steps):
            at = self._learnt[int(torch.randint(len(self._learnt), (1,), generator=self._generator))]
            with torch.enable_grad():
                found = run.outcome(block.nodes, self._mixed(at, *floats), block.end)
                loss = (found - targets[at]).square().mean() / started
                part = (step / how.steps - _WARM_UP) / (1.0 - _WARM_UP)
                if part >= 0.0:
                    costs = [soft.undecided(beta_at(part)) for soft in run.weights.values()]
                    loss = loss + how.weight * torch.stack(costs).mean()
                # Not backward(): the graph's other parameters are not to gather gradients.
                for one, slope in zip(learnt, torch.autograd.grad(loss, learnt, allow_unused=True), strict=True):
                    one.grad = slope
            optimizer.step()

    def _mixed(self, at: int, before: fx.Node | None, was: Sequence[torch.Tensor]) -> Values:
        """The values that a block gets, some of those that carry errors replaced by those of the float graph."""
        values = self._quantized[at]
        if before is None or not self._options.drop:
            return values
        chosen = torch.rand(was[at].shape, generator=self._generator) < self._options.drop
        return {**values, before: torch.where(chosen, was[at], values[before])}


def _hardened(layer: Any, soft: SoftWeight) -> nn.Module:
    """A layer with the integers and the bias that were learned."""
    new: Any = edit.clone_module(layer)
    with torch.no_grad():
        found = layer.weight_quantizer(soft.rounded()).to(layer.weight.dtype)
    new._parameters["weight"] = nn.Parameter(found, layer.weight.requires_grad)
    if soft.bias is not None:
        new._parameters["bias"] = nn.Parameter(soft.bias.detach(), layer.bias.requires_grad)
    return new  # type: ignore[no-any-return]
