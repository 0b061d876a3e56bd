"""What the command prints: tables for people, JSON for machines, one line for an error."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec

import typer

from fxopt.errors import FxoptError
from fxopt.progress import Progress, RichProgress, Silent, watched

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["FAILED", "INTERRUPTED", "emit_json", "guarded", "only_json", "session", "show", "table"]

FAILED = 1
INTERRUPTED = 130
_WIDTH_OF_PIPES = 140

Params = ParamSpec("Params")


def show(*things: Any) -> None:
    """Print texts and rich tables to stdout; in a pipe, without folding lines to 80 columns."""
    from rich.console import Console

    wide = None if sys.stdout.isatty() or "COLUMNS" in os.environ else _WIDTH_OF_PIPES
    console = Console(width=wide, highlight=False, markup=False, emoji=False)
    for thing in things:
        console.print(thing, soft_wrap=isinstance(thing, str))


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> Table:
    """A table for rich, its cells taken literally; all but the first ``left`` columns are aligned to the right."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    made = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        made.add_column(Text(column), justify="left" if index < left else "right", overflow="fold")
    for row in rows:
        made.add_row(*(Text(cell) for cell in row))
    return made


def emit_json(data: object) -> None:
    """Print ``data`` as JSON to stdout. Numbers that are not finite become strings."""
    sys.stdout.write(json.dumps(_finite(data), indent=1, allow_nan=False) + "\n")


@contextlib.contextmanager
def only_json(active: bool) -> Iterator[None]:
    """While ``active``, what the user's module or a library prints goes to stderr; stdout is for the JSON."""
    if not active:
        yield
        return
    with contextlib.redirect_stdout(sys.stderr):
        yield


@contextlib.contextmanager
def session(as_json: bool, quiet: bool) -> Iterator[Progress]:
    """The time in which a command works, before it shows what came of it.

    Args:
        as_json: Nothing but JSON may come to stdout.
        quiet: Neither progress, nor warnings, nor what the user's module prints may be seen.

    Yields:
        What to tell progress: bars on a terminal and, without JSON, lines in a file, on stderr. The terminal is given
        back whatever happens.
    """
    # A script that reads JSON may read stderr along with it: lines are for people's logs.
    show_progress = Silent() if quiet else RichProgress() if as_json else watched(sys.stderr)
    try:
        with only_json(as_json), _unheard(quiet):
            yield show_progress
    finally:
        show_progress.close()


@contextlib.contextmanager
def _unheard(active: bool) -> Iterator[None]:
    if not active:
        yield
        return
    with (
        Path(os.devnull).open("w", encoding="utf-8") as nowhere,
        contextlib.redirect_stdout(nowhere),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


def guarded(*, resumes: bool = False) -> Callable[[Callable[Params, None]], Callable[Params, None]]:
    """Give a command its exit codes: 1 and a message for an FxoptError, 130 for Ctrl-C.

    Args:
        resumes: Whether the command goes on from what is in its folder when it is run again.
    """

    def decorate(command: Callable[Params, None]) -> Callable[Params, None]:
        @functools.wraps(command)
        def run(*args: Params.args, **kwargs: Params.kwargs) -> None:
            try:
                command(*args, **kwargs)
            except FxoptError as failure:
                _complain(f"Error: {failure}")
                raise typer.Exit(FAILED) from None
            except KeyboardInterrupt:
                again = " Run the same command with the same --out to resume." if resumes else ""
                _complain(f"Interrupted.{again}")
                raise typer.Exit(INTERRUPTED) from None

        return run

    return decorate


def _complain(text: str) -> None:
    sys.stderr.write(text + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
