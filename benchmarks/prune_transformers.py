"""Cut half of a ViT and of a BERT, and run both in onnxruntime; print JSON.

Networks of transformers with random weights: ``ViTForImageClassification`` (ViT-S/16 at 224 x 224) and ``BertModel``
(BERT-base, 6 of its 12 layers, 128 tokens). Half of the attention heads of every layer and half of the hidden width of
every MLP go, or half of the width of every head; the residual stream stays. What is cut is compared with the same
policy by masks at another batch size, exported, compared with onnxruntime, and timed there beside the whole network:
batch 1, one thread, processor time, in turns; the ratio is that of a round.

    .venv/bin/python benchmarks/prune_transformers.py > transformers.json
"""

from __future__ import annotations

import argparse
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from common.networks import declare_torchvision_operators
from common.output import finish, progress
from torch import nn
from torch.utils import _pytree as pytree

from fxopt.export import export_onnx, measure
from fxopt.graph import trace
from fxopt.passes import PruneChannels

CUTS = ("heads", "width")


def vit() -> tuple[nn.Module, Callable[[int], Any]]:
    from transformers import ViTConfig, ViTForImageClassification

    small = ViTConfig(hidden_size=384, num_attention_heads=6, intermediate_size=1536, num_labels=1000)
    return ViTForImageClassification(small), lambda batch: torch.randn(batch, 3, 224, 224)


def bert() -> tuple[nn.Module, Callable[[int], Any]]:
    from transformers import BertConfig, BertModel

    def example(batch: int) -> dict[str, torch.Tensor]:
        mask = torch.ones(batch, 128, dtype=torch.long)
        mask[0, 100:] = 0
        return {"input_ids": torch.randint(0, 30522, (batch, 128)), "attention_mask": mask}

    return BertModel(BertConfig(num_hidden_layers=6)), example


NETWORKS: dict[str, Callable[[], tuple[nn.Module, Callable[[int], Any]]]] = {"vit_s16": vit, "bert_base_6": bert}


def outputs(graph: nn.Module, inputs: Any) -> list[torch.Tensor]:
    with torch.no_grad():
        found = graph(**inputs) if isinstance(inputs, dict) else graph(inputs)
    return [leaf for leaf in pytree.tree_leaves(found) if isinstance(leaf, torch.Tensor)]


def difference(one: nn.Module, other: nn.Module, inputs: Any) -> float:
    """The largest difference of outputs, relative to the largest magnitude."""
    pairs = zip(outputs(one, inputs), outputs(other, inputs), strict=True)
    return max(float((mine - theirs).abs().max() / theirs.abs().max()) for mine, theirs in pairs)


def run(name: str, rounds: int, folder: Path) -> dict[str, Any]:
    torch.manual_seed(0)
    model, example = NETWORKS[name]()
    # The spread of fresh weights is so small that attention is all but even; parameters that begin as zeros differ.
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.05) if parameter.dim() > 1 else parameter.data.add_(0.05 * torch.randn(1))
    inputs = example(2)
    graph = trace(model.eval(), inputs)
    files = [folder / f"{name}.onnx"]
    export_onnx(graph, files[0], inputs)
    results: dict[str, Any] = {"parameters": sum(p.numel() for p in graph.parameters())}
    for attention in CUTS:
        step = PruneChannels(attention=attention)
        step = step.with_policy(step.search_space(graph).uniform(0.5))
        cut = step(graph).graph_module
        files.append(folder / f"{name}-{attention}.onnx")
        report = export_onnx(cut, files[-1], inputs)
        results[attention] = {
            "parameters": sum(p.numel() for p in cut.parameters()),
            "difference_from_masks": difference(cut, step.masked(graph), example(3)),
            "difference_of_file": report.relative,
        }
    times = measure(files[0], inputs, peers=files[1:], batch=1, runs=rounds)
    results["median_ms"] = 1e3 * times.median_s
    for attention, timing in zip(CUTS, times.peers, strict=True):
        results[attention]["median_ms"] = 1e3 * timing.median_s
        results[attention]["faster"] = [1 / timing.ratio, 1 / timing.ratio_q75, 1 / timing.ratio_q25]
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=list(NETWORKS), metavar="network", help=", ".join(NETWORKS))
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    declare_torchvision_operators()
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in options.networks:
            results[name] = run(name, options.rounds, Path(folder))
            progress(f"{name}: {results[name]}")
    finish("prune_transformers", results, rounds=options.rounds)


if __name__ == "__main__":
    main()
