"""Give back by least squares what a layer's outputs lost when its inputs were cut. No training, no labels."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fxopt.errors import PassError
from fxopt.graph import eval_mode
from fxopt.graph.edit import fork
from fxopt.passes._cutting import laid_out_like
from fxopt.passes._layer_walk import Values, draw_positions, read_inputs, walk
from fxopt.passes._least_squares import Moments, groups_of, input_rows, is_linear, output_rows, positions_of

__all__ = ["Kept", "Reconstruction", "Reconstructor"]

Kept: TypeAlias = Mapping[tuple[str, str], Mapping[int, npt.NDArray[np.int64]]]
"""The indices that stay of every parameter that was cut, by module path, name and dimension."""


@dataclass(frozen=True)
class Reconstruction:
    """How weights are found anew after a cut.

    Attributes:
        sequential: True takes each layer's inputs from the pruned network, whose earlier layers were found anew
            already, so that errors do not add up; each policy then costs a pass of the samples through the pruned
            network. False takes them from the unpruned network: second moments are gathered once, and a policy costs
            no more than a solution for each layer.
        samples: Samples to read. Fewer are, if there are no more, or if the values of one layer for all of them would
            not fit in ``memory``.
        rows: Rows of the least squares of a layer; output positions of the samples, drawn at random, are rows.
        ridge: Penalty on the change of the weights, as a part of the inputs' mean variance.
        most_unknowns: Layers with more weights for one output keep the weights they have: the moments of so many
            inputs are too large to solve for.
        memory: Bytes that are kept between policies, and again of values while the samples run through.
        seed: Seed of the positions.

    Raises:
        PassError: If a number is out of range.
    """

    sequential: bool = True
    samples: int = 1500
    rows: int = 20_000
    ridge: float = 1e-3
    most_unknowns: int = 4608
    memory: int = 2**30
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the options."""
        for name in ("samples", "rows", "most_unknowns", "memory"):
            if getattr(self, name) < 1:
                raise PassError(f"{name} of a reconstruction has to be at least 1, got {getattr(self, name)}.")
        if not (math.isfinite(self.ridge) and self.ridge >= 0.0):
            raise PassError(f"ridge has to be finite and not negative, got {self.ridge}.")


@dataclass(frozen=True)
class _Wanted:
    """What a layer gave before the cut.

    Attributes:
        positions: Output positions that were looked at, for each batch.
        outputs: The outputs there, for each batch, shape (rows, outputs); empty where moments are enough.
        moments: Moments of the layer's inputs, or None where the outputs are kept instead.
    """

    positions: tuple[torch.Tensor, ...]
    outputs: tuple[torch.Tensor, ...] = ()
    moments: Moments | None = None


class Reconstructor:
    """Finds the weights of pruned copies of one graph anew; what it needs of the graph is gathered once.

    Args:
        gm: The graph before the cut.
        data: Batches as the graph takes them; what comes behind its inputs, such as labels, is left out.
        options: How.

    Raises:
        DataError: If there is no batch or one does not fit the graph.
    """

    def __init__(self, gm: fx.GraphModule, data: Iterable[Any], options: Reconstruction | None = None) -> None:
        self.options = options or Reconstruction()
        self._gm = gm
        self._batches = read_inputs(gm, data, self.options.samples, self.options.memory)
        self._layers = _layers(gm)
        self._wanted: dict[str, _Wanted] = {}

    def restore(self, pruned: fx.GraphModule, kept: Kept) -> fx.GraphModule:
        """Find the weights of a pruned graph anew.

        Args:
            pruned: The graph after the cut, with the module paths of the graph before.
            kept: What stayed of its parameters.

        Returns:
            A graph with new weights. Tensors that do not change are shared with the given one, which is left alone.
        """
        if not kept:
            return pruned
        twin = fork(pruned)
        with torch.no_grad(), eval_mode(self._gm), eval_mode(twin):
            if not self._wanted:
                self._wanted = self._gather()
            if self.options.sequential:
                self._restore_in_order(twin, kept)
            else:
                self._restore_from_moments(twin, kept)
        return twin

    def moments(self) -> dict[str, Moments]:
        """Moments of the inputs and outputs of every layer of the graph that there is room for, by its path."""
        with torch.no_grad(), eval_mode(self._gm):
            self._wanted = self._wanted or self._gather()
        return {path: wanted.moments for path, wanted in self._wanted.items() if wanted.moments is not None}

    def _gather(self) -> dict[str, _Wanted]:
        """One pass of the samples through the graph before the cut."""
        admitted = self._admitted()
        found: dict[str, _Wanted] = {}
        modules: list[Any] = [self._gm.get_submodule(path) for path in admitted.values()]
        share = max(1, sum(module.weight.shape[0] for module in modules))
        rows = max(1, min(self.options.rows, self.options.memory // (4 * share)))

        def look(node: fx.Node, values: Sequence[Values]) -> None:
            if node not in admitted:
                return
            path = admitted[node]
            module: Any = self._gm.get_submodule(path)
            count = positions_of(module, values[0][node])
            positions = draw_positions(path, count, self._batches, rows, self.options.seed)
            pairs = list(zip(values, positions, strict=True))
            if self.options.sequential:
                found[path] = _Wanted(positions, tuple(output_rows(module, one[node], at).clone() for one, at in pairs))
            else:
                source = node.all_input_nodes[0]
                moments = Moments.total(Moments.of(input_rows(module, one[source], at)) for one, at in pairs)
                found[path] = _Wanted((), (), moments.with_outputs(_by_group(module, module.weight), module.bias))

        walk(self._gm, self._batches, after=look)
        return found

    def _admitted(self) -> dict[fx.Node, str]:
        """Calls of the layers that there is room for, smallest first where there is not room for all."""
        sizes = {}
        for path, node in self._layers.items():
            module: Any = self._gm.get_submodule(path)
            unknowns = module.weight[0].numel()
            if unknowns <= self.options.most_unknowns:
                sizes[node] = 8 * unknowns**2 * groups_of(module)
        if self.options.sequential:
            return {node: str(node.target) for node in sizes}
        room = self.options.memory
        found = {}
        for node, size in sorted(sizes.items(), key=lambda item: item[1]):
            room -= size
            if room >= 0:
                found[node] = str(node.target)
        return found

    def _restore_in_order(self, gm: fx.GraphModule, kept: Kept) -> None:
        cut = {path for path, _ in kept}
        touched: set[fx.Node] = set()
        layers = {node: path for path, node in _layers(gm).items() if path in self._wanted}

        def adapt(node: fx.Node, values: Sequence[Values]) -> None:
            changed = any(source in touched for source in node.all_input_nodes)
            if changed and node in layers:
                self._refit(gm, node, self._wanted[layers[node]], values, kept)
            if changed or (node.op in ("call_module", "get_attr") and _owner(node) in cut):
                touched.add(node)

        walk(gm, self._batches, before=adapt)

    def _refit(self, gm: fx.GraphModule, node: fx.Node, wanted: _Wanted, values: Sequence[Values], kept: Kept) -> None:
        """New weights of one layer, for its inputs as they are in the pruned graph."""
        module: Any = gm.get_submodule(str(node.target))
        outputs = _kept_outputs(kept, str(node.target), wanted.outputs[0].shape[1])
        if len(outputs) != module.weight.shape[0]:
            return
        source = node.all_input_nodes[0]
        moments = Moments.total(
            Moments.of(input_rows(module, one[source], at), y[:, outputs])
            for one, at, y in zip(values, wanted.positions, wanted.outputs, strict=True)
        )
        _fit(gm, node, moments, self.options.ridge)

    def _restore_from_moments(self, gm: fx.GraphModule, kept: Kept) -> None:
        for path, node in _layers(gm).items():
            inputs = kept.get((path, "weight"), {}).get(1)
            moments = self._wanted[path].moments if path in self._wanted else None
            if inputs is None or moments is None:
                continue
            module: Any = gm.get_submodule(path)
            before: Any = self._gm.get_submodule(path)
            outputs = _kept_outputs(kept, path, before.weight.shape[0])
            if len(inputs) == before.weight.shape[1] or groups_of(module) != groups_of(before):
                continue
            size = before.weight[0].numel()
            unknowns = torch.arange(size).reshape(before.weight.shape[1:])[torch.as_tensor(inputs)].flatten()
            _fit(gm, node, moments, self.options.ridge, (unknowns, outputs))


def _fit(
    gm: fx.GraphModule,
    node: fx.Node,
    moments: Moments,
    ridge: float,
    part: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:
    """Put the weights of the least squares into a layer; the constant is its bias's, or its batch norm's.

    Args:
        gm: The graph.
        node: The layer's call.
        moments: Those of the layer's inputs and outputs, or of the layer before it was cut.
        ridge: The penalty.
        part: Which unknowns and outputs of the moments are left.
    """
    module: Any = gm.get_submodule(str(node.target))
    norm = _norm_behind(gm, node)
    offset = module.bias is not None or norm is not None
    near = _by_group(module, module.weight)
    weight, constant = moments.fit(near, ridge, offset) if part is None else moments.refit(*part, near, ridge, offset)
    _write(module, norm, weight, constant.flatten() if offset else None)


def _layers(gm: fx.GraphModule) -> dict[str, fx.Node]:
    """The call of every layer with weights of its own that is called once, by path, in graph order."""
    calls: dict[str, list[fx.Node]] = {}
    holders: dict[int, int] = {}
    for node in gm.graph.find_nodes(op="call_module"):
        calls.setdefault(str(node.target), []).append(node)
    for _, module in gm.named_modules():
        for tensor in module._parameters.values():
            holders[id(tensor)] = holders.get(id(tensor), 0) + 1
    read = {str(node.target) for node in gm.graph.find_nodes(op="get_attr")}
    found = {}
    for path, nodes in calls.items():
        module = gm.get_submodule(path)
        if len(nodes) > 1 or not is_linear(module) or f"{path}.weight" in read or f"{path}.bias" in read:
            continue
        if all(holders[id(tensor)] == 1 for tensor in module._parameters.values() if tensor is not None):
            found[path] = nodes[0]
    return found


def _by_group(module: Any, weight: torch.Tensor) -> torch.Tensor:
    """A weight as float64 of shape (groups, outputs of a group, unknowns)."""
    flat = weight.detach().double().flatten(1)
    return flat.reshape(groups_of(module), -1, flat.shape[1])


def _kept_outputs(kept: Kept, path: str, size: int) -> torch.Tensor:
    found = kept.get((path, "weight"), {}).get(0)
    return torch.arange(size) if found is None else torch.as_tensor(found)


def _norm_behind(gm: fx.GraphModule, node: fx.Node) -> _BatchNorm | None:
    """The batch norm that alone reads a node: a constant in its input is a shift of its running mean."""
    users = list(node.users)
    if len(users) != 1 or users[0].op != "call_module":
        return None
    norm = gm.get_submodule(str(users[0].target))
    alone = len(gm.graph.find_nodes(op="call_module", target=users[0].target)) == 1
    return norm if alone and isinstance(norm, _BatchNorm) and norm.running_mean is not None else None


def _write(module: Any, norm: _BatchNorm | None, weight: torch.Tensor, constant: torch.Tensor | None) -> None:
    """Put a new weight and a constant for the outputs into modules that are nobody else's."""
    old = module.weight
    found = laid_out_like(weight.flatten(0, 1).reshape(old.shape).to(old.dtype), old)
    if not bool(torch.isfinite(found).all()):
        return
    module._parameters["weight"] = nn.Parameter(found, old.requires_grad)
    if constant is None:
        return
    if module.bias is not None:
        bias = constant.to(module.bias.dtype)
        module._parameters["bias"] = nn.Parameter(bias, module.bias.requires_grad)
    elif norm is not None and norm.running_mean is not None:
        norm._buffers["running_mean"] = (norm.running_mean.double() - constant).to(norm.running_mean.dtype)


def _owner(node: fx.Node) -> str:
    target = str(node.target)
    return target if node.op == "call_module" else target.rpartition(".")[0]
