"""Time and memory: importing, tracing, lowering, scoring, engines."""

from __future__ import annotations

from figures.bar import REPORTED, Bar, Document, Found, Wanted, at_least, at_most, between, counted, has_to, some

LARGEST_GROWTH = 2.0
"""Of the time of a node from the smallest chain to the largest, sixteen times as long, that still is called linear."""


def _traced(document: Document) -> Found:
    told = document["summary"]
    both = [one for one in document["results"].values() if "skipped" not in one and one["torch.export"]["covered"]]
    missed = sum(not one["fxopt"]["covered"] for one in both)
    others = ", ".join(f"`{name}` {told[name]['covered']}" for name in ("torch.export", "torch.fx.symbolic_trace"))
    return Found(missed, f"{told['fxopt']['covered']} of {told['networks']}; {others}")


def _tracing_time(document: Document) -> Found:
    mine = document["summary"]["fxopt"]
    ratio = mine["median_ratio_to_export"]
    text = f"{mine['median_cpu_s']:.2f} s median, {mine['max_cpu_s']:.1f} s at most; {ratio:.2f} times `torch.export`"
    return Found(ratio, text)


def _import(document: Document) -> Found:
    taken = 1e3 * document["results"]["import fxopt"]["cpu_s"]
    return Found(taken, f"{taken:.0f} ms")


def _import_targets(document: Document) -> Found:
    found = document["results"]["import fxopt.targets"]
    loads = found["loads_torch"]
    return Found(not loads, f"{'torch' if loads else 'no torch'}, {1e3 * found['cpu_s']:.0f} ms")


def _resnet(document: Document) -> Found:
    taken = document["results"]["resnet50"]["ms"]
    return Found(taken, f"{taken:.0f} ms")


def _linear(document: Document) -> Found:
    chains = some((one for one in document["results"].values() if "us_per_node" in one), "chains")
    small, large = (pick(chains, key=lambda one: one["nodes"]) for pick in (min, max))
    growth = large["us_per_node"] / small["us_per_node"]
    ends = " to ".join(f"{one['us_per_node']:.0f} us ({one['nodes']:,} nodes)" for one in (small, large))
    return Found(growth, f"{growth:.2f} times, {ends}")


def _rows_anew(document: Document) -> Found:
    found = {name: document["results"][name] for name in ("pixel1", "v100")}
    each = [f"`{name}` {one['speedup']:.0f} ({one['ns_per_operator']:.1f} ns)" for name, one in found.items()]
    return Found(min(one["speedup"] for one in found.values()), ", ".join(each))


def _bits(document: Document) -> Found:
    values = some((one["ns_per_operator"] for one in document["results"]["bits"].values()), "bits")
    return Found(max(values), f"{between(values)} ns, {len(values)} targets")


def _bits_to_numpy(document: Document) -> Found:
    values = some((one["speedup_over_numpy"] for one in document["results"]["bits"].values()), "bits")
    return Found(min(values), between(values, 1))


def _bits_to_python(document: Document) -> Found:
    values = some((one["speedup_over_python"] for one in document["results"]["bits"].values()), "bits")
    return Found(min(values), between(values, 0))


def _tables(document: Document) -> Found:
    built = {name: one["build_ms"] for name, one in document["results"]["bits"].items()}
    slowest = max(built, key=built.__getitem__)
    return Found(built[slowest], f"{between(list(built.values()), 1)} ms, most for `{slowest}`")


def _channels(document: Document) -> Found:
    found = document["results"]["channels"]
    medians = some((one["ns_per_operator"] for one in found.values()), "channels")
    least = between([one["best_ns_per_operator"] for one in found.values()], 1)
    slowest = max(found, key=lambda name: found[name]["ns_per_operator"])
    text = f"{between(medians, 1)} ns, {len(medians)} targets, most for `{slowest}`; least of the samples {least}"
    return Found(max(medians), text)


def _channels_to_numpy(document: Document) -> Found:
    found = document["results"]["channels"].items()
    ratios = {name: one["speedup_over_numpy"] for name, one in found if "speedup_over_numpy" in one}
    least = min(some(ratios.values(), "NumPy"))
    return Found(least, ", ".join(f"`{name}` {ratio:.0f}" for name, ratio in ratios.items()))


def _channels_to_python(document: Document) -> Found:
    ratio = document["results"]["channels"]["v100"]["speedup_over_python"]
    return Found(ratio, f"`v100` {ratio:.0f}")


def _two_threads(document: Document) -> Found:
    found = document["results"]["threads"]
    best, processes = found["two_threads_best"], found["two_processes"]
    text = f"{found['two_threads']:.2f}, at best {best:.2f}; two processes at the same time {processes:.2f}"
    return Found(found["two_threads"], text)


def _streamed(document: Document) -> Found:
    grown = some((one["peak_memory_grew_mb"] for one in document["results"]["streamed"].values()), "streams")
    return Found(max(grown), f"{max(grown):.0f} MB")


def _amc_episode(document: Document) -> Found:
    median, (low, _, high) = (document["results"][f"episode_ms_{one}"] for one in ("median", "quartiles"))
    return Found(median, f"{median:.0f} ms ({low:.0f} to {high:.0f})")


def _episodes(problem: str) -> Bar:
    def of(document: Document) -> Found:
        found = {name: one for name, one in document["results"].items() if name.startswith(f"{problem}, ")}
        wide = {name: one for name, one in found.items() if name.endswith(" 300 units")}
        medians = some((one["ms_per_episode"] for one in wide.values()), problem)
        means = between([one["ms_on_average"] for one in wide.values()], 1)
        return Found(max(medians), f"{between(medians, 1)} ms by mask and decrease (means {means})")

    what, wanted = ("bits of MobileNetV2", at_most(45, " ms")) if problem == "haq" else ("MobileNetV1", REPORTED)
    return Bar("search_overhead", f"`ddpg`, an episode without accuracy, {what}", wanted, of)


def _solve(document: Document) -> Found:
    found = document["results"]["solvers"]
    text = f"{found['solve_ms_median']:.1f} ms median, {found['solve_ms_most']:.1f} ms at most"
    return Found(found["solve_ms_most"], f"{text}; HiGHS alone {found['milp_alone_ms_median']:.0f} ms median")


def _ddpg_to_optimum(document: Document) -> Found:
    found = document["results"]["engines"]["ddpg"]
    median, most = (100 * found[name] for name in ("of_optimum", "of_optimum_most"))
    return Found(most, f"{median:.2f}% median, {most:.2f}% at most, {counted(document['seeds'], 'seed')}")


def _operator_tables(document: Document) -> Found:
    found = document["results"]["targets"].values()
    taken = some((one["table_ms"] for one in found if "table_ms" in one), "tables")
    refused = len(found) - len(taken)
    text = f"{between(taken, 0)} ms, {len(taken)} targets" + (
        f" ({refused} cannot cost a candidate)" if refused else ""
    )
    return Found(max(taken), f"{text}; lowering the candidates, once, {document['results']['lowering_s']:.1f} s")


def _demo_accuracy(document: Document) -> Found:
    before, after = (100 * document["results"][name]["accuracy"] for name in ("before", "after"))
    share = document["results"]["after"]["macs"] / document["results"]["before"]["macs"]
    return Found(
        before - after, f"{before - after:.1f} points ({before:.1f}% to {after:.1f}%, {share:.0%} of the MACs)"
    )


def _demo_time(document: Document) -> Found:
    wall, cpu = (document["results"][name] for name in ("wall_s", "cpu_s"))
    return Found(wall, f"{wall:.0f} s, of which {cpu:.0f} s of processor time")


_ALL_BUT_TWO = Wanted("all but 2 of what `torch.export` covers", lambda missed: missed <= 2)
_LINEAR = Wanted(f"linear: at most {LARGEST_GROWTH:g} times", lambda growth: growth <= LARGEST_GROWTH)

BARS = (
    Bar(
        "demo", "the demonstration: accuracy lost at half of the MACs and 8 bits", at_most(1, " point"), _demo_accuracy
    ),
    Bar("demo", "the demonstration, from training to the checked ONNX file", at_most(240, " s"), _demo_time),
    Bar("trace_zoo", "architectures traced, equal within 1e-6", _ALL_BUT_TWO, _traced),
    Bar("trace_zoo", "time to trace", REPORTED, _tracing_time),
    Bar("import_time", "`import fxopt`", at_most(300, " ms"), _import),
    Bar("import_time", "`import fxopt.targets`", has_to("no torch"), _import_targets),
    Bar("lowering", "lowering ResNet-50", at_most(50, " ms"), _resnet),
    Bar("lowering", "lowering, time of a node in the longest chain over the shortest", _LINEAR, _linear),
    Bar("scoring", "scoring rows that all differ, times as fast as NumPy (an operator)", at_least(4), _rows_anew),
    Bar("scoring", "scoring bits, an operator", at_most(1, " ns"), _bits),
    Bar("scoring", "scoring bits, times as fast as NumPy", at_least(4), _bits_to_numpy),
    Bar("scoring", "scoring bits, times as fast as Python", at_least(50), _bits_to_python),
    Bar("scoring", "a target's table of bits for MobileNetV2", at_most(50, " ms"), _tables),
    Bar("scoring", "scoring channels, an operator", at_most(6, " ns"), _channels),
    Bar("scoring", "scoring channels, times as fast as NumPy", at_least(4), _channels_to_numpy),
    Bar("scoring", "scoring channels, times as fast as Python", at_least(50), _channels_to_python),
    Bar("scoring", "scoring channels, two threads over one", at_least(1.7), _two_threads),
    Bar("scoring", "memory for 1,000,000 policies in a stream", at_most(200, " MB"), _streamed),
    Bar(
        "operator_tables",
        "a target's table for the published space of operators",
        at_most(200, " ms"),
        _operator_tables,
    ),
    Bar("amc_overhead", "reconstruction in an episode of AMC, MobileNetV1", at_most(120, " ms"), _amc_episode),
    _episodes("haq"),
    _episodes("amc"),
    Bar("engines", "`exact`, 53 layers of 64 choices", at_most(250, " ms"), _solve),
    Bar("engines", "`ddpg` above the optimum after 600 episodes", at_most(1, "%"), _ddpg_to_optimum),
)
