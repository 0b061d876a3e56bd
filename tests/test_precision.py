"""On the machine that is measured the result is no slower than floats. Times are made up: no test asserts a clock."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxopt
from fxopt import _precision as precision
from fxopt.decisions import Policy
from fxopt.errors import FxoptError
from fxopt.export import FastestBits, Measurement, Timing
from fxopt.graph.fake_quantize import QuantizedLayer
from fxopt.passes import Quantize
from fxopt.targets import HostTarget
from fxopt.targets import rows as r
from fxopt.targets.rows import Floats, Rows
from tests.optimizing import DATA, make_net, optimize, outcome

INTEGER, FLOAT = (8, 8), (32, 32)
ALL = {("bits", site): INTEGER for site in ("0", "3", "8")}
HALF: dict[tuple[str, str], Any] = ALL | {("bits", "8"): FLOAT}


class Machine:
    """A measured machine whose times depend on how many layers are quantized alone."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: Mapping[int, float]) -> None:
        self.seconds = seconds
        self.measured = 0
        monkeypatch.setattr(precision, "measure", self._measure)
        monkeypatch.setattr(
            precision, "fastest_bits", lambda *_: FastestBits(Policy(ALL), median_s=1.0, float_s=1.0, integer_s=1.0)
        )

    def _measure(self, model: Any, _: object, *, runs: int, peers: Any) -> Measurement:
        self.measured += 1
        own, *others = (self._time(one) for one in (model, *peers))
        timings = tuple(Timing("", time, time, time, time / own, time / own, time / own) for time in others)
        return Measurement(own, own, own, timings, batch=1, threads=1, runs=runs, clock="thread")

    def _time(self, graph: Any) -> float:
        return self.seconds[quantized(graph)]


def quantized(graph: nn.Module) -> int:
    return sum(isinstance(module, QuantizedLayer) for module in graph.modules())


def profile(rows: Rows) -> Floats:
    """Integers take a third of the time of floats."""
    return 4e-6 + r.macs(rows) * 6e-11 / (1 + 2 * (r.compute_bits(rows) <= 8))


class Judge:
    """The score of a module: one, but for every layer that is quantized and should not be, or the other way round."""

    def __init__(self, bits: Mapping[tuple[str, str], Any]) -> None:
        self.wanted = {site for (_, site), one in bits.items() if one == INTEGER}

    def __call__(self, module: nn.Module) -> float:
        found = {name for name, layer in module.named_modules() if isinstance(layer, QuantizedLayer)}
        return 1.0 - len(found ^ self.wanted)


def on_host(folder: Path, bits: Mapping[tuple[str, str], Any], **options: Any) -> fxopt.OptimizationResult:
    """A search that finds the bits given."""
    target = HostTarget(profile, "an imaginary machine", folder=folder)
    known: dict[str, Any] = {"passes": (Quantize(),), "trials": 16, "engine": "random", "train": DATA, "epochs": 0}
    return optimize(target=target, evaluate=Judge(bits), **(known | options))


def test_a_result_faster_than_floats_is_left_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, {0: 3.0, 2: 2.0, 3: 1.0})
    result = on_host(tmp_path, HALF)
    assert dict(result.policy) == HALF
    assert quantized(result.model) == 2
    assert machine.measured == 1
    assert not [note for note in result.report.notes if "floats" in note]


@pytest.mark.parametrize(
    ("seconds", "left", "words"),
    [
        (
            {0: 2.0, 2: 3.0, 3: 4.0},
            dict.fromkeys(ALL, FLOAT),
            "1.50 times as long as in floats on this machine; it was",
        ),
        ({0: 2.0, 2: 3.0, 3: 1.0}, ALL, "all layers that gain from it were put in 8 bits, which takes 0.50 times"),
    ],
)
def test_a_result_slower_than_floats_gives_way_to_the_fastest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: dict[int, float], left: Any, words: str
) -> None:
    Machine(monkeypatch, seconds)
    result = on_host(tmp_path, HALF)
    assert dict(result.policy) == left
    assert [note for note in result.report.notes if words in note]
    layers = {line.site: (line.weight_bits, line.activation_bits) for line in result.report.layers}
    assert layers == {site: bits for (_, site), bits in left.items()}
    result.save(tmp_path / "saved")
    again = fxopt.load(tmp_path / "saved", make_net())
    example = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(again(example), result.model(example), rtol=0, atol=0)
    assert quantized(again) == quantized(result.model)


def test_floats_over_the_budget_do_not_take_the_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Machine(monkeypatch, {0: 2.0, 3: 3.0})
    result = on_host(tmp_path, ALL, budget={"size": 0.5})
    assert dict(result.policy) == ALL
    assert result.report.budgets[0].met
    assert [note for note in result.report.notes if "floats are over the budget" in note]


def test_a_resumed_run_ends_the_same_way_without_measuring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Machine(monkeypatch, {0: 2.0, 2: 3.0, 3: 1.0})
    first = on_host(tmp_path, HALF, workdir=tmp_path / "run")
    machine = Machine(monkeypatch, {})
    again = on_host(tmp_path, HALF, workdir=tmp_path / "run")
    assert machine.measured == 0
    assert outcome(again) == outcome(first)
    assert len([*(tmp_path / "run").glob("measured-bits-*.json")]) == 1


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"bits": "some", "note": ""}'])
def test_a_damaged_record_is_told_with_the_remedy(tmp_path: Path, text: str) -> None:
    (tmp_path / "record.json").write_text(text)
    with pytest.raises(FxoptError, match="Delete it; it is measured again"):
        precision._recorded(tmp_path / "record.json", {"chosen": Policy({})})


def test_a_slow_layer_is_out_of_the_space_and_other_targets_are_not_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(monkeypatch, {0: 2.0, 2: 1.0})
    slow = FastestBits(Policy(HALF), median_s=1.0, float_s=1.0, integer_s=1.0)
    monkeypatch.setattr(precision, "fastest_bits", lambda *_: slow)
    result = on_host(tmp_path, ALL)
    assert {site for kind, site in result.policy} == {"0", "3"}
    assert machine.measured == 1
    optimize(passes=(Quantize(),), trials=1)
    assert machine.measured == 1
