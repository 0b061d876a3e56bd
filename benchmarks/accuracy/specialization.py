"""Whether each network that was searched for a device is the cheapest on it (Han et al., table 2)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from fits.networks import tables, workload

from accuracy import Line
from accuracy.linear_cpu import NETWORKS
from fxopt.targets import load

__all__ = ["lines"]

# The network made for each target, among those made for the three, the batch, and whether the target's figures were
# fitted to these networks.
MADE_FOR: Mapping[str, tuple[str, int, Literal["fitted", "unseen"]]] = {
    "v100": ("ProxylessNAS-GPU", 8, "fitted"),
    "xeon-e5-2640v4": ("ProxylessNAS-CPU", 1, "fitted"),
    "pixel1": ("ProxylessNAS-Mobile", 1, "unseen"),
}


def lines(data: Path) -> list[Line]:
    """A line for each device: ``order`` is 1 where its own network has the least latency, ``margin`` by how much."""
    networks = tables(data)
    found = []
    for target, (own, batch, evidence) in MADE_FOR.items():
        latency_s = {
            name: float(load(target).estimate(workload(networks[NETWORKS[name]], batch)).latency_s[0])
            for name, *_ in MADE_FOR.values()
        }
        next_best = min(value for name, value in latency_s.items() if name != own)
        figure = {"order": float(latency_s[own] < next_best), "margin": next_best / latency_s[own] - 1.0}
        found.append(Line(target, f"{own} is its cheapest of three", 3, evidence, figure, {"order": 1.0}))
    return found
