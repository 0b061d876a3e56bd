"""Blocks that other operators can stand in for, found in any canonical graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from fxopt.errors import PassError
from fxopt.graph import ops
from fxopt.passes._operator_style import NotHereError, style_of
from fxopt.passes._operators import ORIGINAL, Shape, Style
from fxopt.passes.base import Refusal

__all__ = ["PATTERNS", "Block", "Pattern", "Squeeze", "Unit", "find_blocks", "register_pattern"]

_POINTWISE, _DENSE, _DEPTHWISE, _SQUEEZE = "pointwise", "dense", "depthwise", "squeeze?"
_ROLES = (_POINTWISE, _DENSE, _DEPTHWISE, _SQUEEZE)


@dataclass(frozen=True)
class Pattern:
    """A block, as the layers that it is made of one after the other.

    Attributes:
        name: The pattern's name.
        roles: A word for each layer: ``pointwise`` (a dense 1 x 1 convolution), ``dense`` (a dense k x k one),
            ``depthwise``, each with batch norm and activation if they follow; ``squeeze?`` for a squeeze-and-excite
            gate that may be there.
        candidates: Names of the operators to offer; ``{k}`` and ``{e}`` stand for every kernel and expansion.
        shortcut: Whether the block needs to have something added to what it gives.
        linear: Whether the last layer must have no activation.
        operator: The name of what a block computes, from its kernel and expansion; None if it has no such name.
    """

    name: str
    roles: tuple[str, ...]
    candidates: tuple[str, ...]
    shortcut: bool = False
    linear: bool = False
    operator: Callable[[Block], str | None] = field(default=lambda block: None, compare=False)


@dataclass(frozen=True)
class Unit:
    """A convolution, and the norm and the activation that follow it alone."""

    conv: fx.Node
    module: nn.Conv2d
    norm: fx.Node | None
    activation: fx.Node | None

    @property
    def entry(self) -> fx.Node:
        """What it reads."""
        return self.conv.all_input_nodes[0]

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """Its nodes."""
        return tuple(node for node in (self.conv, self.norm, self.activation) if node is not None)

    @property
    def exit(self) -> fx.Node:
        """What it gives."""
        return self.nodes[-1]

    @property
    def kernel(self) -> int:
        """Its kernel."""
        return int(self.module.kernel_size[0])

    @property
    def role(self) -> str:
        """The word for it in patterns, or "" if there is none."""
        if self.module.groups == 1:
            return _POINTWISE if self.kernel == 1 and self.module.stride == (1, 1) else _DENSE
        depthwise = self.module.groups == self.module.in_channels == self.module.out_channels
        return _DEPTHWISE if depthwise else ""


@dataclass(frozen=True)
class Squeeze:
    """A gate: what it is made of, its two layers, and its product with what it weighs."""

    nodes: tuple[fx.Node, ...]
    reduce: Unit
    expand: Unit
    gate: fx.Node
    exit: fx.Node


@dataclass(frozen=True, eq=False)
class Block:
    """A place where other operators can stand.

    Attributes:
        site: Module path that names it in policies.
        pattern: The pattern it was found by.
        units: Its convolutions, in order.
        squeeze: Its gate, or None.
        body: The nodes that a candidate replaces.
        join: The addition of a shortcut to what the body gives, or None.
        tail: The activation behind the addition, or None.
        span: All nodes whose cost depends on the choice.
        shape: What candidates have to keep.
        style: How candidates are made.
    """

    site: str
    pattern: Pattern
    units: tuple[Unit, ...]
    squeeze: Squeeze | None
    body: tuple[fx.Node, ...]
    join: fx.Node | None
    tail: fx.Node | None
    span: tuple[fx.Node, ...]
    shape: Shape
    style: Style

    @property
    def entry(self) -> fx.Node:
        """What the block reads."""
        return self.units[0].entry

    @property
    def exit(self) -> fx.Node:
        """What the body gives."""
        return self.units[-1].exit

    @property
    def operator(self) -> str:
        """Name of what the block computes now."""
        return self.pattern.operator(self) or ORIGINAL

    @property
    def partner(self) -> fx.Node | None:
        """What is added to what the body gives."""
        if self.join is None:
            return None
        return next(source for source in self.join.all_input_nodes if source is not self.exit)


def _inverted_name(block: Block) -> str | None:
    wide, inputs = block.units[1].module.out_channels, block.shape.inputs
    return f"mb{wide // inputs}-k{block.units[1].kernel}" if wide % inputs == 0 else None


def _basic_name(block: Block) -> str | None:
    first, last = block.units
    same = first.kernel == last.kernel and first.module.out_channels == block.shape.outputs
    return f"basic-k{first.kernel}" if same and last.module.stride == (1, 1) else None


def _bottleneck_name(block: Block) -> str | None:
    narrow = block.units[1].module
    fits = narrow.in_channels == narrow.out_channels == block.shape.outputs // 4
    return f"bottleneck-k{block.units[1].kernel}" if fits else None


PATTERNS: dict[str, Pattern] = {
    pattern.name: pattern
    for pattern in (
        Pattern(
            "inverted-residual",
            (_POINTWISE, _DEPTHWISE, _SQUEEZE, _POINTWISE),
            ("mb{e}-k{k}", "zero"),
            linear=True,
            operator=_inverted_name,
        ),
        Pattern(
            "bottleneck",
            (_POINTWISE, _DENSE, _POINTWISE),
            ("bottleneck-k{k}", "mb{e}-k{k}", "zero"),
            shortcut=True,
            operator=_bottleneck_name,
        ),
        Pattern(
            "basic",
            (_DENSE, _DENSE),
            ("basic-k{k}", "bottleneck-k{k}", "mb{e}-k{k}", "zero"),
            shortcut=True,
            operator=_basic_name,
        ),
        Pattern(
            "depthwise-separable",
            (_DEPTHWISE, _SQUEEZE, _POINTWISE),
            ("separable-k{k}", "mb{e}-k{k}", "identity", "zero"),
            operator=lambda block: f"separable-k{block.units[0].kernel}",
        ),
        Pattern(
            "convolution",
            (_DENSE,),
            ("conv-k{k}", "separable-k{k}", "grouped4-k3", "avgpool-k3", "maxpool-k3", "identity", "zero"),
            operator=lambda block: f"conv-k{block.units[0].kernel}",
        ),
    )
}
"""The patterns by name, in the order in which they are tried: a node is part of one block only."""


def register_pattern(pattern: Pattern) -> None:
    """Add a pattern of your own; it is tried before all others.

    Raises:
        PassError: If there is one of that name, or a role that fxopt does not know.
    """
    if pattern.name in PATTERNS:
        raise PassError(f"There is a pattern {pattern.name!r} already; choose another name.")
    unknown = [role for role in pattern.roles if role not in _ROLES]
    if unknown or all(role == _SQUEEZE for role in pattern.roles):
        raise PassError(f"Pattern {pattern.name!r} has the roles {pattern.roles}; known are {', '.join(_ROLES)}.")
    others = dict(PATTERNS)
    PATTERNS.clear()
    PATTERNS.update({pattern.name: pattern, **others})


def find_blocks(gm: fx.GraphModule, patterns: Sequence[Pattern]) -> tuple[list[Block], list[Refusal]]:
    """The blocks of a graph in graph order, and the convolutions that are in none, with the reason."""
    scene = _Scene(gm)
    blocks: list[Block] = []
    for pattern in patterns:
        for start in scene.units.values():
            found = scene.match(pattern, start)
            if found is not None:
                blocks.append(found)
    blocks.sort(key=lambda block: scene.order[block.units[0].conv])
    return blocks, list(scene.refusals(patterns))


class _Scene:
    """A graph, its units, and what is taken."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        self.order = {node: index for index, node in enumerate(gm.graph.nodes)}
        self._nodes = list(gm.graph.nodes)
        self._refused: dict[fx.Node, str] = {}
        self._taken: set[fx.Node] = set()
        self._paths = {str(node.target) for node in gm.graph.find_nodes(op="call_module")}
        self._shared = _shared_parameters(gm)
        self.units = {one.conv: one for one in self._units()}

    def refusals(self, patterns: Sequence[Pattern]) -> Iterator[Refusal]:
        """The convolutions that are in no block."""
        names = ", ".join(pattern.name for pattern in patterns)
        for node in self._nodes:
            module = self._module(node)
            if isinstance(module, nn.modules.conv._ConvNd) and node not in self._taken:
                reason = self._refused.get(node, f"it is part of no known block ({names})")
                yield Refusal(node.name, str(node.target), reason)

    def match(self, pattern: Pattern, start: Unit) -> Block | None:
        """The block that begins with a unit, if there is one."""
        found = self._chain(pattern, start)
        if found is None:
            return None
        units, squeeze = found
        body = tuple(node for one in units for node in one.nodes) + (squeeze.nodes if squeeze else ())
        if not self._taken.isdisjoint(body):
            return None
        join, tail = self._join(units[-1].exit)
        if pattern.shortcut and join is None:
            return None
        end = tail or join or units[-1].exit
        span = self._span(units[0].entry, body, end)
        try:
            style = style_of(self.gm, units, squeeze)
            self._check(end, span)
        except NotHereError as reason:
            self._refused.setdefault(start.conv, f"{pattern.name}: {reason}")
            return None
        self._taken.update(span)
        shape = Shape(
            units[0].module.in_channels,
            units[-1].module.out_channels,
            _stride(units),
            join is not None,
        )
        return Block(self._site(body), pattern, units, squeeze, body, join, tail, span, shape, style)

    def _units(self) -> Iterator[Unit]:
        for node in self._nodes:
            module = self._module(node)
            if not isinstance(module, nn.modules.conv._ConvNd):
                continue
            reason = self._why_no_unit(node, module)
            if reason is not None:
                self._refused[node] = reason
                continue
            norm = _only_user(node)
            norm = norm if norm is not None and type(self._module(norm)) is nn.BatchNorm2d else None
            after = _only_user(norm or node)
            is_activation = after is not None and ops.is_activation(self.gm, after)
            yield Unit(node, module, norm, after if is_activation else None)  # type: ignore[arg-type]

    def _why_no_unit(self, node: fx.Node, module: Any) -> str | None:
        if type(module) is not nn.Conv2d:
            return f"it is a {type(module).__name__}"
        kernel, stride = module.kernel_size, module.stride
        if kernel[0] != kernel[1] or kernel[0] % 2 == 0 or stride[0] != stride[1]:
            return f"its kernel {kernel} and stride {stride} are not square and odd"
        if module.dilation != (1, 1) or module.padding_mode != "zeros":
            return "it is dilated or pads by something else than zeros"
        if module.padding not in ((kernel[0] // 2, kernel[0] // 2), "same"):
            return f"its padding {module.padding} does not keep the size of its input"
        if len(self.gm.graph.find_nodes(op="call_module", target=node.target)) > 1 or id(module.weight) in self._shared:
            return "its weights are used in several places"
        return None

    def _chain(self, pattern: Pattern, start: Unit) -> tuple[tuple[Unit, ...], Squeeze | None] | None:
        """The units and the gate that a pattern asks for, from ``start`` on."""
        units: list[Unit] = []
        squeeze: Squeeze | None = None
        value: fx.Node | None = None
        for role in pattern.roles:
            if role == _SQUEEZE:
                squeeze = self._squeeze(units[-1].exit) if units else None
                value = squeeze.exit if squeeze is not None else value
                continue
            following = self._unit_behind(value) if value is not None else start
            if following is None or following.role != role:
                return None
            units.append(following)
            value = following.exit
        if (pattern.linear and units[-1].activation is not None) or units[-1].exit is not value:
            return None
        return tuple(units), squeeze

    def _unit_behind(self, value: fx.Node) -> Unit | None:
        reader = _only_user(value)
        return self.units.get(reader) if reader is not None else None

    def _squeeze(self, value: fx.Node) -> Squeeze | None:
        """The gate that weighs a value which nothing else reads."""
        product = next((user for user in value.users if ops.semantics(self.gm, user).name == "mul"), None)
        if product is None or len(value.users) != 2:
            return None
        sources = [source for source in product.all_input_nodes if source is not value]
        if len(sources) != 1:
            return None
        gate, nodes, units = sources[0], [product], []
        node = gate
        while node is not value:
            if len(node.users) != 1 or len(node.all_input_nodes) != 1:
                return None
            nodes.append(node)
            if node in self.units:
                units.append(self.units[node])
            node = node.all_input_nodes[0]
        if len(units) != 2 or any(one.norm or one.kernel != 1 for one in units) or units[0].activation is not gate:
            return None
        return Squeeze(tuple(reversed(nodes)), units[1], units[0], gate, product)

    def _join(self, value: fx.Node) -> tuple[fx.Node | None, fx.Node | None]:
        """The addition that alone reads a value, and the activation that alone reads the addition."""
        join = _only_user(value)
        if join is None or ops.semantics(self.gm, join).name != "add" or len(join.all_input_nodes) != 2 or join.kwargs:
            return None, None
        if any(_shape_of(source) != _shape_of(join) for source in join.all_input_nodes):
            return None, None
        tail = _only_user(join)
        return join, tail if tail is not None and ops.is_activation(self.gm, tail) else None

    def _span(self, entry: fx.Node, body: Sequence[fx.Node], end: fx.Node) -> tuple[fx.Node, ...]:
        """All nodes from the first that depends on the entry and leads to the end, in graph order."""
        leading, pending = {end}, [end]
        while pending:
            for source in pending.pop().all_input_nodes:
                if source not in leading and self.order[source] > self.order[entry]:
                    leading.add(source)
                    pending.append(source)
        depending = {entry}
        for node in self._nodes[self.order[entry] + 1 : self.order[end] + 1]:
            if not depending.isdisjoint(node.all_input_nodes):
                depending.add(node)
        inner = (leading & depending) | set(body)
        first = min(self.order[node] for node in inner)
        return tuple(self._nodes[first : self.order[end] + 1])

    def _check(self, end: fx.Node, span: Sequence[fx.Node]) -> None:
        if not self._taken.isdisjoint(span):
            raise NotHereError("another block is computed in between")
        readers = [user for user in end.users if user.op != "output"]
        if any(ops.semantics(self.gm, user).fuses for user in readers):
            raise NotHereError("what follows is computed together with it by fusing runtimes")

    def _module(self, node: fx.Node) -> nn.Module | None:
        return self.gm.get_submodule(str(node.target)) if node.op == "call_module" else None

    def _site(self, body: Sequence[fx.Node]) -> str:
        """The innermost module that holds the block's layers and no others, or else the first layer."""
        own = [str(node.target) for node in body if node.op == "call_module"]
        parts = [path.split(".") for path in own if "." in path or len(own) == 1]
        depth = 0
        while parts and all(len(one) > depth + 1 and one[depth] == parts[0][depth] for one in parts):
            depth += 1
        common = ".".join(parts[0][:depth]) if parts and len(parts) == len(own) else ""
        inside = {path for path in self._paths if common and path.startswith(f"{common}.")}
        outside = {str(self.units[node].conv.target) for node in self.units if node not in body}
        return common if common and not inside & outside else own[0]


def _stride(units: Sequence[Unit]) -> int:
    stride = 1
    for one in units:
        stride *= one.module.stride[0]
    return stride


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _shape_of(node: fx.Node) -> tuple[int, ...]:
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()


def _shared_parameters(gm: fx.GraphModule) -> set[int]:
    """Ids of the parameters that stand under several names."""
    seen: set[int] = set()
    shared: set[int] = set()
    for _, parameter in gm.named_parameters(remove_duplicate=False):
        (shared if id(parameter) in seen else seen).add(id(parameter))
    return shared
