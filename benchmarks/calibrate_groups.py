"""Measure what a group costs where grouped convolutions are computed group by group, in MACs, and print JSON.

Frameworks of 2018 convolved every group of a depthwise convolution by itself on CPUs: PyTorch 0.4 had fast kernels for
one group alone (``use_mkldnn`` in aten/src/ATen/native/Convolution.cpp), and a loop over groups for all others. Today's
PyTorch still has that loop, behind ``torch.backends.mkldnn.flags(enabled=False)``. It is timed on all depthwise layers
of the networks that ProxylessNAS found, at 224 x 224 pixels and batch 1, on one thread; layers take turns, and the time
of a layer is the median of its turns. Then

    time = group * groups + weight * weights + mac * MACs

is fitted to them, by non-negative least squares on relative errors: each group is a call of its own, which unfolds its
channel in a loop over the kernel's weights, and multiplies.

How many MACs a group and a weight cost is what a preset of such a framework takes from here (``fits/linear_cpu.py``);
the times themselves are of this machine. ``totals`` has the sums of the measured times beside the published times of
whole networks on a Xeon E5-2640 v4, all times one factor.

    python benchmarks/calibrate_groups.py
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from common.output import finish, progress
from nas_published import PUBLISHED_MS
from scipy.optimize import nnls
from torch import Tensor, nn

from fxopt import models

PUBLISHED = PUBLISHED_MS["xeon-e5-2640v4"]


@dataclass(frozen=True)
class Layer:
    """A depthwise layer of a network, with its input."""

    network: str
    module: nn.Conv2d
    image: Tensor

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one run."""
        return self.module(self.image).numel() * self.module.kernel_size[0] * self.module.kernel_size[1]

    def seconds(self) -> float:
        """Processor time of one run, group by group."""
        with warnings.catch_warnings():
            # Of a setting for GPUs that torch goes through as well.
            warnings.simplefilter("ignore", UserWarning)
            with torch.backends.mkldnn.flags(enabled=False):  # type: ignore[no-untyped-call]
                start = time.process_time()
                self.module(self.image)
                return time.process_time() - start


def layers_of(name: str) -> list[Layer]:
    """The depthwise layers of a network, as they are run."""
    found: list[Layer] = []

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(module, nn.Conv2d) and module.groups > 1:
            found.append(Layer(name, module, torch.randn_like(inputs[0])))

    network = models.create(name).eval()
    for module in network.modules():
        module.register_forward_hook(keep)
    network(torch.zeros(1, 3, 224, 224))
    for module in network.modules():
        module._forward_hooks.clear()
    return found


def measure(rounds: int) -> dict[str, Any]:
    layers = [layer for name in PUBLISHED for layer in layers_of(name)]
    turns = np.array([[layer.seconds() for layer in layers] for _ in range(rounds + 1)])[1:]
    seconds = np.median(turns, axis=0)
    amounts = np.array([(one.module.groups, one.module.weight.numel(), one.macs) for one in layers], dtype=float)
    scale = amounts.mean(axis=0)
    solution, _ = nnls(amounts / scale / seconds[:, None], np.ones(len(layers)))
    group_s, weight_s, mac_s = fitted = solution / scale
    errors = np.abs(amounts @ fitted / seconds - 1.0)
    sums = dict.fromkeys(PUBLISHED, 0.0)
    for layer, taken in zip(layers, seconds, strict=True):
        sums[layer.network] += taken
    factor = statistics.fmean(PUBLISHED[name] / sums[name] for name in PUBLISHED)
    progress(f"a group costs {group_s / mac_s:.0f} MACs, a weight {weight_s / mac_s:.0f}")
    return {
        "layers": len(layers),
        "mac_s": mac_s,
        "macs_of_a_group": group_s / mac_s,
        "macs_of_a_weight": weight_s / mac_s,
        "error": {"mean": float(errors.mean()), "max": float(errors.max())},
        "totals": {
            name: {"measured_ms": total * 1e3, "scaled_ms": total * factor, "published_ms": PUBLISHED[name]}
            for name, total in sums.items()
        },
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with torch.inference_mode():
        finish("calibrate_groups", measure(options.rounds), rounds=options.rounds)
