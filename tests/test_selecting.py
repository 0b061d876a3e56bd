"""How far a selection of operators goes for the passes behind it."""

from __future__ import annotations

import torch
from torch import fx

import fxopt
from fxopt import targets
from fxopt._selecting import Selector
from fxopt._tuning import Tuning
from fxopt.decisions import Policy
from fxopt.errors import InfeasibleError
from fxopt.lowering import lower, lower_operators
from fxopt.nas import Supernet
from fxopt.passes import PruneChannels
from fxopt.progress import Silent
from tests.test_api_operators import DATA, EXAMPLE, STEP, make

TARGET = targets.load("bitfusion")
GRAPH = fxopt.trace(make(), EXAMPLE)
TABLE = lower_operators(GRAPH, STEP).table(TARGET)


def cost(policy: Policy, metric: str) -> float:
    return float(TABLE.score(TABLE.space.encode(policy)[None], metric)[0])


def cheapest() -> Policy:
    latency, _ = TABLE.of("latency")
    return TABLE.space.decode([row[:size].argmin() for row, size in zip(latency, TABLE.space.sizes, strict=True)])


def within(limits: dict[str, float], most_s: float, last: Policy) -> tuple[Policy, bool]:
    """What is chosen where the others can bring whatever takes at most so long within the budget."""

    def completed(graph: fx.GraphModule, *, anyhow: bool = True) -> None:
        taken = float(TARGET.estimate(lower(graph, TARGET.capabilities.batch).bind()).latency_s[0])
        if taken > most_s:
            raise InfeasibleError("too slow", metric="latency", limit=most_s, least=taken)

    torch.manual_seed(0)
    supernet = Supernet(GRAPH, STEP)
    # The originals are the likeliest.
    with torch.no_grad():
        for row, one in zip(supernet.alpha, supernet.space, strict=True):
            row[one.choices.index(one.default)] = 3.0
    tuning = Tuning(DATA, 1, None, 0.01, 0, None, None)
    selector = Selector(STEP, tuning, (PruneChannels(),), None, Silent())
    return selector._within(supernet, TABLE, limits, completed, (0.0,) * len(limits), last)


def test_only_what_the_others_cannot_bring_down_is_lowered() -> None:
    least = {metric: cost(cheapest(), metric) for metric in ("latency", "size")}
    first, _ = within({"latency": 1.0, "size": 1.6 * least["size"]}, 1.0, cheapest())
    assert cost(first, "latency") > 1.1 * least["latency"]
    most = (cost(first, "latency") + least["latency"]) / 2
    # Less of both in equal steps would leave nothing within the limit of size.
    found, fell_back = within({"latency": 1.0, "size": 1.6 * least["size"]}, most, TABLE.space.default())
    assert not fell_back
    assert cost(found, "latency") <= most
    assert cost(found, "size") <= 1.6 * least["size"]


def test_what_is_fallen_back_on_is_told_as_that() -> None:
    last = TABLE.space.default()
    assert within({"latency": 1.0}, 0.0, last) == (last, False)
    assert within({"latency": cost(last, "latency") * 0.99}, 0.0, last) == (last, True)
