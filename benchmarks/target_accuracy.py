"""Compare every target with published measurements; print a table on stderr and JSON on stdout.

The figures lie in a folder (``--data``, or the environment variable FXOPT_SHARED_DATA); a comparison whose figures are
not there is left out. Errors are relative to the measurement. ``evidence`` tells fitted points from points that were
left out of the fit or never seen.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import os
import pkgutil
from pathlib import Path

import accuracy
from accuracy import Line
from common.output import finish, progress


def collect(data: Path, families: list[str]) -> list[Line]:
    """The lines of all families, or of some."""
    known = sorted(info.name for info in pkgutil.iter_modules(accuracy.__path__) if not info.name.startswith("_"))
    lines: list[Line] = []
    for name in known:
        if not families or name in families:
            lines += importlib.import_module(f"accuracy.{name}").lines(data)
    return lines


def show(line: Line) -> str:
    figures = ", ".join(
        f"{name} {value:.4g}" + (f" (bar {line.bar[name]:g})" if name in line.bar else "")
        for name, value in line.figure.items()
    )
    verdict = "met" if line.met else "SHORT"
    return f"{verdict:5}  {line.target:20} {line.evidence:9} {line.points:6d}  {line.against}: {figures}"


def _given_folder() -> Path | None:
    given = os.environ.get("FXOPT_SHARED_DATA")
    return Path(given) if given else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help="families to compare; all by default")
    parser.add_argument("--data", type=Path, default=_given_folder(), help="folder of the figures")
    options = parser.parse_args()
    if options.data is not None and not options.data.is_dir():
        parser.error(f"{options.data} is no folder; give that of the published figures")
    if options.data is None:
        progress("No folder of published figures: nothing is compared. Give --data or set FXOPT_SHARED_DATA.")
    lines = collect(options.data, options.families) if options.data is not None else []
    for line in lines:
        progress(show(line))
    finish("target_accuracy", {"lines": [{**dataclasses.asdict(line), "met": line.met} for line in lines]})


if __name__ == "__main__":
    main()
