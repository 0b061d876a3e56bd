"""Measure what quantization and export do to real architectures; print JSON.

Weights are random and batch norms estimated on noise, so differences rank nothing but rounding: the figures of interest
are sizes, times and how many of the file's integers differ from the graph's.

Four files run in turn, round by round: the graph in floats, all layers in 8 bits, the layers that ``fastest_bits``
chooses, and the float file quantized by onnxruntime's own static quantization (QDQ, by channel, unsigned activations,
signed weights, its own pre-processing, the same calibration data). ``speedup`` of each is the median over the rounds
of float time by its time.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common.networks import NETWORKS
from common.output import finish, progress
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fxopt.export import Timing, export_onnx, fastest_bits, host_fingerprint, measure
from fxopt.graph import trace
from fxopt.passes import FoldBatchNorm, Quantize

NAMES = ("mobilenetv2_w1", "resnet18", "resnet50", "efficientnet_b0", "mobilenetv3_large_w1")


def settled(name: str, size: int) -> nn.Module:
    """A network whose batch norms know the statistics of its activations on noise."""
    model = NETWORKS[f"pytorchcv:{name}"].build()
    for norm in model.modules():
        if isinstance(norm, _BatchNorm):
            norm.momentum = None
            norm.reset_running_stats()
    torch.manual_seed(0)
    with torch.no_grad():
        for _ in range(3):
            model.train()(torch.randn(8, 3, size, size))
    return model.eval()


def timed(results: dict[str, Any], name: str, call: Any) -> Any:
    start = time.perf_counter()
    found = call()
    results[f"{name}_s"] = round(time.perf_counter() - start, 2)
    return found


class _Reader:
    """Calibration data as onnxruntime's quantizer reads it: one batch after another, then None."""

    def __init__(self, data: torch.Tensor) -> None:
        self._batches = iter([{"x": images.numpy()} for images in data.split(1)])

    def get_next(self) -> dict[str, Any] | None:
        return next(self._batches, None)


def by_onnxruntime(source: Path, folder: Path, data: torch.Tensor) -> Path:
    """What onnxruntime's own static quantization makes of a float file."""
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    ready, made = folder / "preprocessed.onnx", folder / "onnxruntime.onnx"
    quant_pre_process(str(source), str(ready))
    quantize_static(
        str(ready),
        str(made),
        _Reader(data),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    return made


def figures(timing: Timing) -> dict[str, Any]:
    """Milliseconds, and float time by this one's with quartiles."""
    return {
        "ms": round(1e3 * timing.median_s, 3),
        "speedup": round(1 / timing.ratio, 3),
        "speedup_quartiles": [round(1 / timing.ratio_q75, 3), round(1 / timing.ratio_q25, 3)],
    }


def run(name: str, size: int, rounds: int, threads: int, folder: Path) -> dict[str, Any]:
    model, example = settled(name, size), torch.randn(2, 3, size, size)
    results: dict[str, Any] = {}
    graph = timed(results, "trace", lambda: trace(model, example))
    folded = timed(results, "fold", lambda: FoldBatchNorm()(graph).graph_module)
    data = torch.randn(16, 3, size, size)
    int8 = timed(results, "quantize", lambda: Quantize(calibration=data)(folded).graph_module)
    whole = timed(results, "export_float", lambda: export_onnx(folded, folder / "float.onnx", example))
    packed = timed(results, "export_int8", lambda: export_onnx(int8, folder / "int8.onnx", example))
    fastest = timed(results, "fastest_bits", lambda: fastest_bits(graph, example, threads=threads))
    mixed = Quantize(fastest.policy, calibration=data)(folded).graph_module
    best = export_onnx(mixed, folder / "fastest.onnx", example)
    peer = timed(results, "onnxruntime", lambda: by_onnxruntime(whole.path, folder, data))
    speed = measure(whole.path, runs=rounds, threads=threads, peers=[packed.path, best.path, peer])
    names = ("int8", "fastest", "onnxruntime")
    return results | {
        "float_ms": round(1e3 * speed.median_s, 3),
        **{name: figures(timing) for name, timing in zip(names, speed.peers, strict=True)},
        "fastest_quantizes": [sum(bits == (8, 8) for bits in fastest.policy.values()), len(fastest.policy)],
        "float_bytes": whole.file_bytes,
        "int8_bytes": packed.file_bytes,
        "fastest_bytes": best.file_bytes,
        "shrink": round(whole.file_bytes / packed.file_bytes, 3),
        "integer_nodes": packed.integer_nodes,
        "float_nodes": packed.float_nodes,
        "float_relative_difference": whole.relative,
        "integers_differing": packed.integers_differing,
        "int8_relative_difference": packed.relative,
        "int8_top1_agreement": packed.top1_agreement,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=NAMES, metavar="network", help=", ".join(NAMES))
    parser.add_argument("--size", type=int, default=224, help="height and width of the images")
    parser.add_argument("--rounds", type=int, default=50, help="rounds of the latency measurement")
    parser.add_argument("--threads", type=int, default=1, help="threads of onnxruntime")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = {}
    for name in options.networks:
        progress(name)
        with tempfile.TemporaryDirectory() as folder:
            results[name] = run(name, options.size, options.rounds, options.threads, Path(folder))
    finish("export", results, host=host_fingerprint(options.threads), size=options.size)


if __name__ == "__main__":
    main()
