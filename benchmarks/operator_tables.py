"""Time the table of what every candidate of the space that ProxylessNAS searches costs, on every target; print JSON.

``lowering_s`` is for lowering all candidates, once for all targets of a batch size; ``table_ms`` for the table of one
target, and ``policies_ms`` for 100,000 networks by it. CPU time of one thread, medians. A target that has no model for
an operator of the space says so in place of figures.

    python benchmarks/operator_tables.py > operator_tables.json
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from common.output import finish, progress
from numpy.typing import NDArray

from fxopt import models, targets, trace
from fxopt.errors import TargetError
from fxopt.lowering import OperatorWorkload, lower_operators
from fxopt.passes import SelectOperators


def milliseconds(work: Callable[[], Any], repeat: int) -> float:
    """Median processor time."""
    taken = []
    for _ in range(repeat):
        start = time.process_time()
        work()
        taken.append(time.process_time() - start)
    return round(1e3 * statistics.median(taken), 2)


def of_target(name: str, workload: OperatorWorkload, rows: NDArray[np.intp], repeat: int) -> dict[str, Any]:
    """What the table of one target takes."""
    target = targets.load(name)
    try:
        table = workload.table(target)
    except TargetError as failure:
        return {"refused": str(failure)[:160]}
    return {
        "table_ms": milliseconds(lambda: workload.table(target), repeat),
        "policies_ms": milliseconds(lambda: table.score(rows), repeat),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=5, help="samples of each")
    parser.add_argument("--policies", type=int, default=100_000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with torch.device("meta"):
        network = models.proxyless_space()
    graph = trace(network.to_empty(device="cpu").eval(), torch.zeros(2, 3, 224, 224))
    step = SelectOperators(patterns=("inverted-residual",))
    start = time.process_time()
    workload = lower_operators(graph, step)
    lowering_s = time.process_time() - start
    sizes = workload.space.sizes
    rows = np.random.default_rng(0).integers(0, sizes, (options.policies, len(sizes)))
    found = {}
    for name in targets.names():
        if name != targets.HOST:
            found[name] = of_target(name, workload, rows, options.repeat)
            progress(f"{name}: {found[name]}")
    results = {"blocks": len(sizes), "lowering_s": round(lowering_s, 2), "targets": found}
    finish("operator_tables", results, policies=options.policies, repeat=options.repeat)


if __name__ == "__main__":
    main()
