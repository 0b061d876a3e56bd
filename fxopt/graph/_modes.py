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
from fxopt.graph.edit import free_path

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
        numbers: (eval node, argument, number in eval mode, number in train mode).
        dropouts: Dropout calls that only train mode has, with the eval node before them.
        reads: (eval node, dropout that it reads in train mode).
    """

    twins: dict[fx.Node, fx.Node] = field(default_factory=dict)
    numbers: list[tuple[fx.Node, str, Scalar, Scalar]] = field(default_factory=list)
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
    numbers: list[tuple[fx.Node, str, Scalar, Scalar]] = []
    reads: list[tuple[fx.Node, fx.Node]] = []
    ours, theirs = _arguments(mine), _arguments(other)
    if ours.keys() != theirs.keys():
        return False
    for name, value in theirs.items():
        if isinstance(value, (bool, int, float)) and isinstance(ours[name], (bool, int, float)):
            if value != ours[name]:
                numbers.append((mine, name, ours[name], value))
        elif not _same(ours[name], value, plan, mine, reads):
            return False
    if numbers and not isinstance(mine.target, torch._ops.OpOverload):
        return False
    plan.numbers += numbers
    plan.reads += reads
    return True


def _arguments(node: fx.Node) -> dict[str, Any]:
    """Arguments by name, an ATen call's defaults filled in."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return {**{str(index): value for index, value in enumerate(node.args)}, **node.kwargs}
    found: dict[str, Any] = {}
    for index, argument in enumerate(node.target._schema.arguments):
        given = index < len(node.args)
        found[argument.name] = node.args[index] if given else node.kwargs.get(argument.name, argument.default_value)
    return found


def _same(ours: Any, theirs: Any, plan: _Plan, mine: fx.Node, reads: list[tuple[fx.Node, fx.Node]]) -> bool:
    if isinstance(theirs, fx.Node):
        if theirs in plan.dropouts:
            reads.append((mine, theirs))
            return plan.twins[theirs] is ours and list(mine.all_input_nodes).count(ours) == 1
        return plan.twins.get(theirs) is ours
    if isinstance(theirs, (tuple, list)):
        return (
            isinstance(ours, (tuple, list))
            and len(ours) == len(theirs)
            and all(_same(one, other, plan, mine, reads) for one, other in zip(ours, theirs, strict=True))
        )
    if isinstance(theirs, dict):
        return (
            isinstance(ours, dict)
            and ours.keys() == theirs.keys()
            and all(_same(ours[key], value, plan, mine, reads) for key, value in theirs.items())
        )
    return type(ours) is type(theirs) and bool(ours == theirs)


def _apply(gm: fx.GraphModule, model: nn.Module, plan: _Plan) -> None:
    made: dict[fx.Node, fx.Node] = {}
    for dropout, source in plan.dropouts.items():
        entry: Any = dropout.args[0]
        rate: Any = dropout.args[1]
        made[dropout] = _insert(gm, model, dropout, "functional_dropout", nn.Dropout(rate), made.get(entry, source))
    for reader, dropout in plan.reads:
        reader.replace_input_with(plan.twins[dropout], made[dropout])
    for node, name, in_eval, in_training in plan.numbers:
        if node.target is _aten.dropout.default and name == "train" and in_training:
            rate = node.args[1]
            raised = _insert(gm, model, node, "functional_dropout", nn.Dropout(rate), node.args[0])
            raised.meta = dict(node.meta)
            node.replace_all_uses_with(raised)
            gm.graph.erase_node(node)
            continue
        number = _insert(gm, model, node, name, ByMode(in_eval, in_training), None)
        _set_argument(node, name, number)


def _insert(
    gm: fx.GraphModule, model: nn.Module, origin: fx.Node, name: str, module: nn.Module, source: Any
) -> fx.Node:
    """Call ``module`` under the module whose code made ``origin``, in that module's mode."""
    stack = origin.meta.get("nn_module_stack")
    path = str(list(stack.values())[-1][0]).split("@")[0] if stack else ""
    try:
        owner = model.get_submodule(path)
    except AttributeError:
        path, owner = "", model
    target = free_path(gm, f"{path}.{name}" if path else name)
    gm.add_submodule(target, module.train(owner.training))
    if source is None:
        with gm.graph.inserting_before(origin):
            return gm.graph.call_module(target, ())
    with gm.graph.inserting_after(source):
        return gm.graph.call_module(target, (source,))


def _set_argument(node: fx.Node, name: str, value: fx.Node) -> None:
    arguments = _arguments(node)
    arguments[name] = value
    target: Any = node.target
    keywords = {argument.name for argument in target._schema.arguments if argument.kwarg_only}
    node.args = tuple(held for key, held in arguments.items() if key not in keywords)
    node.kwargs = {key: arguments[key] for key in keywords if key in node.kwargs or key == name}
