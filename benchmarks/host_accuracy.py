"""Compare what the measured host predicts with what networks take in onnxruntime here; print JSON.

The host is calibrated (or its table read); the networks, with random weights, are exported in float and quantized, and
timed on one thread in processor time. A machine's pace changes with its load: one operator is timed in turn with each
network, as it is in calibration, and times are put in its terms. ``host`` measures the families of operators that a
network has and the sweep has not, but never the network; ``board`` is the file that `fxopt calibrate` would write,
which knows the sweep alone.
"""

from __future__ import annotations

import argparse
import functools
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common.networks import NETWORKS
from common.output import finish, progress
from scipy.stats import spearmanr

from fxopt.export import export_onnx, host_fingerprint, onnxruntime_profiler
from fxopt.export._micro import build
from fxopt.export._runtime import make_session
from fxopt.export.profiler import EVICTED_BYTES, kernel_seconds, run_once
from fxopt.graph import trace
from fxopt.lowering import lower
from fxopt.passes import Canonicalize, FoldBatchNorm, Quantize
from fxopt.targets import HostTarget, Target, Workload, load
from fxopt.targets._sweep import pace_row

NAMES = (
    *("pytorchcv:mobilenetv2_w1", "pytorchcv:resnet18", "pytorchcv:squeezenet_v1_1", "pytorchcv:efficientnet_b0"),
    *("pytorchcv:shufflenetv2_w1", "pytorchcv:regnetx004", "pytorchcv:mobilenetv3_large_w1", "pytorchcv:mnasnet_b1"),
    *("pytorchcv:densenet121", "pytorchcv:seresnet50", "pytorchcv:peleenet", "pytorchcv:mobilenet_w1"),
    *("pytorchcv:fbnet_cb", "pytorchcv:preresnet18", "torchvision:mobilenet_v3_small", "timm:mobilenetv4_conv_small"),
    *("timm:vit_tiny_patch16_224", "timm:convnext_atto", "timm:mixer_s16_224"),
)
WIDTHS = ("float", "int8")
BARS = {"float": 0.12, "int8": 0.20}


def prepared(name: str, folder: Path) -> dict[str, tuple[Path, Workload]]:
    """ONNX file and workload of a network at each width; files in ``folder`` are used again."""
    stem = name.replace(":", "-")
    files = {width: (folder / f"{stem}.{width}.onnx", folder / f"{stem}.{width}.npz") for width in WIDTHS}
    if not all(path.exists() for pair in files.values() for path in pair):
        example = NETWORKS[name].example(2)
        graph = FoldBatchNorm()(Canonicalize()(trace(NETWORKS[name].build(), example)).graph_module).graph_module
        graphs = {"float": graph, "int8": Quantize(calibration=example)(graph).graph_module}
        for width, (model, table) in files.items():
            export_onnx(graphs[width], model, example, check=False)
            bound = lower(graphs[width], batch=1).bind()
            np.savez(table, rows=bound.rows, names=np.array(bound.names))
    found = {}
    for width, (model, table) in files.items():
        with np.load(table) as stored:
            found[width] = model, Workload(stored["rows"], stored["names"].tolist())
    return found


def timed(files: list[Path], seconds: float) -> tuple[list[list[float]], float]:
    """Processor time of runs of each file, and what the operator that tells the pace takes between them."""
    rng = np.random.default_rng(0)
    sessions = [make_session(file) for file in files]
    feeds = []
    for session in sessions:
        (value,) = session.get_inputs()
        feeds.append({value.name: rng.standard_normal([1, *value.shape[1:]]).astype(np.float32)})
    micro = build(pace_row()[0])
    with tempfile.TemporaryDirectory() as folder:
        pace = make_session(micro.model.SerializeToString(), profile_prefix=str(Path(folder, "pace")))
        samples: list[list[float]] = [[] for _ in files]
        others, shares = np.zeros(EVICTED_BYTES // 8), []
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or len(samples[0]) < 10:
            for session, feed, sample in zip(sessions, feeds, samples, strict=True):
                others += 1.0
                shares.append(run_once(pace, micro))
                session.run(None, feed)
                start = time.thread_time()
                session.run(None, feed)
                sample.append(time.thread_time() - start)
        events = json.loads(Path(pace.end_profiling()).read_text(encoding="utf-8"))
    return samples, kernel_seconds(events, micro, shares)


def lower_mean(times: list[float]) -> float:
    return float(np.sort(times)[: (len(times) + 1) // 2].mean())


def run(name: str, host: HostTarget, board: Target, seconds: float, folder: Path) -> dict[str, Any]:
    cases = prepared(name, folder)
    samples, now = timed([model for model, _ in cases.values()], seconds)
    first = host.pace_s
    results: dict[str, Any] = {"pace": round(now / first, 3)}
    for (width, (_, workload)), times in zip(cases.items(), samples, strict=True):
        host.prepare(workload)
        measured = lower_mean(times) * first / now
        results[width] = {"measured_ms": round(1e3 * measured, 4)}
        for target in (host, board):
            predicted = float(target.estimate(workload).latency_s[0])
            results[width][f"{target.name}_ms"] = round(1e3 * predicted, 4)
            results[width][f"{target.name}_error"] = round(predicted / measured - 1.0, 4)
    return results


def summary(results: dict[str, Any], name: str) -> dict[str, Any]:
    """Mean absolute error and rank correlation by width."""
    found: dict[str, Any] = {}
    for width in WIDTHS:
        errors = np.abs([one[width][f"{name}_error"] for one in results.values()])
        times = [[one[width]["measured_ms"], one[width][f"{name}_ms"]] for one in results.values()]
        found[width] = {
            "networks": len(times),
            "mean_error": round(float(errors.mean()), 4),
            "worst_error": round(float(errors.max()), 4),
            "spearman": round(float(spearmanr(np.array(times)).statistic), 4) if len(times) > 2 else None,
            "bar": BARS[width],
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=NAMES, metavar="network", help=", ".join(NAMES))
    parser.add_argument("--seconds", type=float, default=8.0, help="time to run each network for")
    parser.add_argument("--runs", type=int, default=60, help="runs of each operator in calibration")
    parser.add_argument("--folder", type=Path, help="keep exported networks here, and the table of the host")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        profiler = functools.partial(onnxruntime_profiler, runs=options.runs)
        host = HostTarget(profiler, host_fingerprint(), folder=folder)
        host.calibrate()
        board = load(host.save(folder / "board.toml", name="board"))
        for name in options.networks:
            progress(name)
            results[name] = run(name, host, board, options.seconds, folder)
        about = {"host": summary(results, "host"), "board": summary(results, "board")}
        finish("host_accuracy", results | {"summary": about}, host=host_fingerprint(), operators=host.error)


if __name__ == "__main__":
    main()
