"""GPUs against the totals of networks, at small and at large batches."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from fits.networks import measured, operator, tables

from accuracy import Line
from fxopt.targets import OpKind, Workload, load, make_row

__all__ = ["lines"]

# Names of the published points and of the layer tables.
NETWORKS = {
    "MobileNetV1-1.0": "mobilenet_v1",
    "MobileNetV1-0.75": "mobilenet_v1_075",
    "MobileNetV2": "mobilenet_v2",
    "MnasNet": "mnasnet_b1",
    "NASNet-A": "nasnet_a",
    "ProxylessNAS-Mobile": "proxyless_mobile",
    "ProxylessNAS-GPU": "proxyless_gpu",
    "ProxylessNAS-CPU": "proxyless_cpu",
    "ResNet-34": "resnet34",
    "ShuffleNetV2-1.5": "shufflenetv2_15",
}
# Channel shuffles, a copy each, are functional calls that the layer tables do not hold.
SHUFFLES = {"ShuffleNetV2-1.5": 16}


def network(data: Path, name: str, batch: int) -> Workload:
    """A published network as rows."""
    copies = [make_row(OpKind.COPY, n=batch, c=24, k=24)] * SHUFFLES.get(name, 0)
    rows = [*(operator(entry, batch) for entry in tables(data)[NETWORKS[name]]), *copies]
    return Workload(np.concatenate(rows), [str(i) for i in range(len(rows))])


def errors(data: Path, target: str, milliseconds: Mapping[str, float], batch: int) -> dict[str, float]:
    """Relative error of the estimate of each network."""
    found = {name: float(load(target).estimate(network(data, name, batch)).latency_s[0]) for name in milliseconds}
    return {name: abs(1e3 * found[name] / value - 1.0) for name, value in milliseconds.items()}


def lines(data: Path) -> list[Line]:
    """The comparisons; see the benchmark."""
    small = {name: values[0] for name, values in measured(data, "V100").items() if name in NETWORKS}
    large = measured(data, "TitanXP", "latency_per_image")
    v100 = errors(data, "v100", small, 8)
    titan = errors(data, "titan-xp", {name: 50 * values[0] for name, values in large.items() if name in NETWORKS}, 50)
    figure = {"max": max(v100.values()), "mean": float(np.mean([*v100.values()]))}
    unseen = {"max": titan["MobileNetV1-0.75"]}
    return [
        Line("v100", "networks at batch 8 (tables 1 and 2)", len(v100), "fitted", figure, {"max": 0.10}),
        Line("titan-xp", "MobileNetV1, batch 50 (table 3)", 1, "fitted", {"max": titan["MobileNetV1-1.0"]}, {}),
        Line("titan-xp", "MobileNetV1 0.75, batch 50 (table 3)", 1, "unseen", unseen, {"max": 0.10}),
    ]
