from __future__ import annotations

import io

import pytest

from fxopt.errors import FxoptError
from fxopt.progress import LineProgress, Progress, RichProgress, Silent, during, reporter, tracked


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def use(bars: Progress) -> None:
    bars.start("search", 3)
    bars.advance("search", 2, "best [0.5]")
    bars.finish("search")


@pytest.mark.parametrize("asked", [None, False])
def test_nothing_is_shown_unless_asked_for(asked: bool | None, capsys: pytest.CaptureFixture[str]) -> None:
    use(reporter(asked))
    assert isinstance(reporter(asked), Silent)
    assert capsys.readouterr() == ("", "")


def test_a_reporter_of_ones_own_is_used_as_it_is() -> None:
    mine = Silent()
    assert reporter(mine) is mine


def test_something_else_is_refused() -> None:
    with pytest.raises(FxoptError, match="start, advance and finish"):
        reporter("yes")  # type: ignore[arg-type]


def test_bars_are_for_terminals(capsys: pytest.CaptureFixture[str]) -> None:
    use(reporter(True))
    assert capsys.readouterr() == ("", "")


def test_bars_show_task_steps_and_note(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    screen = Terminal()
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setenv("COLUMNS", "120")
    use(reporter(True))
    shown = screen.getvalue()
    assert "search" in shown
    assert "2/3" in shown
    assert "best [0.5]" in shown
    assert capsys.readouterr().out == ""


def test_the_terminal_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr("sys.stderr", screen)
    bars = RichProgress()
    bars.start("search", 3)
    bars.start("search", 3)
    bars.start("other", 1)
    bars.close()
    written = screen.getvalue()
    bars.advance("search", 1)
    bars.advance("never started", 1)
    bars.finish("never started")
    assert screen.getvalue() == written
    assert written.endswith("\x1b[?25h")


def test_items_are_told_as_they_are_done() -> None:
    log = io.StringIO()
    show = LineProgress(log)
    assert list(tracked([1, 2, 3], show, "judging")) == [1, 2, 3]
    assert log.getvalue().startswith("judging: 0 of 3\njudging: 3 of 3 in ")
    log.truncate(log.seek(0))
    # What is left early has ended as well.
    for item in tracked(iter(range(5)), show, "judging"):
        if item == 2:
            break
    assert log.getvalue().startswith("judging: 0 of 5\njudging: 2 of 5 in ")
    log.truncate(log.seek(0))
    assert list(tracked((item for item in "ab"), show, "judging")) == ["a", "b"]
    assert log.getvalue().startswith("judging: 0\njudging: 2 in ")
    now = [0.0]
    show = LineProgress(log, clock=lambda: now[0])
    for _ in tracked((item for item in "ab"), show, "long"):
        now[0] += 20.0
    assert "long: 1, 0:00:20 gone\n" in log.getvalue()


def test_what_runs_for_a_while_has_ended_with_an_error_too() -> None:
    log = io.StringIO()
    show = LineProgress(log)
    with during(show, "measuring"):
        pass
    assert log.getvalue().startswith("measuring: 0 of 1\nmeasuring: 1 of 1 in ")
    log.truncate(log.seek(0))
    with pytest.raises(ValueError, match="no"), during(show, "measuring"):
        raise ValueError("no")
    assert log.getvalue().startswith("measuring: 0 of 1\nmeasuring: 0 of 1 in ")
