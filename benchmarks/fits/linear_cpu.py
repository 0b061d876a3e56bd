"""Fit the coefficients of the presets of the family ``linear_cpu``, and print them as the presets write them.

Non-negative least squares on relative errors, of operators where profiles are published and of totals elsewhere.
Usage: ``python fits/linear_cpu.py DATA`` from the folder of the benchmarks.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from fits.networks import blocks_of, measured, operator, rescaled, tables, workload
from fxopt.targets.models import family
from fxopt.targets.models.linear_cpu import GROUP_NAMES
from fxopt.targets.rows import (
    Activation,
    Floats,
    OpKind,
    Rows,
    Workload,
    compute_bits,
    in_elements,
    macs,
    out_elements,
    weights,
)

__all__ = ["FORMS", "IN_FLOAT", "Form", "Points", "int8_points", "left_out", "pixel1_points", "predict", "xeon_points"]

Term = tuple[str, ...]

IN_FLOAT = "float_mnasnet_224_50"


@dataclass(frozen=True)
class Points:
    """Measured times of groups of rows: of single operators, or of whole networks.

    Attributes:
        rows: All rows, shape (rows,).
        point: The index of the measurement that each row is part of.
        names: A name for each measurement.
        seconds: Its time.
        groups: What is left out together: the network that an operator is part of, or the measurement itself.
    """

    rows: Rows
    point: NDArray[np.intp]
    names: tuple[str, ...]
    seconds: Floats
    groups: tuple[str, ...]

    def without(self, group: str) -> Points:
        """The measurements of all other groups."""
        kept = [index for index, name in enumerate(self.groups) if name != group]
        mask = np.isin(self.point, kept)
        return Points(
            self.rows[mask],
            np.searchsorted(kept, self.point[mask]),
            tuple(self.names[i] for i in kept),
            self.seconds[kept],
            tuple(self.groups[i] for i in kept),
        )


@dataclass(frozen=True)
class Form:
    """What is fitted: coefficients ``bits.group.name``, beside figures that are given.

    Attributes:
        terms: Coefficients that are one unknown each: equal, or in the given ratios.
        given: Figures that are not fitted.
        ratios: What a coefficient is to its term, where it is not 1.
    """

    terms: tuple[Term, ...]
    given: Mapping[str, float] = field(default_factory=dict)
    ratios: Mapping[str, float] = field(default_factory=dict)

    def fit(self, points: Points) -> dict[str, float]:
        """All figures, in SI units."""
        columns = np.stack([self._total(points, dict(self._parts(term))) for term in self.terms], axis=1)
        known = self._total(points, self.given)
        relative = columns / points.seconds[:, None]
        scale = np.maximum(relative.max(axis=0), np.finfo(float).tiny)
        solution, _ = nnls(relative / scale, 1.0 - known / points.seconds)
        found = dict(self.given)
        for term, value in zip(self.terms, solution / scale, strict=True):
            found |= {key: float(value) * ratio for key, ratio in self._parts(term)}
        return found

    def _parts(self, term: Term) -> list[tuple[str, float]]:
        return [(key, self.ratios.get(key, 1.0)) for key in term]

    def _total(self, points: Points, values: Mapping[str, float]) -> Floats:
        """Seconds that these coefficients give each measurement."""
        rows = points.rows
        groups = groups_of(rows)
        classes = np.where(compute_bits(rows) <= 8, "int8", "float")
        read = in_elements(rows)
        quantities = {
            "mac": _padded_macs(rows, groups, self.given.get("channel_tile", 1.0)),
            "weight": weights(rows),
            "in": read,
            "out": out_elements(rows),
            "spill": np.maximum(0.0, 4.0 * read - self.given.get("spill_threshold", np.inf)) / 4.0,
            "channel": rows["k"],
            "const": np.ones(len(rows)),
        }
        seconds = np.zeros(len(rows))
        for key, value in values.items():
            parts = key.split(".")
            if len(parts) == 3:
                of_key = (classes == parts[0]) & (groups == parts[1]) & (rows["fused"] == 0)
                seconds += value * quantities[parts[2]] * of_key
        total: Floats = np.bincount(points.point, weights=seconds, minlength=len(points.names))
        return total


def predict(values: Mapping[str, float], points: Points) -> Floats:
    """Seconds that the compiled model gives each measurement."""
    model = family("linear_cpu").Model(values, True)
    latency_s = np.empty((1, len(points.rows)))
    model.per_row(points.rows[None], latency_s, np.empty_like(latency_s), np.empty_like(latency_s))
    total: Floats = np.bincount(points.point, weights=latency_s[0], minlength=len(points.names))
    return total


def left_out(form: Form, points: Points, always: Sequence[str] = ()) -> dict[str, float]:
    """Relative error of the total time of each group, but for those fitted ``always``, when the fit does not see it."""
    found = {}
    for group in dict.fromkeys(name for name in points.groups if name not in always):
        predicted = predict(form.fit(points.without(group)), points)
        members = np.array([name == group for name in points.groups])
        found[group] = float(predicted[members].sum() / points.seconds[members].sum() - 1.0)
    return found


def groups_of(rows: Rows) -> NDArray[np.str_]:
    """The group of coefficients of each row, as the model has them; "" for kinds that have none."""
    kinds = rows["kind"]
    pointwise, *others, curve = GROUP_NAMES
    names = np.array([*others, ""])[kinds]
    single = (rows["groups"] == 1) & (rows["kernel_d"] * rows["kernel_h"] * rows["kernel_w"] == 1)
    curved = (kinds == OpKind.ELEMENTWISE) & (rows["activation"] == Activation.CURVE)
    found: NDArray[np.str_] = np.where((kinds == OpKind.CONV) & single, pointwise, np.where(curved, curve, names))
    return found


def _padded_macs(rows: Rows, groups: NDArray[np.str_], tile: float) -> Floats:
    pads_both = groups == "pointwise"
    pads_one = rows["kind"] == OpKind.DEPTHWISE
    ratio_k = np.ceil(rows["k"] / tile) * tile / rows["k"]
    ratio_c = np.ceil(rows["c"] / tile) * tile / rows["c"]
    padded: Floats = macs(rows) * np.where(pads_both | pads_one, ratio_k, 1.0) * np.where(pads_both, ratio_c, 1.0)
    return padded


def _join(names: Sequence[str], parts: Sequence[Workload], seconds: Sequence[float]) -> Points:
    rows = np.concatenate([part.rows[0] for part in parts])
    point = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    return Points(rows, point, tuple(names), np.asarray(seconds), tuple(names))


def pixel1_points(data: Path) -> Points:
    """The operators of the TensorFlow Lite profiles, grouped by the variant of MobileNetV1 that they are part of."""
    with (data / "pixel1_mobilenetv1_per_op.csv").open(encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    rows = []
    for entry in table:
        c, k, kernel, stride, size = (int(entry[name]) for name in ("C", "K", "R", "stride", "P"))
        layer = {"op": "fc" if entry["type"] == "fc" else "conv", "C": c, "K": k, "R": kernel, "S": kernel}
        layer |= {"stride": stride, "groups": c if entry["type"] == "dw" else 1, "H": size * stride}
        rows.append(operator({**layer, "P": size, "Q": size}))
    models = tuple(entry["model"] for entry in table)
    names = tuple(f"{entry['model']} {entry['op']}" for entry in table)
    seconds = np.array([float(entry["lat_ms"]) for entry in table]) * 1e-3
    return Points(np.concatenate(rows), np.arange(len(rows)), names, seconds, models)


def int8_points(data: Path) -> Points:
    """Totals of quantized MobileNetV2, named by resolution and width in percent, and of one network in float."""
    networks = tables(data)
    blocks = blocks_of(networks["mobilenet_v2"])
    totals = measured(data, "phone CPU (device not stated on slide)")
    names = sorted(name for name in totals if name.startswith("quant_mobilenetv2_"))
    sizes = [tuple(int(part) for part in name.split("_")[2:]) for name in names]
    parts = [rescaled(blocks, width / 100.0, size, classes=1001) for size, width in sizes]
    parts.append(rescaled(blocks_of(networks["mnasnet_b1"]), 0.5, 224, bits=32, classes=1001))
    names.append(IN_FLOAT)
    return _join(names, parts, [totals[name][0] * 1e-3 for name in names])


def xeon_points(data: Path) -> Points:
    """Totals of the three ProxylessNAS networks."""
    networks = tables(data)
    totals = measured(data, "XeonE5-2640v4")
    known = {"ProxylessNAS-GPU": "proxyless_gpu", "ProxylessNAS-CPU": "proxyless_cpu"}
    known |= {"ProxylessNAS-Mobile": "proxyless_mobile"}
    parts = [workload(networks[table]) for table in known.values()]
    return _join(tuple(known), parts, [totals[name][0] * 1e-3 for name in known])


_WITH_MACS = ("pointwise", "dense", "linear", "matmul")
_OTHERS = ("elementwise", "pool", "norm", "softmax", "copy", "resize")

# Time of an element read or written at 68 GB/s, and of a MAC at 10 cores of 2.4 GHz and 16 MACs a cycle.
_NOMINAL_ITEM_S = 4.0 / 68e9
_NOMINAL_MAC_S = 1.0 / 384e9

# What a group and a weight cost, in MACs, where depthwise convolutions are computed group by group, as PyTorch did on
# CPUs in 2018: measured by calibrate_groups.py.
_GROUP_MACS = 10_500.0
_WEIGHT_MACS = 137.0

FORMS: Mapping[str, Form] = {
    "pixel1": Form(
        terms=(
            ("float.pointwise.mac",),
            ("float.pointwise.weight",),
            ("float.dense.mac",),
            ("float.dense.const",),
            ("float.depthwise.mac",),
            ("float.depthwise.in",),
            ("float.depthwise.spill",),
            ("float.linear.weight",),
        ),
        given={"channel_tile": 16.0, "spill_threshold": 2.0**20},
    ),
    "phone-int8": Form(
        terms=(
            ("int8.pointwise.mac", "int8.dense.mac", "int8.linear.mac"),
            tuple(
                f"{bits}.{key}"
                for bits in ("int8", "float")
                for key in ("pointwise.out", "dense.out", "depthwise.out", "elementwise.out", "pool.in")
            ),
            ("float.pointwise.mac", "float.dense.mac", "float.depthwise.mac", "float.linear.mac"),
        )
    ),
    "xeon-e5-2640v4": Form(
        terms=(("float.depthwise.mac", "float.depthwise.channel", "float.depthwise.weight"),),
        ratios={"float.depthwise.channel": _GROUP_MACS, "float.depthwise.weight": _WEIGHT_MACS},
        given={f"float.{group}.mac": _NOMINAL_MAC_S for group in _WITH_MACS}
        | {f"float.{group}.{side}": _NOMINAL_ITEM_S for group in (*_WITH_MACS, *_OTHERS) for side in ("in", "out")}
        | {"float.linear.weight": _NOMINAL_ITEM_S},
    ),
}
"""The forms that were chosen, by preset."""

POINTS = {"pixel1": pixel1_points, "phone-int8": int8_points, "xeon-e5-2640v4": xeon_points}


def main() -> None:
    data = Path(sys.argv[1])
    for name, form in FORMS.items():
        points = POINTS[name](data)
        print(f"{name}: {len(points.names)} measurements")
        for key, value in form.fit(points).items():
            if key not in form.given:
                print(f"  {key} = {value * (1e3 if key.endswith('.const') else 1e9):.4g}")


if __name__ == "__main__":
    main()
