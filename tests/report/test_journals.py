"""Reports of folders, with the searches that lie beside them."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from fxopt.cli import app
from fxopt.decisions import Decision, SearchSpace
from fxopt.errors import FxoptError
from fxopt.report import Report, load
from fxopt.report._journals import curves_beside
from fxopt.search import engines, run_search
from tests.report.samples import report

SPACE = SearchSpace([Decision("channels", f"conv{index}", (8, 16, 24), default=24) for index in range(4)])


def search(folder: Path, name: str, file: str, *, space: SearchSpace = SPACE, model: str = "one") -> tuple[object, ...]:
    found = run_search(
        engines.create(name, space, seed=2),
        lambda policy: -float(sum(policy.values())),
        5,
        journal=folder / file,
        context={"model": model},
    )
    return found.curve


def test_a_report_has_the_searches_that_lie_beside_it(tmp_path: Path) -> None:
    report().save(tmp_path / "report.json")
    assert load(tmp_path) == report()
    search(tmp_path, "evolution", "journal.jsonl")
    curves = {name: search(tmp_path, name, f"{name}-2.jsonl") for name in ("random", "uniform")}
    found = load(tmp_path)
    assert {(one.engine, one.seed): one.curve for one in found.curves} == {
        (name, 2): curve for name, curve in curves.items()
    }
    assert Report.from_json(found.to_json()) == found


def test_what_is_another_problem_or_no_journal_is_left_out(tmp_path: Path) -> None:
    search(tmp_path, "evolution", "journal.jsonl")
    search(tmp_path, "random", "random-2.jsonl", model="another")
    search(tmp_path, "random", "random-3.jsonl", space=SearchSpace([Decision("channels", "conv", (8, 16), default=16)]))
    (tmp_path / "notes.jsonl").write_text("{", encoding="utf-8")
    (tmp_path / "empty.jsonl").touch()
    assert curves_beside(tmp_path) == ()
    assert curves_beside(tmp_path / "nowhere") == ()


@pytest.mark.parametrize(
    ("content", "reason"), [(None, "Give the folder"), (b"\xff", "no text"), (b"{}", "schema None")]
)
def test_a_folder_without_a_report_is_refused(content: bytes | None, reason: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "report.json").write_bytes(content)
    with pytest.raises(FxoptError, match=reason):
        load(tmp_path)


def test_the_command_writes_the_report_anew(tmp_path: Path) -> None:
    report(passes=(), layers=(), curve=()).save(tmp_path / "report.json")
    done = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "The budget is met" in done.stdout
    assert "<html" in (tmp_path / "report.html").read_text(encoding="utf-8")
    as_json = CliRunner().invoke(app, ["report", str(tmp_path), "--json", "--out", str(tmp_path / "other.json")])
    assert Report.from_json((tmp_path / "other.json").read_text(encoding="utf-8")) == load(tmp_path)
    assert '"schema": 1' in as_json.stdout
    nothing = CliRunner().invoke(app, ["report", str(tmp_path / "nowhere")])
    assert nothing.exit_code == 1
    assert "fxopt optimize" in nothing.stderr
