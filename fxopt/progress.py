"""Telling how far something is: one small reporter, silent unless somebody watches."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from operator import length_hint
from typing import TYPE_CHECKING, Protocol, TextIO, TypeVar, runtime_checkable

from fxopt.errors import FxoptError

if TYPE_CHECKING:
    from rich import progress as rich_progress

__all__ = ["LineProgress", "Progress", "RichProgress", "Silent", "during", "reporter", "tracked", "watched"]

_Item = TypeVar("_Item")


@runtime_checkable
class Progress(Protocol):
    """Told how far tasks are. Tasks are known by name, and several may run at once."""

    def start(self, task: str, total: int) -> None:
        """``task`` begins and has ``total`` steps; 0 if nobody knows."""

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

    def close(self) -> None:
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
        self._tasks[task] = self._bars.add_task(task, total=total or None, note="")

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


class LineProgress:
    """Lines with elapsed and remaining time, for a log: when a task begins, when it ends, and now and then between.

    Args:
        stream: Where to write.
        every_s: Seconds between two lines of a task, at least.
        clock: Seconds that only grow.
    """

    def __init__(self, stream: TextIO, every_s: float = 10.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._every_s = every_s
        self._clock = clock
        self._tasks: dict[str, _Task] = {}

    def start(self, task: str, total: int) -> None:
        """Say that ``task`` begins."""
        now = self._clock()
        self._tasks[task] = _Task(total, now, now)
        self._say(self._tasks[task].line(task))

    def advance(self, task: str, n: int = 1, note: str = "") -> None:
        """Say how far ``task`` is, if the last line is old enough; a task that was not started is ignored."""
        known = self._tasks.get(task)
        if known is None:
            return
        known.done += n
        known.note = note or known.note
        now = self._clock()
        if now - known.told_s < self._every_s or 0 < known.total <= known.done:
            return
        known.told_s = now
        spent_s = now - known.began_s
        left_s = spent_s / known.done * (known.total - known.done) if known.done else 0.0
        left = f", about {_clock_time(left_s)} left" if known.total else ""
        self._say(f"{known.line(task)}, {_clock_time(spent_s)} gone{left}{known.tail()}")

    def finish(self, task: str) -> None:
        """Say that ``task`` has ended."""
        known = self._tasks.pop(task, None)
        if known is not None:
            self._say(f"{known.line(task)} in {_clock_time(self._clock() - known.began_s)}{known.tail()}")

    def close(self) -> None:
        """Forget what is still running."""
        self._tasks.clear()

    def _say(self, text: str) -> None:
        self._stream.write(text + "\n")
        self._stream.flush()


@dataclass
class _Task:
    total: int
    began_s: float
    told_s: float
    done: int = 0
    note: str = ""

    def line(self, name: str) -> str:
        return f"{name}: {self.done} of {self.total}" if self.total else f"{name}: {self.done}"

    def tail(self) -> str:
        return f" ({self.note})" if self.note else ""


def _clock_time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


def watched(stream: TextIO) -> RichProgress | LineProgress:
    """Bars if ``stream``, which is stderr, is a terminal, and lines if it is a file or a pipe."""
    return RichProgress() if stream.isatty() else LineProgress(stream)


@contextmanager
def during(show: Progress, task: str) -> Iterator[None]:
    """Show ``task``, of a single step, while something runs; it ends with an error, too."""
    show.start(task, 1)
    try:
        yield
        show.advance(task)
    finally:
        show.finish(task)


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


def tracked(items: Iterable[_Item], show: Progress, task: str) -> Iterator[_Item]:
    """The items one by one; ``show`` is told of each that is done, and of their number where they tell it."""
    show.start(task, length_hint(items))
    try:
        for item in items:
            yield item
            show.advance(task)
    finally:
        show.finish(task)


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
