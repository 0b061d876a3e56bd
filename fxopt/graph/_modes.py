"""What a model does in train mode only: dropout inside attention, functional dropout, recurrent layers.

torch.export writes down one mode. The graph is that of eval mode; where the model's code looks at ``self.training``,
the program of train mode is laid beside it. If both are the same but for some numbers (a dropout rate, a flag), those
numbers become a :class:`ByMode`, and dropout that only train mode has becomes an ``nn.Dropout``.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from fxopt.graph import ops
from fxopt.graph.edit import free_path, insert_module

__all__ = ["ByMode", "depends_on_mode", "merge_modes"]

_aten = torch.ops.aten
_MODAL = frozenset(
    (
        _aten.scaled_dot_product_attention,
        _aten.dropout,
        _aten.feature_dropout,
        _aten.alpha_dropout,
        _aten.feature_alpha_dropout,
        _aten.lstm,
        _aten.gru,
        _aten.rnn_tanh,
        _aten.rnn_relu,
        _aten.rrelu,
    )
)
Scalar = bool | int | float


class ByMode(nn.Module):
    """A number that depends on the mode.

    Attributes:
        in_eval: The number in eval mode.
        in_training: The number in train mode.
    """

    def __init__(self, in_eval: Scalar, in_training: Scalar) -> None:
        super().__init__()
        self.in_eval = in_eval
        self.in_training = in_training

    def forward(self) -> Scalar:
        """The number of the present mode."""
        return self.in_training if self.training else self.in_eval

    def extra_repr(self) -> str:
        """The two numbers."""
        return f"in_eval={self.in_eval}, in_training={self.in_training}"


ops.register_module(ByMode, ops.OpSemantics("ByMode", "none", "scalar"))


def depends_on_mode(gm: fx.GraphModule, model: nn.Module) -> bool:
    """Whether train mode may do what the modules in the graph of eval mode do not do by themselves."""
    if any(getattr(node.target, "overloadpacket", None) in _MODAL for node in gm.graph.nodes):
        return True
    return any(isinstance(module, nn.MultiheadAttention) or _reads_training(type(module)) for module in model.modules())


def _reads_training(cls: type[nn.Module]) -> bool:
    for base in cls.__mro__:
        if base is object or base.__module__.startswith("torch.nn.modules"):
            continue
        if any("training" in code.co_names for member in vars(base).values() for code in _codes(member)):
            return True
    return False


def _codes(member: object) -> Iterator[types.CodeType]:
    while hasattr(member, "__wrapped__"):
        member = member.__wrapped__
    pending = [code for code in (getattr(member, "__code__", None),) if isinstance(code, types.CodeType)]
    while pending:
        code = pending.pop()
        yield code
        pending += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]


@dataclass
class _Plan:
    """What to change in the graph of eval mode.

    Attributes:
        twins: The eval node of every train node; of a dropout that only train mode has, that of its input.
        numbers: Eval node, train node, and the arguments in which they differ.
        dropouts: Dropout calls that only train mode has, with the eval node before them.
        reads: Eval nodes, with their train nodes, that read such a dropout.
    """

    twins: dict[fx.Node, fx.Node] = field(default_factory=dict)
    numbers: list[tuple[fx.Node, fx.Node, list[str]]] = field(default_factory=list)
    dropouts: dict[fx.Node, fx.Node] = field(default_factory=dict)
    reads: list[tuple[fx.Node, fx.Node]] = field(default_factory=list)


def merge_modes(gm: fx.GraphModule, trained: fx.GraphModule, model: nn.Module) -> fx.Node | None:
    """Let ``gm``, the graph of eval mode, do in train mode what ``trained`` does.

    Args:
        gm: Graph of eval mode, which is edited.
        trained: Graph of train mode, raised in the same way.
        model: The model, which says the mode of every submodule.

    Returns:
        None if the graphs correspond; otherwise the first node of ``trained`` that has no twin, and nothing is edited.
    """
    plan = _Plan()
    mine: list[fx.Node] = list(gm.graph.nodes)
    others: list[fx.Node] = list(trained.graph.nodes)
    position = 0
    for node in others:
        if position < len(mine) and _pair(mine[position], node, plan):
            plan.twins[node] = mine[position]
            position += 1
        elif (source := _dropped(node)) in plan.twins:
            plan.dropouts[node] = plan.twins[node] = plan.twins[source]
        else:
            return node
    _apply(gm, model, plan)
    return None


def _dropped(node: fx.Node) -> Any:
    """What an active dropout drops from; None if the node is something else."""
    return node.args[0] if node.target is _aten.dropout.default and node.args[2] else None


def _pair(mine: fx.Node, other: fx.Node, plan: _Plan) -> bool:
    """Whether two nodes make the same call; what differs in it is added to the plan."""
    if mine.op != other.op or mine.target != other.target:
        return False
    ours, theirs = ops.arguments(mine), ops.arguments(other)
    if ours.keys() != theirs.keys():
        return False
    numbers = [name for name, value in theirs.items() if _is_number(value) and _is_number(ours[name])]
    if not all(_same(ours[name], value, plan) for name, value in theirs.items() if name not in numbers):
        return False
    different = [name for name in numbers if ours[name] != theirs[name]]
    if different and not isinstance(mine.target, torch._ops.OpOverload):
        return False
    if different:
        plan.numbers.append((mine, other, different))
    if any(source in plan.dropouts for source in other.all_input_nodes):
        plan.reads.append((mine, other))
    return True


def _is_number(value: object) -> bool:
    return isinstance(value, (bool, int, float))


def _same(ours: Any, theirs: Any, plan: _Plan) -> bool:
    if isinstance(theirs, fx.Node):
        return plan.twins.get(theirs) is ours
    if isinstance(theirs, (tuple, list)):
        return (
            isinstance(ours, (tuple, list))
            and len(ours) == len(theirs)
            and all(_same(one, other, plan) for one, other in zip(ours, theirs, strict=True))
        )
    if isinstance(theirs, dict):
        return (
            isinstance(ours, dict)
            and ours.keys() == theirs.keys()
            and all(_same(ours[key], value, plan) for key, value in theirs.items())
        )
    return type(ours) is type(theirs) and bool(ours == theirs)


def _apply(gm: fx.GraphModule, model: nn.Module, plan: _Plan) -> None:
    final = dict(plan.twins)
    for dropout, source in plan.dropouts.items():
        entry = final[dropout.args[0]]  # type: ignore[index]
        path = _free_path(gm, model, dropout, "functional_dropout")
        final[dropout] = insert_module(gm, path, _dropout(model, path, dropout), entry, (entry,))
        final[dropout].meta = dict(dropout.meta) | {"val": source.meta.get("val")}
    for reader, other in plan.reads:
        reader.args = fx.map_arg(other.args, final.__getitem__)
        reader.kwargs = fx.map_arg(other.kwargs, final.__getitem__)
    for node, other, different in plan.numbers:
        if node.target is _aten.dropout.default and other.args[2]:
            _raise_dropout(gm, model, node, other)
            continue
        for name in different:
            _tell_by_mode(gm, model, node, other, name)


def _raise_dropout(gm: fx.GraphModule, model: nn.Module, node: fx.Node, other: fx.Node) -> None:
    """Put a module in the place of a functional dropout that is active in train mode alone."""
    path = _free_path(gm, model, node, "functional_dropout")
    source: Any = node.args[0]
    gm.add_submodule(path, _dropout(model, path, other))
    with gm.graph.inserting_before(node):
        raised = gm.graph.call_module(path, (source,))
    raised.meta = dict(node.meta)
    node.replace_all_uses_with(raised)
    gm.graph.erase_node(node)


def _tell_by_mode(gm: fx.GraphModule, model: nn.Module, node: fx.Node, other: fx.Node, name: str) -> None:
    """Let an argument of a call be one number in eval mode and another in train mode."""
    told = ops.arguments(node)
    path = _free_path(gm, model, node, f"{name}_by_mode")
    gm.add_submodule(path, _in_mode(model, path, ByMode(told[name], ops.arguments(other)[name])))
    with gm.graph.inserting_before(node):
        told[name] = gm.graph.call_module(path)
    target: Any = node.target
    keywords = {argument.name for argument in target._schema.arguments if argument.kwarg_only}
    node.args = tuple(value for key, value in told.items() if key not in keywords)
    node.kwargs = {key: told[key] for key in keywords if key in node.kwargs or key == name}


def _free_path(gm: fx.GraphModule, model: nn.Module, origin: fx.Node, name: str) -> str:
    """A free path under the module of ``model`` whose code made ``origin``."""
    stack = origin.meta.get("nn_module_stack")
    path = str(list(stack.values())[-1][0]).split("@")[0] if stack else ""
    try:
        model.get_submodule(path)
    except AttributeError:
        path = ""
    return free_path(gm, f"{path}.{name}" if path else name)


def _dropout(model: nn.Module, path: str, call: fx.Node) -> nn.Module:
    rate: Any = call.args[1]
    return _in_mode(model, path, nn.Dropout(rate))


def _in_mode(model: nn.Module, path: str, module: nn.Module) -> nn.Module:
    """The module in the mode of the one of ``model`` under which it is to stand."""
    return module.train(model.get_submodule(path.rpartition(".")[0]).training)
