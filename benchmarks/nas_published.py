"""The networks that ProxylessNAS found for a GPU, a CPU and a phone, on all three (Han et al., table 2).

Each has to be the cheapest of the three at home. Networks are built by ``fxopt.models`` and lowered from their graphs.

    python benchmarks/nas_published.py
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from common.output import finish

from fxopt import models, targets, trace
from fxopt.lowering import lower

# Target, batch, and the milliseconds of the table; the fourth network is in none of its cells but one.
DEVICES = {"v100": 8, "xeon-e5-2640v4": 1, "pixel1": 1}
NETWORKS = ("proxyless-gpu", "proxyless-cpu", "proxyless-mobile", "proxyless-mobile-1.4")
HOME = {"v100": "proxyless-gpu", "xeon-e5-2640v4": "proxyless-cpu", "pixel1": "proxyless-mobile"}
PUBLISHED_MS = {
    "v100": {"proxyless-gpu": 5.1, "proxyless-cpu": 7.4, "proxyless-mobile": 7.2},
    "xeon-e5-2640v4": {"proxyless-gpu": 204.9, "proxyless-cpu": 138.7, "proxyless-mobile": 164.1},
    "pixel1": {"proxyless-gpu": 124.0, "proxyless-cpu": 116.0, "proxyless-mobile": 78.0},
}


def measure() -> dict[str, Any]:
    estimated: dict[str, dict[str, float]] = {device: {} for device in DEVICES}
    for name in NETWORKS:
        with torch.device("meta"):
            network = models.create(name)
        graph = trace(network.to_empty(device="cpu").eval(), torch.zeros(2, 3, 224, 224))
        for device, batch in DEVICES.items():
            found = targets.load(device).estimate(lower(graph, batch).bind())
            estimated[device][name] = float(found.latency_s[0]) * 1e3
    devices = {}
    for device, published in PUBLISHED_MS.items():
        mine = {name: estimated[device][name] for name in published}
        devices[device] = {
            "batch": DEVICES[device],
            "estimated_ms": estimated[device],
            "published_ms": published,
            "best_at_home": min(mine, key=mine.__getitem__) == HOME[device],
            "order_kept": sorted(mine, key=mine.__getitem__) == sorted(published, key=published.__getitem__),
            "largest_error": max(abs(mine[name] / published[name] - 1.0) for name in published),
        }
    return {"devices": devices}


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    torch.set_num_threads(1)
    finish("nas_published", measure())
