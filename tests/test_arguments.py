"""What people hand to the one call, resolved."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fxopt import _storage, passes, targets
from fxopt._arguments import careful, resolve_passes
from fxopt.decisions import Placement
from fxopt.passes import Quantize


@pytest.mark.parametrize("named", ["quantize", ("quantize",), ("prune-channels", "quantize")])
def test_quantize_by_name_is_careful_where_bits_are_few(named: Any) -> None:
    found = careful(resolve_passes(named), named, targets.load("bitfusion"))[-1]
    assert isinstance(found, Quantize)
    assert (found.rounding, found.weights.method, found.activations.method) == (True, "mse", "mse")


@pytest.mark.parametrize(
    ("named", "target"),
    [
        (("quantize",), "pixel1"),
        (Quantize(), "bitfusion"),
        ((Quantize(),), "bitfusion"),
        ("prune-channels", "bitfusion"),
    ],
)
def test_it_is_as_configured_elsewhere(named: Any, target: str) -> None:
    passes = resolve_passes(named)
    assert careful(passes, named, targets.load(target)) == passes


def test_values_are_quantized_where_the_target_says_unless_the_pass_does() -> None:
    target = targets.load("stm32h743-tflm")
    (told, own) = (careful((one,), (one,), target)[0] for one in (Quantize(), Quantize(placement=Placement())))
    assert isinstance(told, Quantize)
    assert told.placement == target.capabilities.placement
    assert isinstance(own, Quantize)
    assert own.placement == Placement()


def test_a_placement_is_saved_with_the_options_of_its_pass() -> None:
    step = Quantize(placement=Placement(ends=(8, 8), floats=("mul",), shared_grids=("add",)))
    assert passes.create("quantize", **json.loads(json.dumps(_storage._options(step)))) == step
