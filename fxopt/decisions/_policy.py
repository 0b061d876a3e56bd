"""The choices made: plain, immutable data."""

from __future__ import annotations

import json
import os
from collections.abc import Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from fxopt._files import write_text
from fxopt.decisions._decision import Choice, Key, as_choice
from fxopt.errors import PolicyError

__all__ = ["POLICY_SCHEMA", "Policy"]

POLICY_SCHEMA = 1
"""The version of the JSON form that this release writes and reads."""


class Policy(Mapping[Key, Choice]):
    """An immutable, hashable mapping from ``(kind, site)`` to the choice made there.

    Two policies are equal when they hold the same choices, in whatever order. Replaying a policy needs
    nothing but its JSON.

    Example:
        >>> policy = Policy({("channels", "conv1"): 32, ("bits", "conv1"): (8, 8)})
        >>> Policy.from_json(policy.to_json()) == policy
        True

    Args:
        choices: The choices by ``(kind, site)``, as a mapping or as pairs.

    Raises:
        PolicyError: If a key is not a pair of strings or a choice is not plain data.
    """

    __slots__ = ("_choices", "_hash")
    _choices: dict[Key, Choice]
    _hash: int | None

    def __init__(self, choices: Mapping[Key, Choice] | Iterable[tuple[Key, Choice]] = ()) -> None:
        try:
            pairs = dict(choices)
        except (TypeError, ValueError) as failure:
            raise PolicyError(
                f"choices is a {type(choices).__name__}; give a mapping of (kind, site) to choices, or pairs."
            ) from failure
        plain = {_checked_key(key): _checked_choice(key, value) for key, value in pairs.items()}
        object.__setattr__(self, "_choices", plain)
        object.__setattr__(self, "_hash", None)

    @classmethod
    def _trusted(cls, choices: dict[Key, Choice]) -> Policy:
        """A policy around a dictionary that holds checked choices and that nobody else keeps."""
        policy = cls.__new__(cls)
        object.__setattr__(policy, "_choices", choices)
        object.__setattr__(policy, "_hash", None)
        return policy

    def __getitem__(self, key: Key) -> Choice:
        """The choice under ``(kind, site)``."""
        return self._choices[key]

    def __iter__(self) -> Iterator[Key]:
        """The keys."""
        return iter(self._choices)

    def __len__(self) -> int:
        """How many choices it holds."""
        return len(self._choices)

    def __eq__(self, other: object) -> bool:
        """Whether ``other`` holds the same choices, in whatever order."""
        if isinstance(other, Mapping):
            return self._choices == (other._choices if isinstance(other, Policy) else dict(other))
        return NotImplemented

    def __hash__(self) -> int:
        """A hash that does not depend on the order."""
        if self._hash is None:
            object.__setattr__(self, "_hash", hash(frozenset(self._choices.items())))
        return self._hash  # type: ignore[return-value]

    def __setattr__(self, name: str, value: object) -> NoReturn:
        """Refuse: a policy cannot be changed."""
        raise AttributeError(f"A Policy cannot be changed ({name!r}); use merged() to make another.")

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by content."""
        return (Policy, (dict(self._choices),))

    def __repr__(self) -> str:
        """The choices, sorted by key."""
        return f"Policy({{{', '.join(f'{key}: {self._choices[key]!r}' for key in sorted(self._choices))}}})"

    def of_kind(self, kind: str) -> dict[str, Choice]:
        """The choices of one kind, by site."""
        return {site: choice for (its_kind, site), choice in self._choices.items() if its_kind == kind}

    def only(self, kinds: Container[str]) -> Policy:
        """A policy with the choices of these kinds alone."""
        return Policy._trusted({key: choice for key, choice in self._choices.items() if key[0] in kinds})

    def merged(self, other: Mapping[Key, Choice]) -> Policy:
        """A policy with the choices of both; where both decide, ``other`` wins."""
        return Policy({**self._choices, **other})

    def to_data(self) -> dict[str, Any]:
        """The policy as JSON-ready data, sorted by kind and site."""
        entries = [
            {"kind": kind, "site": site, "choice": list(choice) if isinstance(choice, tuple) else choice}
            for (kind, site), choice in sorted(self._choices.items(), key=lambda item: item[0])
        ]
        return {"schema": POLICY_SCHEMA, "decisions": entries}

    @classmethod
    def from_data(cls, data: object) -> Policy:
        """The policy that :meth:`to_data` described.

        Raises:
            PolicyError: If ``data`` has another schema version or another form.
        """
        if not isinstance(data, dict):
            raise PolicyError(f"A policy is a JSON object with 'schema' and 'decisions', got {type(data).__name__}.")
        _check_schema(data)
        entries = data.get("decisions")
        if not isinstance(entries, list) or set(data) != {"schema", "decisions"}:
            raise PolicyError(f"A policy holds 'schema' and a list of 'decisions' and no more, got {sorted(data)}.")
        choices: dict[Key, Choice] = {}
        for number, entry in enumerate(entries):
            key, choice = _parse_entry(number, entry)
            if key in choices:
                raise PolicyError(f"Decision {number} decides {key[0]!r} at {key[1]!r} a second time; remove one.")
            choices[key] = choice
        return cls(choices)

    def to_json(self) -> str:
        """The policy as JSON text with a schema version, one decision a line."""
        data = self.to_data()
        lines = ",\n".join(f"    {json.dumps(entry)}" for entry in data["decisions"])
        body = f"[\n{lines}\n  ]" if lines else "[]"
        return f'{{\n  "schema": {POLICY_SCHEMA},\n  "decisions": {body}\n}}\n'

    @classmethod
    def from_json(cls, text: str) -> Policy:
        """The policy that :meth:`to_json` wrote.

        Raises:
            PolicyError: If the text is not JSON, or has another schema version or form.
        """
        try:
            data = json.loads(text)
        except ValueError as failure:
            raise PolicyError(f"The policy is not valid JSON: {failure}.") from failure
        return cls.from_data(data)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the JSON form to ``path``, whole or not at all.

        Raises:
            PolicyError: If the file cannot be written.
        """
        write_text(path, self.to_json(), PolicyError)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Policy:
        """Read a policy that :meth:`save` wrote.

        Raises:
            PolicyError: If the file cannot be read or holds no policy of this schema version.
        """
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as failure:
            raise PolicyError(f"Cannot read a policy from {path}: {failure}.") from failure
        except PolicyError as failure:
            raise PolicyError(f"{path}: {failure}") from failure


def _checked_key(key: object) -> Key:
    if isinstance(key, tuple) and len(key) == 2 and all(isinstance(part, str) for part in key) and key[0]:
        return (str(key[0]), str(key[1]))
    raise PolicyError(f"A policy's keys are pairs (kind, site) of strings, got {key!r}.")


def _checked_choice(key: object, value: object) -> Choice:
    try:
        return as_choice(value)
    except ValueError as failure:
        raise PolicyError(f"The choice under {key!r} cannot be used: {failure}.") from failure


def _check_schema(data: Mapping[str, Any]) -> None:
    version = data.get("schema")
    if type(version) is int and version == POLICY_SCHEMA:
        return
    raise PolicyError(
        f"The policy has schema version {version!r} and this release of fxopt reads version {POLICY_SCHEMA}. "
        "Write it again with this release, or read it with the release that wrote it."
    )


def _parse_entry(number: int, entry: object) -> tuple[Key, Choice]:
    if not isinstance(entry, dict) or set(entry) != {"kind", "site", "choice"}:
        raise PolicyError(f"Decision {number} of the policy needs 'kind', 'site' and 'choice' and no more: {entry!r}.")
    key = _checked_key((entry["kind"], entry["site"]))
    return key, _checked_choice(key, entry["choice"])
