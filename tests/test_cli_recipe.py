"""Recipes: every mistake with its line; and the same options everywhere."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest
import typer
import typer.core
from torch import nn
from typer.testing import CliRunner

from fxopt import api, cli
from fxopt._cli.options import Options
from fxopt._cli.recipe import kind_of, read_recipe
from fxopt.errors import FxoptError

PAGE = Path(__file__).resolve().parent.parent / "docs" / "reference" / "recipe.md"
NAMES = [field.name for field in dataclasses.fields(Options)]
FINE_TUNE = {"optimizer", "schedule", "patience", "distill", "scales"}
IN_PYTHON = {"input": "example_inputs", "out": "workdir", **dict.fromkeys(FINE_TUNE, "fine_tune")}
ONLY_IN_PYTHON = {"executor", "progress"}
ONLY_ON_THE_COMMAND_LINE = {"recipe", "as_json", "quiet"}


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ('seed = 1\n\n[budget]\nlatency = "60%"\nlatncy = 0.5\n', 5, "Did you mean 'latency'"),
        ('budget = { size = "2MB", latency = "5parsecs" }\n', 1, "parsecs"),
        ('seed = 1\nbudget.latency = "60%"\nbudget.size = true\n', 3, "budget.size = True"),
        ("[budget]\nlatency = 0\n", 2, "fraction"),
        ('[budget]\nlatency = "60%"\n\nlatency = "70%"\n', 4, "no TOML"),
        ('seed = 1\n[budget]\nsize = "1MB"\n[budget]\nmacs = 0.5\n', 4, "no TOML"),
        ("trials = 3\nseed = 1\ntrials = 4\n", 3, "no TOML"),
        ("[shares]\nquantise = 0.5\n", 2, "Did you mean 'quantize'"),
        ("seed = 1\n[shares]\nquantize = 1.5\n", 3, "from 0 to 1"),
        ("[shares]\n# a comment\nquantize = { part = 0.5 }\n", 3, "shares.quantize"),
        ('# a comment\ntarget = "pixl1"\n', 2, "Did you mean 'pixel1'"),
        ('passes = [\n  "prune-channels",\n  "quantise",\n]\n', 1, "Did you mean 'quantize'"),
        ('seed = 1\npasses = [\n  "quantize",\n]\nengine = "evolutoin"\n', 5, "Did you mean 'evolution'"),
        ('model = """\nengine = 1\n"""\n\nengine = 1\n', 5, "text in quotes"),
        ('"trials" = 0\n', 1, "at least 1"),
        ('seed = 1\noptimizer = "adm"\n', 2, "Did you mean 'adamw'"),
        ('distill = "logits=2"\n', 1, "[0, 1]"),
        ('\nobjective = "macs"\n', 2, "macs@0.97"),
        ('reconstruct = "moment"\n', 1, "Did you mean 'moments'"),
        ('verify_on_host = "yes"\n', 1, "true or false"),
        ("learning_rate = inf\n", 1, "above zero"),
        ("epochs = 1.5\n", 1, "whole number"),
        ("[seed]\nvalue = 1\n", 1, "whole number"),
        ("seed = 1\n[[budget]]\nlatency = 0.5\n", 2, "table"),
        ("seed = 1\nthis is no TOML\n", 2, "no TOML"),
        ('target = "pixel1"\n\ntrails = 3\n', 3, "Did you mean 'trials'"),
        ('target = "pixel1"\ntrials = "three"\n', 2, "whole number of at least 1"),
        ("\n\nepochs = -1\n", 3, "at least 0"),
        ('learning_rate = "fast"\n', 1, "a number above zero"),
        ("learning_rate = 0\n", 1, "a number above zero"),
        ("seed = true\n", 1, "whole number"),
        ("target = 3\n", 1, "text in quotes"),
        ("passes = [1]\n", 1, "list of texts"),
        ('seed = 1\nbudget = "60%"\n', 2, "table"),
        ("seed = 1\n[budget]\nlatency = [1]\n", 3, "budget.latency = [1]"),
        ("seed = 1\n[bugdet]\nlatency = 0.5\n", 2, "Did you mean 'budget'"),
        ("seed = 1\ntarget = \n", 2, "no TOML"),
    ],
)
def test_every_mistake_is_told_with_its_line(text: str, line: int, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(FxoptError, match=rf"line {line}\b") as caught:
        read_recipe(path)
    assert reason in str(caught.value)
    assert "recipe.toml" in str(caught.value)


def test_python_takes_the_options_of_a_recipe() -> None:
    taken = inspect.signature(api.optimize).parameters
    assert {IN_PYTHON.get(name, name) for name in NAMES} == set(taken) - ONLY_IN_PYTHON
    same = [name for name in NAMES if name not in IN_PYTHON and name in taken]
    told = {name: getattr(Options(), name) for name in same}
    # Where the command has a word for what is an object in Python, saying nothing means its default.
    in_words = {"model", "reconstruct", "budget", "shares"}
    assert {name: told[name] for name in same if name not in in_words} == {
        name: taken[name].default for name in same if name not in in_words
    }


def test_the_command_takes_the_options_of_a_recipe() -> None:
    group = typer.main.get_command(cli.app)
    assert isinstance(group, typer.core.TyperGroup)
    taken = {parameter.name for parameter in group.commands["optimize"].params if parameter.name != "help"}
    assert set(NAMES) == taken - ONLY_ON_THE_COMMAND_LINE


def test_the_page_has_every_option_its_kind_and_its_default() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \| (.+?) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert rows == [(name, kind_of(name), _default(name)) for name in NAMES]


def _default(name: str) -> str:
    value: Any = getattr(Options(), name)
    if value in (None, ()) or value == {}:
        return "none"
    return f"`{json.dumps(value)}`"


def test_the_recipe_of_the_page_is_read(tmp_path: Path) -> None:
    (shown,) = re.findall(r"```toml[^\n]*\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "recipe.toml").write_text(shown, encoding="utf-8")
    found = read_recipe(tmp_path / "recipe.toml")
    assert found.budget == {"latency": "60%", "size": "2MB"}
    assert found.shares == {"quantize": "50%"}


def test_what_is_measured_and_tried_at_a_time_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def stop(*_: object, **options: Any) -> None:
        seen.append((options["parallel"], options["verify_on_host"]))
        raise FxoptError("enough")

    monkeypatch.setattr(api, "optimize", stop)
    monkeypatch.setattr("fxopt._cli.optimizing.load_model", lambda *_: (nn.Identity(), None))
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('model = "a:b"\ntarget = "pixel1"\nparallel = 3\nverify_on_host = false\n', encoding="utf-8")
    words = ["optimize", "--recipe", str(recipe), "--out", str(tmp_path / "out")]
    for more in ([], ["--verify-on-host", "--parallel", "2"], ["--no-verify-on-host"]):
        CliRunner().invoke(cli.app, [*words, *more])
    assert seen == [(3, False), (2, True), (3, False)]
