"""Fit the presets of the family ``gpu`` to published times of whole networks, and print their figures.

Few figures a device, least squares on relative errors. What is fitted to what:

- ``v100``: launch floor and efficiency of matrix kernels, to eight networks at batch 8.
- ``v100:eager-2020`` and ``gtx1080ti``: efficiencies of bandwidth and of depthwise kernels, to the laws (time linear in
  bytes and convolutions) that four specialized networks of Once-for-All followed at batch 64.
- ``titan-xp``: efficiency of bandwidth, to four networks at batch 50.
- ``jetson-tx2``: efficiencies of matrix kernels and of bandwidth, to six networks at batch 16 that a fusing runtime ran
  and two that eager PyTorch ran; power, to the six.

Usage: ``python fits/gpu.py DATA`` from the folder of the benchmarks.
"""

from __future__ import annotations

import csv
import itertools
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.optimize import least_squares, minimize

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from fits.networks import conv, measured, tables, workload
from fxopt.targets import OpKind, PresetTarget, Workload, load, make_row
from fxopt.targets.models.gpu import Model
from fxopt.targets.rows import Floats, Rows, in_elements, out_elements

__all__ = [
    "FREE",
    "OFA",
    "Case",
    "cases_of",
    "figures_of",
    "fit",
    "jetson_cases",
    "law_cases",
    "left_out",
    "ofa_cases",
    "power",
    "predict",
    "titan_cases",
    "v100_cases",
]

# Networks measured on the V100 at batch 8, and their layer tables.
V100_NETWORKS = {
    "MobileNetV2": "mobilenet_v2",
    "ShuffleNetV2-1.5": "shufflenetv2_15",
    "ResNet-34": "resnet34",
    "NASNet-A": "nasnet_a",
    "MnasNet": "mnasnet_b1",
    "ProxylessNAS-GPU": "proxyless_gpu",
    "ProxylessNAS-CPU": "proxyless_cpu",
    "ProxylessNAS-Mobile": "proxyless_mobile",
}
# Channel shuffles, a copy each, are functional calls that the layer tables do not hold.
SHUFFLES = {"ShuffleNetV2-1.5": 16}

# Networks measured on the Titan Xp at batch 50, and their layers in the profiles of MobileNetV1.
TITAN_NETWORKS = {
    "MobileNetV1-1.0": "mobilenet",
    "MobileNetV1-0.75": "0.75mobilenet",
    "AMC-MobileNetV1-0.5FLOPs": "0.5flops",
    "AMC-MobileNetV1-0.5time": "0.5time",
}

# Blocks (kernel, stride, channels inside, channels out; 0 inside: no expansion) and input sizes of networks in
# github.com/han-cai/files, ofa/ofa_specialized, whose names tell the device, the batch and the time. The input size of
# the first is not to be found.
OFA: Mapping[str, tuple[int, Sequence[tuple[int, int, int, int]]]] = {
    "v100_gpu64@11ms": (
        0,
        [
            *((3, 1, 0, 24), (3, 2, 72, 32), (3, 1, 96, 32), (5, 2, 192, 56), (5, 1, 168, 56), (7, 2, 168, 104)),
            *((3, 1, 312, 104), (7, 1, 416, 104), (7, 1, 416, 128), (5, 1, 512, 128), (3, 1, 384, 128)),
            *((7, 1, 512, 128), (3, 2, 768, 248), (5, 1, 1488, 248), (5, 1, 992, 248), (3, 1, 1488, 248)),
            (3, 1, 992, 416),
        ],
    ),
    "1080ti_gpu64@12ms": (
        128,
        [
            *((3, 1, 0, 24), (3, 2, 72, 32), (3, 1, 96, 32), (3, 2, 192, 56), (5, 1, 224, 56), (5, 1, 224, 56)),
            *((5, 2, 336, 104), (5, 1, 312, 104), (7, 1, 312, 104), (3, 1, 416, 128), (7, 1, 384, 128)),
            *((3, 1, 768, 128), (3, 1, 512, 128), (7, 2, 768, 248), (5, 1, 992, 248), (7, 1, 744, 248)),
            *((5, 1, 744, 248), (3, 1, 1488, 416)),
        ],
    ),
    "tx2_gpu16@35ms": (
        128,
        [
            *((3, 1, 0, 24), (3, 2, 96, 32), (3, 1, 96, 32), (3, 2, 192, 56), (7, 1, 336, 56), (5, 2, 336, 104)),
            *((5, 1, 312, 104), (5, 1, 312, 128), (3, 1, 512, 128), (5, 2, 768, 248), (3, 1, 992, 248)),
            (5, 1, 992, 416),
        ],
    ),
    "tx2_gpu16@96ms": (
        172,
        [
            *((3, 1, 0, 24), (3, 2, 72, 32), (3, 1, 128, 32), (3, 1, 192, 32), (7, 2, 96, 56), (5, 1, 224, 56)),
            *((3, 2, 224, 104), (5, 1, 416, 104), (5, 1, 416, 104), (5, 1, 312, 104), (5, 1, 416, 128)),
            *((7, 1, 384, 128), (7, 1, 384, 128), (3, 1, 768, 128), (3, 2, 768, 248), (3, 1, 1488, 248)),
            *((5, 1, 1488, 248), (3, 1, 992, 248), (5, 1, 744, 416)),
        ],
    ),
}
LAW_SIZES = (128, 160, 192, 224)

# Plain networks measured on the Jetson TX2, as github.com/hsharma35/bitfusion builds them: (kernel, channels) is a
# convolution that keeps the size, 0 a pool that halves it, a single number a fully connected layer.
VGG = ((3, 128), (3, 128), 0, (3, 256), (3, 256), 0, (3, 512), (3, 512), 0)
PLAIN: Mapping[str, tuple[int, Sequence[tuple[int, int] | int]]] = {
    "vgg-7": (3, (*VGG, 1024, 10)),
    "cifar10": (3, (*VGG, 1024, 1024, 10)),
    "svhn": (3, (*((3, 64),) * 2, 0, *((3, 128),) * 2, 0, *((3, 256),) * 2, 0, 1024, 1024, 10)),
    "lenet-5": (1, ((5, 32), 0, (5, 64), 0, 512, 10)),
}
# Sides of the one matrix product of each.
RECURRENT = {"rnn": 4096, "lstm": 3600}
# Too small to keep the device busy: the board drew 1.8 and 6.1 W in them, 7 and more in the others. What they wait for
# is the host, which a floor for each kernel does not describe.
HOST_BOUND = ("svhn", "lenet-5")

FREE = {
    "v100": ("launch_floor", "dense_efficiency"),
    "v100:eager-2020": ("bandwidth_efficiency", "depthwise_efficiency"),
    "gtx1080ti": ("bandwidth_efficiency", "depthwise_efficiency"),
    "titan-xp": ("bandwidth_efficiency",),
    "jetson-tx2": ("dense_efficiency", "bandwidth_efficiency"),
}
"""The figures of each target that are fitted."""

RANGES = {
    "launch_floor": (1e-6, 1e-3),
    "dense_efficiency": (0.05, 1.0),
    "bandwidth_efficiency": (0.05, 1.0),
    "depthwise_efficiency": (0.005, 1.0),
}
TYPICAL = {
    "launch_floor": 1e-5,
    "dense_efficiency": 0.7,
    "bandwidth_efficiency": 0.7,
    "depthwise_efficiency": 0.1,
}
"""Where a figure stays that no point is sensitive to."""
HOLD = 1e-5
STARTS = 3


@dataclass(frozen=True)
class Case:
    """A network, how long it was measured to take, and whether the runtime fuses.

    The first word of the name tells networks apart, for those measured in several ways.
    """

    name: str
    work: Workload
    seconds: float
    fuses: bool = False

    @property
    def network(self) -> str:
        """The network without the way that it was measured."""
        return self.name.partition(" ")[0]


def predict(values: Mapping[str, float], cases: Iterable[Case]) -> Floats:
    """Seconds of each network by the model."""
    models = {fuses: Model(values, fuses) for fuses in (False, True)}
    found = []
    for case in cases:
        latency_s = np.empty((1, case.work.rows.shape[1]))
        models[case.fuses].per_row(case.work.rows, latency_s, np.empty_like(latency_s), np.empty_like(latency_s))
        found.append(latency_s.sum())
    return np.array(found)


def fit(values: Mapping[str, float], free: Sequence[str], cases: Sequence[Case]) -> dict[str, float]:
    """The figures ``free`` of least squared relative errors, the others as in ``values``.

    The best points of a grid are refined, on logarithms. A figure that nothing depends on is held
    at :data:`TYPICAL`, by a pull too weak to show elsewhere.
    """
    seconds = np.array([case.seconds for case in cases])
    typical = np.log([TYPICAL[key] for key in free])

    def residuals(logs: Floats) -> Floats:
        trial = {**values, **dict(zip(free, np.exp(logs).tolist(), strict=True))}
        pull = HOLD**0.5 * (logs - typical)
        return np.concatenate([predict(trial, cases) / seconds - 1.0, pull])

    def loss(logs: Floats) -> float:
        return float(np.sum(residuals(logs) ** 2))

    bounds = [(np.log(RANGES[key][0]), np.log(RANGES[key][1])) for key in free]
    steps = 13 if len(free) <= 2 else 4
    grid = itertools.product(*(np.linspace(low, high, steps) for low, high in bounds))
    starts = sorted((np.array(point) for point in grid), key=loss)[:STARTS]
    # Gradients lead into the valley, the simplex over the kinks in it.
    descended = [least_squares(residuals, start, bounds=tuple(zip(*bounds, strict=True))).x for start in starts]
    best = min(descended, key=loss)
    best = minimize(loss, best, method="Nelder-Mead", bounds=bounds, options={"xatol": 1e-4, "fatol": 1e-9}).x
    return dict(zip(free, np.exp(best).tolist(), strict=True))


def left_out(values: Mapping[str, float], free: Sequence[str], cases: Sequence[Case]) -> dict[str, float]:
    """Relative error of each network, by a fit to all others; cases of one network are left out together."""
    found = {}
    for network in dict.fromkeys(case.network for case in cases):
        held = [case for case in cases if case.network == network]
        fitted = {**values, **fit(values, free, [case for case in cases if case.network != network])}
        errors = predict(fitted, held) / [case.seconds for case in held] - 1.0
        found |= dict(zip([case.name for case in held], errors.tolist(), strict=True))
    return found


def figures_of(target: str) -> dict[str, float]:
    """Figures of a target in SI units."""
    loaded = load(target)
    if not isinstance(loaded, PresetTarget):
        raise TypeError(f"{target} is no preset")
    return {key: figure.si for key, figure in loaded.preset.figures.items()}


def v100_cases(data: Path) -> list[Case]:
    """Networks at batch 8."""
    times, networks = measured(data, "V100"), tables(data)
    found = []
    for name, table in V100_NETWORKS.items():
        work = workload(networks[table], 8)
        copies = [make_row(OpKind.COPY, n=8, c=24, k=24)] * SHUFFLES.get(name, 0)
        found.append(Case(name, _work([work.rows[0], *copies]), times[name][0] * 1e-3))
    return found


def titan_cases(data: Path) -> list[Case]:
    """Networks at batch 50."""
    times = measured(data, "TitanXP", "latency_per_image")
    layers: dict[str, list[Rows]] = {}
    with (data / "pixel1_mobilenetv1_per_op.csv").open(encoding="utf-8") as file:
        for point in csv.DictReader(file):
            c, k, kernel, stride, size = (int(point[name]) for name in ("C", "K", "R", "stride", "P"))
            rows = layers.setdefault(point["model"], [])
            if point["type"] == "fc":
                rows.append(make_row(OpKind.POOL, n=50, c=c, k=c, in_h=7, in_w=7, kernel_h=7, kernel_w=7))
                rows.append(make_row(OpKind.LINEAR, n=50, c=c, k=k, bias=1))
            else:
                groups = c if point["type"] == "dw" else 1
                rows += _conv_norm_act(c, k, kernel, stride, size * stride, 50, groups)
    return [Case(name, _work(layers[model]), times[name][0] * 50e-3) for name, model in TITAN_NETWORKS.items()]


def ofa_cases(device: str) -> list[Case]:
    """Networks of Once-for-All whose names begin with ``device`` and whose input sizes are known."""
    found = []
    for name, (size, blocks) in OFA.items():
        if name.startswith(device) and size:
            batch, milliseconds = name.removesuffix("ms").partition("gpu")[2].split("@")
            found.append(Case(name, _inverted_residuals(blocks, size, int(batch)), float(milliseconds) * 1e-3))
    return found


def law_cases(data: Path, law: str) -> list[Case]:
    """The networks of :data:`OFA` at batch 64 and several sizes, with the time that a published law gives them.

    ``law`` is a key of ``fitted_params.json``: milliseconds a gigabyte that convolutions read and write in float32,
    and a convolution.
    """
    figures = json.loads((data / "fitted_params.json").read_text(encoding="utf-8"))[law]
    found = []
    for (name, (_, blocks)), size in itertools.product(OFA.items(), LAW_SIZES):
        work = _inverted_residuals(blocks, size, 64)
        convs = work.rows[0][np.isin(work.rows[0]["kind"], [OpKind.CONV, OpKind.DEPTHWISE])]
        gigabytes = 4e-9 * float(np.sum(in_elements(convs) + out_elements(convs)))
        milliseconds = figures["ms_per_GB"] * gigabytes + figures.get("ms_per_conv", 0.0) * len(convs)
        found.append(Case(f"{name} at {size} pixels", work, milliseconds * 1e-3))
    return found


def jetson_cases(data: Path) -> list[Case]:
    """Networks at batch 16 under TensorRT."""
    times = measured(data, "TX2", "latency_batch16")
    work = {name: _plain(*spec, batch=16) for name, spec in PLAIN.items()}
    work |= {name: _work([make_row(OpKind.LINEAR, n=16, c=side, k=side)]) for name, side in RECURRENT.items()}
    work |= {"alexnet": _alexnet(16), "resnet-18": workload(tables(data)["resnet18"], 16)}
    return [Case(name, each, times[name][0] * 1e-3, fuses=True) for name, each in work.items()]


def _work(rows: Sequence[Rows]) -> Workload:
    joined = np.concatenate(rows)
    return Workload(joined, [f"row{i}" for i in range(len(joined))])


def _elementwise(kind: OpKind, channels: int, size: int, batch: int, **more: int) -> Rows:
    sides = {"in_h": size, "in_w": size, "out_h": size, "out_w": size}
    return make_row(kind, n=batch, c=channels, k=channels, **sides, **more)


def _conv_norm_act(
    c: int, k: int, kernel: int, stride: int, size: int, batch: int, groups: int = 1, *, act: bool = True
) -> list[Rows]:
    row = conv(c, k, kernel, stride, size, groups, n=batch)
    out = int(row["out_h"][0])
    rows = [row, _elementwise(OpKind.NORM, k, out, batch, fused=1, bias=1)]
    return [*rows, _elementwise(OpKind.ELEMENTWISE, k, out, batch, fused=1)] if act else rows


def _inverted_residuals(blocks: Sequence[tuple[int, int, int, int]], size: int, batch: int) -> Workload:
    """A network of Once-for-All: 40 channels, the blocks, 1664 channels, 1000 classes."""
    rows = _conv_norm_act(3, 40, 3, 2, size, batch)
    channels, size = 40, -(-size // 2)
    for kernel, stride, inside, outputs in blocks:
        if inside:
            rows += _conv_norm_act(channels, inside, 1, 1, size, batch)
        wide = inside or channels
        rows += _conv_norm_act(wide, wide, kernel, stride, size, batch, wide)
        size = -(-size // stride)
        rows += _conv_norm_act(wide, outputs, 1, 1, size, batch, act=False)
        if stride == 1 and outputs == channels:
            rows.append(_elementwise(OpKind.ELEMENTWISE, outputs, size, batch, inputs=2))
        channels = outputs
    rows += _conv_norm_act(channels, 1664, 1, 1, size, batch)
    rows.append(make_row(OpKind.POOL, n=batch, c=1664, k=1664, in_h=size, in_w=size, kernel_h=size, kernel_w=size))
    rows.append(make_row(OpKind.LINEAR, n=batch, c=1664, k=1000, bias=1))
    return _work(rows)


def _plain(channels: int, layers: Sequence[tuple[int, int] | int], batch: int, size: int = 32) -> Workload:
    rows = []
    for layer in layers:
        if isinstance(layer, tuple):
            kernel, outputs = layer
            rows.append(conv(channels, outputs, kernel, 1, size, n=batch, bias=1))
            rows.append(_elementwise(OpKind.ELEMENTWISE, outputs, size, batch, fused=1))
            channels = outputs
        elif layer:
            rows.append(make_row(OpKind.LINEAR, n=batch, c=channels * size * size, k=layer, bias=1))
            channels, size = layer, 1
        else:
            pool = {"in_h": size, "in_w": size, "out_h": size // 2, "out_w": size // 2, "kernel_h": 2, "kernel_w": 2}
            rows.append(make_row(OpKind.POOL, n=batch, c=channels, k=channels, stride_h=2, stride_w=2, **pool))
            size //= 2
    return _work(rows)


def _alexnet(batch: int) -> Workload:
    """AlexNet in two towers, as published (Krizhevsky et al., 2012)."""
    convs = [
        # c, k, kernel, stride, groups, pixels a side in and out, pooled after
        (3, 96, 11, 4, 1, 227, 55, True),
        (96, 256, 5, 1, 2, 27, 27, True),
        (256, 384, 3, 1, 1, 13, 13, False),
        (384, 384, 3, 1, 2, 13, 13, False),
        (384, 256, 3, 1, 2, 13, 13, True),
    ]
    rows = []
    for c, k, kernel, stride, groups, size, out, pooled in convs:
        row = conv(c, k, kernel, stride, size, groups, n=batch, bias=1)
        row["out_h"] = row["out_w"] = out
        rows += [row, _elementwise(OpKind.ELEMENTWISE, k, out, batch, fused=1)]
        if pooled:
            sides = {"in_h": out, "in_w": out, "out_h": out // 2, "out_w": out // 2, "kernel_h": 3, "kernel_w": 3}
            rows.append(make_row(OpKind.POOL, n=batch, c=k, k=k, stride_h=2, stride_w=2, **sides))
    for inputs, outputs in ((9216, 4096), (4096, 4096), (4096, 1000)):
        rows.append(make_row(OpKind.LINEAR, n=batch, c=inputs, k=outputs, bias=1))
    return _work(rows)


def cases_of(data: Path, target: str) -> list[Case]:
    """What the figures of a target are fitted to."""
    if target == "v100":
        return v100_cases(data)
    if target == "titan-xp":
        return titan_cases(data)
    if target == "jetson-tx2":
        return [case for case in (*jetson_cases(data), *ofa_cases("tx2")) if case.name not in HOST_BOUND]
    return law_cases(data, "v100_b64_ofa" if target.startswith("v100") else "gtx1080ti_b64_ofa")


def power(data: Path, cases: Iterable[Case]) -> tuple[float, dict[str, float]]:
    """Watts of least squared relative error over the networks of the Jetson TX2, and those measured."""
    measured_w = {name: values[0] for name, values in measured(data, "TX2", "power").items()}
    watts = {case.name: measured_w[case.name] for case in cases if case.name in measured_w}
    inverse = 1.0 / np.array([*watts.values()])
    return float(np.sum(inverse) / np.sum(inverse**2)), watts


def main() -> None:
    data = Path(sys.argv[1])
    for target, free in FREE.items():
        values = figures_of(target)
        cases = cases_of(data, target)
        fitted = fit(values, free, cases)
        errors = predict({**values, **fitted}, cases) / [case.seconds for case in cases] - 1.0
        print(f"{target}: " + ", ".join(f"{key} = {value:.4g}" for key, value in fitted.items()))
        print("  " + ", ".join(f"{case.name} {error:+.1%}" for case, error in zip(cases, errors, strict=True)))
    print(f"jetson-tx2: power = {power(data, cases_of(data, 'jetson-tx2'))[0]:.3g} W")


if __name__ == "__main__":
    main()
