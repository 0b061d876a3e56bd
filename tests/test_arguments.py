"""What people hand to the one call, resolved."""

from __future__ import annotations

from typing import Any

import pytest

from fxopt import targets
from fxopt._arguments import careful, resolve_passes
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
