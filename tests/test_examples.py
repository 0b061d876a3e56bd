from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

from fxopt._cli.loading import call, load_function, load_model
from fxopt._cli.recipe import read_recipe
from fxopt.data import first_batch
from fxopt.decisions import Budget

ROOT = Path(__file__).resolve().parent.parent
BUDGETS = (("timm_model", "latency_s", 0.5), ("vision_transformer", "macs", 0.7))
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


def example(name: str) -> ModuleType:
    """A module of the folder; skips where what it shows is not installed, or does not import."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (ImportError, RuntimeError) as failure:
        pytest.skip(f"{name}.py needs what does not import here: {failure}")
    return module


@pytest.mark.parametrize(("name", "metric", "limit"), BUDGETS)
def test_examples_optimize_and_export(name: str, metric: str, limit: float, tmp_path: Path) -> None:
    result = example(name).optimized()
    report = result.report
    assert getattr(report.after, metric) <= limit * getattr(report.before, metric)
    assert result.export(tmp_path / "model.onnx").max_abs_diff < 1.0


def test_the_segmentation_network_still_finds_discs() -> None:
    module = example("segmentation")
    report = module.optimized(epochs=2).report
    assert report.after.accuracy > 0.6
    assert report.after.macs < 0.51 * report.before.macs
