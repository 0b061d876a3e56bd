"""Composite calls written out compute what they did, and are cut like what they stand for."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fxopt.graph import trace
from fxopt.passes import PruneChannels

SIZES = {"b": 3, "h": 2, "i": 4, "j": 5, "k": 6, "d": 8, "e": 7}
EQUATIONS = (
    "bhid,bhjd->bhij",
    "bhij,bhjd->bhid",
    "bihd,bjhd->bhij",
    "bid,de->bie",
    "bid,de",
    "ed,bid->bie",
    "bhid,hde->bie",
    "bhid,hde->bihe",
    "bid,bid->b",
    "bid,bjd->bij",
    "bi,bj->bij",
    "bid,bd->bid",
    "bd,bid->bid",
    "bid,d->bi",
    "bij,b->bj",
    "bi,je->bije",
    "bhd,dhe->be",
    "b...d,de->b...e",
    "...id,...jd->...ij",
    "bhid->bidh",
    "bhid->bd",
    "bid,ei->bed",
)


class Einsum(nn.Module):
    def __init__(self, equation: str, weight: bool):
        super().__init__()
        self.equation = equation
        self.weight = nn.Parameter(operands(equation)[-1]) if weight else None

    def forward(self, *tensors):
        return torch.einsum(self.equation, *tensors, *([] if self.weight is None else [self.weight]))


def operands(equation: str, batch: int = 3) -> list[torch.Tensor]:
    sizes = SIZES | {"b": batch}
    hidden = [sizes["h"], sizes["i"]] if "...d" in equation and "i" not in equation else [sizes["b"], sizes["h"]]
    draw = torch.Generator().manual_seed(0)
    made = []
    for term in equation.partition("->")[0].split(","):
        shape = [size for letter in term.replace("...", ".") for size in (hidden if letter == "." else [sizes[letter]])]
        made.append(torch.randn(shape, dtype=torch.float64, generator=draw))
    return made


@pytest.mark.parametrize("equation", EQUATIONS)
def test_an_einsum_becomes_a_product_that_computes_the_same(equation):
    tensors = operands(equation)
    held = len(tensors) == 2 and "b" not in equation.partition("->")[0].split(",")[1] and "..." not in equation
    model = Einsum(equation, held)
    given = tensors[:-1] if held else tensors
    gm = trace(model, tuple(given))

    assert not any("einsum" in str(node.target) for node in gm.graph.nodes)
    torch.testing.assert_close(gm(*given), torch.einsum(equation, *tensors), rtol=1e-12, atol=1e-12)


def test_a_written_out_einsum_runs_at_another_batch_size():
    gm = trace(Einsum("bihd,bjhd->bhij", False), tuple(operands("bihd,bjhd->bhij")))
    others = operands("bihd,bjhd->bhij", batch=7)
    torch.testing.assert_close(gm(*others), torch.einsum("bihd,bjhd->bhij", *others))


@pytest.mark.parametrize("equation", ["bii->bi", "bid,bjd,bkd->bijk"])
def test_what_is_no_product_of_two_stays_an_einsum(equation):
    shapes = {"bii->bi": [(3, 4, 4)], "bid,bjd,bkd->bijk": [(3, 4, 8), (3, 5, 8), (3, 6, 8)]}
    given = tuple(torch.randn(shape) for shape in shapes[equation])
    gm = trace(Einsum(equation, False), given)
    assert any("einsum" in str(node.target) for node in gm.graph.nodes)
    torch.testing.assert_close(gm(*given), torch.einsum(equation, *given))


class Attention(nn.Module):
    """Attention as it is often written by hand, and a gated hidden layer after it."""

    def __init__(self):
        super().__init__()
        self.qkv, self.project = nn.Linear(16, 96), nn.Linear(32, 16)
        self.hidden, self.out = nn.Linear(16, 48), nn.Linear(24, 3)

    def forward(self, x):
        q, k, v = self.qkv(x).reshape(x.shape[0], x.shape[1], 3, 4, 8).permute(2, 0, 3, 1, 4)
        scores = (torch.einsum("bhid,bhjd->bhij", q, k) * 8**-0.5).softmax(-1)
        mixed = torch.einsum("bhij,bhjd->bhid", scores, v).permute(0, 2, 1, 3).flatten(2)
        return self.out(F.glu(self.hidden(x + self.project(mixed)), dim=-1))


def test_heads_and_gates_written_by_hand_are_cut_and_equal_masks():
    torch.manual_seed(0)
    x = torch.randn(2, 6, 16, dtype=torch.float64)
    gm = trace(Attention().double().eval(), x)
    prune = PruneChannels()
    space = prune.search_space(gm)
    policy = space.uniform(0.5)
    cut, masked = PruneChannels(policy)(gm).graph_module, PruneChannels(policy).masked(gm)

    assert cut.get_submodule("qkv").weight.shape == (48, 16)
    assert cut.get_submodule("hidden").weight.shape == (24, 16)
    torch.testing.assert_close(cut(x), masked(x), rtol=1e-10, atol=1e-12)


def test_gated_linear_units_are_exact():
    class Gated(nn.Module):
        def forward(self, x):
            return F.glu(x, 1)

    x = torch.randn(2, 6, 5)
    assert torch.equal(trace(Gated(), x)(x), F.glu(x, 1))


class Mirrored(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        return self.second(self.first(x).relu().flip(1)).mean((2, 3))


def test_channels_in_reverse_are_cut_index_by_index():
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    gm = trace(Mirrored().double().eval(), x)
    policy = PruneChannels().search_space(gm).uniform(0.5)
    cut, masked = PruneChannels(policy)(gm).graph_module, PruneChannels(policy).masked(gm)
    assert cut.get_submodule("second").weight.shape[1] == 4
    torch.testing.assert_close(cut(x), masked(x), rtol=1e-10, atol=1e-12)
