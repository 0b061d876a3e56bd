"""Networks cut to half of their predicted latency on this machine, and what onnxruntime then measures; print JSON.

All groups of channels are cut to the largest fraction within the budget, and single groups raised until no step fits.
The host is calibrated, or its table read. Weights are random: time does not depend on them. The cut and the uncut
network run in turn at batch 1 on one thread, processor time; the figure is the median of the ratios.

    .venv/bin/python benchmarks/prune_latency.py > prune_latency.json
"""

from __future__ import annotations

import argparse
import json
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from common.networks import NETWORKS
from common.output import finish, progress
from common.pruning import Budgeted

from fxopt.graph import trace
from fxopt.passes import Canonicalize

NAMES = ("pytorchcv:mobilenet_w1", "pytorchcv:mobilenetv2_w1", "pytorchcv:resnet18")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=NAMES, metavar="network", help=", ".join(NAMES))
    parser.add_argument("--target", default="host")
    parser.add_argument("--budget", type=float, default=0.5)
    parser.add_argument("--runs", type=int, default=60, help="rounds of the two networks")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = {}
    for name in options.networks:
        network = NETWORKS[name]
        example = network.example(2)
        gm = Canonicalize()(trace(network.build(), example)).graph_module
        run = Budgeted(gm, "latency", options.target, options.budget)
        policy = run.filled(run.uniform())
        results[name] = {"predicted_s": run.whole, **run.unused(policy), **run.speed(policy, example, options.runs)}
        progress(f"{name}: {json.dumps(results[name])}")
    finish("prune_latency", results, **vars(options))


if __name__ == "__main__":
    main()
