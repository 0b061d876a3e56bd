"""What cannot be traced: the error says where in the user's code, why, and what to do, and nothing is printed."""

from __future__ import annotations

import inspect
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fxopt.errors import TraceError
from fxopt.graph import trace
from tests.graph.checks import Calls, rows


class Opaque:
    """An object that torch does not know."""

    def __init__(self, x: Tensor) -> None:
        self.x = x


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        if x.sum() > 0:
            return x * 2
        return x


class ReadsItem(Branches):
    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        return x * x.sum().item()


class ReadsList(Branches):
    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        return x * x.sum(1).tolist()[0]


class ReadsInteger(Branches):
    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        return x[: int(x.argmax())]


class UsesNumpy(Branches):
    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        return torch.from_numpy(np.tanh(x.detach().numpy()))


class Selects(Branches):
    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        return x[x > 0]


class GivesOpaque(Branches):
    def forward(self, x: Tensor) -> Any:
        return Opaque(self.linear(x))


class GivesSet(Branches):
    def forward(self, x: Tensor) -> Any:
        return {self.linear(x)}


class Vectorized(Branches):
    def forward(self, x: Tensor) -> Tensor:
        return torch.vmap(lambda row: row * self.linear.bias)(x)


CASES = {
    Branches: ("values of a tensor", "torch.where", "if x.sum() > 0"),
    ReadsItem: ("plain Python numbers", "tensor operations", "x.sum().item()"),
    ReadsList: ("plain Python numbers", "tensor operations", "x.sum(1).tolist()"),
    ReadsInteger: ("values of a tensor", "torch.where", "int(x.argmax())"),
    UsesNumpy: ("leaves torch for numpy", "tensor operations", "np.tanh"),
    Selects: ("shape that aten.index.Tensor gives depends on the values", "Trace the submodule before", "x[x > 0]"),
    GivesOpaque: ("an object of a class that torch does not know", "Give tensors, tuples, dicts or dataclasses", None),
    GivesSet: ("an object of a class that torch does not know", "Give tensors, tuples, dicts or dataclasses", None),
    Vectorized: ("does not fit its inputs", "Trace a submodule", None),
}


@pytest.mark.parametrize("make", CASES)
def test_a_refusal_says_where_why_and_what_to_do(make: type[nn.Module], capfd: pytest.CaptureFixture[str]) -> None:
    why, what, code = CASES[make]
    with pytest.raises(TraceError) as caught:
        trace(make(), rows(2))
    message = str(caught.value)
    assert why in message
    assert what in message
    where = re.search(rf"Cannot trace {make.__name__} at {re.escape(__file__)}:(\d+): ", message)
    assert where is not None
    lines, first = inspect.getsourcelines(make.forward)
    assert first <= int(where[1]) < first + len(lines)
    quoted = lines[int(where[1]) - first].strip()
    assert f"The code is `{quoted}`." in message
    if code is not None:
        assert code in quoted
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("example", "said"),
    [
        (torch.randn(2, 5), r"\(2, 5\) torch.float32\).*shapes cannot be multiplied"),
        (torch.ones(2, 4, dtype=torch.int64), r"\(2, 4\) torch.int64\).*same dtype"),
        (torch.randn(2, 4).double(), r"torch.float64\).*same dtype"),
        (torch.tensor(1.0), r"\(\) torch.float32\)"),
        ((torch.randn(2, 4), torch.randn(2, 4)), "takes 2 positional arguments but 3 were given"),
        ({"y": torch.randn(2, 4)}, "unexpected keyword argument 'y'"),
    ],
)
def test_example_inputs_that_the_model_refuses(example: Any, said: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(TraceError, match=rf"(?s)fails on its example inputs .*{said}.*Check the shapes and types"):
        trace(Branches(), example)
    assert capfd.readouterr() == ("", "")


def test_an_index_out_of_range_is_found() -> None:
    with pytest.raises(TraceError, match=r"Embedding fails on its example inputs .*index out of range"):
        trace(nn.Embedding(5, 2), torch.tensor([[1], [5]]))


@pytest.mark.parametrize(
    ("example", "said"),
    [
        (torch.zeros(0, 4), r"empty tensor of shape \(0, 4\); give at least one sample"),
        ((torch.zeros(2, 4), torch.zeros(2, 0)), r"empty tensor of shape \(2, 0\)"),
        ((), "holds no tensor"),
        ({}, "holds no tensor"),
        ((3, "a"), "holds no tensor"),
        (None, "example_inputs is missing"),
        (3, "of type int; give a tensor, a tuple"),
        ("text", "of type str; give a tensor, a tuple"),
        (np.zeros((2, 4)), "of type ndarray; give a tensor, a tuple"),
    ],
)
def test_example_inputs_of_no_use(example: Any, said: str) -> None:
    with pytest.raises(TraceError, match=said):
        trace(Branches(), example)


@pytest.mark.parametrize("model", [3, "model", None, nn.Linear, lambda x: x])
def test_what_is_no_module(model: Any) -> None:
    kind = type(model).__name__
    with pytest.raises(TraceError, match=f"Cannot trace a {kind}; give an nn.Module or an ExportedProgram"):
        trace(model, rows(2))


def test_a_refused_model_is_left_as_it_was() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        self.count.add_(1)
        return x if self.count.sum() > x.sum() else -x

    model = Calls(forward, count=torch.zeros(()), norm=nn.BatchNorm1d(4)).train()
    model.norm.eval()
    seed = torch.random.get_rng_state()
    with pytest.raises(TraceError):
        trace(model, rows(2).requires_grad_())
    assert float(model.count) == 0.0
    assert (model.training, model.norm.training) == (True, False)
    assert model.norm.weight.grad is None
    assert not torch.equal(seed, torch.random.get_rng_state())  # rows() alone drew from it
    torch.random.set_rng_state(seed)
    rows(2)
    expected = torch.random.get_rng_state()
    torch.random.set_rng_state(seed)
    with pytest.raises(TraceError):
        trace(model, rows(2))
    assert torch.equal(torch.random.get_rng_state(), expected)


def test_tracing_is_silent(capfd: pytest.CaptureFixture[str]) -> None:
    trace(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)), rows(1))
    trace(Calls(lambda self, x: torch.stack([row * 2 for row in x])), rows(2))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["meta", "graph", "code"])
def test_a_module_named_as_something_that_every_graph_has_is_told(name: str) -> None:
    model = Calls(lambda self, x: getattr(self, name)(x))
    model.add_module(name, nn.Linear(4, 4))
    with pytest.raises(TraceError, match=f"attribute '{name}'.*rename it"):
        trace(model, rows(2))
    holder = nn.Sequential(model)
    x = rows(3)
    torch.testing.assert_close(trace(holder, x)(x), holder(x))
