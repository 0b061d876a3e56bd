"""Optimizing a tiny network with as little work as possible."""

from __future__ import annotations

import dataclasses
import multiprocessing.reduction
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any

import torch
from torch import nn

import fxopt
from fxopt.api import OptimizationResult

CLASSES = 4
EXAMPLE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def make_net(width: int = 16, *, training: bool = False) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = nn.Sequential(
            *(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()),
            *(nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, CLASSES)),
        )
    return layers.train(training)


def make_batches(count: int = 2, *size: int, samples: int = 8) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    shape = (samples, *(size or (3, 8, 8)))
    return [
        (torch.randn(shape, generator=generator), torch.randint(0, CLASSES, (samples,), generator=generator))
        for _ in range(count)
    ]


DATA = make_batches()


def optimize(model: nn.Module | None = None, example: Any = EXAMPLE, **options: Any) -> OptimizationResult:
    """fxopt.optimize of a tiny network with as little work as possible."""
    known = {"target": "pixel1", "trials": 3, "epochs": 1, "verify_on_host": False}
    return fxopt.optimize(model if model is not None else make_net(), example, **(known | options))


def outcome(result: OptimizationResult) -> tuple[Any, ...]:
    """Everything that has to be the same when the same is asked for."""
    report = dataclasses.asdict(result.report)
    trials = result.search.trials if result.search is not None else ()
    weights = {name: tensor.tolist() for name, tensor in result.model.state_dict().items()}
    return result.policy, report, trials, weights


def half_right(module: nn.Module) -> float:
    return sum(float((module(inputs).argmax(1) == labels).float().mean()) for inputs, labels in DATA) / len(DATA)


class Stopping:
    """Judges as :func:`half_right`, and is stopped by Ctrl-C at one of its calls."""

    def __init__(self, at: int | None = None) -> None:
        self.calls, self.at = 0, at

    def __call__(self, module: nn.Module) -> float:
        self.calls += 1
        if self.calls == self.at:
            raise KeyboardInterrupt
        return half_right(module)


class InProcess(ProcessPoolExecutor):
    """A pool of processes as far as anybody can tell; what is sent crosses by pickling, and back."""

    def __init__(self) -> None:
        super().__init__(1, multiprocessing.get_context("spawn"))
        self.sent = 0

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        self.sent += 1
        work = multiprocessing.reduction.ForkingPickler.loads(
            multiprocessing.reduction.ForkingPickler.dumps((fn, args, kwargs))
        )
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(work[0], *work[1], **work[2])
