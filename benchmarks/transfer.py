"""An agent that learnt to give bits to the layers of one network starts on another (Wang et al. 2019, HAQ).

``ddpg`` searches MobileNetV1's bits within the latency that the same bits everywhere have on a target, judged by the
divergence of the class probabilities from those of the float network on images that are held out. The agent is saved
and starts on MobileNetV2, with a tenth of the episodes. Beside it: the same bits everywhere, agents that start afresh
with as few and with all episodes, and the exact solution for measured sensitivities. All are judged once on test
images, after rounding, without training. ``--folder`` keeps journals and results: the same command goes on where it was
stopped.

    .venv/bin/python benchmarks/transfer.py --folder transfer > transfer.json
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from common.output import finish, keep_memory, progress
from common.parts import Parts
from mixed_precision import Setting, Trained

from fxopt.decisions import Constraint, Policy
from fxopt.search import engines, run_search

FIRST, SECOND = "mobilenet_v1", "mobilenet_v2"


class Problem:
    """Bits for the layers of a network, within the latency of the same bits everywhere."""

    def __init__(self, name: str, cost: str, bits: int, judged: int) -> None:
        self.network = Trained(name, 0, samples=1024, probe=256, judged=judged, rate=0.0)
        self.setting = Setting(self.network, cost)
        self.uniform = self.setting.uniform(bits)
        costs = self.setting.costs
        self.limit = float(costs([self.uniform])[0, 0])
        # A hair above, so that the same bits everywhere are not over by a rounding error.
        self.constraint = Constraint(self.setting.space, costs, self.limit * (1 + 1e-9), by_index=costs.at)
        self.evaluate = self.network.evaluator(codebooks=False)

    def search(self, trials: int, seed: int, journal: Path, **options: Any) -> tuple[Any, Policy, float]:
        """The agent, the best policy and its score."""
        engine: Any = engines.create("ddpg", self.setting.space, self.constraint, seed, **options)
        start = time.process_time()
        found = run_search(engine, self.evaluate, trials, journal=journal)
        progress(f"{journal.name}: {found.score:.4f}, {time.process_time() - start:.0f} s")
        return engine, found.policy, float(found.score or 0.0)

    def told(self, policy: Policy) -> dict[str, Any]:
        """What a policy is worth in the end."""
        return {
            "score": round(self.evaluate(policy), 4),
            "accuracy": self.network.told(policy, False, 0.0)["accuracy"],
            "of_limit": round(float(self.setting.costs([policy])[0, 0]) / self.limit, 4),
        }


def transfer(options: argparse.Namespace, bits: int, seed: int, parts: Parts) -> None:
    """All that is compared, for one budget and one seed."""
    key = {"bits": bits, "seed": seed}
    few = options.episodes // 10
    second = Problem(SECOND, options.cost, bits, options.judged)
    agent = options.folder / f"agent-{bits}-{seed}.json"
    if not agent.is_file():
        first = Problem(FIRST, options.cost, bits, options.judged)
        engine, _, _ = first.search(options.episodes, seed, options.folder / f"first-{bits}-{seed}.jsonl")
        engine.save_agent(agent)
    parts.add({"bits": bits, "kind": "uniform"}, second.told, second.uniform)
    parts.add({"bits": bits, "kind": "exact"}, lambda: second.told(second.setting.mixed(second.limit, 1)))
    runs: list[tuple[str, int, dict[str, Any]]] = [
        ("transferred", few, {"warm_start": agent}),
        ("transferred, first", 1, {"warm_start": agent}),
        ("afresh, few", few, {}),
        ("afresh, all", options.episodes, {}),
    ]
    for kind, trials, more in runs:
        path = options.folder / f"{kind.replace(', ', '-')}-{bits}-{seed}.jsonl"
        parts.add(
            {**key, "kind": kind},
            lambda trials=trials, path=path, more=more: second.told(second.search(trials, seed, path, **more)[1]),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cost", default="zynq7020:latency")
    parser.add_argument("--bits", default="4,5")
    parser.add_argument("--episodes", type=int, default=300)
    parser.add_argument("--judged", type=int, default=512, help="held-out images that trials are judged by")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("transfer"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_memory()
    options.folder.mkdir(parents=True, exist_ok=True)
    parts = Parts(options.folder / "results.jsonl")
    for bits in map(int, options.bits.split(",")):
        for seed in range(options.seeds):
            transfer(options, bits, seed, parts)
    finish("transfer", {"all": parts.done}, **{name: str(value) for name, value in vars(options).items()})


if __name__ == "__main__":
    main()
