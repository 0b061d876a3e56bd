"""What a stranger gets wrong about choosing operators: one clear line, from Python and from the command."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import fxopt
from fxopt import models
from fxopt.cli import app
from fxopt.data import TensorLoader
from fxopt.decisions import Policy
from fxopt.errors import DataError, FxoptError, InfeasibleError, PassError, TargetError
from fxopt.lowering import lower_operators
from fxopt.nas import Supernet
from fxopt.passes import SelectOperators
from fxopt.passes._operators import _CUSTOM
from fxopt.passes.select_operators import Shape, Style, register_candidate
from tests.optimizing import optimize

GENERATOR = torch.Generator().manual_seed(0)
IMAGES = torch.randn(64, 3, 8, 8, generator=GENERATOR)
LABELS = torch.randint(0, 4, (64,), generator=GENERATOR)
EXAMPLE = IMAGES[:2]
STEP = SelectOperators(patterns=("inverted-residual",), kernels=(3, 5), expansions=(3,))


def make() -> nn.Module:
    torch.manual_seed(0)
    blocks = (models.Block(8, 3, 3), models.Block(12, 3, 3, 2))
    return models.MobileNetwork(models.Plan(8, blocks, 16, 1), 4, 3).eval()


def loader(samples: int = 64, size: int = 16) -> TensorLoader:
    return TensorLoader(IMAGES[:samples], LABELS[:samples], size)


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = make()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.net(x)
        return y, y


class Spoiled:
    """Batches that hold NaN from the tenth on that is read."""

    def __init__(self) -> None:
        self.read = 0

    def __len__(self) -> int:
        return 4

    def __iter__(self) -> Iterator[Any]:
        for images, labels in loader():
            self.read += 1
            yield torch.full_like(images, math.nan) if self.read > 9 else images, labels


class Branching(nn.Module):
    """A candidate whose way depends on what it reads."""

    def __init__(self, shape: Shape, style: Style) -> None:
        super().__init__()
        self.conv = nn.Conv2d(shape.inputs, shape.outputs, 3, shape.stride, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x) if x.sum() > 0 else -self.conv(x)


class Doubling(Branching):
    """A candidate that gives another type than it reads."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x).double()


class Fourier(nn.Module):
    """A candidate of operators that no target has a model for."""

    def __init__(self, shape: Shape, style: Style) -> None:
        super().__init__()
        self.conv = nn.Conv2d(shape.inputs, shape.outputs, 3, shape.stride, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.fft.ifft2(torch.fft.fft2(self.conv(x))).real


@pytest.fixture(autouse=True)
def candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxopt.passes._operators._CUSTOM", dict(_CUSTOM))
    register_candidate("shrinking", lambda shape, style: nn.Conv2d(shape.inputs, shape.outputs, 3))
    register_candidate("fourier", Fourier)
    register_candidate("doubling", Doubling)
    register_candidate("branching", Branching)
    register_candidate("raising", lambda shape, style: nn.Conv2d(1 // 0, 1, 1))
    register_candidate("nothing", lambda shape, style: None)  # type: ignore[arg-type, return-value]
    register_candidate("failing", lambda shape, style: nn.Linear(1, 1))
    register_candidate("unfit", Fourier, fits=lambda shape: shape.width == 3)  # type: ignore[attr-defined]


def offering(name: str) -> SelectOperators:
    return SelectOperators(patterns=("inverted-residual",), candidates=("mb3-k3", name))


WRONG: dict[str, tuple[type[FxoptError], str, Callable[[], dict[str, Any]]]] = {
    "no convolution": (
        PassError,
        "no block to choose an operator for: it has no convolution",
        lambda: {"model": nn.Sequential(nn.Flatten(), nn.Linear(192, 4))},
    ),
    "no block": (
        PassError,
        r"0: it is a 1 x 1 convolution.*register_pattern",
        lambda: {"model": nn.Sequential(nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())},
    ),
    "all blocks ignored": (
        PassError,
        r"operator for: ignore=\('blocks.*',\) leaves out all 2 that there are, such as blocks.0; ",
        lambda: {"passes": (SelectOperators(patterns=("inverted-residual",), ignore=("blocks.*",)),)},
    ),
    "floats that are no probabilities": (
        DataError,
        "they sum to 4 to 4 over the classes",
        lambda: {"train": TensorLoader(IMAGES, torch.ones(64, 4), 16), "val": None, "evaluate": lambda module: 0.5},
    ),
    "a candidate of another shape": (
        PassError,
        r"'shrinking' makes \(2, 8, 6, 6\).*register_candidate\(fits=",
        lambda: {"passes": (offering("shrinking"),)},
    ),
    "a candidate that has no cost": (
        TargetError,
        "cannot cost 'fourier' at 'blocks.0'.*Leave the candidate out",
        lambda: {"passes": (offering("fourier"),)},
    ),
    "too few samples": (DataError, "2 samples cannot be split", lambda: {"train": loader(2, 2)}),
    "too few batches": (
        DataError,
        r"1 batch cannot be split.*more data or smaller batches",
        lambda: {"train": list(loader(16))},
    ),
    "a generator": (DataError, "train is a generator", lambda: {"train": (one for one in loader())}),
    "outputs of another kind": (
        DataError,
        r"The model gives a tuple of .*, no tensor of class scores.*; give loss=callable",
        lambda: {"model": Pair(), "val": None, "evaluate": lambda module: 0.5},
    ),
    "labels that do not count": (
        DataError,
        r"train, batch \d, has no label that counts \(-100 is left out\)",
        lambda: {"train": [(images, torch.full_like(labels, -100)) for images, labels in loader()]},
    ),
    "a target that cannot cost the original": (
        TargetError,
        "'eie' cannot cost the block at 'blocks.0': it has no model for 'add', .* Choose another target",
        lambda: {"target": "eie"},
    ),
    "no folder": (FxoptError, "workdir is a int; give a path", lambda: {"workdir": 5}),
    "labels of another kind": (
        DataError,
        "class numbers are whole",
        lambda: {"train": TensorLoader(IMAGES, torch.randn(64), 16), "val": None, "evaluate": lambda module: 0.5},
    ),
    "no data": (DataError, "give train", lambda: {"train": None}),
    "frozen": (
        FxoptError,
        "no parameter to train; set requires_grad on what shall be trained",
        lambda: {"model": make().requires_grad_(False)},
    ),
    "a limit out of reach": (
        InfeasibleError,
        r"latency of [\d.]+ [um]s, over the [\d.]+ [num]s asked for",
        lambda: {"budget": {"latency": 0.001}},
    ),
    "NaN on the way": (
        FxoptError,
        r"nan in epoch \d+, batch \d+ \(step \d+\).*supernet\.safetensors holds the last good state.*remove .*supernet",
        lambda: {"train": Spoiled()},
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_one_line_says_what_where_and_what_to_do(name: str, tmp_path: Path) -> None:
    error, words, changed = WRONG[name]
    given: dict[str, Any] = {"passes": (STEP,), "budget": {"macs": 0.9}, "target": "pixel1", "workdir": tmp_path}
    given |= {"train": loader(), "val": loader(32), "epochs": 1} | changed()
    if "model" in given and name != "outputs of another kind":
        given["passes"] = ("select-operators",) if name != "frozen" else (STEP,)
    model = given.pop("model", None) or make()
    with pytest.raises(error, match=words) as caught:
        optimize(model, EXAMPLE, **given)
    assert "\n" not in str(caught.value)
    assert not [path.name for path in tmp_path.rglob("*") if path.name != "supernet.safetensors" and path.is_file()]


@pytest.mark.parametrize("build", [Supernet, lower_operators])
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("raising", "builder of candidate 'raising' fails at 'blocks.0': ZeroDivisionError"),
        ("nothing", "'nothing' at 'blocks.0' is a NoneType"),
        ("failing", r"'failing', given an input of \(2, 8, 8, 8\), fails at 'blocks.0': RuntimeError"),
        ("doubling", "'doubling' at 'blocks.0' makes torch.float64 of an input of torch.float32"),
        ("unfit", "fits of candidate 'unfit' fails at 'blocks.0': AttributeError"),
    ],
)
def test_a_candidate_that_fails_is_named_with_its_block(build: Callable[..., Any], name: str, words: str) -> None:
    with pytest.raises(PassError, match=words) as caught:
        build(fxopt.trace(make(), EXAMPLE), offering(name))
    assert "\n" not in str(caught.value)


def test_a_candidate_that_cannot_be_traced_is_named_with_its_block() -> None:
    with pytest.raises(PassError, match=r"'blocks.0.branching' cannot be traced: .*test_bad_operators.py:\d+"):
        lower_operators(fxopt.trace(make(), EXAMPLE), offering("branching"))


def test_a_candidate_that_is_no_chain_stands_behind_another() -> None:
    graph = fxopt.trace(make(), EXAMPLE)
    policy = Policy({("operator", "blocks.0"): "fourier", ("operator", "blocks.1"): "fourier"})
    made = offering("fourier").with_policy(policy)(graph).graph_module
    assert made(IMAGES[:3]).shape == (3, 4)


MODULE = """
import torch
from tests.test_bad_operators import EXAMPLE, IMAGES, LABELS, Pair, Spoiled, loader, make

def model(): return make(), EXAMPLE
def pair(): return Pair(), EXAMPLE
def brief(): return make().bfloat16(), EXAMPLE.bfloat16()
def double(): return make().double(), EXAMPLE.double()
def flat(): return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 4)), EXAMPLE
def train(): return loader()
def few(): return loader(2, 2)
def generator(): return (one for one in loader())
def spoiled(): return Spoiled()
def score(module): return 0.5
"""


@pytest.mark.parametrize(
    ("model", "words", "told"),
    [
        ("flat", ["--train", "train"], "no block to choose an operator for"),
        ("brief", ["--train", "spoiled"], "The model is in bfloat16, which onnxruntime does not compute in"),
        (
            "double",
            ["--train", "spoiled"],
            "The model has convolutions in float64, which onnxruntime has no kernel for",
        ),
        ("model", ["--train", "few"], "2 samples cannot be split"),
        ("model", ["--train", "generator"], "train is a generator"),
        ("model", [], "give train"),
        ("pair", ["--train", "train", "--evaluate", "score"], "give loss=callable(output, label)"),
        ("model", ["--train", "spoiled"], "The loss of the"),
        ("model", ["--train", "train", "--budget", "latency=0.01%"], "The cheapest architecture has a latency of"),
    ],
)
def test_the_command_says_the_same_in_one_line(model: str, words: list[str], told: str, tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text(MODULE)
    named = [word if word.startswith("--") or "=" in word else f"{file}:{word}" for word in words]
    fixed = ["--passes", "select-operators", "--target", "pixel1", "--epochs", "1", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, ["optimize", f"{file}:{model}", *fixed, *named])
    assert result.exit_code == 1
    errors = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1
    assert told in errors[0]
    assert "Traceback" not in result.stderr
    left = {path.name for path in (tmp_path / "out").rglob("*")}
    assert left <= {"options.json", "supernet.safetensors"}
