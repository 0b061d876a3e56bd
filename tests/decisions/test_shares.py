"""Shares of the way to a budget."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxopt.decisions import Shares
from fxopt.errors import BudgetError, UnknownNameError

NAMES = ("select-operators", "prune-channels", "quantize")


@given(st.lists(st.floats(0.0, 1.0), min_size=1, max_size=4), st.floats(0.01, 1.5))
def test_limits_fall_by_factors_to_the_budget(weights: list[float], part: float) -> None:
    total = math.fsum(weights)
    names = [str(index) for index in range(len(weights))]
    shares = Shares.of(names, {name: w / total for name, w in zip(names, weights, strict=True)} if total else None)
    limits = [8.0, *(shares.limit(name, 8.0, 8.0 * part) for name in names)]
    assert limits[-1] == 8.0 * part
    if part >= 1.0:
        assert set(limits[1:]) == {8.0 * part}
        return
    for (_, share), before, after in zip(shares.parts, limits, limits[1:], strict=False):
        assert after == pytest.approx(before * part**share, rel=1e-6)


def test_equal_unless_told() -> None:
    assert Shares.of(NAMES).limit("select-operators", 1.0, 0.125) == pytest.approx(0.5)
    assert Shares.of(NAMES).limit("prune-channels", 1.0, 0.125) == pytest.approx(0.25)


@given(st.floats(0.0, 1.0), st.sampled_from(NAMES))
def test_others_divide_what_is_left(share: float, name: str) -> None:
    parts = dict(Shares.of(NAMES, {name: share}).parts)
    assert parts.pop(name) == share
    assert list(parts.values()) == pytest.approx([(1.0 - share) / 2] * 2)
    assert Shares.of(NAMES, {name: f"{100 * share}%"}).parts[NAMES.index(name)][1] == pytest.approx(share)


@pytest.mark.parametrize(
    ("given_shares", "words"),
    [
        ({"quantize": 1.2}, "from 0 to 1"),
        ({"quantize": "much"}, "from 0 to 1"),
        ({"quantize": True}, "from 0 to 1"),
        ({"quantize": float("nan")}, "from 0 to 1"),
        ({"quantize": 0.7, "prune-channels": 0.7}, "sum to 1.4"),
        (dict.fromkeys(NAMES, 0.1), "sum to 0.3"),
        ([0.5, 0.5], "mapping"),
    ],
)
def test_what_is_refused(given_shares: Any, words: str) -> None:
    with pytest.raises(BudgetError, match=words):
        Shares.of(NAMES, given_shares)


def test_unknown_passes_are_told() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'quantize'"):
        Shares.of(NAMES, {"quantise": 0.5})
