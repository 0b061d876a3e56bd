"""Operators of networks that nobody here wrote: which blocks are found, and one command to an ONNX file; print JSON.

The census traces architectures of pytorchcv, timm and torchvision and counts the blocks that SelectOperators finds, by
pattern, and the convolutions outside of them, by reason; and it lowers them with all candidates. The runs call
``fxopt optimize ... --passes select-operators,prune-channels,quantize`` in a process of its own for each network and
target, and run the file that comes out in onnxruntime; for ``host`` the whole networks besides, since most of what the
small ones take there is to start their layers. A package that is not installed is skipped and said to be.
"""

from __future__ import annotations

import argparse
import collections
import fnmatch
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common.networks import Network, declare_torchvision_operators
from common.output import finish, progress
from torch import fx, nn

from fxopt.errors import FxoptError
from fxopt.graph import trace
from fxopt.lowering import lower_operators
from fxopt.passes import Canonicalize, SelectOperators

HERE = Path(__file__).parent
BUDGET = "latency=0.5"
NETWORKS = ("pytorchcv_resnet10", "pytorchcv_mobilenetv2", "timm_mobilenetv3")
TARGETS = ("bitfusion", "zynq7020", "pixel1", "host")
WHOLE = "host"
"""The target for which there are whole networks, too."""
CENSUS = {
    "pytorchcv": "resnet18 resnet50 preresnet18 seresnet18 seresnet50 vgg16 darknet53 mobilenet_w1 fdmobilenet_w1 "
    "mobilenetv2_w1 mobilenetv2b_w1 mobilenetv3_small_w1 mobilenetv3_large_w1 shufflenetv2_w1 efficientnet_b0 "
    "efficientnet_b0b mixnet_s mnasnet_b1 mnasnet_a1 proxylessnas_mobile fbnet_cb spnasnet ghostnet peleenet "
    "densenet121 dpn68 hrnet_w18_small_v1 regnetx004 regnety004 resnext50_32x4d xception igcv3_w1",
    "timm": "resnet18 resnet50 seresnet18 resnetv2_50 mobilenetv2_100 mobilenetv3_small_100 mobilenetv3_large_100 "
    "efficientnet_b0 efficientnet_lite0 tf_efficientnet_b0 mnasnet_100 semnasnet_100 fbnetc_100 fbnetv3_b ghostnet_100 "
    "densenet121 convnext_atto regnetx_002 regnety_002 repvgg_a0 mobilenetv4_conv_small lcnet_050 rexnet_100 vgg11_bn "
    "tf_efficientnetv2_b0 xception41 res2net50_14w_8s skresnet18 hrnet_w18_small",
    "torchvision": "resnet18 mobilenet_v2 mobilenet_v3_small efficientnet_b0 mnasnet0_5 regnet_y_400mf convnext_tiny",
}


def build(package: str, name: str) -> nn.Module:
    """A network with random weights.

    Raises:
        ImportError: If the package is not installed.
    """
    declare_torchvision_operators()
    torch.manual_seed(0)
    made: nn.Module
    if package == "pytorchcv":
        from pytorchcv.model_provider import get_model

        made = get_model(name, pretrained=False)
    elif package == "timm":
        import timm

        made = timm.create_model(name, pretrained=False)
    else:
        import torchvision

        made = torchvision.models.get_model(name, weights=None)
    return made.eval()


def count(package: str, name: str) -> dict[str, Any]:
    """The blocks of a network, and the convolutions outside of them."""
    size = 299 if name == "xception" else 224
    try:
        network = Network(lambda: build(package, name), (3, size, size))
        graph = Canonicalize()(trace(network.build(), network.example(2))).graph_module
    except (ImportError, FxoptError) as failure:
        return {"skipped": f"{type(failure).__name__}: {failure}"[:160]}
    step = SelectOperators()
    found, refused = step.explain(graph), step.refusals(graph)
    return {
        "blocks": len(found),
        "patterns": dict(collections.Counter(block.pattern for block in found)),
        "candidates": sum(len(block.candidates) for block in found),
        "convolutions": sum(isinstance(module, nn.Conv2d) for module in graph.modules()),
        "refused": dict(collections.Counter(one.reason.partition(", in none of")[0] for one in refused)),
        "lowered": lowered(graph, step),
    }


def lowered(graph: fx.GraphModule, step: SelectOperators) -> str:
    """Whether every candidate of every block has rows of its own; the error, if not."""
    try:
        return "yes" if len(lower_operators(graph, step).space) else "nothing to decide"
    except FxoptError as failure:
        return str(failure) if step.explain(graph) else "nothing to decide"


def optimize(network: str, size: str, target: str, folder: Path) -> dict[str, Any]:
    """One command, and the file that it leaves; the size is nothing or ``_whole``."""
    models = HERE / "common" / "strangers.py"
    words = ["optimize", f"{models}:{network}{size}", "--passes", "select-operators,prune-channels,quantize", "--json"]
    words += ["--target", target, "--budget", BUDGET, "--epochs", "1", "--trials", "6", "--out", str(folder)]
    words += ["--train", f"{models}:train{size}", "--val", f"{models}:val{size}"]
    paths = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", "import sys; from fxopt.cli import main; sys.exit(main())", *words],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    result: dict[str, Any] = {"exit_code": done.returncode, "wall_s": round(time.perf_counter() - start, 1)}
    if done.returncode:
        return result | {"error": done.stderr.strip().splitlines()[-1][:300] if done.stderr.strip() else ""}
    told = json.loads(done.stdout)
    before, after = told["report"]["before"], told["report"]["after"]
    shares = {name: round(after[name] / before[name], 3) for name in ("latency_s", "size_bytes", "macs")}
    return result | {"shares": shares} | ran(folder)


def ran(folder: Path) -> dict[str, Any]:
    """The exported file in onnxruntime, and the policy beside it."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    images = np.random.default_rng(0).standard_normal((5, *given.shape[1:])).astype(np.float32)
    outputs = session.run(None, {given.name: images})[0]
    kinds = collections.Counter(key for key in policy_kinds(folder))
    return {"onnx_output": list(outputs.shape), "finite": bool(np.isfinite(outputs).all()), "decisions": dict(kinds)}


def policy_kinds(folder: Path) -> list[str]:
    from fxopt.decisions import Policy

    policy = Policy.from_json((folder / "policy.json").read_text(encoding="utf-8"))
    return [kind for kind, _ in policy]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--census", nargs="*", default=["*"], metavar="NAME", help="patterns, such as timm:*")
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--targets", nargs="*", default=list(TARGETS), choices=TARGETS)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    census, runs = {}, {}
    for package, name in ((package, name) for package, names in CENSUS.items() for name in names.split()):
        if any(fnmatch.fnmatchcase(f"{package}:{name}", pattern) for pattern in asked.census):
            census[f"{package}:{name}"] = count(package, name)
            progress(f"{package}:{name}: {census[f'{package}:{name}']}")
    for network, target, size in itertools.product(asked.networks, asked.targets, ("", "_whole")):
        if size and target != WHOLE:
            continue
        name = f"{network}{size} on {target}"
        with tempfile.TemporaryDirectory() as folder:
            runs[name] = optimize(network, size, target, Path(folder))
        progress(f"{name}: {runs[name]}")
    finish("select_zoo", {"census": census, "runs": runs}, budget=BUDGET)


if __name__ == "__main__":
    main()
