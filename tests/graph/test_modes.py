"""Train and eval mode in one graph: dropout, attention, recurrent layers, and what only train mode computes."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxopt.graph import trace, verify
from tests.graph.checks import assert_same, rows, run


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.mix = nn.Linear(8, 24), nn.Linear(8, 8)
        self.dropout = 0.4

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        return self.mix(y.transpose(1, 2).reshape(x.shape))


class SelfAttention(nn.Module):
    def __init__(self, need_weights: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.4, batch_first=True)
        self.need_weights = need_weights

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=self.need_weights)[0]


class FunctionalDropout(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(x, 0.2, self.training) + F.dropout2d(x.unsqueeze(-1), 0.3, self.training).squeeze(-1)
        return F.dropout(x, p=0.5 if self.training else 0.0, training=self.training)


class DropoutInTrainingOnly(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        if self.training:
            y = F.dropout(F.dropout(x, 0.3), 0.3)
        y = self.linear(x + y)
        return F.alpha_dropout(y, 0.3, self.training)


class FunctionalNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(5))
        self.register_buffer("var", torch.ones(5))

    def forward(self, x: Tensor) -> Tensor:
        return F.rrelu(F.batch_norm(x, self.mean, self.var, training=self.training), training=self.training)


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.recurrent = kind(8, 4, 2, dropout=0.4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.recurrent(x)[0]


MODAL: list[Callable[[], nn.Module]] = [
    Attention,
    lambda: nn.Sequential(Attention(), nn.Dropout(0.3)),
    lambda: SelfAttention(True),
    lambda: SelfAttention(False),
    FunctionalDropout,
    DropoutInTrainingOnly,
    FunctionalNorm,
    lambda: Recurrent(nn.LSTM),
    lambda: Recurrent(nn.GRU),
    lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.3, batch_first=True),
]


@pytest.mark.parametrize("make", MODAL)
@pytest.mark.parametrize("training", [False, True])
def test_both_modes_are_the_models_own(make: Callable[[], nn.Module], training: bool) -> None:
    model = make().train(training)
    gm = trace(model, torch.randn(2, 5, 8))
    verify(gm)
    twin = copy.deepcopy(model)
    assert gm.training is training
    x = torch.randn(3, 5, 8)
    outputs = {}
    for mode in (training, not training, training):
        assert_same(run(gm.train(mode), x), run(twin.train(mode), x))
        outputs[mode] = run(gm, x)
        run(twin, x)
    assert_same(dict(gm.state_dict()), dict(twin.state_dict()))
    assert not torch.equal(outputs[True], outputs[False])


def test_a_submodule_switches_alone() -> None:
    model = nn.Sequential(Attention(), Attention()).eval()
    gm = trace(model, torch.randn(2, 5, 8))
    gm.get_submodule("1").train()
    model[1].train()
    x = torch.randn(3, 5, 8)
    assert_same(run(gm, x), run(model, x))
    assert not torch.equal(run(gm, x), run(gm.eval(), x))


class Noisy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x) if self.training else x * 2


class Untraceable(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * float(x.sum()) if self.training else x * 2


class Masked(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[x > 0].sum() * x if self.training else x * 2


def test_what_only_train_mode_computes_is_told() -> None:
    with pytest.warns(UserWarning, match=r"Noisy computes something else in train mode \(.*test_modes.py:\d+\)"):
        gm = trace(Noisy(), rows(2))
    x = rows(3)
    assert_same(gm.train()(x), Noisy().eval()(x))


@pytest.mark.parametrize("make", [Untraceable, Masked])
def test_a_train_mode_that_cannot_be_traced_is_told(make: type[nn.Module]) -> None:
    with pytest.warns(UserWarning, match=r"cannot be traced in train mode: .*values of a tensor"):
        gm = trace(make(), rows(2))
    x = rows(3)
    assert_same(gm.train()(x), x * 2)
