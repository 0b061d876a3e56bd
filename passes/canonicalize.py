"""Remove what computes nothing: dead code, identities, computations on constants alone; join what is spelled out."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeAlias

import torch
from torch import fx, nn
from torch.nn.modules.dropout import _DropoutNd

from fxopt.errors import PassError, VerifyError
from fxopt.graph import edit, values_at_batch
from fxopt.graph.shapes import TRACE_META
from fxopt.passes._activations import join_activations
from fxopt.passes._constants import fold_constants, merge_constants
from fxopt.passes.base import Pass, PassResult

__all__ = ["Canonicalize"]

_aten = torch.ops.aten


@dataclass(frozen=True)
class Canonicalize(Pass):
    """Remove operations that compute nothing, and compute now what depends on constants alone.

    What the graph computes stays equal in every element (only ``x + 0`` going may turn a ``0.0`` into ``-0.0``), and
    so do its gradients; where rule 8 applies, up to rounding. Applying the pass again changes nothing.

    The rules, in this order, until none applies:

    1. Identity modules and dropout at rate 0; with ``for_inference`` any dropout.
    2. Functional dropout that is switched off.
    3. ``alias``, ``clone``, ``contiguous`` and casts that change neither type, device nor layout; with
       ``for_inference`` also ``detach``.
    4. Slices of everything, views and expansions to the shape there is already, permutations that leave the order,
       padding by nothing, concatenation of one tensor; expansions for sums, differences, products and quotients with
       something of that shape, which expand by themselves.
    5. ``x + 0``, ``x - 0``, ``x * 1``, ``x / 1``, ``x ** 1`` with a number.
    6. What depends on buffers and constants alone becomes a buffer that is not part of the state dict; with
       ``for_inference`` parameters count as constants. Random operators and what writes in place are never folded.
    7. Constants that are read twice, or folded to equal values, become one.
    8. With ``join``, activation functions that are spelled out become one operator: ReLU, ReLU6, SiLU, hard-swish,
       hard-sigmoid, sigmoid, GELU (of erf) and Mish, however they are written (``x * relu6(x + 3) / 6``). They are
       told by what they compute of numbers from 1e-7 to 3e38 of both signs, and of NaN.
    9. Dead code.

    What makes a copy of its input is kept where the graph writes in place, and where the copy is what the graph gives
    back, so that a caller who writes into an output still does not write into an input.

    Attributes:
        for_inference: Whether the graph is not going to be trained any more.
        max_constant_elements: A constant larger than this is left to be computed at run time.
        join: Whether activation functions that are spelled out become one operator.
    """

    name: ClassVar[str] = "canonicalize"
    for_inference: bool = False
    max_constant_elements: int = 1 << 20
    join: bool = True

    def __post_init__(self) -> None:
        """Refuse options out of range.

        Raises:
            PassError: If ``max_constant_elements`` is negative.
        """
        if self.max_constant_elements < 0:
            raise PassError(f"max_constant_elements has to be at least 0, got {self.max_constant_elements}.")

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Apply the rules until none applies."""
        modified = False
        while self._apply_once(graph_module):
            modified = True
        return PassResult(graph_module, modified)

    def _apply_once(self, gm: fx.GraphModule) -> bool:
        count = len(gm.graph.nodes)
        scene = _Scene(gm, self.for_inference)
        changed = _remove_identities(scene)
        if not scene.writes_in_place:
            changed |= fold_constants(gm, parameters=self.for_inference, max_elements=self.max_constant_elements)
            changed |= merge_constants(gm)
            changed |= self.join and join_activations(gm)
        if not changed and not _has_dead_code(gm):
            return False
        edit.finish(gm)
        return changed or len(gm.graph.nodes) != count


@dataclass
class _Scene:
    """A graph, and what the rules need to know of it as a whole."""

    gm: fx.GraphModule
    for_inference: bool
    writes_in_place: bool = field(init=False)
    _other_batch: dict[fx.Node, Any] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.writes_in_place = any(_writes(node) for node in self.gm.graph.nodes)

    def same_size(self, one: fx.Node, other: fx.Node) -> bool:
        """Whether two tensors have the same shape at every batch size: seen at the example's and at one more."""
        if not _same_shape(_value(one), _value(other)):
            return False
        meta = self.gm.meta.get(TRACE_META, {})
        if not meta.get("dynamic_batch", False):
            return True
        if self._other_batch is None:
            self._other_batch = _values_at_another_batch(self.gm, int(meta["batch"]))
        return _same_shape(self._other_batch.get(one), self._other_batch.get(other))


def _values_at_another_batch(gm: fx.GraphModule, batch: int) -> dict[fx.Node, Any]:
    """Values at one sample more or, for a model that takes only some sizes, twice the samples; else none."""
    for other in (batch + 1, 2 * batch):
        with contextlib.suppress(VerifyError):
            return values_at_batch(gm, other)
    return {}


def _remove_identities(scene: _Scene) -> bool:
    changed = False
    for node in list(scene.gm.graph.nodes):
        if not node.users:
            continue
        source = next((found for rule in _RULES if (found := rule(scene, node)) is not None), None)
        if source is None:
            continue
        edit.replace_uses(node, source)
        _drop(scene.gm, node)
        changed = True
    return changed


def _drop(gm: fx.GraphModule, node: fx.Node) -> None:
    """Erase a node, and its module unless that holds something."""
    holds = node.op == "call_module" and _holds_something(gm.get_submodule(str(node.target)))
    if not holds:
        edit.erase(gm, node)
    # A module with state or children stays in the state dict; its call is dead code from here on.


def _holds_something(module: nn.Module) -> bool:
    return any(True for _ in module.children()) or bool(module._parameters) or bool(module._buffers)


def _has_dead_code(gm: fx.GraphModule) -> bool:
    ends = ("placeholder", "output")
    return any(not node.users and node.op not in ends and not node.is_impure() for node in gm.graph.nodes)


def _writes(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _value(node: fx.Node) -> Any:
    return node.meta.get("val")


def _same_shape(one: Any, other: Any) -> bool:
    tensors = isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor)
    return tensors and tuple(one.shape) == tuple(other.shape)


def _same_type(one: fx.Node, other: fx.Node) -> bool:
    mine, yours = _value(one), _value(other)
    tensors = isinstance(mine, torch.Tensor) and isinstance(yours, torch.Tensor)
    return tensors and mine.dtype == yours.dtype and mine.device == yours.device


def _source(node: fx.Node) -> fx.Node | None:
    source = node.args[0] if node.args else None
    return source if isinstance(source, fx.Node) else None


def _argument(node: fx.Node, index: int, name: str, default: Any = None) -> Any:
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def _is_packet(node: fx.Node, *packets: Any) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target.overloadpacket in packets


def _may_share(scene: _Scene, node: fx.Node, source: fx.Node) -> bool:
    """Whether readers of a copy may as well read what was copied."""
    if scene.writes_in_place:
        return False
    if all(user.op != "output" for user in node.users):
        return True
    return len(source.users) == 1 and _makes_memory(scene.gm, source)


def _makes_memory(gm: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        return not isinstance(module, (nn.Identity, nn.Flatten, _DropoutNd))
    if not isinstance(node.target, torch._ops.OpOverload) or _is_packet(node, *_SOMETIMES_VIEWS):
        return False
    return all(argument.alias_info is None for argument in node.target._schema.arguments)


def _identity_module(scene: _Scene, node: fx.Node) -> fx.Node | None:
    if node.op != "call_module":
        return None
    module = scene.gm.get_submodule(str(node.target))
    if module._forward_hooks or module._forward_pre_hooks:
        return None
    if type(module) is nn.Identity:
        return _source(node)
    if isinstance(module, _DropoutNd) and (module.p == 0 or scene.for_inference):
        return _source(node)
    source = _source(node)
    flat = type(module) is nn.Flatten and source is not None and scene.same_size(node, source)
    return source if flat else None


def _switched_off_dropout(scene: _Scene, node: fx.Node) -> fx.Node | None:
    if not _is_packet(node, _aten.dropout, _aten.feature_dropout, _aten.alpha_dropout, _aten.feature_alpha_dropout):
        return None
    rate, active = _argument(node, 1, "p"), _argument(node, 2, "train")
    off = active is False or rate == 0 or scene.for_inference
    return _source(node) if off else None


def _same_memory(scene: _Scene, node: fx.Node) -> fx.Node | None:
    """Aliases and copies that leave type, device and layout."""
    source = _source(node)
    if source is None or not _is_packet(node, *_COPIES):
        return None
    if not _same_type(node, source) or not scene.same_size(node, source):
        return None
    if _value(node).stride() != _value(source).stride() or _value(node).layout != _value(source).layout:
        return None
    if _is_packet(node, _aten.detach):
        return source if scene.for_inference else None
    if _is_packet(node, _aten.alias):
        return source
    # The example is contiguous; an input of another memory format is not, and a view would refuse it.
    if _is_packet(node, _aten.contiguous) and any(_is_packet(user, *_STRICT_VIEWS) for user in node.users):
        return None
    makes_copy = _is_packet(node, _aten.clone, _aten._to_copy) or _argument_named(node, "copy") is True
    return source if not makes_copy or _may_share(scene, node, source) else None


def _argument_named(node: fx.Node, name: str) -> Any:
    """An argument of an ATen call by its name."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return None
    names = [argument.name for argument in target._schema.arguments]
    return _argument(node, names.index(name), name) if name in names else None


def _same_view(scene: _Scene, node: fx.Node) -> fx.Node | None:
    """Slices, views, permutations and paddings that leave everything in its place."""
    source = _source(node)
    if node.target is _aten.cat.default:
        only = node.args[0]
        source = only[0] if isinstance(only, (list, tuple)) and len(only) == 1 else None  # type: ignore[assignment]
    if not isinstance(source, fx.Node) or not scene.same_size(node, source) or not _same_type(node, source):
        return None
    if _is_packet(node, *_SHAPE_VIEWS) or (node.target is _aten.slice.Tensor and _argument(node, 4, "step", 1) == 1):
        return source
    if _is_packet(node, _aten.permute):
        order = [int(dim) % _value(node).dim() for dim in _argument(node, 1, "dims")]
        return source if order == sorted(order) else None
    if node.target is _aten.transpose.int:
        one, other = (int(_argument(node, index, name)) for index, name in ((1, "dim0"), (2, "dim1")))
        return source if (one - other) % _value(node).dim() == 0 else None
    if node.target is _aten.cat.default or _is_packet(node, _aten.constant_pad_nd, _aten.pad):
        padding = [] if node.target is _aten.cat.default else _argument(node, 1, "pad")
        nothing = all(isinstance(width, int) and width == 0 for width in padding)
        return source if nothing and _may_share(scene, node, source) else None
    return None


def _expanded_by_readers(scene: _Scene, node: fx.Node) -> fx.Node | None:
    """Expansions that everything that reads them would do as well."""
    source = _source(node)
    if source is None or not _is_packet(node, _aten.expand, _aten.expand_as):
        return None
    return source if all(_expands(scene, user, node) for user in node.users) else None


def _expands(scene: _Scene, reader: fx.Node, value: fx.Node) -> bool:
    """Whether a reader computes with something of a value's shape, and does so element by element."""
    if reader.target not in _BY_ELEMENT:
        return False
    others = [operand for operand in reader.args if isinstance(operand, fx.Node) and operand is not value]
    return len(others) == 1 and scene.same_size(others[0], value)


def _neutral_number(scene: _Scene, node: fx.Node) -> fx.Node | None:
    source, other = _source(node), _argument(node, 1, "other")
    if node.target in _POWERS:
        other = _argument(node, 1, "exponent")
    neutral = _NEUTRAL.get(node.target)
    if source is None or neutral is None or isinstance(other, bool) or not isinstance(other, (int, float)):
        return None
    if other != neutral or not _same_type(node, source):
        return None
    return source if _may_share(scene, node, source) else None


_Rule: TypeAlias = Callable[[_Scene, fx.Node], "fx.Node | None"]
_RULES: tuple[_Rule, ...] = (
    _identity_module,
    _switched_off_dropout,
    _same_memory,
    _same_view,
    _expanded_by_readers,
    _neutral_number,
)

_COPIES = (_aten.alias, _aten.detach, _aten.clone, _aten.contiguous, _aten.to, _aten._to_copy, _aten.type_as)
_SOMETIMES_VIEWS = (_aten.reshape, _aten.contiguous, _aten.to, _aten.flatten, _aten.type_as, _aten.dropout)
_STRICT_VIEWS = (_aten.view, _aten._unsafe_view, _aten.as_strided, _aten.view_as)
_SHAPE_VIEWS = (
    _aten.view,
    _aten.reshape,
    _aten.flatten,
    _aten.unflatten,
    _aten.squeeze,
    _aten.expand,
    _aten.expand_as,
    _aten.view_as,
    _aten.narrow,
    _aten._unsafe_view,
)
_BY_ELEMENT = (_aten.add.Tensor, _aten.sub.Tensor, _aten.mul.Tensor, _aten.div.Tensor)
_POWERS = (_aten.pow.Tensor_Scalar,)
_NEUTRAL: dict[object, int] = {
    _aten.add.Tensor: 0,
    _aten.add.Scalar: 0,
    _aten.sub.Tensor: 0,
    _aten.sub.Scalar: 0,
    _aten.mul.Tensor: 1,
    _aten.mul.Scalar: 1,
    _aten.div.Tensor: 1,
    _aten.div.Scalar: 1,
    _aten.pow.Tensor_Scalar: 1,
}
