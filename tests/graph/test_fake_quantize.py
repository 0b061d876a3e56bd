"""Fake quantization against a NumPy oracle of the integers, its gradients, and the layers made of it."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import nn

from fxopt.errors import DataError, PassError
from fxopt.graph import ops, trace
from fxopt.graph.fake_quantize import (
    QUANTIZED_LAYERS,
    ActivationQuantizer,
    ActivationScheme,
    QuantConv2d,
    QuantLinear,
    WeightQuantizer,
    WeightScheme,
    learn_scales,
    observing,
    quantize_layer,
)

FLOATS = st.floats(-100.0, 100.0, width=32)
VECTORS = hnp.arrays(np.float32, st.integers(1, 40), elements=FLOATS)
BITS = st.integers(1, 8)


def quantized_integers(x: np.ndarray, scale: np.float32, zero: int, largest: int) -> np.ndarray:
    """ONNX's QuantizeLinear, written out."""
    return np.clip(np.rint(x / scale) + zero, 0, largest)


def calibrated(values: np.ndarray, bits: int) -> ActivationQuantizer:
    quantizer = ActivationQuantizer(bits)
    quantizer.observe(torch.from_numpy(values))
    quantizer.settle()
    return quantizer


@given(VECTORS, VECTORS, BITS)
def test_activations_equal_their_integers(seen: np.ndarray, values: np.ndarray, bits: int) -> None:
    quantizer = calibrated(seen, bits)
    scale, zero = quantizer.scale.numpy(), int(quantizer.zero_point)
    expected = quantized_integers(values, scale, zero, 2**bits - 1)
    np.testing.assert_array_equal(quantizer.integers(torch.from_numpy(values)).numpy(), expected)
    held = ((expected - zero) * scale).astype(np.float32)
    np.testing.assert_array_equal(quantizer(torch.from_numpy(values)).numpy(), held)


@given(VECTORS, BITS)
def test_what_was_seen_is_within_half_a_step(seen: np.ndarray, bits: int) -> None:
    quantizer = calibrated(seen, bits)
    gap = (quantizer(torch.from_numpy(seen)) - torch.from_numpy(seen)).abs().max()
    # The zero point is rounded as well, which shifts the grid by up to half a step more.
    assert float(gap) <= float(quantizer.scale) * 1.001 + 1e-6
    assert float(quantizer(torch.zeros(1))) == 0.0


@given(VECTORS, BITS)
def test_quantizing_twice_is_quantizing_once(seen: np.ndarray, bits: int) -> None:
    quantizer = calibrated(seen, bits)
    once = quantizer(torch.from_numpy(seen))
    torch.testing.assert_close(quantizer(once), once, rtol=0.0, atol=0.0)


@given(hnp.arrays(np.float32, (3, 4, 2), elements=FLOATS), st.integers(2, 8), st.sampled_from([0, 1]))
def test_weights_equal_their_integers(weight: np.ndarray, bits: int, axis: int) -> None:
    quantizer = WeightQuantizer(bits, weight.shape[axis], axis)
    quantizer.calibrate(torch.from_numpy(weight))
    largest = 2 ** (bits - 1) - 1
    reach = np.abs(weight).max(axis=tuple(i for i in range(3) if i != axis))
    scale = np.where(reach > 0, np.maximum(reach / np.float32(largest), 2.0**-60), 1.0).astype(np.float32)
    np.testing.assert_allclose(quantizer.scale.numpy(), scale, rtol=1e-6)
    spread = quantizer.scale.numpy().reshape([-1 if i == axis else 1 for i in range(3)])
    expected = np.clip(np.rint(weight / spread), -largest, largest)
    np.testing.assert_array_equal(quantizer.integers(torch.from_numpy(weight)).numpy(), expected)
    np.testing.assert_array_equal(quantizer(torch.from_numpy(weight)).numpy(), (expected * spread).astype(np.float32))


def test_eight_bit_weights_use_127_and_never_minus_128() -> None:
    quantizer = WeightQuantizer(8, 1)
    weight = torch.linspace(-2.0, 2.0, 1001)[None]
    quantizer.calibrate(weight)
    integers = quantizer.integers(weight)
    assert (int(integers.min()), int(integers.max())) == (-127, 127)


def test_one_bit_weights_are_signs_of_the_mean_size() -> None:
    quantizer = WeightQuantizer(1, 2)
    weight = torch.tensor([[1.0, -3.0], [0.0, 0.0]])
    quantizer.calibrate(weight)
    assert quantizer(weight).tolist() == [[2.0, -2.0], [1.0, 1.0]]
    assert quantizer.integers(weight).tolist() == [[1, -1], [1, 1]]


@pytest.mark.parametrize("values", [[0.0, 0.0], [3.0, 3.0], [-3.0, -3.0], [1e-30, 1e-30], [0.0, 3e38]])
def test_constant_and_extreme_activations_stay_finite_and_near(values: list[float]) -> None:
    quantizer = calibrated(np.array(values, np.float32), 8)
    held = quantizer(torch.tensor(values))
    torch.testing.assert_close(held, torch.tensor(values), rtol=1e-3, atol=1e-17)


def test_a_channel_of_zeros_stays_zero() -> None:
    layer = QuantConv2d.from_float(nn.Conv2d(2, 3, 1))
    with torch.no_grad():
        layer.weight[1] = 0.0
    layer.weight_quantizer.calibrate(layer.weight)
    assert float(layer.weight_quantizer.scale[1]) == 1.0
    assert layer.weight_quantizer(layer.weight)[1].abs().max() == 0.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_range_that_is_not_finite_names_the_site(bad: float) -> None:
    quantizer = ActivationQuantizer()
    quantizer.observe(torch.tensor([0.0, bad, 1.0]))
    quantizer.observe(torch.tensor([0.0, 1.0]))
    with pytest.raises(DataError, match=r"Features\.3 ranges from"):
        quantizer.settle("features.3")


def test_without_data_there_is_no_range() -> None:
    with pytest.raises(DataError, match="No calibration data reached features"):
        ActivationQuantizer().settle("features")


@pytest.mark.parametrize("bits", [0, 9, 32, -1])
def test_bits_out_of_range_are_refused(bits: int) -> None:
    with pytest.raises(PassError, match="1 to 8 bits"):
        ActivationQuantizer(bits)
    with pytest.raises(PassError, match="1 to 8 bits"):
        WeightQuantizer(bits, 4)


def test_gradients_pass_inside_the_range_and_stop_outside() -> None:
    quantizer = calibrated(np.array([-1.0, 2.0], np.float32), 8)
    x = torch.tensor([-5.0, -1.0, 0.0, 0.3, 2.0, 9.0], requires_grad=True)
    quantizer(x).backward(torch.arange(1.0, 7.0))
    assert x.grad is not None
    assert x.grad.tolist() == [0.0, 2.0, 3.0, 4.0, 5.0, 0.0]


@given(VECTORS, st.integers(2, 8))
def test_gradients_equal_those_of_torchs_fake_quantization(values: np.ndarray, bits: int) -> None:
    quantizer = calibrated(np.array([-50.0, 30.0], np.float32), bits)
    ours, theirs = (torch.from_numpy(values.copy()).requires_grad_() for _ in range(2))
    quantizer(ours).sum().backward()
    zero, largest = int(quantizer.zero_point), quantizer.largest
    torch.fake_quantize_per_tensor_affine(theirs, float(quantizer.scale), zero, 0, largest).sum().backward()
    assert ours.grad is not None
    assert theirs.grad is not None
    # At a bound itself either answer is right.
    steps = values / quantizer.scale.numpy() + zero
    clear = (np.abs(steps + 0.5) > 1e-3) & (np.abs(steps - largest - 0.5) > 1e-3)
    assert np.array_equal(ours.grad.numpy()[clear], theirs.grad.numpy()[clear])


LAYERS = [
    (nn.Conv1d(4, 6, 3, padding=1, groups=2), (2, 4, 7)),
    (nn.Conv2d(4, 6, 3, stride=2, padding="valid", dilation=2), (2, 4, 7, 7)),
    (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (2, 4, 7, 7)),
    (nn.Conv3d(2, 3, 2), (2, 2, 4, 4, 4)),
    (nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1), (2, 4, 5)),
    (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (2, 4, 5, 5)),
    (nn.ConvTranspose3d(2, 3, 2, bias=False), (2, 2, 3, 3, 3)),
    (nn.Linear(4, 6), (2, 3, 4)),
]


@pytest.mark.parametrize(("module", "size"), LAYERS, ids=lambda value: type(value).__name__)
def test_a_quantized_layer_is_the_layer_with_its_weight_on_the_grid(module: nn.Module, size: tuple[int, ...]) -> None:
    module.eval()
    layer = quantize_layer(module)
    reference = copy.deepcopy(module)
    with torch.no_grad():
        reference.weight.copy_(layer.weight_quantizer(module.weight))
        x = torch.randn(size)
        torch.testing.assert_close(layer(x), reference(x), rtol=0.0, atol=0.0)
    assert layer.weight is module.weight
    assert set(layer.state_dict()) - set(module.state_dict()) == {"weight_quantizer.scale"}
    assert type(layer.to_float()) is type(module)
    assert set(layer.to_float().state_dict()) == set(module.state_dict())
    assert "weight_quantizer" not in dict(module.named_children())


@pytest.mark.parametrize("kind", list(QUANTIZED_LAYERS), ids=lambda kind: kind.__name__)
def test_only_its_own_float_class_is_taken(kind: type[nn.Module]) -> None:
    other = nn.Linear(1, 1) if kind is not nn.Linear else nn.Conv1d(1, 1, 1)
    with pytest.raises(PassError, match="is made from a"):
        QUANTIZED_LAYERS[kind].from_float(other)


def test_a_layer_without_a_quantized_form_is_refused() -> None:
    with pytest.raises(PassError, match="no quantized form of Embedding"):
        quantize_layer(nn.Embedding(3, 2))


def test_scales_follow_the_weight_in_training_and_stay_in_evaluation() -> None:
    layer = QuantLinear.from_float(nn.Linear(3, 2).train())
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    layer(torch.ones(4, 3)).sum().backward()
    optimizer.step()
    before = layer.weight_quantizer.scale.clone()
    layer.eval()
    expected = layer.weight.detach().abs().amax(1) / 127
    torch.testing.assert_close(layer.weight_quantizer.scale, expected)
    assert not torch.equal(before, expected)
    with torch.no_grad():
        layer.weight.mul_(3.0)
    layer(torch.ones(1, 3))
    torch.testing.assert_close(layer.weight_quantizer.scale, expected)


SEARCHED = [WeightScheme("mse"), WeightScheme("percentile", symmetric=False, percentile=90.0)]
SEARCHED.append(WeightScheme("kl", per_channel=False))


@pytest.mark.parametrize("scheme", SEARCHED, ids=lambda scheme: scheme.method)
def test_searched_ranges_keep_their_part_of_the_extent_in_training(scheme: WeightScheme) -> None:
    layer = QuantLinear.from_float(nn.Linear(40, 3).eval(), 3, scheme=scheme)
    start = layer.weight_quantizer.scale.clone()
    with torch.no_grad():
        layer.weight[0, 0] = 4.0  # An outlier; what the search finds for it is not the part that it had.
    layer.weight_quantizer.calibrate(layer.weight)
    searched = layer.weight_quantizer.scale.clone()
    layer.train()
    layer(torch.ones(1, 40))
    torch.testing.assert_close(layer.weight_quantizer.scale, searched)
    with torch.no_grad():
        layer.weight.mul_(2.0)
    layer(torch.ones(1, 40))
    torch.testing.assert_close(layer.weight_quantizer.scale, 2.0 * searched)
    with torch.no_grad():
        layer.weight.mul_(0.5)
        layer.weight[0, 0] = 0.0
    layer.eval()
    if scheme.method == "kl":
        return
    torch.testing.assert_close(layer.weight_quantizer.scale[1:], start[1:])


def test_a_weight_on_its_grid_keeps_its_scales_in_training() -> None:
    layer = QuantLinear.from_float(nn.Linear(40, 3).eval(), 3, scheme=WeightScheme("mse"))
    scale = layer.weight_quantizer.scale.clone()
    with torch.no_grad():
        layer.weight.copy_(layer.weight_quantizer(layer.weight))
    layer.train()
    layer(torch.ones(1, 40))
    torch.testing.assert_close(layer.weight_quantizer.scale, scale)


def test_a_state_dict_brings_the_calibration_back() -> None:
    source, target = calibrated(np.array([-1.0, 7.0], np.float32), 8), ActivationQuantizer(8)
    target.load_state_dict(source.state_dict())
    x = torch.linspace(-2.0, 8.0, 50)
    torch.testing.assert_close(target(x), source(x), rtol=0.0, atol=0.0)


def test_observing_passes_values_on_and_restores_the_mode() -> None:
    network = nn.Sequential(ActivationQuantizer(), nn.ReLU(), ActivationQuantizer())
    x = torch.tensor([-0.123, 4.567])
    with observing(network):
        torch.testing.assert_close(network(x), x.relu(), rtol=0.0, atol=0.0)
    assert not any(module.calibrating for module in network if isinstance(module, ActivationQuantizer))
    assert [float(network[2].minimum), float(network[2].maximum)] == pytest.approx([0.0, 4.567])


def test_a_quantized_network_traces_and_means_what_the_float_one_means() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.quantizer = calibrated(np.array([-1.0, 1.0], np.float32), 8)
            self.conv = QuantConv2d.from_float(nn.Conv2d(3, 4, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(self.quantizer(x))

    net, x = Net().eval(), torch.randn(2, 3, 5, 5)
    with pytest.warns(UserWarning, match="train mode"):
        traced = trace(net, x)
    torch.testing.assert_close(traced(x), net(x))
    graph = trace(nn.Sequential(nn.Conv2d(3, 4, 3)), x)
    layer = quantize_layer(graph.get_submodule("0"))
    node = graph.graph.find_nodes(op="call_module")[0]
    before = ops.semantics(graph, node)
    graph.set_submodule("0", layer)
    assert ops.semantics(graph, node) == before


# Scales that training learns.


def test_learned_step_sizes_have_the_gradient_of_their_paper() -> None:
    quantizer = calibrated(np.array([-1.0, 2.0], np.float32), 4)
    learn_scales(quantizer)
    x = torch.linspace(-3.0, 4.0, 57)
    quantizer(x).sum().backward()
    scale, zero = float(quantizer.scale.detach()), int(quantizer.zero_point)
    steps = x.numpy() / scale
    inside = (steps + zero > -0.5) & (steps + zero < 15.5)
    each = np.where(inside, np.rint(steps) - steps, np.clip(np.rint(steps), -zero, 15 - zero))
    assert quantizer.scale.grad is not None
    assert float(quantizer.scale.grad) == pytest.approx(each.sum() / np.sqrt(57 * 15), rel=1e-3)


def test_learned_clipping_hears_of_clipped_values_alone() -> None:
    quantizer = calibrated(np.array([0.0, 2.0], np.float32), 4)
    learn_scales(quantizer, "pact")
    x = torch.tensor([-1.0, 0.5, 1.0, 3.0, 9.0], requires_grad=True)
    quantizer(x).backward(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]))
    assert quantizer.scale.grad is not None
    # The bound is 15 steps, and two values lie beyond it.
    assert float(quantizer.scale.grad) == pytest.approx(15 * 9.0, rel=1e-5)
    assert x.grad is not None
    assert x.grad.tolist() == [0.0, 2.0, 3.0, 0.0, 0.0]


@given(hnp.arrays(np.float32, (3, 6), elements=FLOATS), st.integers(2, 8))
def test_learned_weight_scales_are_those_of_each_channel(weight: np.ndarray, bits: int) -> None:
    whole = WeightQuantizer(bits, 3)
    whole.calibrate(torch.from_numpy(weight))
    learn_scales(whole)
    whole(torch.from_numpy(weight)).sum().backward()
    for channel in range(3):
        part = WeightQuantizer(bits, 1)
        part.calibrate(torch.from_numpy(weight[channel : channel + 1]))
        learn_scales(part)
        part(torch.from_numpy(weight[channel : channel + 1])).sum().backward()
        assert whole.scale.grad is not None
        assert part.scale.grad is not None
        torch.testing.assert_close(whole.scale.grad[channel], part.scale.grad[0], rtol=1e-3, atol=1e-3)


def test_learned_scales_stay_positive_and_keep_their_names() -> None:
    network = nn.Sequential(calibrated(np.array([-1.0, 1.0], np.float32), 4), QuantLinear.from_float(nn.Linear(3, 2)))
    names = set(network.state_dict())
    learn_scales(network.train())
    assert set(network.state_dict()) == names
    assert {name for name, _ in network.named_parameters()} >= {"0.scale", "1.weight_quantizer.scale"}
    with torch.no_grad():
        network[0].scale.fill_(-0.25)
    x = torch.randn(4, 3)
    before = network(x)
    network.eval()
    assert float(network[0].scale.detach()) == 0.25
    torch.testing.assert_close(network(x), before)


def test_learned_scales_read_in_evaluation_are_those_of_training() -> None:
    network = nn.Sequential(calibrated(np.array([-1.0, 1.0], np.float32), 4), QuantLinear.from_float(nn.Linear(3, 2)))
    learn_scales(network)
    with torch.no_grad():
        network[0].scale.neg_()
        network[1].weight_quantizer.scale.neg_()
    in_training = {name: value.clone() for name, value in network.train().state_dict().items()}
    ended = {name: value.clone() for name, value in network.eval().state_dict().items()}
    network.load_state_dict(in_training)
    for name, value in network.eval().state_dict().items():
        assert torch.equal(value, ended[name]), name


def test_scales_that_cannot_be_learned_are_refused() -> None:
    with pytest.raises(PassError, match="'lsq' or 'pact'"):
        learn_scales(nn.Identity(), "best")  # type: ignore[arg-type]
    quantizer = ActivationQuantizer(4, ActivationScheme(power_of_two=True))
    with pytest.raises(PassError, match="powers of two"):
        learn_scales(quantizer)
