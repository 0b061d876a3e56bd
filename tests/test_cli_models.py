"""``fxopt trace`` and ``fxopt measure``, models of all kinds, and what is heard while a command works."""

from __future__ import annotations

import io
import json
import shutil
import sys
import warnings
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from fxopt._cli import output
from fxopt._cli.loading import load_model
from fxopt._cli.words import complete_engine, complete_pass, complete_target
from fxopt.cli import app
from fxopt.errors import FxoptError, TraceError
from fxopt.graph import load_program, save_program, trace
from fxopt.progress import LineProgress, RichProgress, Silent, watched
from tests.commands import run, work_in
from tests.report.samples import report

MODELS = """
import torch
from torch import nn

print("noise of an import")


def small():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))
    return model, torch.randn(2, 3, 8, 8)


class Fixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return torch.stack([self.layer(row) for row in x])


def fixed():
    return Fixed(), torch.randn(2, 4)


class Sorting(nn.Module):
    def forward(self, x):
        return torch.linalg.qr(x).R


def strange():
    return Sorting(), torch.randn(2, 4, 4)


def program():
    model, example = small()
    return torch.export.export(model.eval(), (example,))
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved program, made once."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(576, 4))
    example = torch.randn(2, 3, 8, 8)
    return save_program(trace(model.eval(), example), tmp_path_factory.mktemp("saved") / "net.pt2", example)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return work_in(tmp_path, monkeypatch, found=MODELS)


def test_trace_tells_what_the_graph_holds_and_that_it_is_right() -> None:
    result = run("trace", "found:small")
    assert result.exit_code == 0, result.output
    for wanted in ("Conv2d", "1 x 16 x 6 x 6", "516 parameters", "15.62 k MACs", "any batch", "last bit", "batch of 3"):
        assert wanted in result.stdout, wanted


def test_trace_tells_of_a_fixed_batch_and_of_barriers() -> None:
    fixed = json.loads(run("trace", "found:fixed", "--json").stdout)
    assert (fixed["dynamic_batch"], fixed["compared_at"], fixed["equal"]) == (False, 2, "exactly")
    assert fixed["macs"] == 16
    strange = run("trace", "found:strange")
    assert "linalg_qr" in strange.stdout
    assert "is a barrier" in strange.stdout


@pytest.mark.parametrize(
    ("size", "verdict", "words"), [(1e-7, "but for rounding", "but for rounding"), (1.0, "no", "different outputs")]
)
def test_trace_tells_of_a_difference(size: float, verdict: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def differs(*_: object, relative: float, **__: object) -> None:
        if relative < size:
            raise AssertionError("output 0 differs by 1")

    monkeypatch.setattr("fxopt.testing.assert_equivalent", differs)
    assert json.loads(run("trace", "found:small", "--json").stdout)["equal"] == verdict
    told = run("trace", "found:small").stdout
    assert words in told
    assert "output 0 differs by 1" in told


def test_trace_writes_a_program_and_code(folder: Path) -> None:
    assert run("trace", "found:small", "--out", "made/net.pt2").exit_code == 0
    assert run("trace", "made/net.pt2", "--out", "made/net.txt").exit_code == 0
    assert "def forward" in (folder / "made" / "net.txt").read_text()
    refused = run("trace", "found:small", "--out", "net.onnx")
    assert refused.exit_code == 1
    assert ".pt2" in refused.stderr


def test_a_saved_program_is_a_model(saved: Path) -> None:
    model, example = load_model(str(saved))
    other = torch.randn(5, 3, 8, 8)
    assert torch.equal(model(other), load_program(saved).module()(other))
    assert tuple(example[0][0].shape) == (2, 3, 8, 8)
    found = json.loads(run("profile", str(saved), "--target", "pixel1", "--json").stdout)
    assert found["layers"][0]["macs"] == 16 * 3 * 9 * 36
    made = run("export", str(saved), "--out", "net.onnx")
    assert made.exit_code == 0, made.output


def test_a_program_of_a_function_is_a_model() -> None:
    found = json.loads(run("trace", "found:program", "--json").stdout)
    assert (found["equal"], found["dynamic_batch"], found["parameters"]) == ("exactly", False, 516)


@pytest.mark.parametrize("damage", ["absent", "text", "cut"])
def test_a_damaged_program_is_one_clear_error(damage: str, saved: Path, folder: Path) -> None:
    place = folder / "net.pt2"
    if damage == "text":
        place.write_text("hello", encoding="utf-8")
    if damage == "cut":
        place.write_bytes(saved.read_bytes()[:2000])
    result = run("trace", "net.pt2")
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    assert "net.pt2" in result.stderr
    with pytest.raises(TraceError, match=r"torch\.export"):
        load_program(place)


def test_a_program_has_its_suffix(saved: Path) -> None:
    graph = trace(load_program(saved))
    with pytest.raises(TraceError, match=r"\.pt2"):
        save_program(graph, "net.zip", torch.randn(2, 3, 8, 8))


def test_measure_compares_files_models_and_predictions(saved: Path, folder: Path) -> None:
    assert run("export", str(saved), "--out", "kept/model.onnx").exit_code == 0
    shutil.copy(folder / "kept" / "model.onnx", folder / "net.onnx")
    words = ("measure", "net.onnx", "kept", str(saved), "--runs", "2", "--target", "pixel1")
    found = json.loads(run(*words, "--json").stdout)
    assert [one["model"] for one in found["models"]] == ["net.onnx", "kept", str(saved)]
    assert all(one["q25_s"] <= one["median_s"] <= one["q75_s"] for one in found["models"])
    assert [one["predicted_s"]["pixel1"] is None for one in found["models"]] == [True, True, False]
    profiled = json.loads(run("profile", str(saved), "--target", "pixel1", "--json").stdout)["targets"][0]["latency_s"]
    assert found["models"][2]["predicted_s"]["pixel1"] == pytest.approx(profiled)
    told = run(*words).stdout
    for wanted in ("net.onnx", "pixel1 predicts", "not known", "batch of 1, 1 thread, 2 rounds", "calibrated"):
        assert wanted in told, wanted


def test_the_prediction_for_a_saved_result_is_its_reports(saved: Path, folder: Path) -> None:
    assert run("export", str(saved), "--out", "kept/model.onnx").exit_code == 0
    told = report()
    told.save(folder / "kept" / "report.json")
    words = ("measure", "kept", "--runs", "1", "--target", "pixel1", "--target", "v100", "--json")
    (found,) = json.loads(run(*words).stdout)["models"]
    assert told.target.name == "pixel1"
    assert found["predicted_s"] == {"pixel1": told.after.latency_s, "v100": None}
    (found,) = json.loads(run(*words, "--batch", "3").stdout)["models"]
    assert found["predicted_s"]["pixel1"] is None


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["gone.onnx"], "gone.onnx"),
        (["gone"], "There is no folder gone; give one that `fxopt optimize` wrote"),
        (["."], "model.onnx"),
        (["found:smal"], "small"),
        (["found:small", "--target", "pixl1"], "pixel1"),
    ],
)
def test_measure_says_what_it_cannot_find(words: list[str], reason: str) -> None:
    result = run("measure", *words)
    assert result.exit_code == 1
    assert reason in result.stderr


# What is heard.


def test_quiet_is_silent_but_for_the_result(capfd: pytest.CaptureFixture[str]) -> None:
    loud = run("trace", "found:small")
    sys.modules.pop("found")
    quiet = run("trace", "found:small", "--quiet")
    assert loud.stdout == "noise of an import\n" + quiet.stdout
    assert quiet.stderr == ""
    assert "Error: " in run("trace", "found:smal", "-q").stderr


def test_a_session_hears_what_it_may(capsys: pytest.CaptureFixture[str]) -> None:
    with output.session(False, True) as heard:
        warnings.warn("not heard", stacklevel=1)
        assert isinstance(heard, Silent)
    with output.session(True, False) as heard:
        heard.start("searching", 2)
        heard.advance("searching")
        heard.finish("searching")
    assert capsys.readouterr() == ("", "")
    with output.session(False, False) as heard:
        assert isinstance(heard, LineProgress)


def test_lines_tell_how_far_it_is_and_how_long_it_takes() -> None:
    told: list[str] = []

    class Stream(io.StringIO):
        def write(self, text: str) -> int:
            told.append(text)
            return len(text)

        def isatty(self) -> bool:
            return True

    now = iter([0.0, 4.0, 30.0, 35.0, 40.0, 3700.0])
    lines = LineProgress(Stream(), every_s=10.0, clock=lambda: next(now))
    lines.start("search", 8)
    lines.advance("search", 1, "best 0.5")
    lines.advance("search", 2)
    lines.advance("search")
    lines.advance("search", 4, "best 0.9")
    lines.finish("search")
    lines.advance("search")
    lines.finish("search")
    assert told == [
        "search: 0 of 8\n",
        "search: 3 of 8, 0:00:30 gone, about 0:00:50 left (best 0.5)\n",
        "search: 8 of 8 in 1:01:40 (best 0.9)\n",
    ]
    assert isinstance(watched(Stream()), RichProgress)


def test_shells_complete_names() -> None:
    assert complete_target("pixel1") == [name for name in complete_target("") if name.startswith("pixel1")] != []
    assert complete_engine("ev") == ["evolution"]
    assert complete_pass("prune-channels,qu") == ["prune-channels,quantize"]
    shown = CliRunner().invoke(
        app,
        [],
        env={"_FXOPT_COMPLETE": "complete_bash", "COMP_WORDS": "fxopt optimize --engine ran", "COMP_CWORD": "3"},
    )
    assert "random" in shown.output


def test_a_model_that_is_no_model_is_refused() -> None:
    with pytest.raises(FxoptError, match="names no function"):
        load_model("net.pt")
