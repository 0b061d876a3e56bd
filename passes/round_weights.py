"""Round weights so that the layers' outputs, not the weights themselves, stay near; and correct their biases."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeAlias

import torch
from torch import fx, nn

from fxopt.errors import PassError
from fxopt.graph import edit, eval_mode
from fxopt.graph.edit import fork
from fxopt.graph.fake_quantize import MAX_BITS, ActivationQuantizer, QuantizedLayer
from fxopt.graph.sparsity import sparse_sites
from fxopt.passes._calibrate import synthetic_batch
from fxopt.passes._layer_walk import Leaves, Values, draw_positions, read_inputs, walk
from fxopt.passes._least_squares import Moments, input_rows, output_rows, positions_of
from fxopt.passes._reconstruction import Reconstruction
from fxopt.passes._rounding import can_be_rounded, rounded_layer
from fxopt.passes.base import Pass, PassResult

__all__ = ["RoundWeights", "Wanted", "float_twin", "layers_to_round"]

Wanted: TypeAlias = tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]
"""Positions of a layer's output, and its values there, by batch."""


@dataclass(frozen=True)
class RoundWeights(Pass):
    """Round the weights of a quantized graph by the second moments of their inputs; no training and no labels.

    Layer by layer, in order, with the inputs that the layer gets in the quantized graph, whose earlier layers are
    rounded already:

    1. Weights of least squares for the outputs of the float graph, near the old ones: they take back what the errors of
       the inputs do.
    2. Scales anew, as the quantizer's scheme says, and rounding column by column, each column's error taken over by
       those not yet rounded (Frantar et al. 2022, GPTQ, algorithm 1, columns with the largest moments first); then
       each integer in turn is put at its best with all others as they are, three times over. The same is done from the
       nearest integers, and each output channel takes what is better.
    3. A bias for which the mean output is that of the float graph: bias correction (Nagel et al. 2019, section 4.2).

    Weights become new parameters on their grid. Transposed convolutions, layers that are called more than once or share
    a weight, sparse layers, and weights that are binary, codebooks or on their grid already stay as they are.

    Attributes:
        calibration: As for :class:`~fxopt.passes.Quantize`; None takes standard normal numbers, for tests of speed.
        samples: Samples to read.
        rows: Output positions of all samples, drawn at random, that a layer is rounded by.
        ridge: Penalty on the distance from the old weights, as a part of the inputs' mean second moment.
        most_unknowns: Layers with more weights for one output are rounded to the nearest.
        most_bits: Layers whose weights have more bits are rounded to the nearest.
        seed: Seed of the positions.

    Example:
        >>> from fxopt.passes import FoldBatchNorm, Pipeline, Quantize, RoundWeights
        >>> pipeline = Pipeline((FoldBatchNorm(), Quantize(weights={"method": "mse"}), RoundWeights()))
    """

    name: ClassVar[str] = "round-weights"

    calibration: Iterable[Any] | None = field(default=None, compare=False, repr=False)
    samples: int = 512
    rows: int = 20_000
    ridge: float = 1e-2
    most_unknowns: int = 4608
    most_bits: int = MAX_BITS
    seed: int = 0

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Round every layer that can be.

        Raises:
            DataError: If the calibration data is empty or does not fit the graph.
            PassError: If an option is out of range.
        """
        layers = layers_to_round(graph_module, self.most_unknowns, self.most_bits)
        if not layers:
            return PassResult(graph_module, False)
        data = synthetic_batch(graph_module, self.seed) if self.calibration is None else self.calibration
        original = float_twin(graph_module)
        leaves = read_inputs(original, data, self.samples)
        with torch.no_grad(), eval_mode(graph_module), eval_mode(original):
            wanted = self._gather(original, layers, leaves)
            by_node = {node: path for path, node in layers.items()}

            def adapt(node: fx.Node, values: Sequence[Values]) -> None:
                if node in by_node:
                    self.round(graph_module, node, values, *wanted.pop(by_node[node]))

            walk(graph_module, leaves, before=adapt)
        edit.finish(graph_module)
        return PassResult(graph_module, True)

    def requires(self, graph_module: fx.GraphModule) -> None:
        """The options are in range.

        Raises:
            PassError: If one is not.
        """
        del graph_module
        counts = (self.samples, self.rows, self.most_unknowns, self.most_bits)
        if min(counts) < 1 or not 0.0 <= self.ridge < float("inf"):
            raise PassError(
                "samples, rows, most_unknowns and most_bits have to be at least 1, and ridge finite, not negative."
            )

    @property
    def moments(self) -> Reconstruction:
        """The same options for moments of the float graph, which are gathered for all layers at once."""
        return Reconstruction(False, self.samples, self.rows, self.ridge, self.most_unknowns, seed=self.seed)

    def _gather(self, gm: fx.GraphModule, layers: dict[str, fx.Node], leaves: list[Leaves]) -> dict[str, Wanted]:
        """Positions and the outputs of the float graph there, by layer and batch."""
        found: dict[str, Wanted] = {}

        def look(node: fx.Node, values: Sequence[Values]) -> None:
            if node.op == "call_module" and str(node.target) in layers:
                found[str(node.target)] = self.wanted(gm, node, values, leaves)

        walk(gm, leaves, after=look)
        return found

    def wanted(self, gm: fx.GraphModule, node: fx.Node, values: Sequence[Values], leaves: Sequence[Leaves]) -> Wanted:
        """Positions of a layer's output and its values there, by batch, when it has run.

        Args:
            gm: The float graph.
            node: The layer's call.
            values: Values of the nodes, by batch.
            leaves: Values of the graph's inputs, by batch.
        """
        module: Any = gm.get_submodule(str(node.target))
        count = positions_of(module, values[0][node])
        positions = draw_positions(str(node.target), count, leaves, self.rows, self.seed)
        outputs = [output_rows(module, one[node], at).clone() for one, at in zip(values, positions, strict=True)]
        return positions, outputs

    def round(
        self,
        gm: fx.GraphModule,
        node: fx.Node,
        values: Sequence[Values],
        positions: Sequence[torch.Tensor],
        outputs: Sequence[torch.Tensor],
    ) -> None:
        """Round one layer, for its inputs as they are in the quantized graph, before it runs."""
        layer: Any = gm.get_submodule(str(node.target))
        source = node.all_input_nodes[0]
        moments = Moments.total(
            Moments.of(input_rows(layer, one[source], at), y)
            for one, at, y in zip(values, positions, outputs, strict=True)
        )
        new = rounded_layer(layer, moments, self.ridge)
        if new is not None:
            edit.replace_module(gm, str(node.target), new)


def layers_to_round(gm: fx.GraphModule, most_unknowns: int, most_bits: int) -> dict[str, fx.Node]:
    """The one call of every quantized layer that can be rounded, by path."""
    calls: dict[str, list[fx.Node]] = {}
    weights: dict[int, int] = {}
    for node in gm.graph.find_nodes(op="call_module"):
        calls.setdefault(str(node.target), []).append(node)
    for module in gm.modules():
        for tensor in module._parameters.values():
            weights[id(tensor)] = weights.get(id(tensor), 0) + 1
    sparse = sparse_sites(gm)
    found = {}
    for path, nodes in calls.items():
        module = gm.get_submodule(path)
        if len(nodes) > 1 or path in sparse or not can_be_rounded(module, most_unknowns, most_bits):
            continue
        weight: torch.Tensor = module.weight  # type: ignore[assignment]
        if weights[id(weight)] > 1:
            continue
        with torch.no_grad():
            done = torch.equal(module.weight_quantizer(weight), weight)  # type: ignore[operator]
        if not done:
            found[path] = nodes[0]
    return found


def float_twin(gm: fx.GraphModule) -> fx.GraphModule:
    """The same graph with the same nodes, in floating point."""
    plain = fork(gm)
    for path, module in list(plain.named_modules(remove_duplicate=False)):
        if isinstance(module, ActivationQuantizer):
            edit.replace_module(plain, path, nn.Identity())
        elif isinstance(module, QuantizedLayer):
            edit.replace_module(plain, path, module.to_float())
    return plain
