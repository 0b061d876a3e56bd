"""Trace real architectures with fxopt, ``torch.fx.symbolic_trace`` and ``torch.export``; print JSON.

Each tracer gets the same network with random weights and an example of two samples; ``torch.export`` is told that the
first dimension is the batch. What comes out runs on three samples, in eval mode, and is compared with the network:
``difference`` is the largest difference over the network's largest output, and a network counts as *covered* if it is
traced and differs by at most 1e-6. A graph that fxopt calls fixed to its batch is compared at that batch, and does not
count as ``dynamic``.

Times are CPU time of one thread. The tracers take turns in going first, and each has traced a small network before. A
package that is not installed is skipped and said to be.
"""

from __future__ import annotations

import argparse
import fnmatch
import gc
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from common.networks import NETWORKS
from common.output import finish, progress
from torch import fx, nn
from torch.utils import _pytree as pytree

from fxopt.graph import trace

EXAMPLE_BATCH, OTHER_BATCH = 2, 3
TOLERANCE = 1e-6

Tracer = Callable[[nn.Module, torch.Tensor], nn.Module]


def by_export(model: nn.Module, example: torch.Tensor) -> nn.Module:
    batch = ({0: torch.export.Dim.DYNAMIC},)
    return torch.export.export(model, (example,), dynamic_shapes=batch).module()


def by_symbolic_trace(model: nn.Module, example: torch.Tensor) -> nn.Module:
    return fx.symbolic_trace(model)


TRACERS: dict[str, Tracer] = {"fxopt": trace, "torch.export": by_export, "torch.fx.symbolic_trace": by_symbolic_trace}


def tensors(output: Any) -> Iterator[torch.Tensor]:
    """The floating-point tensors in an output."""
    for leaf in pytree.tree_leaves(output):
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
            yield leaf.double()


def difference(graph: nn.Module, model: nn.Module, inputs: torch.Tensor) -> float:
    """The largest relative difference of two modules' outputs; infinite if they do not have the same shapes."""
    with torch.no_grad():
        wanted, got = list(tensors(model(inputs))), list(tensors(graph(inputs)))
    if not wanted or [one.shape for one in wanted] != [one.shape for one in got]:
        return math.inf
    ratios = [(one - other).abs().max() / one.abs().max() for one, other in zip(wanted, got, strict=True)]
    found = max(float(ratio) for ratio in ratios)
    return found if math.isfinite(found) else math.inf


def first_line(failure: Exception) -> str:
    lines = str(failure).strip().splitlines() or [""]
    return f"{type(failure).__name__}: {lines[0]}"[:160]


def attempt(tracer: Tracer, model: nn.Module, example: torch.Tensor, other: torch.Tensor) -> dict[str, Any]:
    """What one tracer makes of one network."""
    gc.collect()
    start = time.thread_time()
    try:
        graph = tracer(model, example)
    except Exception as failure:
        return {"covered": False, "error": first_line(failure)}
    result: dict[str, Any] = {"cpu_s": round(time.thread_time() - start, 3)}
    dynamic = graph.meta.get("fxopt", {}).get("dynamic_batch", True) if isinstance(graph, fx.GraphModule) else True
    try:
        found = difference(graph, model, other if dynamic else example)
    except Exception as failure:
        return {"covered": False, **result, "error": first_line(failure)}
    return {
        "covered": found <= TOLERANCE,
        "dynamic": dynamic,
        **result,
        "difference": found if math.isfinite(found) else None,
        "keys_kept": set(graph.state_dict()) == set(model.state_dict()),
    }


def run(name: str, order: list[str]) -> dict[str, Any]:
    network = NETWORKS[name]
    try:
        model = network.build()
    except ImportError as failure:
        return {"skipped": first_line(failure)}
    example, other = network.example(EXAMPLE_BATCH), network.example(OTHER_BATCH, seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = {tracer: attempt(TRACERS[tracer], model, example, other) for tracer in order}
    return {tracer: found[tracer] for tracer in TRACERS}


def summary(results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """For each tracer, what it covers of the networks that were built and how long it takes."""
    built = [result for result in results.values() if "skipped" not in result]
    return {"networks": len(built), "skipped": len(results) - len(built)} | {
        tracer: of_tracer([result[tracer] for result in built], [result["torch.export"] for result in built])
        for tracer in TRACERS
    }


def of_tracer(found: list[dict[str, Any]], exported: list[dict[str, Any]]) -> dict[str, Any]:
    """Coverage and times; the ratio is taken where ``torch.export`` covers the network, too."""
    covered = [one for one in found if one["covered"]]
    result: dict[str, Any] = {"covered": len(covered)}
    if not covered:
        return result
    pairs = [(one, two) for one, two in zip(found, exported, strict=True) if one["covered"] and two["covered"]]
    ratios = [one["cpu_s"] / two["cpu_s"] for one, two in pairs if two["cpu_s"]]
    return result | {
        "dynamic": sum(one["dynamic"] for one in covered),
        "keys_kept": sum(one["keys_kept"] for one in covered),
        "median_cpu_s": round(statistics.median(one["cpu_s"] for one in covered), 3),
        "max_cpu_s": max(one["cpu_s"] for one in covered),
        "median_ratio_to_export": round(statistics.median(ratios), 2) if ratios else None,
        "largest_difference": max(one["difference"] for one in covered),
    }


def chosen(patterns: list[str]) -> list[str]:
    """The networks that match one of the patterns.

    Raises:
        SystemExit: If a pattern matches none.
    """
    for pattern in patterns:
        if not fnmatch.filter(NETWORKS, pattern):
            raise SystemExit(f"No network matches {pattern!r}; there are {', '.join(NETWORKS)}.")
    return [name for name in NETWORKS if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]


def warm_up() -> None:
    """Have every tracer import what it imports when first used."""
    small = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)).eval()
    for tracer in TRACERS.values():
        tracer(small, torch.randn(2, 3, 8, 8))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models",
        nargs="+",
        default=["*"],
        metavar="NAME",
        help="names or patterns, such as pytorchcv:resnet18 timm:*",
    )
    names = chosen(parser.parse_args().models)
    torch.set_num_threads(1)
    warm_up()
    order = list(TRACERS)
    results = {}
    for index, name in enumerate(names, start=1):
        results[name] = run(name, order)
        order = [*order[1:], order[0]]
        said = results[name].get("skipped") or ", ".join(
            f"{tracer} {found.get('cpu_s', '-')}{'' if found['covered'] else ' (not covered)'}"
            for tracer, found in results[name].items()
        )
        progress(f"{index}/{len(names)} {name}: {said}")
    setting = {"example_batch": EXAMPLE_BATCH, "other_batch": OTHER_BATCH, "tolerance": TOLERANCE}
    finish("trace_zoo", results, **setting, summary=summary(results))


if __name__ == "__main__":
    main()
