"""Measure what ``import fxopt`` and its torch-free parts cost, each in fresh interpreters; print JSON.

An interpreter that imports nothing is measured in turn with the others, so the figures can be compared on a busy
machine: ``seconds`` is the median of the import statement's own time, ``process_ratio`` the median wall time of the
whole process over that of the empty one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time

STATEMENTS = ("pass", "import fxopt", "import fxopt.targets", "import fxopt.search", "import fxopt.cli")


def measure(statement: str) -> tuple[float, float]:
    """Return (seconds of the statement, seconds of the whole process) for one fresh interpreter."""
    code = f"import time\nstart = time.perf_counter()\n{statement}\nprint(time.perf_counter() - start)"
    start = time.perf_counter()
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(run.stdout), time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=7, help="fresh interpreters per statement")
    repeat = parser.parse_args().repeat

    samples: dict[str, list[tuple[float, float]]] = {statement: [] for statement in STATEMENTS}
    for _ in range(repeat):
        for statement in STATEMENTS:
            samples[statement].append(measure(statement))

    empty = statistics.median(process for _, process in samples["pass"])
    result = {
        statement: {
            "seconds": round(statistics.median(own for own, _ in pairs), 4),
            "process_ratio": round(statistics.median(process for _, process in pairs) / empty, 2),
        }
        for statement, pairs in samples.items()
        if statement != "pass"
    }
    print(json.dumps({"benchmark": "import_time", "repeat": repeat, "results": result}, indent=2))


if __name__ == "__main__":
    main()
