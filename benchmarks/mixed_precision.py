"""Mixed bits against the same bits everywhere: small MobileNets on Fashion-MNIST, after training.

A policy is the exact solution for what each layer loses at each of its choices (``fxopt.sensitivity``: divergence of
the class probabilities on training images without labels), within the cost that the same bits everywhere have:

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
from typing import Any, TypeAlias

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import numpy.typing as npt
import torch
from common import fashion
from common.output import finish, keep_memory
from common.parts import Parts
from torch import fx

from fxopt import targets
from fxopt.decisions import FLOAT_BITS, Capabilities, Choice, Decision, Policy, SearchSpace
from fxopt.evaluate import accuracy
from fxopt.graph import trace
from fxopt.graph.fake_quantize import WeightScheme, learn_scales
from fxopt.lowering import lower
from fxopt.passes import FoldBatchNorm, Quantize
from fxopt.search.solver import solve
from fxopt.sensitivity import sensitivities
from fxopt.training import fit

Costs: TypeAlias = Callable[[list[Policy]], npt.NDArray[np.float64]]

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
        rate: The highest learning rate of further training.
    """

    name: str
    seed: int
    samples: int
    probe: int
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

    def quantized(self, policy: Policy, codebooks: bool) -> fx.GraphModule:
        """The network with a policy, calibrated and rounded, not trained."""
        images = list(self.images.split(128))
        if codebooks:
            return Quantize(policy, weights={"method": "kmeans"})(self.gm).graph_module
        return (
            Quantize(policy, calibration=images, weights=LEAST_ERROR, activations=LEAST_ERROR, rounding=True)(self.gm)
        ).graph_module

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
        target_name, _, self._metric = name.partition(":")
        self._target = targets.load(target_name) if self._metric else targets.load("bitfusion")
        able = Capabilities({"*": tuple((w, a) for w in WIDTHS for a in WIDTHS)})
        if self._metric:
            able = self._target.capabilities
        elif self.codebooks:
            able = Capabilities({"*": tuple((w, FLOAT_BITS) for w in range(1, 9))})
        self.space = SearchSpace(self._wanted(one) for one in Quantize().search_space(network.gm, able))
        self._workload = lower(network.gm, batch=self._target.capabilities.batch)

    def _wanted(self, decision: Decision) -> Decision:
        """The decision without choices that losses are not measured for."""
        kept = tuple(pair for pair in decision.choices if self.codebooks or set(pair) <= set(WIDTHS))  # type: ignore[arg-type]
        return replace(decision, choices=kept, default=kept[-1])

    def uniform(self, bits: int) -> Policy:
        """The same bits everywhere, or the nearest that a layer has."""

        def nearest(decision: Decision) -> Choice:
            return min(decision.choices, key=lambda pair: sum(abs(one - bits) for one in pair))  # type: ignore[union-attr]

        return Policy({decision.key: nearest(decision) for decision in self.space})

    def costs(self, policies: list[Policy]) -> npt.NDArray[np.float64]:
        """Costs of policies."""
        if self.name == "bops":
            macs = self.network.macs
            return np.array([sum(macs[site] * w * a for (_, site), (w, a) in one.items()) for one in policies], float)
        return np.asarray(self._workload.estimate(self._target, policies).metric(self._metric or "size"))

    def tables(self) -> list[npt.NDArray[np.float64]]:
        """What every choice of every layer adds to the cost of 8 bits everywhere, of which each has a share."""
        base = self.uniform(8)
        whole = float(self.costs([base])[0])
        return [
            self.costs([base.merged(Policy({one.key: choice})) for choice in one.choices])
            - whole * (1 - 1 / len(self.space))
            for one in self.space
        ]

    def mixed(self, limit: float) -> Policy:
        """The policy of the least sum of losses within a limit."""
        known = self.network.losses(self.codebooks)
        losses = [np.array([known[one.site][choice] for choice in one.choices]) for one in self.space]
        return self.space.decode(solve(losses, self.tables(), limit).indices)


def hash_of(text: str) -> str:
    """A short name that is the same in every process."""
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def compare(network: Trained, cost: str, bits: int, tunes: list[float], parts: Parts) -> None:
    """Both policies at the cost of so many bits everywhere."""
    setting = Setting(network, cost)
    same = setting.uniform(bits)
    limit = float(setting.costs([same])[0])
    key = {"network": network.name, "seed": network.seed, "cost": cost, "bits": bits}
    mixed = setting.mixed(limit)
    for kind, policy in (("uniform", same), ("mixed", mixed)):
        for tune in tunes:
            # What is the same everywhere does not depend on what it costs, if all layers have these bits on offer.
            digest = hash_of(policy.to_json())
            known = {"network": network.name, "seed": network.seed, "policy": digest, "tune": tune}
            told = parts.add(known, network.told, policy, setting.codebooks, tune)
            line = {"kind": kind, "of_limit": float(setting.costs([policy])[0]) / limit, "accuracy": told["accuracy"]}
            line["choices"] = [choice for _, choice in policy.items()]
            parts.add({**key, "kind": kind, "tuned": tune}, lambda line=line: line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--costs", default=",".join(COSTS))
    parser.add_argument("--bits", help="4,5,6 unless told, for size 2,3,4")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--samples", type=int, default=1024, help="training images to calibrate and round on")
    parser.add_argument("--probe", type=int, default=256, help="training images to measure losses on")
    parser.add_argument("--tune", type=float, default=0.0, help="epochs of further training, below 1")
    parser.add_argument("--rate", type=float, default=0.003)
    parser.add_argument("--parts", type=Path, help="a file to keep results in")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_memory()
    parts = Parts(options.parts)
    for seed in map(int, options.seeds.split(",")):
        for name in options.networks.split(","):
            network = Trained(name, seed, options.samples, options.probe, options.rate)
            parts.add({"network": name, "bits": "float"}, lambda n=network: {"accuracy": accuracy(n.gm, n.data.test)})
            for cost in options.costs.split(","):
                default = BITS.get(cost, (4, 5, 6))
                for bits in map(int, options.bits.split(",")) if options.bits else default:
                    compare(network, cost, bits, [options.tune], parts)
    finish("mixed_precision", {"all": parts.done}, **{k: str(v) for k, v in vars(options).items()})


if __name__ == "__main__":
    main()
