"""All the decisions about one model."""

from __future__ import annotations

import difflib
import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from fxopt.decisions._decision import Capabilities, Choice, Decision, Key
from fxopt.decisions._policy import Policy
from fxopt.errors import PolicyError, SearchError

__all__ = ["SearchSpace"]

_SHOWN_CHOICES = 12


class SearchSpace(Sequence[Decision]):
    """The decisions that can be made about a model, in the order in which they are walked.

    Args:
        decisions: The decisions; no two of the same kind at the same site.

    Raises:
        SearchError: If two decisions share a key.
    """

    def __init__(self, decisions: Iterable[Decision] = ()) -> None:
        self._decisions = tuple(decisions)
        by_key: dict[Key, Decision] = {}
        for decision in self._decisions:
            if decision.key in by_key:
                raise SearchError(f"{decision.where} is declared twice; a site is decided once per kind.")
            by_key[decision.key] = decision
        self._by_key = by_key
        self._keys = tuple(by_key)
        self._choices = tuple(decision.choices for decision in self._decisions)
        self._index = tuple({choice: i for i, choice in enumerate(choices)} for choices in self._choices)
        self._sizes = np.array([len(choices) for choices in self._choices], dtype=np.intp)

    @overload
    def __getitem__(self, index: int) -> Decision: ...
    @overload
    def __getitem__(self, index: slice) -> SearchSpace: ...
    def __getitem__(self, index: int | slice) -> Decision | SearchSpace:
        """The decision at ``index``, or the space of a slice of them."""
        if isinstance(index, slice):
            return SearchSpace(self._decisions[index])
        return self._decisions[index]

    def __len__(self) -> int:
        """How many decisions there are."""
        return len(self._decisions)

    def __eq__(self, other: object) -> bool:
        """Whether ``other`` holds equal decisions in the same order."""
        if isinstance(other, SearchSpace):
            return self._decisions == other._decisions
        return NotImplemented

    def __hash__(self) -> int:
        """A hash of the decisions."""
        return hash(self._decisions)

    def __repr__(self) -> str:
        """The number of decisions and of policies."""
        return f"SearchSpace({len(self)} decisions, {self.policies:.3g} policies)"

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by the decisions."""
        return (SearchSpace, (self._decisions,))

    @property
    def by_key(self) -> Mapping[Key, Decision]:
        """The decisions by ``(kind, site)``."""
        return MappingProxyType(self._by_key)

    @property
    def sizes(self) -> npt.NDArray[np.intp]:
        """The number of choices of each decision."""
        return self._sizes.copy()

    @property
    def policies(self) -> int:
        """How many different policies there are."""
        return math.prod(len(choices) for choices in self._choices)

    @property
    def fingerprint(self) -> str:
        """A digest of the decisions and their choices (not of their features) that names this space."""
        rows = [[d.kind, d.site, d.choices, d.default, d.operator] for d in self._decisions]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]

    def restrict(self, capabilities: Capabilities) -> SearchSpace:
        """The space of what a target can run.

        Bit pairs that the target has not are dropped; if the default is one of them, the widest pair left
        takes its place, and if none is left the decision keeps its default alone. Channel counts move to
        the nearest multiple of the target's tile (and of the decision's ``multiple``), never below one
        tile; the default stays. Operators the target has not are dropped, except the default.

        Raises:
            PolicyError: If ``capabilities`` are something else.
        """
        given: object = capabilities
        if not isinstance(given, Capabilities):
            raise PolicyError(
                f"capabilities is a {type(given).__name__}; give Capabilities, such as those of a target."
            )
        return SearchSpace(_restricted(decision, capabilities) for decision in self._decisions)

    def validate(self, policy: Mapping[Key, Choice]) -> None:
        """Check that ``policy`` decides nothing but what can be decided here; what it leaves out is default.

        Raises:
            PolicyError: Naming the site and the reason.
        """
        for key, choice in policy.items():
            decision = self._by_key.get(key)
            if decision is None:
                raise PolicyError(self._why_unknown(key))
            if choice not in decision.choices:
                raise PolicyError(
                    f"{choice!r} cannot be chosen for {key[0]!r} at {key[1]!r}; {_list_choices(decision)}."
                )

    def complete(self, policy: Mapping[Key, Choice]) -> Policy:
        """``policy`` with every decision that it leaves out set to its default.

        Raises:
            PolicyError: If the policy does not fit the space.
        """
        return self.decode(self.encode(policy))

    def default(self) -> Policy:
        """The policy that leaves the model as it is."""
        return Policy._trusted({decision.key: decision.default for decision in self._decisions})

    def uniform(self, fraction: float, bits: tuple[int, int] | None = None) -> Policy:
        """One fraction of the channels for every site.

        Args:
            fraction: The part of the channels to keep, in (0, 1]; each site takes the choice nearest to
                ``fraction * default`` (the smaller one of two equally near).
            bits: The pair of weight and activation bits for every site, or the nearest that a site has;
                None leaves the default.

        Raises:
            SearchError: If the fraction is out of range.
        """
        given: Any = fraction
        if not isinstance(given, (int, float, np.number)) or isinstance(given, bool) or not 0.0 < given <= 1.0:
            raise SearchError(f"A uniform fraction lies in (0, 1], got {fraction!r}.")
        return Policy._trusted({d.key: _uniform_choice(d, fraction, bits) for d in self._decisions})

    def sample(self, rng: np.random.Generator) -> Policy:
        """A policy drawn with every choice of every decision equally likely."""
        return self.decode(rng.integers(0, self._sizes))

    def encode(self, policy: Mapping[Key, Choice]) -> npt.NDArray[np.intp]:
        """The index of each decision's choice, shape ``(decisions,)``; what is left out is default.

        Raises:
            PolicyError: If the policy does not fit the space.
        """
        rows = zip(self._decisions, self._index, strict=True)
        try:
            indices = [index[policy.get(decision.key, decision.default)] for decision, index in rows]
        except (KeyError, TypeError):
            indices = []
        known = sum(1 for key in self._keys if key in policy)
        if len(indices) != len(self) or known != len(policy):
            self.validate(policy)
        return np.array(indices, dtype=np.intp)

    def decode(self, indices: npt.ArrayLike) -> Policy:
        """The policy with the given choice indices, shape ``(decisions,)``.

        Raises:
            PolicyError: If the shape is wrong or an index is out of range.
        """
        return self.decode_all(np.asarray(indices).reshape(1, -1))[0]

    def decode_all(self, indices: npt.ArrayLike) -> list[Policy]:
        """The policies with the given choice indices, shape ``(policies, decisions)``.

        Raises:
            PolicyError: If the shape is wrong or an index is out of range.
        """
        rows = np.asarray(indices)
        if rows.ndim != 2 or rows.shape[1] != len(self):
            raise PolicyError(f"Choice indices need the shape (policies, {len(self)}), got {rows.shape}.")
        if rows.size and not np.issubdtype(rows.dtype, np.integer):
            raise PolicyError(f"Choice indices are integers, got {rows.dtype}.")
        outside = (rows < 0) | (rows >= self._sizes)
        if outside.any():
            row, column = np.argwhere(outside)[0]
            decision = self._decisions[column]
            raise PolicyError(
                f"Choice index {rows[row, column]} is out of range for {decision.kind!r} at {decision.site!r}, "
                f"which has {len(decision.choices)} choices."
            )
        return [
            Policy._trusted({k: c[i] for k, c, i in zip(self._keys, self._choices, row, strict=True)})
            for row in rows.tolist()
        ]

    def _why_unknown(self, key: Key) -> str:
        kind, site = key
        kinds_here = sorted(k for k, s in self._by_key if s == site)
        if kinds_here:
            return f"{site!r} has no decision of kind {kind!r} (it has {', '.join(map(repr, kinds_here))})."
        sites = sorted({s for k, s in self._by_key if k == kind} or {s for _, s in self._by_key})
        nearest = difflib.get_close_matches(site, sites, n=1, cutoff=0.5)
        hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
        return f"The search space has no decision of kind {kind!r} at {site!r}.{hint}"


def _list_choices(decision: Decision) -> str:
    shown = ", ".join(map(repr, decision.choices[:_SHOWN_CHOICES]))
    more = f" and {len(decision.choices) - _SHOWN_CHOICES} more" if len(decision.choices) > _SHOWN_CHOICES else ""
    return f"its choices are {shown}{more}"


def _uniform_choice(decision: Decision, fraction: float, bits: tuple[int, int] | None) -> Choice:
    default = decision.default
    if decision.kind == "channels" and isinstance(default, int):
        wanted = fraction * default
        return min(decision.choices, key=lambda choice: abs(choice - wanted) if isinstance(choice, int) else math.inf)
    if decision.kind == "bits" and bits is not None:
        return min(decision.choices, key=lambda choice: _bits_distance(choice, bits))
    return default


def _bits_distance(choice: Choice, bits: tuple[int, int]) -> float:
    if not isinstance(choice, tuple):
        return math.inf
    return float(sum(abs(a - b) for a, b in zip(choice, bits, strict=True)))


def _restricted(decision: Decision, capabilities: Capabilities) -> Decision:
    choices = decision.choices
    if decision.kind == "bits":
        allowed: set[Choice] = set(capabilities.allowed_bits(decision.operator))
        choices = tuple(choice for choice in choices if choice in allowed) or (decision.default,)
    if decision.kind == "channels":
        choices = _snapped(decision, math.lcm(capabilities.channel_tile, decision.multiple))
    if decision.kind == "operator" and capabilities.operators is not None:
        kept = {*capabilities.operators, decision.default}
        choices = tuple(choice for choice in choices if choice in kept)
    default = decision.default if decision.default in choices else max(choices, key=_total_bits)
    return replace(decision, choices=choices, default=default)


def _snapped(decision: Decision, unit: int) -> tuple[Choice, ...]:
    default = decision.default
    counts = [choice for choice in decision.choices if isinstance(choice, int)]
    snapped = {max(unit, (count + unit // 2) // unit * unit) for count in counts if count != default}
    return tuple(sorted({count for count in snapped if count <= max(counts)} | ({default} & set(counts))))


def _total_bits(choice: Choice) -> int:
    return sum(choice) if isinstance(choice, tuple) else 0
