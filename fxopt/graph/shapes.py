"""Shapes of the canonical graph: fake tensors on every node, recomputed after every edit."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from fxopt.errors import VerifyError

__all__ = ["TRACE_META", "eval_mode", "propagate", "shape", "values_at_batch"]

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
    """Recompute ``node.meta["val"]`` of every node from the placeholders' values; no arithmetic is done.

    Raises:
        VerifyError: If a placeholder has no value or a node does not fit its inputs; the message names the node.
    """
    for node, value in _run(gm, _placeholder_values(gm)).items():
        node.meta["val"] = value


def values_at_batch(gm: fx.GraphModule, batch: int) -> dict[fx.Node, Any]:
    """Fake values of every node if the example batch were ``batch``; the graph itself is left alone."""
    example = gm.meta.get(TRACE_META, {}).get("batch", 0)
    values = _placeholder_values(gm)
    if batch == example and all("val" in node.meta for node in gm.graph.nodes):
        return {node: node.meta["val"] for node in gm.graph.nodes}
    if batch != example and example:
        mode = FakeTensorMode()
        values = {node: _rebatch(value, example, batch, mode) for node, value in values.items()}
    return _run(gm, values)


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


def _placeholder_values(gm: fx.GraphModule) -> dict[fx.Node, Any]:
    values = {}
    for node in gm.graph.find_nodes(op="placeholder"):
        if "val" not in node.meta:
            raise VerifyError(f"Input {node.name!r} has no fake value; make the graph with fxopt.trace.")
        values[node] = node.meta["val"]
    return values


def _rebatch(value: Any, example: int, batch: int, mode: FakeTensorMode) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    size = tuple(value.shape)
    if size and size[0] == example:
        size = (batch, *size[1:])
    with mode:
        return torch.empty(size, dtype=value.dtype, device=value.device)


class _ShapeInterpreter(fx.Interpreter):
    """Runs the graph on fake tensors and remembers each node's value."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.extra_traceback = False
        self.found: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        try:
            value = super().run_node(n)
        except Exception as failure:
            reason = str(failure).splitlines()[0] if str(failure) else type(failure).__name__
            raise VerifyError(f"Node {n.name!r} ({n.op} {n.target}) does not fit its inputs: {reason}") from failure
        self.found[n] = value
        return value


def _run(gm: fx.GraphModule, values: dict[fx.Node, Any]) -> dict[fx.Node, Any]:
    fakes = [value for value in values.values() if isinstance(value, FakeTensor)]
    mode = fakes[0].fake_mode if fakes else FakeTensorMode()
    interpreter = _ShapeInterpreter(gm)
    previous, mode.allow_non_fake_inputs = mode.allow_non_fake_inputs, True
    try:
        with eval_mode(gm), mode, torch.no_grad():
            interpreter.run(*values.values(), enable_io_processing=False)
    finally:
        mode.allow_non_fake_inputs = previous
    return interpreter.found
