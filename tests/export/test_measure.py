"""measure: the protocol and its answers. No test asserts how fast anything is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fxopt.errors import DataError, ExportError
from fxopt.export import _clock as clock_of
from fxopt.export import _measure as protocol
from fxopt.export import export_onnx, host_fingerprint, measure
from fxopt.graph import trace


class Counting:
    """A clock that a model moves on by its own cost, and a record of who ran."""

    def __init__(self) -> None:
        self.now = 0.0
        self.ran: list[str] = []

    def model(self, name: str, cost: float) -> Callable[[], Any]:
        def run() -> None:
            self.now += cost
            self.ran.append(name)

        return run


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("measure") / "linear.onnx"
    export_onnx(nn.Sequential(nn.Linear(6, 4)), path, torch.randn(2, 6), check=False)
    return path


def test_models_run_in_turn_and_each_leads_its_share_of_rounds() -> None:
    clock = Counting()
    models = [clock.model("a", 0.01), clock.model("b", 0.03), clock.model("c", 0.02)]
    samples = clock_of.interleave(models, 6, lambda: clock.now)
    np.testing.assert_allclose(samples, np.repeat([[0.01], [0.03], [0.02]], 6, axis=1))
    rounds = ["".join(clock.ran[-36:][start : start + 6]) for start in range(0, 36, 6)]
    assert rounds == 2 * ["aabbcc", "bbccaa", "ccaabb"]


def test_short_models_are_repeated_within_a_sample() -> None:
    clock = Counting()
    samples = clock_of.interleave([clock.model("short", 1e-5)], 4, lambda: clock.now)
    np.testing.assert_allclose(samples, 1e-5)
    warm_up = 2 * clock_of._WARM_UP
    assert (len(clock.ran) - warm_up) / 4 == pytest.approx(100, abs=1)


def test_the_ratio_is_that_of_each_round() -> None:
    reference = np.array([1.0, 2.0, 4.0])
    timing = protocol._timing("twice", 2.0 * reference, reference)
    assert (timing.ratio, timing.ratio_q25, timing.ratio_q75) == (2.0, 2.0, 2.0)
    assert (timing.median_s, timing.q25_s, timing.q75_s) == (4.0, 3.0, 6.0)


def test_a_file_needs_no_example(file: Path) -> None:
    found = measure(file, batch=3, runs=3)
    assert 0.0 < found.q25_s <= found.median_s <= found.q75_s
    assert (found.batch, found.runs, found.threads, found.clock, found.peers) == (3, 3, 1, "thread", ())


def test_graphs_and_modules_are_exported_and_compared(file: Path) -> None:
    model, example = nn.Sequential(nn.Linear(6, 4)), torch.randn(2, 6)
    found = measure(trace(model, example), example, runs=2, threads=2, peers=[model, str(file)])
    assert found.clock == "wall"
    assert [peer.name for peer in found.peers] == ["Sequential", "linear.onnx"]
    assert all(peer.ratio_q25 <= peer.ratio <= peer.ratio_q75 and peer.ratio > 0.0 for peer in found.peers)


def test_inputs_of_other_types_are_made_up(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Embedding(5, 3))
    export_onnx(model, tmp_path / "m.onnx", torch.zeros(2, 4, dtype=torch.long), check=False)
    assert measure(tmp_path / "m.onnx", runs=1).median_s > 0.0


@pytest.mark.parametrize(
    ("options", "message"), [({"batch": 0}, "at least 1"), ({"runs": 0}, "at least 1"), ({"threads": -1}, "at least 1")]
)
def test_options_are_checked(file: Path, options: dict[str, int], message: str) -> None:
    with pytest.raises(ExportError, match=message):
        measure(file, **options)


def test_what_cannot_be_measured_says_why(file: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="example_inputs is missing"):
        measure(nn.Linear(2, 2))
    with pytest.raises(DataError, match="takes 1 inputs and example_inputs holds 2"):
        measure(file, (torch.randn(2, 6), torch.randn(2, 6)))
    with pytest.raises(ExportError, match="cannot load"):
        measure(tmp_path / "missing.onnx")
    with pytest.raises(ExportError, match="cannot run"):
        measure(file, torch.randn(2, 7))
    (tmp_path / "text.onnx").write_text("no model")
    with pytest.raises(ExportError, match="cannot load"):
        measure(tmp_path / "text.onnx")


def test_the_fingerprint_tells_machines_and_threads_apart() -> None:
    one, two = host_fingerprint(), host_fingerprint(threads=2)
    assert one == host_fingerprint(threads=1)
    assert one != two
    assert "onnxruntime" in one
    assert "\n" not in one
