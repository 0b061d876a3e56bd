"""CPU time of reconstruction in one episode of AMC's search, accuracy evaluation left out.

MobileNetV1 at AMC's settings: the input channels of 13 pointwise convolutions and the classifier are cut to a random
part of 0.2 to 1, and the weights behind are found anew for 30,000 sampled rows (3,000 for the classifier). Second
moments are gathered once, before the episodes. Beside it, for as many episodes as asked for, the same at a half of the
channels by `numpy.linalg.lstsq` on the raw rows, as AMC's published code does it; weights are compared with a ridge of
zero.

    .venv/bin/python benchmarks/amc_overhead.py > overhead.json
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from common.output import finish, progress

from fxopt.passes._least_squares import Moments

WIDTHS = (32, 64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024, 1000)
ROWS, CLASSIFIER_ROWS = 30_000, 3_000


def features(rows: int, channels: int, generator: torch.Generator) -> torch.Tensor:
    """Rectified values of correlated channels, as a layer's inputs are."""
    mixed = torch.randn(rows, channels, generator=generator)
    mixed += 0.7 * torch.randn(rows, 8, generator=generator) @ torch.randn(8, channels, generator=generator)
    return mixed.relu_()


def cut(moments: Moments, weight: torch.Tensor, kept: torch.Tensor, ridge: float) -> torch.Tensor:
    """The weights for the kept channels, shape (outputs, kept)."""
    return moments.refit(kept, torch.arange(len(weight)), weight[None, :, kept], ridge, False)[0][0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=15)
    parser.add_argument("--raw-episodes", type=int, default=1, help="episodes by lstsq on raw rows")
    options = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    layers = []
    gathering = raw = worst = 0.0
    rng = np.random.default_rng(0)
    for index, (inputs, outputs) in enumerate(itertools.pairwise(WIDTHS)):
        rows = CLASSIFIER_ROWS if index == len(WIDTHS) - 2 else ROWS
        x = features(rows, inputs, generator).double()
        weight = torch.randn(outputs, inputs, generator=generator).double()
        begin = time.process_time()
        moments = Moments.of(x[None]).with_outputs(weight[None], None)
        gathering += time.process_time() - begin
        layers.append((moments, weight))
        for _ in range(options.raw_episodes):
            kept = torch.from_numpy(np.sort(rng.choice(inputs, int(np.ceil(inputs * 0.5)), replace=False)))
            wanted = (x @ weight.T).numpy()
            begin = time.process_time()
            oracle = np.linalg.lstsq(x[:, kept].numpy(), wanted, rcond=None)[0].T
            raw += time.process_time() - begin
            worst = max(worst, float(np.abs(cut(moments, weight, kept, 0.0).numpy() - oracle).max()))
        progress(f"layer {index}: {inputs} to {outputs}")
    spent = []
    for _ in range(options.episodes + 1):
        begin = time.process_time()
        for moments, weight in layers:
            inputs = weight.shape[1]
            kept = np.sort(rng.choice(inputs, max(1, int(inputs * rng.uniform(0.2, 1.0))), replace=False))
            cut(moments, weight, torch.from_numpy(kept), 1e-3)
        spent.append(1e3 * (time.process_time() - begin))
    results = {
        "episode_ms_median": statistics.median(spent[1:]),
        "episode_ms_quartiles": statistics.quantiles(spent[1:], n=4),
        "gathering_ms_once": 1e3 * gathering,
        "raw_rows_episode_ms": 1e3 * raw / options.raw_episodes if options.raw_episodes else None,
        "largest_difference_of_a_weight": worst,
    }
    finish("amc_overhead", results, layers=len(layers), rows=ROWS)


if __name__ == "__main__":
    main()
