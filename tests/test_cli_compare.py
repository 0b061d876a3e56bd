"""``fxopt compare-engines``: engines side by side, resumable."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fxopt._selecting import Selector
from fxopt.cli import app
from fxopt.decisions import Policy
from fxopt.lowering import lower

MODEL = """
import torch
from torch import nn

def small():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Conv2d(32, 8, 3)
    return nn.Sequential(*layers), torch.randn(2, 3, 12, 12)
"""


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    (tmp_path / "model.py").write_text(MODEL, encoding="utf-8")
    options = ["--target", "pixel1", "--budget", "macs=50%", "--passes", "prune-channels", "--trials", "4"]
    return ["compare-engines", f"{tmp_path / 'model.py'}:small", *options, "--out", str(tmp_path / "out")]


def test_engines_are_shown_side_by_side_and_resume(words: list[str], tmp_path: Path) -> None:
    chosen = [*words, "--engine", "uniform", "--engine", "random", "--seeds", "2"]
    first = CliRunner().invoke(app, [*chosen, "--json"])
    assert first.exit_code == 0, first.output
    found = json.loads(first.stdout)
    assert found["trials"] == 4
    assert {row["engine"] for row in found["engines"]} == {"uniform", "random"}
    assert all(row["feasible"] and len(row["scores"]) == 2 for row in found["engines"])
    journals = sorted((tmp_path / "out").glob("*.jsonl"))
    assert [journal.name for journal in journals] == [
        "random-0.jsonl",
        "random-1.jsonl",
        "uniform-0.jsonl",
        "uniform-1.jsonl",
    ]
    written = [journal.read_bytes() for journal in journals]
    again = CliRunner().invoke(app, chosen)
    assert again.exit_code == 0
    assert [journal.read_bytes() for journal in journals] == written
    assert "best score" in again.stdout
    assert "4 trials each, mean of 2 seeds" in again.stdout


def test_a_wrong_engine_is_named_before_the_model_is_loaded(words: list[str]) -> None:
    result = CliRunner().invoke(app, [*words, "--engine", "randon"])
    assert result.exit_code == 1
    assert "Did you mean 'random'" in result.stderr


def test_a_model_is_needed() -> None:
    result = CliRunner().invoke(app, ["compare-engines"])
    assert result.exit_code == 1
    assert "MODULE:FUNCTION" in result.stderr


def test_engines_are_in_the_report_of_the_same_folder(words: list[str], tmp_path: Path) -> None:
    run = CliRunner().invoke(app, ["optimize", *words[1:], "--epochs", "0"])
    assert run.exit_code == 0, run.output
    compared = CliRunner().invoke(app, [*words, "--engine", "uniform", "--engine", "random"])
    assert compared.exit_code == 0, compared.output
    told = CliRunner().invoke(app, ["report", str(tmp_path / "out"), "--json"])
    report = json.loads(told.stdout)["report"]
    assert [(one["engine"], len(one["curve"])) for one in report["curves"]] == [("random", 4), ("uniform", 4)]
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "uniform" in page
    assert "were not run" not in page


BLOCKS = """
import torch
from fxopt import models

def net():
    torch.manual_seed(0)
    blocks = (models.Block(8, 3, 3), models.Block(8, 3, 3))
    return models.MobileNetwork(models.Plan(8, blocks, 16, 1), 4, 3).eval(), torch.randn(2, 3, 8, 8)

def data():
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(8, 3, 8, 8, generator=generator), torch.arange(8) % 4) for _ in range(3)]
"""


def test_behind_operators_engines_have_what_their_share_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "blocks.py").write_text(BLOCKS, encoding="utf-8")
    (tmp_path / "recipe.toml").write_text("epochs = 1\n[shares]\nselect-operators = 0.3\n", encoding="utf-8")
    blocks, given = str(tmp_path / "blocks.py"), []
    select = Selector.select

    def spied(self: Selector, graph: Any, target: Any, limits: Any, *others: Any) -> Any:
        given.append((float(lower(graph).estimate(target, [Policy({})]).macs[0]), limits()["macs"]))
        return select(self, graph, target, limits, *others)

    monkeypatch.setattr(Selector, "select", spied)
    options = ["--target", "pixel1", "--budget", "macs=60%", "--passes", "select-operators,prune-channels"]
    words = ["compare-engines", f"{blocks}:net", *options, "--train", f"{blocks}:data", "--trials", "3"]
    out = ["--engine", "uniform", "--recipe", str(tmp_path / "recipe.toml"), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, [*words, *out, "--json"])
    assert result.exit_code == 0, result.output
    ((whole, limit),) = given
    assert limit == pytest.approx(0.6**0.3 * whole)
    trials = [json.loads(line) for line in (tmp_path / "out" / "uniform-0.jsonl").read_text().splitlines()[1:]]
    assert {one["kind"] for trial in trials for one in trial["policy"]["decisions"]} == {"channels"}
