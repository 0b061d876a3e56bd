"""Measure what an agent costs per episode, accuracy left out; print JSON.

``amc`` prunes MobileNetV1 to half of its multiply-accumulates, at AMC's settings: actor of 300 and 300 units, budget by
mask. ``haq`` sets weight and activation bits of MobileNetV2's layers, two actions each, within a table of costs at 0.6
of 8 bits, by mask and by HAQ's decrease. CPU time on one thread of proposing, budget, learning; medians of episodes
after the warm-up, and means: some of them learn anew what decisions have in common.
"""

from __future__ import annotations

import statistics
import time

import numpy as np
import torch
from common.networks import NETWORKS
from common.output import finish, progress

from fxopt import passes, targets
from fxopt.decisions import AdditiveCosts, Constraint, Decision, SearchSpace
from fxopt.graph import trace
from fxopt.lowering import lower
from fxopt.passes import Canonicalize
from fxopt.search import engines

EPISODES = 45
WARMUP = 20


def graph(name: str):
    return Canonicalize()(trace(NETWORKS[f"pytorchcv:{name}"].build(), torch.randn(2, 3, 224, 224))).graph_module


def amc() -> tuple[SearchSpace, Constraint]:
    gm = graph("mobilenet_w1")
    space, workload, target = passes.create("prune-channels").search_space(gm, None), lower(gm), targets.load("pixel1")

    def macs(rows: np.ndarray) -> np.ndarray:
        return workload.estimate(target, workload.choices(space, rows)).metric("macs")[:, None]

    whole = float(macs(space.encode(space.default())[None])[0, 0])
    return space, Constraint(
        space, lambda many: macs(np.array([space.encode(p) for p in many])), whole / 2, by_index=macs
    )


def haq() -> tuple[SearchSpace, Constraint]:
    pairs = [(w, a) for w in range(1, 9) for a in range(1, 9)]
    decided = passes.create("quantize").search_space(graph("mobilenetv2_w1"), None)
    space = SearchSpace([Decision("bits", d.site, tuple(pairs), (8, 8), d.features, d.operator) for d in decided])
    product = np.array([w * a / 64 for w, a in pairs])
    costs = AdditiveCosts(space, [decision.features["macs"] * product for decision in space])
    limit = 0.6 * float(costs([space.default()])[0, 0])
    return space, Constraint(space, costs, limit, by_index=costs.at)


def milliseconds(space: SearchSpace, constraint: Constraint, **options: object) -> tuple[float, float]:
    engine = engines.create("ddpg", space, constraint, 0, warmup=WARMUP, **options)
    rng, taken = np.random.default_rng(0), []
    for _ in range(EPISODES):
        start = time.process_time()
        (policy,) = engine.ask(1)
        engine.tell(policy, float(rng.random()))
        taken.append(time.process_time() - start)
    return tuple(round(1e3 * found(taken[WARMUP:]), 1) for found in (statistics.median, statistics.mean))  # type: ignore


def main() -> None:
    torch.set_num_threads(1)
    results: dict[str, object] = {}
    for name, made in (("amc", amc()), ("haq", haq())):
        for enforce in ("mask", "decrease"):
            for hidden in ((300, 300), (64, 64)):
                median, mean = milliseconds(*made, enforce=enforce, hidden=hidden)
                progress(f"{name}, {enforce}, {hidden}: {median} ms, {mean} on average")
                results[f"{name}, {enforce}, {hidden[0]} units"] = {
                    "decisions": len(made[0]),
                    "ms_per_episode": median,
                    "ms_on_average": mean,
                }
    finish("search_overhead", results, episodes=EPISODES)


if __name__ == "__main__":
    main()
