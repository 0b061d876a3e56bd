"""One decision, and what a target can do."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, TypeAlias

from fxopt.decisions._bits import FLOAT_BITS
from fxopt.decisions._placement import PLAIN_PLACEMENT, Placement
from fxopt.errors import SearchError, TargetError

__all__ = ["Capabilities", "Choice", "Decision", "Key", "as_choice"]

Choice: TypeAlias = int | float | str | tuple[int, ...]
"""A kept channel count, a fraction, an operator's name, or ``(weight_bits, activation_bits)``."""

Key: TypeAlias = tuple[str, str]
"""``(kind, site)``: what is decided, and at which module path."""


def as_choice(value: object) -> Choice:
    """Turn a number, string or sequence of integers into the plain type that policies hold.

    Raises:
        ValueError: If ``value`` is no choice; the text says why.
    """
    if type(value) is int:
        return value
    if isinstance(value, str):
        return str(value)
    if type(value).__name__ in ("bool", "bool_"):
        raise ValueError(f"{value!r} is a truth value")
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        number = float(value)
        if not math.isfinite(number):
            raise ValueError(f"{value!r} is not finite")
        return number
    if isinstance(value, Sequence):
        return _as_integers(value)
    raise ValueError(f"{value!r} is a {type(value).__name__}; choices are numbers, strings or tuples of integers")


def _as_integers(values: Sequence[object]) -> tuple[int, ...]:
    plain = tuple(as_choice(value) for value in values)
    integers = tuple(value for value in plain if isinstance(value, int))
    if not plain or len(integers) != len(plain):
        raise ValueError(f"{values!r} is not a non-empty tuple of integers")
    return integers


@dataclass(frozen=True)
class Decision:
    """One thing to choose about a model.

    Attributes:
        kind: What is chosen: ``"channels"`` (kept counts, ascending), ``"bits"`` (pairs of weight and
            activation bits, 32 for floating point), ``"operator"`` (names), or a kind of your own.
        site: The module path it is about.
        choices: What can be chosen; unique and not empty.
        default: The choice that leaves the model as it is; one of ``choices``.
        features: Numbers that describe the site to a search engine.
        operator: The kind of operator at the site, such as ``"conv"``; says which bits a target allows.
        multiple: Kept channel counts have to be multiples of this (groups, size of an attention head).

    Raises:
        SearchError: If the choices are empty, repeated, of the wrong type, or lack the default.
    """

    kind: str
    site: str
    choices: tuple[Choice, ...]
    default: Choice
    features: Mapping[str, float] = field(default_factory=dict, hash=False)
    operator: str = ""
    multiple: int = 1

    def __post_init__(self) -> None:
        """Normalise the choices to plain types and refuse what cannot be decided."""
        try:
            choices = tuple(as_choice(choice) for choice in self.choices)
            default = as_choice(self.default)
        except ValueError as failure:
            raise SearchError(f"{self.where} has a choice that cannot be used: {failure}.") from failure
        object.__setattr__(self, "choices", choices)
        object.__setattr__(self, "default", default)
        object.__setattr__(self, "features", MappingProxyType({k: float(v) for k, v in self.features.items()}))
        reason = self._why_malformed()
        if reason:
            raise SearchError(f"{self.where} {reason}.")

    @property
    def key(self) -> Key:
        """``(kind, site)``, under which a policy holds the choice."""
        return (self.kind, self.site)

    @property
    def where(self) -> str:
        """The decision in words, for messages."""
        return f"Decision {self.kind!r} at {self.site!r}"

    def index(self, choice: Choice) -> int:
        """The position of ``choice`` among the choices.

        Raises:
            ValueError: If it is none of them.
        """
        return self.choices.index(choice)

    def _why_malformed(self) -> str | None:
        if not self.kind:
            return "has an empty kind"
        if not self.choices:
            return "has no choices; give at least the default"
        if len(set(self.choices)) != len(self.choices):
            return f"repeats a choice: {self.choices}"
        if self.default not in self.choices:
            return f"has the default {self.default!r}, which is none of its choices {self.choices}"
        if self.kind == "channels":
            return self._why_bad_channels()
        if self.kind == "bits" and not all(_is_bit_pair(choice) for choice in self.choices):
            return f"needs pairs of bits from 1 to {FLOAT_BITS}, got {self.choices}"
        if self.kind == "operator" and not all(isinstance(choice, str) for choice in self.choices):
            return f"needs operator names, got {self.choices}"
        return None

    def _why_bad_channels(self) -> str | None:
        counts = [choice for choice in self.choices if isinstance(choice, int) and choice >= 1]
        if len(counts) != len(self.choices):
            return f"needs channel counts of at least 1, got {self.choices}"
        if counts != sorted(counts):
            return f"needs its channel counts in ascending order, got {self.choices}"
        if self.multiple < 1 or any(count % self.multiple for count in counts):
            return f"needs multiples of {self.multiple}, got {self.choices}"
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by constructor arguments: the read-only view of the features cannot be pickled."""
        features = dict(self.features)
        arguments = (self.kind, self.site, self.choices, self.default, features, self.operator, self.multiple)
        return (Decision, arguments)


def _is_bit_pair(choice: Choice) -> bool:
    return isinstance(choice, tuple) and len(choice) == 2 and all(1 <= bits <= FLOAT_BITS for bits in choice)


@dataclass(frozen=True)
class Capabilities:
    """What a target can run.

    Attributes:
        bits: For each kind of operator, or ``"*"`` for all others, the allowed pairs of weight and
            activation bits (32 = floating point).
        channel_tile: Channel counts are best as multiples of this.
        operators: The operator names the target has, or None for all.
        batch: The batch size the target runs at.
        placement: Which values it wants quantized, and which on one grid.

    Raises:
        TargetError: If a pair is malformed or a size is below 1.
    """

    bits: Mapping[str, tuple[tuple[int, int], ...]] = field(default_factory=dict, hash=False)
    channel_tile: int = 1
    operators: tuple[str, ...] | None = None
    batch: int = 1
    placement: Placement = PLAIN_PLACEMENT

    def __post_init__(self) -> None:
        """Check the table and make it read-only."""
        if self.channel_tile < 1 or self.batch < 1:
            raise TargetError(
                f"channel_tile and batch have to be at least 1, got {self.channel_tile} and {self.batch}."
            )
        table = {kind: tuple(_as_pair(kind, pair) for pair in pairs) for kind, pairs in self.bits.items()}
        object.__setattr__(self, "bits", MappingProxyType(table))

    def allowed_bits(self, kind: str) -> tuple[tuple[int, int], ...]:
        """The pairs of weight and activation bits for operators of ``kind``.

        An operator that the table says nothing of, in a table without ``"*"``, stays in floating point.
        """
        if kind in self.bits:
            return self.bits[kind]
        return self.bits.get("*", ((FLOAT_BITS, FLOAT_BITS),))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by constructor arguments: the read-only view of the table cannot be pickled."""
        return (Capabilities, (dict(self.bits), self.channel_tile, self.operators, self.batch, self.placement))


def _as_pair(kind: str, pair: Sequence[int]) -> tuple[int, int]:
    plain = tuple(pair)
    if not _is_bit_pair(plain):
        raise TargetError(f"Bits of {kind!r}: {pair!r} is not a pair of bits from 1 to {FLOAT_BITS}.")
    return (int(plain[0]), int(plain[1]))
