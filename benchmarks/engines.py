"""Compare search engines on an additive objective whose optimum is known, and time the solvers; print JSON.

The objective is that of mixed precision: 53 layers with 64 pairs of bits, losses that halve with each bit, costs that
grow with their product, sizes and (unknown to the engines) sensitivities log-normal. A run is as good as its
best policy: how far its loss is above the least one, relative to the range between that and the cheapest policy's loss
(``of_range``: what is left of the score, as an agent sees it) and to the least loss itself (``of_optimum``); medians
over seeds and objectives.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
from common.output import finish, progress
from scipy.optimize import Bounds, LinearConstraint, milp

from fxopt.decisions import AdditiveCosts, Constraint, Decision, Policy, SearchSpace
from fxopt.search import compare
from fxopt.search.solver import solve, solve_lagrangian

BITS = np.arange(1, 9)
PAIRS = tuple((int(w), int(a)) for w in BITS for a in BITS)


def tables(layers: int, seed: int) -> tuple[list[np.ndarray], list[np.ndarray], float]:
    rng = np.random.default_rng(seed)
    sizes, fragile, share = np.exp(rng.normal(0, 1, layers)), np.exp(rng.normal(0, 1, layers)), rng.random(layers)
    costs = [size * np.multiply.outer(BITS, BITS).ravel() / 64 for size in sizes]
    losses = [
        (f * (2.0 ** -BITS[:, None] + r * 2.0 ** -BITS[None, :]) * (1 + 0.1 * rng.random((8, 8)))).ravel()
        for f, r in zip(fragile, share, strict=True)
    ]
    return losses, costs, 0.4 * sum(float(table.max()) for table in costs)


def milp_alone(losses: list[np.ndarray], costs: list[np.ndarray], limit: float) -> float:
    one_each = np.kron(np.eye(len(losses)), np.ones((1, len(losses[0]))))
    rules = [LinearConstraint(one_each, 1, 1), LinearConstraint(np.concatenate(costs)[None], -np.inf, limit)]
    found = milp(np.concatenate(losses), integrality=np.ones(one_each.shape[1]), bounds=Bounds(0, 1), constraints=rules)
    return float(found.fun)


def timed(run) -> tuple[float, object]:
    start = time.process_time()
    found = run()
    return 1e3 * (time.process_time() - start), found


def solvers(problems: int) -> dict[str, object]:
    rows = []
    for seed in range(problems):
        losses, costs, limit = tables(53, seed)
        ours, found = timed(lambda: solve(losses, costs, limit))  # noqa: B023
        theirs, best = timed(lambda: milp_alone(losses, costs, limit))  # noqa: B023
        rows.append((ours, theirs, found.loss / best - 1.0))
    many_losses, many_costs, many_limit = tables(10_000, 0)
    taken, near = timed(lambda: solve_lagrangian(many_losses, many_costs, many_limit))
    return {
        "layers": 53,
        "choices": 64,
        "solve_ms_median": round(statistics.median(row[0] for row in rows), 1),
        "solve_ms_most": round(max(row[0] for row in rows), 1),
        "milp_alone_ms_median": round(statistics.median(row[1] for row in rows), 1),
        "milp_alone_ms_most": round(max(row[1] for row in rows), 1),
        "largest_difference": max(row[2] for row in rows),
        "lagrangian_10000_layers_ms": round(taken, 1),
        "lagrangian_relative_gap": near.gap / near.loss,
    }


def race(name: str, trials: int, seeds: int, problem: int) -> list[tuple[float, float, float]]:
    """Of range, of optimum and the engine's milliseconds a trial, for each seed."""
    losses, costs, limit = tables(53, problem)
    sizes = [float(table.max()) for table in costs]
    space = SearchSpace([Decision("bits", f"layer{j}", PAIRS, (8, 8), {"weights": s}) for j, s in enumerate(sizes)])
    additive = AdditiveCosts(space, costs)
    constraint = Constraint(space, additive, limit, by_index=additive.at)

    def score(policy: Policy) -> float:
        return -sum(float(table[i]) for table, i in zip(losses, space.encode(policy), strict=True))

    best, worst = solve(losses, costs, limit).loss, -score(constraint.cheapest())
    (row,) = compare(space, score, trials, constraint=constraint, names=[name], seeds=range(seeds)).rows
    took = 1e3 * row["engine_cpu_s"] / row["trials"]
    return [((-one - best) / (worst - best), -one / best - 1.0, took) for one in row["scores"]]


def races(names: list[str], trials: int, seeds: int, problems: int) -> dict[str, object]:
    found = {}
    for name in names:
        progress(name)
        runs = [run for problem in range(problems) for run in race(name, trials, seeds, problem)]
        ranges, optima, took = zip(*runs, strict=True)
        found[name] = {
            "of_range": round(statistics.median(ranges), 5),
            "of_optimum": round(statistics.median(optima), 4),
            "of_optimum_most": round(max(optima), 4),
            "engine_ms_per_trial": round(statistics.mean(took), 2),
        }
        progress(str(found[name]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=600)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--problems", type=int, default=20, help="knapsack problems to solve")
    parser.add_argument("--races", type=int, default=1, help="objectives that engines are compared on")
    parser.add_argument(
        "--engines", default="uniform,random,greedy,evolution,reinforce,ddpg,exact", help="names, with commas between"
    )
    options = parser.parse_args()
    progress("solvers")
    results: dict[str, object] = {"solvers": solvers(options.problems)} if options.problems else {}
    results["engines"] = races(options.engines.split(","), options.trials, options.seeds, options.races)
    finish("engines", results, trials=options.trials, seeds=options.seeds)


if __name__ == "__main__":
    main()
