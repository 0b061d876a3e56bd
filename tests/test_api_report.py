"""What fxopt.optimize tells of itself, and what a saved result still tells."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fxopt import models
from fxopt.api import OptimizationResult
from fxopt.passes import PruneChannels, SelectOperators
from fxopt.report import load
from tests.optimizing import DATA, EXAMPLE, make_batches, optimize


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("saved")


@pytest.fixture(scope="module")
def result(folder: Path) -> OptimizationResult:
    return optimize(budget={"latency": 0.8}, train=DATA, val=DATA, trials=6, workdir=folder)


def test_every_candidate_is_priced_and_within_the_budget(result: OptimizationResult) -> None:
    report = result.report
    assert result.search is not None
    scored = [trial for trial in result.search.trials if trial.score is not None and not trial.cached]
    assert [one.trial for one in report.candidates] == [trial.number for trial in scored]
    assert all(one.latency_s <= report.budgets[0].limit * (1 + 1e-9) for one in report.candidates)
    (chosen,) = [one for one in report.candidates if one.chosen]
    assert chosen.score == result.search.score
    assert chosen.latency_s == pytest.approx(report.after.latency_s)
    assert chosen.macs == pytest.approx(report.after.macs)


def test_seconds_and_steps_add_up(result: OptimizationResult) -> None:
    report = result.report
    assert sum(line.before_s for line in report.times) == pytest.approx(report.before.latency_s)
    assert sum(line.after_s for line in report.times) == pytest.approx(report.after.latency_s)
    assert [step.name for step in report.passes] == ["prune-channels", "fine-tune", "quantize"]
    assert all(step.accuracy is not None and step.metrics is not None for step in report.passes)
    assert report.passes[-1].accuracy == report.after.accuracy
    slow = {line.site: line.latency_s for line in report.slow}
    layers = {line.site: line for line in report.layers}
    assert all(layers[site].latency_after_s == seconds for site, seconds in slow.items() if site in layers)
    assert layers["8"].frozen_by


def test_a_saved_report_is_the_same(result: OptimizationResult, folder: Path) -> None:
    result.save(folder)
    assert load(folder) == result.report


def test_operators_are_told_beside_the_layers_that_are_gone() -> None:
    torch.manual_seed(0)
    model = models.MobileNetwork(models.Plan(8, (models.Block(8, 3, 3), models.Block(12, 3, 3, 2)), 16, 1), 4, 3).eval()
    step = SelectOperators(patterns=("inverted-residual",), kernels=(3,), expansions=(2,))
    passes = (step, PruneChannels(round_to=4))
    data = make_batches(5)
    report = optimize(model, EXAMPLE, passes=passes, budget={"macs": 0.8}, train=data, val=data).report
    assert [line.site for line in report.operators] == ["blocks.0", "blocks.1"]
    assert all(line.before in line.choices and line.after in line.choices for line in report.operators)
    assert any(line.before != line.after for line in report.operators)
    assert report.supernet is not None
    # One of warm-up, which has no loss of the architecture, and two of search.
    assert [one.architecture_loss is None for one in report.supernet.epochs] == [True, False, False]
    assert f"entropy {report.supernet.epochs[-1].entropy:.2f}" in report.passes[0].detail
    assert report.supernet.limits["macs"] == pytest.approx(0.8**0.5 * report.before.macs)
    assert all(0.0 < one.costs["macs"] < 2.0 * report.before.macs for one in report.supernet.epochs)
    changed = {line.site for line in report.operators if line.before != line.after}
    gone = {line.site for line in report.layers if line.gone}
    assert {site.rsplit(".", 2)[0] for site in gone} <= changed
    assert gone
    before = sum(line.macs_before for line in report.layers)
    assert before == pytest.approx(report.before.macs)
    assert sum(line.macs_after for line in report.layers) == pytest.approx(report.after.macs)
    sites = [line.site for line in report.layers]
    assert len(sites) == len(set(sites))
    assert sites[-1] == "classifier"


def test_an_absolute_limit_of_several_samples_is_told_for_each() -> None:
    options = {"passes": "prune-channels", "engine": "uniform", "epochs": 0, "trials": 1}
    budget = {"macs": "1G", "latency": "80ms", "size": "1MB"}
    report = optimize(target="v100", budget=budget, **options).report
    assert report.target.batch == 8
    assert [note for note in report.notes if "samples at a time" in note] == [
        "v100 takes 8 samples at a time, and limits are of all of them: macs <= 1 G, 125 M each.",
        "v100 takes 8 samples at a time, and limits are of all of them: latency <= 80 ms, 10 ms each.",
    ]
    for target, limit in (("v100", 0.9), ("pixel1", "1G")):
        notes = optimize(target=target, budget={"macs": limit}, **options).report.notes
        assert not [note for note in notes if "samples at a time" in note]
