"""Accuracy of a small network on Fashion-MNIST at half of its multiply-accumulates, before and after a fine-tune.

Uniform cuts are recovered in four ways: nothing, batch norm estimated anew, least squares from moments gathered once,
and least squares in order. Policies that an engine searched (each trial with least squares in order, judged on held-out
training images) stand beside them. What is told is accuracy on the test images, which no search has seen.

    .venv/bin/python benchmarks/prune_accuracy.py --network mobilenet_v2 --engine evolution --trials 40 > accuracy.json
"""

from __future__ import annotations

import argparse
import os
import time
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from common import fashion
from common.output import finish, progress
from torch import fx

import fxopt
from fxopt import targets
from fxopt.decisions import Constraint, Policy
from fxopt.evaluate import Evaluator, Reconstruction, accuracy, apply_policy
from fxopt.graph import edit
from fxopt.lowering import lower
from fxopt.passes import Canonicalize, PruneChannels
from fxopt.search import engines, run_search
from fxopt.training import Distillation, fit

LEARNING_RATES = {"mobilenet_v1": 0.1, "mobilenet_v2": 0.1}


class Experiment:
    """One network, its data, and what its policies cost and are worth."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.data = fashion.data()
        make = getattr(fashion, options.network)
        name, rate = options.network, LEARNING_RATES[options.network]
        self.model = fashion.trained(name, make, self.data, options.epochs, rate)
        self.gm: fx.GraphModule = Canonicalize()(fxopt.trace(self.model, torch.randn(2, 1, 28, 28))).graph_module
        self.prune = PruneChannels(round_to=options.round_to)
        self.space = self.prune.search_space(self.gm)
        self.workload = lower(self.gm)
        self.target = targets.load("pixel1")
        self.whole = float(self.macs([self.space.default()])[0])
        limit = np.array([options.budget * self.whole])
        self.constraint = Constraint(self.space, lambda policies: self.macs(policies)[:, None], limit, ["macs"])
        self.least_squares = Reconstruction(samples=1500, rows=options.rows)

    def macs(self, policies: Any) -> np.ndarray[Any, Any]:
        """Multiply-accumulates of policies."""
        return np.asarray(self.workload.estimate(self.target, policies).metric("macs"))

    def uniform(self) -> Policy:
        """The largest fraction for all groups that is within the budget."""
        fractions = np.linspace(0.2, 1.0, 161)
        policies = [self.space.uniform(float(fraction)) for fraction in fractions]
        within = np.flatnonzero(self.macs(policies) <= self.options.budget * self.whole)
        return policies[int(within[-1])]

    def applied(self, policy: Policy, how: bool | Reconstruction, *, norms: bool = True) -> fx.GraphModule:
        """The pruned network, recovered without training."""
        calibration = self.data.train if norms or how else None
        return apply_policy(self.gm, [self.prune], policy, calibration=calibration, reconstruct=how)

    def told(self, policy: Policy, how: bool | Reconstruction, *, norms: bool = True) -> float:
        """Its test accuracy."""
        return accuracy(self.applied(policy, how, norms=norms), self.data.test)

    def searched(self, engine: str, seed: int) -> tuple[Policy, dict[str, Any]]:
        """The best policy that an engine finds, and what is to be told of the search."""
        begin = time.process_time()
        judge = Evaluator(
            self.gm,
            [self.prune],
            train=self.data.train,
            val=self.data.held_out,
            reconstruct=self.least_squares,
            seed=seed,
        )
        found = run_search(
            engines.create(engine, self.space, self.constraint, seed),
            judge,
            self.options.trials,
            progress=lambda state: progress(
                f"{engine}: trial {state.trials}, best {state.best.score if state.best else None}"
            ),
        )
        spent = time.process_time() - begin
        return found.policy, {"seed": seed, "held_out": found.score, "trials": len(found.trials), "cpu_s": spent}

    def tuned(self, policy: Policy, seed: int) -> float:
        """Test accuracy after fine-tuning."""
        graph = edit.own_copy(self.applied(policy, self.least_squares))
        fit(
            graph,
            fashion.data(seed=seed + 1).train,
            epochs=self.options.tune_epochs,
            learning_rate=self.options.tune_rate,
            teacher=self.gm if self.options.distill else None,
            distillation=Distillation(temperature=4.0),
            seed=seed,
        )
        return accuracy(graph, self.data.test)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=sorted(LEARNING_RATES), default="mobilenet_v2")
    parser.add_argument("--epochs", type=int, default=7, help="epochs of the dense network")
    parser.add_argument("--budget", type=float, default=0.5)
    parser.add_argument("--engine", default="evolution")
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--rows", type=int, default=15_000)
    parser.add_argument("--round-to", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=1, help="seeds of search and fine-tune")
    parser.add_argument("--tune-epochs", type=int, default=2)
    parser.add_argument("--tune-rate", type=float, default=0.05)
    parser.add_argument("--distill", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    run = Experiment(options)
    uniform = run.uniform()
    results: dict[str, Any] = {
        "dense": accuracy(run.gm, run.data.test),
        "macs": run.whole,
        "uniform": {
            "macs": float(run.macs([uniform])[0] / run.whole),
            "cut": run.told(uniform, False, norms=False),
            "batch_norm": run.told(uniform, False),
            "from_moments": run.told(uniform, Reconstruction(sequential=False, samples=1500, rows=options.rows)),
            "in_order": run.told(uniform, run.least_squares),
        },
    }
    progress(str(results))
    searched = []
    for seed in range(options.seeds):
        policy, about = run.searched(options.engine, seed)
        about["macs"] = float(run.macs([policy])[0] / run.whole)
        about["test"] = run.told(policy, run.least_squares)
        about["policy"] = {site: kept for (_, site), kept in policy.items()}
        progress(str(about))
        if options.tune_epochs:
            about["tuned"] = run.tuned(policy, seed)
            progress(f"tuned: {about['tuned']}")
        searched.append(about)
    results[options.engine] = searched
    finish("prune_accuracy", results, **vars(options))


if __name__ == "__main__":
    main()
