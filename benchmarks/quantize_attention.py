"""Quantize transformers to 8 bits, with and without the products of attention, and run all in onnxruntime; print JSON.

Networks with random weights: ``vit_tiny_patch16_224`` (4 of its 12 blocks), ``swin_tiny_patch4_window7_224`` (a block
in each of two stages) and ``BertModel`` (BERT-base, 2 of its 12 layers, 128 tokens). Every file is compared with its
graph, integer by integer, and timed beside the float file: batch 1, one thread, processor time, in turns; the ratio is
that of a round.

    .venv/bin/python benchmarks/quantize_attention.py > attention.json
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
from torch import fx, nn

from fxopt.export import export_onnx, measure
from fxopt.graph import trace
from fxopt.passes import Canonicalize, FoldBatchNorm, Quantize


def vit() -> tuple[nn.Module, Any]:
    import timm

    return timm.create_model("vit_tiny_patch16_224", depth=4), torch.randn(2, 3, 224, 224)


def swin() -> tuple[nn.Module, Any]:
    import timm

    options: dict[str, Any] = {"depths": (1, 1), "embed_dim": 96, "num_heads": (3, 6)}
    return timm.create_model("swin_tiny_patch4_window7_224", **options), torch.randn(2, 3, 224, 224)


def bert() -> tuple[nn.Module, Any]:
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig(num_hidden_layers=2)), {"input_ids": torch.randint(0, 30000, (2, 128))}


NETWORKS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {"vit_tiny_4": vit, "swin_tiny_2": swin, "bert_base_2": bert}


def run(name: str, rounds: int, folder: Path) -> dict[str, Any]:
    torch.manual_seed(0)
    model, inputs = NETWORKS[name]()
    graph: fx.GraphModule = Canonicalize()(trace(model.eval(), inputs)).graph_module
    graph = FoldBatchNorm()(graph).graph_module
    results: dict[str, Any] = {}
    files = [export_onnx(graph, folder / f"{name}.onnx", inputs).path]
    for products in (False, True):
        progress(f"{name}: {'with' if products else 'without'} products")
        made = Quantize(products=products)(graph).graph_module
        report = export_onnx(made, folder / f"{name}-{products}.onnx", inputs)
        files.append(report.path)
        results["with products" if products else "layers alone"] = {
            "integer_nodes": report.integer_nodes,
            "float_nodes": report.float_nodes,
            "integers_differing": report.integers_differing,
        }
    timed = measure(files[0], inputs, runs=rounds, peers=files[1:])
    results["float_ms"] = 1e3 * timed.median_s
    for entry, peer in zip(("layers alone", "with products"), timed.peers, strict=True):
        results[entry] |= {"ms": 1e3 * peer.median_s, "times_as_fast": 1.0 / peer.ratio}
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    declare_torchvision_operators()
    with tempfile.TemporaryDirectory() as folder:
        found = {name: run(name, options.rounds, Path(folder)) for name in options.networks}
    finish("quantize_attention", found, rounds=options.rounds, threads=1)


if __name__ == "__main__":
    main()
