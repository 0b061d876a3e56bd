"""What canonical means, checked."""

from __future__ import annotations

import builtins
import math
import operator
import types
from typing import Any

import torch
from torch import fx

from fxopt.errors import VerifyError

__all__ = ["verify"]

_SCALAR_MODULES = (operator.__name__, "_operator", builtins.__name__, math.__name__, "torch")


def verify(gm: fx.GraphModule) -> None:
    """Check that a graph is canonical.

    Canonical means: the graph lints; every call is a module that exists, an ATen overload, or arithmetic on
    shapes; every parameter read exists; there is one output; and every other node carries the (fake) value
    that it has at the example batch.

    Raises:
        VerifyError: With the first node that breaks a rule, the rule, and what to do.
    """
    given: Any = gm
    if not isinstance(given, fx.GraphModule):
        raise VerifyError(
            f"A {type(given).__name__} is no graph; give what fxopt.trace(model, example_inputs) makes of it."
        )
    try:
        gm.graph.lint()
    except (RuntimeError, ValueError) as failure:
        raise VerifyError(f"The graph is malformed: {failure}") from failure
    outputs = gm.graph.find_nodes(op="output")
    if len(outputs) != 1:
        raise VerifyError(f"The graph has {len(outputs)} outputs; make it with fxopt.trace.")
    modules = dict(gm.named_modules(remove_duplicate=False))
    for node in gm.graph.nodes:
        problem = _problem(gm, node, modules)
        if problem:
            raise VerifyError(f"Node {node.name!r} is not canonical: {problem}", node=node.name)


def _problem(gm: fx.GraphModule, node: fx.Node, modules: dict[str, Any]) -> str | None:
    if node.op == "output":
        return None
    if node.op == "call_method":
        return f"it calls the tensor method {node.target!r}; trace the module with fxopt.trace."
    if node.op == "call_module" and str(node.target) not in modules:
        return f"there is no module {node.target!r}."
    if node.op == "call_function" and not _is_canonical_function(node.target):
        return f"it calls {node.target!r}, which is no ATen overload; trace the module with fxopt.trace."
    if node.op == "get_attr" and not _resolves(gm, str(node.target)):
        return f"there is no attribute {node.target!r}."
    if "val" not in node.meta:
        return "it carries no value; end edits with fxopt.graph.edit.finish(gm)."
    return None


def _is_canonical_function(target: object) -> bool:
    if isinstance(target, (torch._ops.OpOverload, torch._ops.HigherOrderOperator)):
        return True
    scalar = isinstance(target, (types.BuiltinFunctionType, types.FunctionType))
    return scalar and getattr(target, "__module__", None) in _SCALAR_MODULES


def _resolves(gm: fx.GraphModule, path: str) -> bool:
    try:
        operator.attrgetter(path)(gm)
    except AttributeError:
        return False
    return True
