"""Fit the figures of the phone NPUs to published times of whole networks, and print them as TOML.

The networks, their features and their times lie in ``phones_npu_calibration.csv`` (``--data``, or the environment
variable FXOPT_SHARED_DATA); times of the runtime qnn_dlc that are marked usable count. The form is that of
``fxopt/targets/models/npu.pyx``; every fit is non-negative least squares on relative errors.

1. Shapes: what the operators cost in float and in w8a8, in proportion to each other. The devices (but for the Galaxy
   S22, whose processor is a generation older) share one table of times up to a factor, so one shape is fitted to the
   geometric mean over them; float and w8a8 share the time of a run.
2. Devices: a time of a run, a factor of the float shape, one of the w8a8 shape, and for w8a16 a factor of the float
   shape and a time for each operator. Five figures a device.

Three ratios are set, not fitted: in float a MAC of a depthwise convolution takes three times as long as a padded dense
one, and dilated convolutions take three times as long as others (found over all 78 networks that are published, of
which two families have dilated ones); and so does a MAC of a grouped convolution in both precisions (chosen on the 40
networks here, where anything from 2 to 4 does as well).

The form of w8a16 (out of some twenty) and what the devices share were chosen on the networks here too: leaving
networks out of the fit flatters both somewhat.
"""

from __future__ import annotations

import argparse
import csv
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

__all__ = ["DEVICES", "PRECISIONS", "Network", "Timings", "fit", "left_out", "predict", "read", "to_si"]

Values: TypeAlias = dict[str, float]
Vector: TypeAlias = NDArray[np.float64]

FILE = "phones_npu_calibration.csv"
DEVICES: Mapping[str, str] = {
    "galaxy-s22": "Samsung Galaxy S22 5G",
    "galaxy-s24": "Samsung Galaxy S24",
    "galaxy-s25": "Samsung Galaxy S25",
    "galaxy-s26": "Samsung Galaxy S26",
    "snapdragon-8550": "QCS8550 (Proxy)",
    "snapdragon-x-elite": "Snapdragon X Elite CRD",
    "snapdragon-x2": "Snapdragon X2 Elite CRD",
}
PRECISIONS = ("float", "w8a16", "w8a8")
TOGETHER = (tuple(device for device in DEVICES if device != "galaxy-s22"), ("galaxy-s22",))
DEPTHWISE, GROUPED, DILATED = 3.0, 3.0, 3.0

# Columns of the shapes, in the order of ``Network.float_shape`` and ``Network.w8a8_shape``.
FLOAT_TERMS = ("dense", "volume", "element", "moved", "stem", "resize", "weight", "matmul")
W8A8_TERMS = ("dense", "depthwise", "arithmetic", "moved", "matmul", "operator")


@dataclass(frozen=True)
class Network:
    """A published network.

    Attributes:
        name: Its name.
        family: Networks of one family are variants of each other.
        float_shape: What :data:`FLOAT_TERMS` count: MACs, elements and weights in millions. Depthwise and 3-D
            convolutions stand under "dense" too, so that what is fitted to "volume" is what they cost more.
        w8a8_shape: What :data:`W8A8_TERMS` count, likewise.
        operators: Number of operators.
    """

    name: str
    family: str
    float_shape: Vector
    w8a8_shape: Vector
    operators: float

    @staticmethod
    def of(row: Mapping[str, str]) -> Network:
        """The network of a line of the table."""

        def millions(*names: str) -> float:
            return sum(float(row[name]) for name in names) * 1e-6

        padded = millions("pad_macs_dense") + (DILATED - 1.0) * millions("pad_macs_dilated")
        volume = padded if millions("macs_conv3d") else 0.0
        depthwise, moved = millions("macs_depthwise"), millions("elems_transpose", "elems_slice")
        dense = padded + GROUPED * millions("macs_grouped")
        elements, matmuls, operators = millions("elems_nocopy"), float(row["n_matmul"]), float(row["ops"])
        stem, resize, weights = millions("elems_stem"), millions("elems_resize"), millions("weight_elems")
        return Network(
            row["model"],
            row["family"],
            np.array([dense + DEPTHWISE * depthwise, volume, elements, moved, stem, resize, weights, matmuls]),
            np.array([dense + depthwise, depthwise, millions("elems_eltwise"), moved, matmuls, operators]),
            operators,
        )


@dataclass(frozen=True)
class Timings:
    """Published times.

    Attributes:
        networks: Every network, by name.
        ms: Milliseconds by precision, target and network.
    """

    networks: Mapping[str, Network]
    ms: Mapping[str, Mapping[str, Mapping[str, float]]]

    def without(self, leave: Callable[[Network], bool]) -> Timings:
        """The same without some networks."""
        kept = {name: network for name, network in self.networks.items() if not leave(network)}
        return Timings(
            kept,
            {
                precision: {
                    device: {name: time for name, time in times.items() if name in kept}
                    for device, times in by_device.items()
                }
                for precision, by_device in self.ms.items()
            },
        )


def read(data: Path) -> Timings:
    """The networks and times in the folder ``data``."""
    networks: dict[str, Network] = {}
    targets = {device: target for target, device in DEVICES.items()}
    ms: dict[str, dict[str, dict[str, float]]] = {
        precision: {target: {} for target in DEVICES} for precision in PRECISIONS
    }
    with (data / FILE).open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["device"] in targets and row["runtime"] == "qnn_dlc" and row["usable"] == "1":
                networks.setdefault(row["model"], Network.of(row))
                ms[row["precision"]][targets[row["device"]]][row["model"]] = float(row["latency_ms"])
    return Timings(networks, ms)


def relative(columns: Sequence[Vector], times: Sequence[float]) -> Vector:
    """Non-negative coefficients that make the least squared relative error."""
    scaled = np.array(columns) / np.array(times)[:, None]
    found: Vector = nnls(scaled, np.ones(len(times)))[0]
    return found


def common(timings: Timings, precision: str, devices: Sequence[str]) -> dict[str, float]:
    """The geometric mean over the devices of the time of every network that all of them run."""
    tables = [timings.ms[precision][device] for device in devices]
    shared = [name for name in tables[0] if all(name in table for table in tables)]
    return {name: float(np.exp(np.mean([np.log(table[name]) for table in tables]))) for name in shared}


def fit_shapes(timings: Timings, devices: Sequence[str]) -> tuple[Vector, Vector]:
    """Costs of the operators in float and in w8a8, for the mean of the devices."""
    none_float, none_w8a8 = np.zeros(len(FLOAT_TERMS)), np.zeros(len(W8A8_TERMS))
    columns, times = [], []
    for name, time in common(timings, "float", devices).items():
        columns.append(np.concatenate(([1.0], timings.networks[name].float_shape, none_w8a8)))
        times.append(time)
    for name, time in common(timings, "w8a8", devices).items():
        columns.append(np.concatenate(([1.0], none_float, timings.networks[name].w8a8_shape)))
        times.append(time)
    found = relative(columns, times)
    return found[1 : 1 + len(FLOAT_TERMS)], found[1 + len(FLOAT_TERMS) :]


def fit_device(timings: Timings, device: str, float_shape: Vector, w8a8_shape: Vector) -> Values:
    """The figures of a device in ms, ms per million, or ratios, by their names in a preset."""
    columns, times = [], []
    for precision in PRECISIONS:
        for name, time in timings.ms[precision][device].items():
            network = timings.networks[name]
            in_float, in_w8a8 = network.float_shape @ float_shape, network.w8a8_shape @ w8a8_shape
            columns.append(
                {
                    "float": np.array([1.0, in_float, 0.0, 0.0, 0.0]),
                    "w8a16": np.array([1.0, 0.0, in_float, network.operators, 0.0]),
                    "w8a8": np.array([1.0, 0.0, 0.0, 0.0, in_w8a8]),
                }[precision]
            )
            times.append(time)
    run, factor, factor_w8a16, operator_w8a16, factor_w8a8 = relative(columns, times)
    in_float = dict(zip(FLOAT_TERMS, factor * float_shape, strict=True))
    in_w8a8 = dict(zip(W8A8_TERMS, factor_w8a8 * w8a8_shape, strict=True))
    in_float["volume"] += in_float["dense"]
    in_w8a8["depthwise"] += in_w8a8["dense"]
    return {
        **{"run": float(run), "grouped": GROUPED, "dilated": DILATED},
        **{f"float.{term}": float(value) for term, value in in_float.items()},
        "float.depthwise": float(DEPTHWISE * in_float["dense"]),
        "w8a16.of_float": float(factor_w8a16 / factor),
        "w8a16.operator": float(operator_w8a16),
        **{f"w8a8.{term}": float(value) for term, value in in_w8a8.items()},
    }


def fit(timings: Timings) -> dict[str, Values]:
    """The figures of every device."""
    found = {}
    for devices in TOGETHER:
        shapes = fit_shapes(timings, devices)
        found |= {device: fit_device(timings, device, *shapes) for device in devices}
    return {device: found[device] for device in DEVICES}


def predict(values: Values, network: Network, precision: str) -> float:
    """Milliseconds of a network."""
    if precision == "w8a8":
        own = np.array([values[f"w8a8.{term}"] for term in W8A8_TERMS])
        own[1] -= own[0]
        return float(values["run"] + network.w8a8_shape @ own)
    own = np.array([values[f"float.{term}"] for term in FLOAT_TERMS])
    own[1] -= own[0]
    if precision == "float":
        return float(values["run"] + network.float_shape @ own)
    share, operator = values["w8a16.of_float"], values["w8a16.operator"]
    return float(values["run"] + share * (network.float_shape @ own) + operator * network.operators)


def left_out(timings: Timings, group: Callable[[Network], str]) -> dict[tuple[str, str], tuple[Vector, Vector]]:
    """(predicted, measured) by target and precision, each group of networks by a fit without it."""
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for left in dict.fromkeys(map(group, timings.networks.values())):
        figures = fit(timings.without(lambda network, left=left: group(network) == left))  # type: ignore[misc]
        gone = [network for network in timings.networks.values() if group(network) == left]
        for precision in PRECISIONS:
            for device, times in timings.ms[precision].items():
                found.setdefault((device, precision), []).extend(
                    (predict(figures[device], network, precision), times[network.name])
                    for network in gone
                    if network.name in times
                )
    return {key: (np.array(pairs)[:, 0], np.array(pairs)[:, 1]) for key, pairs in found.items()}


def to_si(values: Values) -> Values:
    """The figures in seconds, as the compiled model takes them."""
    ratios = ("grouped", "dilated", "of_float")
    times = ("run", "matmul", "operator")
    factors = {**dict.fromkeys(ratios, 1.0), **dict.fromkeys(times, 1e-3)}
    return {key: value * factors.get(key.rpartition(".")[2], 1e-9) for key, value in values.items()}


def as_toml(key: str, value: float) -> str:
    """A figure of a preset, at four digits."""
    term = key.rpartition(".")[2]
    if term in ("grouped", "dilated", "of_float"):
        return f'{key} = {{ value = {value:.4g}, unit = "1" }}'
    if term in ("run", "matmul", "operator"):
        return f'{key} = {{ value = {value * 1e3:.4g}, unit = "us" }}'
    return f'{key} = {{ value = {value * 1e3:.4g}, unit = "us/M" }}'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("FXOPT_SHARED_DATA"), help="folder of the figures")
    options = parser.parse_args()
    if options.data is None or not (options.data / FILE).is_file():
        parser.error(f"{FILE} is missing; give its folder as --data or set FXOPT_SHARED_DATA")
    for device, values in fit(read(options.data)).items():
        print(f"\n# {device}")
        for key, value in values.items():
            print(as_toml(key, value))


if __name__ == "__main__":
    main()
