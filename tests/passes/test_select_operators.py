"""Blocks are found by pattern, and other operators stand in for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import fx, nn

import fxopt
from fxopt import models
from fxopt.decisions import Capabilities, Policy
from fxopt.errors import PassError, PolicyError, UnknownNameError
from fxopt.graph import trace
from fxopt.lowering import lower_operators
from fxopt.passes import FoldBatchNorm, SelectOperators
from fxopt.passes._operator_patterns import PATTERNS
from fxopt.passes._operators import _CUSTOM
from fxopt.passes.select_operators import Pattern, Shape, Style, register_candidate, register_pattern
from fxopt.testing import assert_equivalent


def traced(module: nn.Module, *size: int) -> fx.GraphModule:
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias)
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2.0)
    return trace(module.eval(), torch.randn(2, *size))


def block_graph(block: nn.Module, channels: int = 8, size: int = 9) -> fx.GraphModule:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, channels, 1), nn.AvgPool2d(1), block, nn.AdaptiveAvgPool2d(1))
    return traced(net, 3, size, size)


BLOCKS: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "inverted": (lambda: models.InvertedResidual(8, 8, 1, 6), "inverted-residual", "mb6-k3"),
    "inverted with SE": (lambda: models.InvertedResidual(8, 12, 2, 3, 5, 4), "inverted-residual", "mb3-k5"),
    "separable": (lambda: models.DepthwiseSeparable(8, 16, 2, 5), "depthwise-separable", "separable-k5"),
    "basic": (lambda: models.BasicBlock(8, 8), "basic", "basic-k3"),
    "basic with stride": (lambda: models.BasicBlock(8, 16, 2), "basic", "basic-k3"),
    "bottleneck": (lambda: models.Bottleneck(8, 8), "bottleneck", "bottleneck-k3"),
    "convolution": (
        lambda: nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
        "convolution",
        "conv-k3",
    ),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_are_found_and_each_candidate_keeps_their_shape(name: str) -> None:
    make, pattern, operator = BLOCKS[name]
    torch.manual_seed(0)
    gm = block_graph(make())
    step = SelectOperators()
    (found,) = step.explain(gm)
    assert (found.pattern, found.operator) == (pattern, operator)
    assert found.site.startswith("2")
    shapes = gm(torch.randn(3, 3, 9, 9)).shape
    for choice in found.candidates:
        result = step.with_policy(Policy({("operator", found.site): choice}))(gm)
        assert result.modified == (choice != operator)
        assert result.graph_module(torch.randn(3, 3, 9, 9)).shape == shapes


@pytest.mark.parametrize(
    ("name", "larger"),
    [
        ("inverted", ["mb6-k5", "mb6-k7"]),
        ("inverted with SE", ["mb3-k7", "mb6-k5", "mb6-k7"]),
        ("separable", ["separable-k7"]),
        ("basic", ["basic-k5", "basic-k7"]),
        ("basic with stride", ["basic-k5"]),
        ("bottleneck", ["bottleneck-k7"]),
        ("convolution", ["conv-k5", "conv-k7"]),
    ],
)
@pytest.mark.parametrize("folded", [False, True])
def test_a_larger_candidate_begins_as_what_the_block_computes(name: str, larger: list[str], folded: bool) -> None:
    torch.manual_seed(0)
    gm = block_graph(BLOCKS[name][0]())
    gm = FoldBatchNorm()(gm).graph_module if folded else gm
    (found,) = SelectOperators().explain(gm)
    for choice in larger:
        changed = SelectOperators(Policy({("operator", found.site): choice}))(gm)
        assert changed.modified
        assert_equivalent(gm, changed.graph_module, torch.randn(2, 3, 9, 9), batch=3)


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize(("outputs", "stride", "kernel", "squeeze"), [(8, 1, 3, 0), (12, 2, 5, 0), (8, 1, 3, 4)])
def test_a_fused_candidate_begins_as_the_block_without_its_first_activation(
    outputs: int, stride: int, kernel: int, squeeze: int, folded: bool
) -> None:
    """Everywhere, if the first layer gives zero for zero; the borders see the zeros around its outputs else."""
    torch.manual_seed(0)
    block = models.InvertedResidual(8, outputs, stride, 6, kernel, squeeze)
    block.expand[2] = nn.Identity()
    gm = block_graph(block)
    norm = block.expand[1]
    with torch.no_grad():
        norm.bias.copy_(norm.weight * norm.running_mean / (norm.running_var + norm.eps).sqrt())
    gm = FoldBatchNorm()(gm).graph_module if folded else gm
    step = SelectOperators(candidates=("mb{e}-k{k}", "fused{e}-k{k}"))
    (found,) = step.explain(gm)
    for choice in (f"fused6-k{kernel}", f"fused6-k{kernel + 2}"):
        changed = step.with_policy(Policy({("operator", found.site): choice}))(gm)
        assert_equivalent(gm, changed.graph_module, torch.randn(2, 3, 9, 9), batch=3)
    smaller, fused = (
        step.with_policy(Policy({("operator", found.site): f"{kind}3-k{kernel}"}))(gm).graph_module
        for kind in ("mb", "fused")
    )
    assert_equivalent(smaller, fused, torch.randn(2, 3, 9, 9), batch=3)


def test_only_what_is_linear_and_alike_is_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere a fused candidate gets weights from its seed, and one of a user's own has layers of its own."""
    monkeypatch.setattr("fxopt.passes._operators._CUSTOM", dict(_CUSTOM))
    register_candidate("fused-mine", lambda shape, style: nn.Conv2d(shape.inputs, shape.outputs, 1, shape.stride))

    def strided(block: Any) -> None:
        block.expand[0].stride = (2, 2)

    def without_norm(block: Any) -> None:
        block.depthwise[1] = nn.Identity()

    def without_activation(block: Any) -> None:
        block.depthwise[2] = nn.Identity()

    for change in (strided, without_norm, without_activation):
        block = models.InvertedResidual(8, 12, 1, 6)
        change(block)
        gm = block_graph(block)
        step = SelectOperators(candidates=("mb{e}-k{k}", "fused{e}-k{k}", "fused-mine"))
        (found,) = step.explain(gm)
        fused, again = (
            step.with_policy(Policy({("operator", found.site): "fused6-k3"}))(graph).graph_module
            for graph in (gm, block_graph(block))
        )
        with torch.no_grad():
            for parameter in gm.get_submodule(found.site).parameters():
                parameter.mul_(2.0)
        other = step.with_policy(Policy({("operator", found.site): "fused6-k3"}))(gm).graph_module
        weights = [one.state_dict()[f"{found.site}.fused6_k3.expand.conv.weight"] for one in (fused, again, other)]
        assert torch.equal(weights[0], weights[1])
        assert torch.equal(weights[0], weights[2])
        mine = step.with_policy(Policy({("operator", found.site): "fused-mine"}))(gm).graph_module
        assert mine(torch.randn(2, 3, 9, 9)).isfinite().all()


def test_a_fused_candidate_inside_the_borders() -> None:
    torch.manual_seed(0)
    block = models.InvertedResidual(8, 8, 1, 6)
    block.expand[2] = nn.Identity()
    gm = traced(nn.Sequential(nn.Conv2d(3, 8, 1), block), 3, 9, 9)
    made = SelectOperators(Policy({("operator", "1"): "fused6-k3"}), candidates=("fused{e}-k{k}",))(gm).graph_module
    x = torch.randn(2, 3, 9, 9)
    difference = (gm(x) - made(x)).abs()
    assert difference[:, :, 1:-1, 1:-1].max() < 1e-5
    assert difference.max() > 1e-3


def test_a_smaller_expansion_keeps_the_channels_that_weigh_most() -> None:
    torch.manual_seed(0)
    block = models.InvertedResidual(8, 8, 1, 6)
    weights = block.project[0].weight
    kept = torch.arange(1, 48, 2)
    with torch.no_grad():
        weights[:, ::2] *= 1e-3
    gm = block_graph(block)
    (found,) = SelectOperators().explain(gm)
    made = SelectOperators(Policy({("operator", found.site): "mb3-k3"}))(gm).graph_module
    new: Any = made.get_submodule(f"{found.site}.mb3_k3")
    assert torch.equal(new.project.conv.weight, weights[:, kept])
    assert torch.equal(new.expand.conv.weight, block.expand[0].weight[kept])
    assert torch.equal(new.depthwise.norm.running_mean, block.depthwise[1].running_mean[kept])


def test_a_smaller_kernel_is_the_centre() -> None:
    gm = block_graph(models.InvertedResidual(8, 8, 1, 6, 5))
    (found,) = SelectOperators().explain(gm)
    made = SelectOperators(Policy({("operator", found.site): "mb6-k3"}))(gm).graph_module
    new: Any = made.get_submodule(f"{found.site}.mb6_k3")
    old: Any = gm.get_submodule(f"{found.site}.depthwise.0")
    assert torch.equal(new.depthwise.conv.weight, old.weight[:, :, 1:-1, 1:-1])


def test_zero_leaves_the_shortcut() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 9, 9)
    for block in (models.InvertedResidual(8, 8, 1, 6), models.BasicBlock(8, 16, 2)):
        gm = block_graph(block)
        (found,) = SelectOperators().explain(gm)
        made = SelectOperators(Policy({("operator", found.site): "zero"}))(gm).graph_module
        value = gm.get_submodule("1")(gm.get_submodule("0")(x))
        rest = value if isinstance(block, models.InvertedResidual) else torch.relu(block.shortcut(value))
        assert torch.allclose(made(x), rest.mean((2, 3), keepdim=True), atol=1e-6)
        assert not [name for name, _ in made.named_parameters() if "body" in name or "expand" in name]


def test_zero_of_a_rectified_block_takes_the_second_rectifier_along() -> None:
    torch.manual_seed(0)
    gm = traced(nn.Sequential(nn.Conv2d(3, 8, 1), models.BasicBlock(8, 8), models.BasicBlock(8, 8)), 3, 6, 6)
    step = SelectOperators()
    site = step.explain(gm)[1].site
    made = step.with_policy(Policy({("operator", site): "zero"}))(gm).graph_module
    assert sum("ReLU" in type(module).__name__ for module in made.modules()) == 2
    x = torch.randn(2, 3, 6, 6)
    net = nn.Sequential(nn.Conv2d(3, 8, 1), models.BasicBlock(8, 8)).eval()
    net.load_state_dict({name: value for name, value in made.state_dict().items() if name[0] in "01"})
    assert torch.allclose(made(x), net(x), atol=1e-6)
    # Behind a convolution that is not rectified, a fusing runtime would compute the rectifier with the convolution.
    assert "zero" not in step.explain(gm)[0].candidates


def test_the_published_space() -> None:
    with torch.device("meta"):
        module = models.proxyless_space()
    gm = trace(module.to_empty(device="cpu").eval(), torch.zeros(2, 3, 32, 32))
    space = SelectOperators(patterns="inverted-residual").search_space(gm)
    assert len(space) == 21
    assert space.policies == 6**6 * 7**15


def test_zoo_networks_offer_blocks() -> None:
    patterns = {"mobilenet-v1": "depthwise-separable", "mnasnet-a1": "inverted-residual"}
    counts = {"mobilenet-v1": 13, "mnasnet-a1": 15}
    for name, pattern in patterns.items():
        with torch.device("meta"):
            module = models.create(name)
        gm = trace(module.to_empty(device="cpu").eval(), torch.zeros(2, 3, 32, 32))
        found = [block for block in SelectOperators().explain(gm) if block.pattern == pattern]
        assert len(found) == counts[name]


class _Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dilated = nn.Conv2d(4, 4, 3, padding=2, dilation=2)
        self.valid = nn.Conv2d(4, 4, 3, padding="valid")
        self.twice = nn.Conv2d(4, 4, 3, padding=1)
        self.flat = nn.Conv2d(4, 4, (1, 3), padding=(0, 1))
        self.followed = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.twice(self.twice(self.flat(self.valid(self.dilated(x)))))
        y = self.followed(x)
        return torch.sigmoid(y).sigmoid() + x


def test_a_refused_match_says_why() -> None:
    gm = trace(_Odd().eval(), torch.randn(2, 4, 12, 12))
    refusals = SelectOperators().refusals(gm)
    reasons = {refusal.site: refusal.reason for refusal in refusals}
    assert len(refusals) == len(reasons)
    assert "dilated" in reasons["dilated"]
    assert "padding" in reasons["valid"]
    assert "several places" in reasons["twice"]
    assert "square" in reasons["flat"]
    assert "computed together" in reasons["followed"]
    assert not len(SelectOperators().search_space(gm))


def test_a_block_whose_input_is_read_elsewhere_is_not_left_out() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 1)
            self.block = models.InvertedResidual(8, 8, 1, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x)
            return torch.cat([self.block(x), x], 1)

    (found,) = SelectOperators().explain(trace(Net().eval(), torch.randn(2, 3, 8, 8)))
    assert "zero" not in found.candidates
    assert "mb6-k5" in found.candidates


def test_weights_come_from_the_seed_alone() -> None:
    gm = block_graph(models.BasicBlock(8, 8))
    policy = Policy({("operator", SelectOperators().explain(gm)[0].site): "mb3-k3"})
    torch.manual_seed(1)
    one = SelectOperators(policy)(gm).graph_module.state_dict()
    torch.manual_seed(2)
    state = torch.get_rng_state()
    other = SelectOperators(Policy.from_json(policy.to_json()))(gm).graph_module.state_dict()
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(one[name], other[name]) for name in one)
    third = SelectOperators(policy, seed=1)(gm).graph_module.state_dict()
    assert any(not torch.equal(one[name], third[name]) for name in one)


def test_a_network_that_nobody_here_wrote() -> None:
    torch.manual_seed(0)
    module = pytest.importorskip("pytorchcv.models.mnasnet").mnasnet_small()
    gm = trace(module.eval(), torch.randn(2, 3, 224, 224))
    space = SelectOperators().search_space(gm)
    assert sum(decision.operator == "inverted-residual" for decision in space) >= 9
    result = SelectOperators(space.sample(np.random.default_rng(1)))(gm).graph_module
    assert result(torch.randn(3, 3, 224, 224)).shape == (3, 1000)


def test_what_is_decided_can_be_narrowed() -> None:
    gm = trace(models.small_mobilenet_v2(width=8), torch.zeros(2, 1, 16, 16))
    everything = SelectOperators().search_space(gm)
    assert [one.site for one in everything] == ["stem", *(f"blocks.{number}" for number in range(5))]
    assert [one.site for one in SelectOperators(ignore="blocks.*").search_space(gm)] == ["stem"]
    few = SelectOperators(patterns=("inverted-residual",), kernels=(3,), candidates=("mb{e}-k{k}",))
    assert {one.choices for one in few.search_space(gm)} == {("mb3-k3", "mb6-k3")}
    able = Capabilities(operators=("mb3-k5",))
    assert everything.restrict(able)[1].choices == ("mb3-k3", "mb3-k5")
    assert SelectOperators().search_space(gm, able) == everything.restrict(able)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"kernels": (4,)}, PassError, "odd"),
        ({"expansions": (0,)}, PassError, "expansions"),
        ({"patterns": "inverted"}, UnknownNameError, "inverted-residual"),
        ({"candidates": "mb6-k4"}, UnknownNameError, "candidate"),
        ({"candidates": "mb{x}-k3"}, UnknownNameError, r"'mb\{x\}-k3'. Did you mean 'mb6-k3'"),
        ({"candidates": (3,)}, PassError, r"candidates takes names of candidates, got \(3,\)"),
        ({"expansions": 2.5}, PassError, "expansions takes whole numbers above zero, got 2.5"),
        ({"kernels": None}, PassError, "kernels takes odd numbers above zero, got None"),
        ({"kernels": True}, PassError, "got True"),
        ({"seed": "a"}, PassError, "seed has to be a whole number"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        SelectOperators(**options)


def test_policies_that_do_not_fit() -> None:
    gm = trace(models.small_mobilenet_v2(width=8), torch.zeros(2, 1, 16, 16))
    for site, choice, words in (
        ("blocks.9", "mb6-k3", "Did you mean"),
        ("blocks.1", "zero", "its candidates are mb3-k3"),
        ("blocks.0", 3, "cannot stand"),
    ):
        with pytest.raises(PolicyError, match=words):
            SelectOperators(Policy({("operator", site): choice}))(gm)
    with pytest.raises(PassError, match="matches no block"):
        SelectOperators(ignore="nothing.*").search_space(gm)


class _TwoPaths(nn.Module):
    """A user's candidate that is no chain of layers."""

    def __init__(self, shape: Shape, style: Style) -> None:
        super().__init__()
        self.one = nn.Conv2d(shape.inputs, shape.outputs, 1, shape.stride)
        self.other = nn.Conv2d(shape.inputs, shape.outputs, 3, shape.stride, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.maximum(self.one(x), self.other(x)).clamp(max=6.0)


def test_candidates_and_patterns_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxopt.passes._operators._CUSTOM", dict(_CUSTOM))
    register_candidate("two-paths", _TwoPaths, fits=lambda shape: not shape.shortcut)
    register_candidate("shrinking", lambda shape, style: nn.Conv2d(shape.inputs, shape.outputs, 3))
    with pytest.raises(PassError, match="already"):
        register_candidate("mb6-k3", _TwoPaths)
    with pytest.raises(UnknownNameError, match="import the module that calls register_candidate"):
        SelectOperators(candidates="not-yet").explain(block_graph(models.DepthwiseSeparable(8, 16, 2)))
    gm = block_graph(models.DepthwiseSeparable(8, 16, 2))
    (found,) = SelectOperators(candidates="two-paths").explain(gm)
    assert found.candidates == ("separable-k3", "two-paths")
    made = SelectOperators(Policy({("operator", found.site): "two-paths"}))(gm).graph_module
    one, other = (made.get_submodule(f"{found.site}.two_paths.{name}") for name in ("one", "other"))
    x = torch.randn(2, 3, 9, 9)
    value = made.get_submodule("1")(made.get_submodule("0")(x))
    assert torch.allclose(
        made(x), torch.maximum(one(value), other(value)).clamp(max=6.0).mean((2, 3), keepdim=True), atol=1e-6
    )
    with pytest.raises(PassError, match=r"'shrinking' makes \(2, 16, 7, 7\)"):
        SelectOperators(Policy({("operator", found.site): "shrinking"}))(gm)
    register_candidate("wrong", lambda shape, style: nn.Linear(3, 3))
    with pytest.raises(PassError, match=r"'wrong', given an input of \(2, 8, 9, 9\), fails at"):
        SelectOperators(Policy({("operator", found.site): "wrong"}))(gm)


class _Twice(nn.Module):
    """One layer that is used two times."""

    def __init__(self, shape: Shape, style: Style) -> None:
        super().__init__()
        self.share = nn.Conv2d(shape.inputs, shape.outputs, 3, shape.stride, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.share(x) + self.share(-x)


def _on_meta(shape: Shape, style: Style) -> nn.Module:
    return nn.Conv2d(shape.inputs, shape.outputs, 3, shape.stride, 1, device="meta")


def test_a_candidate_that_cannot_be_put_in_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxopt.passes._operators._CUSTOM", dict(_CUSTOM))
    gm = block_graph(models.DepthwiseSeparable(8, 16, 2))
    site = SelectOperators().explain(gm)[0].site
    for name, build, words in (
        ("twice", _Twice, "uses 'share' twice; give each use its own layer"),
        ("on-meta", _on_meta, "'on-meta' at .* is on the meta device"),
    ):
        register_candidate(name, build)
        with pytest.raises(PassError, match=words):
            SelectOperators(Policy({("operator", site): name}))(gm)


class _InTraining(nn.Module):
    """Does something else in training, and counts how often it was called."""

    def __init__(self, shape: Shape, training: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.layer, self.norm = (
            nn.Conv2d(shape.inputs, shape.outputs, 3, shape.stride, 1),
            nn.BatchNorm2d(shape.outputs),
        )
        self.register_buffer("calls", torch.zeros(()))
        self.then = training

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.calls = self.calls + 1
        y = self.norm(self.layer(x))
        return self.then(y) if self.training else y


def _raising(y: torch.Tensor) -> torch.Tensor:
    raise ValueError("not so")


def test_a_candidate_is_tried_in_both_modes_and_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxopt.passes._operators._CUSTOM", dict(_CUSTOM))
    gm = block_graph(models.DepthwiseSeparable(8, 16, 2))
    step, (block,) = SelectOperators(), SelectOperators().blocks(gm)
    register_candidate("raising", lambda shape, style: _InTraining(shape, _raising))
    register_candidate("shrinking", lambda shape, style: _InTraining(shape, lambda y: y[:, :3]))
    register_candidate("same", lambda shape, style: _InTraining(shape, lambda y: y))
    for name, words in (
        ("raising", "in training, fails at .*not so"),
        ("shrinking", r"3, \d, \d\) of an .* in training"),
    ):
        with pytest.raises(PassError, match=words):
            step.candidate(gm, block, name)
    made: Any = step.candidate(gm, block, "same")
    assert made.calls == made.norm.num_batches_tracked == 0
    assert torch.equal(made.norm.running_mean, torch.zeros(16))
    assert not made.training


def test_a_candidate_that_writes_to_its_input_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxopt.passes._operators._CUSTOM", dict(_CUSTOM))

    def writes(shape: Shape, style: Style) -> nn.Module:
        return nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(shape.inputs, shape.outputs, 3, shape.stride, 1))

    register_candidate("writes", writes)
    gm = block_graph(models.BasicBlock(8, 8))
    (found,) = SelectOperators().explain(gm)
    with pytest.raises(PassError, match=r"'writes' at .* writes to its input.*inplace=False"):
        SelectOperators(Policy({("operator", found.site): "writes"}))(gm)


class _Weighed(nn.Module):
    """A function with an argument by name, and a constant."""

    def __init__(self, shape: Shape, style: Style) -> None:
        super().__init__()
        self.layer = nn.Conv2d(shape.inputs, shape.outputs, 3, shape.stride, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.gelu(self.layer(x), approximate="tanh") * torch.tensor([0.5])


def test_candidates_may_hold_constants_and_name_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxopt.passes._operators._CUSTOM", dict(_CUSTOM))
    register_candidate("weighed", _Weighed)
    gm = block_graph(models.DepthwiseSeparable(8, 16, 2))
    (found,) = SelectOperators().explain(gm)
    made = SelectOperators(Policy({("operator", found.site): "weighed"}))(gm).graph_module
    layer = made.get_submodule(f"{found.site}.weighed.layer")
    x = torch.randn(2, 3, 9, 9)
    value = layer(made.get_submodule("1")(made.get_submodule("0")(x)))
    wanted = 0.5 * nn.functional.gelu(value, approximate="tanh").mean((2, 3), keepdim=True)
    torch.testing.assert_close(made(x), wanted)
    assert lower_operators(gm, SelectOperators(candidates=("weighed",))).space


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_candidates_are_of_the_type_of_their_block(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that are traced, too; weights of a block are not rounded on their way into a candidate."""
    monkeypatch.setattr("fxopt.passes._operators._CUSTOM", dict(_CUSTOM))
    register_candidate("two-paths", _TwoPaths)
    gm = trace(models.small_mobilenet_v2(width=8).to(dtype).eval(), torch.zeros(2, 1, 16, 16, dtype=dtype))
    operators = {"blocks.0": "mb6-k5", "blocks.1": "fused3-k3", "blocks.2": "two-paths"}
    policy = Policy({("operator", site): name for site, name in operators.items()})
    made = SelectOperators(policy)(gm).graph_module
    assert {parameter.dtype for parameter in made.parameters()} == {dtype}
    assert made(torch.zeros(2, 1, 16, 16, dtype=dtype)).dtype == dtype
    weights = [one for name, one in gm.state_dict().items() if name.startswith("blocks.0") and one.shape[-2:] == (3, 3)]
    padded = [nn.functional.pad(one, (1,) * 4) for one in weights]
    assert all(any(torch.equal(one, new[: len(one)]) for new in made.parameters() if new.dim()) for one in padded)


@pytest.mark.parametrize(
    ("name", "given", "words"),
    [
        ("own", (5,), "build of the candidate 'own' is a int"),
        ("own", (_TwoPaths, 5), "fits of the candidate 'own' is a int"),
        ("a{b}", (_TwoPaths,), "without braces, got 'a{b}'"),
        ("", (_TwoPaths,), "got ''"),
        (3, (_TwoPaths,), "got 3"),
    ],
)
def test_what_is_no_candidate_is_not_registered(name: Any, given: tuple[Any, ...], words: str) -> None:
    with pytest.raises(PassError, match=words):
        register_candidate(name, *given)
    assert name not in _CUSTOM


def test_a_pattern_of_ones_own_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxopt.passes._operator_patterns.PATTERNS", PATTERNS)
    saved = dict(PATTERNS)
    try:
        register_pattern(Pattern("two-dense", ("dense", "dense"), ("conv-k{k}", "mb3-k3")))
        gm = block_graph(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)))
        (found,) = SelectOperators().explain(gm)
        assert (found.pattern, found.operator) == ("two-dense", "original")
        assert found.candidates == ("original", "conv-k3", "conv-k5", "conv-k7", "mb3-k3")
        with pytest.raises(PassError, match="already"):
            register_pattern(Pattern("two-dense", ("dense",), ()))
        register_pattern(Pattern("three-dense", ("dense",) * 3, ("conv-k{k}",), operator=lambda block: str(1 // 0)))
        three = [nn.Conv2d(8, 8, 3, padding=1) for _ in range(3)]
        with pytest.raises(PassError, match=r"operator of the pattern 'three-dense' fails at .*ZeroDivisionError"):
            SelectOperators().explain(block_graph(nn.Sequential(*three)))
        with pytest.raises(PassError, match="roles"):
            register_pattern(Pattern("another", ("sparse",), ()))
        with pytest.raises(PassError, match=r"candidates of pattern 'another' has to be a tuple.*got 'conv-k3'"):
            register_pattern(Pattern("another", ("dense",), "conv-k3"))  # type: ignore[arg-type]
        with pytest.raises(UnknownNameError, match=r"pattern 'another': 'conv-k4'. Did you mean 'conv-k3'"):
            register_pattern(Pattern("another", ("dense",), ("conv-k4",)))
        for name in (None, 3, ""):
            with pytest.raises(PassError, match=f"A pattern needs a name, got {name!r}"):
                register_pattern(Pattern(name, ("dense",), ("conv-k3",)))  # type: ignore[arg-type]
        assert list(PATTERNS) == ["three-dense", "two-dense", *saved]
        assert "another" not in PATTERNS
    finally:
        PATTERNS.clear()
        PATTERNS.update(saved)


def test_by_name() -> None:
    assert isinstance(fxopt.passes.create("select-operators", kernels=(3,)), SelectOperators)
