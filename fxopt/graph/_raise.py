"""Raise ATen calls to modules: what came from a parametric or stateful module becomes ``call_module`` on it.

Two ways lead to a module. The call's innermost module on torch.export's module stack is taken as it is when its
``forward`` is torch's own. Otherwise, when the call's parameters all sit at one path, a plain torch module that holds
these very parameters takes their place at that path (a functional convolution, a subclass with a ``forward`` of its
own), so that state_dict keys stay the user's. A call that fits neither stays a functional ATen call.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from fxopt.graph import ops
from fxopt.graph._functionalize import functional_form
from fxopt.graph._plain_modules import PARAMETRIC, STATELESS, plain_module

__all__ = ["raise_modules"]


@dataclass(frozen=True)
class _Call:
    """A call to raise: the module that takes it over, its path, and the inputs that it keeps."""

    node: fx.Node
    path: str
    module: nn.Module
    inputs: tuple[fx.Node, ...]


def raise_modules(gm: fx.GraphModule, model: nn.Module) -> None:
    """Replace ATen calls of ``gm`` by ``call_module`` nodes on modules at the user's own paths, in place.

    Args:
        gm: The unlifted program of ``model``.
        model: The module that was exported (for an ExportedProgram, the unlifted program itself).
    """
    tensors = {id(tensor): name for name, tensor in _named_tensors(model)}
    calls: dict[str, list[_Call]] = {}
    for node in [node for node in gm.graph.nodes if node.op == "call_function"]:
        call = _match_call(node, gm, model, tensors)
        if call is not None:
            calls.setdefault(call.path, []).append(call)
    replaced: dict[fx.Node, fx.Node] = {}
    for path, group in calls.items():
        if any(call.module is not group[0].module for call in group):
            continue
        _install(gm, path, group[0].module)
        for call in group:
            _replace(gm, call, replaced)


def _named_tensors(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    named: list[tuple[str, torch.Tensor]] = list(model.named_parameters(remove_duplicate=False))
    named += list(model.named_buffers(remove_duplicate=False))
    return named


def _match_call(node: fx.Node, gm: fx.GraphModule, model: nn.Module, tensors: Mapping[int, str]) -> _Call | None:
    target = functional_form(node.target) or node.target
    if target in STATELESS:
        return _match_stateless(node, model, STATELESS[target])
    spec = PARAMETRIC.get(node.target)
    if spec is None:
        return None
    arguments = ops.arguments(node)
    state = {name: arguments.get(name) for name in spec.state}
    if any(isinstance(value, fx.Node) and value.op != "get_attr" for value in state.values()):
        return None
    held = {name: _attribute(gm, value) for name, value in state.items()}
    inputs = tuple(arguments[name] for name in spec.inputs)
    if not all(isinstance(value, fx.Node) for value in inputs):
        return None
    owner = _owner_on_stack(node, model)
    if owner is not None and spec.fits(owner[1], arguments, held):
        return _Call(node, owner[0], owner[1], inputs)
    path = _common_path(held, tensors)
    if path is None:
        return None
    existing = _get_submodule(model, path)
    if existing is not None and _own_forward(existing) and spec.fits(existing, arguments, held):
        return _Call(node, path, existing, inputs)
    module = plain_module(spec, arguments, held, existing)
    return None if module is None else _Call(node, path, module, inputs)


def _match_stateless(node: fx.Node, model: nn.Module, classes: tuple[type[nn.Module], ...]) -> _Call | None:
    owner = _owner_on_stack(node, model)
    first = node.args[0] if node.args else None
    if owner is None or type(owner[1]) not in classes or not isinstance(first, fx.Node):
        return None
    return _Call(node, owner[0], owner[1], (first,))


def _attribute(gm: fx.GraphModule, value: object) -> torch.Tensor | None:
    if not isinstance(value, fx.Node):
        return None
    found: Any = operator.attrgetter(str(value.target))(gm)
    return found if isinstance(found, torch.Tensor) else None


def _owner_on_stack(node: fx.Node, model: nn.Module) -> tuple[str, nn.Module] | None:
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return None
    path = str(list(stack.values())[-1][0]).split("@")[0]
    module = _get_submodule(model, path)
    return None if not path or module is None or not _own_forward(module) else (path, module)


def _own_forward(module: nn.Module) -> bool:
    """Whether the module computes just what torch's class of that kind does."""
    forward: Callable[..., Any] = type(module).forward
    plain = forward.__module__.startswith("torch.nn.modules")
    hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__
    return plain and not hooked and not hasattr(module, "parametrizations")


def _get_submodule(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _common_path(held: Mapping[str, torch.Tensor | None], tensors: Mapping[int, str]) -> str | None:
    """The path at which all parameters of a call sit under their usual names, if there is one."""
    paths = set()
    for name, tensor in held.items():
        if tensor is None:
            continue
        full = tensors.get(id(tensor))
        if full is None or full.rpartition(".")[2] != name:
            return None
        paths.add(full.rpartition(".")[0])
    return paths.pop() if len(paths) == 1 and "" not in paths else None


def _install(gm: fx.GraphModule, path: str, module: nn.Module) -> None:
    """Put ``module`` at ``path``, keeping what else stands there (submodules, further parameters)."""
    present = _get_submodule(gm, path)
    if present is not None and present is not module:
        for name, child in present.named_children():
            if name not in module._modules:
                module.add_module(name, child)
    gm.add_submodule(path, module)


def _replace(gm: fx.GraphModule, call: _Call, replaced: dict[fx.Node, fx.Node]) -> None:
    node = call.node
    inputs = tuple(replaced.get(value, value) for value in call.inputs)
    with gm.graph.inserting_before(node):
        raised = gm.graph.call_module(call.path, inputs)
    raised.meta = dict(node.meta)
    node.replace_all_uses_with(raised)
    gm.graph.erase_node(node)
    replaced[node] = raised
