"""In-place operators become plain ones exactly where nobody can tell the difference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxopt.graph import trace
from fxopt.graph._functionalize import functional_form
from tests.graph.checks import Calls, assert_same, assert_traced, image, rows

_aten = torch.ops.aten


def chain(self: Any, x: Tensor) -> Tensor:
    return self.linear(x).add_(1.0).mul_(2.0).relu_().clamp_(max=3.0)


def read_before(self: Any, x: Tensor) -> Tensor:
    y = self.linear(x)
    z = y * 3
    return y.add_(1.0) + z


def read_after(self: Any, x: Tensor) -> Tensor:
    y = self.linear(x)
    y.add_(1.0)
    return y * y.mul_(2.0)


def residual(self: Any, x: Tensor) -> Tensor:
    y = self.linear(x)
    y += x
    return F.relu(y, inplace=True) + y


def two_ways(self: Any, x: Tensor) -> Tensor:
    y = self.linear(x)
    one = y.sigmoid_()
    return one + y


def old_view_read(self: Any, x: Tensor) -> Tensor:
    y = self.linear(x)
    view = y.view(-1, 2, 2)
    y.add_(1.0)
    return view.flatten(1) + y


def written_view(self: Any, x: Tensor) -> Tensor:
    y = self.linear(x)
    y[:, 1].mul_(5.0)
    return y


def written_after_flatten(self: Any, x: Tensor) -> Tensor:
    y = self.linear(x)
    flat = y.flatten()
    flat.add_(1.0)
    return y + flat.view_as(y)


def dropped(self: Any, x: Tensor) -> Tensor:
    y = self.linear(x)
    z = F.dropout(y, 0.5, False)
    z.add_(1.0)
    return y + z


def detached(self: Any, x: Tensor) -> Tensor:
    y = self.linear(x)
    z = y.detach()
    z.add_(1.0)
    return y + z


def filled(self: Any, x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    y.fill_(2.0)
    y.copy_(self.linear(x))
    return y.masked_fill_(x > 0, 0.0)


def written_input(self: Any, x: Tensor) -> Tensor:
    y = x.relu_()
    return self.linear(y) + x


def itself(self: Any, x: Tensor) -> Tensor:
    y = self.linear(x)
    return y.add_(y)


def buffer(self: Any, x: Tensor) -> Tensor:
    self.seen.add_(1.0)
    return self.linear(x) * self.seen


GONE = [chain, read_before, read_after, residual, two_ways, itself]
OTHERS = [old_view_read, written_view, written_after_flatten, dropped, detached, filled, written_input]


@pytest.mark.parametrize("function", [*GONE, *OTHERS, buffer])
def test_the_graph_computes_what_the_model_does(function: Callable[..., Tensor]) -> None:
    state = {"seen": torch.zeros(())} if function is buffer else {}
    assert_traced(Calls(function, linear=nn.Linear(4, 4), **state), rows(2), rows(5))


def test_the_graph_does_not_write_to_its_input() -> None:
    gm = trace(Calls(written_input, linear=nn.Linear(4, 4)), rows(2))
    x = rows(3)
    given = x.clone()
    gm(given)
    assert_same(given, x)


@pytest.mark.parametrize("function", GONE)
def test_what_nobody_can_tell_is_made_functional(function: Callable[..., Tensor]) -> None:
    gm = trace(Calls(function, linear=nn.Linear(4, 4)), rows(2))
    assert not [node for node in gm.graph.nodes if functional_form(node.target) is not None]


@pytest.mark.parametrize("function", [old_view_read, written_view, detached, buffer])
def test_what_is_read_under_another_name_stays_in_place(function: Callable[..., Tensor]) -> None:
    gm = trace(Calls(function, linear=nn.Linear(4, 4), seen=torch.zeros(())), rows(2))
    assert [node for node in gm.graph.nodes if functional_form(node.target) is not None]


@pytest.mark.parametrize("function", [*GONE[1:], *OTHERS])
def test_gradients_are_the_same(function: Callable[..., Tensor]) -> None:
    model = Calls(function, linear=nn.Linear(4, 4))
    gm = trace(model, rows(2))
    x = rows(3)
    model(x.clone()).sum().backward()
    expected = model.linear.weight.grad.clone()
    model.zero_grad()
    gm(x.clone()).sum().backward()
    assert_same(model.linear.weight.grad, expected)


def test_a_shared_in_place_module() -> None:
    act = nn.ReLU(inplace=True)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), act, nn.Conv2d(4, 4, 1), act)
    gm = assert_traced(model, image(2), image(3))
    assert act.inplace
    called = {str(node.target) for node in gm.graph.find_nodes(op="call_module")}
    assert not [path for path in called if getattr(gm.get_submodule(path), "inplace", False)]


def test_functional_forms() -> None:
    assert functional_form(_aten.add_.Tensor) is _aten.add.Tensor
    assert functional_form(_aten.relu_.default) is _aten.relu.default
    for target in (_aten.add.Tensor, torch.relu, "relu_", _aten._foreach_add_.Scalar, _aten.copy_.default):
        assert functional_form(target) is None
