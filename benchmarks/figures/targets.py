"""How far targets are from measurements, published and of this machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from figures.bar import Bar, Document, Found, Wanted, at_least, at_most, between, has_to, listed, some

Lines = Sequence[Mapping[str, Any]]
"""Comparisons, as ``accuracy.Line`` has them."""

CORRELATIONS = ("spearman", "pearson", "order")
NPUS = "galaxy-s22 galaxy-s24 galaxy-s25 galaxy-s26 snapdragon-8550 snapdragon-x-elite snapdragon-x2"
NPUS_OF_W8A16 = "galaxy-s24 galaxy-s25 galaxy-s26"
NPU_MEAN = "at most 20% (S26 22%) in the mean"
W8A16 = "w8a16, without the network"
MCUS = "stm32h743-x-cube-ai stm32h743-tflm"
MADE_FOR = "v100 xeon-e5-2640v4 pixel1"
TABLE = "HAQ's table of 53 layers and 64 pairs of bits"


def _lines(document: Document, against: str, targets: Sequence[str], evidence: str = "") -> Lines:
    """The comparisons with something, of some targets, with one kind of evidence if one is named."""
    found = [
        one
        for one in document["results"]["lines"]
        if against in one["against"] and one["target"] in targets and evidence in ("", one["evidence"])
    ]
    return some(found, f"{against}, {', '.join(targets)}")


def _beyond(lines: Lines, key: str) -> float:
    """By how much the worst line is beyond its own bar; at most zero if all are within."""
    beyond = [one["figure"][key] - one["bar"][key] for one in lines]
    return max(-gap for gap in beyond) if key in CORRELATIONS else max(beyond)


def _errors(key: str, digits: int, lines: Lines) -> Found:
    """Relative errors of some lines against their bars, in per cent."""
    values = [100 * one["figure"][key] for one in lines]
    text = f"{between(values, digits)}%"
    if len({one["target"] for one in lines}) > 1:
        text += f", most for `{max(lines, key=lambda one: one['figure'][key])['target']}`"
    return Found(_beyond(lines, key), text)


def _ranks(lines: Lines) -> Found:
    values = [one["figure"]["spearman"] for one in lines]
    text = between(values, 4 if min(values) > 0.999 else 3)
    if len({one["target"] for one in lines}) > 1:
        text += f", least for `{min(lines, key=lambda one: one['figure']['spearman'])['target']}`"
    return Found(_beyond(lines, "spearman"), text)


def _kept(lines: Lines) -> Found:
    """Whether an order is kept in all lines."""
    kept = sum(one["figure"]["order"] >= one["bar"]["order"] for one in lines)
    margins = [100 * one["figure"]["margin"] for one in lines]
    return Found(kept == len(lines), f"{kept} of {len(lines)}, by at least {between(margins, 1)}%")


def _speedup(lines: Lines) -> Found:
    (line,) = lines
    figure = line["figure"]
    kept = figure["order"] >= line["bar"]["order"]
    text = f"{100 * figure['geomean']:.1f}% off, {figure['speedup']:.2f} times, order {'kept' if kept else 'not kept'}"
    return Found(max(_beyond(lines, "geomean"), _beyond(lines, "order")), text)


def _line(
    what: str,
    wanted: str,
    tell: Callable[[Lines], Found],
    against: str,
    targets: str,
    evidence: str = "",
) -> Bar:
    """A row about comparisons, held to the bars that these have themselves."""
    asked = has_to(wanted) if tell is _kept else Wanted(wanted, lambda beyond: beyond <= 0)
    return Bar(
        "target_accuracy", what, asked, lambda document: tell(_lines(document, against, targets.split(), evidence))
    )


def _host(about: str, width: str) -> Bar:
    def of(document: Document) -> Found:
        found = document["results"]["summary"][about][width]
        mean, worst = 100 * found["mean_error"], 100 * found["worst_error"]
        return Found(mean, f"mean {mean:.1f}%, worst {worst:.0f}%, {found['networks']} networks")

    limit = {"float": 12, "int8": 20}[width]
    name = "the measured host" if about == "host" else "a board's file"
    bits = "floats" if width == "float" else "8 bits"
    return Bar("host_accuracy", f"{name}, networks in {bits}", at_most(limit, "%", " in the mean"), of)


def _host_ranks(document: Document) -> Found:
    summary = document["results"]["summary"]
    ranks = {f"{about}, {width}": found["spearman"] for about, both in summary.items() for width, found in both.items()}
    if None in ranks.values():
        raise LookupError("rank correlation of three networks or more")
    return Found(min(ranks.values()), listed(ranks, 3))


_mean, _max = (partial(_errors, key, 1) for key in ("mean", "max"))
_fine = partial(_errors, "mean", 2)

# What it is about, what is wanted, how it is told, a part of what it is against, targets, evidence.
LINES = (
    (f"`vu9p-table`, {TABLE}", "at most 3% in the mean", _fine, "64 bit pairs", "vu9p-table"),
    ("the same, random mixed policies", "at most 1.5% in the mean", _fine, "random mixed", "vu9p-table"),
    ("the same, their rank correlation", "at least 0.999", _ranks, "random mixed", "vu9p-table"),
    ("`zynq7020`, `vu9p`, published latencies", "at most 1% each", _max, "(HAQ)", "zynq7020 vu9p"),
    ("`bitfusion`, published operators, latency", "at most 5% in the mean", _fine, ", latency", "bitfusion"),
    ("`bitfusion`, the same, energy", "at most 10% in the mean", _mean, ", energy", "bitfusion"),
    ("`bitfusion` over `eyeriss`, eight networks", "at most 15%, order kept", _speedup, "speedup", "bitfusion"),
    ("`pixel1`, MobileNetV1, each variant left out", "at most 4% each", _max, "by variant", "pixel1"),
    ("`pixel1`, other networks", "at most 8% in the mean", _mean, "other networks, 2018", "pixel1"),
    ("`v100`, networks at batch 8", "at most 10% each", _max, "at batch 8", "v100", "fitted"),
    ("`v100`, the same, each left out", "at most 10% each", _max, "at batch 8", "v100", "left out"),
    (
        "`titan-xp`, batch 50, each network left out",
        "at most 10% each",
        _max,
        "at batch 50",
        "titan-xp",
        "left out",
    ),
    ("`note10`, published blocks", "at most 5%", _max, "blocks", "note10"),
    ("NPUs of phones, float, each network left out", NPU_MEAN, _mean, "float, without the network", NPUS),
    ("the same, rank correlation", "at least 0.97", _ranks, "float, without the network", NPUS),
    ("NPUs of phones, w8a16, each network left out", "at most 20% in the mean", _mean, W8A16, NPUS_OF_W8A16),
    ("NPUs of phones, w8a8, rank correlation", "at least 0.93", _ranks, "w8a8, without the network", NPUS),
    ("NPUs of phones from graphs, float", NPU_MEAN, _mean, "float, end to end", NPUS),
    ("the same, rank correlation from graphs", "at least 0.97", _ranks, "float, end to end", NPUS),
    ("microcontrollers, each network left out", "at most 13% each", _max, "times of networks", MCUS, "left out"),
    ("microcontrollers, smallest and largest network", "at most 13% each", _max, "smallest and largest", MCUS),
    ("networks are cheapest where they were made for", "3 of 3", _kept, "is its cheapest of three", MADE_FOR),
    ("bits made for HW1 to HW3 are fastest at home", "all", _kept, "made for it", "bitfusion zynq7020 vu9p"),
)

BARS = (
    *(_line(*line) for line in LINES),
    *(_host(about, width) for about in ("host", "board") for width in ("float", "int8")),
    Bar("host_accuracy", "host and board, rank correlation", at_least(0.95), _host_ranks),
)
