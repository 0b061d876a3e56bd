"""An ONNX file as a module."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import nn

import fxopt
from fxopt.errors import ExportError
from fxopt.evaluate import accuracy
from fxopt.export import OnnxModule


class Named(nn.Module):
    """Takes a mapping, gives one."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> Mapping[str, torch.Tensor]:
        scores = self.head(x * mask)
        return {"hidden": 2 * scores, "logits": scores}


class Nested(nn.Module):
    """Takes a tensor and a pair of them."""

    def forward(self, x: torch.Tensor, pair: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return x + 2 * pair[0] - pair[1]


def exported(model: nn.Module, example: object, folder: Path) -> OnnxModule:
    fxopt.export_onnx(fxopt.trace(model.eval(), example), folder / "model.onnx", example)
    return OnnxModule(folder / "model.onnx")


def test_inputs_and_outputs_have_names(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, inputs = Named(), {"mask": torch.ones(6, 8), "x": torch.randn(6, 8)}
    file = exported(model, inputs, tmp_path)
    wanted = model(**inputs)
    for found in (file(**inputs), file(inputs["mask"], x=inputs["x"])):
        torch.testing.assert_close(found.logits, wanted["logits"])
        torch.testing.assert_close(found, (wanted["hidden"], wanted["logits"]))
    labels = wanted["logits"].argmax(1)
    labels[0] = (labels[0] + 1) % 4
    assert accuracy(file, [(inputs, labels)]) == pytest.approx(5 / 6)


def test_nested_inputs_are_taken_in_order(tmp_path: Path) -> None:
    x, pair = torch.randn(3, 4), (torch.randn(3, 4), torch.randn(3, 4))
    file = exported(Nested(), (x, pair), tmp_path)
    for found in (file(x, pair), file(x, None, pair)):
        torch.testing.assert_close(found, x + 2 * pair[0] - pair[1])


def test_tensors_that_need_gradients_are_taken(tmp_path: Path) -> None:
    x = torch.randn(3, 8, requires_grad=True)
    found = exported(nn.Linear(8, 2), torch.randn(2, 8), tmp_path)(x)
    assert found.shape == (3, 2)


@pytest.mark.parametrize(
    "given",
    [((1,), {}), ((1, 1, 1), {}), ((1,), {"x": 1}), ((1,), {"other": 1}), ((), {"x": 1})],
    ids=["too few", "too many", "twice", "unknown", "missing"],
)
def test_other_inputs_are_refused(given: tuple[tuple[int, ...], dict[str, int]], tmp_path: Path) -> None:
    one = torch.ones(2, 8)
    file = exported(Named(), {"x": one, "mask": one}, tmp_path)
    args, named = given
    with pytest.raises(ExportError, match="inputs x, mask; got"):
        file(*(one for _ in args), **dict.fromkeys(named, one))
