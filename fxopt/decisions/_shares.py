"""How passes divide the way to a budget."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fxopt.errors import BudgetError, UnknownNameError

__all__ = ["Shares"]

_ROUNDING = 1e-6


@dataclass(frozen=True)
class Shares:
    """The part of the way to a budget that each pass goes.

    The way is counted in factors: where a budget asks for the part r of what the original costs, and the passes up to
    one have the shares s in all, the network behind that pass costs r ^ s of the original.

    Attributes:
        parts: Names of passes and their shares, in the order of the passes; they sum to one.
        told: The passes whose share somebody gave; the others divide what these leave.
    """

    parts: tuple[tuple[str, float], ...]
    told: frozenset[str] = frozenset()

    @classmethod
    def of(cls, names: Sequence[str], given: Mapping[str, object] | None = None) -> Shares:
        """The shares of passes; those that are not given divide equally what is left.

        Args:
            names: The passes in order.
            given: Shares by name of pass, as numbers from 0 to 1 or as texts such as "30%".

        Raises:
            BudgetError: If a share is out of range, or all of them do not sum to one.
            UnknownNameError: If there is no such pass.
        """
        known: object = {} if given is None else given
        if not isinstance(known, Mapping):
            raise BudgetError(f"shares is a {type(known).__name__}; give a mapping, such as {{'quantize': 0.5}}.")
        told: dict[str, float] = {}
        for name, share in known.items():
            if name not in names:
                raise UnknownNameError("pass in shares", str(name), names)
            told[name] = _number(name, share)
        total, others = math.fsum(told.values()), [name for name in names if name not in told]
        if total > 1.0 + _ROUNDING or (not others and total < 1.0 - _ROUNDING):
            raise BudgetError(
                f"The shares {_listed(told)} sum to {total:g}; all passes together go the whole way, which is 1."
            )
        rest = max(0.0, 1.0 - total) / max(1, len(others))
        return cls(tuple((name, told.get(name, rest)) for name in names), frozenset(told))

    def limit(self, name: str, original: float, limit: float) -> float:
        """What the network behind a pass may cost.

        Args:
            name: The pass.
            original: What the original costs.
            limit: What the last network may cost; where that is no less, every network may.

        Returns:
            The limit, in the same unit.
        """
        index = [known for known, _ in self.parts].index(name)
        if limit >= original or index == len(self.parts) - 1:
            return limit
        return original * math.pow(limit / original, math.fsum(share for _, share in self.parts[: index + 1]))


def _number(name: str, share: object) -> float:
    try:
        if isinstance(share, str):
            found = float(share.strip()[:-1]) / 100.0 if share.strip().endswith("%") else float(share)
        elif isinstance(share, (int, float)) and not isinstance(share, bool):
            found = float(share)
        else:
            found = math.nan
    except ValueError:
        found = math.nan
    if not 0.0 <= found <= 1.0:
        raise BudgetError(f"The share of {name!r} is {share!r}; give a number from 0 to 1, or a text such as '30%'.")
    return found


def _listed(told: Mapping[str, float]) -> str:
    return ", ".join(f"{name}={share:g}" for name, share in told.items())
