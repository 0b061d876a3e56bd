"""Measure what ``import fxopt`` and its torch-free parts cost, each in fresh interpreters; print JSON.

Interpreters that import nothing, and those that import one thing, take turns. ``cpu_s`` is the median CPU time of the
import statement, ``process_ratio`` the median CPU time of the whole process over that of the empty one, and
``loads_torch`` whether torch was imported. ``within`` compares with the bar where there is one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys

from common.output import finish, progress

STATEMENTS = ("pass", "import fxopt", "import fxopt.targets", "import fxopt.search", "import fxopt.cli")
BARS_S = {"import fxopt": 0.3}
CODE = """
import json, sys, time
start = time.process_time()
{statement}
end = time.process_time()
print(json.dumps({{"own": end - start, "process": end, "torch": "torch" in sys.modules}}))
"""


def measure(statement: str) -> dict[str, float]:
    """CPU seconds of the statement and of the process so far, in one fresh interpreter."""
    code = CODE.format(statement=statement)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(run.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=11, help="fresh interpreters per statement")
    repeat = parser.parse_args().repeat

    samples: dict[str, list[dict[str, float]]] = {statement: [] for statement in STATEMENTS}
    for turn in range(repeat):
        progress(f"round {turn + 1}/{repeat}")
        for statement in STATEMENTS:
            samples[statement].append(measure(statement))

    empty = statistics.median(sample["process"] for sample in samples["pass"])
    results = {}
    for statement in STATEMENTS[1:]:
        cpu_s = statistics.median(sample["own"] for sample in samples[statement])
        process_s = statistics.median(sample["process"] for sample in samples[statement])
        results[statement] = {
            "cpu_s": round(cpu_s, 4),
            "process_ratio": round(process_s / empty, 2),
            "loads_torch": any(sample["torch"] for sample in samples[statement]),
        }
        if statement in BARS_S:
            results[statement] |= {"bar_s": BARS_S[statement], "within": cpu_s < BARS_S[statement]}
    finish("import_time", results, repeat=repeat)


if __name__ == "__main__":
    main()
