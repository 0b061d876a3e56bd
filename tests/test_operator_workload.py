"""Costs of policies of operators are those of the rewritten graphs."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from torch import fx, nn

from fxopt import models, targets
from fxopt.decisions import Policy
from fxopt.errors import FxoptError, PassError, PolicyError, TargetError, UnknownNameError, UnsupportedError
from fxopt.graph import trace
from fxopt.lowering import OperatorWorkload, lower, lower_operators
from fxopt.passes import SelectOperators


class _Branches(nn.Module):
    """Branches beside each other, a value that lives long, and shortcuts of two kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        self.one = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.other = nn.Sequential(nn.Conv2d(8, 4, 5, padding=2), nn.ReLU())
        self.mixed = nn.Sequential(models.BasicBlock(12, 12), models.BasicBlock(12, 24, 2), models.Bottleneck(24, 24))
        self.gated = models.InvertedResidual(24, 24, 1, 3, 5, 4)
        self.late = nn.Linear(24 + 12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        both = torch.cat([self.one(x), self.other(x)], 1)
        y = self.gated(self.mixed(both))
        return self.late(torch.cat([y.mean((2, 3)), both.mean((2, 3))], 1))


class _Preactivated(nn.Module):
    """Without its layers, nothing would read what the block reads."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.skip, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 16, 1, 2), nn.Linear(16, 4)
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1, groups=8), nn.BatchNorm2d(8), nn.Conv2d(8, 16, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        return self.head((self.body(torch.relu(x)) + self.skip(x)).mean((2, 3)))


class _Parted(nn.Module):
    """A block on a piece of a value, of which another piece lives on."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.head = nn.Conv2d(3, 16, 1), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(16, 4)
        self.pool = nn.AvgPool2d(3, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        one, other = self.stem(x).chunk(2, 1)
        one = torch.relu(self.body(one))
        return self.head(torch.cat([one, self.pool(other)], 1).mean((2, 3)))


class _OneNorm(nn.Module):
    """Two layers with one norm."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other, self.free = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))
        self.stem, self.norm, self.head = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.one(self.stem(x))))
        x = torch.relu(self.norm(self.other(x)))
        return self.head(torch.relu(self.free(x)).mean((2, 3)))


# A stage and a half of the space that ProxylessNAS searches.
_BLOCKS = (models.Block(16, 3, 6, 2), *(models.Block(16, 3, 6),) * 3, models.Block(24, 5, 3))

NETWORKS = {
    "space": lambda: models.MobileNetwork(models.Plan(8, (models.Block(8, 3, 1), *_BLOCKS), 16)),
    "branches": _Branches,
    "preactivated": _Preactivated,
    "parted": _Parted,
    "one norm": _OneNorm,
    "small": lambda: models.SmallMobileNetV2(3, 10, 8),
    "resnet": lambda: nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), *(models.BasicBlock(8, 8),) * 1),
}


@functools.cache
def prepared(name: str) -> tuple[fx.GraphModule, OperatorWorkload]:
    torch.manual_seed(0)
    gm = trace(NETWORKS[name]().eval(), torch.randn(2, 3, 32, 32))
    return gm, lower_operators(gm, SelectOperators(), batch=2)


@pytest.mark.parametrize("name", NETWORKS)
def test_binding_equals_lowering_the_rewritten_graph(name: str) -> None:
    gm, workload = prepared(name)
    step, rng = SelectOperators(), np.random.default_rng(0)
    extremes = [workload.space.decode(np.array([len(one.choices) - 1 for one in workload.space]))]
    for policy in [*extremes, *(workload.space.sample(rng) for _ in range(2))]:
        wanted = lower(step.with_policy(policy)(gm).graph_module, batch=2)
        found = workload.bind(policy)
        assert np.array_equal(found.rows, wanted.bind().rows)
        assert found.names == wanted.names
    assert np.array_equal(workload.bind().rows, lower(gm, batch=2).bind().rows)


@pytest.mark.parametrize("target", ["pixel1", "v100", "bitfusion", "stm32f746:tinyengine", "xeon-e5-2640v4"])
def test_tables_give_what_the_target_gives(target: str) -> None:
    device = targets.load(target if target in targets.names() else target.partition(":")[0])
    _, workload = prepared("branches")
    rng = np.random.default_rng(1)
    policies = [workload.space.default(), *(workload.space.sample(rng) for _ in range(20))]
    found = workload.estimate(device, policies)
    for index, policy in enumerate(policies):
        alone = device.estimate(workload.bind(policy))
        for metric in ("latency", "size", "macs", "memory", *(("energy",) if alone.energy_j is not None else ())):
            assert found.metric(metric)[index] == pytest.approx(alone.metric(metric)[0], rel=1e-12)


def test_every_candidate_of_the_published_space_has_a_cost() -> None:
    _, workload = prepared("space")
    table = workload.table(targets.load("pixel1"))
    costs, fixed = table.of("latency")
    for row, decision in zip(costs, workload.space, strict=True):
        for value, choice in zip(row, decision.choices, strict=False):
            assert (value == 0.0) == (choice in ("zero", "identity"))
        kernels = dict(zip(decision.choices, row, strict=False))
        if decision.operator == "inverted-residual":
            assert kernels["mb3-k3"] < kernels["mb3-k5"] < kernels["mb6-k7"]
    assert fixed > 0.0
    scores = table.score(np.zeros((3, len(workload.space)), np.intp))
    assert scores.shape == (3,)
    assert len(set(scores.tolist())) == 1


def test_what_does_not_fit_is_refused() -> None:
    _, workload = prepared("small")
    table = workload.table(targets.load("pixel1"))
    with pytest.raises(PolicyError, match="nowhere"):
        workload.bind(Policy({("operator", "nowhere"): "zero"}))
    with pytest.raises(PolicyError, match="shape"):
        table.score(np.zeros((3, 1), np.intp))
    with pytest.raises(PolicyError, match="out of range"):
        table.score(np.full((3, len(workload.space)), 99))
    for wrong in (None, 3, "zero", [1], [None]):
        with pytest.raises(PolicyError, match=r"policy is a \w+; give a Policy"):
            table.estimate(wrong)  # type: ignore[arg-type]
    for numbers in (None, "a", [[0.5] * len(workload.space)], {}):
        with pytest.raises(PolicyError, match="Choice indices are whole numbers"):
            table.score(numbers)  # type: ignore[arg-type]
    rng = np.random.default_rng(0)
    policies = [workload.space.sample(rng) for _ in range(5)]
    indices = np.array([workload.space.encode(policy) for policy in policies])
    wanted = table.estimate(policies).latency_s
    assert len(set(wanted.tolist())) > 1
    for given in (indices, indices.tolist(), torch.from_numpy(indices)):
        np.testing.assert_array_equal(table.score(given), wanted)
    np.testing.assert_array_equal(table.estimate(iter(map(dict, policies))).latency_s, wanted)  # type: ignore[arg-type]
    with pytest.raises(PolicyError, match="capabilities is a str"):
        SelectOperators().search_space(prepared("small")[0], "pixel1")  # type: ignore[arg-type]
    with pytest.raises(UnknownNameError, match="latency"):
        table.of("latencies")
    with pytest.raises(UnsupportedError, match="energy"):
        table.of("energy")


def test_a_graph_without_blocks_says_why() -> None:
    gm = trace(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval(), torch.randn(2, 3, 8, 8))
    with pytest.raises(PassError, match=r"no block.*0: its padding"):
        lower_operators(gm, SelectOperators())
    gm = trace(nn.Linear(3, 4), torch.randn(2, 3))
    with pytest.raises(PassError, match="no convolution"):
        lower_operators(gm, SelectOperators())
    with pytest.raises(PassError, match="step is a str; give"):
        lower_operators(gm, "select-operators")  # type: ignore[arg-type]


@pytest.mark.parametrize("batch", [0, -1, "1", 1.5])
def test_batches_are_counted(batch: Any) -> None:
    gm = trace(models.small_mobilenet_v2(width=8), torch.zeros(2, 1, 16, 16))
    for build in (lambda: lower(gm, batch), lambda: lower_operators(gm, SelectOperators(), batch)):
        with pytest.raises(FxoptError, match=f"batch has to be a whole number of at least 1, got {batch!r}"):
            build()


def test_tables_are_of_targets_and_whole_numbers() -> None:
    workload = lower_operators(trace(models.small_mobilenet_v2(width=8), torch.zeros(2, 1, 16, 16)), SelectOperators())
    with pytest.raises(TargetError, match=r"target is a str; give what fxopt\.targets\.load"):
        workload.table("pixel1")  # type: ignore[arg-type]
    with pytest.raises(PolicyError, match="whole numbers, got an array of float64"):
        workload.table(targets.load("pixel1")).score(np.zeros((1, len(workload.space))))  # type: ignore[arg-type]


def test_a_target_that_cannot_cost_a_candidate_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    device = targets.load("pixel1")
    _, workload = prepared("small")
    real = type(device).estimate

    def forgetful(self: targets.Target, rows: targets.Workload, *, threads: int = 1) -> targets.Estimate:
        found = real(self, rows, threads=threads)
        return type(found)(**{**vars(found), "uncosted": ("blocks.1.mb3_k7.depthwise.conv",)})

    monkeypatch.setattr(type(device), "estimate", forgetful)
    with pytest.raises(TargetError, match=r"cannot cost 'mb3-k7' at 'blocks.1'"):
        workload.table(device)


def test_a_candidate_that_changes_costs_outside_of_its_block_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    gm = trace(_Preactivated().eval(), torch.randn(2, 3, 16, 16))
    step = SelectOperators(candidates=("zero",))
    assert not len(step.search_space(gm))
    monkeypatch.setattr("fxopt.passes.select_operators.offered", lambda *_: True)
    sites = [decision.site for decision in step.search_space(gm)]
    with pytest.raises(PassError, match=r"depend on what these compute: .* \(zero\)\. .*ignore=") as failure:
        lower_operators(gm, step)
    assert any(f"{site} (zero)" in str(failure.value) for site in sites)
