"""Operators for three targets on Fashion-MNIST, by supernet; print JSON.

The 32 x 32 variant of the space that ProxylessNAS searches, at a small width. One supernet is trained for each target
with a budget on its latency, a fraction of that of the MobileNetV2-style network (expansion 6, kernel 3 everywhere);
the networks found are trained from the supernet's weights for as many epochs as that baseline rescaled to the same
latency, and costed on all three targets.

    python benchmarks/nas_search.py --samples 6000 --epochs 3
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from common.output import finish, progress
from torch import nn

import fxopt
from fxopt import models, targets
from fxopt.data import TensorLoader, fashion_mnist
from fxopt.evaluate import accuracy
from fxopt.lowering import lower, lower_operators
from fxopt.nas import CostTerm, Supernet, SupernetSettings, fine_tune, policy_within, split, train_supernet
from fxopt.passes import SelectOperators
from fxopt.training import fit

DEVICES = {"v100": 8, "xeon-e5-2640v4": 1, "pixel1": 1}
STEP = SelectOperators(patterns=("inverted-residual",))


def data(samples: int, batch: int, seed: int) -> tuple[TensorLoader, TensorLoader]:
    """Some of the training images, and 2,000 of the test images, padded to 32 x 32."""
    train, val = fashion_mnist()

    def part(loader: TensorLoader, count: int, shuffle: bool) -> TensorLoader:
        images = nn.functional.pad(loader.inputs[:count], (2, 2, 2, 2))
        return TensorLoader(images, loader.labels[:count], batch, shuffle=shuffle, seed=seed)

    return part(train, samples, True), part(val, 2000, False)


def network(width: float, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return models.proxyless_space(width, 32, 10, 1)


def latency(graph: Any) -> dict[str, float]:
    found = {}
    for device, batch in DEVICES.items():
        found[device] = float(targets.load(device).estimate(lower(graph, batch).bind()).latency_s[0]) * 1e3
    return found


def run(options: argparse.Namespace, seed: int) -> dict[str, Any]:
    train, val = data(options.samples, options.batch, seed)
    example = train.inputs[:2]
    weights, architecture = split(train, 0.2, seed)
    settings = SupernetSettings(
        warm_up=options.epochs, epochs=2 * options.epochs, alpha_learning_rate=0.05, seed=seed, learning_rate=0.05
    )
    baseline = fxopt.trace(network(options.width, seed), example)
    whole = latency(baseline)
    fit(baseline, train, epochs=4 * options.epochs, learning_rate=0.05, seed=seed)
    found: dict[str, Any] = {"baseline": {"accuracy": accuracy(baseline, val), "latency_ms": whole}}
    for device, batch in DEVICES.items():
        start = time.process_time()
        graph = fxopt.trace(network(options.width, seed), example)
        table = lower_operators(graph, STEP, batch).table(targets.load(device))
        limit = options.fraction * whole[device] * 1e-3
        supernet = Supernet(graph, STEP)
        trained = train_supernet(
            supernet, weights, architecture, table, [CostTerm("latency", limit, "budget", 0.2)], settings=settings
        )
        policy = policy_within(supernet, table, {"latency": limit})
        derived = fine_tune(supernet, policy, train, epochs=options.epochs, learning_rate=0.05, seed=seed)
        found[device] = {
            "accuracy": accuracy(derived, val),
            "latency_ms": latency(derived),
            "entropy": [round(epoch.entropy, 4) for epoch in trained.history],
            "notes": trained.notes,
            "operators": list(policy.of_kind("operator").values()),
            "cpu_s": time.process_time() - start,
        }
        progress(f"seed {seed}, {device}: {found[device]['accuracy']:.4f}, {found[device]['cpu_s']:.0f} s")
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=6000)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--width", type=float, default=0.25)
    parser.add_argument("--fraction", type=float, default=0.8)
    parser.add_argument("--seeds", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = {f"seed {seed}": run(arguments, seed) for seed in range(arguments.seeds)}
    finish("nas_search", results, setting=vars(arguments))
