"""What a target may ask of quantized graphs."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from fxopt.decisions import PLAIN_PLACEMENT, Capabilities, Placement
from fxopt.errors import TargetError


def test_names_do_without_capitals_and_underscores() -> None:
    made = Placement(ends=[8, 8], floats=["AvgPool2d"], fuses=("hard_swish",), shared_grids=("add", "cat"))  # type: ignore[arg-type]
    assert made == Placement((8, 8), ("avg_pool2d",), ("HardSwish",), ("add", "cat"))
    assert hash(made) == hash(copy.deepcopy(made))


def test_capabilities_carry_it() -> None:
    able = Capabilities({"*": ((8, 8),)}, placement=Placement(ends=(8, 8)))
    again = copy.deepcopy(able)
    assert again == able
    assert again.placement.ends == (8, 8)
    assert Capabilities().placement == PLAIN_PLACEMENT


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"ends": (9, 8)}, r"ends is \(9, 8\); give bits"),
        ({"ends": (32, 8)}, "give bits"),
        ({"ends": 8}, "give bits"),
        ({"ends": (True, 8)}, "give bits"),
        ({"shared_grids": ("mul",)}, "shared_grids names 'mul'; operands of add and cat"),
        ({"floats": "add"}, "floats has to list names of operators, got 'add'"),
        ({"fuses": (1,)}, "fuses has to list names"),
        ({"floats": ("Add",), "shared_grids": ("add",)}, "'add' cannot run in floating point and on integers"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(TargetError, match=reason):
        Placement(**options)
