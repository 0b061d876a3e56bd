"""Lowered networks against layer tables read off public model definitions; skipped where they are not at hand."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from fxopt.graph import trace
from fxopt.lowering import lower
from fxopt.targets import OpKind
from fxopt.targets.rows import macs, parameters

TABLES = (
    Path(os.environ.get("FXOPT_SHARED_DATA") or Path(__file__).parents[2] / "shared" / "data") / "layer_tables.json"
)
pytestmark = pytest.mark.skipif(not TABLES.is_file(), reason="the layer tables are not here (FXOPT_SHARED_DATA)")

# Table, and where pytorchcv has the architecture.
NETWORKS = {
    "mobilenet_v1": ("mobilenet", "mobilenet_w1"),
    "mobilenet_v2": ("mobilenetv2", "mobilenetv2_w1"),
    "mnasnet_b1": ("mnasnet", "mnasnet_b1"),
    "shufflenetv2_15": ("shufflenetv2", "shufflenetv2_w3d2"),
    "resnet50": ("resnet", "resnet50"),
    "proxyless_mobile": ("proxylessnas", "proxylessnas_mobile"),
    "mobilenet_v3_large": ("mobilenetv3", "mobilenetv3_large_w1"),
    "fbnet_c": ("fbnet", "fbnet_cb"),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_layers_macs_and_weights_are_those_of_the_table(name: str) -> None:
    entries = json.loads(TABLES.read_text())[name]
    module, builder = NETWORKS[name]
    network = getattr(pytest.importorskip(f"pytorchcv.models.{module}"), builder)().eval()
    workload = lower(trace(network, torch.randn(2, 3, 224, 224)))
    rows = workload.bind().rows[0]
    found = [
        tuple(int(row[field]) for field in ("c", "k", "kernel_h", "kernel_w", "groups", "in_h", "out_h", "out_w"))
        for row in rows
        if row["kind"] in (OpKind.CONV, OpKind.DEPTHWISE)
    ]
    convs = [entry for entry in entries if entry["op"] == "conv"]
    wanted = [tuple(entry[key] for key in ("C", "K", "R", "S", "groups", "H", "P", "Q")) for entry in convs]
    assert sorted(found) == sorted(wanted)
    dense = [entry for entry in entries if entry["op"] == "fc"]
    expected = sum(e["K"] * e["C"] // e["groups"] * e["R"] * e["S"] * e["P"] * e["Q"] for e in convs)
    expected += sum(entry["C"] * entry["K"] for entry in dense)
    assert macs(rows).sum() == expected
    assert parameters(rows).sum() == sum(parameter.numel() for parameter in network.parameters())
    assert (rows["kind"] == OpKind.NORM).sum() == sum(entry["op"] == "bn" for entry in entries)
