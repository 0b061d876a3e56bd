"""Telling how far something is: one small reporter, silent unless somebody watches."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from fxopt.errors import FxoptError

if TYPE_CHECKING:
    from rich import progress as rich_progress

__all__ = ["Progress", "RichProgress", "Silent", "reporter"]


@runtime_checkable
class Progress(Protocol):
    """Told how far tasks are. Tasks are known by name, and several may run at once."""

    def start(self, task: str, total: int) -> None:
        """``task`` begins and has ``total`` steps."""

    def advance(self, task: str, n: int = 1, note: str = "") -> None:
        """``n`` more steps of ``task`` are done; ``note`` says what came of the last."""

    def finish(self, task: str) -> None:
        """``task`` has ended."""


class Silent:
    """Shows nothing."""

    def start(self, task: str, total: int) -> None:
        """Do nothing."""

    def advance(self, task: str, n: int = 1, note: str = "") -> None:
        """Do nothing."""

    def finish(self, task: str) -> None:
        """Do nothing."""


class RichProgress:
    """Bars with elapsed and remaining time on stderr; shows nothing where stderr is no terminal."""

    def __init__(self) -> None:
        self._bars: rich_progress.Progress | None = None
        self._tasks: dict[str, rich_progress.TaskID] = {}

    def start(self, task: str, total: int) -> None:
        """Show a bar for ``task``."""
        if not sys.stderr.isatty():
            return
        if task in self._tasks:
            self.finish(task)
        if self._bars is None:
            self._bars = _make_bars()
            self._bars.start()
        self._tasks[task] = self._bars.add_task(task, total=total, note="")

    def advance(self, task: str, n: int = 1, note: str = "") -> None:
        """Move the bar of ``task``; a task that was not started is ignored."""
        if self._bars is not None and task in self._tasks:
            self._bars.update(self._tasks[task], advance=n, note=note)

    def finish(self, task: str) -> None:
        """Leave the bar of ``task`` as it is; give the terminal back after the last one."""
        if self._bars is None or self._tasks.pop(task, None) is None:
            return
        if not self._tasks:
            self._bars.stop()
            self._bars = None

    def close(self) -> None:
        """Give the terminal back, whatever is still running."""
        for task in tuple(self._tasks):
            self.finish(task)


def reporter(progress: bool | Progress | None) -> Progress:
    """The reporter that ``progress`` asks for.

    Args:
        progress: True for bars on a terminal, False or None for silence, or a reporter of one's own.

    Raises:
        FxoptError: If it is something else.
    """
    if progress is None or progress is False:
        return Silent()
    if progress is True:
        return RichProgress()
    if isinstance(progress, Progress):
        return progress
    raise FxoptError(f"progress is True, False or an object with start, advance and finish; got {progress!r}.")


def _make_bars() -> rich_progress.Progress:
    from rich import progress as rich_progress
    from rich.console import Console

    return rich_progress.Progress(
        rich_progress.TextColumn("{task.description}", markup=False),
        rich_progress.BarColumn(),
        rich_progress.MofNCompleteColumn(),
        rich_progress.TimeElapsedColumn(),
        rich_progress.TimeRemainingColumn(),
        rich_progress.TextColumn("{task.fields[note]}", markup=False),
        console=Console(stderr=True),
    )
