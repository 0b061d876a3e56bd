"""Cutting channels, and zeroing weights."""

from __future__ import annotations

from typing import Any

from figures.bar import REPORTED, Bar, Document, Found, Wanted, at_least, at_most, between, counted, listed, some

DENSE_WITHIN = 0.5
"""Points that a network may lose after a fine-tune."""
EQUAL_WITHIN = 0.2
"""Points within which accuracies are called equal."""


def _right(document: Document) -> Found:
    right, networks = (document["summary"][name] for name in ("right", "networks"))
    (share,) = some([100 * right / networks] if networks else [], "networks")
    return Found(share, f"{right} of {networks} ({share:.1f}%)")


def _cutting(document: Document) -> Found:
    ratios = {name: one["ratio"] for name, one in document["results"].items()}
    return Found(max(some(ratios.values(), "networks")), listed(ratios))


def _of_transformers(document: Document) -> dict[str, Any]:
    """What was cut, by network and what was halved."""
    return {
        f"{name} by {cut}": one[cut]
        for name, one in document["results"].items()
        for cut in ("heads", "width")
        if cut in one
    }


def _from_masks(document: Document) -> Found:
    found = some(_of_transformers(document).values(), "transformers")
    masks, files = (max(one[f"difference_{of}"] for one in found) for of in ("from_masks", "of_file"))
    return Found(max(masks, files), f"at most {masks:.0e} from masks, {files:.0e} in onnxruntime")


def _faster(document: Document) -> Found:
    found = _of_transformers(document)
    each = [
        f"{name} {one['faster'][0]:.2f} ({one['faster'][1]:.2f} to {one['faster'][2]:.2f})"
        for name, one in found.items()
    ]
    return Found(min(some((one["faster"][1] for one in found.values()), "transformers")), ", ".join(each))


def _latency_met(document: Document) -> Found:
    shares = {name.partition(":")[2]: 100 * one["cost"] for name, one in document["results"].items()}
    beyond = max(some(shares.values(), "networks")) - 100 * document["budget"]
    return Found(beyond, listed(shares, 2, "%"))


def _measured_speedup(document: Document) -> Found:
    found = {name.partition(":")[2]: one for name, one in document["results"].items()}
    each = [
        "{} {:.2f} ({:.2f} to {:.2f})".format(name, one["speedup"], *one["speedup_quartiles"])
        for name, one in found.items()
    ]
    return Found(min(some((one["speedup"] for one in found.values()), "networks")), ", ".join(each))


def _engine(document: Document, name: str) -> dict[str, Any]:
    """What the summary tells of an engine."""
    for one in document["results"]["engines"]:
        if one["engine"] == name:
            found: dict[str, Any] = one
            return found
    raise LookupError(name)


def _points(told: dict[str, float]) -> str:
    """Mean and spread of accuracies, in per cent."""
    mean, spread, seeds = 100 * told["mean"], 100 * told["spread"], told["seeds"]
    return f"{mean:.2f}%" + (f" ± {spread:.2f}" if seeds > 1 else "") + f", {counted(seeds, 'seed')}"


def _recoveries(document: Document) -> dict[str, Any]:
    for one in document["results"]["parts"]:
        if one.get("what") == "recoveries":
            found: dict[str, Any] = one
            return found
    raise LookupError("recoveries")


def _untrained(document: Document) -> Found:
    told = _engine(document, "ddpg")["test_in_order"]
    uniform, dense = (100 * _recoveries(document)[name] for name in ("test_in_order", "test_dense"))
    return Found(100 * told["mean"], f"{_points(told)} (the uniform cut {uniform:.2f}%, dense {dense:.2f}%)")


def _fine_tuned(document: Document) -> Found:
    told = _engine(document, "ddpg")["test_tuned"]
    return Found(100 * told["mean"], _points(told))


def _lost_after_tuning(document: Document) -> Found:
    told, dense = _engine(document, "ddpg")["test_tuned"], 100 * _recoveries(document)["test_dense"]
    lost = dense - 100 * told["mean"]
    return Found(lost, f"{lost:.1f} points: {_points(told)}, dense {dense:.2f}%")


def _ahead(document: Document) -> Found:
    """How far ``ddpg`` is ahead of what needs no learning, beyond the spreads of the two."""
    mine = _engine(document, "ddpg")["test_as_searched"]
    gaps = {}
    for name in ("uniform", "random"):
        other = _engine(document, name)["test_as_searched"]
        gaps[name] = (100 * (mine["mean"] - other["mean"]), 100 * (mine["spread"] + other["spread"]))
    text = ", ".join(f"{gap:.1f} points before `{name}` (spreads {noise:.1f})" for name, (gap, noise) in gaps.items())
    return Found(min(gap - noise for gap, noise in gaps.values()), text)


def _not_behind(document: Document) -> Found:
    """How far ``ddpg`` is behind the engines that are told how sensitive layers are, beyond the spreads of the two."""
    mine = _engine(document, "ddpg")["test_as_searched"]
    behind, told = [], [f"`ddpg` {_points(mine)}"]
    for name in ("exact", "greedy"):
        other = _engine(document, name)["test_as_searched"]
        behind.append(other["mean"] - mine["mean"] - mine["spread"] - other["spread"])
        told.append(f"`{name}` {100 * other['mean']:.1f}% ± {100 * other['spread']:.1f}")
    return Found(100 * max(behind), "; ".join(told))


def _budget_kept(document: Document) -> Found:
    cost = max(some((one["highest_cost"] for one in document["results"]["engines"]), "engines"))
    budget = float(document["budget"])
    return Found(100 * (cost - budget), f"at most {100 * cost:.2f}% of {100 * budget:g}%")


def _budget_used(document: Document) -> Found:
    left = {one["engine"]: one["largest_steps_left"] for one in document["results"]["engines"]}
    most = max(some(left, "engines"), key=left.__getitem__)
    return Found(left[most], f"at most {left[most]:.2f} steps left, by `{most}`")


def _small_speedup(document: Document) -> Found:
    told = _engine(document, "ddpg")["speedup"]
    return Found(told["mean"], f"{told['mean']:.2f}, {counted(told['seeds'], 'seed')}")


def _fewer_weights(document: Document) -> Found:
    """How many times fewer weights, if accuracy is equal; nothing is gained otherwise."""
    runs, dense = some(document["results"]["searched"], "seeds"), document["results"]["dense"]
    fewer, lost = min(one["fewer"] for one in runs), max(100 * (dense - one["test"]) for one in runs)
    tests = [100 * one["test"] for one in runs]
    text = f"{fewer:.2f} times fewer at {between(tests)}% (dense {100 * dense:.2f}%), {counted(len(runs), 'seed')}"
    return Found(fewer if lost <= EQUAL_WITHIN else 1.0, text)


_NEVER_OVER = Wanted("never over", lambda beyond: beyond <= 1e-6)
_CLEARLY = Wanted("ahead by more than the spreads", lambda margin: margin > 0)
_NOT_BEHIND = Wanted("not behind by more than the spreads", lambda behind: behind <= 0)
_FASTER = Wanted("faster (lower quartile above 1)", lambda ratio: ratio > 1)

BARS = (
    Bar("prune_zoo", "architectures cut to half of their channels that are right", at_least(95, "%"), _right),
    Bar("prune_speed", "time of cutting over Torch-Pruning's", at_most(0.5), _cutting),
    Bar(
        "prune_transformers",
        "ViT and BERT, half of heads and hidden units: relative difference",
        at_most(1e-4),
        _from_masks,
    ),
    Bar("prune_transformers", "the same, times as fast in onnxruntime", _FASTER, _faster),
    Bar("prune_accuracy", "MobileNetV2 at 50% MACs, nothing trained", at_least(89, "%"), _untrained),
    Bar("prune_accuracy", "the same after two epochs", at_least(91.3, "%"), _fine_tuned),
    Bar("prune_accuracy-v1", "MobileNetV1 at 50% MACs, `ddpg` against `uniform` and `random`", _CLEARLY, _ahead),
    Bar("prune_accuracy-v1", "the same, `ddpg` against `exact` and `greedy`", _NOT_BEHIND, _not_behind),
    Bar("prune_accuracy-v1", "the same, lost after two epochs", at_most(DENSE_WITHIN, " points"), _lost_after_tuning),
    Bar("prune_accuracy-v1", "budgets after rounding, all engines", _NEVER_OVER, _budget_kept),
    Bar("prune_accuracy-v1", "budgets after rounding, what is left of them", at_most(1, " step"), _budget_used),
    Bar(
        "prune_accuracy-pixel1",
        "MobileNetV2 at half of its latency on `pixel1`, accuracy without training",
        REPORTED,
        _untrained,
    ),
    Bar("prune_accuracy-pixel1", "the same, times as fast on this machine", at_least(1.8), _small_speedup),
    Bar("prune_latency", "half of the latency on `host`, predicted", _NEVER_OVER, _latency_met),
    Bar("prune_latency", "the same, times as fast on this machine", at_least(1.8), _measured_speedup),
    Bar("prune_latency-pixel1", "half of the latency on `pixel1`, predicted", _NEVER_OVER, _latency_met),
    Bar("prune_latency-pixel1", "the same, times as fast on this machine", REPORTED, _measured_speedup),
    Bar(
        "sparsify_accuracy",
        "ResNet of bottlenecks, fewer weights at equal accuracy",
        at_least(5, " times"),
        _fewer_weights,
    ),
)
