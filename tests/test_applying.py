"""When the network that a policy makes is trained."""

from __future__ import annotations

from typing import Any

import pytest

from fxopt._applying import Stages
from fxopt.decisions import Policy

CHANNELS = {("channels", "a"): 4}


@pytest.mark.parametrize(
    ("choices", "in_floats", "on_grids"),
    [
        ({}, True, False),
        (CHANNELS, True, False),
        ({("bits", "a"): (32, 32)}, True, False),
        ({("bits", "a"): (8, 8)}, False, True),
        ({("bits", "a"): (4, 32), ("bits", "b"): (32, 32)}, False, True),
        ({**CHANNELS, ("bits", "a"): (8, 8)}, True, False),
        ({**CHANNELS, ("bits", "a"): (8, 8), ("bits", "b"): (8, 7)}, True, True),
    ],
)
def test_a_network_is_trained_where_it_was_changed_last(choices: Any, in_floats: bool, on_grids: bool) -> None:
    assert Stages.of(Policy(choices)) == Stages(in_floats, on_grids)
