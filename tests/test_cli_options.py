"""Options in words: what they stand for, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fxopt import api
from fxopt._cli.choosing import fine_tuning_of, objective_of, reconstruction_of
from fxopt._cli.options import Options
from fxopt._cli.recipe import read_recipe
from fxopt.cli import app
from fxopt.errors import FxoptError, SearchError, UnknownNameError
from fxopt.evaluate import Reconstruction
from fxopt.objectives import SmallestCost
from fxopt.training import Distillation, EarlyStop, FineTuning

MODEL = """
import torch
from torch import nn

IMAGES = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(0))

def small():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(256, 4)
    return nn.Sequential(*layers), IMAGES[:2]

def data():
    return [(IMAGES[:16], torch.arange(16) % 4), (IMAGES[16:], torch.arange(16) % 4)]

def nothing():
    return []

def score(module):
    return float(module(IMAGES).std())
"""


def run(*words: str) -> Any:
    return CliRunner().invoke(app, list(words), env={"COLUMNS": "200", "NO_COLOR": "1"})


@pytest.fixture
def file(tmp_path: Path) -> str:
    (tmp_path / "model.py").write_text(MODEL, encoding="utf-8")
    return str(tmp_path / "model.py")


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (None, None),
        ("score", None),
        ("macs@0.97", SmallestCost(0.97, "macs")),
        ("latency @ 90%", SmallestCost(0.9)),
    ],
)
def test_objectives(text: str | None, wanted: object) -> None:
    assert objective_of(text) == wanted


@pytest.mark.parametrize("text", ["macs", "macs@", "@0.9", "macs@high", "macs@1.2", "flops@0.9", "macs@1.2.3"])
def test_wrong_objectives_are_refused(text: str) -> None:
    with pytest.raises(FxoptError):
        objective_of(text)


def test_ways_to_reconstruct() -> None:
    assert [reconstruction_of(text) for text in (None, "sequential", "none")] == [True, True, False]
    assert reconstruction_of("moments") == Reconstruction(sequential=False)
    with pytest.raises(UnknownNameError, match="Did you mean 'moments'"):
        reconstruction_of("moment")


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, None),
        ({"optimizer": "adamw", "schedule": "step"}, FineTuning(optimizer="adamw", schedule="step")),
        ({"patience": 2}, FineTuning(early_stop=EarlyStop(2))),
        ({"patience": 2, "loss": "a:b"}, FineTuning(early_stop=EarlyStop(2), distillation=None)),
        ({"distill": "none"}, FineTuning(distillation=None)),
        (
            {"distill": "attention=2, temperature=4", "loss": "a:b"},
            FineTuning(distillation=Distillation(logits=0.0, attention=2.0, temperature=4.0)),
        ),
        ({"distill": "logits=50%,features=1"}, FineTuning(distillation=Distillation(logits=0.5, features=1.0))),
    ],
)
def test_fine_tuning(options: dict[str, Any], wanted: FineTuning | None) -> None:
    assert fine_tuning_of(Options(**options)) == wanted


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--optimizer", "adam"], "Did you mean 'adamw'"),
        (["--schedule", "cosin"], "Did you mean 'cosine'"),
        (["--distill", "logit=1"], "Did you mean 'logits'"),
        (["--distill", "logits"], "write logits=0.5"),
        (["--distill", "logits=much"], "give a number"),
        (["--distill", "logits=2"], "lies in [0, 1]"),
        (["--objective", "macs"], "macs@0.97"),
        (["--reconstruct", "always"], "way to reconstruct 'always'"),
    ],
)
def test_wrong_words_are_refused_before_the_model_is_loaded(words: list[str], reason: str) -> None:
    result = run("optimize", "nowhere.py:model", "--target", "pixel1", *words)
    assert result.exit_code == 1
    assert reason in result.stderr


def test_all_of_it_reaches_optimize(file: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []

    def optimize(model: object, example_inputs: object, **options: Any) -> None:
        seen.append(options)
        raise FxoptError("as far as this test goes")

    monkeypatch.setattr(api, "optimize", optimize)
    monkeypatch.chdir(tmp_path)
    words = "--objective macs@0.9 --reconstruct none --optimizer adamw --patience 3 --distill attention=1"
    words += " --scales pact --trial-epochs 2"
    run("optimize", f"{file}:small", "--target", "pixel1", *words.split())
    (tmp_path / "recipe.toml").write_text(
        f'model = "{file}:small"\ntarget = "pixel1"\nobjective = "macs@0.9"\nreconstruct = "none"\n'
        'optimizer = "adamw"\npatience = 3\ndistill = "attention=1"\nscales = "pact"\ntrial_epochs = 2\n',
        encoding="utf-8",
    )
    run("optimize", "--recipe", "recipe.toml")
    for options in seen:
        assert options["objective"] == SmallestCost(0.9, "macs")
        assert options["reconstruct"] is False
        assert options["trial_epochs"] == 2
        assert options["fine_tune"] == FineTuning(
            optimizer="adamw",
            scales="pact",
            early_stop=EarlyStop(3),
            distillation=Distillation(logits=0.0, attention=1.0),
        )
    assert len(seen) == 2


def test_a_recipe_refuses_what_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text("distill = 0.5\n", encoding="utf-8")
    with pytest.raises(FxoptError, match="text in quotes"):
        read_recipe(tmp_path / "recipe.toml")


# Engines, on data of one's own.


def compared(file: str, out: Path, *words: str) -> Any:
    known = ["--target", "pixel1", "--budget", "macs=50%", "--passes", "prune-channels", "--trials", "2", "--json"]
    return run("compare-engines", f"{file}:small", *known, "--engine", "random", "--out", str(out), *words)


def test_engines_are_compared_as_optimize_searches(file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Careful in few bits, trials trained as the recipe says, and the exact engine told what layers lose."""
    seen: dict[str, Any] = {}
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('passes = ["quantize"]\ntrial_epochs = 1\n', encoding="utf-8")

    def compare(space: Any, judge: Any, trials: int, **options: Any) -> None:
        seen.update(options, judge=judge, space=space)
        raise FxoptError("as far as this test goes")

    monkeypatch.setattr("fxopt.search.compare", compare)
    words = ["--target", "zynq7020", "--recipe", str(recipe), "--train", f"{file}:data", "--val", f"{file}:data"]
    run("compare-engines", f"{file}:small", *words, "--engine", "exact", "--engine", "random", "--out", str(tmp_path))
    assert [len(table) for table in seen["options"]["exact"]["losses"]] == seen["space"].sizes.tolist()
    assert list(seen["options"]) == ["exact"]
    assert seen["context"]["trial_epochs"] == "1"
    assert seen["judge"]._training.epochs == 1
    assert seen["judge"]._passes[0].rounding


def rows(result: Any) -> Any:
    assert result.exit_code == 0, result.output
    return [row["scores"] for row in json.loads(result.stdout)["engines"]]


def test_engines_are_compared_as_optimize_would_judge(file: str, tmp_path: Path) -> None:
    data = ["--train", f"{file}:data", "--evaluate", f"{file}:score"]
    found = rows(compared(file, tmp_path / "a", *data))
    assert found != rows(compared(file, tmp_path / "b", *data, "--reconstruct", "none"))
    assert found != rows(compared(file, tmp_path / "c", *data[2:]))
    assert found == rows(compared(file, tmp_path / "a", *data))


def test_seeds_begin_where_they_are_told_to(file: str, tmp_path: Path) -> None:
    data = ["--evaluate", f"{file}:score"]
    compared(file, tmp_path / "out", *data, "--seed", "3", "--seeds", "2")
    assert sorted(path.name for path in (tmp_path / "out").glob("*.jsonl")) == ["random-3.jsonl", "random-4.jsonl"]


def test_journals_of_another_objective_are_not_gone_on_with(file: str, tmp_path: Path) -> None:
    data = ["--evaluate", f"{file}:score"]
    assert compared(file, tmp_path, *data).exit_code == 0
    result = compared(file, tmp_path, *data, "--objective", "macs@0.001")
    assert result.exit_code == 1
    assert "objective" in result.stderr


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--train", "nothing"], "train yields nothing"),
        (["--val", "data", "--evaluate", "score"], "give one of them"),
        (["--val", "data", "--objective", "macs@1"], "below the least_score"),
    ],
)
def test_bad_data_is_refused(words: list[str], reason: str, file: str, tmp_path: Path) -> None:
    named = [f"{file}:{word}" if word in ("nothing", "data", "score") else word for word in words]
    result = compared(file, tmp_path, *named)
    assert result.exit_code == 1
    assert reason in result.stderr


def test_an_optimization_of_another_objective_does_not_go_on(tmp_path: Path) -> None:
    from tests.optimizing import DATA, half_right, optimize

    options: dict[str, Any] = {"evaluate": half_right, "epochs": 0, "workdir": tmp_path, "trials": 1, "train": DATA}
    optimize(**options)
    for change in ({"objective": SmallestCost(0.0, "macs")}, {"reconstruct": False}):
        with pytest.raises(SearchError, match=next(iter(change))):
            optimize(**(options | change))


# Attention, cut by heads or by their width.


def test_explain_cuts_attention_as_it_is_told(tmp_path: Path) -> None:
    (tmp_path / "attentive.py").write_text(
        "import torch\nfrom torch import nn\n\n\ndef encoder():\n"
        "    torch.manual_seed(0)\n"
        "    return nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), torch.randn(2, 5, 16)\n",
        encoding="utf-8",
    )
    model = f"{tmp_path / 'attentive.py'}:encoder"
    sizes = {}
    for way in ("heads", "width"):
        result = run("explain", model, "--keep", "0.5", "--attention", way, "--json")
        assert result.exit_code == 0, result.output
        sizes[way] = {group["size"] for group in json.loads(result.stdout)["groups"]}
    assert sizes == {"heads": {2, 16, 32}, "width": {8, 16, 32}}
    refused = run("explain", model, "--attention", "depth")
    assert refused.exit_code == 1
    assert "by 'heads' or by 'width'" in refused.stderr


def test_shares_come_from_words_and_recipes(file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def stop(*_: object, **options: Any) -> None:
        seen.append(options["shares"])
        raise FxoptError("enough")

    monkeypatch.setattr(api, "optimize", stop)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('budget = { macs = "60%" }\nshares = { quantize = 0.25 }\n', encoding="utf-8")
    words = ("optimize", f"{file}:small", "--recipe", str(recipe), "--target", "pixel1", "--out", str(tmp_path / "out"))
    assert run(*words).exit_code == 1
    assert run(*words, "--share", "quantize=50%").exit_code == 1
    assert seen == [{"quantize": 0.25}, {"quantize": "50%"}]
    for share, told in (
        ("quantize", "write pass=part"),
        ("quantise=0.5", "Did you mean 'quantize'"),
        ("quantize=2", "from 0 to 1"),
    ):
        result = run(*words, "--share", share)
        assert result.exit_code == 1
        assert told in " ".join(result.stderr.split())
    recipe.write_text("shares = 0.5\n", encoding="utf-8")
    assert "has to be a table" in run(*words).stderr
