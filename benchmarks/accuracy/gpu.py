"""GPUs against the totals of networks at large and small batches, and whether a network made for the GPU wins there."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from accuracy import Line
from fxopt.targets import OpKind, Workload, load, make_row
from fxopt.targets.rows import Rows

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
KINDS = {"bn": OpKind.NORM, "act": OpKind.ELEMENTWISE, "add": OpKind.ELEMENTWISE, "pool": OpKind.POOL}


def layer(entry: Mapping[str, Any], batch: int) -> Rows:
    if entry["op"] == "fc":
        return make_row(OpKind.LINEAR, n=batch, c=entry["C"], k=entry["K"], bias=1)
    if entry["op"] == "conv":
        kind = OpKind.DEPTHWISE if entry["groups"] == entry["C"] > 1 else OpKind.CONV
        sides = {"in_h": entry["H"], "in_w": entry["H"], "out_h": entry["P"], "out_w": entry["Q"]}
        window = {"kernel_h": entry["R"], "kernel_w": entry["S"]}
        stride = {"stride_h": entry["stride"], "stride_w": entry["stride"]}
        sizes = {"n": batch, "c": entry["C"], "k": entry["K"], "groups": entry["groups"]}
        return make_row(kind, **sizes, **sides, **window, **stride)
    sizes = {"n": batch, "in_h": entry["elems"], "out_h": entry.get("out", entry["elems"])}
    inputs = 2 if entry["op"] == "add" else 1
    fused = int(entry["op"] in ("bn", "act"))
    return make_row(KINDS.get(entry["op"], OpKind.COPY), inputs=inputs, fused=fused, **sizes)


def network(data: Path, name: str, batch: int) -> Workload:
    entries = json.loads((data / "layer_tables.json").read_text())[NETWORKS[name]]
    copies = [make_row(OpKind.COPY, n=batch, c=24, k=24)] * SHUFFLES.get(name, 0)
    rows = np.concatenate([*(layer(entry, batch) for entry in entries), *copies])
    return Workload(rows, [str(i) for i in range(len(rows))])


def published(data: Path, device: str, metric: str, batch: int) -> dict[str, float]:
    """Published seconds by network, for those whose layers are known."""
    found: dict[str, float] = {}
    with (data / "validation.csv").open(encoding="utf-8") as file:
        for point in csv.DictReader(file):
            known = point["device"] == device and point["metric"] == metric and point["model"] in NETWORKS
            if known and point["batch"] == str(batch):
                found.setdefault(point["model"], 1e-3 * float(point["value"]))
    return found


def errors(data: Path, target: str, seconds: Mapping[str, float], batch: int) -> dict[str, float]:
    found = {name: float(load(target).estimate(network(data, name, batch)).latency_s[0]) for name in seconds}
    return {name: abs(found[name] / value - 1.0) for name, value in seconds.items()}


def lines(data: Path) -> list[Line]:
    v100 = errors(data, "v100", published(data, "V100", "latency", 8), 8)
    per_image = published(data, "TitanXP", "latency_per_image", 50)
    titan = errors(data, "titan-xp", {name: 50 * value for name, value in per_image.items()}, 50)
    # The network searched for the GPU has to be the quickest of its family there, by the estimate too.
    family = [name for name in NETWORKS if name.startswith("ProxylessNAS")]
    quickest = min(family, key=lambda name: float(load("v100").estimate(network(data, name, 8)).latency_s[0]))
    figure = {"max": max(v100.values()), "mean": float(np.mean([*v100.values()]))}
    unseen = {"max": titan["MobileNetV1-0.75"]}
    return [
        Line("v100", "networks at batch 8 (tables 1 and 2)", len(v100), "fitted", figure, {"max": 0.10}),
        Line(
            "v100",
            "ProxylessNAS-GPU first of three",
            3,
            "unseen",
            {"order": float(quickest[13:] == "GPU")},
            {"order": 1},
        ),
        Line("titan-xp", "MobileNetV1, batch 50 (table 3)", 1, "fitted", {"max": titan["MobileNetV1-1.0"]}, {}),
        Line("titan-xp", "MobileNetV1 0.75, batch 50 (table 3)", 1, "unseen", unseen, {"max": 0.10}),
    ]
