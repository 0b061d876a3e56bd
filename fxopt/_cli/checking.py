"""The options of ``fxopt optimize``, checked before anything is loaded: names, budgets, options in words."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from fxopt._cli.choosing import fine_tuning_of, objective_of, reconstruction_of
from fxopt.errors import DataError

if TYPE_CHECKING:
    from fxopt._cli.options import Options

__all__ = ["check_names", "check_option"]


def check_names(options: Options) -> None:
    """Refuse a wrong name, budget or option in words before anything is loaded.

    Raises:
        FxoptError: Naming the nearest known name, or what a budget or an option looks like.
    """
    from fxopt.decisions import Shares

    for name in _CHECKS:
        check_option(name, options)
    Shares.of(options.passes, options.shares)
    if options.val is not None and options.evaluate is not None:
        raise DataError("Both val and evaluate say how good a model is; give one of them.")


def check_option(name: str, options: Options) -> None:
    """Refuse a wrong value of the option ``name``, whatever the others are.

    Raises:
        FxoptError: As :func:`check_names`.
    """
    check = _CHECKS.get(name)
    if check is not None:
        check(options)


def _target(options: Options) -> None:
    from fxopt import targets

    if options.target != targets.HOST:
        targets.load(options.target)


def _passes(options: Options) -> None:
    from fxopt import passes

    for name in options.passes:
        passes.load(name)


def _engine(options: Options) -> None:
    from fxopt.search import engines

    engines.load(options.engine)


def _budget(options: Options) -> None:
    from fxopt.decisions import Budget

    Budget.parse_all(options.budget)


def _shares(options: Options) -> None:
    from fxopt import passes
    from fxopt.decisions import Shares

    for name, share in options.shares.items():
        Shares.of(passes.names(), {name: share})


def _objective(options: Options) -> None:
    objective_of(options.objective)


def _reconstruct(options: Options) -> None:
    reconstruction_of(options.reconstruct)


def _fine_tuning(options: Options) -> None:
    fine_tuning_of(options)


_CHECKS: Mapping[str, Callable[[Options], None]] = {
    # What needs no torch comes first: loading a pass takes seconds.
    "target": _target,
    "engine": _engine,
    "budget": _budget,
    "passes": _passes,
    "shares": _shares,
    "objective": _objective,
    "reconstruct": _reconstruct,
    **dict.fromkeys(("optimizer", "schedule", "patience", "distill", "scales"), _fine_tuning),
}
