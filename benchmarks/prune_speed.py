"""Time the cutting of half of all channels beside Torch-Pruning, in turns in one process; print JSON.

fxopt's time is that of the search space, the groups and the rewrite of a traced graph; Torch-Pruning's that of its
dependency graph and the cut (``MagnitudePruner``, one step, output layers ignored, on a copy of the network), with the
tracing that is part of it. Tracing by fxopt is told apart, for a graph is traced once and pruned many times; so is
another policy on the same graph, as a trial of a search applies it. Nothing is remembered from round to round. CPU time
of one thread; medians and ratios of rounds.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
import warnings
from typing import Any

import torch
from common.networks import NETWORKS
from common.output import finish, progress
from torch import nn

from fxopt.graph import trace
from fxopt.passes import PruneChannels

NAMES = ("resnet50", "densenet121")


def by_fxopt(graph: Any) -> tuple[float, float]:
    """Seconds of all of it, and of the rewrite alone, groups included."""
    start = time.thread_time()
    policy = PruneChannels().search_space(graph).uniform(0.5)
    known = time.thread_time()
    PruneChannels(policy)(graph)
    end = time.thread_time()
    return end - start, end - known


def by_torch_pruning(model: nn.Module, example: torch.Tensor) -> float:
    import torch_pruning

    twin = copy.deepcopy(model)
    last = [module for module in twin.modules() if isinstance(module, nn.Linear)][-1:]
    start = time.thread_time()
    pruner = torch_pruning.pruner.MagnitudePruner(
        twin,
        example,
        importance=torch_pruning.importance.MagnitudeImportance(p=1),
        pruning_ratio=0.5,
        ignored_layers=last,
    )
    pruner.step()
    return time.thread_time() - start


def run(name: str, rounds: int) -> dict[str, Any]:
    model, example = NETWORKS[f"pytorchcv:{name}"].build(), NETWORKS[f"pytorchcv:{name}"].example(2)
    start = time.thread_time()
    graph = trace(model, example)
    traced = time.thread_time() - start
    pairs = [(by_fxopt(graph), by_torch_pruning(model, example[:1])) for _ in range(rounds)]
    return {
        "trace_s": round(traced, 3),
        "fxopt_s": round(statistics.median(mine for (mine, _), _ in pairs), 3),
        "another_policy_s": round(statistics.median(again for (_, again), _ in pairs), 3),
        "torch_pruning_s": round(statistics.median(theirs for _, theirs in pairs), 3),
        "ratio": round(statistics.median(mine / theirs for (mine, _), theirs in pairs), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=NAMES, metavar="network", help=", ".join(NAMES))
    parser.add_argument("--rounds", type=int, default=5, help="how often both take their turn")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    results = {}
    for name in options.networks:
        results[name] = run(name, options.rounds)
        progress(f"{name}: {results[name]}")
    finish("prune_speed", results, rounds=options.rounds)


if __name__ == "__main__":
    main()
