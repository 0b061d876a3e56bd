"""Measure what it costs to score policies on a target; print JSON.

The workload is MobileNetV2 as it is lowered (convolutions, norms, activations, additions) with channels and bits drawn
anew for each policy, so shapes vary everywhere. Compiled models, on one thread, are timed in turn with NumPy code that
computes the same totals from whole columns; figures are medians of CPU time, in nanoseconds per operator (one row of
one policy), and ``speedup`` is the ratio of the two in this run. ``check`` is the largest relative difference.

``bits`` scores policies that choose among 64 pairs of bits for each of the 53 layers, by a table: against a NumPy
gather and plain Python, and on two threads (wall time).

``channels`` scores 1,024 policies that choose the channels of the lowered MobileNetV2, bound as a search binds them, on
a target of each family with a closed formula; in turn with the same rows written out, and for two targets with NumPy.
``best`` is the least of the samples, which other work on the machine disturbs least.
``two_threads`` is the wall time on one thread over that on two; ``two_processes`` is what the machine gave at the same
time to two processes that score by themselves, over one: more than that no program gets. ``streamed`` scores policies
from their choices to their totals, and tells how much the peak of memory grew, choices and totals among it.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from common.networks import NETWORKS
from common.output import finish

from fxopt.decisions import SearchSpace
from fxopt.graph import trace
from fxopt.lowering import Choices, ParametricWorkload, lower
from fxopt.passes import PruneChannels
from fxopt.targets import PresetTarget, Workload, load, make_row, names
from fxopt.targets import rows as r
from fxopt.targets.rows import ColumnWorkload, Floats, OpKind, Rows
from fxopt.targets.tables import CostTable

CLOSED_TARGETS = (
    *("pixel1", "note10", "xeon-e5-2640v4", "v100", "galaxy-s24", "zynq7020", "eyeriss", "systolic", "eie"),
    "stm32f746",
)
INTEGER_TARGETS = ("pixel1", "vu9p", "zynq7020", "bitfusion")

# Inverted residuals of MobileNetV2: expansion, channels, repeats, stride (Sandler et al. 2018, table 2).
BLOCKS = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


def mobilenet_v2() -> Rows:
    rows: list[Rows] = []

    def convolution(c: int, k: int, size: int, kernel: int, stride: int, *, depthwise: bool = False) -> None:
        kind = OpKind.DEPTHWISE if depthwise else OpKind.CONV
        sides = {"in_h": size * stride, "in_w": size * stride, "out_h": size, "out_w": size}
        window = {"kernel_h": kernel, "kernel_w": kernel, "stride_h": stride, "stride_w": stride}
        rows.append(make_row(kind, c=c, k=k, groups=c if depthwise else 1, **sides, **window))
        pixels = {"in_h": size, "in_w": size, "out_h": size, "out_w": size}
        rows.append(make_row(OpKind.NORM, c=k, k=k, held=2 * k, fused=1, **pixels))
        rows.append(make_row(OpKind.ELEMENTWISE, c=k, k=k, fused=1, **pixels))

    convolution(3, 32, 112, 3, 2)
    channels, size = 32, 112
    for expansion, out, repeats, first_stride in BLOCKS:
        for stride in (first_stride, *[1] * (repeats - 1)):
            hidden = channels * expansion
            if expansion > 1:
                convolution(channels, hidden, size, 1, 1)
            size //= stride
            convolution(hidden, hidden, size, 3, stride, depthwise=True)
            convolution(hidden, out, size, 1, 1)
            if stride == 1 and channels == out:
                addition = {"in_h": size, "in_w": size, "out_h": size, "out_w": size}
                rows.append(make_row(OpKind.ELEMENTWISE, c=out, k=out, inputs=2, **addition))
            channels = out
    convolution(320, 1280, 7, 1, 1)
    rows.append(make_row(OpKind.POOL, c=1280, k=1280, in_h=7, in_w=7, kernel_h=7, kernel_w=7))
    rows.append(make_row(OpKind.LINEAR, c=1280, k=1000, bias=1))
    return np.concatenate(rows)


def policies(count: int, seed: int) -> Workload:
    rng = np.random.default_rng(seed)
    base = mobilenet_v2()
    rows = np.repeat(base.reshape(1, -1), count, axis=0)
    depthwise = rows["kind"] == OpKind.DEPTHWISE
    for name in ("c", "k"):
        rows[name] = np.maximum(1, (rows[name] * rng.uniform(0.3, 1.0, rows.shape)).astype(np.int32))
    rows["k"] = np.where(depthwise, rows["c"], rows["k"])
    rows["groups"] = np.where(depthwise, rows["c"], 1)
    for name in ("weight_bits", "activation_bits", "output_bits"):
        rows[name] = rng.choice([8, 16, 32], rows.shape)
    return Workload(rows, [OpKind(kind).name for kind in base["kind"]])


def pixel1_in_numpy(rows: Rows, values: Mapping[str, float]) -> Floats:
    """Latency by row of the linear model, a group of columns at a time, as the rows of all policies share kinds."""
    latency = np.zeros(rows.shape, np.float64)
    kinds = rows["kind"][0]
    pointwise = (kinds == OpKind.CONV) & (rows["kernel_h"][0] == 1)
    names = np.array([OpKind(kind).name.lower() for kind in kinds], dtype=object)
    names = np.where(pointwise, "pointwise", np.where(kinds == OpKind.CONV, "dense", names))
    for group in dict.fromkeys(names.tolist()):
        columns = rows[:, names == group]
        read, written = r.in_elements(columns), r.out_elements(columns)
        spilled = np.maximum(0.0, read * columns["activation_bits"] / 8.0 - values["spill_threshold"]) / 4.0
        blocks = np.ones(columns.shape)
        for size in {"pointwise": ("c", "k"), "depthwise": ("k",)}.get(group, ()):
            blocks *= np.ceil(columns[size] / values["channel_tile"]) * values["channel_tile"] / columns[size]
        quantities: dict[str, Floats | float] = {
            "mac": r.macs(columns) * blocks,
            "weight": r.weights(columns),
            "in": read,
            "out": written,
            "const": 1.0,
        }
        quantities |= {"spill": spilled, "kernel_out": columns["kernel_h"] * written, "channel": columns["k"]}
        best = np.full(columns.shape, np.inf)
        bits = r.compute_bits(columns)
        for name, width in (("int8", 8), ("int16", 16), ("float", 32)):
            terms = [
                values[key] * quantities[key.rpartition(".")[2]] for key in values if key.startswith(f"{name}.{group}.")
            ]
            if terms:
                best = np.where(bits <= width, np.minimum(best, sum(terms)), best)
        latency[:, names == group] = best
    return latency


def v100_in_numpy(rows: Rows, values: Mapping[str, float]) -> Floats:
    """Latency by row of the GPU model."""
    rate = np.where(r.compute_bits(rows) <= 16, values["mac_per_sm_cycle.16"], values["mac_per_sm_cycle.32"])
    seconds = 1.0 / (rate * values["clock"])
    taps = rows["kernel_h"].astype(np.float64) * rows["kernel_w"]
    tiles = np.ceil(rows["n"] * rows["out_h"] * rows["out_w"] / values["tile_m"]) * np.ceil(
        rows["k"] / values["tile_n"]
    )
    waves = np.ceil(tiles / values["sm_count"])
    tiled = waves * values["tile_m"] * values["tile_n"] * rows["c"] * taps * seconds / values["dense_efficiency"]
    lanes = values["mac_per_sm_cycle.32"] * values["clock"] * values["sm_count"]
    depthwise = r.macs(rows) / (lanes * values["depthwise_efficiency"])
    is_depthwise = rows["kind"] == OpKind.DEPTHWISE
    with_macs = np.isin(rows["kind"], [OpKind.CONV, OpKind.LINEAR])
    compute = np.where(is_depthwise, depthwise, np.where(with_macs, tiled, 0.0))
    memory = r.traffic_bytes(rows) / (values["bandwidth"] * values["bandwidth_efficiency"])
    return np.maximum(np.maximum(compute, memory), values["launch_floor"])


def v100_in_python(rows: list[dict[str, float]], values: Mapping[str, float]) -> float:
    """Latency of the GPU model, an operator at a time, of convolutions, linear layers and what has no MACs."""
    total = 0.0
    for row in rows:
        bits = max(row["weight_bits"], row["activation_bits"])
        rate = values["mac_per_sm_cycle.16"] if bits <= 16 else values["mac_per_sm_cycle.32"]
        taps, pixels = row["kernel_h"] * row["kernel_w"], row["n"] * row["out_h"] * row["out_w"]
        weights = row["c"] * row["k"] / row["groups"] * taps if row["kind"] in (0, 1, 2) else 0.0
        read = row["n"] * row["in_h"] * row["in_w"] * row["c"] * row["inputs"]
        moved = (read * row["activation_bits"] / 8.0 + weights * row["weight_bits"] / 8.0 + 4.0 * row["held"]) + row[
            "k"
        ] * pixels * row["output_bits"] / 8.0
        compute = 0.0
        if row["kind"] == OpKind.DEPTHWISE:
            lanes = values["mac_per_sm_cycle.32"] * values["clock"] * values["sm_count"]
            compute = weights * pixels / (lanes * values["depthwise_efficiency"])
        elif row["kind"] in (0, 2):
            tiles = math.ceil(pixels / values["tile_m"]) * math.ceil(row["k"] / values["tile_n"])
            waves = math.ceil(tiles / values["sm_count"])
            work = waves * values["tile_m"] * values["tile_n"] * row["c"] * taps
            compute = work / (rate * values["clock"] * values["dense_efficiency"])
        memory = moved / (values["bandwidth"] * values["bandwidth_efficiency"])
        total += max(compute, memory, values["launch_floor"])
    return total


def totals_in_numpy(latency: Floats, rows: Rows, fuses: bool) -> tuple[Floats, ...]:
    free = (rows["fused"] == 1) & fuses
    sums = np.where(free, 0.0, latency), r.weight_bytes(rows), r.macs(rows)
    return (*(each.sum(axis=1) for each in sums), rows["live_bytes"].max(axis=1))


def cpu_ns(function: Callable[[], object]) -> int:
    """CPU time of one call, right after an untimed one: a search scores batch after batch."""
    function()
    start = time.thread_time_ns()
    function()
    return time.thread_time_ns() - start


def measure(name: str, workload: Workload, repeat: int) -> dict[str, float]:
    target = load(name)
    if not isinstance(target, PresetTarget):
        raise TypeError(f"{name} is no preset")
    values = {key: figure.si for key, figure in target.preset.figures.items()}
    in_numpy = IN_NUMPY[name]

    def compiled() -> Floats:
        return target.estimate(workload).latency_s

    def plain() -> Floats:
        return totals_in_numpy(in_numpy(workload.rows, values), workload.rows, target.info.fuses)[0]

    check = float(np.max(np.abs(compiled() / plain() - 1.0)))
    samples: dict[str, list[int]] = {"compiled": [], "numpy": [], "validate": []}
    for _ in range(repeat):
        samples["compiled"].append(cpu_ns(compiled))
        samples["numpy"].append(cpu_ns(plain))
        samples["validate"].append(cpu_ns(lambda: Workload(workload.rows, workload.names)))
    ns = {key: statistics.median(times) / workload.rows.size for key, times in samples.items()}
    return {
        "ns_per_operator": round(ns["compiled"], 2),
        "numpy_ns_per_operator": round(ns["numpy"], 2),
        "validation_ns_per_operator": round(ns["validate"], 2),
        "ns_per_policy": round(ns["compiled"] * len(workload), 1),
        "speedup": round(ns["numpy"] / ns["compiled"], 1),
        "check": check,
    }


def measure_bits(name: str, count: int, repeat: int) -> dict[str, float]:
    layers = mobilenet_v2()
    layers = layers[np.isin(layers["kind"], [OpKind.CONV, OpKind.DEPTHWISE, OpKind.LINEAR])]
    forms = []
    for i in range(len(layers)):
        rows = np.repeat(layers[i : i + 1], 64)
        rows["weight_bits"], rows["activation_bits"] = np.repeat(np.arange(1, 9), 8), np.tile(np.arange(1, 9), 8)
        rows["output_bits"] = rows["activation_bits"]
        forms.append(rows)
    target = load(name)
    names = [f"layer {i}" for i in range(len(forms))]
    built = [cpu_ns(lambda: CostTable(target, forms, names)) for _ in range(3)]
    table = CostTable(target, forms, names)
    codes = np.random.default_rng(0).integers(0, 64, (count, len(forms))).astype(np.uint8)
    costs = np.stack([target.estimate(Workload(rows.reshape(-1, 1), ["layer"])).latency_s for rows in forms])
    listed, few = costs.tolist(), codes[:200].tolist()
    index = np.arange(len(forms))
    found = table.score(codes)
    check = float(np.max(np.abs(costs[index, codes].sum(axis=1) / found - 1.0)))
    samples: dict[str, list[float]] = {"compiled": [], "numpy": [], "python": [], "one": [], "two": []}
    for _ in range(repeat):
        samples["compiled"].append(cpu_ns(lambda: table.score(codes)) / codes.size)
        samples["numpy"].append(cpu_ns(lambda: costs[index, codes].sum(axis=1)) / codes.size)
        samples["python"].append(
            cpu_ns(lambda: [sum(row[code] for row, code in zip(listed, policy, strict=True)) for policy in few])
            / (len(few) * len(forms))
        )
        for threads in ("one", "two"):
            start = time.perf_counter_ns()
            table.score(codes, threads=1 if threads == "one" else 2)
            samples[threads].append(time.perf_counter_ns() - start)
    ns = {key: statistics.median(times) for key, times in samples.items()}
    return {
        "ns_per_operator": round(ns["compiled"], 3),
        "speedup_over_numpy": round(ns["numpy"] / ns["compiled"], 1),
        "speedup_over_python": round(ns["python"] / ns["compiled"], 1),
        "two_threads": round(ns["one"] / ns["two"], 2),
        "build_ms": round(statistics.median(built) / 1e6, 2),
        "check": check,
    }


def channels_of_mobilenet() -> tuple[ParametricWorkload, SearchSpace]:
    """The lowered MobileNetV2, and the decisions about its channels."""
    graph = trace(NETWORKS["pytorchcv:mobilenetv2_w1"].build(), torch.randn(2, 3, 224, 224))
    return lower(graph), PruneChannels().search_space(graph, load("pixel1").capabilities)


def choices_of(workload: ParametricWorkload, space: SearchSpace, count: int) -> Choices:
    """So many random choices."""
    indices = np.random.default_rng(0).integers(0, space.sizes, (count, len(space)), dtype=np.uint8)
    return workload.choices(space, indices)


def measure_channels(name: str, bound: ColumnWorkload, rows: Workload, repeat: int) -> dict[str, float]:
    target = load(name)
    samples: dict[str, list[float]] = {"columns": [], "rows": []}
    for _ in range(repeat):
        samples["columns"].append(cpu_ns(lambda: target.estimate(bound)) / (bound.policies * len(bound)))
        samples["rows"].append(cpu_ns(lambda: target.estimate(rows)) / rows.rows.size)
    ns = {key: statistics.median(times) for key, times in samples.items()}
    found = {
        "ns_per_operator": round(ns["columns"], 2),
        "best_ns_per_operator": round(min(samples["columns"]), 2),
        "rows_ns_per_operator": round(ns["rows"], 2),
    }
    if name not in IN_NUMPY or not isinstance(target, PresetTarget):
        return found
    values = {key: figure.si for key, figure in target.preset.figures.items()}

    def plain() -> Floats:
        return totals_in_numpy(IN_NUMPY[name](rows.rows, values), rows.rows, target.info.fuses)[0]

    plain_ns = statistics.median(cpu_ns(plain) / rows.rows.size for _ in range(3))
    found["speedup_over_numpy"] = round(plain_ns / ns["columns"], 1)
    if name == "v100":
        fields = rows.rows.dtype.names or ()
        listed = [dict(zip(fields, row.tolist(), strict=True)) for row in rows.rows[0]]
        python_ns = statistics.median(cpu_ns(lambda: v100_in_python(listed, values)) / len(listed) for _ in range(9))
        found["speedup_over_python"] = round(python_ns / ns["columns"], 1)
    return found


def score_for(barrier: Any, seconds: Any, bound: ColumnWorkload, times: int) -> None:
    """Score again and again, from when all processes are ready; put the seconds that it took."""
    target = load("v100")
    target.estimate(bound)
    barrier.wait()
    start = time.perf_counter()
    for _ in range(times):
        target.estimate(bound)
    seconds.put(time.perf_counter() - start)


def seconds_of_processes(count: int, bound: ColumnWorkload, times: int) -> float:
    context = multiprocessing.get_context("fork")
    barrier, seconds = context.Barrier(count), context.Queue()
    workers = [context.Process(target=score_for, args=(barrier, seconds, bound, times)) for _ in range(count)]
    for worker in workers:
        worker.start()
    found = [seconds.get() for _ in workers]
    for worker in workers:
        worker.join()
    return max(found)


def measure_threads(bound: ColumnWorkload, repeat: int, times: int = 20) -> dict[str, float]:
    target = load("v100")
    samples: dict[str, list[float]] = {"threads": [], "processes": []}
    for _ in range(repeat):
        walls = []
        for threads in (1, 2):
            start = time.perf_counter()
            for _ in range(times):
                target.estimate(bound, threads=threads)
            walls.append(time.perf_counter() - start)
        samples["threads"].append(walls[0] / walls[1])
        one, two = (seconds_of_processes(count, bound, times) for count in (1, 2))
        samples["processes"].append(2.0 * one / two)
    return {
        "two_threads": round(statistics.median(samples["threads"]), 2),
        "two_threads_best": round(max(samples["threads"]), 2),
        "two_processes": round(statistics.median(samples["processes"]), 2),
        "two_processes_best": round(max(samples["processes"]), 2),
    }


def measure_streamed(
    name: str, workload: ParametricWorkload, space: SearchSpace, policies: int, repeat: int
) -> dict[str, float]:
    target = load(name)
    few = choices_of(workload, space, min(20_000, policies))
    rows = len(workload.rows)
    samples = [cpu_ns(lambda: workload.estimate(target, few)) / (few.policies * rows) for _ in range(repeat)]
    # In a process of its own: what this one held at its peak before says nothing about the stream.
    context = multiprocessing.get_context("fork")
    grown = context.Queue()
    worker = context.Process(target=stream, args=(grown, name, workload, space, policies))
    worker.start()
    kilobytes = grown.get()
    worker.join()
    return {
        "bound_and_scored_ns_per_operator": round(statistics.median(samples), 2),
        "rows": rows,
        "decisions": len(space),
        "policies": policies,
        "peak_memory_grew_mb": round(kilobytes / 1024, 1),
    }


def stream(grown: Any, name: str, workload: ParametricWorkload, space: SearchSpace, policies: int) -> None:
    """Draw policies and score them all; put the kilobytes by which the peak of this process grew."""
    target = load(name)
    workload.estimate(target, choices_of(workload, space, 20_000))  # pages of libraries are counted as they are touched
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    workload.estimate(target, choices_of(workload, space, policies))
    grown.put(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


IN_NUMPY = {"pixel1": pixel1_in_numpy, "v100": v100_in_numpy}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policies", type=int, default=250, help="policies in a batch")
    parser.add_argument("--streamed", type=int, default=1_000_000, help="policies to stream")
    parser.add_argument("--repeat", type=int, default=21, help="samples of each, taken in turn")
    options = parser.parse_args()

    torch.set_num_threads(1)
    workload = policies(options.policies, seed=0)
    results: dict[str, object] = {name: measure(name, workload, options.repeat) for name in ("pixel1", "v100")}
    results["bits"] = {name: measure_bits(name, 20_000, options.repeat) for name in INTEGER_TARGETS if name in names()}
    lowered, space = channels_of_mobilenet()
    streams = {name: measure_streamed(name, lowered, space, options.streamed, 5) for name in ("pixel1", "v100")}
    choices = choices_of(lowered, space, 20_000)
    bound = lowered.columns(choices.part(0, 1024))
    rows = Workload(lowered.columns(choices.part(0, 256)).expand().rows, bound.names)
    results["channels"] = {name: measure_channels(name, bound, rows, options.repeat) for name in CLOSED_TARGETS}
    results["threads"] = measure_threads(lowered.columns(choices), 5)
    results["streamed"] = streams
    operators = len(workload.names)
    finish("scoring", results, policies=options.policies, rows=operators, repeat=options.repeat)


if __name__ == "__main__":
    main()
