"""Supernets small enough to try every path."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator

import numpy as np
import torch
from torch import fx, nn

from fxopt import models, targets
from fxopt.data import TensorLoader
from fxopt.graph import trace
from fxopt.lowering import OperatorTable, lower_operators
from fxopt.nas import ExpectedCost, Supernet
from fxopt.passes import SelectOperators

CLASSES = 3


def toy_graph(blocks: int = 2, channels: int = 4) -> fx.GraphModule:
    """Convolutions without norms on images of 5 x 5."""
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.Tanh()) for _ in range(blocks)]
    head = (nn.AvgPool2d(5), nn.Flatten(), nn.Linear(channels, CLASSES))
    return trace(nn.Sequential(nn.Conv2d(2, channels, 1), *layers, *head).eval(), torch.randn(2, 2, 5, 5))


def toy(blocks: int = 2, candidates: tuple[str, ...] = ("conv-k3", "separable-k3", "identity")) -> Supernet:
    """A supernet in double precision with uneven probabilities."""
    supernet = Supernet(toy_graph(blocks), SelectOperators(candidates=candidates))
    supernet.net.double()
    with torch.no_grad():
        supernet.alpha.copy_(torch.linspace(-0.5, 0.7, supernet.alpha.numel()).view_as(supernet.alpha))
    return supernet


def table(supernet: Supernet) -> OperatorTable:
    return lower_operators(toy_graph(len(supernet.space)), supernet.step).table(targets.load("pixel1"))


@functools.cache
def mobile_table() -> OperatorTable:
    return lower_operators(*mobile()).table(targets.load("pixel1"))


def between(share: float) -> float:
    """A latency between that of the cheapest network (0) and that of the network as it is (1)."""
    costs = mobile_table()
    whole = float(costs.score(costs.space.encode(costs.space.default())[None])[0])
    least = ExpectedCost(costs, "latency").least
    return least + share * (whole - least)


@functools.cache
def mobile() -> tuple[fx.GraphModule, SelectOperators]:
    """Inverted residuals, with shortcuts that blocks can be left out of."""
    torch.manual_seed(0)
    plan = models.Plan(8, (models.Block(8, 3, 3), models.Block(12, 3, 3, 2), models.Block(12, 3, 3)), 16, 1)
    gm = trace(models.MobileNetwork(plan, CLASSES, 2).eval(), torch.randn(2, 2, 8, 8))
    return gm, SelectOperators(patterns="inverted-residual", kernels=(3, 5), expansions=(2, 3))


def loader(samples: int = 24, size: int = 8, batch: int = 8, seed: int = 0) -> TensorLoader:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 2, size, size, generator=generator)
    return TensorLoader(x, torch.randint(0, CLASSES, (samples,), generator=generator), batch, shuffle=True, seed=seed)


def paths(supernet: Supernet) -> Iterator[np.ndarray]:
    for path in itertools.product(*map(range, supernet.space.sizes)):
        yield np.array(path)
