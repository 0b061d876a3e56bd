"""Pruning a small network of Fashion-MNIST to a budget: what policies cost and what they are worth."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.nn import functional

import fxopt
from common import fashion
from common.output import keep_memory, progress
from fxopt import targets
from fxopt._host import load_target
from fxopt.data import TensorLoader
from fxopt.decisions import Constraint, Policy
from fxopt.evaluate import Evaluator, Reconstruction, accuracy, apply_policy
from fxopt.export import measure
from fxopt.graph import edit
from fxopt.lowering import lower
from fxopt.passes import Canonicalize, PruneChannels
from fxopt.progress import Silent
from fxopt.search import compare
from fxopt.training import Distillation, fit

LEARNING_RATES = {"mobilenet_v1": 0.1, "mobilenet_v2": 0.1}
_AT_ONCE = 64


@dataclass(frozen=True)
class Setting:
    """One network and one budget.

    Attributes:
        network: A name of ``LEARNING_RATES``.
        epochs: Epochs of the dense network.
        dense_seed: Seed of its training.
        metric: What the budget limits.
        target: Whose cost it is.
        budget: The part of the dense network's cost.
        round_to: Counts of channels are multiples of this and, but for multiply-accumulates, of the target's tile.
        samples: Training images of the least squares.
        rows: Rows of the least squares.
        judged: Held-out images that a trial looks at.
        judge: What of them it is told: ``"accuracy"`` or ``"cross-entropy"``, which tells more of as many images.
        recovery: What a trial does before it judges: ``"batch-norm"`` estimates batch norm anew; ``"moments"`` and
            ``"in-order"`` find weights anew besides, by least squares from moments gathered once, or in order.
    """

    network: str = "mobilenet_v1"
    epochs: int = 7
    dense_seed: int = 0
    metric: str = "macs"
    target: str = "pixel1"
    budget: float = 0.5
    round_to: int = 4
    samples: int = 1500
    rows: int = 15_000
    judged: int = 1000
    judge: str = "accuracy"
    recovery: str = "moments"


class Budgeted:
    """What can be cut of a network, and what that costs of a budget.

    Args:
        gm: The network's canonical graph.
        metric: What the budget limits.
        target: Whose cost it is.
        budget: The part of the uncut network's cost.
        round_to: Counts of channels are multiples of this and, but for multiply-accumulates, of the target's tile.
    """

    def __init__(self, gm: fx.GraphModule, metric: str, target: str, budget: float, round_to: int = 1) -> None:
        self.gm, self.metric = gm, metric
        self.target = load_target(target, Silent())
        self.prune = PruneChannels(round_to=round_to)
        self.space = self.prune.search_space(gm, None if metric == "macs" else self.target.capabilities)
        self.workload = lower(gm, batch=1)
        if target == targets.HOST:
            for policy in (self.space.default(), self.space.uniform(0.5)):
                self.target.prepare(self.workload.bind(policy))
        self.whole = float(self.costs([self.space.default()])[0])
        self.limit = budget * self.whole
        self.constraint = Constraint(self.space, lambda some: self.costs(some)[:, None], [self.limit], [metric])

    def costs(self, policies: Any) -> np.ndarray[Any, Any]:
        """What policies cost, in the budget's metric."""
        return np.asarray(self.workload.estimate(self.target, policies).metric(self.metric))

    def unused(self, policy: Policy) -> dict[str, float]:
        """How much of the budget a policy leaves, also in steps of one decision to its next larger choice."""
        cost = float(self.costs([policy])[0])
        steps = self.costs(self._raised(policy)) - cost
        steps = steps[steps > 0]
        return {
            "cost": cost / self.whole,
            "largest_steps_left": (self.limit - cost) / float(steps.max()),
            "smallest_steps_left": (self.limit - cost) / float(steps.min()),
        }

    def uniform(self) -> Policy:
        """The largest fraction for all groups that is within the budget."""
        policies = [self.space.uniform(float(fraction)) for fraction in np.linspace(0.1, 1.0, 181)]
        within = np.flatnonzero(self.constraint.feasible(policies))
        return policies[int(within[-1])]

    def filled(self, policy: Policy) -> Policy:
        """The policy raised by the cheapest step until none fits."""
        while raised := self._raised(policy):
            costs = self.costs(raised)
            if costs.min() > self.limit:
                break
            policy = raised[int(costs.argmin())]
        return policy

    def _raised(self, policy: Policy) -> list[Policy]:
        """The policies in which one decision has its next larger choice."""
        row = self.space.encode(policy)
        raised = [row + (np.arange(len(row)) == j) for j in np.flatnonzero(row + 1 < self.space.sizes)]
        return self.space.decode_all(np.array(raised)) if raised else []

    def speed(self, policy: Policy, example: torch.Tensor, runs: int = 200) -> dict[str, Any]:
        """How much faster the cut network runs in onnxruntime, one thread, batch 1, both in turn."""
        smaller = apply_policy(self.gm, [self.prune], policy, reconstruct=False)
        found = measure(self.gm, example, runs=runs, peers=[smaller])
        (one,) = found.peers
        return {
            "dense_s": found.median_s,
            "pruned_s": one.median_s,
            "speedup": 1.0 / one.ratio,
            "speedup_quartiles": [1.0 / one.ratio_q75, 1.0 / one.ratio_q25],
        }


@dataclass(frozen=True)
class CrossEntropy:
    """Minus the mean cross entropy of a classifier, higher is better."""

    loader: TensorLoader

    def __call__(self, model: nn.Module) -> float:
        """Minus the mean over the loader's samples."""
        losses = [functional.cross_entropy(model(inputs), labels, reduction="none") for inputs, labels in self.loader]
        return -float(torch.cat(losses).mean())


class Experiment(Budgeted):
    """One network trained on Fashion-MNIST, and what is left of it under policies."""

    def __init__(self, setting: Setting) -> None:
        keep_memory()
        torch.set_num_threads(1)
        self.setting = setting
        self.data = fashion.data()
        name, rate = setting.network, LEARNING_RATES[setting.network]
        model = fashion.trained(name, getattr(fashion, name), self.data, setting.epochs, rate, setting.dense_seed)
        gm = Canonicalize()(fxopt.trace(model, torch.randn(2, 1, 28, 28))).graph_module
        super().__init__(gm, setting.metric, setting.target, setting.budget, setting.round_to)
        self.least_squares = Reconstruction(samples=setting.samples, rows=setting.rows)
        moments = replace(self.least_squares, sequential=False)
        self.recoveries = {"batch-norm": False, "moments": moments, "in-order": self.least_squares}

    def applied(self, policy: Policy, how: bool | Reconstruction, *, norms: bool = True) -> fx.GraphModule:
        """The pruned network, recovered without training."""
        calibration = self.data.train if norms or how else None
        return apply_policy(self.gm, [self.prune], policy, calibration=calibration, reconstruct=how)

    def told(self, policy: Policy, how: bool | Reconstruction, *, norms: bool = True) -> float:
        """Its test accuracy."""
        return accuracy(self.applied(policy, how, norms=norms), self.data.test)

    def judge(self, seed: int) -> Evaluator:
        """What searches are told of held-out training images."""
        held, count = self.data.held_out, self.setting.judged
        part = TensorLoader(held.inputs[:count], held.labels[:count], _AT_ONCE)
        told: Any = {"val": part} if self.setting.judge == "accuracy" else {"evaluate": CrossEntropy(part)}
        return Evaluator(
            self.gm,
            [self.prune],
            train=replace(self.data.train, batch_size=_AT_ONCE),
            max_batches=len(part),
            reconstruct=self.recoveries[self.setting.recovery],
            seed=seed,
            **told,
        )

    def searched(self, engine: str, seed: int, trials: int, folder: Path | None, options: Any = None) -> dict[str, Any]:
        """The best policy that an engine finds, and what is to be told of the search."""
        begin = time.process_time()
        found = compare(
            self.space,
            self.judge(seed),
            trials,
            constraint=self.constraint,
            names=[engine],
            seeds=(seed,),
            options=None if options is None else {engine: options},
            folder=folder,
            context=asdict(self.setting),
            progress=lambda name, seed, state: _show(f"{name}, seed {seed}", state),
        )
        (run,), spent = found.runs, time.process_time() - begin
        best = run.result.policy
        return {
            "held_out": run.result.score,
            "trials": len(run.result.trials),
            "evaluations": run.result.evaluations,
            "search_cpu_s": spent,
            "engine_cpu_s": run.engine_cpu_s,
            "highest_cost": max(float(self.costs([trial.policy])[0]) for trial in run.result.trials) / self.whole,
            **self.unused(best),
            "policy": {site: kept for (_, site), kept in best.items()},
        }

    def policy(self, kept: dict[str, int]) -> Policy:
        """The policy that keeps so many channels at each site."""
        return Policy({("channels", site): count for site, count in kept.items()})

    def tuned(self, policy: Policy, seed: int, epochs: int, rate: float, *, distill: bool = False) -> float:
        """Test accuracy after fine-tuning."""
        graph = edit.own_copy(self.applied(policy, self.least_squares))
        fit(
            graph,
            replace(self.data.train, seed=seed + 100),
            epochs=epochs,
            learning_rate=rate,
            teacher=self.gm if distill else None,
            distillation=Distillation(temperature=4.0),
            seed=seed,
        )
        return accuracy(graph, self.data.test)


def _show(run: str, state: Any) -> None:
    if state.done % 20 == 0 or state.done == state.trials:
        progress(f"{run}: trial {state.done} of {state.trials}, best {state.best and state.best.score}")
