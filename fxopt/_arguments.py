"""What people hand to the one call, checked before anything is done."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import fx

from fxopt import passes as pass_registry
from fxopt import targets
from fxopt.data import Loader, first_batch
from fxopt.decisions import PLAIN_PLACEMENT, Budget, Shares
from fxopt.errors import BudgetError, DataError, PassError, SearchError
from fxopt.graph.grids import MAX_BITS
from fxopt.objectives import BestScore, Objective
from fxopt.passes import PruneChannels, Quantize, SelectOperators, SparsifyWeights, TunablePass

__all__ = [
    "PassLike",
    "careful",
    "check_data",
    "check_executor",
    "check_objective_of_operators",
    "check_weights",
    "resolve_passes",
    "terms_of",
    "wanted_objective",
    "wanted_shares",
]

PassLike: TypeAlias = str | TunablePass


_CAREFUL: dict[str, Any] = {"weights": {"method": "mse"}, "activations": {"method": "mse"}, "rounding": True}
"""How ``quantize`` by name quantizes for hardware of fewer than 8 bits, where ranges and rounding matter most."""


def careful(
    passes: tuple[TunablePass, ...], named: Sequence[PassLike], target: targets.Target
) -> tuple[TunablePass, ...]:
    """The passes as the target wants them.

    Values are quantized where it says, unless a pass says otherwise, and ``quantize`` by name is made careful if it
    computes with fewer than 8 bits.
    """
    placement = target.capabilities.placement
    if placement != PLAIN_PLACEMENT:
        passes = tuple(
            dataclasses.replace(one, placement=placement) if isinstance(one, Quantize) and not one.placement else one
            for one in passes
        )
    fewest = min((min(pair) for pairs in target.capabilities.bits.values() for pair in pairs), default=MAX_BITS)
    by_name = named == Quantize.name or (not isinstance(named, (str, TunablePass)) and Quantize.name in named)
    if fewest >= MAX_BITS or not by_name:
        return passes
    return tuple(dataclasses.replace(one, **_CAREFUL) if isinstance(one, Quantize) else one for one in passes)


def resolve_passes(passes: Sequence[PassLike]) -> tuple[TunablePass, ...]:
    listed = (passes,) if isinstance(passes, (str, TunablePass)) else passes
    if not isinstance(listed, Iterable):
        raise PassError(f"passes is a {type(passes).__name__}; give names of passes, such as ('prune-channels',).")
    found: list[TunablePass] = []
    for one in listed:
        made = pass_registry.create(one) if isinstance(one, str) else one
        if not isinstance(made, TunablePass):
            raise PassError(f"{one!r} decides nothing; optimize takes tunable passes, such as prune-channels.")
        if made.name in [other.name for other in found]:
            raise PassError(f"passes names {made.name!r} twice; a pass decides about a model once.")
        if any(isinstance(other, Quantize) for other in found):
            raise PassError(f"passes names {made.name!r} behind 'quantize', whose graph is final; put 'quantize' last.")
        if isinstance(made, (PruneChannels, SelectOperators)) and any(
            isinstance(one, SparsifyWeights) for one in found
        ):
            raise PassError(
                f"passes names {made.name!r} behind 'sparsify-weights', whose zeros it would fill; put it before."
            )
        found.append(made)
    if not found:
        raise PassError("passes is empty; name at least one, such as 'prune-channels'.")
    return tuple(found)


def wanted_objective(objective: Objective | None) -> Objective:
    if objective is not None and not (hasattr(objective, "reward") and hasattr(objective, "check")):
        raise SearchError(
            f"objective is a {type(objective).__name__}; give one of fxopt.objectives, such as SmallestCost(0.97)."
        )
    return objective or BestScore()


def check_objective_of_operators(objective: Objective, following: Sequence[TunablePass]) -> None:
    """A supernet learns what is accurate within budgets: another objective has to be one of the passes behind it.

    Raises:
        SearchError: If there are none.
    """
    if not isinstance(objective, BestScore) and not following:
        raise SearchError(
            f"'select-operators' looks for accuracy within a budget, not for {objective!r}. Give a budget in its "
            "place, such as budget={'latency': 0.5}, or passes behind it, which the objective is for."
        )


def wanted_shares(
    shares: Mapping[str, object] | None, passes: Sequence[TunablePass], budgets: Sequence[Budget]
) -> Shares | None:
    """The shares of passes; None where all passes are searched together."""
    if shares is not None and not budgets:
        raise BudgetError("shares divide the way to a budget; give a budget, such as {'latency': 0.5}, too.")
    if shares is None and not isinstance(passes[0], SelectOperators):
        return None
    return Shares.of([one.name for one in passes], shares)


def terms_of(**options: object) -> dict[str, str]:
    """Options in words for journals, the same in every process; of an object that has none, its type."""
    return {
        name: repr(value) if dataclasses.is_dataclass(value) or isinstance(value, (bool, int)) else type(value).__name__
        for name, value in options.items()
    }


def check_data(train: Loader | None, val: Loader | None, evaluate: object) -> None:
    if evaluate is not None and not callable(evaluate):
        raise DataError(f"evaluate is a {type(evaluate).__name__}; give a function of a module.")
    if evaluate is not None and val is not None:
        raise DataError("Both val and evaluate say how good a model is; give one of them.")
    for loader, name in ((train, "train"), (val, "val")):
        if loader is not None:
            first_batch(loader, name)


def check_executor(executor: object) -> None:
    if executor is not None and not callable(getattr(executor, "submit", None)):
        raise SearchError(f"executor is a {type(executor).__name__}; give one of concurrent.futures, or None.")


def check_weights(graph: fx.GraphModule) -> None:
    for name, tensor in (*graph.named_parameters(), *graph.named_buffers()):
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise DataError(f"{name!r} holds NaN or infinity; load weights that are finite.")
