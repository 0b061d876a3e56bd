"""Mixed bits against the same bits everywhere, without training: a small MobileNet on Fashion-MNIST.

A policy is the exact solution for what each layer loses at each of its choices (``fxopt.sensitivity``), within the cost
that the same bits everywhere have: bit operations (multiply-accumulates times weight bits times activation bits), or
latency or energy on a target. Weights of both are rounded by ``RoundWeights``. Judged on test images that nothing else
has seen; printed as JSON. ``--epochs-after`` trains both further.

    .venv/bin/python benchmarks/mixed_precision.py > mixed_precision.json
    .venv/bin/python benchmarks/mixed_precision.py --target zynq7020 --metric latency --bits 4,5,6
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
import torch
from common import fashion
from common.output import finish, progress
from torch import fx

from fxopt import targets
from fxopt.decisions import Capabilities, Policy, SearchSpace
from fxopt.evaluate import accuracy
from fxopt.graph import trace
from fxopt.lowering import lower
from fxopt.passes import FoldBatchNorm, Quantize
from fxopt.search.solver import solve
from fxopt.sensitivity import sensitivities
from fxopt.training import fit

BITS = range(2, 9)
LEAST_ERROR = {"method": "mse"}


class Experiment:
    """A trained network, what its policies cost, and what they are worth."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.data = fashion.data()
        self.model = fashion.trained(options.network, getattr(fashion, options.network), self.data, 7, 0.1)
        self.images = list(self.data.train.inputs[: options.samples].split(128))
        self.gm: fx.GraphModule = FoldBatchNorm()(trace(self.model, self.images[0][:2])).graph_module
        self.target = targets.load(options.target or "bitfusion")
        able = Capabilities({"*": tuple((w, a) for w in BITS for a in BITS)})
        if options.target is not None:
            able = self.target.capabilities
        self.space = Quantize().search_space(self.gm, able)
        self.workload = lower(self.gm)
        self.costs = self.tables()

    def tables(self) -> list[np.ndarray[Any, Any]]:
        """Cost of every choice of every layer; the rest of the network is left out, as no policy changes it."""
        base = self.uniform(8)
        macs = self.macs() if self.options.target is None else {}
        tables = []
        for decision in self.space:
            if self.options.target is None:
                tables.append(np.array([macs[decision.site] * w * a for w, a in decision.choices], float))
                continue
            changed = [base.merged(Policy({decision.key: choice})) for choice in decision.choices]
            found = self.workload.estimate(self.target, changed).metric(self.options.metric)
            whole = self.workload.estimate(self.target, [base]).metric(self.options.metric)[0]
            share = whole / len(self.space)
            tables.append(np.asarray(found) - whole + share)
        return tables

    def macs(self) -> dict[str, int]:
        """Multiply-accumulates of every layer for one image."""
        found: dict[str, int] = {}
        shapes = {str(node.target): node.meta["val"].shape for node in self.gm.graph.find_nodes(op="call_module")}
        for decision in self.space:
            weight: Any = self.gm.get_submodule(decision.site).weight
            found[decision.site] = int(np.prod(shapes[decision.site][1:])) * weight[0].numel()
        return found

    def uniform(self, bits: int) -> Policy:
        """The same bits everywhere, or the nearest that a layer has."""
        return Policy(
            {
                decision.key: min(decision.choices, key=lambda pair: abs(pair[0] - bits) + abs(pair[1] - bits))
                for decision in self.space
            }
        )

    def cost(self, policy: Policy) -> float:
        """The sum of the layers' costs."""
        return sum(float(table[i]) for table, i in zip(self.costs, self.space.encode(policy), strict=True))

    def losses(self) -> list[np.ndarray[Any, Any]]:
        """What each layer loses at each choice."""
        batch = torch.cat(self.images)[: self.options.probe]
        found = sensitivities(self.gm, self.space, batch, method="kl", rounding=True)
        return [np.array(table) for table in found]

    def mixed(self, losses: list[np.ndarray[Any, Any]], limit: float) -> Policy:
        """The policy of the least sum of losses within a limit."""
        return SearchSpace(self.space).decode(solve(losses, self.costs, limit).indices)

    def told(self, policy: Policy) -> dict[str, float]:
        """Test accuracy after quantization, and after further training if that is asked for."""
        quantize = Quantize(
            policy, calibration=self.images, weights=LEAST_ERROR, activations=LEAST_ERROR, rounding=True
        )
        graph = quantize(self.gm).graph_module
        found = {"accuracy": accuracy(graph, self.data.test)}
        for seed in range(self.options.seeds if self.options.epochs_after else 0):
            tuned = quantize(self.gm).graph_module
            data = fashion.data(seed=seed + 1)
            fit(tuned, data.train, epochs=self.options.epochs_after, learning_rate=self.options.rate, seed=seed)
            found[f"tuned {seed}"] = accuracy(tuned, self.data.test)
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=("mobilenet_v1", "mobilenet_v2"), default="mobilenet_v2")
    parser.add_argument("--target", help="a target; bit operations without one")
    parser.add_argument("--metric", default="latency")
    parser.add_argument("--bits", default="4,5,6")
    parser.add_argument("--samples", type=int, default=1024, help="training images to calibrate and round on")
    parser.add_argument("--probe", type=int, default=256, help="training images to measure losses on")
    parser.add_argument("--epochs-after", type=int, default=0)
    parser.add_argument("--rate", type=float, default=0.005)
    parser.add_argument("--seeds", type=int, default=1, help="seeds of further training")
    options = parser.parse_args()
    torch.set_num_threads(1)
    run = Experiment(options)
    results: dict[str, Any] = {"float": accuracy(run.gm, run.data.test)}
    start = time.process_time()
    losses = run.losses()
    results["sensitivities_s"] = round(time.process_time() - start, 1)
    progress(str(results))
    for bits in map(int, options.bits.split(",")):
        same = run.uniform(bits)
        limit = run.cost(same)
        policy = run.mixed(losses, limit)
        results[str(bits)] = {
            "uniform": run.told(same),
            "mixed": run.told(policy),
            "cost": run.cost(policy) / limit,
            "policy": [choice for _, choice in policy.items()],
        }
        progress(f"{bits}: {results[str(bits)]}")
    finish("mixed_precision", results, **vars(options))


if __name__ == "__main__":
    main()
