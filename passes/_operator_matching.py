"""Blocks that other operators can stand in for, found in any canonical graph."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from fxopt.graph import ops
from fxopt.graph._flow import tensor_inputs
from fxopt.passes._operator_patterns import SQUEEZE, Block, Pattern, Squeeze, Unit
from fxopt.passes._operator_style import NotHereError, style_of
from fxopt.passes._operators import Shape
from fxopt.passes.base import Refusal

__all__ = ["find_blocks"]


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


@dataclass(frozen=True)
class _Padding:
    """How a convolution's input is padded.

    Attributes:
        node: What pads it, or None where the convolution does so itself.
        shift: By how much less it is padded above and at the left than below and at the right.
        reason: Why candidates could not pad it so; empty if they can.
    """

    node: fx.Node | None = None
    shift: int = 0
    reason: str = ""


class _Scene:
    """A graph, its units, and what is taken."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        self.order = {node: index for index, node in enumerate(gm.graph.nodes)}
        self._nodes = list(gm.graph.nodes)
        self._refused: dict[fx.Node, str] = {}
        self._taken: set[fx.Node] = set()
        self._beside: dict[fx.Node, str] = {}
        self._paths = {str(node.target) for node in gm.graph.find_nodes(op="call_module")}
        self._shared = _shared_parameters(gm)
        self.units = {one.conv: one for one in self._units()}
        self._by_start = {one.start: one for one in self.units.values()}

    def refusals(self, patterns: Sequence[Pattern]) -> Iterator[Refusal]:
        """The convolutions that are in no block."""
        names = ", ".join(pattern.name for pattern in patterns)
        told: set[object] = set()
        for node in self._nodes:
            module = self._module(node)
            free = node not in self._taken or node in self._beside
            if isinstance(module, nn.modules.conv._ConvNd) and free and node.target not in told:
                told.add(node.target)
                reason = self._beside.get(node) or self._refused.get(node) or self._why_alone(node, names)
                yield Refusal(node.name, str(node.target), reason)
            elif node.op == "call_function" and ops.semantics(self.gm, node).kind == "conv":
                yield Refusal(
                    node.name, node.name, "its weights are computed, and candidates have weights of their own"
                )

    def _why_alone(self, node: fx.Node, names: str) -> str:
        """Why a convolution that could be part of a block is part of none, and what can be done about it."""
        one = self.units[node]
        kind = next((role for role in _ALONE if one.has_role(role)), "")
        what = _ALONE.get(kind, "a 1 x 1 convolution in groups")
        readers = [ops.semantics(self.gm, user).name for user in one.exit.users]
        known = all(user in self._by_start for user in one.exit.users)
        told = "the output" if not readers else "the output" if readers == ["output"] else ", ".join(readers)
        where = "" if known else f" and read by {told}"
        return (
            f"it is {what}{where}, in none of the known blocks ({names}); tell its block by register_pattern, or leave "
            "it to PruneChannels"
        )

    def match(self, pattern: Pattern, start: Unit) -> Block | None:
        """The block that begins with a unit, if there is one."""
        found = self._chain(pattern, start)
        if found is None:
            return None
        units, squeeze = found
        body = tuple(node for one in units for node in one.nodes) + (squeeze.nodes if squeeze else ())
        if not self._taken.isdisjoint(body):
            return None
        gated = squeeze is not None and squeeze.behind == len(units) - 1
        last = squeeze.exit if squeeze is not None and gated else units[-1].exit
        join, tail = self._join(last)
        if pattern.shortcut and join is None:
            return None
        end = tail or join or last
        span = self._span(units[0].entry, body, end)
        if join is not None and len(self._convolutions(span)) > 2 * len(units) and not pattern.shortcut:
            # It is the shortcut itself, of a larger branch.
            join, tail, end = None, None, last
            span = self._span(units[0].entry, body, end)
        try:
            style = style_of(self.gm, units, squeeze)
            _check_strides(units)
            self._check(end if join is None else None, span)
        except NotHereError as reason:
            self._refused.setdefault(start.conv, f"{pattern.name}: {reason}")
            return None
        self._taken.update(span)
        site = self._site(body)
        beside = [node for node in self._convolutions(span) if node not in body]
        self._beside |= dict.fromkeys(beside, f"it is computed beside the block {site!r}, which is chosen without it")
        shape = Shape(
            units[0].module.in_channels,
            units[-1].module.out_channels,
            _stride(units),
            join is not None,
            max(one.shift for one in units),
        )
        return Block(site, pattern, units, squeeze, body, join, tail, span, shape, style)

    def _units(self) -> Iterator[Unit]:
        for node in self._nodes:
            module = self._module(node)
            if not isinstance(module, nn.modules.conv._ConvNd):
                continue
            reason = self._why_no_unit(node, module)
            padding = self._padding(node, module) if reason is None else _Padding(reason=reason)
            if padding.reason:
                self._refused[node] = padding.reason
                continue
            norm = _only_user(node)
            norm = norm if norm is not None and self._is_own_norm(norm) else None
            after = _only_user(norm or node)
            is_activation = after is not None and ops.is_activation(self.gm, after)
            activation = after if is_activation else None
            yield Unit(node, module, norm, activation, padding.node, padding.shift)  # type: ignore[arg-type]

    def _is_own_norm(self, node: fx.Node) -> bool:
        """Whether a node is a batch norm, and the only use of its statistics and weights."""
        module = self._module(node)
        return type(module) is nn.BatchNorm2d and not self._is_used_elsewhere(node, module)

    def _is_used_elsewhere(self, node: fx.Node, module: Any) -> bool:
        """Whether the module that a node calls, or its weight, is used in several places."""
        calls = self.gm.graph.find_nodes(op="call_module", target=node.target)
        return len(calls) > 1 or id(module.weight) in self._shared

    def _why_no_unit(self, node: fx.Node, module: Any) -> str | None:
        if type(module) is not nn.Conv2d:
            return f"it is a {type(module).__name__}, and candidates are made of Conv2d"
        kernel, stride = module.kernel_size, module.stride
        if kernel[0] != kernel[1] or kernel[0] % 2 == 0 or stride[0] != stride[1]:
            return f"its kernel {kernel} and stride {stride} are not square and odd, as those of candidates are"
        if module.dilation != (1, 1) or module.padding_mode != "zeros":
            return "it is dilated or pads by something else than zeros, as no candidate does"
        if self._is_used_elsewhere(node, module):
            return "its weights are used in several places"
        return None

    def _padding(self, node: fx.Node, module: Any) -> _Padding:
        """How a convolution's input is padded, by itself or by an operation that it alone reads."""
        if module.padding == "same":
            return _Padding()
        own = (0, 0) if module.padding == "valid" else module.padding
        kernel, stride = module.kernel_size[0], module.stride[0]
        source = node.all_input_nodes[0]
        around = self._zeros_around(source) if len(source.users) == 1 else None
        before, value = (None, source) if around is None else (source, source.all_input_nodes[0])
        inside = (own[1], own[1], own[0], own[0])
        wide = [one + other for one, other in zip(around or (0, 0, 0, 0), inside, strict=True)]
        left, right = wide[:2]
        sizes = _shape_of(value)[2:], _shape_of(node)[2:]
        fits = wide == [left, right] * 2 and right == kernel // 2 and left in (right, right - 1)
        if fits and all(-(-size // stride) == made for size, made in zip(*sizes, strict=True)):
            return _Padding(before, right - left)
        if around is None and "pad" in ops.semantics(self.gm, source).name.lower():
            return _Padding(reason=f"{source.name} pads its input, by something else than zeros or for others too")
        told = f"its padding {own}" if around is None else f"the padding {list(around)} of its input by {source.name}"
        return _Padding(reason=f"{told} does not keep the size, over its stride, as that of candidates does")

    def _zeros_around(self, node: fx.Node) -> tuple[int, ...] | None:
        """The zeros that an operation puts around images: left, right, above, below; None for any other operation."""
        module = self._module(node)
        if type(module) is nn.ZeroPad2d:
            return tuple(int(width) for width in module.padding)
        if node.op != "call_function" or ops.semantics(self.gm, node).name != "pad":
            return None
        given = ops.arguments(node)
        zeros = given.get("mode", "constant") == "constant" and not given.get("value")
        widths = given.get("pad", ())
        known = len(widths) == 4 and all(isinstance(width, int) for width in widths)
        return tuple(widths) if zeros and known and len(_shape_of(node)) == 4 else None

    def _chain(self, pattern: Pattern, start: Unit) -> tuple[tuple[Unit, ...], Squeeze | None] | None:
        """The units and the gate that a pattern asks for, from ``start`` on."""
        units: list[Unit] = []
        squeeze: Squeeze | None = None
        value: fx.Node | None = None
        for role in pattern.roles:
            if role == SQUEEZE:
                found = self._squeeze(units) if units and squeeze is None else None
                squeeze = found or squeeze
                value = found.exit if found is not None else value
                continue
            following = self._unit_behind(value) if value is not None else start
            if following is None or not following.has_role(role):
                return None
            units.append(following)
            value = following.exit
        ends_gated = squeeze is not None and squeeze.behind == len(units) - 1
        if pattern.linear and (units[-1].activation is not None or ends_gated):
            return None
        most = max(units[0].module.in_channels, units[-1].module.out_channels)
        if pattern.narrows:
            wide = next(index for index, one in enumerate(units) if not one.has_role("depthwise"))
            may_end = wide == 0 and start.has_role("pointwise") and not self._follows_depthwise(start)
            if not may_end and units[wide].module.out_channels <= most:
                return None
        return tuple(units), squeeze

    def _follows_depthwise(self, start: Unit) -> bool:
        sources = [one for one in self.units.values() if one.exit is start.entry and len(one.exit.users) == 1]
        return any(one.has_role("depthwise") for one in sources)

    def _unit_behind(self, value: fx.Node) -> Unit | None:
        reader = _only_user(value)
        return self._by_start.get(reader) if reader is not None else None

    def _squeeze(self, units: Sequence[Unit]) -> Squeeze | None:
        """The gate that weighs what the last unit gives and nothing else reads."""
        value = units[-1].exit
        product = next((user for user in value.users if ops.semantics(self.gm, user).name == "mul"), None)
        if product is None or len(value.users) != 2 or len(product.all_input_nodes) != 2:
            return None
        node = next(source for source in product.all_input_nodes if source is not value)
        nodes = [product]
        while node is not value:
            # A view may read the batch size, too.
            sources = tensor_inputs(node)
            if len(node.users) != 1 or len(sources) != 1:
                return None
            nodes.append(node)
            node = sources[0]
        nodes.reverse()
        found = self._gate(nodes[:-1])
        if found is None:
            return None
        after = _only_user(product)
        late = after is not None and units[-1].activation is None and ops.is_activation(self.gm, after)
        end = after if late else None
        nodes += [] if end is None else [end]
        return Squeeze(tuple(nodes), *found, after=end, exit=end or product, behind=len(units) - 1)

    def _gate(self, nodes: Sequence[fx.Node]) -> tuple[fx.Node, fx.Node | None, fx.Node, fx.Node, fx.Node] | None:
        """Two layers, the norm and the activation between them, and the function behind them; all of one pixel."""
        parts: list[tuple[str, fx.Node]] = []
        for node in nodes:
            module = self._module(node)
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                plain = isinstance(module, nn.Linear) or (module.kernel_size == (1, 1) and module.groups == 1)
                parts.append(("layer" if plain and _is_pixel(node.all_input_nodes[0]) else "other", node))
            elif type(module) in (nn.BatchNorm1d, nn.BatchNorm2d):
                parts.append(("norm", node))
            elif ops.is_activation(self.gm, node):
                parts.append(("activation", node))
            elif ops.semantics(self.gm, node).kind != "none" and not self._is_mean(node):
                parts.append(("other", node))
        words = tuple(word for word, _ in parts)
        found = [node for _, node in parts]
        if words == ("layer", "activation", "layer", "activation"):
            return found[0], None, found[1], found[2], found[3]
        if words == ("layer", "norm", "activation", "layer", "activation"):
            return found[0], found[1], found[2], found[3], found[4]
        return None

    def _is_mean(self, node: fx.Node) -> bool:
        """Whether a node averages, as candidates' gates do."""
        meaning = ops.semantics(self.gm, node)
        name = meaning.name.replace("_", "").lower()
        return meaning.kind == "pool" and (name == "mean" or "avgpool" in name)

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

    def _convolutions(self, nodes: Iterable[fx.Node]) -> list[fx.Node]:
        return [node for node in nodes if isinstance(self._module(node), nn.modules.conv._ConvNd)]

    def _check(self, end: fx.Node | None, span: Sequence[fx.Node]) -> None:
        """See that a block overlaps with no other and, if something else than an addition ends it, ends by itself."""
        if not self._taken.isdisjoint(span):
            raise NotHereError("another block is computed in between")
        readers = [] if end is None else [user for user in end.users if user.op != "output"]
        fusing = next((user for user in readers if ops.semantics(self.gm, user).fuses), None)
        if fusing is not None:
            raise NotHereError(
                f"what follows ({fusing.name}) is computed together with it by fusing runtimes; "
                "if it is part of an activation that is spelled out, Canonicalize joins that"
            )

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


_ALONE = {
    "pointwise": "a 1 x 1 convolution",
    "depthwise": "a depthwise convolution",
    "grouped": "a convolution in groups",
    "dense": "a convolution",
}


def _is_pixel(node: fx.Node) -> bool:
    """Whether a value has one number for each channel."""
    return all(size == 1 for size in _shape_of(node)[2:])


def _check_strides(units: Sequence[Unit]) -> None:
    """See that there is one stride where it is padded unevenly: candidates have one.

    Raises:
        NotHereError: If there are more.
    """
    strides = [one for one in units if one.module.stride != (1, 1)]
    if len(strides) > 1 and any(one.shift for one in strides):
        raise NotHereError("several of its layers have a stride, and are padded unevenly")


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
