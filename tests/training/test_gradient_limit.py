"""Gradients are kept within a multiple of what they were."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fxopt.data import TensorLoader
from fxopt.errors import FxoptError
from fxopt.training import fit
from fxopt.training._optimizers import GradientLimit

SIZES = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=12)


def gradient(model: nn.Linear, size: float) -> torch.Tensor:
    model.weight.grad = torch.full_like(model.weight, size / model.weight.numel() ** 0.5)
    return model.weight.grad


@given(sizes=SIZES, multiple=st.floats(0.5, 4.0), scale=st.sampled_from((1.0, 1024.0)))
def test_no_norm_is_above_the_multiple_of_the_median_of_those_before(
    sizes: list[float], multiple: float, scale: float
) -> None:
    model = nn.Linear(3, 3, bias=False)
    limit = GradientLimit(multiple, model)
    for number, size in enumerate(sizes):
        found = gradient(model, scale * size)
        limit()
        before = sorted(sizes[:number])
        most = scale * multiple * before[number // 2] if before else float("inf")
        assert float(found.norm()) == pytest.approx(min(scale * size, most), rel=1e-4)
    assert limit.median >= scale * statistics.median_low(sizes) * (1 - 1e-5)


def test_no_limit_leaves_gradients_alone() -> None:
    model = nn.Linear(3, 3, bias=False)
    limit = GradientLimit(None, model)
    for size in (1.0, 100.0):
        found = gradient(model, size)
        limit()
        assert float(found.norm()) == pytest.approx(size)
    assert limit.median == 0.0


class Spiked:
    """Batches of which one, in the first epoch, is far off what the model is to learn."""

    def __init__(self, spike: float) -> None:
        self._spike = spike

    def __len__(self) -> int:
        return 24

    def __iter__(self) -> Any:
        generator = torch.Generator().manual_seed(0)
        for number in range(24):
            inputs = torch.randn(16, 4, generator=generator)
            yield inputs, inputs.sum(1, keepdim=True) * (self._spike if number == 4 else 1.0)


def test_one_batch_does_not_throw_a_training_off() -> None:
    def after(clip: float | None) -> float:
        torch.manual_seed(0)
        model = nn.Linear(4, 1)
        options: dict[str, Any] = {"loss": nn.functional.mse_loss, "learning_rate": 0.05, "schedule": "constant"}
        history = fit(model, Spiked(1e4), epochs=1, clip=clip, **options)
        assert (history.gradient_norm[0] > 0.0) is (clip is not None)
        return float((model.weight.detach() - 1.0).abs().max())

    assert after(2.0) < 0.2
    assert after(None) > 5.0


@pytest.mark.parametrize("stop", [1, 2])
def test_resumed_equals_uninterrupted(stop: int, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def run(stem: Path, until: int | None = None) -> tuple[dict[str, torch.Tensor], list[float]]:
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        inputs = torch.randn(40, 4)
        data = TensorLoader(inputs, inputs[:, :3].argmax(1), 8, shuffle=True)

        def progress(epoch: int, *_: object) -> None:
            if epoch == until:
                raise Stop

        history = fit(model, data, epochs=3, learning_rate=0.3, clip=0.7, checkpoint=stem, progress=progress)
        return model.state_dict(), history.gradient_norm

    with pytest.raises(Stop):
        run(tmp_path / "run", stop)
    found, whole = run(tmp_path / "run"), run(tmp_path / "whole")
    assert found[1] == whole[1]
    assert all(torch.equal(found[0][name], value) for name, value in whole[0].items())


@pytest.mark.parametrize("clip", [0.0, -1.0, float("nan"), "2"])
def test_wrong_limits_are_refused(clip: Any) -> None:
    with pytest.raises(FxoptError, match="clip has to be above zero"):
        fit(nn.Linear(1, 1), [], epochs=1, clip=clip)
