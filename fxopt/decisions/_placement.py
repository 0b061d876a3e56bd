"""What a target says about which values are quantized."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fxopt.decisions._bits import FLOAT_BITS, MAX_BITS
from fxopt.errors import TargetError

__all__ = ["PLAIN_PLACEMENT", "Placement", "operator_key"]

_SHARED = ("add", "cat")


def operator_key(name: str) -> str:
    """An operator's name without capitals and underscores: that of its module and of its function are then the same."""
    return name.lower().replace("_", "")


@dataclass(frozen=True)
class Placement:
    """What a target asks of quantized graphs; by default what onnxruntime does.

    Operators go by their names in the table of operators; capitals and underscores do not matter (see
    :func:`operator_key`).

    Attributes:
        ends: Bits of weights and activations of the first and the last layer, or None to treat them as all others.
        floats: Operators that run in floating point there, though onnxruntime has an integer kernel for them.
        fuses: Activation functions that run inside the layer before them, besides those that are linear but for a
            kink or two: their result is quantized, and nothing between.
        shared_grids: Operators whose operands have to lie on one grid: ``"add"``, ``"cat"``, or both. A concatenation's
            result then lies on it too.

    Raises:
        TargetError: If ``ends`` is no pair of bits, or another operator is to share grids.
    """

    ends: tuple[int, int] | None = None
    floats: tuple[str, ...] = ()
    fuses: tuple[str, ...] = ()
    shared_grids: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check the options and make them immutable."""
        for name in ("floats", "fuses", "shared_grids"):
            object.__setattr__(self, name, _as_names(name, getattr(self, name)))
        strange = [name for name in self.shared_grids if name not in _SHARED]
        if strange:
            raise TargetError(f"shared_grids names {strange[0]!r}; operands of {' and '.join(_SHARED)} can share one.")
        both = [name for name in self.floats if name in (*self.fuses, *self.shared_grids)]
        if both:
            raise TargetError(f"{both[0]!r} cannot run in floating point and on integers; name it once.")
        if self.ends is not None:
            object.__setattr__(self, "ends", _as_ends(self.ends))


def _as_names(option: str, given: Any) -> tuple[str, ...]:
    listed = isinstance(given, (tuple, list)) and all(isinstance(name, str) and name for name in given)
    if not listed:
        raise TargetError(f"{option} has to list names of operators, got {given!r}.")
    return tuple(operator_key(name) for name in given)


def _as_ends(given: Any) -> tuple[int, int]:
    pair = tuple(given) if isinstance(given, (tuple, list)) else ()
    widths = (*range(1, MAX_BITS + 1), FLOAT_BITS)
    fine = len(pair) == 2 and all(type(bits) is int and bits in widths for bits in pair)
    if not fine or (pair[0] == FLOAT_BITS and pair[1] != FLOAT_BITS):
        wanted = f"bits of weights and activations, 1 to {MAX_BITS} each, or {FLOAT_BITS} for floating point"
        raise TargetError(f"ends is {given!r}; give {wanted}.")
    return (pair[0], pair[1])


PLAIN_PLACEMENT = Placement()
"""What onnxruntime does."""
