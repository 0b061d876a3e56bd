"""RoundWeights: nearer outputs than rounding to the nearest, on the grid, with the mean of the float graph."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import fx, nn

from fxopt.decisions import Policy
from fxopt.errors import DataError, PassError
from fxopt.graph import trace
from fxopt.graph.fake_quantize import QuantizedLayer, WeightQuantizer, WeightScheme
from fxopt.passes import FoldBatchNorm, Quantize, RoundWeights
from fxopt.passes._rounding import _damped, _rounded
from fxopt.testing import PassConformance


class TestRoundWeights(PassConformance):
    pass_type = RoundWeights
    first: ClassVar = (FoldBatchNorm(), Quantize())


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(12, 12, 3, padding=1, groups=12),
        nn.ReLU(),
        nn.Conv2d(12, 8, 1, bias=False),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    ).eval()


def images(count: int = 64) -> torch.Tensor:
    mix = torch.randn(3, 3, generator=torch.Generator().manual_seed(3))
    return torch.einsum("bchw,cd->bdhw", torch.randn(count, 3, 6, 6, generator=torch.Generator().manual_seed(4)), mix)


def graphs(bits: tuple[int, int], **options: Any) -> tuple[fx.GraphModule, fx.GraphModule]:
    """A float graph and the same quantized."""
    gm = trace(network(), images(2))
    policy = Policy({("bits", decision.site): bits for decision in Quantize().search_space(gm)})
    return gm, Quantize(policy, calibration=images(), **options)(gm).graph_module


def error(one: fx.GraphModule, other: fx.GraphModule) -> float:
    with torch.no_grad():
        return float((one(images()) - other(images())).square().sum())


@pytest.mark.parametrize("bits", [(4, 8), (3, 8), (2, 8), (4, 4)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_outputs_are_nearer_than_by_rounding_to_the_nearest(bits: tuple[int, int], symmetric: bool) -> None:
    gm, quantized = graphs(bits, weights=WeightScheme("mse", symmetric=symmetric))
    rounded = RoundWeights(calibration=[images(40)[:20], images(40)[20:]])(quantized).graph_module
    assert error(gm, rounded) < 0.8 * error(gm, quantized)


def test_weights_lie_on_their_grid_and_the_given_graph_is_left_alone() -> None:
    _, quantized = graphs((3, 8))
    before = {name: tensor.clone() for name, tensor in quantized.state_dict().items()}
    rounded = RoundWeights(calibration=images())(quantized).graph_module
    for module in rounded.modules():
        if isinstance(module, QuantizedLayer):
            with torch.no_grad():
                torch.testing.assert_close(module.quantized_weight(), module.weight, rtol=1e-5, atol=1e-7)
    after = quantized.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_mean_output_is_that_of_the_float_graph() -> None:
    gm, quantized = graphs((2, 8))
    rounded = RoundWeights(calibration=images(), rows=10**6)(quantized).graph_module
    with torch.no_grad():
        gaps = [(one(images()).mean(0) - gm(images()).mean(0)).abs().max() for one in (quantized, rounded)]
    assert float(gaps[1]) < 1e-4 < float(gaps[0])


def test_no_integer_alone_could_be_better() -> None:
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(5, 5, generator=generator, dtype=torch.float64)
    second = _damped((mix @ mix.T)[None], 1e-3)
    weight = torch.randn(1, 6, 5, generator=generator, dtype=torch.float64)
    quantizer = WeightQuantizer(3, 6)
    quantizer.calibrate(weight[0].float())
    found = _rounded(weight, second, quantizer)

    def loss(candidate: torch.Tensor) -> torch.Tensor:
        gap = candidate - weight
        return ((gap @ second) * gap).sum(2)[0]

    scale = quantizer.scale.double()[None, :, None]
    nearest = torch.round(weight / scale).clamp(-3, 3) * scale
    assert bool((loss(found) <= loss(nearest) + 1e-9).all())
    assert float(loss(found).sum()) < float(loss(nearest).sum())
    for column in range(5):
        for step in (-1, 1):
            other = found.clone()
            other[:, :, column] = ((found[:, :, column] / scale[:, :, 0]).round() + step).clamp(-3, 3) * scale[:, :, 0]
            assert bool((loss(found) <= loss(other) + 1e-9).all())


def test_inputs_that_are_dead_and_channels_of_zeros_stay_finite() -> None:
    model = network()
    with torch.no_grad():
        model[0].weight[2] = 0.0
        model[0].bias[2] = -1.0
        model[2].weight[5] = 0.0
    gm = trace(model, images(2))
    quantized = Quantize(calibration=images())(gm).graph_module
    rounded = RoundWeights(calibration=images())(quantized).graph_module
    assert error(gm, rounded) < 0.01 * float(gm(images()).detach().square().sum())


def test_what_has_no_grid_to_round_to_is_left() -> None:
    for options in ({"bits": (1, 8)}, {"bits": (4, 8), "weights": WeightScheme("kmeans")}):
        assert not RoundWeights(calibration=images())(graphs(**options)[1]).modified  # type: ignore[arg-type]
    assert not RoundWeights()(trace(network(), images(2))).modified


def test_bad_data_and_options_are_refused() -> None:
    _, quantized = graphs((4, 8))
    with pytest.raises(DataError, match="no batch"):
        RoundWeights(calibration=[])(quantized)
    with pytest.raises(DataError, match="NaN"):
        RoundWeights(calibration=torch.full((2, 3, 6, 6), float("nan")))(quantized)
    for options in ({"samples": 0}, {"rows": 0}, {"most_unknowns": 0}, {"most_bits": 0}, {"ridge": -1.0}):
        with pytest.raises(PassError, match="at least 1"):
            RoundWeights(**options)(quantized)  # type: ignore[arg-type]


def test_layers_of_more_bits_are_left() -> None:
    _, quantized = graphs((8, 8))
    assert RoundWeights(images())(quantized).modified
    assert not RoundWeights(images(), most_bits=7)(quantized).modified
