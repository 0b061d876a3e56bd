"""On the machine that is measured, nothing is quantized that makes the whole slower."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import fx

from fxopt._files import write_text
from fxopt.data import Loader
from fxopt.decisions import Policy, SearchSpace
from fxopt.errors import FxoptError, PolicyError
from fxopt.evaluate import apply_policy
from fxopt.export import fastest_bits, measure
from fxopt.export._fastest import INTEGER
from fxopt.graph.fake_quantize import QuantizedLayer
from fxopt.passes import Quantize, TunablePass
from fxopt.passes.quantize import FLOAT
from fxopt.progress import Progress, during

__all__ = ["Quickest", "measured_bits", "not_slower", "without_slow_integers"]

_STEP = "measuring layers in 8 bits"
_LAST_STEP = "measuring the result against floats"
_RUNS = 25
_CHOSEN, _FASTEST, _FLOATS = "chosen", "fastest", "floats"


def measured_bits(
    gm: fx.GraphModule, example_inputs: object, quantize: Quantize, record: Path | None, show: Progress
) -> Policy:
    """Measure which layers are faster in integers on this machine.

    Args:
        gm: The graph.
        example_inputs: What to measure it with.
        quantize: The pass that quantizes.
        record: File that keeps what was measured, so that a resumed search has the same space; None for none.
        show: Where to tell that it takes a while.

    Returns:
        Bits of layers: floats, or the integers that are faster.

    Raises:
        FxoptError: If the graph cannot be exported, or the file cannot be read or written.
    """
    if record is not None and record.exists():
        return Policy.load(record)
    with during(show, _STEP):
        fast = fastest_bits(gm, example_inputs, quantize).policy
    if record is not None:
        record.parent.mkdir(parents=True, exist_ok=True)
        fast.save(record)
    return fast


def without_slow_integers(space: SearchSpace, fast: Policy) -> SearchSpace:
    """Leave no choice to layers for which floats were measured to be faster."""
    return SearchSpace(
        decision for decision in space if fast.get(decision.key) != FLOAT and decision.choices != (FLOAT,)
    )


@dataclass(frozen=True)
class Quickest:
    """A graph that was measured to be no slower than floats, or the reason why it may be.

    Attributes:
        graph: The graph.
        policy: What makes it of the original.
        note: What a reader should know; empty if the policy is the one that was given.
    """

    graph: fx.GraphModule
    policy: Policy
    note: str


def not_slower(
    final: fx.GraphModule,
    floats: fx.GraphModule,
    policy: Policy,
    *,
    space: SearchSpace,
    passes: Sequence[TunablePass],
    example_inputs: object,
    calibration: Loader | None,
    allowed: Callable[[fx.GraphModule], bool],
    record: Path | None,
    show: Progress,
) -> Quickest:
    """Give a quantized graph back, or what is faster on this machine if floats are faster than it.

    Graph and floats run in turn in onnxruntime. If floats take less, the graph with all layers of the space in 8 bits
    runs beside them, and the fastest of the three that the budgets allow is what remains.

    Args:
        final: The graph that the policy makes.
        floats: The same graph before its first quantizing pass.
        policy: The policy.
        space: The decisions: layers that are slower in integers have been left out of it.
        passes: All passes; those from the first that quantizes on make ``final`` of ``floats``.
        example_inputs: What to measure with, at a batch of one.
        calibration: What to calibrate another choice of bits with.
        allowed: Whether a graph is within the budgets.
        record: File that keeps what came of it, so that a resumed run ends the same way; None for none.
        show: Where to tell that it takes a while.

    Raises:
        FxoptError: If a graph cannot be exported, or the file cannot be read or written.
    """
    if not any(isinstance(module, QuantizedLayer) for module in final.modules()):
        return Quickest(final, policy, "")
    first = next(index for index, one in enumerate(passes) if isinstance(one, Quantize))
    kinds = {kind for one in passes[first:] for kind in one.kinds}
    policies = {_CHOSEN: policy} | {
        name: policy.merged(Policy({d.key: bits for d in space if d.kind == "bits" and bits in d.choices}))
        for name, bits in ((_FASTEST, INTEGER), (_FLOATS, FLOAT))
    }
    graphs = {_CHOSEN: final}

    def graph(name: str) -> fx.GraphModule:
        if name not in graphs:
            own = policies[name].only(kinds)
            graphs[name] = apply_policy(floats, passes[first:], own, calibration=calibration).eval()
        return graphs[name]

    name, note = (None, "") if record is None or not record.exists() else _recorded(record, policies)
    if name is None:
        with during(show, _LAST_STEP):
            name, note = _measured(graph, policies, example_inputs, allowed)
        if record is not None:
            write_text(record, json.dumps({"bits": name, "note": note}))
    return Quickest(graph(name), policies[name], note)


def _measured(
    graph: Callable[[str], fx.GraphModule],
    policies: dict[str, Policy],
    example_inputs: object,
    allowed: Callable[[fx.GraphModule], bool],
) -> tuple[str, str]:
    """The name of the policy that remains, and the note."""
    pair = measure(graph(_FLOATS), example_inputs, runs=_RUNS, peers=(graph(_CHOSEN),))
    slower = pair.peers[0].ratio
    if slower <= 1.0:
        return _CHOSEN, ""
    names = [_CHOSEN] if policies[_FASTEST] == policies[_CHOSEN] else [_CHOSEN, _FASTEST]
    timed = measure(graph(_FLOATS), example_inputs, runs=_RUNS, peers=[graph(name) for name in names])
    ratios = {name: peer.ratio for name, peer in zip(names, timed.peers, strict=True)} | {_FLOATS: 1.0}
    fit = [name for name in ratios if name == _CHOSEN or allowed(graph(name))]
    best = min(fit, key=lambda name: ratios[name])
    told = (
        f"With the bits that the search chose the model takes {slower:.2f} times as long as in floats on this machine"
    )
    if best == _CHOSEN and _FLOATS not in fit:
        return best, f"{told}; floats are over the budget, so it was left so."
    if best == _CHOSEN:
        return best, ""
    instead = "it was left in floats" if best == _FLOATS else "all layers that gain from it were put in 8 bits"
    return best, f"{told}; {instead}, which takes {ratios[best]:.2f} times as long as floats."


def _recorded(record: Path, policies: dict[str, Policy]) -> tuple[str, str]:
    try:
        data = json.loads(record.read_text(encoding="utf-8"))
        name, note = str(data["bits"]), str(data["note"])
    except (OSError, ValueError, TypeError, KeyError) as failure:
        raise FxoptError(f"Cannot read {record}: {failure}. Delete it; it is measured again.") from failure
    if name not in policies:
        raise PolicyError(f"{record} names the bits {name!r}, which nobody wrote. Delete it; it is measured again.")
    return name, note
