"""The eight networks that BitFusion was compared with Eyeriss on, batch 16.

Source: Sharma et al., "Bit Fusion", ISCA 2018, and the benchmarks of its simulator (github.com/hsharma35/bitfusion,
layers and widths). AlexNet and ResNet-18 run twice as wide in 4 bits on BitFusion (WRPN, Mishra et al., 2017) and in
their plain width on Eyeriss; the others are the same on both: SVHN and CIFAR-10 of QNN (Hubara et al., 2016), LeNet-5
and VGG-7 of TWN (Li et al., 2016). "RNN" and "LSTM" are one matrix product a step. Only convolutions and matrix
products are counted, as there. Its ResNet-18 has a 1 x 1 in place of the first 3 x 3 of each block.

Assumed: that Eyeriss ran the plain networks. Its published times hold no other reading: AlexNet takes 141 ms, but
twice as wide it would take 335 ms at the peak of 256 elements.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fxopt.targets.rows import OpKind, Rows, make_row

__all__ = ["NETWORKS", "network"]

NETWORKS = ("AlexNet", "SVHN", "CIFAR10", "LeNet-5", "VGG-7", "RESNET-18", "RNN", "LSTM")
BATCH = 16


def _conv(size: int, kernel: int, stride: int, c: int, k: int, bits: tuple[int, int]) -> Rows:
    sides = {"in_h": size * stride, "in_w": size * stride, "out_h": size, "out_w": size}
    window = {"kernel_h": kernel, "kernel_w": kernel, "stride_h": stride, "stride_w": stride}
    return make_row(OpKind.CONV, n=BATCH, c=c, k=k, weight_bits=bits[0], activation_bits=bits[1], **sides, **window)


def _linear(c: int, k: int, bits: tuple[int, int]) -> Rows:
    return make_row(OpKind.LINEAR, n=BATCH, c=c, k=k, weight_bits=bits[0], activation_bits=bits[1])


def _alexnet(wide: int) -> list[Rows]:
    four = (4, 4)
    towers = [
        _conv(55, 11, 4, 3, 48 * wide, (8 if wide > 1 else 4, 8)),
        _conv(27, 5, 1, 48 * wide, 128 * wide, four),
        _conv(13, 3, 1, 256 * wide, 192 * wide, four),
        _conv(13, 3, 1, 192 * wide, 192 * wide, four),
        _conv(13, 3, 1, 192 * wide, 128 * wide, four),
    ]
    dense = [_linear(9216 * wide, 4096 * wide, four), _linear(4096 * wide, 4096 * wide, four)]
    return [*towers, *towers, *dense, _linear(4096 * wide, 1000, (8, 8))]


def _resnet18(wide: int) -> list[Rows]:
    c = 64 * wide
    rows = [_conv(112, 7, 2, 3, c, (8, 8))]
    for k, size in ((64, 56), (128, 28), (256, 14), (512, 7)):
        for block in range(2):
            stride = 2 if block == 0 and k > 64 else 1
            rows.append(_conv(size, 1, stride, c, k * wide, (4, 4)))
            rows.append(_conv(size, 3, 1, k * wide, k * wide, (4, 4)))
            c = k * wide
    return rows


def _qnn(width: int, bits: int, first: int) -> list[Rows]:
    both = (bits, bits)
    sizes, ks = (32, 32, 16, 16, 8, 8), (width, width, 2 * width, 2 * width, 4 * width, 4 * width)
    rows = [_conv(32, 3, 1, 3, width, (first, 8))]
    rows += [_conv(size, 3, 1, c, k, both) for size, c, k in zip(sizes[1:], ks, ks[1:], strict=False)]
    return [*rows, _linear(64 * width, 1024, both), _linear(1024, 1024, both), _linear(1024, 10, both)]


def _lenet5() -> list[Rows]:
    two = (2, 2)
    convolutions = [_conv(32, 5, 1, 1, 32, two), _conv(16, 5, 1, 32, 64, two)]
    return [*convolutions, _linear(4096, 512, two), _linear(512, 10, two)]


def _vgg7() -> list[Rows]:
    two = (2, 2)
    tower = [_conv(32, 3, 1, 3, 128, two), _conv(16, 3, 1, 128, 256, two), _conv(8, 3, 1, 256, 512, two)]
    return [*tower, *tower, _linear(8192, 1024, two)]


def network(name: str, *, plain: bool) -> Rows:
    """The rows of one of :data:`NETWORKS`; ``plain`` for the width that Eyeriss runs."""
    wide = 1 if plain else 2
    rows: dict[str, Sequence[Rows]] = {
        "AlexNet": _alexnet(wide),
        "SVHN": _qnn(64, 1, 1),
        "CIFAR10": _qnn(128, 2, 8),
        "LeNet-5": _lenet5(),
        "VGG-7": _vgg7(),
        "RESNET-18": _resnet18(wide),
        "RNN": [_linear(4096, 4096, (4, 4))],
        "LSTM": [_linear(3600, 3600, (4, 4))],
    }
    return np.concatenate(rows[name])
