"""Blocks are found however code bases build them, and candidates keep how they are built."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.nn import functional

from fxopt.decisions import Policy
from fxopt.errors import PassError
from fxopt.graph import trace
from fxopt.lowering import lower, lower_operators
from fxopt.passes import Canonicalize, SelectOperators
from fxopt.testing import assert_equivalent

Make = Callable[[], nn.Module]


def unit(
    inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1, *more: nn.Module
) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs), *more]


class Gate(nn.Module):
    """Squeeze and excite, of linear layers or convolutions, with a norm or without."""

    def __init__(
        self, channels: int, linear: bool = False, norm: bool = False, hard: bool = False, sized: bool = False
    ) -> None:
        super().__init__()
        self.linear, self.hard, self.sized = linear, hard, sized
        layer: Any = nn.Linear if linear else lambda one, other: nn.Conv2d(one, other, 1)
        self.reduce = layer(channels, 4)
        self.norm = nn.BatchNorm2d(4) if norm else nn.Identity()
        self.expand = layer(4, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.mean((2, 3)) if self.linear else functional.adaptive_avg_pool2d(x, 1)
        y = y.view(x.size(0), x.size(1)) if self.sized else y
        y = self.expand(torch.relu(self.norm(self.reduce(y))))
        y = functional.relu6(y + 3) / 6 if self.hard else y.sigmoid()
        if self.sized:
            return x * y.view(x.size(0), x.size(1), 1, 1)
        return x * (y[:, :, None, None] if self.linear else y)


class HardSwish(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * functional.relu6(x + 3.0) / 6.0


class Residual(nn.Module):
    def __init__(self, *body: nn.Module, shortcut: Sequence[nn.Module] = (), tail: bool = True) -> None:
        super().__init__()
        self.body = nn.Sequential(*body)
        self.shortcut = nn.Sequential(*shortcut)
        self.tail = tail

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        total = self.body(x) + self.shortcut(x)
        return torch.relu(total) if self.tail else total


class PreActivated(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.body = nn.Sequential(*unit(channels, channels, 3, 1, 1, nn.ReLU()), nn.Conv2d(channels, channels, 3, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.body(torch.relu(self.norm(x)))


def inverted(wide: int, gate: nn.Module | None = None, act: Make = nn.ReLU, late: bool = False) -> nn.Module:
    middle = unit(8, wide, 1, 1, 1, act()) + unit(wide, wide, 3, 1, wide)
    middle += [gate or nn.Identity(), act()] if late else [act(), gate or nn.Identity()]
    return nn.Sequential(*middle, *unit(wide, 8))


class SamePadding(nn.Module):
    """TensorFlow's: the output is the input's size over the stride, rounded up; what is odd goes below and right."""

    def __init__(self, kernel: int, stride: int) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, stride

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        around = []
        for size in (x.shape[3], x.shape[2]):
            whole = max((-(-size // self.stride) - 1) * self.stride + self.kernel - size, 0)
            around += [whole // 2, whole - whole // 2]
        return functional.pad(x, around)


def padded(*before: nn.Module, stride: int = 2, groups: int = 1, outputs: int = 8, around: Any = None) -> nn.Module:
    """A convolution behind some layers, whose input is padded by an operation of its own."""
    own: nn.Module = SamePadding(3, stride) if around is None else nn.ZeroPad2d(around)
    inputs = outputs if groups > 1 else 8
    conv = nn.Conv2d(inputs, outputs, 3, stride, groups=groups, bias=False)
    return nn.Sequential(*before, own, conv, nn.BatchNorm2d(outputs), nn.ReLU())


# What makes a block: its pattern, what it computes, and a candidate that begins as the block.
BLOCKS: dict[str, tuple[Make, str, str, str]] = {
    "hard-swish spelled out": (lambda: inverted(24, act=HardSwish), "inverted-residual", "mb3-k3", "mb6-k5"),
    "gate of views by size": (
        lambda: inverted(24, Gate(24, linear=True, sized=True)), "inverted-residual", "mb3-k3", "mb6-k7"
    ),
    "gate of linear layers": (lambda: inverted(24, Gate(24, linear=True)), "inverted-residual", "mb3-k3", "mb6-k7"),
    "hard gate": (lambda: inverted(24, Gate(24, hard=True), HardSwish), "inverted-residual", "mb3-k3", "mb3-k5"),
    "gate with norm": (lambda: inverted(24, Gate(24, norm=True)), "inverted-residual", "mb3-k3", "mb6-k5"),
    "gate before activation": (lambda: inverted(24, Gate(24), late=True), "inverted-residual", "mb3-k3", "mb6-k5"),
    "odd expansion": (lambda: inverted(20, Gate(20)), "inverted-residual", "original", "own-k5"),
    "mish": (lambda: inverted(24, act=nn.Mish), "inverted-residual", "mb3-k3", "mb3-k5"),
    "gelu": (lambda: inverted(24, act=nn.GELU), "inverted-residual", "mb3-k3", "mb3-k5"),
    "padded as TensorFlow does": (
        lambda: nn.Sequential(padded(*unit(8, 24, 1, 1, 1, nn.ReLU()), groups=24, outputs=24), *unit(24, 12)),
        "inverted-residual",
        "mb3-k3",
        "mb6-k7",
    ),
    "separable, padded as TensorFlow does": (
        lambda: nn.Sequential(padded(groups=8), *unit(8, 12, 1, 1, 1, nn.ReLU())),
        "depthwise-separable",
        "separable-k3",
        "separable-k5",
    ),
    "a convolution padded by a layer": (lambda: padded(stride=1, around=1), "convolution", "conv-k3", "conv-k7"),
    "a convolution padded unevenly": (lambda: padded(around=(0, 1, 0, 1)), "convolution", "conv-k3", "conv-k5"),
    "fused": (
        lambda: Residual(*unit(8, 32, 3, 1, 1, nn.SiLU()), *unit(32, 8), tail=False),
        "fused-inverted-residual",
        "fused4-k3",
        "fused6-k5",
    ),
    "fused, gate and stride": (
        lambda: nn.Sequential(*unit(8, 24, 3, 2, 1, nn.SiLU()), Gate(24), *unit(24, 12)),
        "fused-inverted-residual",
        "fused3-k3",
        "fused3-k7",
    ),
    "depthwise before an inverted residual": (
        lambda: Residual(*unit(8, 8, 3, 1, 8), inverted(24), tail=False),
        "inverted-residual-after-depthwise",
        "original",
        "own-k5",
    ),
    "depthwise before two layers": (
        lambda: Residual(*unit(8, 8, 5, 1, 8), *unit(8, 24, 1, 1, 1, nn.ReLU()), *unit(24, 8), tail=False),
        "depthwise-then-inverted",
        "original",
        "own-k7",
    ),
    "separable, nothing between": (
        lambda: nn.Sequential(*unit(8, 8, 3, 1, 8), *unit(8, 12, 1, 1, 1, nn.ReLU())),
        "depthwise-separable",
        "separable-k3",
        "separable-k7",
    ),
    "separable, one norm": (
        lambda: nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1, groups=8, bias=False), *unit(8, 12)),
        "depthwise-separable",
        "separable-k3",
        "separable-k5",
    ),
    "separable, stride behind": (
        lambda: nn.Sequential(*unit(8, 8, 3, 1, 8, nn.ReLU()), *unit(8, 12, 1, 2, 1, nn.ReLU())),
        "depthwise-separable",
        "original",
        "own-k5",
    ),
    "basic with a gate": (
        lambda: Residual(*unit(8, 8, 3, 1, 1, nn.ReLU()), *unit(8, 8, 3), Gate(8)),
        "basic",
        "basic-k3",
        "basic-k5",
    ),
    "pre-activated": (lambda: PreActivated(8), "basic", "basic-k3", "basic-k5"),
    "bottleneck, gate": (
        lambda: Residual(*unit(8, 2, 1, 1, 1, nn.ReLU()), *unit(2, 2, 3, 1, 1, nn.ReLU()), *unit(2, 8), Gate(8)),
        "bottleneck",
        "bottleneck-k3",
        "bottleneck-k5",
    ),
    "bottleneck, stride first": (
        lambda: Residual(
            *unit(8, 2, 1, 2, 1, nn.ReLU()), *unit(2, 2, 3, 1, 1, nn.ReLU()), *unit(2, 8), shortcut=unit(8, 8, 1, 2)
        ),
        "bottleneck",
        "original",
        "own-k5",
    ),
    "bottleneck in groups, gate inside": (
        lambda: Residual(
            *unit(8, 8, 1, 1, 1, nn.ReLU()), *unit(8, 8, 3, 2, 2, nn.ReLU()), Gate(8), *unit(8, 12),
            shortcut=unit(8, 12, 1, 2),
        ),
        "grouped-bottleneck",
        "original",
        "own-k7",
    ),
}  # fmt: skip


def graph_of(make: Make) -> fx.GraphModule:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.AvgPool2d(1), make(), nn.AvgPool2d(1), nn.AdaptiveAvgPool2d(1))
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
    return Canonicalize()(trace(net.eval(), torch.randn(2, 3, 16, 16))).graph_module


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_are_found_and_larger_candidates_begin_as_they_are(name: str) -> None:
    make, pattern, operator, larger = BLOCKS[name]
    gm = graph_of(make)
    (found,) = SelectOperators().explain(gm)
    assert (found.pattern, found.operator) == (pattern, operator)
    assert larger in found.candidates
    changed = SelectOperators(Policy({("operator", found.site): larger}))(gm)
    assert changed.modified
    assert_equivalent(gm, changed.graph_module, torch.randn(2, 3, 16, 16), batch=3)


@pytest.mark.parametrize("name", BLOCKS)
def test_candidates_keep_shapes_and_cost_what_their_graph_costs(name: str) -> None:
    gm = graph_of(BLOCKS[name][0])
    step = SelectOperators(kernels=(3, 5))
    (found,) = step.explain(gm)
    workload = lower_operators(gm, step)
    for choice in found.candidates:
        policy = Policy({("operator", found.site): choice})
        made = step.with_policy(policy)(gm).graph_module
        assert made(torch.randn(3, 3, 16, 16)).shape == gm(torch.randn(3, 3, 16, 16)).shape
        assert workload.bind(policy).rows.tolist() == lower(made).bind().rows.tolist()


def kinds(gm: fx.GraphModule, site: str, choice: str) -> list[str]:
    made = SelectOperators(Policy({("operator", site): choice}))(gm).graph_module
    path = f"{site}.{choice.replace('-', '_')}."
    return [
        type(made.get_submodule(str(node.target))).__name__ for node in made.graph.nodes if path in str(node.target)
    ]


def test_candidates_have_norms_and_activations_where_the_block_has() -> None:
    gm = graph_of(BLOCKS["separable, nothing between"][0])
    (found,) = SelectOperators().explain(gm)
    both = ["Conv2d", "BatchNorm2d", "Conv2d", "BatchNorm2d", "ReLU"]
    assert kinds(gm, found.site, "separable-k5") == both
    assert kinds(gm, found.site, "mb3-k3") == ["Conv2d", "BatchNorm2d", "ReLU"] * 3
    gm = graph_of(BLOCKS["pre-activated"][0])
    (found,) = SelectOperators().explain(gm)
    assert kinds(gm, found.site, "bottleneck-k3") == ["Conv2d", "BatchNorm2d", "ReLU"] * 2 + ["Conv2d"]
    gm = graph_of(BLOCKS["hard gate"][0])
    (found,) = SelectOperators().explain(gm)
    gate = ["AdaptiveAvgPool2d", "Conv2d", "ReLU", "Conv2d", "Hardsigmoid"]
    swished = ["Conv2d", "BatchNorm2d", "Hardswish"]
    assert kinds(gm, found.site, "mb6-k5") == [*swished, *swished, *gate, "Conv2d", "BatchNorm2d"]


def test_a_pool_ends_as_the_convolution_ends() -> None:
    gm = graph_of(lambda: nn.Sequential(*unit(8, 8, 3, 1, 1, nn.ReLU6())))
    (found,) = SelectOperators().explain(gm)
    made = SelectOperators(Policy({("operator", found.site): "maxpool-k3"}))(gm).graph_module
    assert sum(isinstance(module, nn.ReLU6) for module in made.modules()) == 1


def test_separable_convolutions_in_a_row_are_no_inverted_residuals() -> None:
    def separable(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, inputs, 3, 1, 1, groups=inputs), *unit(inputs, outputs)]

    gm = graph_of(lambda: nn.Sequential(*separable(8, 12), *separable(12, 12), *separable(12, 8)))
    assert [block.pattern for block in SelectOperators().explain(gm)] == ["depthwise-separable"] * 3


class _Lone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.shuffled = nn.Conv2d(8, 8, 1, groups=2)
        self.head = nn.Conv2d(8, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(functional.pad(x, (0, 2, 0, 2)))
        parts = [self.depthwise(x), self.grouped(x), self.shuffled(x)]
        return self.head(torch.cat(parts, 1)[:, :8])


def test_a_lone_convolution_is_told_what_it_is_and_what_to_do() -> None:
    gm = trace(_Lone().eval(), torch.randn(2, 3, 12, 12))
    reasons = {refusal.site: refusal.reason for refusal in SelectOperators().refusals(gm)}
    assert "the padding [0, 2, 0, 2] of its input by pad" in reasons["stem"]
    assert "a depthwise convolution and read by cat" in reasons["depthwise"]
    assert "a convolution in groups" in reasons["grouped"]
    assert "a 1 x 1 convolution in groups" in reasons["shuffled"]
    assert "a 1 x 1 convolution and read by the output" in reasons["head"]
    assert all("register_pattern" in reason for site, reason in reasons.items() if site != "stem")


def test_an_activation_that_is_spelled_out_has_to_be_joined_first() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), HardSwish(), nn.AdaptiveAvgPool2d(1))
    gm = trace(net.eval(), torch.randn(2, 3, 8, 8))
    swish = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), Gated(), nn.AdaptiveAvgPool2d(1))
    (refusal,) = SelectOperators().refusals(trace(swish.eval(), torch.randn(2, 3, 8, 8)))
    assert "Canonicalize joins" in refusal.reason
    (found,) = SelectOperators().explain(Canonicalize()(gm).graph_module)
    assert found.operator == "conv-k3"


@pytest.mark.parametrize(
    ("function", "module"),
    [
        (lambda x: functional.leaky_relu(x, 0.2), nn.LeakyReLU(0.2)),
        (lambda x: functional.elu(x, 0.5), nn.ELU(0.5)),
        (functional.selu, nn.SELU()),
        (lambda x: functional.celu(x, 0.7), nn.CELU(0.7)),
        (lambda x: functional.softplus(x, 2.0, 5.0), nn.Softplus(2.0, 5.0)),
        (lambda x: functional.gelu(x, approximate="tanh"), nn.GELU("tanh")),
        (lambda x: functional.hardtanh(x, -0.5, 0.5), nn.Hardtanh(-0.5, 0.5)),
        (functional.relu6, nn.ReLU6()),
        (functional.mish, nn.Mish()),
    ],
)
def test_candidates_have_the_activation_of_a_function(function: Any, module: nn.Module) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(function(self.layer(x)).mean((2, 3)))

    gm = trace(Net().eval(), torch.randn(2, 8, 6, 6))
    (found,) = SelectOperators().explain(gm)
    changed = SelectOperators(Policy({("operator", found.site): "conv-k5"}))(gm).graph_module
    made = [one for one in changed.modules() if type(one) is type(module)]
    x = torch.linspace(-9.0, 9.0, 100)
    assert len(made) == 1
    assert torch.equal(made[0](x), module(x))


def test_a_gate_that_is_expanded_is_one() -> None:
    class Expanded(Gate):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.expand(torch.relu(self.reduce(x.mean((2, 3), keepdim=True)))).sigmoid()
            return x * y.expand_as(x)

    net = nn.Sequential(nn.Conv2d(3, 8, 1), *inverted(24, Expanded(24)), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    gm = Canonicalize()(trace(net, torch.randn(2, 3, 12, 12))).graph_module
    assert "mb3-k3" in [block.operator for block in SelectOperators().explain(gm)]


@pytest.mark.parametrize(("first", "drop"), [(True, True), (True, False), (False, True), (False, False)])
def test_every_convolution_of_a_residual_is_offered_or_refused_whatever_comes_first(first: bool, drop: bool) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Conv2d(8, 16, 3, 2, 1), nn.Conv2d(16, 16, 3, 1, 1)
            self.down = nn.Conv2d(8, 16, 1, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            beside = self.down(x) if first else None
            y = torch.relu(self.one(x))
            y = self.other(functional.dropout(y, 0.1, self.training) if drop else y)
            return torch.relu(y + (self.down(x) if beside is None else beside))

    gm = trace(Block().eval(), torch.randn(2, 8, 8, 8))
    found = {layer: block.site for block in SelectOperators().explain(gm) for layer in block.layers}
    refused = {refusal.site: refusal.reason for refusal in SelectOperators().refusals(gm)}
    assert {"one", "other"} <= found.keys()
    assert found.keys() | refused.keys() == {"one", "other", "down"}
    assert "down" in found or "computed beside the block" in refused["down"]


def test_a_gate_of_largest_values_is_none() -> None:
    class Largest(Gate):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.expand(torch.relu(self.reduce(functional.adaptive_max_pool2d(x, 1))))
            return x * y.sigmoid()

    operators = [block.operator for block in SelectOperators().explain(graph_of(lambda: inverted(24, Largest(24))))]
    assert "mb3-k3" not in operators


def test_weights_that_are_computed_are_told() -> None:
    net = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 3, padding=1)), nn.ReLU()).eval()
    gm = trace(net, torch.randn(2, 3, 8, 8))
    (refusal,) = SelectOperators().refusals(gm)
    assert "weights are computed" in refusal.reason
    with pytest.raises(PassError, match="its weights are computed"):
        lower_operators(gm, SelectOperators())


def test_layers_with_one_norm_are_no_blocks() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
            self.norm = nn.BatchNorm2d(8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(self.norm(self.other(torch.relu(self.norm(self.one(x))))))

    gm = trace(Net().eval(), torch.randn(2, 8, 6, 6))
    assert SelectOperators().explain(gm) == []
    assert ["norm" in refusal.reason for refusal in SelectOperators().refusals(gm)] == [True, True]


class Gated(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(x)
