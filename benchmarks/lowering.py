"""Measure what it takes to lower a canonical graph; print JSON.

Real architectures (``ms`` at batch 1, traced at batch 2), and chains of residual blocks up to 20,000 nodes, whose
``us_per_node`` tells whether time follows the size of the graph. Medians of CPU time on one thread.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from common.networks import NETWORKS
from common.output import finish, progress
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fxopt.graph import propagate, trace
from fxopt.lowering import lower

ARCHITECTURES = ("resnet50", "mobilenetv2_w1", "densenet121", "nasnet_4a1056")
SIZES = (1_250, 5_000, 20_000)


def chain(nodes: int) -> fx.GraphModule:
    """A canonical graph of residual blocks: convolution, activation, addition."""
    root = nn.Module()
    graph = fx.Graph()
    value = graph.placeholder("x")
    with FakeTensorMode():
        value.meta["val"] = torch.empty(2, 8, 4, 4)
    for block in range(nodes // 3):
        root.add_module(f"conv{block}", nn.Conv2d(8, 8, 1))
        root.add_module(f"act{block}", nn.ReLU())
        made = graph.call_module(f"act{block}", (graph.call_module(f"conv{block}", (value,)),))
        value = graph.call_function(torch.ops.aten.add.Tensor, (made, value))
    graph.output(value)
    gm = fx.GraphModule(root, graph)
    gm.meta["fxopt"] = {"batch": 2, "dynamic_batch": True}
    propagate(gm)
    return gm


def seconds(gm: fx.GraphModule, repeat: int) -> float:
    """Median CPU time of lowering at batch 1."""
    taken = []
    for _ in range(repeat):
        start = time.process_time()
        lower(gm)
        taken.append(time.process_time() - start)
    return statistics.median(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=11, help="samples of each architecture")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, dict[str, float]] = {}
    for name in ARCHITECTURES:
        progress(name)
        gm = trace(NETWORKS[f"pytorchcv:{name}"].build(), torch.randn(2, 3, 224, 224))
        lower(gm)
        results[name] = {"nodes": len(gm.graph.nodes), "ms": round(1e3 * seconds(gm, options.repeat), 1)}
    for nodes in SIZES:
        progress(f"chain of {nodes}")
        taken = seconds(chain(nodes), 3)
        results[f"chain of {nodes}"] = {
            "nodes": nodes,
            "ms": round(1e3 * taken, 1),
            "us_per_node": round(1e6 * taken / nodes, 1),
        }
    finish("lowering", results, repeat=options.repeat)


if __name__ == "__main__":
    main()
