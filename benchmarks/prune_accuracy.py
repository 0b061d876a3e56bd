"""Accuracy of a small network on Fashion-MNIST at half of its cost, before and after a fine-tune.

A uniform cut recovered in four ways (nothing, batch norm estimated anew, least squares from moments gathered once, in
order), and policies that engines searched at an equal number of trials, judged on held-out training images; each seed
is that of the search and of the fine-tune. What is told is accuracy on the test images, which no search has seen.

Each result is a line of the file ``--parts``, and each search has its journal beside it: the same command goes on where
it was stopped, and ``--engines`` and ``--seeds`` cut it into pieces that may run one after the other. What is printed
at the end is everything in the file.

    .venv/bin/python benchmarks/prune_accuracy.py --network mobilenet_v1 --parts v1.jsonl > accuracy.json
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from common.output import finish
from common.parts import Parts
from common.pruning import LEARNING_RATES, Experiment, Setting

from fxopt.evaluate import accuracy

ENGINES = ("uniform", "random", "greedy", "exact", "evolution", "reinforce", "ddpg")
MEANS = (
    "held_out",
    "test_as_searched",
    "test_in_order",
    "test_tuned",
    "cost",
    "speedup",
    "search_cpu_s",
    "engine_cpu_s",
)


def recoveries(run: Experiment) -> dict[str, Any]:
    """The largest uniform cut within the budget, recovered in four ways."""
    policy = run.uniform()
    return {
        "test_dense": accuracy(run.gm, run.data.test),
        "dense_cost": run.whole,
        "cost": float(run.costs([policy])[0] / run.whole),
        "test_cut": run.told(policy, False, norms=False),
        "test_batch_norm": run.told(policy, False),
        "test_from_moments": run.told(policy, run.recoveries["moments"]),
        "test_in_order": run.told(policy, run.least_squares),
    }


def searched(run: Experiment, engine: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """What an engine finds, and what it is worth on the test images without training."""
    # A walk of so many fractions as there are trials; other engines take the options that compare-engines gives them.
    given = {"steps": options.trials} if engine == "uniform" else None
    folder = None if options.parts is None else options.parts.with_suffix("")
    found = run.searched(engine, seed, options.trials, folder, given)
    policy = run.policy(found["policy"])
    found["test_as_searched"] = run.told(policy, run.recoveries[run.setting.recovery])
    found["test_in_order"] = run.told(policy, run.least_squares)
    return found


def tuned(run: Experiment, found: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """What fine-tuning makes of it."""
    begin = time.process_time()
    policy = run.policy(found["policy"])
    score = run.tuned(policy, found["seed"], options.tune_epochs, options.tune_rate, distill=options.distill)
    return {"test_tuned": score, "tune_cpu_s": time.process_time() - begin}


def summary(parts: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means and standard deviations over the seeds, a row an engine."""
    rows = []
    for engine in dict.fromkeys(part["engine"] for part in parts if "engine" in part):
        mine = [part for part in parts if part.get("engine") == engine]
        row: dict[str, Any] = {"engine": engine}
        for name in MEANS:
            values = [part[name] for part in mine if name in part]
            if values:
                spread = statistics.stdev(values) if len(values) > 1 else 0.0
                row[name] = {"mean": statistics.fmean(values), "spread": spread, "seeds": len(values)}
        for name in ("largest_steps_left", "highest_cost"):
            row[name] = max(part[name] for part in mine if name in part)
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=sorted(LEARNING_RATES), default="mobilenet_v2")
    parser.add_argument("--epochs", type=int, default=7, help="epochs of the dense network")
    parser.add_argument("--dense-seed", type=int, default=0)
    parser.add_argument("--metric", default="macs")
    parser.add_argument("--target", default="pixel1", help="whose cost it is, and for latency whose tile")
    parser.add_argument("--budget", type=float, default=0.5)
    parser.add_argument("--round-to", type=int, default=4)
    parser.add_argument("--engines", default=",".join(ENGINES))
    parser.add_argument("--seeds", default="0,1,2", help="seeds of search and fine-tune")
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--rows", type=int, default=15_000)
    parser.add_argument("--samples", type=int, default=1500)
    parser.add_argument("--judged", type=int, default=1000, help="held-out images that a trial looks at")
    parser.add_argument("--judge", choices=("cross-entropy", "accuracy"), default="accuracy")
    parser.add_argument("--recovery", choices=("batch-norm", "moments", "in-order"), default="moments")
    parser.add_argument("--tune-epochs", type=int, default=2)
    parser.add_argument("--tune-rate", type=float, default=0.05)
    parser.add_argument("--distill", action="store_true")
    parser.add_argument("--speed", action="store_true", help="measure the found policies in onnxruntime")
    parser.add_argument("--parts", type=Path, help="a .jsonl file of results, to go on from")
    options = parser.parse_args()
    run = Experiment(Setting(**{field.name: getattr(options, field.name) for field in fields(Setting)}))
    about = {"setting": asdict(run.setting)}
    parts = Parts(options.parts)
    parts.add({"what": "recoveries", **about}, recoveries, run)
    for seed in (int(seed) for seed in options.seeds.split(",")):
        for engine in filter(None, options.engines.split(",")):
            key = {"engine": engine, "seed": seed, "trials_asked": options.trials, **about}
            found = parts.add({"what": "search", **key}, searched, run, engine, seed, options)
            if options.tune_epochs:
                how = {name: vars(options)[name] for name in ("tune_epochs", "tune_rate", "distill")}
                parts.add({"what": "tune", **key, **how}, tuned, run, found, options)
            if options.speed:
                parts.add({"what": "speed", **key}, run.speed, run.policy(found["policy"]), torch.randn(2, 1, 28, 28))
    setting_told = {key: str(value) for key, value in vars(options).items()}
    finish("prune_accuracy", {"engines": summary(parts.done), "parts": parts.done}, **setting_told)


if __name__ == "__main__":
    main()
