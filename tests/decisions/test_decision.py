"""Decisions and capabilities."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest

from fxopt.decisions import Capabilities, Decision
from fxopt.errors import SearchError, TargetError


def test_numpy_values_and_lists_become_plain_choices() -> None:
    decision = Decision("bits", "conv", ([np.int64(8), 8], (4, 8)), [8, 8])  # type: ignore[arg-type]
    assert decision.choices == ((8, 8), (4, 8))
    assert [type(bits) for bits in decision.choices[0]] == [int, int]  # type: ignore[union-attr]
    assert decision.default == (8, 8)
    assert decision.key == ("bits", "conv")


@pytest.mark.parametrize(
    ("kind", "choices", "default", "reason"),
    [
        ("channels", (), 8, "no choices"),
        ("", (8,), 8, "empty kind"),
        ("channels", (8, 8), 8, "repeats"),
        ("channels", (8, 16), 24, "none of its choices"),
        ("channels", (16, 8), 8, "ascending"),
        ("channels", (0, 8), 8, "at least 1"),
        ("channels", (4.5, 8), 8, "at least 1"),
        ("bits", ((8, 8), (0, 8)), (8, 8), "pairs of bits"),
        ("bits", ((8, 8), (33, 8)), (8, 8), "pairs of bits"),
        ("bits", ((8,),), (8,), "pairs of bits"),
        ("bits", (8, 4), 8, "pairs of bits"),
        ("operator", ("conv", 3), "conv", "operator names"),
        ("rank", (True, 2), 2, "truth value"),
        ("rank", (float("nan"), 2), 2, "not finite"),
        ("rank", ((1, "a"), 2), 2, "tuple of integers"),
        ("rank", (None, 2), 2, "NoneType"),
    ],
)
def test_what_cannot_be_decided_is_refused(kind: str, choices: tuple, default: object, reason: str) -> None:
    with pytest.raises(SearchError, match=reason) as failure:
        Decision(kind, "features.0", choices, default)  # type: ignore[arg-type]
    assert "features.0" in str(failure.value)


def test_counts_keep_to_their_multiple() -> None:
    assert Decision("channels", "conv", (6, 12), 12, multiple=6).multiple == 6
    with pytest.raises(SearchError, match="multiples of 6"):
        Decision("channels", "conv", (6, 10), 10, multiple=6)


def test_a_decision_is_immutable_hashable_and_copies() -> None:
    features = {"macs": 3}
    decision = Decision("channels", "conv", (8, 16), 16, features, "conv", 8)
    features["macs"] = 5
    assert decision.features == {"macs": 3.0}
    with pytest.raises(TypeError):
        decision.features["macs"] = 7  # type: ignore[index]
    with pytest.raises(dataclasses.FrozenInstanceError):
        decision.site = "other"  # type: ignore[misc]
    assert copy.deepcopy(decision) == decision
    assert hash(copy.deepcopy(decision)) == hash(decision)
    assert decision != dataclasses.replace(decision, features={})


def test_allowed_bits_fall_back_to_the_star_and_then_to_float() -> None:
    capabilities = Capabilities({"conv": ((8, 8), (4, 8)), "*": ((8, 8),)})
    assert capabilities.allowed_bits("conv") == ((8, 8), (4, 8))
    assert capabilities.allowed_bits("linear") == ((8, 8),)
    assert Capabilities({"conv": ((8, 8),)}).allowed_bits("linear") == ((32, 32),)
    assert Capabilities({"conv": ()}).allowed_bits("conv") == ()


def test_capabilities_are_checked_and_copied() -> None:
    capabilities = Capabilities({"conv": [[8, 8]]}, channel_tile=4)  # type: ignore[dict-item]
    assert capabilities.bits["conv"] == ((8, 8),)
    assert copy.deepcopy(capabilities) == capabilities
    with pytest.raises(TargetError, match="'conv'"):
        Capabilities({"conv": ((8, 64),)})
    with pytest.raises(TargetError, match="at least 1"):
        Capabilities(channel_tile=0)
    with pytest.raises(TargetError, match="at least 1"):
        Capabilities(batch=0)
