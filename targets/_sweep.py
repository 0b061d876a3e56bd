"""The operators that a machine is calibrated with: what mobile and classic networks are made of, at several sizes."""

from __future__ import annotations

import numpy as np

from fxopt.targets.rows import FLOAT_BITS, Activation, OpKind, Rows, make_row

__all__ = ["calibration_sweep", "pace_row"]

# (output size, input channels, output channels)
_POINTWISE = (
    *((112, 32, 16), (112, 16, 96), (56, 24, 72), (56, 64, 64), (56, 144, 24), (28, 40, 240), (28, 128, 128)),
    *((14, 96, 576), (14, 256, 256), (14, 480, 80), (7, 320, 1280), (7, 160, 960)),
    *((1, 96, 24), (1, 480, 120), (1, 40, 240), (1, 1280, 1000), (56, 256, 64), (28, 128, 512), (14, 1024, 256)),
    *((7, 512, 2048), (7, 960, 160), (28, 192, 32), (14, 384, 64), (56, 64, 256), (14, 576, 96), (28, 72, 40)),
)
# (output size, input channels, output channels, kernel, stride)
_DENSE = (
    *((112, 3, 32, 3, 2), (112, 3, 64, 7, 2), (112, 16, 32, 3, 1), (56, 64, 64, 3, 1), (28, 64, 128, 3, 2)),
    *((28, 128, 128, 3, 1), (14, 256, 256, 3, 1), (14, 64, 96, 5, 1), (7, 512, 512, 3, 1), (32, 16, 16, 3, 1)),
    *((8, 64, 64, 3, 1), (28, 1, 16, 3, 1), (28, 32, 128, 3, 1), (56, 16, 64, 3, 1), (14, 128, 32, 3, 1)),
    *((7, 256, 512, 3, 2), (14, 48, 192, 3, 1), (56, 128, 32, 3, 1), (7, 128, 32, 3, 1), (112, 3, 16, 3, 2)),
    *((56, 24, 24, 3, 1), (28, 40, 80, 3, 1), (14, 72, 48, 3, 1), (147, 3, 32, 3, 2)),
)
# (output size, channels, kernel, stride, groups)
_GROUPED = (
    *((56, 128, 3, 1, 32), (28, 256, 3, 1, 32), (28, 64, 3, 2, 4), (14, 160, 3, 1, 10), (14, 384, 3, 1, 24)),
    *((7, 512, 3, 1, 8), (14, 240, 1, 1, 3), (28, 136, 1, 1, 2)),
)
# (output size, channels, kernel, stride)
_DEPTHWISE = (
    *((112, 32, 3, 1), (56, 96, 3, 2), (56, 72, 3, 1), (28, 144, 5, 2), (28, 120, 5, 1), (28, 192, 3, 1)),
    *((14, 384, 3, 1), (14, 240, 5, 1), (14, 288, 3, 2), (7, 960, 3, 1), (7, 576, 5, 1)),
    *((7, 1152, 5, 1), (14, 672, 5, 2), (28, 58, 3, 1), (56, 144, 3, 1), (14, 40, 7, 1)),
    *(
        (28, 40, 3, 1),
        (14, 200, 3, 1),
        (14, 480, 3, 1),
        (56, 64, 3, 2),
        (112, 16, 3, 1),
        (56, 24, 3, 1),
        (14, 116, 3, 1),
    ),
)
# (rows, input features, output features)
_LINEAR = (
    *((1, 64, 10), (1, 512, 512), (1, 1280, 1000), (1, 2048, 1000), (1, 256, 2048), (4, 128, 128), (16, 256, 1024)),
    *(
        (16, 64, 64),
        (49, 384, 384),
        (64, 1024, 256),
        (128, 256, 256),
        (128, 768, 768),
        (197, 192, 576),
        (197, 768, 192),
    ),
)
# (batch of matrices, rows, length, columns)
_MATMUL = (
    (3, 197, 64, 197),
    (3, 197, 197, 64),
    (4, 128, 64, 128),
    (4, 128, 128, 64),
    (6, 49, 32, 49),
    (1, 64, 256, 64),
)
# (size, channels)
_PLANES = ((112, 32), (112, 16), (56, 64), (56, 144), (28, 40), (28, 240), (14, 96), (14, 512), (7, 320), (1, 96))
# (input size, output size, channels, kernel, stride); kernel = input size: global
_POOL = (
    *((112, 56, 64, 3, 2), (56, 28, 32, 2, 2), (32, 16, 16, 2, 2), (28, 14, 128, 3, 2), (56, 1, 64, 56, 1)),
    *((14, 1, 256, 14, 1), (8, 1, 64, 8, 1), (7, 1, 1280, 7, 1), (112, 1, 32, 112, 1), (14, 14, 256, 3, 1)),
    *((28, 1, 120, 28, 1), (14, 1, 672, 14, 1)),
)
# (tokens, features): rows that are normalized or go through softmax
_TOKENS = ((197, 192), (197, 768), (128, 256), (49, 384), (588, 197), (512, 128))


def calibration_sweep(bits: tuple[int, ...] = (FLOAT_BITS, 8)) -> Rows:
    """Rows of the sweep, shape (n,): every kind of operator that images and tokens meet, at each width."""
    return np.concatenate([row for width in bits for row in (_layers(width) + _between(width))])


def pace_row() -> Rows:
    """The operator that others are timed beside, shape (1,): when it takes longer, so does everything else."""
    return _conv(OpKind.CONV, 14, 256, 256, 1, 1, **_bits(FLOAT_BITS))


def _bits(width: int) -> dict[str, int]:
    return {"weight_bits": width, "activation_bits": width, "output_bits": width}


def _layers(width: int) -> list[Rows]:
    bits = _bits(width)
    rows = [_conv(OpKind.CONV, size, c, k, 1, 1, **bits) for size, c, k in _POINTWISE]
    rows += [_conv(OpKind.CONV, *sizes, **bits) for sizes in _DENSE]
    rows += [
        _conv(OpKind.CONV, size, channels, channels, kernel, stride, groups=groups, **bits)
        for size, channels, kernel, stride, groups in _GROUPED
    ]
    rows += [
        _conv(OpKind.DEPTHWISE, size, channels, channels, kernel, stride, groups=channels, **bits)
        for size, channels, kernel, stride in _DEPTHWISE
    ]
    rows += [make_row(OpKind.LINEAR, c=c, k=k, in_h=n, out_h=n, bias=1, **bits) for n, c, k in _LINEAR]
    return rows + [make_row(OpKind.MATMUL, n=n, c=c, k=k, in_h=m, out_h=m, **bits) for n, m, c, k in _MATMUL]


def _between(width: int) -> list[Rows]:
    bits = _bits(width)
    kinds: list[tuple[OpKind, dict[str, int]]] = [
        *((OpKind.ELEMENTWISE, {"inputs": inputs}) for inputs in (1, 2)),
        (OpKind.ELEMENTWISE, {"activation": int(Activation.CURVE)}),
        *((OpKind.COPY, {"transposed": transposed}) for transposed in (0, 1)),
    ]
    if width == FLOAT_BITS:
        # Between integers a clamp is the range of their grid.
        kinds += [(OpKind.NORM, {}), (OpKind.ELEMENTWISE, {"activation": int(Activation.CLAMP)})]
    # Maps of features are rows of channels and positions, as lowering has them.
    rows = [_map(kind, size * size, channels, **more, **bits) for kind, more in kinds for size, channels in _PLANES]
    if width == FLOAT_BITS:
        rows += [_map(kind, n, c, **bits) for kind in (OpKind.NORM, OpKind.SOFTMAX) for n, c in _TOKENS]
    rows += [
        make_row(OpKind.RESIZE, c=c, k=c, in_h=size, in_w=size, out_h=2 * size, out_w=2 * size, **bits)
        for size, c in _PLANES[2:8]
    ]
    return rows + [
        _conv(OpKind.POOL, out_size, c, c, kernel, stride, in_size=in_size, bias=0, **bits)
        for in_size, out_size, c, kernel, stride in _POOL
    ]


def _map(kind: OpKind, positions: int, channels: int, **more: int) -> Rows:
    return make_row(kind, c=channels, k=channels, in_h=positions, out_h=positions, **more)


def _conv(
    kind: OpKind, size: int, c: int, k: int, kernel: int, stride: int, *, in_size: int = 0, bias: int = 1, **more: int
) -> Rows:
    sizes = {"in_h": in_size or size * stride, "in_w": in_size or size * stride, "out_h": size, "out_w": size}
    window = {"kernel_h": kernel, "kernel_w": kernel, "stride_h": stride, "stride_w": stride}
    return make_row(kind, c=c, k=k, bias=bias, **sizes, **window, **more)
