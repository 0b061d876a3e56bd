from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import fxopt
from fxopt import api, targets
from fxopt._cli.loading import call, load_function, load_model, parse_input
from fxopt._cli.optimizing import tell
from fxopt._cli.options import Options
from fxopt._cli.output import only_json
from fxopt._cli.recipe import options_of
from fxopt.cli import main
from fxopt.errors import BudgetError, FxoptError, JournalError, ParityError, UnknownNameError
from fxopt.export import ExportReport
from fxopt.report import Report
from tests.commands import run, work_in
from tests.report.samples import report

ROOT = Path(fxopt.__file__).resolve().parent.parent
MODELS = """
import torch
from torch import nn

print("noise of an import")


def small():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))
    return model, torch.randn(2, 3, 8, 8)


def bare():
    return small()[0]


def wrong():
    return "a model"


def broken():
    raise ValueError("no such checkpoint")


def needy(width):
    return width


def empty():
    return []


def loader():
    return [(torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 3]))]


def score(module):
    return 0.5


NUMBER = 3
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the user's own file in it."""
    lacking = "import not_installed_anywhere\n"
    return work_in(tmp_path, monkeypatch, my_models=MODELS, syntax="def small(:\n", lacking=lacking)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the command asks ``fxopt.api.optimize`` for, which then refuses."""
    seen: list[dict[str, Any]] = []

    def optimize(model: object, example_inputs: object, **options: Any) -> None:
        seen.append({"model": model, "example_inputs": example_inputs, **options})
        raise FxoptError("as far as this test goes")

    monkeypatch.setattr(api, "optimize", optimize)
    return seen


def test_the_version_is_the_packages() -> None:
    result = run("--version")
    assert (result.exit_code, result.stdout) == (0, f"fxopt {fxopt.__version__}\n")


def test_the_command_starts_without_anything_heavy() -> None:
    code = "import sys, fxopt.cli; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert {"torch", "onnx", "onnxruntime", "numpy", "jinja2"}.isdisjoint(done.stdout.split())


@pytest.mark.parametrize("words", ["--engine evolutoin", "--budget latancy=50%", "--budget latency=50"])
def test_a_mistake_in_a_word_is_told_before_torch_is_loaded(words: str, tmp_path: Path) -> None:
    start = ["optimize", "my_models.py:small", "--target", "pixel1", "--out", str(tmp_path)]
    lines = (
        "import sys",
        "from fxopt.cli import app",
        f"try: app({[*start, *words.split()]!r})",
        "finally: print('torch' in sys.modules)",
    )
    code = "\n".join(lines)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert (done.returncode, done.stdout) == (1, "False\n")
    assert "Error: " in done.stderr


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--version"], 0),
        (["targets", "pixl1"], 1),
        (["optimise"], 2),
        (["optimize", "--trials", "0"], 2),
        (["profile", "my_models:small"], 2),
    ],
)
def test_main_returns_the_exit_code(words: list[str], code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == code
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "suggestion"),
    [
        (["optimise"], "optimize"),
        (["targets", "pixl1"], "pixel1"),
        (["profile", "my_models:small", "--target", "pixl1"], "pixel1"),
        (["profile", "my_models:smal", "--target", "pixel1"], "small"),
        (["optimize", "my_models:small", "--target", "pixl1"], "pixel1"),
        (["optimize", "my_models:small", "--engine", "evolutoin"], "evolution"),
        (["optimize", "my_models:small", "--passes", "prune-chanels,quantize"], "prune-channels"),
        (["optimize", "my_models:small", "--budgt", "latency=60%"], "--budget"),
    ],
)
def test_a_wrong_name_suggests_the_right_one(words: list[str], suggestion: str) -> None:
    result = run(*words)
    assert result.exit_code in (1, 2)
    assert suggestion in result.stderr
    assert result.stdout in ("", "noise of an import\n")


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["optimize"], "no model"),
        (["optimize", "my_models:small", "--budget", "latency"], "metric=limit"),
        (["optimize", "my_models:small", "--budget", "latency=5parsecs"], "parsecs"),
        (["optimize", "my_models:small", "--budget", "size=0"], "fraction"),
        (["optimize", "my_models:small", "--target", "pixel1", "--out", "my_models.py"], "Cannot write"),
        (["optimize", "my_models:small", "--val", "my_models:loader", "--evaluate", "my_models:score"], "one of them"),
        (["optimize", "--recipe", "nowhere.toml"], "nowhere.toml"),
        (["profile", "my_models:bare", "--target", "pixel1"], "--input"),
        (["profile", "my_models:bare", "--target", "pixel1", "--input", "a,b"], "1,3,224,224"),
    ],
)
def test_bad_input_is_one_clear_error(words: list[str], reason: str) -> None:
    result = run(*words)
    assert result.exit_code == 1
    assert result.stderr.count("Error: ") == 1
    assert reason in result.stderr
    assert "Traceback" not in result.stderr


def test_targets_are_listed_and_told_about() -> None:
    listed = run("targets")
    assert listed.exit_code == 0
    assert all(name in listed.stdout for name in targets.names())
    assert [one["name"] for one in json.loads(run("targets", "--json").stdout)] == targets.names()
    assert run("targets", "pixel1").stdout.split() == targets.describe("pixel1").split()


def test_profile_shows_layers_and_totals_of_every_target() -> None:
    result = run("profile", "my_models:small", "--target", "pixel1", "--target", "v100")
    assert result.exit_code == 0, result.output
    for wanted in ("Conv2d", "Linear", "pixel1 latency", "v100 latency", "calibrated", "15.55 k"):
        assert wanted in result.stdout, wanted


def test_profile_draws_rooflines_beside_each_other(tmp_path: Path) -> None:
    place = tmp_path / "roofs.svg"
    result = run("profile", "my_models:small", "--target", "pixel1", "--target", "v100", "--roofline", str(place))
    assert result.exit_code == 0
    assert str(place) in result.stdout
    text = place.read_text(encoding="utf-8")
    assert "pixel1 (calibrated)" in text
    assert "v100 (calibrated)" in text


def test_profile_tells_what_has_no_model_and_what_a_run_costs_as_such() -> None:
    text = run("profile", "my_models:small", "--target", "eie", "--target", "galaxy-s24").stdout
    assert "no model" in text
    assert "not in the sums (0.0% of the MACs)" in text
    found = json.loads(run("profile", "my_models:small", "--target", "eie", "--target", "galaxy-s24", "--json").stdout)
    first, second = found["targets"]
    assert first["uncosted"]
    assert (first["uncosted_macs_share"], first["fixed_s"]) == (0.0, 0.0)
    assert 0.0 < second["fixed_s"] < second["latency_s"]
    rows = sum(layer["latency_s"]["galaxy-s24"] for layer in found["layers"])
    assert second["latency_s"] == pytest.approx(rows + second["fixed_s"])


def test_profile_gives_only_json_when_asked() -> None:
    result = run("profile", "my_models.py:small", "--target", "pixel1", "--json")
    data = json.loads(result.stdout)
    (total,) = data["targets"]
    assert total["macs"] == sum(layer["macs"] for layer in data["layers"]) == 16 * 3 * 9 * 36 + 16 * 4
    assert total["latency_s"] == pytest.approx(sum(layer["latency_s"]["pixel1"] for layer in data["layers"]))
    assert result.stderr == "noise of an import\n"


def test_explain_tells_what_can_be_cut() -> None:
    result = run("explain", "my_models:small", "--keep", "0.5")
    assert result.exit_code == 0, result.output
    assert "16 -> 8" in result.stdout
    assert "frozen by output" in result.stdout
    data = json.loads(run("explain", "my_models:small", "--keep", "0.5", "--json").stdout)
    assert [(one["size"], one["kept"]) for one in data["groups"] if one["reason"] is None] == [(16, 8)]
    assert data["parameters_left"] < data["parameters"]


def test_a_shape_replaces_the_example() -> None:
    found = json.loads(run("profile", "my_models:bare", "--target", "pixel1", "--input", "1,3,5,5", "--json").stdout)
    assert found["layers"][0]["macs"] == 16 * 3 * 9 * 9


def test_optimize_passes_every_option_on(calls: list[dict[str, Any]]) -> None:
    words = "optimize my_models:small --target pixel1 --budget latency=60% --budget size=2MB --passes quantize "
    words += (
        "--engine random --trials 3 --epochs 0 --train my_models:loader --val my_models:loader --out made --seed 7 "
    )
    words += "--loss my_models:score --learning-rate 0.1"
    result = run(*words.split())
    assert "as far as this test goes" in result.stderr
    (call_,) = calls
    assert call_["budget"] == {"latency": "60%", "size": "2MB"}
    assert {name: call_[name] for name in ("target", "passes", "engine", "trials", "epochs", "seed", "workdir")} == {
        "target": "pixel1",
        "passes": ("quantize",),
        "engine": "random",
        "trials": 3,
        "epochs": 0,
        "seed": 7,
        "workdir": Path("made"),
    }
    assert len(call_["train"]) == len(call_["val"]) == 1
    assert call_["evaluate"] is None
    assert call_["loss"](None) == 0.5
    assert call_["learning_rate"] == 0.1
    assert tuple(call_["example_inputs"].shape) == (2, 3, 8, 8)


def test_a_recipe_gives_the_same_options_and_the_command_line_wins(calls: list[dict[str, Any]], folder: Path) -> None:
    (folder / "recipe.toml").write_text(
        'model = "my_models:bare"\ninput = "2,3,9,9"\ntarget = "pixel1"\npasses = ["quantize"]\ntrials = 5\n'
        'evaluate = "my_models:score"\nseed = 4\n[budget]\nsize = "2MB"\nlatency = 0.6\n',
        encoding="utf-8",
    )
    run("optimize", "--recipe", "recipe.toml", "--trials", "9", "--seed", "0")
    (call_,) = calls
    assert (call_["trials"], call_["seed"], call_["passes"]) == (9, 0, ("quantize",))
    assert call_["budget"] == {"size": "2MB", "latency": 0.6}
    assert call_["evaluate"](None) == 0.5
    assert tuple(call_["example_inputs"].shape) == (2, 3, 9, 9)


def test_options_that_are_not_given_keep_their_value() -> None:
    options = Options(trials=5, budget={"size": "2MB"})
    assert options.changed({"trials": None, "budget": {}, "input": (), "seed": 0}) == options
    assert options.changed({"epochs": 0}).epochs == 0


def test_budgets_and_passes_are_read() -> None:
    assert options_of({"budget": ["latency=60%", " size = 2MB "]}).budget == {"latency": "60%", "size": "2MB"}
    assert options_of({"passes": " prune-channels, quantize,"}).passes == ("prune-channels", "quantize")
    with pytest.raises(BudgetError, match="twice"):
        options_of({"budget": ["size=1MB", "size=2MB"]})


@pytest.mark.parametrize(
    ("reference", "reason"),
    [
        ("my_models", "names no function"),
        ("my_models:", "names no function"),
        ("my_modelz:small", "no module 'my_modelz'"),
        ("my_models.sub:small", "no module 'my_models.sub'"),
        ("gone.py:small", "no Python file"),
        ("syntax:small", r"syntax\.py:1"),
        ("syntax.py:small", r"syntax\.py:1"),
        ("lacking:small", "not_installed_anywhere"),
        ("lacking.py:small", "not_installed_anywhere"),
        ("my_models:NUMBER", "is a int"),
        ("my_models:needy", r"takes arguments \(width\)"),
        ("my_models:broken", r"ValueError: no such checkpoint \(.*my_models\.py:\d+\)"),
    ],
)
def test_a_reference_that_leads_nowhere_says_why(reference: str, reason: str) -> None:
    with pytest.raises(FxoptError, match=reason):
        call(reference)


def test_an_unknown_function_suggests_the_nearest() -> None:
    with pytest.raises(UnknownNameError) as caught:
        load_function("my_models.py:smal")
    assert caught.value.suggestion == "small"


def test_a_file_is_run_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert load_function("my_models.py:small") is load_function("./my_models.py:small")
    assert capsys.readouterr().out == "noise of an import\n"


def test_a_function_has_to_return_a_model() -> None:
    with pytest.raises(FxoptError, match=r"returned a str; return a torch\.nn\.Module"):
        load_model("my_models:wrong")


def test_inputs_are_made_of_shapes() -> None:
    first, again, tokens = parse_input("2,3,4"), parse_input("2, 3, 4:float32"), parse_input("1,8:int64")
    assert tuple(first.shape) == (2, 3, 4)
    assert first.equal(again)
    assert (str(tokens.dtype), tuple(tokens.shape)) == ("torch.int64", (1, 8))
    _, inputs = load_model("my_models:bare", ["1,2", "3"])
    assert [tuple(tensor.shape) for tensor in inputs] == [(1, 2), (3,)]


@pytest.mark.parametrize("text", ["", "1,,2", "-1,2", "1,0", "1,2:complex", "1.5", "3x224"])
def test_what_is_no_shape_is_refused(text: str) -> None:
    with pytest.raises(FxoptError, match="1,3,224,224"):
        parse_input(text)


@pytest.mark.parametrize(
    ("words", "resumes"),
    [("optimize my_models:small --target pixel1 --out made", True), ("demo --out made", False)],
)
def test_ctrl_c_says_how_to_go_on(words: str, resumes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(api, "optimize", interrupted)
    monkeypatch.setattr("fxopt.demo.run", interrupted)
    result = run(*words.split())
    assert result.exit_code == 130
    assert "Interrupted." in result.stderr
    assert ("the same command with the same --out to resume" in result.stderr) is resumes


def test_prints_go_to_stderr_only_while_json_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    for active in (True, False):
        with only_json(active):
            sys.stdout.write(f"{active}\n")
    assert capsys.readouterr() == ("False\n", "True\n")


def test_optimize_leaves_everything_in_the_folder(folder: Path) -> None:
    words = "optimize my_models:small --target pixel1 --budget macs=60% --passes prune-channels --engine uniform"
    result = run(*words.split(), "--trials", "1", "--val", "my_models:loader", "--out", "made", "--json")
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout)
    assert data["report"]["after"]["macs"] <= 0.6 * data["report"]["before"]["macs"]
    assert data["report"]["export"]["path"] == "model.onnx"
    assert data["report"]["export"]["accuracy"] == data["report"]["after"]["accuracy"]
    assert json.loads((folder / "made" / "report.json").read_text()) == data["report"]
    made = {entry.name for entry in (folder / "made").iterdir()}
    assert {"model.onnx", "model.safetensors", "policy.json", "report.html", "journal.jsonl", "options.json"} <= made


def test_a_refused_export_loses_no_result(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing:
        report = report()

        def save(self, out: Path) -> None:
            self.report.save(out / "report.json")

        def export(self, path: Path, **options: object) -> None:
            raise ParityError(f"{path.name} computes something else")

    monkeypatch.setattr(api, "optimize", lambda *_, **__: Refusing())
    result = run("optimize", "my_models:small", "--target", "pixel1", "--out", "made")
    assert result.exit_code == 1
    assert "computes something else" in result.stderr
    assert Report.from_json((folder / "made" / "report.json").read_text()) == report()


def test_options_lie_beside_the_result_that_they_made(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Made:
        report = report()

        def save(self, out: Path) -> None:
            self.report.save(out / "report.json")

        save_report = save

        def export(self, path: Path, **options: object) -> ExportReport:
            return ExportReport(path, "qdq", 21, 12_300)

    def refused(*_: object, **__: object) -> None:
        raise JournalError("another search lies there")

    words = ["optimize", "my_models:small", "--target", "pixel1", "--out", "made", "--budget"]
    for budget, behaviour in (("latency=0.6", lambda *_, **__: Made()), ("latency=0.8", refused)):
        monkeypatch.setattr(api, "optimize", behaviour)
        assert run(*words, budget).exit_code == (behaviour is refused)
        assert json.loads((folder / "made" / "options.json").read_text())["budget"] == {"latency": "0.6"}


def test_people_are_told_the_figures_their_trust_and_the_proof(capsys: pytest.CaptureFixture[str]) -> None:
    export = ExportReport(Path("made/model.onnx"), "qdq", 21, 12_300, max_abs_diff=0.012, top1_agreement=0.995)
    tell(SimpleNamespace(report=report()), export, Path("made"), as_json=False)  # type: ignore[arg-type]
    shown = capsys.readouterr().out
    for wanted in (
        *("97.50%", "The budget is met", "pixel1 is calibrated: Mean error 2.1%.", "At 8 bits.", "No training data"),
        *(
            "made/model.onnx (12.3 KB, opset 21)",
            "largest difference 0.012",
            "same class for 99.5%",
            "made/report.html",
        ),
    ):
        assert wanted in shown, wanted


def test_the_module_ends_as_the_command_does() -> None:
    words = [sys.executable, "-m", "fxopt", "profile", "nothing.py:model", "--target", "pixel1"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("Error: ")
