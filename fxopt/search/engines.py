"""The engines by name: create one, or register your own.

Engines are loaded when they are asked for, so that a name costs nothing to know.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from typing import Any

from fxopt.decisions import Constraint, SearchSpace
from fxopt.errors import SearchError, UnknownNameError
from fxopt.search._engine import Engine

__all__ = ["available", "create", "load", "names", "register"]

_ENGINES: dict[str, str | type[Engine]] = {
    "evolution": "fxopt.search._evolution:EvolutionEngine",
    "ddpg": "fxopt.search._ddpg:DDPGEngine",
    "exact": "fxopt.search._exact:ExactEngine",
    "greedy": "fxopt.search._greedy:GreedyEngine",
    "optuna": "fxopt.search._optuna:OptunaEngine",
    "random": "fxopt.search._random:RandomEngine",
    "reinforce": "fxopt.search._reinforce:ReinforceEngine",
    "uniform": "fxopt.search._uniform:UniformEngine",
}
_NEEDS = {"optuna": "optuna"}


def names() -> list[str]:
    """The names of all engines, sorted."""
    return sorted(_ENGINES)


def available(name: str) -> bool:
    """Whether the package that an engine needs, if any, is installed.

    Raises:
        UnknownNameError: If there is no such engine; suggests the nearest name.
    """
    if name not in _ENGINES:
        raise UnknownNameError("search engine", str(name), _ENGINES)
    return name not in _NEEDS or importlib.util.find_spec(_NEEDS[name]) is not None


def load(name: str) -> type[Engine]:
    """The engine class under ``name``.

    Raises:
        UnknownNameError: If there is none; suggests the nearest name.
        SearchError: If a registered path leads to no engine.
    """
    if name not in _ENGINES:
        raise UnknownNameError("search engine", str(name), _ENGINES)
    entry = _ENGINES[name]
    if not isinstance(entry, str):
        return entry
    module, _, attribute = entry.partition(":")
    try:
        engine = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as failure:
        raise SearchError(f"Engine {name!r} cannot be loaded from {entry!r}: {failure}.") from failure
    if not (isinstance(engine, type) and issubclass(engine, Engine)):
        raise SearchError(f"Engine {name!r}: {entry!r} is no subclass of fxopt.search.Engine.")
    return engine


def create(
    name: str, space: SearchSpace, constraint: Constraint | None = None, seed: int = 0, **options: Any
) -> Engine:
    """A fresh engine.

    Args:
        name: The engine's name; see :func:`names`.
        space: What can be decided.
        constraint: What the policies may cost; None for no limit.
        seed: The seed of the engine's generator.
        **options: The engine's own options.

    Raises:
        UnknownNameError: If there is no such engine; suggests the nearest name.
        SearchError: If an option is unknown or out of range.
    """
    engine = load(name)
    known = [parameter for parameter in inspect.signature(engine).parameters if parameter not in _COMMON]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise SearchError(
            f"Engine {name!r} has no option {unknown[0]!r}; its options are {', '.join(known) or 'none'}."
        )
    return engine(space, constraint, seed, **options)


def register(name: str, engine: type[Engine] | str) -> None:
    """Make an engine known by name.

    Args:
        name: The name; it must be free.
        engine: The class, or its path ``"package.module:Class"``, which is imported on first use.

    Raises:
        SearchError: If the name is taken or the path has another form.
    """
    if name in _ENGINES:
        raise SearchError(f"There is an engine {name!r} already; choose another name.")
    if isinstance(engine, str) and not all(engine.partition(":")):
        raise SearchError(f"The path of an engine has the form 'package.module:Class', got {engine!r}.")
    _ENGINES[name] = engine


_COMMON = {"space", "constraint", "seed"}
