"""Choosing operators, and operators, channels and bits together."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

from figures.bar import REPORTED, Bar, Document, Found, Wanted, at_most, between, counted, has_to, listed, some, spread

TEST_IMAGES = 10_000
DEVICES = ("v100", "xeon-e5-2640v4", "pixel1")
MEMORY = "memory, 224 x 224, batch 4"
TIME = "time, 32 x 32, width 0.5, batch 64"
PARTS = ("operators", "channels", "4 bits", "6 bits", "8 bits", "mixed bits")
"""What operators, channels and bits together are compared with."""


def _published(key: str) -> Callable[[Document], Found]:
    def of(document: Document) -> Found:
        devices = document["results"]["devices"]
        kept = {name: one[key] for name, one in devices.items()}
        errors = {f"`{name}`": 100 * one["largest_error"] for name, one in devices.items()}
        missing = ", ".join(f"not on `{name}`" for name, one in kept.items() if not one)
        text = f"{sum(kept.values())} of {len(kept)}" + (f", {missing}" if missing else "")
        return Found(all(kept.values()), f"{text}; latencies off by at most {listed(errors, 1, '%')}")

    return of


def _memory(document: Document) -> Found:
    found = document["results"][MEMORY]
    steps = {name: found[name]["memory_ratio"] for name in ("weights step", "architecture step, two gates")}
    text = "; ".join(f"{name} {ratio:.2f}" for name, ratio in steps.items())
    return Found(max(steps.values()), f"{text}; relaxation {found['relaxation']['memory_ratio']:.2f}")


def _step_time(document: Document) -> Found:
    found = document["results"][TIME]
    ratios = {name: one["median_ratio"] for name, one in found.items()}
    steps = [f"{name} {ratio:.2f} ({between(found[name]['all'])})" for name, ratio in ratios.items()]
    return Found(max(ratio for name, ratio in ratios.items() if name != "relaxation"), "; ".join(steps))


def _runs(document: Document, what: str, **wanted: Any) -> list[dict[str, Any]]:
    """Searches, or networks that were trained from scratch."""
    lines = (one for one in document["results"]["runs"] if one["what"] == what)
    return [one for one in lines if all(one[name] == value for name, value in wanted.items())]


def _seeds(document: Document) -> list[int]:
    """Seeds of which all three networks of two gates are there."""
    counts = {
        seed: {one["device"] for one in _runs(document, "network", seed=seed, method="binary")}
        for seed in {one["seed"] for one in document["results"]["runs"]}
    }
    return some(sorted(seed for seed, devices in counts.items() if devices.issuperset(DEVICES)), "a network for each")


def _different(document: Document) -> Found:
    """The pairs of networks found for two targets with one seed that differ."""
    different = pairs = 0
    for seed in _seeds(document):
        found = [_runs(document, "search", seed=seed, device=device, method="binary") for device in DEVICES]
        for one, two in itertools.combinations(found, 2):
            pairs, different = pairs + 1, different + (one[0]["operators"] != two[0]["operators"])
    return Found(different == pairs, f"{different} of {pairs} pairs differ, {counted(len(_seeds(document)), 'seed')}")


def _at_home(document: Document) -> Found:
    """On how many targets, counted for each seed, the network that was made for one is the cheapest of the three."""
    best, rows, elsewhere = 0, 0, []
    for seed, device in itertools.product(_seeds(document), DEVICES):
        made = {
            one["device"]: one["latency_ms"][device] for one in _runs(document, "network", seed=seed, method="binary")
        }
        rows += 1
        if made[device] <= min(made.values()):
            best += 1
        else:
            elsewhere.append(f"`{device}`")
    missing = f", not on {', '.join(dict.fromkeys(elsewhere))}" if elsewhere else ""
    return Found(best == rows, f"{best} of {rows}{missing}, {counted(len(_seeds(document)), 'seed')}")


def _accuracies(document: Document, device: str, method: str) -> dict[int, float]:
    """Test accuracy by seed, in per cent."""
    return {one["seed"]: 100 * one["accuracy"] for one in _runs(document, "network", device=device, method=method)}


def _against(other: str) -> Callable[[Document], Found]:
    """Two gates against something else, on each target, with the seeds that both have."""

    def of(document: Document) -> Found:
        told, values = [], []
        for device in DEVICES:
            mine, theirs = (_accuracies(document, device, method) for method in ("binary", other))
            both = sorted(mine.keys() & theirs.keys())
            if both:
                gaps = [mine[seed] - theirs[seed] for seed in both]
                told.append(f"`{device}` {spread(gaps)}")
                # A baseline has to be beaten; a search is not behind if chance may have made the difference.
                noise = 0.0 if other == "baseline" else max(max(gaps) - min(gaps), _chance(mine[both[0]], len(gaps)))
                values.append(math.fsum(gaps) / len(gaps) + noise)
        return Found(min(some(values, f"{other} and binary with one seed")), ", ".join(told) + " points")

    return of


def _chance(accuracy: float, pairs: int) -> float:
    """Two standard deviations of the mean difference of accuracies of independent networks, in per cent."""
    variance = accuracy * (100 - accuracy) / TEST_IMAGES
    return 2 * math.sqrt(2 * variance / pairs)


def _whole(document: Document) -> Found:
    """Everything together less the best of its parts, at each latency: means over the seeds that both have."""
    ways: dict[tuple[float, int], dict[str, dict[int, float]]] = {}
    for one in document["results"]["all"]:
        by_way = ways.setdefault((one["point"], one["samples"]), {})
        by_way.setdefault(one["way"], {})[one["seed"]] = 100 * one["accuracy"]
    gaps = {}
    for (point, samples), found in sorted(ways.items(), reverse=True):
        for part in PARTS:
            both = sorted(found.get("all", {}).keys() & found.get(part, {}).keys())
            if both:
                gaps[point, samples, part] = sum(found["all"][seed] - found[part][seed] for seed in both) / len(both)
    (point, samples, part), least = min(some(gaps.items(), "all and a part of it"), key=lambda one: one[1])
    ahead = sum(gap > 0 for gap in gaps.values())
    where = f"least before {part} at {point:.0%}, {samples:,} images"
    return Found(least, f"{ahead} of {len(gaps)}, by {between(list(gaps.values()))} points, {where}")


def _one_command(document: Document) -> Found:
    runs = document["results"]["runs"]
    right = [name for name, one in runs.items() if one["exit_code"] == 0 and one["finite"]]
    failed = [name for name in runs if name not in right]
    total = len(some(runs, "runs"))
    return Found(len(right) == total, f"{len(right)} of {total}" + (f"; not {', '.join(failed)}" if failed else ""))


def _blocks(document: Document) -> Found:
    census = [one for one in document["results"]["census"].values() if "skipped" not in one]
    with_blocks = sum(one["blocks"] > 0 for one in some(census, "networks"))
    return Found(with_blocks, f"{with_blocks} of {len(census)} networks, {sum(one['blocks'] for one in census)} blocks")


_RIGHT = ("yes", "nothing to decide")


def _lowered(document: Document) -> Found:
    census = {name: one for name, one in document["results"]["census"].items() if one.get("blocks")}
    failed = [name for name in some(list(census), "networks") if census[name]["lowered"] not in _RIGHT]
    told = f"; not {', '.join(failed)}" if failed else ""
    return Found(not failed, f"{len(census) - len(failed)} of {len(census)}{told}")


_AHEAD = Wanted("ahead on each target", lambda gap: gap > 0)
_NOT_BEHIND = Wanted("not behind by more than chance", lambda gap: gap >= 0)
_GIVEN = "supernet of two gates for three targets, "

BARS = (
    Bar("nas_published", "published networks, best at home", has_to("3 of 3"), _published("best_at_home")),
    Bar("nas_published", "the same, order of the three kept", has_to("3 of 3"), _published("order_kept")),
    Bar("nas_search", f"{_GIVEN}networks", has_to("all different"), _different),
    Bar("nas_search", f"{_GIVEN}cheapest at home", has_to("each with each seed"), _at_home),
    Bar("nas_search", f"{_GIVEN}accuracy over the baseline's", _AHEAD, _against("baseline")),
    *(
        Bar("nas_search", f"{_GIVEN}accuracy over that of `{other}`", _NOT_BEHIND, _against(other))
        for other in ("random", "evolution", "relaxed")
    ),
    Bar("nas_memory", "memory of a step of a supernet over its largest path's", at_most(1.35), _memory),
    Bar("nas_memory", "time of a step of a supernet over its path's", at_most(1.3), _step_time),
    Bar("three_passes", "operators, channels and bits against each part", Wanted("ahead", lambda gap: gap > 0), _whole),
    Bar("select_zoo", "one command from a network to a checked ONNX file", has_to("all"), _one_command),
    Bar("select_zoo", "networks in which blocks are found", REPORTED, _blocks),
    Bar("select_zoo", "candidates of all of their blocks have costs", has_to("all"), _lowered),
)
