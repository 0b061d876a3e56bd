"""Bring the table of figures in ``RESULTS.md`` up to date with what benchmarks have printed.

A row whose benchmark has no result in the folder stays as it is. The command is part of ``make bench``; by itself it is
``PYTHONPATH=benchmarks python -m figures``, in a clone of the repository.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from common.output import progress

from figures import BARS
from figures.table import NOT_RUN, FigureError, read_documents, rewrite

HERE = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "out", help="folder of the benchmarks' results")
    parser.add_argument("--page", type=Path, default=HERE / "RESULTS.md")
    options = parser.parse_args()
    try:
        rows = rewrite(options.page, BARS, read_documents(options.out), progress)
    except FigureError as failure:
        sys.exit(str(failure))
    counts = {told: sum(row.met == told for row in rows) for told in ("yes", "no")}
    missing = sum(row.figure == NOT_RUN for row in rows)
    progress(f"{options.page}: {counts['yes']} met, {counts['no']} not met, {missing} not run.")


if __name__ == "__main__":
    main()
