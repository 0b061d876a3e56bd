"""Fewer weights at equal accuracy: a ResNet of bottlenecks on Fashion-MNIST, zeroed weight by weight (He et al. 2018).

In stages, by default to 50, 35, 25 and 20% of the weights: an engine decides how many weights of each layer stay (each
trial zeroes them, estimates batch norm anew and is judged on held-out training images), they are zeroed, and the
network is fine-tuned with the zeros kept. Beside it stands the same with one fraction for all layers. What is told is
accuracy on the test images, which no search has seen; and of the dense network trained on for the same epochs.

Every stage is kept in the folder of trained networks, so that the benchmark goes on where it was stopped.

    .venv/bin/python benchmarks/sparsify_accuracy.py --seeds 3 > sparsify.json
"""

from __future__ import annotations

import argparse
import functools
import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from common import fashion
from common.output import finish, progress
from safetensors.torch import load_file, save_file
from torch import fx

import fxopt
from fxopt import targets
from fxopt.decisions import Constraint, Policy, SearchSpace
from fxopt.evaluate import Evaluator, accuracy, apply_policy
from fxopt.graph import edit
from fxopt.graph.sparsity import sparse_sites
from fxopt.lowering import lower
from fxopt.passes import Canonicalize, SparsifyWeights
from fxopt.search import engines, run_search
from fxopt.training import fit

FRACTIONS = (0.3, 0.4, 0.5, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.93, 0.95)


class Experiment:
    """A trained network, and the stages in which it is thinned."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.data = fashion.data()
        self.place = fashion.cache() / f"sparsify-{options.width}"
        self.place.mkdir(parents=True, exist_ok=True)
        name = f"resnet_50_like_{options.width}"
        make = functools.partial(fashion.resnet_50_like, options.width)
        model = fashion.trained(name, make, self.data, options.epochs, 0.05, weight_decay=5e-4)
        self.gm: fx.GraphModule = Canonicalize()(fxopt.trace(model, torch.randn(2, 1, 28, 28))).graph_module
        self.step = SparsifyWeights(fractions=FRACTIONS)
        self.sites = [decision.site for decision in self.step.search_space(self.gm)]
        self.whole = sum(self.gm.get_parameter(f"{site}.weight").numel() for site in self.sites)

    def weights(self, gm: fx.GraphModule) -> int:
        """Weights that are not zero."""
        return sum(int(gm.get_parameter(f"{site}.weight").count_nonzero()) for site in self.sites)

    def constraint(self, gm: fx.GraphModule, space: SearchSpace, density: float) -> Constraint:
        """No more weights than that part of all."""
        rows = lower(gm)
        sizes = np.array([self.gm.get_parameter(f"{site}.weight").numel() for site in self.sites])
        at = [rows.names.index(site) for site in self.sites]

        def kept(policies: Any) -> np.ndarray[Any, Any]:
            bound = rows.bind(policies).rows["weight_density"][:, at] if len(policies) else np.zeros((0, len(at)))
            return np.asarray((bound * sizes).sum(axis=1, keepdims=True))

        return Constraint(space, kept, np.array([density * self.whole]), ["weights"])

    def searched(self, gm: fx.GraphModule, density: float, seed: int, path: Path) -> Policy:
        """The best policy that the engine finds for a graph."""
        space = self.step.search_space(gm)
        batches = self.options.judged // 500
        judge = Evaluator(
            gm, [self.step], train=self.data.train, val=self.data.held_out, max_batches=batches, reconstruct=False
        )
        probes = {"probes": 1} if self.options.engine == "exact" else {}
        engine = engines.create(self.options.engine, space, self.constraint(gm, space, density), seed, **probes)
        begin = time.process_time()
        found = run_search(engine, judge, self.options.trials, journal=f"{path}.jsonl")
        spent = time.process_time() - begin
        progress(f"{self.options.engine}: {found.score:.4f} on held-out images, {spent:.0f} s for {len(found.trials)}")
        return found.policy

    def staged(self, kind: str, seed: int) -> dict[str, Any]:
        """The accuracy after every stage; ``kind`` is "searched", "uniform" or "dense"."""
        gm = self.gm
        told: dict[str, Any] = {"seed": seed, "stages": []}
        densities = self.options.densities
        for index, density in enumerate(densities):
            way = "-".join(f"{100 * one:.0f}" for one in densities[: index + 1])
            path = self.place / f"{kind}-{self.options.engine if kind == 'searched' else 'all'}-{seed}-to-{way}"
            gm = self._stage(gm, kind, density, index, seed, path)
            left = self.weights(gm)
            told["stages"].append({"weights": left, "held_out": accuracy(gm, self.data.held_out)})
            progress(f"{kind} {seed}, stage {index + 1}: {left} weights, {told['stages'][-1]['held_out']:.4f} held out")
        told |= {"fewer": self.whole / left, "test": accuracy(gm, self.data.test)}
        estimate = lower(gm).estimate(targets.load("pixel1"), [Policy({})])
        told["size_bytes"] = float(estimate.weight_bytes[0])
        told["zeros"] = dict(sparse_sites(gm))
        return told

    def _stage(
        self, gm: fx.GraphModule, kind: str, density: float, index: int, seed: int, path: Path
    ) -> fx.GraphModule:
        chosen, trained = Path(f"{path}.json"), Path(f"{path}.safetensors")
        if not chosen.is_file():
            policy = Policy({})
            if kind == "uniform":
                policy = Policy({("sparsity", site): 1.0 - density for site in self.sites})
            elif kind == "searched":
                policy = self.searched(gm, density, seed, path)
            policy.save(chosen)
        graph = apply_policy(gm, [self.step], Policy.load(chosen), calibration=self.data.train)
        graph = edit.own_copy(graph)
        if trained.is_file():
            graph.load_state_dict(load_file(trained))
            return graph.eval()
        epochs = self.options.last_epochs if index == len(self.options.densities) - 1 else self.options.stage_epochs
        fit(
            graph,
            fashion.data(seed=seed + 1).train,
            epochs=epochs,
            learning_rate=self.options.rate,
            weight_decay=5e-4,
            seed=seed + index,
            checkpoint=f"{path}-steps",
            progress=lambda epoch, total, loss: progress(f"{path.name}: epoch {epoch} of {total}, loss {loss:.4f}"),
        )
        save_file({name: tensor.contiguous() for name, tensor in graph.state_dict().items()}, trained)
        return graph


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=8, help="epochs of the dense network")
    parser.add_argument("--engine", default="exact")
    parser.add_argument("--trials", type=int, default=64, help="trials of the search of each stage")
    parser.add_argument("--judged", type=int, default=2000, help="held-out images that a trial looks at")
    parser.add_argument("--densities", type=float, nargs="+", default=[0.5, 0.35, 0.25, 0.2], help="of the stages")
    parser.add_argument("--stage-epochs", type=int, default=1)
    parser.add_argument("--last-epochs", type=int, default=3)
    parser.add_argument("--rate", type=float, default=0.02)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--kinds", nargs="+", default=["searched", "uniform", "dense"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    run = Experiment(options)
    results: dict[str, Any] = {"weights": run.whole, "dense": accuracy(run.gm, run.data.test)}
    progress(str(results))
    for kind in options.kinds:
        results["dense_on" if kind == "dense" else kind] = [run.staged(kind, seed) for seed in range(options.seeds)]
    finish("sparsify_accuracy", results, **vars(options))


if __name__ == "__main__":
    main()
