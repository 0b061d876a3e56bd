"""Quantize: put layers and the values between them on integer grids."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, TypeAlias, TypeVar

import torch
from torch import fx

from fxopt.decisions import FLOAT_BITS, PLAIN_PLACEMENT, Capabilities, Decision, Placement, SearchSpace
from fxopt.errors import DataError, PassError
from fxopt.graph import edit, eval_mode, ops
from fxopt.graph.fake_quantize import ActivationQuantizer, observing
from fxopt.graph.grids import PLAIN_ACTIVATIONS, PLAIN_WEIGHTS, ActivationScheme, WeightScheme
from fxopt.graph.matrix_products import MatrixProduct, matrix_products, quantize_product
from fxopt.passes._calibrate import as_normalized, batches, feed, refuse_quantized, synthetic_batch
from fxopt.passes._findings import ROUNDED_BITS, Findings, Site
from fxopt.passes._placement import Point, check_names, place
from fxopt.passes._sites import (
    BITS,
    FLOAT,
    PRODUCT,
    check_sharing,
    check_weights,
    decide,
    decide_product,
    kind_of,
    layers,
    tied,
)
from fxopt.passes.base import PassResult, TunablePass
from fxopt.passes.round_weights import RoundWeights

__all__ = ["BITS", "CALIBRATION_META", "DEFAULT_RECIPE", "FLOAT", "Quantize"]

DEFAULT_RECIPE = {"conv": (8, 8), "depthwise": (8, 8), "linear": (8, 8), "matmul": (8, 8)}
"""Bits by kind of operator without a policy. Transposed convolutions have no integer kernel in onnxruntime."""

CALIBRATION_META = "fxopt_calibration"
"""Key of ``gm.meta`` under which a quantized graph says what it was calibrated on."""

_Widths: TypeAlias = dict[str, int]

_QUANTIZERS = "quantizers"
"""What targets call a product of activations."""


@dataclass(frozen=True)
class Quantize(TunablePass):
    """Quantize layers and the values between them, calibrated on the ranges seen in data.

    Weights go to symmetric grids of 1 to 8 bits, one scale an output channel; activations to asymmetric unsigned ones
    of 1 to 8 bits, one scale a tensor, or stay in floating point. Quantizers stand behind activation functions that a
    runtime fuses, at the inputs and outputs of additions, concatenations and poolings inside a chain of quantized
    layers, and nowhere around layers left in floating point. Both operands of a matrix product of activations are
    quantized, as in attention, whose mask and softmax stay in floating point. Parameters are shared with the graph
    before; its own quantizers and their observed ranges are new.

    Attributes:
        policy: Decisions of kind "bits": ``(weight_bits, activation_bits)`` for each layer, 1 to 8 of each; 32
            activation bits quantize the weight alone, and ``(32, 32)`` leaves the layer in floating point. A product of
            activations has one number of bits for all operands, given twice; its site is the path of the module in
            which it is computed, and the operator's name. None quantizes all that :data:`DEFAULT_RECIPE` names.
        calibration: An iterable of batches as the model takes them (labels behind the inputs are left out), or one
            batch as a tensor, tuple or mapping. None takes one synthetic batch of standard normal numbers; the outputs
            of layers that batch norm was folded into get the moments that the norm says, and ranges follow from that.
            Without batch norms this is enough to measure speed and size, not to judge accuracy.
            ``gm.meta["fxopt_calibration"]`` says which it was.
        max_batches: Largest number of batches to read, or None for all.
        seed: Seed of the synthetic batch.
        weights: The grids of weights and how their ranges are chosen; a mapping of its fields will do.
        activations: The same for activations.
        products: Whether bits of products of activations are decided, and quantized without a policy; else they stay in
            floating point unless a policy names them.
        ends: Bits of the first and the last layer: their only choice in the search space, and what they get without a
            policy. None for what ``placement`` says of them.
        placement: Which values the target wants quantized, and which on one grid. None for what onnxruntime does; a
            mapping of its fields will do. ``fxopt.optimize`` takes the target's.
        rounding: Whether the integers of weights of fewer than 8 bits are found by :class:`~fxopt.passes.RoundWeights`
            on the calibration data, if there are some, for outputs that stay near; else they are the nearest.
        findings: What earlier passes with the same data and options found of the same graph, and what this one finds:
            a search gives one to all its trials. With ``rounding`` each layer is then rounded for the inputs that it
            gets in the float graph, once for all policies.

    Example:
        >>> from fxopt.passes import FoldBatchNorm, Pipeline, Quantize
        >>> pipeline = Pipeline((FoldBatchNorm(), Quantize()))
    """

    name: ClassVar[str] = "quantize"
    kinds: ClassVar[tuple[str, ...]] = ("bits",)

    calibration: Iterable[Any] | None = field(default=None, compare=False, repr=False)
    max_batches: int | None = None
    seed: int = 0
    weights: WeightScheme = PLAIN_WEIGHTS
    activations: ActivationScheme = PLAIN_ACTIVATIONS
    products: bool = True
    ends: tuple[int, int] | None = None
    placement: Placement | None = None
    rounding: bool = False
    findings: Findings | None = field(default=None, compare=False, repr=False, metadata={"saved": False})

    def __post_init__(self) -> None:
        """Take mappings for schemes.

        Raises:
            PassError: If an option of a scheme is unknown or out of range, or the bits of the ends are.
            TargetError: If a field of the placement is.
        """
        super().__post_init__()
        object.__setattr__(self, "weights", _scheme(WeightScheme, self.weights, "weights"))
        object.__setattr__(self, "activations", _scheme(ActivationScheme, self.activations, "activations"))
        if self.placement is not None:
            object.__setattr__(self, "placement", _scheme(Placement, self.placement, "placement"))
        if self.ends is not None:
            given: Any = self.ends
            object.__setattr__(self, "ends", tuple(given) if isinstance(given, list) else given)
            if self.ends not in BITS:
                raise PassError(f"ends is {self.ends!r}; give 1 to 8 bits of weights and of activations, or (32, 32).")

    def search_space(self, graph_module: fx.GraphModule, capabilities: Capabilities | None = None) -> SearchSpace:
        """One decision of kind "bits" for all that has a quantized form and that the target can run so.

        Layers come first, then products of activations. Layers that share a weight are offered one width for it, the
        widest that all have.

        Args:
            graph_module: A graph from ``fxopt.trace``.
            capabilities: What the target can run; None for all layers of :data:`DEFAULT_RECIPE`.

        Raises:
            PassError: If some layers, but not all, are quantized already, or the target has not the bits of ``ends``.
        """
        able = capabilities or Capabilities({kind: (bits, FLOAT) for kind, bits in DEFAULT_RECIPE.items()})
        decisions = self._decisions(graph_module, products=self.products)
        if decisions:
            refuse_quantized(graph_module, self.name)
        offered = [decision for decision in SearchSpace(decisions).restrict(able) if decision.choices != (FLOAT,)]
        sites = [decision.site for decision in decisions if decision.operator != PRODUCT]
        ends = self.ends or (self.placement or able.placement).ends
        if self.ends is not None:
            _check_ends([decision for decision in offered if decision.site in (*sites[:1], *sites[-1:])], self.ends)
        return SearchSpace(tied(graph_module, (_pinned(decision, sites, ends) for decision in offered)))

    def requires(self, graph_module: fx.GraphModule) -> None:
        """The options are in range.

        Raises:
            PassError: If one is not.
        """
        del graph_module
        check_names(self._how)
        if self.max_batches is not None and self.max_batches < 1:
            raise PassError(f"max_batches is {self.max_batches}; give at least 1, or None for all.")

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Insert activation quantizers, calibrate them, and replace the layers chosen by quantized ones.

        Raises:
            PolicyError: If the policy names a layer or bits that cannot be chosen, or different bits for a weight that
                two layers share.
            DataError: If the calibration data is empty, of the wrong form, or leads to values that are not finite.
            PassError: If batch normalization follows a chosen layer, or other layers are quantized already.
        """
        chosen = self._chosen(graph_module)
        if not chosen:
            return PassResult(graph_module, False)
        refuse_quantized(graph_module, self.name)
        products = [product for product in matrix_products(graph_module) if product.site in chosen]
        widths = {product.site: chosen.pop(product.site)[0] for product in products}
        check_weights(graph_module, chosen)
        check_sharing(graph_module, chosen)
        inputs = {path: activation for path, (_, activation) in chosen.items() if activation != FLOAT_BITS}
        findings = self.findings or Findings()
        findings.begin(graph_module, self.calibration)
        inputs |= _quantize_products(graph_module, products, widths)
        if "silu" not in self._how.fuses:
            _split_silu(graph_module, inputs)
        sites = _insert(graph_module, place(graph_module, inputs, self._how), self.activations)
        graph_module.recompile()
        self._calibrate(graph_module, sites, findings)
        for path, bits in chosen.items():
            layer = findings.layer(graph_module.get_submodule(path), path, bits, self.weights)
            edit.replace_module(graph_module, path, layer)
        edit.finish(graph_module)
        if self.rounding and self.calibration is not None and self.findings is None:
            RoundWeights(self.calibration, most_bits=ROUNDED_BITS, seed=self.seed).call(graph_module)
        return PassResult(graph_module, True)

    @property
    def _how(self) -> Placement:
        return self.placement or PLAIN_PLACEMENT

    def _chosen(self, gm: fx.GraphModule) -> dict[str, tuple[int, int]]:
        """Bits of the layers to quantize, by path."""
        if self.policy is None:
            kinds = {str(node.target): kind_of(gm, node) for node in layers(gm)}
            found = {path: DEFAULT_RECIPE[kind] for path, kind in kinds.items() if kind in DEFAULT_RECIPE}
            if found and self.products:
                found |= {product.site: DEFAULT_RECIPE[PRODUCT] for product in _float_products(gm)}
            ends = self.ends or self._how.ends
            if ends is not None and kinds:
                found |= dict.fromkeys((next(iter(kinds)), next(reversed(kinds))), ends)
            return {path: bits for path, bits in found.items() if bits != FLOAT}
        SearchSpace(self._decisions(gm)).validate(self.own_choices)
        return {site: bits for (_, site), bits in self.own_choices.items() if bits != FLOAT}  # type: ignore[misc]

    def _decisions(self, gm: fx.GraphModule, products: bool = True) -> list[Decision]:
        found = [decide(gm, node, index) for index, node in enumerate(layers(gm))]
        multiplied = _float_products(gm) if products else []
        return found + [decide_product(product, index) for index, product in enumerate(multiplied, len(found))]

    def _calibrate(self, gm: fx.GraphModule, sites: list[Site], findings: Findings) -> None:
        if not sites:
            gm.meta[CALIBRATION_META] = {"source": "none: weights alone are quantized", "batches": 0, "samples": 0}
            return
        unseen = findings.unseen(sites)
        if unseen:
            findings.learn(unseen, self._observe(gm))
        findings.settle(sites)
        gm.meta[CALIBRATION_META] = dict(findings.source)

    def _observe(self, gm: fx.GraphModule) -> dict[str, object]:
        """Let the quantizers see the calibration data; give what it was."""
        count = samples = known = 0
        with torch.no_grad(), eval_mode(gm), observing(gm):
            if self.calibration is None:
                args, kwargs = feed(gm, synthetic_batch(gm, self.seed), "The synthetic batch")
                with as_normalized(gm) as known:
                    gm(*args, **kwargs)
            else:
                for batch in batches(self.calibration, gm):
                    if count == self.max_batches:
                        break
                    args, kwargs = feed(gm, batch, f"Calibration batch {count}")
                    gm(*args, **kwargs)
                    count += 1
                    samples += _samples(args, kwargs)
                if not count:
                    raise DataError("The calibration loader is empty; give one that yields at least one batch.")
        source = "loader" if self.calibration is not None else f"synthetic: standard normal, seed {self.seed}"
        if known:
            source += f"; outputs of {known} layers as their batch norms say"
        return {"source": source, "batches": count, "samples": samples}


S = TypeVar("S", WeightScheme, ActivationScheme, Placement)


def _scheme(kind: type[S], given: Any, name: str) -> S:
    if isinstance(given, kind):
        return given
    if not isinstance(given, Mapping):
        raise PassError(f"{name} is a {type(given).__name__}; give a {kind.__name__} or a mapping of its fields.")
    try:
        return kind(**given)
    except TypeError as failure:
        raise PassError(f"{name}: {failure}; its options are {', '.join(kind.__dataclass_fields__)}.") from failure


def _check_ends(decisions: Iterable[Decision], ends: tuple[int, int]) -> None:
    for decision in decisions:
        if ends not in decision.choices:
            raise PassError(
                f"ends is {ends}, which the target cannot run at {decision.site!r}; choose one of "
                f"{', '.join(map(str, decision.choices))}."
            )


def _pinned(decision: Decision, sites: Sequence[str], ends: tuple[int, int] | None) -> Decision:
    """The decision, with one choice left if it is about the first or last of these layers and the target has it."""
    if decision.site not in (*sites[:1], *sites[-1:]) or ends is None or ends not in decision.choices:
        return decision
    return replace(decision, choices=(ends,), default=ends)


def _samples(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor) and value.dim()]
    return int(tensors[0].shape[0]) if tensors else 1


def _float_products(gm: fx.GraphModule) -> list[MatrixProduct]:
    """The products of activations of a graph in which nothing is quantized."""
    return [] if any(isinstance(module, ActivationQuantizer) for module in gm.modules()) else matrix_products(gm)


def _quantize_products(gm: fx.GraphModule, products: Iterable[MatrixProduct], widths: Mapping[str, int]) -> _Widths:
    """Put quantized forms in the place of products; the bits that each reads, by path."""
    found: _Widths = {}
    for product in products:
        found |= dict.fromkeys(quantize_product(gm, product, widths[product.site]), widths[product.site])
    if found:
        edit.finish(gm)
    return found


def _split_silu(gm: fx.GraphModule, chosen: Container[str]) -> None:
    """Write SiLU behind a chosen layer as ``x * sigmoid(x)``: both factors have integer kernels, SiLU has none."""
    found = [node for node in gm.graph.nodes if _is_silu(gm, node) and _follows(node, chosen)]
    for node in found:
        source = node.args[0]
        gate = edit.insert_function(gm, torch.ops.aten.sigmoid.default, source, (source,), f"{node.name}_gate")
        product = edit.insert_function(gm, torch.ops.aten.mul.Tensor, gate, (source, gate), f"{node.name}_product")
        edit.replace_uses(node, product)
        edit.erase(gm, node)
    if found:
        edit.finish(gm)


def _is_silu(gm: fx.GraphModule, node: fx.Node) -> bool:
    return node.op in ("call_module", "call_function") and ops.semantics(gm, node).name in ("SiLU", "silu")


def _follows(node: fx.Node, chosen: Container[str]) -> bool:
    source = node.args[0]
    return isinstance(source, fx.Node) and source.op == "call_module" and str(source.target) in chosen


def _insert(gm: fx.GraphModule, points: Iterable[Point], scheme: ActivationScheme) -> list[Site]:
    """Insert a quantizer at every point, one module at several paths where a grid is shared."""
    device = next((parameter.device for parameter in gm.parameters()), torch.device("cpu"))
    at: dict[int, ActivationQuantizer] = {}
    members: dict[ActivationQuantizer, list[fx.Node]] = {}
    readers_of: dict[fx.Node, list[tuple[fx.Node, Point]]] = {}
    for point in points:
        quantizer = at.setdefault(point.grid, ActivationQuantizer(point.bits, scheme).to(device))
        quantizer.train(gm.training)
        path = edit.free_path(gm, f"{_QUANTIZERS}.{_site(point.node).replace('.', '_')}")
        inserted = edit.insert_module(gm, path, quantizer, after=point.node, args=(point.node,))
        readers_of.setdefault(point.node, []).append((inserted, point))
        members.setdefault(quantizer, []).append(point.node)
    for node, group in readers_of.items():
        quantized = [inserted for inserted, _ in group]
        for inserted, point in group:
            others = [user for user in node.users if user not in point.readers]
            edit.replace_uses(node, inserted, except_=[*others, *quantized])
    return [
        Site(quantizer, f"the value of {_site(nodes[0])!r}", tuple(node.name for node in nodes))
        for quantizer, nodes in members.items()
    ]


def _site(node: fx.Node) -> str:
    return str(node.target) if node.op in ("call_module", "placeholder") else node.name
