"""``fxopt calibrate``: needs no torch, goes on where it stopped, and writes a target that commands take."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner, Result

import fxopt
from fxopt import targets
from fxopt._host import measuring
from fxopt.cli import app
from fxopt.targets import rows as r
from fxopt.targets._sweep import calibration_sweep
from fxopt.targets.rows import Floats, Rows

ROOT = Path(fxopt.__file__).resolve().parent.parent
FEW = calibration_sweep()[::12]
WITHOUT = """
import sys

class Refusing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {refused!r}:
            raise ImportError(name)

sys.meta_path.insert(0, Refusing())
from fxopt.cli import main
from fxopt.targets import _sweep, host

host.calibration_sweep = lambda: _sweep.calibration_sweep()[::60]

sys.exit(main({words!r}))
"""


class Stopwatch:
    """Stands in for the profiler; interrupted at one of its calls."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.calls = 0
        self.stop_at = stop_at

    def __call__(self, rows: Rows, *, threads: int, runs: int) -> Floats:
        self.calls += 1
        if self.calls == self.stop_at:
            raise KeyboardInterrupt
        return np.asarray(5e-6 + 3e-11 * r.macs(rows) + 2e-10 * r.out_elements(rows) * threads / runs)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FXOPT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("os.fsync", lambda _: None)
    monkeypatch.setattr("fxopt.targets.host.calibration_sweep", lambda: FEW)
    return tmp_path


@pytest.fixture
def stopwatch(monkeypatch: pytest.MonkeyPatch) -> Stopwatch:
    made = Stopwatch()
    monkeypatch.setattr("fxopt.export.profiler.onnxruntime_profiler", made)
    return made


def run(*words: str) -> Result:
    return CliRunner().invoke(app, list(words), env={"COLUMNS": "200", "NO_COLOR": "1"})


def process(*words: str, refused: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    code = WITHOUT.format(refused=refused, words=list(words))
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)


def test_a_board_needs_no_torch_and_its_file_no_runtime(folder: Path) -> None:
    out = str(folder / "my_board.toml")
    made = process("calibrate", "--out", out, "--runs", "1", "--quick", refused=("torch",))
    assert made.returncode == 0, made.stderr
    assert "my_board is measured" in made.stdout
    told_of = process("targets", out, refused=("torch", "onnx", "onnxruntime"))
    assert told_of.returncode == 0, told_of.stderr
    assert told_of.stdout.startswith("my_board:")
    helped = process("calibrate", "--help", refused=("torch", "onnx", "onnxruntime"))
    assert helped.returncode == 0
    assert "--quick" in helped.stdout


def test_it_goes_on_where_it_was_stopped(folder: Path, stopwatch: Stopwatch) -> None:
    stopwatch.stop_at = 3
    stopped = run("calibrate", "--out", "my_board.toml")
    assert stopped.exit_code == 130
    assert "the same command with the same --out to resume" in stopped.stderr
    assert not (folder / "my_board.toml").exists()
    stopwatch.stop_at = None
    before = stopwatch.calls
    assert run("calibrate", "--out", "my_board.toml").exit_code == 0
    resumed = stopwatch.calls - before
    text = (folder / "my_board.toml").read_text()
    # Another number of threads is another machine: everything is measured.
    assert run("calibrate", "--out", "two.toml", "--threads", "2").exit_code == 0
    assert stopwatch.calls - before - resumed == resumed + 2
    assert run("calibrate", "--out", "my_board.toml").exit_code == 0
    assert (folder / "my_board.toml").read_text() == text


def test_it_tells_in_json(stopwatch: Stopwatch) -> None:
    data = json.loads(run("calibrate", "--out", "a.toml", "--name", "kitchen", "--json").stdout)
    assert (data["name"], data["status"], data["path"]) == ("kitchen", "measured", "a.toml")
    assert data["error"] == targets.load("a.toml").error


@pytest.mark.parametrize(
    ("words", "reason"),
    [("--out board.txt", "has to end in .toml"), ("--out b.toml --name host", "comes with fxopt")],
)
def test_what_it_cannot_write_is_refused_before_measuring(words: str, reason: str, stopwatch: Stopwatch) -> None:
    refused = run("calibrate", *words.split())
    assert (refused.exit_code, stopwatch.calls) == (1, 0)
    assert reason in refused.stderr


def test_commands_and_calls_take_the_file(folder: Path, stopwatch: Stopwatch) -> None:
    run("calibrate", "--out", "my_board.toml")
    (folder / "net.py").write_text(
        "import torch\ndef small():\n    return torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU()), "
        "torch.randn(2, 3, 8, 8)\n"
    )
    shown = json.loads(run("profile", "net.py:small", "--target", "my_board.toml", "--json").stdout)
    assert shown["targets"][0]["latency_s"] > 0.0
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3))
    made = fxopt.optimize(
        model,
        torch.randn(2, 3, 12, 12),
        target="my_board.toml",
        budget={"latency": 0.9},
        trials=1,
        passes="prune-channels",
        progress=False,
    )
    assert made.report.target.status == "measured"
    assert made.report.after.latency_s <= 0.9 * made.report.before.latency_s


def test_progress_begins_once_and_ends() -> None:
    heard: list[str] = []

    class Listening:
        def start(self, task: str, total: int) -> None:
            heard.append(f"start {total}")

        def advance(self, task: str, n: int = 1, note: str = "") -> None:
            heard.append(note)

        def finish(self, task: str) -> None:
            heard.append("finish")

    tell = measuring(Listening())
    for done in (1, 2):
        tell(done, 2, f"step {done}")
    assert heard == ["start 2", "step 1", "step 2", "finish"]
