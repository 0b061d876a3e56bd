"""On the machine that is measured, nothing is quantized that makes the whole slower."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from torch import fx

from fxopt.decisions import Policy, SearchSpace
from fxopt.export import fastest_bits
from fxopt.passes import Quantize
from fxopt.passes.quantize import FLOAT
from fxopt.progress import Progress

__all__ = ["without_slow_integers"]

_STEP = "measuring layers in 8 bits"


def without_slow_integers(
    space: SearchSpace,
    gm: fx.GraphModule,
    example_inputs: object,
    quantize: Quantize,
    record: Path | None,
    show: Progress,
) -> SearchSpace:
    """Leave no choice but floats to layers that are faster so on this machine.

    Args:
        space: The decisions.
        gm: The graph that they are about.
        example_inputs: What to measure it with.
        quantize: The pass that quantizes.
        record: File that keeps what was measured, so that a resumed search has the same space; None for none.
        show: Where to tell that it takes a while.

    Returns:
        The space without the choices that were measured to be slow.

    Raises:
        FxoptError: If the graph cannot be exported, or the file cannot be read or written.
    """
    if not any(decision.kind in quantize.kinds for decision in space):
        return space
    if record is not None and record.exists():
        fast = Policy.load(record)
    else:
        show.start(_STEP, 1)
        fast = fastest_bits(gm, example_inputs, quantize).policy
        show.finish(_STEP)
        if record is not None:
            record.parent.mkdir(parents=True, exist_ok=True)
            fast.save(record)
    slow = {key for key, bits in fast.items() if bits == FLOAT}
    kept = [
        dataclasses.replace(decision, choices=(FLOAT,), default=FLOAT) if decision.key in slow else decision
        for decision in space
    ]
    return SearchSpace(decision for decision in kept if decision.choices != (FLOAT,))
