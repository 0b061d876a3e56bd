"""What each layer loses at each number of bits: tables for the exact engine, measured without trying any policy.

A layer's loss at ``(weight_bits, activation_bits)`` is that of its weight plus that of its input, each quantized alone.
"""

from __future__ import annotations

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import fx, nn
from torch.nn import functional
from torch.utils import _pytree as pytree

from fxopt._files import write_text
from fxopt.decisions import FLOAT_BITS, Decision, SearchSpace
from fxopt.errors import DataError, PassError
from fxopt.graph import edit, eval_mode
from fxopt.graph.edit import fork
from fxopt.graph.fake_quantize import ActivationQuantizer
from fxopt.graph.grids import MAX_BITS, ActivationScheme, WeightScheme
from fxopt.graph.matrix_products import matrix_products, quantize_product
from fxopt.passes import RoundWeights
from fxopt.passes._calibrate import feed
from fxopt.passes._findings import Findings

__all__ = ["sensitivities"]

Method: TypeAlias = Literal["mse", "kl", "hessian", "gradient"]
Losses: TypeAlias = dict[str, dict[str, float]]

_PROBES = 8
_DRAWS = 32
_INPUT_DRAWS = 4
"""Draws for inputs: every sample is a draw of its own there, and their gradients take room."""
_WEIGHTS = WeightScheme("mse")
_ACTIVATIONS = ActivationScheme("mse")


def sensitivities(
    gm: fx.GraphModule,
    space: SearchSpace,
    batch: Any,
    *,
    method: Method = "mse",
    rounding: bool = False,
    weights: WeightScheme = _WEIGHTS,
    activations: ActivationScheme = _ACTIVATIONS,
    cache: str | os.PathLike[str] | None = None,
    seed: int = 0,
) -> list[list[float]]:
    """Losses of every choice of every decision on bits, for ``ExactEngine(losses=...)`` and the solvers.

    Args:
        gm: The float graph, batch norm folded.
        space: Decisions of kind "bits".
        batch: One batch as the graph takes it; labels are left out. Its size is what measuring costs.
        method: ``"mse"``: squared error of the outputs, relative to their squares. ``"kl"``: divergence of the class
            probabilities (over dimension 1). Both run what comes behind a layer once for each of its widths.
            ``"hessian"``: half the mean diagonal of the Hessian of that divergence, estimated with random signs
            (Hutchinson; Dong et al. 2020, HAWQ-V2, equation 5), times the squared error of the weight or input: a few
            passes in all. Outputs that are no class scores take half their squared error in its place.
            ``"gradient"``: half the mean square of what a change of the weight or input does to the logarithm of a
            class's probability in first order, ``(gradient . change)^2``, the class being drawn as the graph itself
            predicts; no labels. Its mean over draws is the second order of the divergence (Fisher information; Martens
            2020, "New insights and perspectives on the natural gradient method", section 8), signs and cross terms of
            the weights of an output channel, or of a sample's input, included; a few passes in all.
        rounding: Whether weights are rounded as ``Quantize(rounding=True)`` does, by the moments of their inputs in the
            batch, and not to the nearest. Losses of few bits are then much smaller.
        weights: The grids of weights, as for ``Quantize``; by default those of least error.
        activations: The same for the inputs of layers.
        cache: A JSON file that keeps what was measured, layer by layer; the same call goes on there.
        seed: Seed of the random signs and of the classes that are drawn.

    Returns:
        For each decision in the order of the space, the loss of each choice; 0 in floating point.

    Raises:
        DataError: If the batch does not fit the graph or leads to losses that are not finite.
        PassError: If the method is unknown or a decision is not about the bits of a layer that is called, or of a
            product of activations. Of a product the second operands stand for weights, the first ones for the input;
            what the softmax between those of an attention gives is among the first.
    """
    if method not in get_args(Method):
        raise PassError(f"There are no sensitivities by {method!r}; choose mse, kl, hessian or gradient.")
    graph = fork(gm)
    parts = _spelled_out(graph, {decision.site for decision in space})
    calls = {str(node.target) for node in graph.graph.find_nodes(op="call_module")}
    strange = [one.site for one in space if one.kind != "bits" or not calls.issuperset(parts.get(one.site, [one.site]))]
    if strange:
        raise PassError(
            f"{strange[0]!r} is no layer of this graph whose bits are decided; fold and ask Quantize for them."
        )
    args, kwargs = feed(graph, batch, "The batch")
    grids = _Grids(Findings(RoundWeights().moments if rounding else None), weights, activations)
    terms = f"{method} {rounding} {weights} {activations}"
    known = _Known(None if cache is None else Path(cache), _digest(graph, (args, kwargs), space, terms, seed))
    with eval_mode(graph):
        measure: Callable[[str, str, int], float] | None = None
        for decision in space:
            if decision.site in known.losses:
                continue
            if measure is None:
                grids.findings.begin(graph, [(args, kwargs)])
                kind = {"hessian": _Curvature, "gradient": _Information}.get(method, _Measured)
                modules = _Modules(graph, [one.site for one in space], parts)
                measure = kind(modules, args, kwargs, method, seed, grids).loss
            found = {}
            for part, bits in _asked(decision):
                loss = measure(decision.site, part, bits)
                if not loss < float("inf"):
                    raise DataError(
                        f"The loss of {decision.site!r} is {loss}; look for NaN in the batch and the weights."
                    )
                found[f"{part} {bits}"] = loss
            known.add(decision.site, found)
    return [
        [_total(known.losses[decision.site], choice) for choice in decision.choices]  # type: ignore[arg-type]
        for decision in space
    ]


def _spelled_out(gm: fx.GraphModule, sites: set[str]) -> dict[str, list[str]]:
    """Make modules of products of activations; their paths, by the products' sites."""
    found = {one.site: quantize_product(gm, one, MAX_BITS) for one in matrix_products(gm) if one.site in sites}
    if found:
        edit.finish(gm)
    return found


@dataclass(frozen=True)
class _Modules:
    """The modules that decisions are about.

    Attributes:
        gm: The graph that calls them.
        sites: The sites of the decisions.
        products: Paths of the modules that multiply activations, by site.
    """

    gm: fx.GraphModule
    sites: Sequence[str]
    products: Mapping[str, Sequence[str]]

    def operands(self, site: str, part: str) -> list[tuple[str, int]]:
        """Path and argument of every tensor that a part of a decision holds to a grid; none for a layer's weight."""
        if site in self.products:
            return [(path, int(part == "weight")) for path in self.products[site]]
        return [(site, 0)] if part == "input" else []


def _asked(decision: Decision) -> Iterator[tuple[str, int]]:
    """Part and bits of everything that the choices of a decision are made of."""
    pairs = [choice for choice in decision.choices if isinstance(choice, tuple)]
    for index, part in enumerate(("weight", "input")):
        for bits in sorted({pair[index] for pair in pairs} - {FLOAT_BITS}):
            yield part, bits


def _total(losses: dict[str, float], choice: tuple[int, int]) -> float:
    parts = zip(("weight", "input"), choice, strict=True)
    return sum(losses[f"{part} {bits}"] for part, bits in parts if bits != FLOAT_BITS)


class _Known:
    """What was measured, in a file if there is one."""

    def __init__(self, path: Path | None, key: str) -> None:
        self._path, self._key = path, key
        self.losses: Losses = {}
        if path is None or not path.is_file():
            return
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            mine = kept["key"] == key
        except (ValueError, KeyError, TypeError, OSError) as failure:
            raise DataError(f"{path} holds no sensitivities: {failure}. Delete it or name another file.") from failure
        if not mine:
            raise DataError(f"{path} holds sensitivities of another graph, batch or method; delete it or name another.")
        self.losses = kept["losses"]

    def add(self, site: str, losses: dict[str, float]) -> None:
        self.losses[site] = losses
        if self._path is not None:
            write_text(self._path, json.dumps({"key": self._key, "losses": self.losses}, indent=1))


def _digest(gm: fx.GraphModule, inputs: Any, space: SearchSpace, method: str, seed: int) -> str:
    found = hashlib.sha256(f"{gm.code} {method} {seed}".encode())
    found.update(repr([(decision.site, decision.choices) for decision in space]).encode())
    for tensor in (*gm.state_dict().values(), *pytree.tree_leaves(inputs)):
        if isinstance(tensor, torch.Tensor):
            found.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


@dataclass(frozen=True)
class _Grids:
    """How weights and inputs are put on grids."""

    findings: Findings
    weights: WeightScheme
    activations: ActivationScheme

    def weight(self, module: nn.Module, site: str, bits: int) -> tuple[nn.Parameter, nn.Parameter | None]:
        """A layer's weight on a grid, and the bias that goes with it."""
        layer: Any = self.findings.layer(module, site, (bits, FLOAT_BITS), self.weights)
        return nn.Parameter(layer.weight_quantizer(layer.weight).detach(), requires_grad=False), layer.bias

    def input(self, x: torch.Tensor, bits: int) -> torch.Tensor:
        """A layer's input on a grid."""
        quantizer = ActivationQuantizer(bits, self.activations).to(x.device)
        quantizer.observe(x)
        quantizer.settle("an input")
        return quantizer(x.detach())  # type: ignore[no-any-return]


class _Measured:
    """Runs the graph once and keeps all values; a change runs again what depends on it."""

    def __init__(self, modules: _Modules, args: Any, kwargs: Any, method: str, seed: int, grids: _Grids) -> None:
        del seed
        gm = modules.gm
        self._gm, self._modules, self._method, self._grids = gm, modules, method, grids
        self._interpreter = fx.Interpreter(gm, garbage_collect_values=False)
        leaves = pytree.tree_leaves((args, kwargs))
        with torch.no_grad():
            for node, leaf in zip(gm.graph.find_nodes(op="placeholder"), leaves, strict=True):
                self._interpreter.env[node] = leaf
            for node in gm.graph.nodes:
                if node.op != "placeholder":
                    self._interpreter.env[node] = self._interpreter.run_node(node)
        self._values = dict(self._interpreter.env)
        self._wanted = _floats(self._values[next(iter(gm.graph.find_nodes(op="output")))])

    @torch.no_grad()
    def loss(self, site: str, part: str, bits: int) -> float:
        """The loss with one weight, or one layer's input wherever it is called, at so many bits."""
        held = dict(self._modules.operands(site, part))
        calls = [node for path in held or (site,) for node in self._gm.graph.find_nodes(op="call_module", target=path)]
        changed = dict.fromkeys(calls)
        self._interpreter.env = dict(self._values)
        module: Any = self._gm.get_submodule(site)
        before = None if held else (module.weight, module.bias)
        try:
            if before is not None:
                module.weight, module.bias = self._grids.weight(module, site, bits)
            for node in self._gm.graph.nodes:
                if node not in changed and not any(source in changed for source in node.all_input_nodes):
                    continue
                changed[node] = None
                source: Any = node.args[held[str(node.target)]] if held and node in calls else node.all_input_nodes[0]
                exact = self._interpreter.env[source]
                if held and node in calls:
                    self._interpreter.env[source] = self._grids.input(exact, bits)
                found = self._interpreter.run_node(node)
                self._interpreter.env[source] = exact
                self._interpreter.env[node] = found
        finally:
            if before is not None:
                module.weight, module.bias = before
        output = self._interpreter.env[next(iter(self._gm.graph.find_nodes(op="output")))]
        return _distance(_floats(output), self._wanted, self._method)


def _floats(output: Any) -> list[torch.Tensor]:
    leaves = pytree.tree_leaves(output)
    found = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]
    if not found:
        raise DataError("The graph has no floating-point output to compare.")
    return found


def _distance(found: list[torch.Tensor], wanted: list[torch.Tensor], method: str) -> float:
    total = 0.0
    for one, other in zip(found, wanted, strict=True):
        if method == "kl":
            logs = [functional.log_softmax(value.double(), 1) for value in (one, other)]
            total += float((logs[1].exp() * (logs[1] - logs[0])).sum(1).mean())
        else:
            total += float((one - other).square().sum() / other.square().sum().clamp(min=1e-12))
    return total / len(found)


class _Differentiated(ABC):
    """Runs the graph once, so that its outputs can be differentiated by every weight and input of a layer."""

    def __init__(self, modules: _Modules, args: Any, kwargs: Any, method: str, seed: int, grids: _Grids) -> None:
        del method
        gm = modules.gm
        self._gm, self._modules, self._grids = gm, modules, grids
        self._generator = torch.Generator().manual_seed(seed)
        self._inputs: dict[tuple[str, int], torch.Tensor] = {}
        layers = [site for site in modules.sites if site not in modules.products]
        read = [one for site in modules.sites for part in ("input", "weight") for one in modules.operands(site, part)]
        handles = [gm.get_submodule(path).register_forward_pre_hook(self._note(path, at)) for path, at in read]
        try:
            with torch.enable_grad():
                args, kwargs = pytree.tree_map_only(torch.Tensor, _as_leaf, (args, kwargs))
                outputs = _floats(gm(*args, **kwargs))
        finally:
            for handle in handles:
                handle.remove()
        named: dict[object, Any] = {site: gm.get_submodule(site).weight for site in layers}
        named |= {one: self._inputs[one] for one in read}
        with torch.enable_grad():
            self._study(outputs, named)

    @abstractmethod
    def _study(self, outputs: list[torch.Tensor], named: dict[object, Any]) -> None:
        """Find out what losses follow from; weights are named by site, inputs by path and place."""

    @abstractmethod
    def _lost(self, name: object, change: torch.Tensor, of_bias: torch.Tensor | None = None) -> float:
        """The loss with a change of what is named."""

    @torch.no_grad()
    def loss(self, site: str, part: str, bits: int) -> float:
        """The loss with one weight or one layer's input at so many bits."""
        operands = self._modules.operands(site, part)
        if not operands:
            module: Any = self._gm.get_submodule(site)
            weight, bias = self._grids.weight(module, site, bits)
            return self._lost(site, weight - module.weight, None if bias is None else bias - module.bias)
        exact = {one: self._inputs[one].detach() for one in operands}
        return sum(self._lost(one, self._grids.input(tensor, bits) - tensor) for one, tensor in exact.items())

    def _note(self, path: str, at: int) -> Callable[[nn.Module, tuple[Any, ...]], Any]:
        def note(module: nn.Module, inputs: tuple[Any, ...]) -> Any:
            del module
            if (path, at) in self._inputs:
                return None  # Of a layer that is called more than once, the first input stands for all.
            # A copy, which activation functions in place leave as it is.
            self._inputs[path, at] = inputs[at] + 0.0
            return (*inputs[:at], self._inputs[path, at], *inputs[at + 1 :])

        return note


class _Curvature(_Differentiated):
    """The mean diagonal of the Hessian for every weight and every input of a layer."""

    def _study(self, outputs: list[torch.Tensor], named: dict[object, Any]) -> None:
        tensors = list(named.values())
        loss = torch.stack([_own_divergence(value) for value in outputs]).sum()
        slopes = torch.autograd.grad(loss, tensors, create_graph=True)
        sums = [0.0] * len(tensors)
        for probe in range(_PROBES):
            signs = [torch.randint(0, 2, one.shape, generator=self._generator).to(one) * 2 - 1 for one in tensors]
            turned = torch.autograd.grad(slopes, tensors, signs, retain_graph=probe + 1 < _PROBES)
            for index, (sign, curve) in enumerate(zip(signs, turned, strict=True)):
                sums[index] += float((sign * curve).sum()) / _PROBES / sign.numel()
        self._mean = dict(zip(named, sums, strict=True))

    def _lost(self, name: object, change: torch.Tensor, of_bias: torch.Tensor | None = None) -> float:
        """Half the mean curvature, never below zero, times the squared error."""
        del of_bias
        return 0.5 * max(self._mean[name], 0.0) * float(change.square().sum())


class _Information(_Differentiated):
    """Gradients of what the graph predicts, for classes drawn as it predicts them."""

    def _study(self, outputs: list[torch.Tensor], named: dict[object, Any]) -> None:
        layers: dict[str, Any] = {name: self._gm.get_submodule(name) for name in named if isinstance(name, str)}
        named = named | {(name, "bias"): layer.bias for name, layer in layers.items() if layer.bias is not None}
        self._slopes: dict[object, list[torch.Tensor]] = {name: [] for name in named}
        for draw in range(_DRAWS):
            wanted = {name: one for name, one in named.items() if draw < _INPUT_DRAWS or name not in self._inputs}
            score = torch.stack([_drawn_score(value, self._generator) for value in outputs]).sum()
            found = torch.autograd.grad(score, list(wanted.values()), retain_graph=True)
            for name, slope in zip(wanted, found, strict=True):
                self._slopes[name].append(slope)

    def _lost(self, name: object, change: torch.Tensor, of_bias: torch.Tensor | None = None) -> float:
        """Half the mean over draws of the squares of first-order changes, by output channel or sample."""
        transposed = isinstance(name, str) and isinstance(self._gm.get_submodule(name), _TRANSPOSED)
        total = 0.0
        for draw, slope in enumerate(self._slopes[name]):
            first = (slope * change).double().movedim(int(transposed), 0).flatten(1).sum(1)
            if of_bias is not None and len(of_bias) == len(first):
                first += (self._slopes[name, "bias"][draw] * of_bias).double()
            total += float(first.square().sum())
        return 0.5 * total / len(self._slopes[name])


_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def _as_leaf(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().clone().requires_grad_() if tensor.is_floating_point() else tensor


def _own_divergence(output: torch.Tensor) -> torch.Tensor:
    """The divergence from what the outputs are now: zero, with the curvature that errors meet."""
    if output.dim() > 1 and output.shape[1] > 1:
        logs = functional.log_softmax(output, 1)
        return functional.kl_div(logs, logs.detach(), log_target=True, reduction="sum") / len(output)
    return 0.5 * (output - output.detach()).square().mean()


def _drawn_score(output: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """The cost of what is drawn, a logarithm of its probability; its gradient has the mean square that errors meet.

    Scaled so that the mean square goes with the curvature of :func:`_own_divergence`. Draws are apart from one another,
    so cross terms of samples are zero in the mean.
    """
    if output.dim() < 2 or output.shape[1] < 2:
        noise = torch.randn(output.shape, generator=generator).to(output)
        return (output * noise).sum().mul(output.numel() ** -0.5)
    chances = functional.softmax(output.detach().double(), 1).movedim(1, -1)
    drawn = torch.multinomial(chances.reshape(-1, chances.shape[-1]).cpu(), 1, generator=generator)
    labels = drawn.view(chances.shape[:-1]).to(output.device)
    return functional.cross_entropy(output, labels, reduction="sum").mul(len(output) ** -0.5)
