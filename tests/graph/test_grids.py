"""Grids against a NumPy oracle of the integers, for every scheme; and the ranges that are chosen."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fxopt.errors import PassError
from fxopt.graph.fake_quantize import ActivationQuantizer, WeightQuantizer
from fxopt.graph.grids import ActivationScheme, Histogram, WeightScheme, affine, weight_scales

FLOATS = st.floats(-100.0, 100.0, width=32)
MATRICES = hnp.arrays(np.float32, (3, 8), elements=FLOATS)
BITS = st.integers(1, 8)
METHODS = st.sampled_from(["max", "percentile", "mse"])
WEIGHT_SCHEMES = st.builds(
    WeightScheme,
    method=METHODS,
    per_channel=st.booleans(),
    symmetric=st.booleans(),
    narrow=st.booleans(),
    power_of_two=st.booleans(),
) | st.builds(WeightScheme, method=st.just("kl"), per_channel=st.just(False), symmetric=st.booleans())
ACTIVATION_SCHEMES = st.builds(
    ActivationScheme,
    method=st.sampled_from(["max", "percentile", "mse", "kl"]),
    symmetric=st.booleans(),
    power_of_two=st.booleans(),
)


def is_power_of_two(values: np.ndarray) -> bool:
    return bool((np.frexp(values)[0] == 0.5).all())


@given(MATRICES, BITS, WEIGHT_SCHEMES)
def test_weights_equal_their_integers_on_every_grid(weight: np.ndarray, bits: int, scheme: WeightScheme) -> None:
    quantizer = WeightQuantizer(bits, 3, 0, scheme)
    quantizer.calibrate(torch.from_numpy(weight))
    scale = quantizer.scale.numpy()[:, None]
    zero = 0 if quantizer.zero_point is None else quantizer.zero_point.numpy()[:, None]
    least, largest = scheme.bounds(bits)
    if bits == 1 and scheme.symmetric:
        expected = np.where(weight >= 0, 1, -1)
    else:
        expected = np.clip(np.rint(weight / scale) + zero, least, largest)
    integers = quantizer.integers(torch.from_numpy(weight)).numpy()
    np.testing.assert_array_equal(integers, expected)
    held = ((integers.astype(np.float32) - zero) * scale).astype(np.float32)
    np.testing.assert_array_equal(quantizer(torch.from_numpy(weight)).numpy(), held)
    assert scheme.per_channel or np.all(scale == scale[0])
    assert not scheme.power_of_two or (bits == 1 and scheme.symmetric) or is_power_of_two(scale)
    assert len(np.unique(integers)) <= 2**bits


@given(MATRICES, MATRICES, BITS, ACTIVATION_SCHEMES)
def test_activations_equal_their_integers_on_every_grid(
    seen: np.ndarray, values: np.ndarray, bits: int, scheme: ActivationScheme
) -> None:
    quantizer = ActivationQuantizer(bits, scheme)
    quantizer.observe(torch.from_numpy(seen))
    quantizer.settle()
    scale, zero = quantizer.scale.numpy(), int(quantizer.zero_point)
    expected = np.clip(np.rint(values / scale) + zero, 0, 2**bits - 1)
    np.testing.assert_array_equal(quantizer.integers(torch.from_numpy(values)).numpy(), expected)
    held = ((expected - zero) * scale).astype(np.float32)
    np.testing.assert_array_equal(quantizer(torch.from_numpy(values)).numpy(), held)
    assert not scheme.power_of_two or is_power_of_two(scale)
    assert not scheme.symmetric or zero == (2 ** (bits - 1) if seen.min() < 0 else 0)
    assert float(quantizer(torch.zeros(1))) == 0.0


@pytest.mark.parametrize(
    ("scheme", "bits", "bounds"),
    [
        (WeightScheme(), 8, (-127, 127)),
        (WeightScheme(), 2, (-1, 1)),
        (WeightScheme(), 1, (-1, 1)),
        (WeightScheme(narrow=False), 8, (-128, 127)),
        (WeightScheme(narrow=False), 2, (-2, 1)),
        (WeightScheme(symmetric=False), 8, (-128, 127)),
        (WeightScheme(symmetric=False), 1, (-1, 0)),
        (ActivationScheme(), 4, (0, 15)),
    ],
)
def test_the_integers_of_a_grid(scheme: Any, bits: int, bounds: tuple[int, int]) -> None:
    assert scheme.bounds(bits) == bounds


@given(hnp.arrays(np.float32, (2, 40), elements=FLOATS), st.integers(2, 8), st.booleans(), st.booleans())
def test_mse_is_never_further_than_max(weight: np.ndarray, bits: int, symmetric: bool, power: bool) -> None:
    values = torch.from_numpy(weight)
    errors = {}
    for method in ("max", "mse"):
        scheme = WeightScheme(method, symmetric=symmetric, power_of_two=power)  # type: ignore[arg-type]
        quantizer = WeightQuantizer(bits, 2, 0, scheme)
        quantizer.calibrate(values)
        errors[method] = (quantizer(values) - values).square().sum(1)
    assert bool((errors["mse"] <= errors["max"] * 1.0001 + 1e-9).all())


def test_ternary_by_least_error_is_nearly_the_best_there_is() -> None:
    values = torch.randn(1, 2000, generator=torch.Generator().manual_seed(0))
    scale, _ = weight_scales(values, 2, WeightScheme("mse"))
    tried = torch.linspace(0.2, 3.0, 400)
    errors = [(torch.round(values / one).clamp(-1, 1) * one - values).square().sum() for one in tried]
    best = float(torch.stack(errors).min())
    found = float((torch.round(values / scale).clamp(-1, 1) * scale - values).square().sum())
    assert found <= 1.02 * best


def test_binary_scale_is_the_best_there_is() -> None:
    values = torch.randn(1, 100, generator=torch.Generator().manual_seed(0))
    scale, _ = weight_scales(values, 1, WeightScheme())
    error = ((values.sign() * scale) - values).square().sum()
    for factor in (0.95, 1.05):
        assert ((values.sign() * scale * factor) - values).square().sum() > error


@pytest.mark.parametrize("method", ["percentile", "mse", "kl"])
def test_an_outlier_does_not_stretch_a_chosen_range(method: Any) -> None:
    values = torch.randn(50_000, generator=torch.Generator().manual_seed(1)).relu()
    values[7] = 40.0
    quantizers = [ActivationQuantizer(4, ActivationScheme(one)) for one in ("max", method)]
    for quantizer in quantizers:
        quantizer.observe(values)
        quantizer.settle()
    assert float(quantizers[0].scale) == pytest.approx(40.0 / 15, rel=1e-5)
    assert float(quantizers[1].scale) < 1.0
    assert float(quantizers[0].maximum) == float(quantizers[1].maximum) == 40.0


def test_a_histogram_does_not_depend_on_the_order_of_ranges() -> None:
    small, large = torch.linspace(-1.0, 1.0, 1000), torch.linspace(-64.0, 8.0, 1000)
    one, other = Histogram(), Histogram()
    for values in (small, large):
        one.add(values)
    other.add(torch.cat([small, large]))
    assert float(one.counts.sum()) == float(other.counts.sum()) == 2000.0
    found = [histogram.range(4, ActivationScheme("mse")) for histogram in (one, other)]
    assert found[0] == pytest.approx(found[1], rel=0.1)


def test_an_empty_range_has_scale_one() -> None:
    zero = torch.zeros(3)
    for scheme in (WeightScheme(), WeightScheme(symmetric=False), ActivationScheme(), ActivationScheme("mse")):
        scale, offset = affine(zero, zero, 4, scheme)
        assert scale.tolist() == [1.0] * 3
        assert (0.0 - offset + offset).tolist() == [0.0] * 3
    quantizer = ActivationQuantizer(4, ActivationScheme("kl"))
    quantizer.observe(torch.zeros(9))
    quantizer.settle()
    assert float(quantizer.scale) == 1.0


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: WeightScheme("best"), "no way 'best'"),  # type: ignore[arg-type]
        (lambda: ActivationScheme("kmeans"), "no way 'kmeans'"),  # type: ignore[arg-type]
        (lambda: WeightScheme(percentile=20.0), "percentile is 20"),
        (lambda: WeightScheme("kl"), "per_channel=False"),
    ],
)
def test_options_out_of_range_are_refused(build: Any, match: str) -> None:
    with pytest.raises(PassError, match=match):
        build()
