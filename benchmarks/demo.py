"""Run ``fxopt demo`` in a process of its own: how long it takes, and what is left of the accuracy; print JSON.

``wall_s`` and ``cpu_s`` are for everything from the start of the interpreter to the checked ONNX file and the report;
``before`` and ``after`` are the report's metrics of the trained and of the optimized network.

    python benchmarks/demo.py > demo.json
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common.output import finish, progress

COMMAND = "import sys; from fxopt.cli import main; sys.exit(main())"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    seed = parser.parse_args().seed
    root = Path(__file__).resolve().parent.parent
    paths = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    progress("fxopt demo")
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        words = ["demo", "--json", "--quiet", "--out", folder, "--seed", str(seed)]
        done = subprocess.run(
            [sys.executable, "-c", COMMAND, *words],
            env={**os.environ, "PYTHONPATH": paths},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        wall_s = time.perf_counter() - start
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    told = json.loads(done.stdout)
    times = {"wall_s": round(wall_s, 1), "cpu_s": round(used.ru_utime + used.ru_stime, 1)}
    metrics = {name: told["report"][name] for name in ("before", "after")}
    finish("demo", {**times, **metrics, "onnx_accuracy": told["report"]["export"]["accuracy"]}, seed=seed)


if __name__ == "__main__":
    main()
