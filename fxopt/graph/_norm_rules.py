"""How channels flow through norms: those that average over channels shrink with them."""

from __future__ import annotations

from typing import Any

from torch import fx

from fxopt.graph import ops
from fxopt.graph._flow import Atoms, Flow, ParameterUse, barrier, first, frozen_output, size_of, tie_rows

__all__ = ["functional_norm", "norm_across", "norm_groups"]


def norm_across(flow: Flow, gm: fx.GraphModule, node: fx.Node, reason: str) -> Any:
    """Layer and RMS norm: over the last dimension they shrink with it; over more, all are frozen."""
    source = first(node)
    if source is None:
        return barrier(flow, gm, node, reason)
    module: Any = gm.get_submodule(str(node.target)) if node.op == "call_module" else None
    shape = module.normalized_shape if module is not None else ops.arguments(node)["normalized_shape"]
    labels = list(flow.labels[source])
    over = len(shape)
    if module is None or over > 1 or size_of(source) != size_of(node):
        flow.freeze_all(labels[-over:], reason)
        return [*labels[:-over], *[None] * over]
    if labels[-1] is not None:
        flow.normalized.append((labels[-1], reason))
        _hold(flow, gm, str(node.target), labels[-1])
    return labels


def norm_groups(flow: Flow, gm: fx.GraphModule, node: fx.Node, reason: str) -> Any:
    """Group norm: the same channels of every group go, or whole groups where each is one channel."""
    source = first(node)
    if source is None or node.op != "call_module" or len(size_of(source)) < 2:
        return barrier(flow, gm, node, reason)
    module: Any = gm.get_submodule(str(node.target))
    labels = list(flow.labels[source])
    flow.freeze_all([labels[0], *labels[2:]], reason)
    atoms = labels[1]
    if atoms is not None:
        if 1 < module.num_groups < module.num_channels:
            tie_rows(flow, atoms.reshape(module.num_groups, -1), reason)
        _hold(flow, gm, str(node.target), atoms)
    return [None, atoms, *[None] * (len(labels) - 2)]


def functional_norm(flow: Flow, gm: fx.GraphModule, node: fx.Node, reason: str) -> Any:
    """Batch and instance norm as functions: their weights and statistics follow the channels."""
    source = first(node)
    if source is None or len(size_of(source)) < 2:
        return barrier(flow, gm, node, reason)
    labels = flow.labels[source]
    flow.freeze_all([labels[0], *labels[2:]], reason)
    for other in node.args[1:]:
        if isinstance(other, fx.Node) and flow.labels[other]:
            flow.link(labels[1], flow.labels[other][0], reason)
    result = frozen_output(node)
    result[1] = labels[1]
    return result


def _hold(flow: Flow, gm: fx.GraphModule, path: str, atoms: Atoms) -> None:
    module = gm.get_submodule(path)
    for name, tensor in module._parameters.items():
        if tensor is not None:
            flow.uses.append(ParameterUse(path, name, 0, "along", atoms))
