"""Models that a stranger would bring: traced, and compared at another batch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

from fxopt.graph import trace
from tests.graph.checks import Calls, assert_same, assert_traced, image, rows, small


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * grads[0]


def without_gradient(self: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = self.linear(x)
    return self.linear(x) + y


def by_shape(self: Any, x: Tensor) -> Tensor:
    if x.shape[1] > 5:
        return x
    return F.pad(self.linear(x), [0, (-x.shape[1]) % 3]).view(x.shape[0], -1, 3).flatten(1)


ODD: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Any]]] = {
    "weight norm": (lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4))), rows),
    "orthogonal": (lambda: parametrizations.orthogonal(nn.Linear(4, 4)), rows),
    "einsum": (lambda: Calls(lambda self, x: torch.einsum("bj,jk->bk", x, self.w), w=nn.Parameter(rows(4))), rows),
    "interpolate": (
        lambda: Calls(lambda self, x: F.interpolate(self.c(x), size=x.shape[-2:]), c=nn.Conv2d(3, 4, 3)),
        image,
    ),
    "shuffle": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.PixelShuffle(2), nn.ReflectionPad2d(1)), image),
    "containers": (
        lambda: Calls(
            lambda self, x: self.d["a"](self.l[1](self.l[0](x))) + self.d["b"](x),
            d=nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Sequential(nn.Sequential(nn.Linear(4, 4)))}),
            l=nn.ModuleList([nn.Linear(4, 4), nn.GELU()]),
        ),
        rows,
    ),
    "parameter list": (
        lambda: Calls(
            lambda self, x: sum(x * p for p in self.p), p=nn.ParameterList([nn.Parameter(rows(1)) for _ in range(2)])
        ),
        rows,
    ),
    "places of a triangle": (
        lambda: Calls(
            lambda self, x: self.l(x.index_select(1, torch.ones(2, 2).triu().view(4).nonzero().squeeze(1))),
            l=nn.Linear(3, 4),
        ),
        rows,
    ),
    "control by shape": (lambda: Calls(by_shape, linear=nn.Linear(4, 4)), rows),
    "fft": (lambda: Calls(lambda self, x: torch.fft.irfft(torch.fft.rfft(self.l(x))), l=nn.Linear(4, 4)), rows),
    "autograd function": (lambda: Calls(lambda self, x: Square.apply(self.l(x)), l=nn.Linear(4, 4)), rows),
    "checkpoint": (
        lambda: Calls(lambda self, x: checkpoint(self.l, x, use_reentrant=False), l=nn.Linear(4, 4)),
        rows,
    ),
    "no_grad": (lambda: Calls(without_gradient, linear=nn.Linear(4, 4)), rows),
    "embedding bag": (lambda: nn.EmbeddingBag(9, 4), lambda batch: torch.arange(batch * 2).view(batch, 2) % 9),
    "bfloat16": (lambda: small().bfloat16(), lambda batch: image(batch).bfloat16()),
    "float64": (lambda: nn.Sequential(small().double(), nn.LayerNorm(2).double()), lambda batch: image(batch).double()),
    "constants": (
        lambda: Calls(lambda self, x: x * torch.tensor(2.0) + torch.arange(4) + torch.zeros(x.shape[0], 1)),
        rows,
    ),
    "mask": (lambda: Calls(lambda self, x: x.masked_fill(x > 0, -1e4).softmax(-1)), rows),
    "sorted": (lambda: Calls(lambda self, x: torch.topk(x.cumsum(1), 2)), rows),
    "bilinear": (lambda: nn.Bilinear(4, 4, 3), lambda batch: (rows(batch), rows(batch))),
    "cell": (lambda: Calls(lambda self, x: self.c(x, self.c(x)), c=nn.GRUCell(4, 4)), rows),
    "padding modes": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3, padding="same", padding_mode="circular"), nn.Conv2d(4, 4, 3, 2, 1)),
        image,
    ),
    "hook": (lambda: hooked(), rows),
    "sequence first": (lambda: nn.RNN(4, 3), lambda batch: torch.randn(2, batch, 4)),
}


def hooked() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].register_forward_hook(lambda module, inputs, output: output * 2)
    return model


@pytest.mark.parametrize("name", ODD)
def test_odd_models(name: str) -> None:
    make, example = ODD[name]
    torch.manual_seed(0)
    fixed = name == "sequence first"
    assert_traced(make().eval(), example(2), example(2 if fixed else 5), dynamic=not fixed)


def test_old_hooks_that_make_the_weight() -> None:
    pruned = nn.Linear(4, 4)
    prune.l1_unstructured(pruned, "weight", 0.5)
    assert_traced(nn.Sequential(pruned).eval(), rows(2), rows(3))


def test_gradients_stop_where_the_model_stops_them() -> None:
    model = Calls(without_gradient, linear=nn.Linear(4, 4))
    twin = copy.deepcopy(model)
    x = rows(3)
    trace(model, rows(2))(x).sum().backward()
    twin(x).sum().backward()
    assert_same(model.linear.weight.grad, twin.linear.weight.grad)
