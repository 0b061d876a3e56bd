from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fxopt._cli.loading import call, load_function, load_model
from fxopt._cli.recipe import read_recipe
from fxopt.data import first_batch
from fxopt.decisions import Budget

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted((ROOT / "examples").glob("*.toml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_recipes_name_what_exists(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    options = read_recipe(path)
    assert Budget.parse_all(options.budget)
    assert options.model is not None
    assert callable(load_function(options.model))
    for loader in (options.train, options.val):
        assert loader is not None
        first_batch(call(loader), loader)


def test_the_example_network_takes_the_example_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    model, example = load_model("examples/digits.py:untrained")
    assert example.std(dim=0).max() > 0  # two images, not the same one
    inputs, labels = first_batch(call("examples/digits.py:val"), "val")
    assert inputs.shape[1:] == example.shape[1:]
    with torch.no_grad():
        assert model(inputs).shape == (len(labels), 10)
