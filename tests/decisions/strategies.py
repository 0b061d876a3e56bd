"""Random search spaces, policies and costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from fxopt.decisions import Decision, Policy, SearchSpace

BITS = ((1, 8), (2, 8), (4, 4), (8, 8), (32, 32))
Cost = Callable[[Sequence[Policy]], npt.NDArray[np.float64]]


@st.composite
def decisions(draw: st.DrawFn, site: str, max_choices: int = 4) -> Decision:
    kind = draw(st.sampled_from(["channels", "bits", "operator", "rank"]))
    size = draw(st.integers(1, max_choices))
    if kind == "channels":
        choices: tuple = tuple(sorted(draw(st.sets(st.integers(1, 64), min_size=size, max_size=size))))
    elif kind == "bits":
        choices = tuple(draw(st.permutations(BITS))[:size])
    elif kind == "operator":
        choices = ("conv3", "conv5", "pool", "skip")[:size]
    else:
        choices = tuple(draw(st.sets(st.floats(0.1, 1.0), min_size=size, max_size=size)))
    return Decision(kind, site, choices, draw(st.sampled_from(choices)))


@st.composite
def spaces(draw: st.DrawFn, min_size: int = 0, max_size: int = 4, max_choices: int = 4) -> SearchSpace:
    size = draw(st.integers(min_size, max_size))
    return SearchSpace(draw(decisions(f"layer.{i}", max_choices)) for i in range(size))


@st.composite
def policies(draw: st.DrawFn, space: SearchSpace) -> Policy:
    return space.decode([draw(st.integers(0, len(d.choices) - 1)) for d in space])


def additive(space: SearchSpace, seed: int, metrics: int = 1) -> Cost:
    """A sum over decisions of unordered prices: a later choice may be cheaper or dearer."""
    tables = np.random.default_rng(seed).uniform(0.0, 1.0, (metrics, len(space), max([1, *space.sizes.tolist()])))

    def cost(batch: Sequence[Policy]) -> npt.NDArray[np.float64]:
        rows = np.array([space.encode(policy) for policy in batch]).reshape(len(batch), -1)
        picked = tables[:, np.arange(len(space)), rows]
        # One decision after the other: the sum of a policy must not depend on the batch.
        total = np.full((metrics, len(batch)), 0.1)
        for j in range(len(space)):
            total += picked[:, :, j]
        return total[0] if metrics == 1 else total.T

    return cost


def arbitrary(space: SearchSpace, seed: int) -> Cost:
    """A cost with no structure at all: every policy has its own."""
    table = np.random.default_rng(seed).uniform(0.1, 1.0, [max(1, int(n)) for n in space.sizes])

    def cost(batch: Sequence[Policy]) -> npt.NDArray[np.float64]:
        return np.array([table[tuple(space.encode(policy))] for policy in batch])

    return cost
