"""The two fitted figures of Eyeriss: each to one total of the chip, the convolutions of AlexNet at batch 4.

Run from benchmarks/: ``python -m fits.eyeriss``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from accuracy._costs import costs, figures, model

from fxopt.targets.rows import OpKind, Rows, macs, make_row

__all__ = ["ALEXNET_FPS", "ALEXNET_WATTS", "alexnet", "fit", "frames_per_s", "vgg16", "watts"]

ALEXNET_FPS = 35.0
ALEXNET_WATTS = 0.278


def _conv(c: int, k: int, size: int, kernel: int, stride: int, groups: int, batch: int) -> Rows:
    sides = {"in_h": size * stride, "in_w": size * stride, "out_h": size, "out_w": size}
    window = {"kernel_h": kernel, "kernel_w": kernel, "stride_h": stride, "stride_w": stride}
    return make_row(OpKind.CONV, c=c, k=k, groups=groups, n=batch, **sides, **window)


def alexnet(batch: int) -> Rows:
    """Its five convolutions, in two groups as published (Krizhevsky et al., 2012)."""
    layers = [(3, 96, 55, 11, 4, 1), (96, 256, 27, 5, 1, 2), (256, 384, 13, 3, 1, 1)]
    layers += [(384, 384, 13, 3, 1, 2), (384, 256, 13, 3, 1, 2)]
    return np.concatenate([_conv(*layer, batch) for layer in layers])


def vgg16(batch: int) -> Rows:
    """Its thirteen convolutions (Simonyan and Zisserman, 2014)."""
    layers, c, size = [], 3, 224
    for k, count in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(count):
            layers.append(_conv(c, k, size, 3, 1, 1, batch))
            c = k
        size //= 2
    return np.concatenate(layers)


def frames_per_s(rows: Rows, batch: int, **changes: float) -> float:
    """Frames per second of some convolutions."""
    return float(batch / costs(model("eyeriss", **changes), rows)[0].sum())


def watts(rows: Rows, batch: int, rate: float, static_power: float) -> float:
    """Power of the chip, without memory, at a rate in frames/s."""
    return static_power + figures("eyeriss")["mac_energy"] * float(macs(rows).sum()) / batch * rate


def fit() -> tuple[float, float]:
    """(efficiency, static power in W)."""
    low, high = 0.1, 1.0
    rows: Rows = alexnet(4)
    steps: Sequence[int] = range(50)
    for _ in steps:
        middle = 0.5 * (low + high)
        if frames_per_s(rows, 4, efficiency=middle) < ALEXNET_FPS:
            low = middle
        else:
            high = middle
    return low, ALEXNET_WATTS - watts(rows, 4, ALEXNET_FPS, 0.0)


if __name__ == "__main__":
    efficiency, static_power = fit()
    print(f"efficiency {efficiency:.3f}\nstatic_power {static_power * 1e3:.0f} mW")
