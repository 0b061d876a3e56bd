"""The engines by name: create one, or register your own.

Engines are loaded when they are asked for, so that a name costs nothing to know.
"""

from __future__ import annotations

import importlib.util
from typing import Any

from fxopt._named import Registry
from fxopt.decisions import Constraint, SearchSpace
from fxopt.errors import SearchError
from fxopt.search._engine import Engine

__all__ = ["available", "create", "load", "names", "register"]

_ENGINES: Registry[Engine] = Registry(
    "search engine",
    "fxopt.search:Engine",
    SearchError,
    {
        "evolution": "fxopt.search._evolution:EvolutionEngine",
        "ddpg": "fxopt.search._ddpg:DDPGEngine",
        "exact": "fxopt.search._exact:ExactEngine",
        "greedy": "fxopt.search._greedy:GreedyEngine",
        "optuna": "fxopt.search._optuna:OptunaEngine",
        "random": "fxopt.search._random:RandomEngine",
        "reinforce": "fxopt.search._reinforce:ReinforceEngine",
        "uniform": "fxopt.search._uniform:UniformEngine",
    },
    shared=("space", "constraint", "seed"),
)
_NEEDS = {"optuna": "optuna"}


def names() -> list[str]:
    """The names of all engines, sorted."""
    return _ENGINES.names()


def available(name: str) -> bool:
    """Whether the package that an engine needs, if any, is installed.

    Raises:
        UnknownNameError: If there is no such engine; suggests the nearest name.
    """
    _ENGINES.check(name)
    return name not in _NEEDS or importlib.util.find_spec(_NEEDS[name]) is not None


def load(name: str) -> type[Engine]:
    """The engine class under ``name``.

    Raises:
        UnknownNameError: If there is none; suggests the nearest name.
        SearchError: If a registered path leads to no engine.
    """
    return _ENGINES.load(name)


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
    return _ENGINES.load_for(name, options)(space, constraint, seed, **options)


def register(name: str, engine: type[Engine] | str) -> None:
    """Make an engine known by name.

    Args:
        name: The name; it must be free.
        engine: The class, or its path ``"package.module:Class"``, which is imported on first use.

    Raises:
        SearchError: If the name is taken or the path has another form.
    """
    _ENGINES.register(name, engine)
