"""Codebooks: k-means, what the layer computes, and gradients by cluster."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import nn

from fxopt.errors import PassError
from fxopt.graph.fake_quantize import CodebookQuantizer, WeightQuantizer, WeightScheme, quantize_layer

WEIGHTS = hnp.arrays(np.float32, (4, 10), elements=st.floats(-10.0, 10.0, width=32))


@given(WEIGHTS, st.integers(1, 8))
def test_every_number_takes_the_nearest_value(weight: np.ndarray, bits: int) -> None:
    values = torch.from_numpy(weight)
    quantizer = CodebookQuantizer(bits, values.shape)
    quantizer.calibrate(values)
    codebook = quantizer.codebook.detach().numpy()
    assert len(codebook) == min(2**bits, weight.size)
    held = quantizer(values).detach().numpy()
    np.testing.assert_array_equal(held, codebook[quantizer.labels.numpy()])
    nearest = np.abs(weight[..., None] - codebook).min(-1)
    np.testing.assert_allclose(np.abs(weight - held), nearest, atol=1e-5)


@given(WEIGHTS, st.integers(2, 6))
def test_means_are_nearer_than_the_equal_distances_they_start_from(weight: np.ndarray, bits: int) -> None:
    values = torch.from_numpy(weight)
    quantizer = CodebookQuantizer(bits, values.shape)
    quantizer.calibrate(values)
    even = np.linspace(weight.min(), weight.max(), len(quantizer.codebook))
    before = np.abs(weight[..., None] - even).min(-1)
    after = np.abs(weight - quantizer(values).detach().numpy())
    assert (after**2).sum() <= (before**2).sum() * 1.001 + 1e-6


def test_a_codebook_is_nearer_than_a_grid_of_as_many_values() -> None:
    weight = torch.randn(32, 32, generator=torch.Generator().manual_seed(0)) ** 3
    book = CodebookQuantizer(4, weight.shape)
    grid = WeightQuantizer(4, 32, 0, WeightScheme("mse", per_channel=False))
    for quantizer in (book, grid):
        quantizer.calibrate(weight)
    errors = [float((quantizer(weight).detach() - weight).square().sum()) for quantizer in (book, grid)]
    assert errors[0] < errors[1]


@pytest.mark.parametrize("gradient", ["sum", "mean"])
def test_the_gradient_of_a_value_is_that_of_all_who_take_it(gradient: str) -> None:
    weight = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    quantizer = CodebookQuantizer(2, weight.shape, gradient)  # type: ignore[arg-type]
    quantizer.calibrate(weight)
    incoming = torch.randn(6, 5)
    quantizer(weight).backward(incoming)
    assert quantizer.codebook.grad is not None
    for label in range(4):
        mine = incoming[quantizer.labels == label]
        expected = mine.sum() if gradient == "sum" else mine.mean()
        assert float(quantizer.codebook.grad[label]) == pytest.approx(float(expected), rel=1e-5)


def test_training_moves_the_values_and_keeps_who_takes_them() -> None:
    torch.manual_seed(0)
    layer = quantize_layer(nn.Linear(8, 4).train(), 3, scheme=WeightScheme("kmeans"))
    labels = layer.weight_quantizer.labels.clone()
    x, y = torch.randn(64, 8), torch.randn(64, 4)
    optimizer = torch.optim.SGD(layer.weight_quantizer.parameters(), lr=0.02)
    losses = []
    for _ in range(30):
        loss = nn.functional.mse_loss(layer(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert torch.equal(layer.weight_quantizer.labels, labels)
    torch.testing.assert_close(layer.eval().baked()(x), layer(x))


def test_options_out_of_range_are_refused() -> None:
    with pytest.raises(PassError, match="'sum' or a 'mean'"):
        CodebookQuantizer(4, torch.Size((2, 2)), "most")  # type: ignore[arg-type]
    with pytest.raises(PassError, match="1 to 8 bits"):
        CodebookQuantizer(9, torch.Size((2, 2)))
