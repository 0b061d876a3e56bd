"""FoldBatchNorm: exact wherever it folds, refused with the reason wherever it is not exact."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fxopt.graph import edit, trace
from fxopt.passes import Canonicalize, FoldBatchNorm, Pipeline
from fxopt.testing import assert_equivalent
from tests.strategies import BLOCKS, Cnn, cnns, randomize_statistics, traced
from tests.wiring import Wired

EXACT = 1e-10
CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def prepared(module: nn.Module, *size: int) -> tuple[fx.GraphModule, torch.Tensor]:
    torch.manual_seed(0)
    randomize_statistics(module)
    example = torch.randn(2, *size, dtype=torch.float64)
    return trace(module.double().eval(), example), example


def norms(gm: fx.GraphModule) -> list[str]:
    called = {str(node.target) for node in gm.graph.find_nodes(op="call_module")}
    return [path for path, module in gm.named_modules() if isinstance(module, _BatchNorm) and path in called]


def folds(module: nn.Module, *size: int) -> fx.GraphModule:
    """Assert that every norm goes and that the outputs stay, at another batch size too."""
    gm, example = prepared(module, *size)
    assert norms(gm)
    result = FoldBatchNorm()(gm)
    assert result.modified
    assert norms(result.graph_module) == []
    assert FoldBatchNorm().explain(gm) == ()
    assert_equivalent(gm, result.graph_module, example, relative=EXACT, batch=5)
    return result.graph_module


def refuses(module: nn.Module, reason: str, *size: int, train: bool = False) -> None:
    """Assert that no norm goes, and why."""
    gm, _ = prepared(module, *size)
    gm.train(train)
    result = FoldBatchNorm()(gm)
    assert not result.modified
    assert result.graph_module is gm
    refusals = FoldBatchNorm().explain(gm)
    assert [refusal.site for refusal in refusals] == norms(gm)
    assert reason in refusals[0].reason


# After a layer.


@settings(max_examples=12)
@given(
    dimensions=st.integers(1, 3),
    transposed=st.booleans(),
    groups=st.sampled_from((1, 2, 4)),
    bias=st.booleans(),
    affine=st.booleans(),
    stride=st.integers(1, 2),
)
def test_convolutions_of_every_kind_before_a_norm(
    dimensions: int, transposed: bool, groups: int, bias: bool, affine: bool, stride: int
) -> None:
    kind = (TRANSPOSED if transposed else CONVS)[dimensions]
    conv = kind(4, 8, 3, stride=stride, padding=1, groups=groups, bias=bias)
    result = folds(nn.Sequential(conv, NORMS[dimensions](8, affine=affine)), 4, *[5] * dimensions)
    assert sorted(result.state_dict()) == ["0.bias", "0.weight"]
    assert type(result.get_submodule("0")) is kind


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_before_a_norm(affine: bool, bias: bool) -> None:
    folds(nn.Sequential(nn.Linear(4, 6, bias=bias), nn.BatchNorm1d(6, affine=affine), nn.ReLU()), 4)


@pytest.mark.parametrize("padding", ["same", "valid", 2])
def test_padding_does_not_matter_before_a_norm(padding: Any) -> None:
    folds(nn.Sequential(nn.Conv2d(3, 4, 3, padding=padding, dilation=2), nn.BatchNorm2d(4)), 3, 9, 9)


# Before a layer.


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_a_norm_before_a_convolution_without_padding(dimensions: int, groups: int) -> None:
    conv = CONVS[dimensions](4, 6, 3, groups=groups, bias=groups == 1)
    folds(nn.Sequential(NORMS[dimensions](4), conv), 4, *[5] * dimensions)


def test_a_norm_before_a_linear_layer() -> None:
    folds(nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3, bias=False)), 4)


@pytest.mark.parametrize("layer", [nn.Conv2d(4, 4, 3, padding=1), nn.ConvTranspose2d(4, 6, 3, groups=2)])
def test_a_norm_without_shift_before_padding_and_transposed_convolutions(layer: nn.Module) -> None:
    norm = nn.BatchNorm2d(4)
    gm, example = prepared(nn.Sequential(norm, layer), 4, 5, 5)
    with torch.no_grad():
        norm.running_mean.zero_()
        norm.bias.zero_()
    result = FoldBatchNorm()(gm)
    assert result.modified
    assert_equivalent(gm, result.graph_module, example, relative=EXACT, batch=3)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.Conv2d(4, 4, 3, padding=1), "pads with zeros after the shift"),
        (nn.Conv2d(4, 4, 3, padding="same"), "pads with zeros after the shift"),
        (nn.ConvTranspose2d(4, 4, 3), "is transposed"),
        (nn.ReLU(), "after it is ReLU, no convolution or linear layer"),
    ],
    ids=str,
)
def test_a_norm_before_what_it_cannot_enter_exactly(layer: nn.Module, reason: str) -> None:
    refuses(nn.Sequential(nn.BatchNorm2d(4), layer), reason, 4, 6, 6)


def test_a_norm_on_both_sides_goes_into_the_layer_once() -> None:
    folds(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)), 3, 4, 4)


# Near misses.


def test_training_mode_is_refused() -> None:
    refuses(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), "training mode", 3, 4, 4, train=True)


def test_no_running_statistics_are_refused() -> None:
    gm, _ = prepared(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), 3, 4, 4)
    held = gm.get_submodule("1")
    held.running_mean = held.running_var = None
    (refusal,) = FoldBatchNorm().explain(gm)
    assert "no running statistics" in refusal.reason
    assert not FoldBatchNorm()(gm).modified


def wired(function: Callable[..., Any]) -> Wired:
    return Wired(function, conv=nn.Conv2d(3, 3, 1), norm=nn.BatchNorm2d(3), norm2=nn.BatchNorm2d(3))


def test_another_reader_between_is_refused() -> None:
    def function(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = m.conv(x)
        return m.norm(y) + y

    refuses(wired(function), "is also read by 'add'", 3, 4, 4)


def test_a_reader_of_the_shape_alone_is_no_reader() -> None:
    gm, example = prepared(wired(lambda m, x: m.norm(m.conv(x)).reshape(x.shape[0], -1)), 3, 4, 4)
    (conv,) = gm.graph.find_nodes(op="call_module", target="conv")
    (batch,) = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.sym_size.int)
    again = edit.insert_function(gm, torch.ops.aten.sym_size.int, conv, (conv, 0))
    edit.replace_uses(batch, again)
    edit.finish(gm)
    assert len(conv.users) == 2
    result = FoldBatchNorm()(gm).graph_module
    assert norms(result) == []
    assert_equivalent(gm, result, example, relative=EXACT, batch=3)


def test_folding_rounds_once() -> None:
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1))
    prepared(module, 3, 5, 5)
    single = trace(copy.deepcopy(module).float(), torch.randn(2, 3, 5, 5))
    double = trace(copy.deepcopy(module).float().double(), torch.randn(2, 3, 5, 5).double())
    folded, exact = (FoldBatchNorm()(graph).graph_module.state_dict() for graph in (single, double))
    assert folded.keys() == exact.keys()
    assert all(torch.equal(folded[name], exact[name].float()) for name in folded)


def test_an_operation_between_is_refused() -> None:
    refuses(wired(lambda m, x: m.norm(torch.relu(m.conv(x)))), "before it is relu", 3, 4, 4)


def test_a_layer_called_twice_is_refused() -> None:
    refuses(wired(lambda m, x: m.norm(m.conv(m.conv(x)))), "'conv' is called more than once", 3, 4, 4)


def test_a_norm_called_twice_folds_where_it_can() -> None:
    gm, example = prepared(wired(lambda m, x: m.norm(torch.relu(m.norm(m.conv(x))))), 3, 4, 4)
    result = FoldBatchNorm()(gm)
    assert result.modified
    assert norms(result.graph_module) == ["norm"]
    assert len(result.graph_module.graph.find_nodes(op="call_module", target="norm")) == 1
    assert len(FoldBatchNorm().explain(gm)) == 1
    assert_equivalent(gm, result.graph_module, example, relative=EXACT, batch=3)


def test_tied_weights_are_refused() -> None:
    module = wired(lambda m, x: m.norm(m.conv(x)) + m.other(x))
    module.other = nn.Conv2d(3, 3, 1)
    module.other.weight = module.conv.weight
    refuses(module, "shares a parameter with 'other.weight'", 3, 4, 4)


def test_a_weight_that_is_also_read_directly_is_refused() -> None:
    refuses(wired(lambda m, x: m.norm(m.conv(x)) * m.conv.bias.sum()), "is also read directly", 3, 4, 4)


def test_statistics_that_are_also_read_directly_are_refused() -> None:
    refuses(wired(lambda m, x: m.norm(m.conv(x)) + m.norm.running_mean.sum()), "is also read directly", 3, 4, 4)


def test_a_norm_over_another_dimension_is_refused() -> None:
    refuses(nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5)), "not in the dimension", 5, 4)


def test_hooks_are_refused() -> None:
    gm, _ = prepared(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), 3, 4, 4)
    gm.get_submodule("0").register_forward_hook(lambda *_: None)
    (refusal,) = FoldBatchNorm().explain(gm)
    assert "has forward hooks" in refusal.reason
    assert not FoldBatchNorm()(gm).modified


@pytest.mark.parametrize("broken", [float("nan"), -1.0])
def test_statistics_that_lead_to_no_number_are_refused(broken: float) -> None:
    gm, _ = prepared(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), 3, 4, 4)
    gm.get_submodule("1").running_var[2] = broken
    (refusal,) = FoldBatchNorm().explain(gm)
    assert "not finite" in refusal.reason


def test_what_does_not_fit_the_type_is_refused() -> None:
    gm, _ = prepared(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), 3, 4, 4)
    gm.half()
    gm.get_submodule("1").running_var.fill_(0.0)
    gm.get_submodule("1").eps = 1e-30
    (refusal,) = FoldBatchNorm().explain(gm)
    assert "torch.float16" in refusal.reason


# What the result is.


def test_what_is_trainable_stays_so_and_the_model_stays_as_it_was() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    module[0].weight.requires_grad_(False)
    module[2].bias.requires_grad_(False)
    gm, _ = prepared(module, 3, 4, 4)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    result = FoldBatchNorm()(gm).graph_module
    trains = {name: value.requires_grad for name, value in result.named_parameters()}
    assert trains == {"0.weight": False, "0.bias": True, "2.weight": True, "2.bias": False}
    after = module.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert norms(gm) == ["1", "3"]


def test_modules_inside_a_norm_stay_where_they_are() -> None:
    class NormAct(nn.BatchNorm2d):
        def __init__(self, channels: int) -> None:
            super().__init__(channels)
            self.act = nn.PReLU()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.act(super().forward(x))

    result = folds(nn.Sequential(nn.Conv2d(3, 4, 1), NormAct(4)), 3, 4, 4)
    assert sorted(result.state_dict()) == ["0.bias", "0.weight", "1.act.weight"]


@settings(max_examples=4)
@example(network=Cnn(BLOCKS, 6, "flatten", True, "relu", 0))
@given(network=cnns(norm=True))
def test_random_networks(network: Cnn) -> None:
    gm, inputs = traced(network, torch.float64)
    result = FoldBatchNorm()(gm)
    assert result.modified
    left = norms(result.graph_module)
    assert left == [refusal.site for refusal in FoldBatchNorm().explain(gm)]
    assert len(left) < len(norms(gm))
    assert not FoldBatchNorm()(result.graph_module).modified
    assert_equivalent(gm, result.graph_module, inputs, relative=EXACT, batch=3)


def test_dropout_between_is_no_obstacle_once_canonical() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Dropout(0.0), nn.BatchNorm2d(4))
    refuses(network, "before it is Dropout", 3, 4, 4)
    gm, example = prepared(network, 3, 4, 4)
    result = Pipeline((Canonicalize(), FoldBatchNorm()))(gm).graph_module
    assert norms(result) == []
    assert_equivalent(gm, result, example, relative=EXACT)
