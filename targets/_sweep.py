"""The operators that a machine is calibrated with: what mobile and classic networks are made of, at several sizes."""

from __future__ import annotations

import numpy as np

from fxopt.targets.rows import FLOAT_BITS, OpKind, Rows, make_row

__all__ = ["calibration_sweep"]

# (output size, input channels, output channels)
_POINTWISE = (
    *((112, 32, 16), (112, 16, 96), (56, 24, 72), (56, 64, 64), (56, 144, 24), (28, 40, 240), (28, 128, 128)),
    *((14, 96, 576), (14, 256, 256), (14, 480, 80), (7, 320, 1280), (7, 160, 960)),
)
# (output size, input channels, output channels, kernel, stride)
_DENSE = (
    *((112, 3, 32, 3, 2), (112, 3, 64, 7, 2), (112, 16, 32, 3, 1), (56, 64, 64, 3, 1), (28, 64, 128, 3, 2)),
    *((28, 128, 128, 3, 1), (14, 256, 256, 3, 1), (14, 64, 96, 5, 1), (7, 512, 512, 3, 1), (32, 16, 16, 3, 1)),
    *((8, 64, 64, 3, 1), (28, 1, 16, 3, 1)),
)
# (output size, channels, kernel, stride)
_DEPTHWISE = (
    *((112, 32, 3, 1), (56, 96, 3, 2), (56, 72, 3, 1), (28, 144, 5, 2), (28, 120, 5, 1), (28, 192, 3, 1)),
    *((14, 384, 3, 1), (14, 240, 5, 1), (14, 288, 3, 2), (7, 960, 3, 1), (7, 576, 5, 1)),
)
# (rows, input features, output features)
_LINEAR = (
    *((1, 64, 10), (1, 512, 512), (1, 1280, 1000), (1, 2048, 1000), (1, 256, 2048), (4, 128, 128), (16, 256, 1024)),
    *((16, 64, 64), (49, 384, 384), (64, 1024, 256), (128, 256, 256), (128, 768, 768)),
)
# (size, channels, inputs)
_ELEMENTWISE = (
    *((112, 32, 1), (112, 16, 2), (56, 64, 2), (28, 128, 1), (28, 40, 2), (14, 96, 2), (14, 512, 1), (7, 320, 1)),
)
# (input size, output size, channels, kernel, stride); kernel = input size: global
_POOL = (
    *((112, 56, 64, 3, 2), (56, 28, 32, 2, 2), (32, 16, 16, 2, 2), (28, 14, 128, 3, 2), (56, 1, 64, 56, 1)),
    *((14, 1, 256, 14, 1), (8, 1, 64, 8, 1), (7, 1, 1280, 7, 1)),
)


def calibration_sweep(bits: tuple[int, ...] = (FLOAT_BITS, 8)) -> Rows:
    """Rows of the sweep, shape (n,): convolutions, linear layers, elementwise operators and pools at each width."""
    return np.concatenate([row for width in bits for row in _at(width)])


def _at(width: int) -> list[Rows]:
    bits = {"weight_bits": width, "activation_bits": width, "output_bits": width}
    rows = [_conv(OpKind.CONV, size, c, k, 1, 1, **bits) for size, c, k in _POINTWISE]
    rows += [_conv(OpKind.CONV, *sizes, **bits) for sizes in _DENSE]
    rows += [
        _conv(OpKind.DEPTHWISE, size, channels, channels, kernel, stride, groups=channels, **bits)
        for size, channels, kernel, stride in _DEPTHWISE
    ]
    rows += [
        make_row(OpKind.LINEAR, c=c, k=k, in_h=samples, out_h=samples, bias=1, **bits) for samples, c, k in _LINEAR
    ]
    rows += [
        make_row(OpKind.ELEMENTWISE, c=c, k=c, inputs=inputs, in_h=size, in_w=size, out_h=size, out_w=size, **bits)
        for size, c, inputs in _ELEMENTWISE
    ]
    rows += [
        _conv(OpKind.POOL, out_size, c, c, kernel, stride, in_size=in_size, bias=0, **bits)
        for in_size, out_size, c, kernel, stride in _POOL
    ]
    return rows


def _conv(
    kind: OpKind, size: int, c: int, k: int, kernel: int, stride: int, *, in_size: int = 0, bias: int = 1, **more: int
) -> Rows:
    sizes = {"in_h": in_size or size * stride, "in_w": in_size or size * stride, "out_h": size, "out_w": size}
    window = {"kernel_h": kernel, "kernel_w": kernel, "stride_h": stride, "stride_w": stride}
    return make_row(kind, c=c, k=k, bias=bias, **sizes, **window, **more)
