from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import fxopt
from fxopt import demo
from fxopt.data import TensorLoader, digits
from fxopt.decisions import Capabilities
from fxopt.errors import FxoptError, ParityError
from fxopt.graph.fake_quantize import QuantizedLayer
from fxopt.models import small_mobilenet_v2
from fxopt.passes import Canonicalize, Quantize
from fxopt.report import Report


def small_digits(seed: int) -> tuple[TensorLoader, TensorLoader]:
    train, val = digits(size=8, seed=seed)
    return (
        TensorLoader(train.inputs[:64], train.labels[:64], 32, shuffle=True),
        TensorLoader(val.inputs[:48], val.labels[:48], 24),
    )


def small_net(seed: int = 0, width: int = 16) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = nn.Sequential(
            *(nn.Conv2d(1, width, 3, 2, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
            *(nn.Conv2d(width, width, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(width, 10)),
        )
    return layers.eval()


@pytest.fixture
def smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same way with fewer images of a smaller size, and a smaller network."""
    monkeypatch.setattr(demo, "digits", small_digits)
    monkeypatch.setattr(demo, "small_mobilenet_v2", small_net)
    monkeypatch.setattr(demo, "_QUICK", demo._Effort(epochs=1, trials=2, fine_tuning_epochs=1))


@pytest.mark.usefixtures("smaller")
def test_the_demonstration_goes_all_the_way(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    outcome = demo.run(tmp_path / "out", quick=True, progress=None)
    report = outcome.result.report
    assert torch.get_num_threads() == threads
    assert all(budget.met for budget in report.budgets)
    assert report.after.macs <= 0.5 * report.before.macs
    assert {(layer.weight_bits, layer.activation_bits) for layer in report.layers} == {(8, 8)}
    assert report.export is not None
    assert report.export["float_nodes"] == 0
    files = {path.name for path in outcome.folder.iterdir()}
    assert {"model.onnx", "report.html", "report.json", "policy.json", "model.safetensors"} <= files
    assert Report.from_json((outcome.folder / "report.json").read_text()) == report
    assert outcome.export.accuracy == pytest.approx(report.after.accuracy, abs=0.05)
    assert report.export["accuracy"] == outcome.export.accuracy
    again = fxopt.load(outcome.folder, small_net(width=demo._WIDTH))
    images = small_digits(0)[1].inputs
    with torch.no_grad():
        assert torch.equal(again(images), outcome.result.model(images))


@pytest.mark.usefixtures("smaller")
def test_a_refused_export_loses_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ParityError("computes something else")

    monkeypatch.setattr("fxopt.api.export_onnx", refuse)
    with pytest.raises(ParityError):
        demo.run(tmp_path, quick=True, progress=None)
    assert fxopt.load(tmp_path, small_net(width=demo._WIDTH)).training is False
    assert (tmp_path / "report.html").exists()


def test_a_folder_that_cannot_be_written_is_noticed_before_anything_is_trained(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FxoptError, match=r"Cannot write to .*file.* Choose another folder"):
        demo.run(tmp_path / "file", progress=None)


def test_integers_only_offers_no_floating_point_where_there_are_integers() -> None:
    graph = Canonicalize()(fxopt.trace(small_mobilenet_v2(width=8), torch.zeros(2, 1, 8, 8))).graph_module
    able = Capabilities({"*": ((8, 8), (32, 32)), "depthwise": ((32, 32),)})
    space = demo.IntegersOnly().search_space(graph, able)
    assert {choice for decision in space for choice in decision.choices} == {(8, 8)}
    assert {decision.key for decision in space} == {decision.key for decision in Quantize().search_space(graph, able)}
    assert not any("depthwise" in decision.site for decision in space)
    quantized = demo.IntegersOnly(space.default())(fxopt.passes.FoldBatchNorm()(graph).graph_module).graph_module
    count = sum(isinstance(module, QuantizedLayer) for module in quantized.modules())
    assert count == len(space)
