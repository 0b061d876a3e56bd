"""Quantize: what it is calibrated on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import fx, nn
from torch.utils.data import DataLoader, TensorDataset

from fxopt.errors import DataError
from fxopt.graph import trace
from fxopt.graph.fake_quantize import ActivationQuantizer, QuantizedLayer
from fxopt.passes import FoldBatchNorm, Quantize
from fxopt.passes.quantize import CALIBRATION_META
from tests.passes.quantizing import (
    IMAGE,
    conv,
    graph_of,
    quantized,
)
from tests.strategies import Cnn, Transformer, networks, traced

# What it is calibrated on.


def scales(gm: fx.GraphModule) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in gm.state_dict().items()
        if name.endswith(".scale") and "quantizers" in name
    }


def test_every_form_of_loader_gives_the_same_ranges() -> None:
    gm = graph_of(lambda s, x: s.b(torch.relu(s.a(x))), a=conv(), b=conv())
    x, labels = torch.randn(6, 3, 8, 8), torch.arange(6)
    loaders: list[Any] = [
        x,
        (x, labels),
        [x],
        [x[:2], x[2:]],
        [(x, labels)],
        [[x, labels]],
        [{"x": x, "label": labels}],
        [((x,), {})],
        iter([x[:5], x[5:]]),
        DataLoader(TensorDataset(x, labels), batch_size=4),
    ]
    found = [scales(quantized(gm, calibration=loader)) for loader in loaders]
    assert len(found[0]) == 3
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-6)


def test_the_range_is_that_of_all_values_seen() -> None:
    gm = graph_of(lambda s, x: s.a(x), a=conv())
    x = torch.randn(9, 3, 8, 8)
    result = quantized(gm, calibration=[x[:4], x[4:]])
    quantizer = result.get_submodule("quantizers.x")
    assert float(quantizer.minimum) == float(x.min())
    assert float(quantizer.maximum) == float(x.max())
    expected = (float(x.max()) - float(x.min())) / 255
    assert float(quantizer.scale) == pytest.approx(expected, rel=1e-6)
    assert float(result.get_submodule("quantizers.a").maximum) == pytest.approx(float(gm(x).detach().max()), rel=1e-5)


def test_max_batches_stops_reading() -> None:
    gm = graph_of(lambda s, x: s.a(x), a=conv())
    loader = iter([torch.randn(IMAGE) for _ in range(5)])
    meta = quantized(gm, calibration=loader, max_batches=2).meta[CALIBRATION_META]
    assert meta == {"source": "loader", "batches": 2, "samples": 4}
    assert len(list(loader)) >= 2


def test_without_data_a_synthetic_batch_is_used_and_named() -> None:
    gm = graph_of(lambda s, x: s.a(x), a=conv())
    one, same, other = (quantized(gm, seed=seed) for seed in (0, 0, 1))
    assert one.meta[CALIBRATION_META]["source"] == "synthetic: standard normal, seed 0"
    assert scales(one) == scales(same)
    assert scales(one) != scales(other)
    assert CALIBRATION_META not in gm.meta


def test_without_data_ranges_follow_from_batch_norms() -> None:
    norm = nn.BatchNorm2d(4)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 2.0, 0.5, 1.0]))
        norm.bias.copy_(torch.tensor([0.0, 30.0, 0.0, -5.0]))
    gm = graph_of(lambda s, x: s.b(torch.relu(s.n(s.a(x)))), a=conv(3, 4), n=norm, b=conv(4, 4))
    result = quantized(FoldBatchNorm()(gm).graph_module)
    assert result.meta[CALIBRATION_META]["source"].endswith("outputs of 1 layers as their batch norms say")
    # The largest of some thousand values with mean 30 and standard deviation 2.
    assert 34.0 < float(result.get_submodule("quantizers.relu").maximum) < 42.0
    assert not result.get_submodule("a")._forward_hooks


def test_models_of_several_inputs_are_calibrated() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.f = nn.Embedding(5, 4), nn.Linear(4, 2)

        def forward(self, tokens: torch.Tensor, *, weight: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"y": self.f(self.embed(tokens) * weight)}

    example = ((torch.zeros(2, 3, dtype=torch.long),), {"weight": torch.ones(2, 3, 1)})
    gm = trace(Two().eval(), example)
    tokens, weight = torch.randint(0, 5, (4, 3)), torch.rand(4, 3, 1)
    results = [
        quantized(gm, calibration=[((tokens,), {"weight": weight})]),
        quantized(gm, calibration=[{"weight": weight, "tokens": tokens, "label": tokens}]),
    ]
    assert scales(results[0]) == scales(results[1])
    assert quantized(gm).meta[CALIBRATION_META]["source"].startswith("synthetic")
    with pytest.raises(DataError, match="no value for the input 'weight'"):
        Quantize(calibration=[tokens])(gm)


def test_the_quantized_graph_computes_nearly_the_same() -> None:
    gm = graph_of(
        lambda s, x: s.f(s.p(s.b(torch.relu(s.a(x)))).flatten(1)),
        a=conv(3, 16),
        b=conv(16, 16),
        p=nn.AdaptiveAvgPool2d(1),
        f=nn.Linear(16, 5),
    )
    x = torch.randn(32, 3, 8, 8)
    result = quantized(gm, calibration=x)
    with torch.no_grad():
        gap = (result(x) - gm(x)).abs().max() / gm(x).abs().max()
    assert 0.0 < float(gap) < 0.05


def test_constant_values_and_channels_of_zeros_work() -> None:
    gm = graph_of(lambda s, x: s.b(torch.relu(s.a(x) - 100.0)), a=conv(), b=conv())
    with torch.no_grad():
        gm.get_submodule("b").weight[1] = 0.0
    result = quantized(gm, calibration=torch.zeros(4, 3, 8, 8))
    x = torch.zeros(IMAGE)
    torch.testing.assert_close(result(x), gm(x), rtol=1e-2, atol=1e-2)


@settings(max_examples=5)
@given(networks())
def test_random_networks_quantize_and_run(network: Cnn | Transformer) -> None:
    gm, example = traced(network)
    folded = FoldBatchNorm()(gm).graph_module
    result = quantized(folded)
    layers = [d.site for d in Quantize().search_space(folded) if d.operator != "matmul"]
    assert layers
    for site in layers:
        assert isinstance(result.get_submodule(site), QuantizedLayer)
    for node in result.graph.nodes:
        if node.op == "call_module" and str(node.target) in layers:
            held = node.args[0]
            while held.op == "call_module" and isinstance(result.get_submodule(held.target), nn.Dropout):
                held = held.args[0]
            assert isinstance(result.get_submodule(str(held.target)), ActivationQuantizer)
    with torch.no_grad():
        expected, found = gm(example), result(example)
    assert np.isfinite(found.numpy()).all()
    assert float((found - expected).abs().max()) < 0.5 * float(expected.abs().max()) + 0.1
