"""The table of figures: from what benchmarks print to rows, and rows that stay where there is nothing new."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from datetime import datetime, timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
NUMBER = re.compile(r"(?<![\w.])\d+(?:\.\d+)?(?:e-\d+)?(?![\w.]*\d)")
ENVIRONMENT = {"date": "2026-03-04T05:06:07+00:00", "processor": "A | B"}


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules of the benchmarks are imported as the scripts themselves do."""
    monkeypatch.syspath_prepend("benchmarks")


@pytest.fixture
def figures(scripts: None) -> ModuleType:
    return importlib.import_module("figures")


@pytest.fixture
def table(scripts: None) -> ModuleType:
    return importlib.import_module("figures.table")


def printed(benchmark: str, results: Any, **setting: Any) -> dict[str, Any]:
    return {"benchmark": benchmark, "environment": ENVIRONMENT, **setting, "results": results}


def speeds() -> Iterator[dict[str, Any]]:
    metrics = {"accuracy": 0.98, "macs": 100.0}, {"accuracy": 0.975, "macs": 50.0}
    times = {"wall_s": 100.0, "cpu_s": 90.0}
    yield printed("demo", {**times, **dict(zip(("before", "after"), metrics, strict=True))})
    one = {"cpu_s": 0.0042, "loads_torch": False}
    yield printed("import_time", {"import fxopt": one, "import fxopt.targets": {**one, "loads_torch": True}})
    chains = {f"chain of {n}": {"nodes": n, "us_per_node": us} for n, us in ((1_250, 160.0), (20_000, 240.0))}
    yield printed("lowering", {"resnet50": {"nodes": 178, "ms": 60.0}, **chains})
    bits = {"ns_per_operator": 0.5, "speedup_over_numpy": 8.0, "speedup_over_python": 70.0, "build_ms": 2.0}
    channels = {"ns_per_operator": 4.0, "best_ns_per_operator": 3.5, "speedup_over_numpy": 3.0}
    yield printed(
        "scoring",
        {
            **{name: {"speedup": 50.0, "ns_per_operator": 8.0} for name in ("pixel1", "v100")},
            "bits": {"pixel1": bits, "bitfusion": {**bits, "build_ms": 51.0}},
            "channels": {"pixel1": channels, "v100": {**channels, "speedup_over_python": 200.0}},
            "threads": {"two_threads": 1.8, "two_threads_best": 1.9, "two_processes": 1.9},
            "streamed": {"pixel1": {"peak_memory_grew_mb": 164.0}},
        },
    )
    tables = {"pixel1": {"table_ms": 14.0}, "eie": {"refused": "no additions"}}
    yield printed("operator_tables", {"lowering_s": 1.9, "targets": tables})
    episode = {"episode_ms_median": 104.0, "episode_ms_quartiles": [90.0, 104.0, 118.0]}
    yield printed("amc_overhead", episode)
    overheads = {
        f"{problem}, {enforce}, {units} units": {"ms_per_episode": ms, "ms_on_average": ms + 1}
        for problem, ms in (("haq", 26.0), ("amc", 33.0))
        for enforce in ("mask", "decrease")
        for units in (300, 64)
    }
    yield printed("search_overhead", overheads)
    solvers = {"solve_ms_median": 5.4, "solve_ms_most": 10.7, "milp_alone_ms_median": 237.0}
    ddpg = {"of_optimum": 0.0029, "of_optimum_most": 0.02}
    yield printed("engines", {"solvers": solvers, "engines": {"ddpg": ddpg}}, seeds=3)


def traced() -> dict[str, Any]:
    """Two networks, one of which nothing traces, summarized by the script."""
    trace_zoo = importlib.import_module("trace_zoo")
    right = {"covered": True, "cpu_s": 1.5, "dynamic": True, "keys_kept": True, "difference": 0.0}
    wrong = {"covered": False, "error": "no"}
    results = {"one": dict.fromkeys(trace_zoo.TRACERS, right), "two": dict.fromkeys(trace_zoo.TRACERS, wrong)}
    return printed("trace_zoo", results, summary=trace_zoo.summary(results))


def compared() -> dict[str, Any]:
    """Comparisons as the script holds them, one with a bar that is not met."""
    make = importlib.import_module("accuracy").Line
    rank = {"mean": 0.21, "spearman": 0.99}
    lines = [
        make("vu9p-table", "53 layers x 64 bit pairs", 9, "fitted", {"mean": 0.0}, {"mean": 0.03}),
        make("galaxy-s24", "x, float, without the network", 9, "left out", rank, {"mean": 0.20, "spearman": 0.97}),
        make("galaxy-s26", "x, float, without the network", 9, "left out", rank, {"mean": 0.22, "spearman": 0.97}),
        make("v100", "A is its cheapest of three", 3, "unseen", {"order": 1.0, "margin": 0.02}, {"order": 1.0}),
    ]
    return printed("target_accuracy", {"lines": [{**dataclasses.asdict(one), "met": one.met} for one in lines]})


def hosted() -> dict[str, Any]:
    host_accuracy = importlib.import_module("host_accuracy")
    errors = {"host_error": 0.1, "board_error": -0.3}
    results = {
        name: {width: {"measured_ms": ms, "host_ms": 1.1 * ms, "board_ms": 0.7 * ms, **errors} for width in widths}
        for name, ms, widths in zip("abc", (1.0, 2.0, 3.0), [host_accuracy.WIDTHS] * 3, strict=True)
    }
    summary = {about: host_accuracy.summary(results, about) for about in ("host", "board")}
    return printed("host_accuracy", results | {"summary": summary})


def pruned() -> Iterator[dict[str, Any]]:
    yield printed("prune_zoo", {}, summary={"networks": 10, "right": 9})
    yield printed("prune_speed", {"resnet50": {"ratio": 0.32}, "densenet121": {"ratio": 0.1}})
    cut = {"difference_from_masks": 1e-6, "difference_of_file": 2e-4, "faster": [1.9, 1.8, 2.0]}
    yield printed("prune_transformers", {"vit_s16": {"heads": cut, "width": cut}})
    speed = {"cost": 0.4995, "speedup": 1.7, "speedup_quartiles": [1.6, 1.8]}
    yield printed("prune_latency", {"pytorchcv:resnet18": speed}, budget=0.5)
    run = {"fewer": 5.0, "test": 0.90}
    yield printed("sparsify_accuracy", {"dense": 0.9134, "searched": [run, {**run, "test": 0.915}]})


def searched() -> dict[str, Any]:
    """Engines as the script summarizes them: ddpg far ahead of chance, behind exact by more than the spreads."""
    prune_accuracy = importlib.import_module("prune_accuracy")
    tested = {"ddpg": (0.88, 0.89), "uniform": (0.84,), "random": (0.83, 0.85), "exact": (0.93, 0.93), "greedy": (0.8,)}
    parts: list[dict[str, Any]] = [{"what": "recoveries", "test_in_order": 0.91, "test_dense": 0.92}]
    for engine, values in tested.items():
        for seed, value in enumerate(values):
            told = {"test_as_searched": value, "test_in_order": value, "test_tuned": 0.913, "speedup": 2.0}
            limits = {"largest_steps_left": 0.5, "highest_cost": 0.499}
            parts.append({"engine": engine, "seed": seed, **told, **limits})
    return printed("prune_accuracy", {"engines": prune_accuracy.summary(parts), "parts": parts}, budget="0.5")


def quantized() -> Iterator[dict[str, Any]]:
    speed = {"speedup": 1.2, "speedup_quartiles": [1.1, 1.3]}
    one = {
        "fastest": speed,
        "onnxruntime": {"speedup": 1.0},
        "shrink": 3.9,
        "trace_s": 2.0,
        "fold_s": 1.0,
        "quantize_s": 3.0,
    }
    names = importlib.import_module("figures.bits").PEERS
    yield printed("export", dict.fromkeys(names, one))
    products = {"layers alone": {"times_as_fast": 1.8}, "with products": {"times_as_fast": 1.7}}
    yield printed("quantize_attention", {"vit_tiny_4": products})
    names = ("W8A8 rounded", "W4A8 rounded", "W4A4 rounded", "W8A8 data-free")
    yield printed("quantize_accuracy", {"float": 0.92, **{name: {"accuracy": 0.918} for name in names}})
    ratios = {"observed": 0.65, "fixed": 0.5, "learned": 0.4}
    yield printed("qat_step", {"step": ratios})


def mixed() -> Iterator[dict[str, Any]]:
    """Mixed bits ahead everywhere but by energy; policies best at home but one; an agent that was transferred."""
    costs = {
        "bops": (4, 5, 6),
        "zynq7020:latency": (4, 5, 6),
        "vu9p:latency": (4, 5, 6),
        "bitfusion:energy": (4, 5, 6),
        "size": (2, 3, 4),
    }
    lines = [
        {
            "network": network,
            "seed": seed,
            "cost": cost,
            "bits": bits,
            "kind": kind,
            "accuracy": accuracy + 0.001 * seed,
        }
        for network in ("mobilenet_v1", "mobilenet_v2")
        for cost, widths in {**costs, "size": (2, 3, 4)}.items()
        for bits in widths
        for kind, accuracy in (("uniform", 0.91), ("mixed", 0.905 if cost.endswith("energy") else 0.92))
        for seed in (0, 1)
    ]
    yield printed("mixed_precision", {"all": [{"network": "mobilenet_v1", "bits": "float", "accuracy": 0.93}, *lines]})
    names = ("HW1", "HW2", "HW3")
    made: list[dict[str, Any]] = []
    for home in names:
        key = {"network": "mobilenet_v1", "bits": 4, "for": home}
        latency = {here: 1.0 if here == home else 1.1 for here in names}
        made.append({**key, "kind": "equal_loss", "on": "", "latency_us": latency})
        for here in names:
            worth = {"loss": 0.1 if here == home else 0.2, "accuracy": 0.9 if (home, here) != ("HW1", "HW2") else 0.95}
            made.append({**key, "kind": "equal_latency", "on": here, **worth})
    yield printed("specialization", {"all": made})
    scores = {"uniform": -0.067, "transferred": -0.031, "afresh, all": -0.025, "afresh, few": -0.06}
    agents = [{"bits": 4, "kind": kind, "score": score, "accuracy": 0.9} for kind, score in scores.items()]
    yield printed("transfer", {"all": agents})


def operators() -> Iterator[dict[str, Any]]:
    device = {"best_at_home": True, "order_kept": True, "largest_error": 0.01}
    devices = dict.fromkeys(("v100", "xeon-e5-2640v4"), device) | {"pixel1": {**device, "order_kept": False}}
    yield printed("nas_published", {"devices": devices})
    nas_memory = importlib.import_module("nas_memory")
    held = {"weights": 100, "activations": 400}
    steps = ("weights step", "architecture step, two gates", "relaxation")
    memory = {name: nas_memory.ratios(held, held, 4) for name in steps}
    times = {name: {"median_ratio": 1.4, "all": [1.2, 1.6]} for name in steps}
    groups = importlib.import_module("figures.operators")
    yield printed("nas_memory", {groups.MEMORY: memory, groups.TIME: times})
    yield printed("nas_search", {"runs": list(of_operators())})
    points = {"operators": (0.85, 0.86), "channels": (0.84,), "6 bits": (0.84, 0.84), "all": (0.86, 0.855)}
    ways = [
        {"seed": seed, "point": 0.45, "samples": 20_000, "way": way, "accuracy": value}
        for way, values in points.items()
        for seed, value in enumerate(values)
    ]
    yield printed("three_passes", {"all": ways})
    runs = {"a on pixel1": {"exit_code": 0, "finite": True}, "b on host": {"exit_code": 3, "error": "over"}}
    census = {"a": {"blocks": 3, "lowered": "yes"}, "b": {"blocks": 0}, "c": {"skipped": "not installed"}}
    census["d"] = {"blocks": 1, "lowered": "Costs outside of blocks depend on what these compute: 1 (zero)."}
    yield printed("select_zoo", {"census": census, "runs": runs})


def of_operators() -> Iterator[dict[str, Any]]:
    """Searches for three targets: different networks, of which that for the phone is the cheapest everywhere."""
    devices = ("v100", "xeon-e5-2640v4", "pixel1")
    accuracies = {"binary": 0.85, "random": 0.85, "evolution": 0.845, "relaxed": 0.90, "baseline": 0.84}
    for device in devices:
        for method, accuracy in accuracies.items():
            key = {"seed": 0, "device": device, "method": method}
            latency = dict.fromkeys(devices, 1.0 if device == "pixel1" else 2.0)
            yield {"what": "network", **key, "accuracy": accuracy, "latency_ms": latency}
            if method != "baseline":
                yield {"what": "search", **key, "operators": [device]}


def documents() -> dict[str, dict[str, Any]]:
    """What each benchmark might have printed, also under the names of further runs."""
    many = [*speeds(), traced(), compared(), hosted(), *pruned(), searched(), *quantized(), *mixed(), *operators()]
    found = {one["benchmark"]: one for one in many}
    again = ("mixed_precision-tuned", "prune_accuracy-v1", "prune_accuracy-pixel1", "prune_latency-pixel1")
    return found | {name: found[name.partition("-")[0]] for name in (*again, "qat_step-memory")}


def rows(figures: ModuleType, table: ModuleType) -> dict[tuple[str, str], Any]:
    said: list[str] = []
    found = table.updated(figures.BARS, documents(), {}, said.append)
    return {(row.benchmark, row.what): row for row in found}


def test_every_benchmark_is_held_to_something(figures: ModuleType) -> None:
    names = {path.stem for path in (ROOT / "benchmarks").glob("*.py")}
    assert {bar.script for bar in figures.BARS} == {name for name in names if not name.startswith("calibrate_")}
    keys = [(bar.benchmark, bar.what) for bar in figures.BARS]
    assert len(set(keys)) == len(keys)


def test_make_runs_everything_that_the_table_tells_of(figures: ModuleType) -> None:
    (line,) = re.findall(r"^BENCH\s*\?=(.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    further = {bar.benchmark for bar in figures.BARS if "-" in bar.benchmark}
    assert {word for word in line.split() if "-" in word} == further


def test_the_page_has_a_row_for_each_figure(figures: ModuleType, table: ModuleType) -> None:
    stands = table.rows_of((ROOT / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8"))
    told = [(row.benchmark, row.what, row.wanted) for row in stands.values()]
    assert told == [(bar.benchmark, bar.what, bar.wanted.text) for bar in figures.BARS]
    for row in stands.values():
        assert row.met in (("yes", "no") if row.wanted and row.figure != table.NOT_RUN else ("",)), row


def test_the_readme_quotes_what_stands_in_the_table(table: ModuleType) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8").partition("## What is measured")[2].partition("\n## ")[0]
    quoted = {number for line in readme.splitlines() if line.startswith("| ") for number in NUMBER.findall(line)}
    stands = table.rows_of((ROOT / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8")).values()
    assert len(quoted) > 9
    assert quoted <= {number for row in stands for number in NUMBER.findall(f"{row.what} {row.figure}")}


EXPECTED = {
    ("demo", "the demonstration: accuracy lost at half of the MACs and 8 bits"): (
        "0.5 points (98.0% to 97.5%, 50% of the MACs)",
        "yes",
    ),
    ("trace_zoo", "architectures traced, equal within 1e-6"): (
        "1 of 2; `torch.export` 1, `torch.fx.symbolic_trace` 1",
        "yes",
    ),
    ("import_time", "`import fxopt`"): ("4 ms", "yes"),
    ("import_time", "`import fxopt.targets`"): ("torch, 4 ms", "no"),
    ("lowering", "lowering ResNet-50"): ("60 ms", "no"),
    ("lowering", "lowering, time of a node in the longest chain over the shortest"): (
        "1.50 times, 160 us (1,250 nodes) to 240 us (20,000 nodes)",
        "yes",
    ),
    ("scoring", "a target's table of bits for MobileNetV2"): ("2.0 to 51.0 ms, most for `bitfusion`", "no"),
    ("scoring", "scoring channels, times as fast as NumPy"): ("`pixel1` 3, `v100` 3", "no"),
    ("engines", "`ddpg` above the optimum after 600 episodes"): ("0.29% median, 2.00% at most, 3 seeds", "no"),
    ("target_accuracy", "NPUs of phones, float, each network left out"): ("21.0%, most for `galaxy-s24`", "no"),
    ("target_accuracy", "networks are cheapest where they were made for"): ("1 of 1, by at least 2.0%", "yes"),
    ("host_accuracy", "a board's file, networks in floats"): ("mean 30.0%, worst 30%, 3 networks", "no"),
    ("prune_zoo", "architectures cut to half of their channels that are right"): ("9 of 10 (90.0%)", "no"),
    ("prune_transformers", "ViT and BERT, half of heads and hidden units: relative difference"): (
        "at most 1e-06 from masks, 2e-04 in onnxruntime",
        "no",
    ),
    ("prune_accuracy", "MobileNetV2 at 50% MACs, nothing trained"): (
        "88.50% ± 0.71, 2 seeds (the uniform cut 91.00%, dense 92.00%)",
        "no",
    ),
    ("prune_accuracy-v1", "MobileNetV1 at 50% MACs, `ddpg` against `uniform` and `random`"): (
        "4.5 points before `uniform` (spreads 0.7), 4.5 points before `random` (spreads 2.1)",
        "yes",
    ),
    ("prune_accuracy-v1", "the same, `ddpg` against `exact` and `greedy`"): (
        "`ddpg` 88.50% ± 0.71, 2 seeds; `exact` 93.0% ± 0.0; `greedy` 80.0% ± 0.0",
        "no",
    ),
    ("sparsify_accuracy", "ResNet of bottlenecks, fewer weights at equal accuracy"): (
        "5.00 times fewer at 90.00 to 91.50% (dense 91.34%), 2 seeds",
        "no",
    ),
    ("export", "ResNet-50 to 8 bits after training"): (
        "6.0 s (trace 2.0, fold 1.0, quantize 3.0), with calibration on 16 images",
        "yes",
    ),
    ("quantize_accuracy", "MobileNetV2 after training, W4A8, weights rounded by moments"): (
        "0.20 points of 92.00%",
        "no",
    ),
    ("mixed_precision", "MobileNetV2, mixed bits at the bit operations of W5A5"): (
        "92.05 ± 0.07%, 2 seeds; the same bits 91.05 ± 0.07%",
        "yes",
    ),
    ("mixed_precision", "mixed against the same bits, energy"): (
        "0 of 6, by -0.50 points, least for mobilenet_v1 at 4 bits, bitfusion:energy",
        "no",
    ),
    ("specialization", "policies of equal loss on HW1 to HW3"): ("3 of 3 fastest at home", "yes"),
    ("specialization", "policies of equal latency on HW1 to HW3, accuracy"): ("2 of 3 best at home", "no"),
    ("transfer", "agent from MobileNetV1 on MobileNetV2, 15 episodes"): (
        "divergence 0.031; the same bits 0.067, ten times the episodes 0.025",
        "yes",
    ),
    ("nas_published", "the same, order of the three kept"): (
        "2 of 3, not on `pixel1`; latencies off by at most `v100` 1.0%, `xeon-e5-2640v4` 1.0%, `pixel1` 1.0%",
        "no",
    ),
    ("nas_search", "supernet of two gates for three targets, networks"): ("3 of 3 pairs differ, one seed", "yes"),
    ("nas_search", "supernet of two gates for three targets, cheapest at home"): (
        "1 of 3, not on `v100`, `xeon-e5-2640v4`, one seed",
        "no",
    ),
    ("nas_search", "supernet of two gates for three targets, accuracy over that of `random`"): (
        "`v100` 0.00, `xeon-e5-2640v4` 0.00, `pixel1` 0.00 points",
        "yes",
    ),
    ("nas_search", "supernet of two gates for three targets, accuracy over that of `relaxed`"): (
        "`v100` -5.00, `xeon-e5-2640v4` -5.00, `pixel1` -5.00 points",
        "no",
    ),
    ("nas_memory", "time of a step of a supernet over its path's"): (
        "weights step 1.40 (1.20 to 1.60); architecture step, two gates 1.40 (1.20 to 1.60); "
        "relaxation 1.40 (1.20 to 1.60)",
        "no",
    ),
    ("three_passes", "operators, channels and bits against each part"): (
        "3 of 3, by 0.25 to 2.00 points, least before operators at 45%, 20,000 images",
        "yes",
    ),
    ("select_zoo", "one command from a network to a checked ONNX file"): ("1 of 2; not b on host", "no"),
    ("select_zoo", "networks in which blocks are found"): ("2 of 3 networks, 4 blocks", ""),
    ("select_zoo", "candidates of all of their blocks have costs"): ("1 of 2; not d", "no"),
}


def test_figures_are_told_and_compared_with_what_is_wanted(figures: ModuleType, table: ModuleType) -> None:
    found = rows(figures, table)
    assert {key: (found[key].figure, found[key].met) for key in EXPECTED} == EXPECTED
    partial = {"target_accuracy"}  # of which a test has few of many lines
    assert [key for key, row in found.items() if row.figure == table.NOT_RUN and key[0] not in partial] == []
    told = {(row.date, row.processor) for row in found.values() if row.figure != table.NOT_RUN}
    assert told == {("2026-03-04", "A | B")}


def test_a_result_that_lacks_a_figure_says_so_and_the_row_stays(figures: ModuleType, table: ModuleType) -> None:
    old = {
        (bar.benchmark, bar.what): table.Row(bar.what, "then", "as it was", "no", bar.benchmark, "2025-01-01", "C")
        for bar in figures.BARS
    }
    empty = {bar.benchmark: printed(bar.script, {}, seeds=1, budget=0.5) for bar in figures.BARS}
    said: list[str] = []
    for bar, row in zip(figures.BARS, table.updated(figures.BARS, empty, old, said.append), strict=True):
        assert row == dataclasses.replace(old[bar.benchmark, bar.what], wanted=bar.wanted.text)
    assert len(said) == len(figures.BARS)


def page_of(table: ModuleType, rows: list[Any]) -> str:
    return f"# Results\n\nbefore\n\n{table.BEGIN}\n\n{table.render(rows)}\n{table.END}\n\nbehind | x |\n"


def test_a_page_keeps_its_text_and_the_rows_of_what_was_not_run(
    figures: ModuleType, table: ModuleType, tmp_path: Path
) -> None:
    page, bars = tmp_path / "RESULTS.md", figures.BARS[:4]
    kept = table.Row(bars[0].what, "old", "1 | 2", "no", bars[0].benchmark, "2026-01", "a processor")
    page.write_text(page_of(table, [kept, table.Row("gone", "", "1", "", "import_time")]), encoding="utf-8")
    given = {"trace_zoo": traced()}
    first = table.rewrite(page, bars, given, print)
    assert first[0] == dataclasses.replace(kept, wanted=bars[0].wanted.text)
    assert [row.figure == table.NOT_RUN for row in first] == [False, True, False, False]
    text = page.read_text(encoding="utf-8")
    assert text.startswith("# Results\n\nbefore\n\n<!--")
    assert text.endswith("-->\n\nbehind | x |\n")
    assert list(table.rows_of(text).values()) == first
    assert table.rewrite(page, bars, {}, print) == first
    assert page.read_text(encoding="utf-8") == text
    assert [path.name for path in tmp_path.iterdir()] == ["RESULTS.md"]


@pytest.mark.parametrize("broken", ["no marks", "{END}\n{BEGIN}\n", "{BEGIN}\n| a |\n| - |\n| 1 | 2 |\n{END}\n"])
def test_a_page_without_a_sound_table_is_left_alone(
    figures: ModuleType, table: ModuleType, tmp_path: Path, broken: str
) -> None:
    page = tmp_path / "RESULTS.md"
    page.write_text(broken.format(BEGIN=table.BEGIN, END=table.END), encoding="utf-8")
    before = page.read_bytes()
    with pytest.raises(table.FigureError, match="table of figures"):
        table.rewrite(page, figures.BARS, {}, print)
    assert page.read_bytes() == before


@pytest.mark.parametrize("text", ["", "[1]", "{}", '{"benchmark": "lowering"}'])
def test_a_file_that_no_benchmark_printed_is_named(table: ModuleType, tmp_path: Path, text: str) -> None:
    (tmp_path / "scoring.json").write_text(text, encoding="utf-8")
    with pytest.raises(table.FigureError, match=r"scoring\.json"):
        table.read_documents(tmp_path)


def test_results_are_found_by_the_name_of_their_run(table: ModuleType, tmp_path: Path) -> None:
    assert table.read_documents(tmp_path / "none") == {}
    (tmp_path / "qat_step-memory.json").write_text(json.dumps(printed("qat_step", {})), encoding="utf-8")
    (tmp_path / "scoring.part").write_text("half", encoding="utf-8")
    assert list(table.read_documents(tmp_path)) == ["qat_step-memory"]


def test_the_environment_tells_when_and_on_what(scripts: None) -> None:
    found: Mapping[str, Any] = importlib.import_module("common.output").environment()
    assert datetime.fromisoformat(found["date"]).utcoffset() == timedelta(0)
    assert found["processor"]
    assert found["cores"] >= 1


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder in which make finds a sound and a failing benchmark, and figures that say what they see."""
    for name in ("pyproject.toml", "setup.py", "constraints.txt"):
        (tmp_path / name).touch()
    (tmp_path / "Makefile").symlink_to(ROOT / "Makefile")
    files = {
        ".venv/bin/python": f'#!/bin/sh\nexec "{sys.executable}" "$@"\n',
        ".venv/.fxopt-installed": "",
        "benchmarks/right.py": "import sys; print(sys.argv[1:]); open('count', 'a').write('right ')",
        "benchmarks/wrong.py": "print('half'); open('count', 'a').write('wrong '); raise SystemExit(3)",
        "benchmarks/calibrate_it.py": "raise SystemExit(4)",
        "benchmarks/figures/__main__.py": "open('count', 'a').write('figures ')",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    (tmp_path / ".venv/bin/python").chmod(0o755)
    return tmp_path


def test_make_goes_on_behind_a_benchmark_that_fails_and_runs_none_again(clone: Path) -> None:
    def bench(*words: str) -> tuple[int, list[str]]:
        (clone / "count").write_text("", encoding="utf-8")
        command = ["make", "-C", str(clone), "bench", *words]
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
        done = subprocess.run(command, capture_output=True, check=False, env=kept)
        return done.returncode, (clone / "count").read_text(encoding="utf-8").split()

    status, ran = bench("BENCH=wrong right qat")
    assert (status != 0, ran) == (True, ["wrong", "right", "figures"])
    assert (clone / "benchmarks/out/right.json").read_text(encoding="utf-8") == "[]\n"
    assert not (clone / "benchmarks/out/wrong.json").exists()
    assert bench("BENCH=right") == (0, ["figures"])
    os.utime(clone / "benchmarks/right.py", (2_000_000_000, 2_000_000_000))
    assert bench("BENCH=right right-again") == (0, ["right", "right", "figures"])
    assert (clone / "benchmarks/out/right-again.json").is_file()
    assert bench()[0] != 0  # calibrate_it is none of them, and wrong is
