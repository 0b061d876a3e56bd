"""BitFusion against the operators published with APQ, and against Eyeriss on eight networks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from fits.bitfusion import Operators, fit, operators

from accuracy import Line
from accuracy._bitfusion_networks import NETWORKS, network
from accuracy._costs import costs, model, points, spread
from fxopt.targets.rows import Floats, OpKind

__all__ = ["lines"]

# The Eyeriss that BitFusion was compared with is a simulated one at BitFusion's clock: 16 bits, no stalls. Assumed:
# 16 x 16 elements, and 16 words from memory a cycle. The published time of the RNN is just its weights at that rate, or
# 256 MACs a cycle; CIFAR10 runs at 224, more than the chip's 168 elements could do.
SIMULATED_EYERISS = {
    "rows": 16.0,
    "columns": 16.0,
    "clock": 500e6,
    "bandwidth": 16e9,
    "efficiency": 1.0,
    "filters": 4.0,
}


def lines(data: Path) -> list[Line]:
    """The comparisons that the folder ``data`` has figures for."""
    sample, totals = data / "bitfusion_operators_sample.csv", data / "validation.csv"
    found = _operators(operators(sample)) if sample.is_file() else []
    return found + (_networks(totals) if totals.is_file() else [])


def _operators(published: Operators) -> list[Line]:
    latency, energy = costs(model("bitfusion"), published.rows)
    slow, costly = latency / published.latency_s - 1.0, energy / published.energy_j - 1.0
    depthwise = published.rows["kind"] == OpKind.DEPTHWISE
    result = []
    for kind, chosen in (("pointwise", ~depthwise), ("depthwise", depthwise)):
        count, bar = int(chosen.sum()), {"mean": 0.05}
        what = f"APQ's {kind} operators (layout in buffers read off them)"
        result.append(Line("bitfusion", f"{what}, latency", count, "fitted", {**spread(slow[chosen])}, bar))
        what = f"APQ's {kind} operators (static power)"
        figure = {**spread(costly[chosen])}
        result.append(Line("bitfusion", f"{what}, energy", count, "fitted", figure, {"mean": 0.1}))
        power = fit(Operators(*(column[~chosen] for column in published)))
        _, left_out = costs(model("bitfusion", static_power=power), published.rows[chosen])
        figure = {**spread(left_out / published.energy_j[chosen] - 1.0)}
        what = f"APQ's {kind} operators, static power by the other kind"
        result.append(Line("bitfusion", f"{what}, energy", count, "left out", figure, {"mean": 0.1}))
    return result


def _published(table: list[dict[str, str]], device: str) -> Floats:
    totals = {
        point["model"]: float(point["value"]) * 1e-3
        for point in table
        if point["device"].startswith(device) and point["metric"] == "latency_batch16"
    }
    return np.array([totals[name] for name in NETWORKS])


def _networks(path: Path) -> list[Line]:
    table = points(path)
    fast, slow = _published(table, "BitFusion-e 16x32"), _published(table, "Eyeriss (sim)")
    ours, theirs = model("bitfusion"), model("eyeriss", **SIMULATED_EYERISS)
    bitfusion = np.array([costs(ours, network(name, plain=False))[0].sum() for name in NETWORKS])
    eyeriss = np.array([costs(theirs, network(name, plain=True))[0].sum() for name in NETWORKS])
    speedup, published = eyeriss / bitfusion, slow / fast
    mean = float(np.exp(np.log(speedup).mean()))
    ranks = [np.argsort(np.argsort(values)) for values in (speedup, published)]
    figure = {
        "geomean": abs(mean / float(np.exp(np.log(published).mean())) - 1.0),
        "speedup": mean,
        "order": float(np.corrcoef(ranks[0], ranks[1])[0, 1]),
        **{name: float(one) for name, one in zip(NETWORKS, speedup, strict=True)},
    }
    bar = {"geomean": 0.15, "order": 1.0 - 1e-9}
    unseen = "unseen"
    return [
        Line("bitfusion", "eight networks at batch 16, simulated", 8, unseen, {**spread(bitfusion / fast - 1.0)}, {}),
        Line("eyeriss", "eight networks at batch 16, simulated", 8, "fitted", {**spread(eyeriss / slow - 1.0)}, {}),
        Line("bitfusion", "speedup over a simulated Eyeriss (its elements assumed)", 8, "fitted", figure, bar),
    ]
