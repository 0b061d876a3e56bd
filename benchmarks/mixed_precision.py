"""Mixed bits against the same bits everywhere: small MobileNets on Fashion-MNIST, after training.

Policies come from the exact engine: the first is the solution for what each layer loses at each of its choices
(``fxopt.sensitivity``: divergence of the class probabilities on training images without labels), within the cost that
the same bits everywhere have; the others follow from the divergence that those before it had as a whole, on other
images. ``--trials 1`` takes the first. Costs are

- ``bops``: bit operations, that is multiply-accumulates times weight bits times activation bits;
- ``TARGET:METRIC``, such as ``zynq7020:latency`` or ``bitfusion:energy``: what a target says;
- ``size``: bytes of the weights, which are indices into codebooks (k-means), activations in floats.

Weights on grids are rounded by ``RoundWeights``, those of the same bits everywhere as well. ``--tune`` trains both on
for a part of an epoch, with learned step sizes. A seed says which images calibrate and round, which ones losses are
measured on, and in what order training sees them; the float network is one. Judged on test images that nothing else has
seen. Each result is a line of the file ``--parts``: the same command goes on where it was stopped. All of them are
printed as JSON at the end.

    .venv/bin/python benchmarks/mixed_precision.py --parts mixed.jsonl > mixed_precision.json
    .venv/bin/python benchmarks/mixed_precision.py --parts mixed.jsonl --costs zynq7020:latency --tune 0.5
"""

from __future__ import annotations

import argparse
import hashlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from common import fashion
from common.output import finish, keep_memory
from common.parts import Parts
from torch import fx, nn
from torch.nn import functional

from fxopt import targets
from fxopt.data import TensorLoader
from fxopt.decisions import FLOAT_BITS, AdditiveCosts, Capabilities, Choice, Constraint, Decision, Policy, SearchSpace
from fxopt.evaluate import Evaluator, accuracy
from fxopt.graph import trace
from fxopt.graph.fake_quantize import WeightScheme, learn_scales
from fxopt.lowering import IndexCosts, lower
from fxopt.passes import FoldBatchNorm, Quantize
from fxopt.search import engines, run_search
from fxopt.sensitivity import sensitivities
from fxopt.training import fit

NETWORKS = ("mobilenet_v2", "mobilenet_v1")
COSTS = ("bops", "zynq7020:latency", "vu9p:latency", "bitfusion:latency", "bitfusion:energy", "size")
BITS = {"size": (2, 3, 4)}
"""Bits of the policies to compare with, where they are not 4, 5 and 6."""

WIDTHS = range(2, 9)
LEAST_ERROR = {"method": "mse"}


@dataclass
class Trained:
    """A trained network and what is quantized by.

    Attributes:
        name: Its name in ``common.fashion``.
        seed: Says which images are looked at, and in what order.
        samples: Training images to calibrate and round on.
        probe: Training images to measure losses on.
        judged: Held-out training images that whole policies are compared on.
        rate: The highest learning rate of further training.
    """

    name: str
    seed: int
    samples: int
    probe: int
    judged: int
    rate: float

    def __post_init__(self) -> None:
        self.data = fashion.data(seed=self.seed + 1)
        model = fashion.trained(self.name, getattr(fashion, self.name), fashion.data(), 7, 0.1)
        order = torch.randperm(len(self.data.train.inputs), generator=torch.Generator().manual_seed(self.seed))
        self.images = self.data.train.inputs[order if self.seed else slice(None)][: self.samples]
        self.gm: fx.GraphModule = FoldBatchNorm()(trace(model, self.images[:2])).graph_module

    @cached_property
    def macs(self) -> dict[str, int]:
        """Multiply-accumulates of every layer for one image."""
        return {decision.site: int(decision.features["macs"]) for decision in Quantize().search_space(self.gm)}

    def losses(self, codebooks: bool) -> dict[str, dict[Choice, float]]:
        """What each layer loses at each choice; kept, as it takes a minute."""
        pairs = [(w, FLOAT_BITS) for w in range(1, 9)] if codebooks else [(w, a) for w in WIDTHS for a in WIDTHS]
        space = Quantize().search_space(self.gm, Capabilities({"*": tuple(pairs)}))
        found = sensitivities(
            self.gm,
            space,
            self.images[: self.probe],
            method="kl",
            rounding=not codebooks,
            weights=WeightScheme("kmeans" if codebooks else "mse"),
            cache=fashion.cache() / f"losses-{self.name}-{self.seed}-{self.probe}-{codebooks}.json",
        )
        return {one.site: dict(zip(one.choices, table, strict=True)) for one, table in zip(space, found, strict=True)}

    @cached_property
    def divergence(self) -> Callable[[nn.Module], float]:
        """Minus the divergence of the class probabilities from those of the float network, on held-out images."""
        images = self.data.held_out.inputs[: self.judged]
        with torch.no_grad():
            wanted = functional.log_softmax(self.gm(images), 1)

        def judge(module: nn.Module) -> float:
            found = functional.log_softmax(module(images), 1)
            return -float(functional.kl_div(found, wanted, log_target=True, reduction="batchmean"))

        return judge

    def evaluator(self, codebooks: bool) -> Evaluator:
        """Judges policies without training."""
        loader = TensorLoader(self.images, torch.zeros(len(self.images), dtype=torch.long), 256)
        return Evaluator(self.gm, (_quantize(codebooks),), train=loader, evaluate=self.divergence)

    def quantized(self, policy: Policy, codebooks: bool) -> fx.GraphModule:
        """The network with a policy, calibrated and rounded, not trained."""
        step = replace(_quantize(codebooks), calibration=list(self.images.split(128)), policy=policy)
        return step(self.gm).graph_module

    def told(self, policy: Policy, codebooks: bool, tune: float) -> dict[str, Any]:
        """Test accuracy of a policy, after ``tune`` epochs of training."""
        start = time.process_time()
        graph = self.quantized(policy, codebooks)
        if tune:
            count = int(tune * len(self.data.train.inputs))
            part = replace(
                self.data.train, inputs=self.data.train.inputs[:count], labels=self.data.train.labels[:count]
            )
            if not codebooks:
                learn_scales(graph)
            fit(graph, part, epochs=1, learning_rate=self.rate, seed=self.seed)
        seconds = round(time.process_time() - start, 1)
        return {"accuracy": round(accuracy(graph, self.data.test), 4), "cpu_s": seconds}


class Setting:
    """What can be chosen for a network, and what it costs."""

    def __init__(self, network: Trained, name: str) -> None:
        self.name, self.network = name, network
        self.codebooks = name == "size"
        target_name, _, metric = name.partition(":")
        target = targets.load(target_name) if metric else targets.load("bitfusion")
        able = Capabilities({"*": tuple((w, a) for w in WIDTHS for a in WIDTHS)})
        if metric:
            able = target.capabilities
        elif self.codebooks:
            able = Capabilities({"*": tuple((w, FLOAT_BITS) for w in range(1, 9))})
        self.space = SearchSpace(self._wanted(one) for one in Quantize().search_space(network.gm, able))
        self.costs: AdditiveCosts | IndexCosts = self._bit_operations()
        if name != "bops":
            workload = lower(network.gm, batch=target.capabilities.batch)
            self.costs = workload.index_costs(target, self.space, [metric or "size"])

    def _bit_operations(self) -> AdditiveCosts:
        macs = self.network.macs
        return AdditiveCosts(self.space, [[macs[one.site] * w * a for w, a in one.choices] for one in self.space])

    def _wanted(self, decision: Decision) -> Decision:
        """The decision without choices that losses are not measured for."""
        kept = tuple(pair for pair in decision.choices if self.codebooks or set(pair) <= set(WIDTHS))  # type: ignore[arg-type]
        return replace(decision, choices=kept, default=kept[-1])

    def uniform(self, bits: int) -> Policy:
        """The same bits everywhere, or the nearest that a layer has."""

        def nearest(decision: Decision) -> Choice:
            return min(decision.choices, key=lambda pair: sum(abs(one - bits) for one in pair))  # type: ignore[union-attr]

        return Policy({decision.key: nearest(decision) for decision in self.space})

    def mixed(self, limit: float, trials: int) -> Policy:
        """The policy of the least divergence that was tried within a limit."""
        known = self.network.losses(self.codebooks)
        losses = [[known[one.site][choice] for choice in one.choices] for one in self.space]
        constraint = Constraint(self.space, self.costs, [limit], by_index=self.costs.at)
        engine = engines.create("exact", self.space, constraint, self.network.seed, losses=losses)
        if trials == 1:
            return engine.ask()[0]
        return run_search(engine, self.network.evaluator(self.codebooks), trials).policy


def _quantize(codebooks: bool) -> Quantize:
    if codebooks:
        return Quantize(weights={"method": "kmeans"})  # type: ignore[arg-type]
    return Quantize(weights=LEAST_ERROR, activations=LEAST_ERROR, rounding=True)  # type: ignore[arg-type]


def hash_of(text: str) -> str:
    """A short name that is the same in every process."""
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def compare(network: Trained, cost: str, bits: int, trials: int, tune: float, parts: Parts) -> None:
    """Both policies at the cost of so many bits everywhere."""
    setting = Setting(network, cost)
    same = setting.uniform(bits)
    limit = float(setting.costs([same])[0, 0])
    key = {"network": network.name, "seed": network.seed, "cost": cost, "bits": bits}
    found = parts.add({**key, "trials": trials}, lambda: {"found": setting.mixed(limit, trials).to_json()})
    for kind, policy in (("uniform", same), ("mixed", Policy.from_json(found["found"]))):
        # What is the same everywhere does not depend on what it costs, if all layers have these bits on offer.
        known = {"network": network.name, "seed": network.seed, "policy": hash_of(policy.to_json()), "tune": tune}
        told = parts.add(known, network.told, policy, setting.codebooks, tune)
        line = {"of_limit": float(setting.costs([policy])[0, 0]) / limit, "accuracy": told["accuracy"]}
        parts.add({**key, "of": trials, "kind": kind, "tuned": tune}, lambda line=line: line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--costs", default=",".join(COSTS))
    parser.add_argument("--bits", help="4,5,6 unless told, for size 2,3,4")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--samples", type=int, default=1024, help="training images to calibrate and round on")
    parser.add_argument("--probe", type=int, default=256, help="training images to measure losses on")
    parser.add_argument("--judged", type=int, default=1000, help="held-out images to compare whole policies on")
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--tune", type=float, default=0.0, help="epochs of further training, below 1")
    parser.add_argument("--rate", type=float, default=0.003)
    parser.add_argument("--parts", type=Path, help="a file to keep results in")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_memory()
    parts = Parts(options.parts)
    for seed in map(int, options.seeds.split(",")):
        for name in options.networks.split(","):
            network = Trained(name, seed, options.samples, options.probe, options.judged, options.rate)
            parts.add({"network": name, "bits": "float"}, lambda n=network: {"accuracy": accuracy(n.gm, n.data.test)})
            for cost in options.costs.split(","):
                default = BITS.get(cost, (4, 5, 6))
                for bits in map(int, options.bits.split(",")) if options.bits else default:
                    compare(network, cost, bits, options.trials, options.tune, parts)
    finish("mixed_precision", {"all": parts.done}, **{k: str(v) for k, v in vars(options).items()})


if __name__ == "__main__":
    main()
