"""Operators for three targets on Fashion-MNIST: by supernet, against three other searches and a baseline; print JSON.

The 32 x 32 variant of the space that ProxylessNAS searches, at a third of its width. Each target allows the latency of
the widest MobileNetV2-style network (expansion 6 and kernel 3 everywhere) within a part of what the full one takes
there, or of the deepest where no width is: that is the baseline. Each search gets the same number of epochs for its
weights:

- ``binary``: two gates of every block, with the target's latency as a budget (one supernet for each target);
- ``relaxed``: DARTS, all candidates at once, with the same budget and the same number of architecture steps;
- ``evolution`` and ``random``: on one supernet trained uniformly, judged by images that it was not trained on.

Supernets start from the trained MobileNetV2-style network. As in the paper, every network found is then trained from
scratch, all alike, and so is the baseline: the MobileNetV2-style network with all widths reduced; where no width is
fast enough, because layers cost their launch, with blocks left out, evenly from the last of each stage. Accuracies are
of all 10,000 test images, which nothing was chosen by.

    python benchmarks/nas_search.py --seeds 0 1 2 --parts nas_search.jsonl
"""

from __future__ import annotations

import argparse
import functools
import itertools
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from common.fashion import Data, data
from common.output import finish, keep_memory, progress
from common.parts import Parts
from torch import fx, nn

import fxopt
from fxopt import models, targets
from fxopt.data import TensorLoader
from fxopt.decisions import Constraint, Policy
from fxopt.evaluate import accuracy
from fxopt.lowering import OperatorTable, lower, lower_operators
from fxopt.nas import (
    CostTerm,
    PathScore,
    Supernet,
    SupernetResult,
    SupernetSettings,
    policy_within,
    split,
    train_supernet,
)
from fxopt.passes import SelectOperators
from fxopt.search import engines, run_search
from fxopt.training import fit

DEVICES = {"v100": 8, "xeon-e5-2640v4": 1, "pixel1": 1}
"""Batch sizes, as in the paper."""
ALLOWED = {"v100": 0.55, "xeon-e5-2640v4": 0.34, "pixel1": 0.615}
"""Parts of the latency at which the networks are about as accurate as each other.

On the Xeon expansion 3 alone takes 0.5 of it, on the phone 0.7; on the GPU nothing but whole blocks counts.
"""
METHODS = ("binary", "evolution", "random", "relaxed")
STEP = SelectOperators(patterns=("inverted-residual",))
WITH_FUSED = replace(STEP, candidates=("mb{e}-k{k}", "fused{e}-k3", "zero"))
"""Inverted residuals with their first two layers in one as well, a dense one, for where a layer costs its launches."""
WARM_UP = 2
LEARNING_RATES = {"alone": 0.05, "supernet": 0.02}


def space(width: float, seed: int) -> fx.GraphModule:
    """The space's MobileNetV2-style network, four of its five strides kept, so that two cores can train it."""
    torch.manual_seed(seed)
    graph = fxopt.trace(models.proxyless_space(width, 64, 10, 1), torch.zeros(2, 1, 32, 32))
    return graph.to(memory_format=torch.channels_last)


def latency_ms(graph: fx.GraphModule, device: str) -> float:
    return float(targets.load(device).estimate(lower(graph, DEVICES[device]).bind()).latency_s[0]) * 1e3


def shallower(graph: fx.GraphModule, left_out: int) -> fx.GraphModule:
    """The network without some of its blocks: the last block of the longest stage goes first."""
    choices = STEP.search_space(graph)
    stage = {block.site: block.shape.outputs for block in STEP.blocks(graph)}
    sites = [decision.site for decision in choices if "zero" in decision.choices]
    policy: dict[tuple[str, str], str] = {}
    for _ in range(left_out):
        lengths = Counter(stage[site] for site in sites)
        longest = max(lengths, key=lambda outputs: (lengths[outputs], outputs))
        gone = [site for site in sites if stage[site] == longest][-1]
        sites.remove(gone)
        policy["operator", gone] = "zero"
    return STEP.with_policy(Policy({**choices.default(), **policy}))(graph).graph_module


class Course:
    """Everything of one seed.

    Args:
        options: The command's options.
        seed: The seed.
    """

    def __init__(self, options: argparse.Namespace, seed: int) -> None:
        self.options, self.seed = options, seed
        found = padded(data(options.batch, seed))
        self.train, self.test = first(found.train, options.samples), found.test
        self.part = first(found.train, options.search_samples)
        self.weights, self.architecture = split(self.part, 0.2, seed)
        self.graph = space(options.width, seed)

    @functools.cached_property
    def trained(self) -> fx.GraphModule:
        """The network that supernets start from."""
        graph = space(self.options.width, self.seed)
        rate = LEARNING_RATES["alone"]
        fit(graph, self.part, epochs=self.options.start, learning_rate=rate, seed=self.seed)
        return graph

    @functools.cache  # noqa: B019
    def smaller(self, device: str) -> fx.GraphModule:
        """The widest MobileNetV2-style network within a part of the full one's latency, or the deepest; untrained."""
        most = ALLOWED[device] * latency_ms(self.graph, device)
        narrow = (space(self.options.width * part / 40, self.seed) for part in range(40, 7, -1))
        shallow = (shallower(self.graph, count) for count in range(16))
        return next(one for one in itertools.chain(narrow, shallow) if latency_ms(one, device) <= most)

    def limit(self, device: str) -> float:
        """Latency allowed, in seconds: that of the baseline, and what sums in another order differ by."""
        return latency_ms(self.smaller(device), device) * 1e-3 * (1.0 + 1e-9)

    def step(self, device: str) -> SelectOperators:
        """What is on offer for a device."""
        return WITH_FUSED if device in self.options.fused else STEP

    @functools.cache  # noqa: B019
    def table(self, device: str) -> OperatorTable:
        """Costs of all candidates."""
        return lower_operators(self.graph, self.step(device), DEVICES[device]).table(targets.load(device))

    def supernet(self, method: str, device: str) -> SupernetResult:
        """A supernet trained by a method, for a device unless the method trains weights alone."""
        supernet = Supernet(self.trained, self.step(device))
        supernet.net.to(memory_format=torch.channels_last)
        terms = [] if method == "uniform" else [CostTerm("latency", self.limit(device), "budget", 0.2)]
        settings = SupernetSettings(
            method=method,
            warm_up=WARM_UP,
            epochs=self.options.epochs,
            learning_rate=LEARNING_RATES["supernet"],
            seed=self.seed,
        )
        found = train_supernet(supernet, self.weights, self.architecture, self.table(device), terms, settings=settings)
        for epoch in found.history:
            progress(f"{method} {device} {asdict(epoch)}")
        return found

    @functools.cache  # noqa: B019
    def uniform(self, device: str) -> Supernet:
        """The supernet that search engines choose from, the same one where the same candidates are on offer."""
        first = next(other for other in DEVICES if self.step(other) == self.step(device))
        return self.supernet("uniform", device).supernet if device == first else self.uniform(first)

    def searched(self, method: str, device: str) -> dict[str, Any]:
        """The operators that one method chooses for one device."""
        start = time.process_time()
        table, limits = self.table(device), {"latency": self.limit(device)}
        if method in ("binary", "relaxed"):
            found = self.supernet(method, device)
            policy = policy_within(found.supernet, table, limits, duals=found.duals)
        else:
            policy = self.best_path(method, self.uniform(device), table, limits)
        return {"operators": list(policy.of_kind("operator").values()), "search_cpu_s": time.process_time() - start}

    def judged_network(self, operators: Sequence[str]) -> dict[str, Any]:
        """A network of the space, trained from scratch."""
        graph = space(self.options.width, self.seed)
        sites = [decision.key for decision in STEP.search_space(graph)]
        found = STEP.with_policy(Policy(dict(zip(sites, operators, strict=True))))(graph).graph_module
        return self.judged(self.from_scratch(found))

    def from_scratch(self, graph: fx.GraphModule) -> fx.GraphModule:
        """The network with fresh weights, trained."""
        torch.manual_seed(self.seed)
        for module in graph.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear, nn.BatchNorm2d)):
                module.reset_parameters()
        graph.to(memory_format=torch.channels_last)
        rate = LEARNING_RATES["alone"]
        fit(graph, self.train, epochs=self.options.training, learning_rate=rate, seed=self.seed)
        return graph

    def best_path(self, method: str, supernet: Supernet, table: OperatorTable, limits: Mapping[str, float]) -> Policy:
        """What a search engine finds among a supernet's networks."""
        constraint = Constraint(
            supernet.space,
            lambda policies: table.estimate(policies).latency_s[:, None],
            list(limits.values()),
            list(limits),
        )
        engine = engines.create(method, supernet.space, constraint, self.seed)
        score = PathScore(supernet, self.weights, self.architecture)
        return run_search(engine, score, self.options.trials).policy

    def baseline(self, device: str) -> dict[str, Any]:
        """The MobileNetV2-style network of the latency that is allowed, trained from scratch."""
        return self.judged(self.from_scratch(self.smaller(device)))

    def judged(self, network: fx.GraphModule) -> dict[str, Any]:
        """Accuracy, and latency on all devices."""
        return {
            "accuracy": accuracy(network.eval(), self.test),
            "latency_ms": {device: latency_ms(network, device) for device in DEVICES},
        }


def padded(found: Data) -> Data:
    """Images of 32 x 32, channels last."""

    def one(loader: TensorLoader) -> TensorLoader:
        images = nn.functional.pad(loader.inputs, (2, 2, 2, 2)).contiguous(memory_format=torch.channels_last)
        return replace(loader, inputs=images)

    return Data(one(found.train), one(found.held_out), one(found.test))


def first(loader: TensorLoader, count: int) -> TensorLoader:
    """Some of the images."""
    return replace(loader, inputs=loader.inputs[:count], labels=loader.labels[:count])


def run(options: argparse.Namespace, parts: Parts) -> list[dict[str, Any]]:
    for seed in options.seeds:
        course = Course(options, seed)
        for device in options.devices:
            key = {"what": "network", "seed": seed, "device": device, "samples": len(course.train.inputs)}
            parts.add({**key, "method": "baseline"}, course.baseline, device)
            for method in options.methods:
                key |= {"method": method, "fused": device in options.fused}
                found = parts.add({**key, "what": "search"}, course.searched, method, device)
                parts.add(key, course.judged_network, found["operators"])
    return parts.done


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=55_000, help="images that what is found is trained on")
    parser.add_argument("--search-samples", type=int, default=4000, help="images of a search, a fifth for the gates")
    parser.add_argument("--start", type=int, default=4, help="epochs of the network that supernets start from")
    parser.add_argument("--epochs", type=int, default=3, help="epochs of search, behind two of warm-up")
    parser.add_argument("--training", type=int, default=8, help="epochs of training of what is found")
    parser.add_argument("--devices", nargs="+", choices=DEVICES, default=tuple(DEVICES))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--fused", nargs="*", choices=DEVICES, default=(), help="where fused blocks are on offer, too")
    parser.add_argument("--trials", type=int, default=24, help="networks that evolution and random search judge")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--width", type=float, default=0.35)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--parts", type=Path, help="a file that results are kept in, to go on with")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_memory()
    results = {"runs": run(arguments, Parts(arguments.parts))}
    finish("nas_search", results, setting={name: str(value) for name, value in vars(arguments).items()})
