"""Bits of weights and activations, and what integers gain."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from figures.bar import (
    REPORTED,
    Bar,
    Document,
    Found,
    Wanted,
    at_least,
    at_most,
    between,
    counted,
    has_to,
    listed,
    some,
    spread,
)

PEERS = ("mobilenetv2_w1", "resnet18", "resnet50", "efficientnet_b0")


def _speedups(document: Document) -> Found:
    """Ours over onnxruntime's own, for the network where it is least."""
    found = {name: document["results"][name] for name in PEERS}
    pairs = {name: (one["fastest"], one["onnxruntime"]) for name, one in found.items()}
    each = [
        "{} {:.2f} ({:.2f} to {:.2f}; {:.2f})".format(
            name, mine["speedup"], *mine["speedup_quartiles"], theirs["speedup"]
        )
        for name, (mine, theirs) in pairs.items()
    ]
    return Found(min(mine["speedup"] / theirs["speedup"] for mine, theirs in pairs.values()), ", ".join(each))


def _efficientnet(document: Document) -> Found:
    found = document["results"]["efficientnet_b0"]["fastest"]
    low, high = found["speedup_quartiles"]
    return Found(found["speedup"], f"{found['speedup']:.2f} ({low:.2f} to {high:.2f})")


def _smaller(document: Document) -> Found:
    shrunk = some((one["shrink"] for one in document["results"].values()), "networks")
    return Found(min(shrunk), f"{between(shrunk)} times, {len(shrunk)} networks")


def _resnet50_steps(document: Document) -> Found:
    found = document["results"]["resnet50"]
    steps = {name: found[f"{name}_s"] for name in ("trace", "fold", "quantize")}
    return Found(
        sum(steps.values()), f"{sum(steps.values()):.1f} s ({listed(steps, 1)}), with calibration on 16 images"
    )


def _attention(document: Document) -> Found:
    found = document["results"]
    ratios = {
        name: (one["layers alone"]["times_as_fast"], one["with products"]["times_as_fast"])
        for name, one in found.items()
    }
    each = [f"{name} {alone:.2f}, {products:.2f}" for name, (alone, products) in ratios.items()]
    return Found(min(some((min(pair) for pair in ratios.values()), "networks")), "; ".join(each))


def _lost(bits: str, how: str, limit: float) -> Bar:
    """Points of accuracy that bits take, with no training."""

    def of(document: Document) -> Found:
        results = document["results"]
        lost = 100 * (results["float"] - results[f"{bits} {how}"]["accuracy"])
        return Found(round(lost, 6), f"{lost:.2f} points of {100 * results['float']:.2f}%")

    name = "no data" if how == "data-free" else "weights rounded by moments"
    return Bar("quantize_accuracy", f"MobileNetV2 after training, {bits}, {name}", at_most(limit, " points"), of)


def _accuracies(document: Document, network: str, cost: str, bits: int, kind: str) -> list[float]:
    """Test accuracy of each seed, in per cent."""
    key = {"network": network, "cost": cost, "bits": bits, "kind": kind}
    lines = (one for one in document["results"]["all"] if all(one.get(name) == value for name, value in key.items()))
    return some((100 * one["accuracy"] for one in lines), f"{network}, {cost}, {bits} bits, {kind}")


def _bit_operations(bits: int, limit: float) -> Bar:
    """Mixed bits at the bit operations of the same bits everywhere."""

    def of(document: Document) -> Found:
        mixed, same = (_accuracies(document, "mobilenet_v2", "bops", bits, kind) for kind in ("mixed", "uniform"))
        text = f"{spread(mixed)}%, {counted(len(mixed), 'seed')}; the same bits {spread(same)}%"
        return Found(sum(mixed) / len(mixed), text)

    what = f"MobileNetV2, mixed bits at the bit operations of W{bits}A{bits}"
    return Bar("mixed_precision", what, at_least(limit, "%"), of)


def _ahead(benchmark: str, what: str, costs: Sequence[str], bits: Sequence[int]) -> Bar:
    """Mixed bits against the same bits everywhere, both networks."""

    def of(document: Document) -> Found:
        margins = {}
        for network in ("mobilenet_v1", "mobilenet_v2"):
            for cost in costs:
                for width in bits:
                    found = [_accuracies(document, network, cost, width, kind) for kind in ("mixed", "uniform")]
                    mixed, same = (sum(values) / len(values) for values in found)
                    margins[f"{network} at {width} bits, {cost}"] = mixed - same
        least = min(margins, key=margins.__getitem__)
        ahead = sum(margin > 0 for margin in margins.values())
        text = f"{ahead} of {len(margins)}, by {between(list(margins.values()))} points, least for {least}"
        return Found(margins[least], text)

    return Bar(benchmark, what, Wanted("ahead at every point", lambda margin: margin > 0), of)


def _qat(benchmark: str, what: str) -> Bar:
    def of(document: Document) -> Found:
        ratios = document["results"]["step"]
        return Found(max(some(ratios.values(), "steps")), listed(ratios))

    return Bar(benchmark, what, at_most(0.6), of)


def _policies(document: Document, kind: str) -> list[dict[str, Any]]:
    return some((one for one in document["results"]["all"] if one.get("kind") == kind), kind)


def _home(document: Document) -> Found:
    """Of the policies of equal loss, whether each is the fastest where it was made for."""
    made = _policies(document, "equal_loss")
    at_home, rows = 0, 0
    for one in made:
        rivals = [two for two in made if (two["network"], two["bits"]) == (one["network"], one["bits"])]
        fastest = min(rivals, key=lambda two: two["latency_us"][one["for"]])
        at_home, rows = at_home + (fastest is one), rows + 1
    return Found(at_home == rows, f"{at_home} of {rows} fastest at home")


def _worth(value: str, best: Callable[..., Any], wanted: Wanted) -> Bar:
    """Of the policies within a latency on each hardware, whether the one that was made for it is worth most."""

    def of(document: Document) -> Found:
        made = _policies(document, "equal_latency")
        at_home = [one for one in made if one["for"] == one["on"]]
        count = 0
        for one in at_home:
            key = (one["network"], one["bits"], one["on"])
            rivals = [two[value] for two in made if (two["network"], two["bits"], two["on"]) == key]
            count += one[value] == best(rivals)
        return Found(count == len(at_home), f"{count} of {len(at_home)} best at home")

    return Bar("specialization", f"policies of equal latency on HW1 to HW3, {value}", wanted, of)


def _scores(document: Document, kind: str) -> list[float]:
    """Divergence from the float network at 4 bits, of each seed."""
    return [-one["score"] for one in _at_four_bits(document, kind)]


def _at_four_bits(document: Document, kind: str) -> list[dict[str, Any]]:
    return some((one for one in _policies(document, kind) if one["bits"] == 4), f"{kind} at 4 bits")


def _transferred(document: Document) -> Found:
    mine, same, all_episodes = (_scores(document, kind) for kind in ("transferred", "uniform", "afresh, all"))
    others = f"the same bits {spread(same, 3)}, ten times the episodes {spread(all_episodes, 3)}"
    return Found(max(mine) - min(same), f"divergence {spread(mine, 3)}; {others}")


def _transferred_accuracy(document: Document) -> Found:
    found = {
        name: [100 * one["accuracy"] for one in _at_four_bits(document, kind)]
        for name, kind in (("transferred", "transferred"), ("the same bits", "uniform"), ("afresh", "afresh, all"))
    }
    gap = math.fsum(found["transferred"]) / len(found["transferred"]) - min(found["the same bits"])
    return Found(gap, ", ".join(f"{name} {spread(values)}%" for name, values in found.items()))


_AS_FAST = Wanted("at least onnxruntime's own", lambda ratio: ratio >= 1)
_BELOW_SAME = Wanted("below the same bits with each seed", lambda gap: gap < 0)
_LATENCIES = ("zynq7020:latency", "vu9p:latency")

BARS = (
    Bar("export", "8 bits over floats in onnxruntime (its own in brackets)", _AS_FAST, _speedups),
    Bar("export", "8 bits over floats, EfficientNet-B0", at_least(1.15), _efficientnet),
    Bar("export", "8-bit files, smaller than float files", REPORTED, _smaller),
    Bar("export", "ResNet-50 to 8 bits after training", at_most(10, " s"), _resnet50_steps),
    Bar("quantize_attention", "transformers in 8 bits, times as fast: layers, with products", REPORTED, _attention),
    _lost("W8A8", "rounded", 0.1),
    _lost("W4A8", "rounded", 0.15),
    _lost("W4A4", "rounded", 1.5),
    _lost("W8A8", "data-free", 0.5),
    *(_bit_operations(bits, limit) for bits, limit in ((4, 91.0), (5, 91.3), (6, 91.5))),
    _ahead("mixed_precision", "mixed against the same bits, latency on two FPGAs", _LATENCIES, (4, 5, 6)),
    _ahead("mixed_precision-tuned", "the same after half an epoch", _LATENCIES, (4,)),
    _ahead("mixed_precision", "mixed against the same bits, energy", ("bitfusion:energy",), (4, 5, 6)),
    _ahead("mixed_precision", "mixed against the same bits, size of codebooks", ("size",), (2, 3, 4)),
    _qat("qat_step", "step of training through quantizers over torch's"),
    _qat("qat_step-memory", "the same where freed memory is kept"),
    Bar("specialization", "policies of equal loss on HW1 to HW3", has_to("each fastest at home"), _home),
    _worth("loss", min, has_to("each best at home")),
    _worth("accuracy", max, has_to("each best at home")),
    Bar("transfer", "agent from MobileNetV1 on MobileNetV2, 15 episodes", _BELOW_SAME, _transferred),
    Bar("transfer", "the same, accuracy", Wanted("above the same bits", lambda gap: gap > 0), _transferred_accuracy),
)
