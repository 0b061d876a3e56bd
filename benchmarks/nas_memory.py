"""What a step of a supernet takes, in memory and time, against training one of its networks; print JSON.

Memory is what a step holds when its forward pass ends: weights, gradients of the weights it trains, momentum, and all
tensors that the backward pass reads, each storage counted once. The network to compare with is the largest path
(expansion 6 and kernel 7 everywhere). Activations are proportional to the batch, weights are not: ``memory_ratio`` is
at the batch that was measured, ``memory_ratio_at_256`` at the paper's. Time is processor time of whole steps on one
thread, of the supernet and of the derived network of the same path in turn; the ratio is the median over rounds.

    python benchmarks/nas_memory.py
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from common.output import finish, progress
from torch import nn

from fxopt import models, targets, trace
from fxopt.lowering import OperatorTable, lower_operators
from fxopt.nas import BinaryGates, Cost, Relaxed, Supernet
from fxopt.passes import SelectOperators
from fxopt.training import make_optimizer

CLASSES = 10


@contextmanager
def counting() -> Iterator[dict[int, int]]:
    """Bytes of every storage that is kept for the backward pass."""
    kept: dict[int, int] = {}
    alive: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


def bytes_of(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def held(net: nn.Module, forward: Callable[[], torch.Tensor], trained: Any) -> dict[str, int]:
    """Bytes of weights with momentum and gradients, and of activations, when a forward pass ends."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in net.parameters()}
    with counting() as kept:
        loss = forward()
    activations = sum(size for place, size in kept.items() if place not in weights)
    del loss
    return {"weights": 2 * bytes_of(net.parameters()) + bytes_of(trained), "activations": activations}


def memory(width: float, size: int, batch: int) -> dict[str, Any]:
    supernet, table = prepared(width, size)
    x, y = torch.randn(batch, 3, size, size), torch.randint(0, CLASSES, (batch,))
    largest = [one.choices.index("mb6-k7") for one in supernet.space]
    network = supernet.derive(supernet.space.decode(largest)).train()
    supernet.net.train()

    def loss(net: nn.Module) -> torch.Tensor:
        return nn.functional.cross_entropy(net(x), y)

    own = held(network, lambda: loss(network), network.parameters())
    supernet.choose(largest)
    used = [p for n, p in supernet.net.named_parameters() if "candidates" not in n]
    for mixed, index in zip(supernet.mixed.values(), largest, strict=True):
        used += list(mixed.candidates[index].parameters())
    found = {"weights step": held(supernet.net, lambda: loss(supernet.net), used)}
    with supernet.frozen_weights():
        supernet.open_gates(largest, [[0]] * len(largest))
        found["architecture step, two gates"] = held(supernet.net, lambda: loss(supernet.net), [])
        supernet.open_gates(largest, [[i for i in range(6) if i != one] for one in largest])
        found["architecture step, all gates"] = held(supernet.net, lambda: loss(supernet.net), [])
    supernet.mix()
    found["relaxation"] = held(supernet.net, lambda: loss(supernet.net), supernet.net.parameters())
    del table
    return {"largest path": own} | {name: one | ratios(one, own, batch) for name, one in found.items()}


def ratios(one: dict[str, int], own: dict[str, int], batch: int) -> dict[str, float]:
    def at(size: int, found: dict[str, int]) -> float:
        return found["weights"] + found["activations"] * size / batch

    return {
        "activation_ratio": one["activations"] / own["activations"],
        "memory_ratio": at(batch, one) / at(batch, own),
        "memory_ratio_at_256": at(256, one) / at(256, own),
    }


def prepared(width: float, size: int) -> tuple[Supernet, OperatorTable]:
    torch.manual_seed(0)
    space = models.proxyless_space(width, size, CLASSES).eval()
    graph = trace(space, torch.zeros(2, 3, size, size))
    step = SelectOperators(patterns=("inverted-residual",))
    return Supernet(graph, step), lower_operators(graph, step).table(targets.load("pixel1"))


def times(width: float, size: int, batch: int, rounds: int) -> dict[str, Any]:
    supernet, table = prepared(width, size)
    x, y = torch.randn(batch, 3, size, size), torch.randint(0, CLASSES, (batch,))
    rng = np.random.default_rng(0)
    optimizer = make_optimizer(supernet.net, 0.01)
    cost = Cost(table, [])
    found: dict[str, list[float]] = {"weights step": [], "architecture step, two gates": [], "relaxation": []}

    def loss(batch: Any) -> torch.Tensor:
        return nn.functional.cross_entropy(supernet.net(batch[0]), batch[1])

    def step(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()

    def seconds(work: Callable[[], Any]) -> float:
        start = time.process_time()
        work()
        return time.process_time() - start

    for number in range(rounds + 1):
        path = rng.integers(0, supernet.space.sizes)
        network = supernet.derive(supernet.space.decode(path)).train()
        alone = make_optimizer(network, 0.01)
        step(network, alone)
        supernet.net.train()

        def chosen() -> None:
            supernet.choose(path)  # noqa: B023 (called at once)
            step(supernet.net, optimizer)

        own = seconds(lambda: step(network, alone))  # noqa: B023
        taken = {
            "weights step": seconds(chosen),
            "architecture step, two gates": seconds(lambda: BinaryGates(2)(supernet, cost, loss, (x, y), rng)),
            "relaxation": seconds(lambda: Relaxed()(supernet, cost, loss, (x, y), rng)),
        }
        if number:  # the first round warms up
            for name, value in taken.items():
                found[name].append(value / own)
        progress(f"round {number}: path {own * 1e3:.0f} ms")
    return {name: {"median_ratio": statistics.median(some), "all": some} for name, some in found.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = {
        "memory, 224 x 224, batch 4": memory(1.0, 224, 4),
        "time, 32 x 32, width 0.5, batch 64": times(0.5, 32, 64, options.rounds),
    }
    finish("nas_memory", results)
