"""Rows and solutions of least squares: what numpy finds from the raw rows, layer by layer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fxopt.passes._least_squares import (
    Moments,
    groups_of,
    input_rows,
    is_linear,
    output_rows,
    positions_of,
)

LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "pointwise": (nn.Conv2d(5, 4, 1), (3, 5, 4, 6)),
    "3x3": (nn.Conv2d(3, 4, 3, padding=1), (2, 3, 5, 6)),
    "strided, dilated": (nn.Conv2d(2, 3, (3, 2), (2, 3), (1, 2), (1, 2)), (2, 2, 7, 9)),
    "same, circular": (nn.Conv2d(2, 3, (2, 3), padding="same", padding_mode="circular"), (2, 2, 5, 6)),
    "reflect": (nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), (2, 2, 5, 6)),
    "grouped": (nn.Conv2d(6, 4, 3, groups=2, padding=1), (2, 6, 5, 5)),
    "depthwise": (nn.Conv2d(4, 8, 3, groups=4, stride=2), (2, 4, 7, 7)),
    "1-d": (nn.Conv1d(3, 4, 5, padding=2, stride=2), (2, 3, 9)),
    "3-d": (nn.Conv3d(2, 3, (1, 3, 2), padding=(0, 1, 1)), (2, 2, 3, 4, 5)),
    "linear": (nn.Linear(5, 4), (6, 5)),
    "tokens": (nn.Linear(5, 4), (2, 7, 5)),
    "grid of tokens": (nn.Linear(5, 4), (2, 3, 4, 5)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_its_weights_times_its_rows(name: str) -> None:
    layer: Any = LAYERS[name][0].double()
    x = torch.randn(LAYERS[name][1], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        y = layer(x)
    assert is_linear(layer)
    positions = torch.randperm(positions_of(layer, y))[:5]
    rows = input_rows(layer, x, positions)
    weight = layer.weight.detach().flatten(1).unflatten(0, (groups_of(layer), -1))
    found = (rows @ weight.transpose(1, 2)).transpose(0, 1).flatten(1) + layer.bias.detach()
    torch.testing.assert_close(found, output_rows(layer, y, positions))


def test_other_layers_are_not_taken_for_linear() -> None:
    class Scaled(nn.Linear):
        """Computes something else than its parent."""

    assert not is_linear(nn.ConvTranspose2d(2, 2, 3))
    assert not is_linear(Scaled(2, 2))
    assert not is_linear(nn.Embedding(2, 2))


def least_squares(rows: np.ndarray[Any, Any], wanted: np.ndarray[Any, Any], offset: bool) -> np.ndarray[Any, Any]:
    """numpy's solution from raw rows, (outputs, unknowns)."""
    given = np.concatenate([rows, np.ones((len(rows), 1))], 1) if offset else rows
    found: np.ndarray[Any, Any] = np.linalg.lstsq(given, wanted, rcond=None)[0][: rows.shape[1]].T
    return found


@pytest.mark.parametrize("offset", [True, False])
@pytest.mark.parametrize("groups", [1, 3])
def test_the_solution_is_that_of_numpy(groups: int, offset: bool) -> None:
    rng = np.random.default_rng(groups)
    rows = rng.normal(0.5, 1.0, (groups, 200, 6))
    wanted = rng.normal(1.0, 1.0, (200, groups * 4)) + np.concatenate([one[:, :4] for one in rows], 1)
    parts = [
        Moments.of(torch.from_numpy(rows[:, at]), torch.from_numpy(wanted[at])) for at in (slice(90), slice(90, 200))
    ]
    moments = parts[0] + parts[1]
    start = torch.from_numpy(rng.normal(size=(groups, 4, 6)))
    found = moments.fit(start, 0.0, offset)[0].numpy()
    for group in range(groups):
        oracle = least_squares(rows[group], wanted[:, 4 * group : 4 * group + 4], offset)
        np.testing.assert_allclose(found[group], oracle, rtol=0, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(1, 12),
    unknowns=st.integers(1, 8),
    ridge=st.sampled_from([0.0, 1e-6, 1e-3, 1.0, 100.0]),
    dead=st.booleans(),
)
def test_no_ridge_makes_the_error_larger(seed: int, rows: int, unknowns: int, ridge: float, dead: bool) -> None:
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(rng.normal(size=(1, rows, unknowns)))
    if dead:
        x[:, :, 0] = 0.0
    y = torch.from_numpy(rng.normal(size=(rows, 3)))
    start = torch.from_numpy(rng.normal(size=(1, 3, unknowns)))
    moments = Moments.of(x, y)
    found, _ = moments.fit(start, ridge, False)

    def error(weight: torch.Tensor) -> float:
        return float(((x[0] @ weight[0].T - y) ** 2).sum())

    assert bool(torch.isfinite(found).all())
    assert error(found) <= error(start) * (1 + 1e-9) + 1e-12


def test_inputs_that_are_always_zero_change_nothing() -> None:
    moments = Moments.of(torch.zeros(1, 5, 3, dtype=torch.float64), torch.ones(5, 2))
    start = torch.randn(1, 2, 3, dtype=torch.float64)
    assert torch.equal(moments.fit(start, 1e-3, True)[0], start)


def test_moments_without_outputs_say_so() -> None:
    with pytest.raises(ValueError, match="inputs alone"):
        Moments.of(torch.ones(1, 5, 3).double()).fit(torch.ones(1, 2, 3).double(), 0.0, False)


@pytest.mark.parametrize("groups", [1, 2])
def test_a_part_of_the_moments_is_that_of_the_rows(groups: int) -> None:
    generator = torch.Generator().manual_seed(groups)
    x = torch.randn(groups, 30, 4, generator=generator, dtype=torch.float64)
    weight = torch.randn(groups, 3, 4, generator=generator, dtype=torch.float64)
    bias = torch.randn(groups * 3, generator=generator, dtype=torch.float64)
    y = (x @ weight.transpose(1, 2)).transpose(0, 1).flatten(1) + bias
    unknowns = torch.tensor([0, 2, 3])
    outputs = torch.tensor([first + 3 * group for group in range(groups) for first in (0, 2)])
    found = Moments.of(x).with_outputs(weight, bias).part(unknowns, outputs)
    wanted = Moments.of(x[:, :, unknowns], y[:, outputs])
    for name in ("x", "xx", "y", "xy"):
        torch.testing.assert_close(getattr(found, name), getattr(wanted, name))


@pytest.mark.parametrize(("groups", "biased"), [(1, False), (1, True), (3, False), (3, True)])
@pytest.mark.parametrize("offset", [True, False])
@pytest.mark.parametrize("kept", [1, 5, 11, 12])
@pytest.mark.parametrize("ridge", [0.0, 1e-3])
def test_a_refit_is_the_fit_of_the_part(groups: int, biased: bool, offset: bool, kept: int, ridge: float) -> None:
    generator = torch.Generator().manual_seed(kept)
    x = torch.randn(groups, 60, 12, generator=generator, dtype=torch.float64) + 0.5
    weight = torch.randn(groups, 7, 12, generator=generator, dtype=torch.float64)
    bias = torch.randn(groups * 7, generator=generator, dtype=torch.float64) if biased else None
    unknowns = torch.randperm(12, generator=generator)[:kept].sort().values
    outputs = torch.tensor([first + 7 * group for group in range(groups) for first in (0, 1, 2, 4, 6)])
    moments = Moments.of(x).with_outputs(weight, bias)
    own = weight[:, [0, 1, 2, 4, 6]][:, :, unknowns]
    for start in (own, own + 0.1):
        wanted = moments.part(unknowns, outputs).fit(start, ridge, offset)
        found = moments.refit(unknowns, outputs, start, ridge, offset)
        for mine, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-9)


def test_a_refit_of_dead_inputs_keeps_the_weights() -> None:
    weight = torch.randn(1, 2, 4, dtype=torch.float64)
    moments = Moments.of(torch.zeros(1, 5, 4, dtype=torch.float64)).with_outputs(weight, None)
    unknowns = torch.tensor([0, 1, 3])
    own = weight[:, :, unknowns]
    assert torch.equal(moments.refit(unknowns, torch.arange(2), own, 1e-3, False)[0], own)
