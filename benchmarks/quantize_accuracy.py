"""Accuracy of a small MobileNetV2 on Fashion-MNIST after quantization without training, all layers at the same bits.

Prints JSON: test accuracy and processor time, rounded to the nearest (``nearest``) and by second moments of the inputs
(``rounded``); ``data-free`` has seen no image. ``--blocks STEPS`` adds ``reconstructed``: by gradients, block by block.

    python benchmarks/quantize_accuracy.py > quantize_accuracy.json
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from common.fashion import data, mobilenet_v2, trained
from common.output import finish, progress

from fxopt.decisions import Policy
from fxopt.evaluate import accuracy
from fxopt.graph import trace
from fxopt.passes import FoldBatchNorm, Pass, Quantize, ReconstructBlocks, RoundWeights

BITS = ((8, 8), (4, 8), (4, 4), (3, 8), (3, 3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=7, help="epochs of training, if no weights are kept")
    parser.add_argument("--samples", type=int, default=1024, help="training images to calibrate on")
    parser.add_argument("--blocks", type=int, default=0, help="steps for each block; 0 leaves reconstruction out")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = data()
    model = trained("mobilenet_v2", mobilenet_v2, found, options.epochs, 0.1)
    images = list(found.train.inputs[: options.samples].split(128))
    gm = FoldBatchNorm()(trace(model, images[0][:2])).graph_module
    sites = [decision.site for decision in Quantize().search_space(gm)]
    results: dict[str, Any] = {"float": round(accuracy(gm, found.test), 4)}

    def quantize(name: str, bits: tuple[int, int], **schemes: Any) -> Any:
        start = time.process_time()
        quantized = Quantize(Policy({("bits", site): bits for site in sites}), **schemes)(gm).graph_module
        seconds = time.process_time() - start
        results[name] = {"accuracy": round(accuracy(quantized, found.test), 4), "s": round(seconds, 1)}
        progress(f"{name}: {results[name]}")
        return quantized

    quantize("W8A8 data-free", (8, 8))
    for bits in BITS:
        name = "W{}A{}".format(*bits)
        method = "max" if min(bits) == 8 else "mse"
        schemes = {"weights": {"method": method}, "activations": {"method": method}}
        quantized = quantize(f"{name} nearest", bits, calibration=images, **schemes)
        passes: dict[str, Pass] = {"rounded": RoundWeights(images, samples=options.samples)}
        if options.blocks and min(bits) < 8:
            passes["reconstructed"] = ReconstructBlocks(images, samples=options.samples, steps=options.blocks)
        for how, step in passes.items():
            start = time.process_time()
            found_graph = step(quantized).graph_module
            seconds = time.process_time() - start
            results[f"{name} {how}"] = {"accuracy": round(accuracy(found_graph, found.test), 4), "s": round(seconds, 1)}
            progress(f"{name} {how}: {results[f'{name} {how}']}")
    finish("quantize_accuracy", results, epochs=options.epochs, samples=options.samples)


if __name__ == "__main__":
    main()
