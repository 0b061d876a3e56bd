"""Shapes of the canonical graph: fake tensors on every node, recomputed after every edit."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from fxopt.errors import VerifyError
from fxopt.graph import ops
from fxopt.graph._copies import clone_tree
from fxopt.graph._quiet import quiet_loggers

__all__ = [
    "TRACE_META",
    "ShapeInterpreter",
    "eval_mode",
    "placeholder_values",
    "propagate",
    "shape",
    "values_at_batch",
]

TRACE_META = "fxopt"
"""Key of ``gm.meta`` under which a traced graph keeps its example batch."""


def shape(node: fx.Node) -> tuple[int, ...]:
    """Shape of a node's value at the example batch.

    Raises:
        VerifyError: If the node's value is not a tensor.
    """
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        raise VerifyError(f"Node {node.name!r} has no tensor value; run fxopt.graph.propagate(gm) after an edit.")
    return tuple(int(size) for size in value.shape)


def propagate(gm: fx.GraphModule) -> None:
    """Recompute ``node.meta["val"]`` of every node from the placeholders' values.

    No arithmetic is done and no tensor of the model is written to.

    Raises:
        VerifyError: If a placeholder has no value or a node does not fit its inputs; the message names the node.
    """
    for node, value in ShapeInterpreter(gm).values(placeholder_values(gm)).items():
        node.meta["val"] = value


def values_at_batch(gm: fx.GraphModule, batch: int) -> dict[fx.Node, Any]:
    """Fake values of every node if the example batch were ``batch``; the graph itself is left alone.

    Raises:
        VerifyError: If the model is written for another batch, so that there is nothing to compute at this one.
    """
    example = gm.meta.get(TRACE_META, {}).get("batch", 0)
    values = placeholder_values(gm)
    if batch == example and all("val" in node.meta for node in gm.graph.nodes):
        return {node: node.meta["val"] for node in gm.graph.nodes}
    if batch == example or not example:
        return ShapeInterpreter(gm).values(values)
    try:
        return _BatchInterpreter(gm, batch).values(values)
    except VerifyError as failure:
        raise VerifyError(
            f"The model computes at a batch of {example} only, and costs are asked for at {batch} (node "
            f"{failure.node!r}). Give example inputs of batch {batch}, or a target that runs at batch {example}.",
            node=failure.node,
        ) from failure


@contextlib.contextmanager
def eval_mode(module: torch.nn.Module) -> Iterator[None]:
    """Put every submodule in eval mode and give each its own mode back at the end."""
    modes = [(submodule, submodule.training) for submodule in module.modules()]
    try:
        for submodule, _ in modes:
            submodule.training = False
        yield
    finally:
        for submodule, training in modes:
            submodule.training = training


def placeholder_values(gm: fx.GraphModule) -> dict[fx.Node, Any]:
    """Fake values of the inputs.

    Raises:
        VerifyError: If one has none.
    """
    values = {}
    for node in gm.graph.find_nodes(op="placeholder"):
        if "val" not in node.meta:
            raise VerifyError(f"Input {node.name!r} has no fake value; make the graph with fxopt.trace.")
        values[node] = node.meta["val"]
    return values


class ShapeInterpreter(fx.Interpreter):
    """Runs the graph on fake tensors and remembers each node's value.

    Parameters and buffers are replaced by fakes made for this run: the model's own may be written to (a counter in a
    buffer), and other threads may be computing with its modules.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.extra_traceback = False
        self.found: dict[fx.Node, Any] = {}
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._modules: dict[int, torch.nn.Module] = {}
        devices = {parameter.device for parameter in gm.parameters()}
        self._device = devices.pop() if len(devices) == 1 else None

    def values(self, inputs: Mapping[fx.Node, Any]) -> dict[fx.Node, Any]:
        """The value of every node, from those of the inputs."""
        with self.mode, torch.no_grad(), quiet_loggers():
            self.run(*[self.fresh(value) for value in inputs.values()], enable_io_processing=False)
        return self.found

    def run_node(self, n: fx.Node) -> Any:
        """Run one node.

        Raises:
            VerifyError: If it does not fit its inputs.
        """
        try:
            value = super().run_node(n)
        except Exception as failure:
            reason = str(failure).splitlines()[0] if str(failure) else type(failure).__name__
            message = f"Node {n.name!r} ({n.op} {n.target}) does not fit its inputs: {reason}"
            raise VerifyError(message, node=n.name) from failure
        self.found[n] = value
        return value

    def fresh(self, value: Any) -> Any:
        """A value of these sizes in the present fake mode, where the graph is: it may have been moved."""
        if not isinstance(value, torch.Tensor):
            return value
        device = self._device or value.device
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)

    def fetch_attr(self, target: str) -> Any:
        """The fake of a parameter or buffer, or a copy of a module that holds fakes."""
        held = super().fetch_attr(target)
        if not isinstance(held, torch.nn.Module):
            return self._faked(held)
        if id(held) not in self._modules:
            self._modules[id(held)] = self._faked_module(held)
        return self._modules[id(held)]

    def _faked(self, held: Any) -> Any:
        if type(held) in (torch.Tensor, torch.nn.Parameter) and held.layout is torch.strided:
            # A third of the time that a conversion takes, which looks at storages and views.
            return torch.empty_strided(held.shape, held.stride(), dtype=held.dtype, device=held.device)
        return self.mode.from_tensor(held) if isinstance(held, torch.Tensor) else held

    def _faked_module(self, module: torch.nn.Module) -> torch.nn.Module:
        """A copy of a module in eval mode that holds fakes."""
        copy = clone_tree(module)
        for part in copy.modules():
            part.training = False
            for held in (part._parameters, part._buffers):
                held.update({name: self._faked(tensor) for name, tensor in held.items()})
        return copy


_BY_SAMPLE = ("unary", "broadcast", "cat")
_TOLD_SIZES = ("reshape", "expand", "constant")


class _BatchInterpreter(ShapeInterpreter):
    """Runs a graph at another batch size.

    Operators that treat every sample alike need not be run: their values are as before but for the batch. In a graph of
    fixed batch, the batch that views and new tensors are told is replaced.
    """

    def __init__(self, gm: fx.GraphModule, batch: int) -> None:
        super().__init__(gm)
        self._graph_module = gm
        self._example: int = gm.meta[TRACE_META]["batch"]
        self._dynamic: bool = gm.meta[TRACE_META]["dynamic_batch"]
        self._batch = batch

    def run_node(self, n: fx.Node) -> Any:
        if not self._keeps_samples_apart(n):
            return super().run_node(n)
        self.found[n] = self.fresh(n.meta["val"])
        return self.found[n]

    def fresh(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or not value.dim() or value.shape[0] != self._example:
            return super().fresh(value)
        device = self._device or value.device
        return torch.empty((self._batch, *value.shape[1:]), dtype=value.dtype, device=device)

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> Any:
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        if not self._dynamic and ops.semantics(self._graph_module, n).flow in _TOLD_SIZES:
            args = tuple(self._resized(value) for value in args)
        return args, kwargs

    def _keeps_samples_apart(self, node: fx.Node) -> bool:
        """Whether the batch is all that changes in a node's value, because it is all that changed in its inputs."""
        value, sources = node.meta.get("val"), node.all_input_nodes
        if not isinstance(value, torch.Tensor) or not value.dim() or not sources:
            return False
        meaning = ops.semantics(self._graph_module, node)
        if meaning.kind == "unknown" or not (node.op == "call_module" or meaning.flow in _BY_SAMPLE):
            return False
        if meaning.flow == "cat" and (len(node.args) < 2 or node.args[1] in (0, -value.dim())):
            return False
        return self._changes(sources[0]) and all(
            self._changes(source) or self._is_broadcast(source, value.dim()) for source in sources[1:]
        )

    def _changes(self, source: fx.Node) -> bool:
        """Whether the batch is what changed in an input."""
        new, old = self.found[source], source.meta["val"]
        if not isinstance(new, torch.Tensor) or not new.dim():
            return False
        return new.shape[1:] == old.shape[1:] and (old.shape[0], new.shape[0]) == (self._example, self._batch)

    def _is_broadcast(self, source: fx.Node, rank: int) -> bool:
        """Whether an input is the same for all samples."""
        new, old = self.found[source], source.meta["val"]
        if not isinstance(new, torch.Tensor):
            return isinstance(new, (bool, int, float)) and new == old
        return new.shape == old.shape and (new.dim() < rank or new.shape[0] == 1)

    def _resized(self, value: Any) -> Any:
        told = isinstance(value, (list, tuple)) and len(value) > 0 and value[0] == self._example
        return [self._batch, *value[1:]] if told else value
