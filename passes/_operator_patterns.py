"""What blocks that other operators can stand in for are made of."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from fxopt.errors import FxoptError, PassError
from fxopt.passes._operators import ORIGINAL, Shape, Style, check_names

__all__ = ["PATTERNS", "SQUEEZE", "Block", "Pattern", "Squeeze", "Unit", "blaming", "register_pattern"]

SQUEEZE = "squeeze?"
_POINTWISE, _DENSE, _GROUPED, _DEPTHWISE = "pointwise", "dense", "grouped", "depthwise"
_ROLES = (_POINTWISE, _DENSE, _GROUPED, _DEPTHWISE, SQUEEZE)


@dataclass(frozen=True)
class Pattern:
    """A block, as the layers that it is made of one after the other.

    Attributes:
        name: The pattern's name.
        roles: A word for each layer: ``pointwise`` (a dense 1 x 1 convolution), ``dense`` (a dense k x k one),
            ``grouped`` (k x k in groups), ``depthwise``, each with batch norm and activation if they follow;
            ``squeeze?`` for a squeeze-and-excite gate that may be there.
        candidates: Names of the operators to offer; ``{k}`` and ``{e}`` stand for every kernel and expansion.
        shortcut: Whether the block needs to have something added to what it gives.
        linear: Whether the last layer must have no activation.
        narrows: Whether the first dense or 1 x 1 layer must widen and the last must narrow. A 1 x 1 layer that begins a
            block need do so only behind a depthwise convolution, whose separable end it may be.
        operator: The name of what a block computes, from its kernel and expansion; None if it has no such name.
    """

    name: str
    roles: tuple[str, ...]
    candidates: tuple[str, ...]
    shortcut: bool = False
    linear: bool = False
    narrows: bool = False
    operator: Callable[[Block], str | None] = field(default=lambda block: None, compare=False)


@dataclass(frozen=True)
class Unit:
    """A convolution, what pads its input, and the norm and the activation that follow it alone.

    Attributes:
        conv: The convolution.
        module: Its module.
        norm: The norm, or None.
        activation: The activation, or None.
        padding: What pads the input by zeros, or None where the convolution does so itself.
        shift: By how much less the input is padded above and at the left than below and at the right.
    """

    conv: fx.Node
    module: nn.Conv2d
    norm: fx.Node | None
    activation: fx.Node | None
    padding: fx.Node | None = None
    shift: int = 0

    @property
    def entry(self) -> fx.Node:
        """What it reads."""
        return self.start.all_input_nodes[0]

    @property
    def start(self) -> fx.Node:
        """Its first node."""
        return self.padding or self.conv

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """Its nodes."""
        return tuple(node for node in (self.padding, self.conv, self.norm, self.activation) if node is not None)

    @property
    def exit(self) -> fx.Node:
        """What it gives."""
        return self.nodes[-1]

    @property
    def kernel(self) -> int:
        """Its kernel."""
        return int(self.module.kernel_size[0])

    def has_role(self, role: str) -> bool:
        """Whether a word of patterns is one for it."""
        groups, channels = self.module.groups, self.module.in_channels
        if role == _POINTWISE:
            return groups == 1 and self.kernel == 1
        if role == _DENSE:
            return groups == 1 and (self.kernel > 1 or self.module.stride != (1, 1))
        depthwise = groups == channels == self.module.out_channels and groups > 1
        return depthwise if role == _DEPTHWISE else groups > 1 and self.kernel > 1 and not depthwise


@dataclass(frozen=True)
class Squeeze:
    """A gate.

    Attributes:
        nodes: What it is made of, in graph order.
        reduce: Its first layer, a 1 x 1 convolution or a linear layer.
        norm: The norm behind that, or None.
        activation: The activation behind that.
        expand: Its second layer.
        gate: What weights come from.
        after: The activation behind the product, or None.
        exit: What it gives.
        behind: Index of the layer of the block whose outputs it weighs.
    """

    nodes: tuple[fx.Node, ...]
    reduce: fx.Node
    norm: fx.Node | None
    activation: fx.Node
    expand: fx.Node
    gate: fx.Node
    after: fx.Node | None
    exit: fx.Node
    behind: int


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
        gated = self.squeeze is not None and self.squeeze.behind == len(self.units) - 1
        return self.squeeze.exit if self.squeeze is not None and gated else self.units[-1].exit

    @property
    def operator(self) -> str:
        """Name of what the block computes now."""
        with blaming(f"operator of the pattern {self.pattern.name!r}", self.site, "register_pattern"):
            return self.pattern.operator(self) or ORIGINAL

    @property
    def partner(self) -> fx.Node | None:
        """What is added to what the body gives."""
        if self.join is None:
            return None
        return next(source for source in self.join.all_input_nodes if source is not self.exit)


@contextlib.contextmanager
def blaming(what: str, site: str, registered: str = "register_candidate") -> Iterator[None]:
    """Raise an error of the user's own code as a PassError that says whose it is, and at which block."""
    try:
        yield
    except FxoptError:
        raise
    except Exception as failure:
        reason = (str(failure).splitlines() or [""])[0].rstrip(".")
        raise PassError(
            f"{what} fails at {site!r}: {type(failure).__name__}: {reason}. Correct what {registered} was given."
        ) from failure


def _strides_only(block: Block, place: int) -> bool:
    return all(one.module.stride == (1, 1) for index, one in enumerate(block.units) if index != place)


def _inverted_name(block: Block) -> str | None:
    wide, inputs = block.units[1].module.out_channels, block.shape.inputs
    fits = wide % inputs == 0 and _strides_only(block, 1)
    return f"mb{wide // inputs}-k{block.units[1].kernel}" if fits else None


def _fused_name(block: Block) -> str | None:
    wide, inputs = block.units[0].module.out_channels, block.shape.inputs
    fits = wide % inputs == 0 and _strides_only(block, 0)
    return f"fused{wide // inputs}-k{block.units[0].kernel}" if fits else None


def _separable_name(block: Block) -> str | None:
    return f"separable-k{block.units[0].kernel}" if _strides_only(block, 0) else None


def _basic_name(block: Block) -> str | None:
    first, last = block.units
    same = first.kernel == last.kernel and first.module.out_channels == block.shape.outputs
    return f"basic-k{first.kernel}" if same and _strides_only(block, 0) else None


def _bottleneck_name(block: Block) -> str | None:
    narrow = block.units[1].module
    fits = narrow.in_channels == narrow.out_channels == block.shape.outputs // 4
    return f"bottleneck-k{block.units[1].kernel}" if fits and _strides_only(block, 1) else None


_NARROW = ("own-k{k}", "bottleneck-k{k}", "thin-k{k}", "zero")
_INVERTED = ("own-k{k}", "mb{e}-k{k}", "zero")
PATTERNS: dict[str, Pattern] = {
    pattern.name: pattern
    for pattern in (
        Pattern(
            "inverted-residual-after-depthwise",
            (_DEPTHWISE, _POINTWISE, _DEPTHWISE, SQUEEZE, _POINTWISE),
            _INVERTED,
            linear=True,
            narrows=True,
        ),
        Pattern(
            "depthwise-then-inverted",
            (_DEPTHWISE, _POINTWISE, SQUEEZE, _POINTWISE),
            _INVERTED,
            linear=True,
            narrows=True,
        ),
        Pattern(
            "inverted-residual",
            (_POINTWISE, _DEPTHWISE, SQUEEZE, _POINTWISE),
            _INVERTED,
            linear=True,
            narrows=True,
            operator=_inverted_name,
        ),
        Pattern(
            "fused-inverted-residual",
            (_DENSE, SQUEEZE, _POINTWISE),
            ("own-k{k}", "fused{e}-k{k}", "mb{e}-k{k}", "zero"),
            linear=True,
            narrows=True,
            operator=_fused_name,
        ),
        Pattern(
            "bottleneck",
            (_POINTWISE, _DENSE, SQUEEZE, _POINTWISE, SQUEEZE),
            _NARROW,
            shortcut=True,
            operator=_bottleneck_name,
        ),
        Pattern("grouped-bottleneck", (_POINTWISE, _GROUPED, SQUEEZE, _POINTWISE, SQUEEZE), _NARROW, shortcut=True),
        Pattern(
            "basic",
            (_DENSE, _DENSE, SQUEEZE),
            ("own-k{k}", "basic-k{k}", "bottleneck-k{k}", "mb{e}-k{k}", "zero"),
            shortcut=True,
            operator=_basic_name,
        ),
        Pattern(
            "depthwise-separable",
            (_DEPTHWISE, SQUEEZE, _POINTWISE),
            ("own-k{k}", "separable-k{k}", "mb{e}-k{k}", "identity", "zero"),
            operator=_separable_name,
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
        PassError: If there is one of that name, a role that fxopt does not know, or no tuple where one is needed.
        UnknownNameError: If there is no such candidate; register your own first.
    """
    called: Any = getattr(pattern, "name", None)
    if not isinstance(called, str) or not called:
        raise PassError(f"A pattern needs a name, got {called!r}; give Pattern(name, roles, candidates).")
    for name in ("roles", "candidates"):
        given: Any = getattr(pattern, name, None)
        if not isinstance(given, (tuple, list)) or not all(isinstance(one, str) for one in given):
            whose = getattr(pattern, "name", pattern)
            raise PassError(f"{name} of pattern {whose!r} has to be a tuple such as ('word',), got {given!r}.")
    if pattern.name in PATTERNS:
        raise PassError(f"There is a pattern {pattern.name!r} already; choose another name.")
    unknown = [role for role in pattern.roles if role not in _ROLES]
    if unknown or all(role == SQUEEZE for role in pattern.roles):
        raise PassError(f"Pattern {pattern.name!r} has the roles {pattern.roles}; known are {', '.join(_ROLES)}.")
    check_names(pattern.candidates, f" of pattern {pattern.name!r}:")
    others = dict(PATTERNS)
    PATTERNS.clear()
    PATTERNS.update({pattern.name: pattern, **others})
