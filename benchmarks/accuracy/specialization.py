"""Whether what was made for a device is the cheapest on it: networks (Han et al., table 2), bits (their table 5)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np
from fits.networks import tables, workload

from accuracy import Line
from accuracy._bit_policies import ACCELERATORS, crossed
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
UNIFORM = (4, 5, 6)


def networks(data: Path) -> list[Line]:
    """A line for each device: ``order`` is 1 where its own network has the least latency, ``margin`` by how much."""
    entries = tables(data)
    found = []
    for target, (own, batch, evidence) in MADE_FOR.items():
        latency_s = {
            name: float(load(target).estimate(workload(entries[NETWORKS[name]], batch)).latency_s[0])
            for name, *_ in MADE_FOR.values()
        }
        next_best = min(value for name, value in latency_s.items() if name != own)
        figure = {"order": float(latency_s[own] < next_best), "margin": next_best / latency_s[own] - 1.0}
        found.append(Line(target, f"{own} is its cheapest of three", 3, evidence, figure, {"order": 1.0}))
    return found


def bit_policies(data: Path) -> list[Line]:
    """A line for each accelerator and network.

    The policies of the paper are not published, so each accelerator gets the fastest policy that loses no more than 4,
    5 or 6 bits everywhere: on its own accelerator it cannot but be best, if the solver is right. What the lines tell is
    by how much the others' are slower there, at least (``margin``) and at most.
    """
    found = []
    for network, title in (("mobilenet_v1", "MobileNetV1"), ("mobilenet_v2", "MobileNetV2")):
        seconds = np.array([crossed(data, network, bits) for bits in UNIFORM])
        for index, target in enumerate(ACCELERATORS):
            own = seconds[:, index, index]
            others = np.delete(seconds[:, :, index], index, axis=1) / own[:, None] - 1.0
            figure = {"order": float((others > 0.0).all()), "margin": float(others.min()), "most": float(others.max())}
            against = (
                f"bits of {title} made for it, as precise as 4, 5, 6 bits everywhere, over those made for two others"
            )
            found.append(Line(target, against, others.size, "unseen", figure, {"order": 1.0}))
    return found


def lines(data: Path) -> list[Line]:
    return [*networks(data), *bit_policies(data)]
