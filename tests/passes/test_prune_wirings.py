"""PruneChannels where channels are split, merged, shuffled and multiplied: cutting equals masking, nothing is stale."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fxopt.decisions import Policy
from fxopt.graph import trace
from fxopt.lowering import lower
from fxopt.passes import PruneChannels
from tests.passes.test_prune_channels import prepared, pruned
from tests.wiring import Wired

Forward = Callable[[Any, Tensor], Tensor]
Layers = dict[str, nn.Module | nn.Parameter]


def conv(inputs: int, outputs: int, kernel: int = 1, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **options)


def heads(x: Tensor, count: int) -> Tensor:
    return x.view(x.shape[0], x.shape[1], count, -1).transpose(1, 2)


def merged(x: Tensor) -> Tensor:
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], -1)


def qkv(width: int = 8) -> Layers:
    return {name: nn.Linear(width, width) for name in ("q", "k", "v", "o")}


def fused(m: Any, x: Tensor) -> Tensor:
    q, k, v = m.qkv(x).reshape(x.shape[0], 5, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
    return m.o(merged(F.scaled_dot_product_attention(q, k, v)))


def separate(m: Any, x: Tensor) -> Tensor:
    q, k, v = (heads(one(x), 2) for one in (m.q, m.k, m.v))
    return m.o(merged(F.scaled_dot_product_attention(q, k, v)))


def written_out(m: Any, x: Tensor) -> Tensor:
    q, k, v = (heads(one(x), 2) for one in (m.q, m.k, m.v))
    scores = (q @ k.transpose(-1, -2) * 0.5 + m.bias).softmax(-1)
    return m.o(merged(scores @ v))


def grouped_queries(m: Any, x: Tensor) -> Tensor:
    q, k, v = heads(m.q(x), 4), heads(m.k(x), 2), heads(m.v(x), 2)
    k, v = (one[:, :, None].expand(-1, -1, 2, -1, -1).reshape(one.shape[0], 4, 5, 2) for one in (k, v))
    return m.o(merged(F.scaled_dot_product_attention(q, k, v)))


def interleaved(m: Any, x: Tensor) -> Tensor:
    q, k, v = m.qkv(x).view(x.shape[0], 5, 2, 12).transpose(1, 2).chunk(3, -1)
    return m.o(merged(F.scaled_dot_product_attention(q, k, v)))


def channels_attend(m: Any, x: Tensor) -> Tensor:
    q, k, v = (heads(one(x), 2).transpose(-1, -2) for one in (m.q, m.k, m.v))
    mixed = (q @ k.transpose(-1, -2) * m.temperature).softmax(-1) @ v
    return m.o(merged(mixed.transpose(-1, -2)))


def torch_attention(m: Any, x: Tensor) -> Tensor:
    return m.attention(x, x, x, need_weights=False)[0]


ATTENTIONS: dict[str, tuple[Forward, Layers]] = {
    "fused": (fused, {"qkv": nn.Linear(8, 24), "o": nn.Linear(8, 8)}),
    "separate": (separate, qkv()),
    "written out": (written_out, {**qkv(), "bias": nn.Parameter(torch.randn(2, 5, 5, dtype=torch.float64))}),
    "grouped queries": (
        grouped_queries,
        {"q": nn.Linear(8, 8), "k": nn.Linear(8, 4), "v": nn.Linear(8, 4), "o": nn.Linear(8, 8)},
    ),
    "interleaved": (interleaved, {"qkv": nn.Linear(8, 24), "o": nn.Linear(8, 8)}),
    "over channels": (
        channels_attend,
        {**qkv(), "temperature": nn.Parameter(torch.ones(2, 1, 1, dtype=torch.float64))},
    ),
    "of torch": (torch_attention, {"attention": nn.MultiheadAttention(8, 2, batch_first=True)}),
}


@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention_loses_whole_heads(name: str) -> None:
    forward, layers = ATTENTIONS[name]
    gm, inputs = prepared(Wired(forward, **layers), 5, 8)
    (decision,) = PruneChannels().search_space(gm)
    assert (decision.default, decision.operator) == (2, "linear")
    result = pruned(gm, inputs, Policy({decision.key: 1}))
    kept = {name: value.shape for name, value in result.named_parameters()}
    out = next(shape for name, shape in kept.items() if name in ("o.weight", "attention.out_proj.weight"))
    assert out == (8, 4)


@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention_loses_width_on_request(name: str) -> None:
    forward, layers = ATTENTIONS[name]
    gm, inputs = prepared(Wired(forward, **layers), 5, 8)
    step = PruneChannels(attention="width")
    space = step.search_space(gm)
    widths = {decision.default for decision in space}
    assert widths == ({2} if name == "grouped queries" else {4})
    for policy in (space.uniform(0.5), space.uniform(0.75), space.decode([0] * len(space))):
        pruned(gm, inputs, policy, attention="width")
        cut = step.with_policy(policy)(gm).graph_module
        again = step.search_space(cut)
        if len(again):
            pruned(cut, inputs, again.decode([0] * len(again)), attention="width")


def test_the_scale_of_attention_is_that_of_the_original_width() -> None:
    gm, inputs = prepared(Wired(separate, **qkv()), 5, 8)
    policy = Policy({("channels", "q"): 3, ("channels", "v"): 2})
    cut = pruned(gm, inputs, policy, attention="width")
    (call,) = cut.graph.find_nodes(op="call_function", target=torch.ops.aten.scaled_dot_product_attention.default)
    assert call.kwargs["scale"] == 4**-0.5
    assert cut.get_submodule("k").weight.shape == (6, 8)
    assert cut.get_submodule("o").weight.shape == (8, 4)


@pytest.mark.parametrize("name", ["fused", "separate", "of torch"])
def test_widths_are_lowered_as_they_are_cut(name: str) -> None:
    gm, _ = prepared(Wired(ATTENTIONS[name][0], **ATTENTIONS[name][1]), 5, 8)
    step = PruneChannels(attention="width")
    policy = step.search_space(gm).uniform(0.5)
    cut = step.with_policy(policy)(gm).graph_module
    bound = lower(gm, attention="width").bind(policy)
    np.testing.assert_array_equal(bound.rows, lower(cut, attention="width").bind().rows)


def width(m: Any, x: Tensor) -> Tensor:
    q, k, v = (one(x).view(x.shape[0], 5, 2, 4).cumsum(2).transpose(1, 2) for one in (m.q, m.k, m.v))
    return m.o(merged(F.scaled_dot_product_attention(q, k, v)))


def test_heads_that_cannot_go_lose_width() -> None:
    gm, inputs = prepared(Wired(width, **qkv()), 5, 8)
    space = PruneChannels().search_space(gm)
    assert [decision.default for decision in space] == [4, 4]
    result = pruned(gm, inputs, space.uniform(0.5))
    assert result.get_submodule("q").weight.shape == result.get_submodule("v").weight.shape == (4, 8)


def shuffled(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    return m.b(y.view(y.shape[0], 2, 4, 4, 4).transpose(1, 2).flatten(1, 2))


def viewed_after_cat(m: Any, x: Tensor) -> Tensor:
    y = torch.cat([m.a(x), m.b(x)], 1)
    return m.c(y.view(y.shape[0], 4, 3, 4, 4).sum(2))


def cat_and_split(m: Any, x: Tensor) -> Tensor:
    one, two = torch.cat([m.a(x), m.b(x), m.a(x)], 1).split([7, 9], 1)
    return m.c(one).relu() + m.d(two)


def padded(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    return m.c(F.pad(y, [0, 0, 0, 0, 2, 4]) + m.b(y))


def stacked(m: Any, x: Tensor) -> Tensor:
    return m.c(torch.stack([m.a(x), m.b(x)]).sum(0))


def unpooled(m: Any, x: Tensor) -> Tensor:
    y, where = F.max_pool2d(m.a(x), 2, return_indices=True)
    return m.c(F.max_unpool2d(m.b(y) + y, where, 2))


def functions(m: Any, x: Tensor) -> Tensor:
    y = F.conv2d(F.conv2d(x, m.a.weight * 2, m.a.bias), m.b.weight.tanh(), groups=6)
    return m.c(F.conv2d(y, m.d.weight.abs(), groups=2))


def repeated(m: Any, x: Tensor) -> Tensor:
    return m.b(m.a(x).repeat(1, 2, 1, 1))


def narrowed(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    return m.b(torch.cat([y.narrow(1, 3, 3), y.narrow(1, 0, 2)], 1))


def unfolded(m: Any, x: Tensor) -> Tensor:
    return m.b(F.unfold(m.a(x), 2, stride=2).transpose(1, 2)).mean(1)


WIRINGS: dict[str, tuple[Forward, Layers]] = {
    "shuffle": (shuffled, {"a": conv(3, 8), "b": conv(8, 2)}),
    "cat into a view": (viewed_after_cat, {"a": conv(3, 6), "b": conv(3, 6), "c": conv(4, 2)}),
    "cat into a split": (cat_and_split, {"a": conv(3, 5), "b": conv(3, 6), "c": conv(7, 2), "d": conv(9, 2)}),
    "zeros beside channels": (padded, {"a": conv(3, 6), "b": conv(6, 12), "c": conv(12, 2)}),
    "stack": (stacked, {"a": conv(3, 6), "b": conv(3, 6), "c": conv(6, 2)}),
    "unpooling": (unpooled, {"a": conv(3, 6), "b": conv(6, 6), "c": conv(6, 2)}),
    "layers as functions": (
        functions,
        {"a": conv(3, 6), "b": conv(6, 6, groups=6), "c": conv(4, 2), "d": conv(6, 4, groups=2)},
    ),
    "repeat": (repeated, {"a": conv(3, 6), "b": conv(12, 2)}),
    "narrow": (narrowed, {"a": conv(3, 6), "b": conv(5, 2)}),
    "unfold": (unfolded, {"a": conv(3, 6), "b": nn.Linear(24, 2)}),
    "pixel shuffle": (lambda m, x: m.b(m.s(m.a(x))), {"a": conv(3, 16), "b": conv(4, 2), "s": nn.PixelShuffle(2)}),
    "pixel unshuffle": (lambda m, x: m.b(m.s(m.a(x))), {"a": conv(3, 4), "b": conv(16, 2), "s": nn.PixelUnshuffle(2)}),
    "channel shuffle": (lambda m, x: m.b(m.s(m.a(x))), {"a": conv(3, 8), "b": conv(8, 2), "s": nn.ChannelShuffle(2)}),
    "group norm": (lambda m, x: m.b(m.n(m.a(x))), {"a": conv(3, 8), "b": conv(8, 2), "n": nn.GroupNorm(2, 8)}),
    "groups of one": (lambda m, x: m.b(m.n(m.a(x))), {"a": conv(3, 8), "b": conv(8, 2), "n": nn.GroupNorm(8, 8)}),
    "layer norm": (
        lambda m, x: m.b(m.n(m.a(x.mean((2, 3))))),
        {"a": nn.Linear(3, 8), "b": nn.Linear(8, 2), "n": nn.LayerNorm(8)},
    ),
    "rms norm": (
        lambda m, x: m.b(m.n(m.a(x.mean((2, 3))))),
        {"a": nn.Linear(3, 8), "b": nn.Linear(8, 2), "n": nn.RMSNorm(8)},
    ),
    "linear over pixels": (lambda m, x: m.b(m.a(x.flatten(2))).mean(1), {"a": nn.Linear(16, 8), "b": nn.Linear(8, 2)}),
}


@pytest.mark.parametrize("name", WIRINGS)
def test_cutting_equals_masking(name: str) -> None:
    forward, layers = WIRINGS[name]
    gm, inputs = prepared(Wired(forward, **layers), 3, 4, 4)
    space = PruneChannels().search_space(gm)
    result = pruned(gm, inputs, space.uniform(0.5))
    for node in result.graph.find_nodes(op="call_module"):
        norm = result.get_submodule(str(node.target))
        if isinstance(norm, nn.GroupNorm):
            assert norm.num_channels == 4 == len(norm.weight)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_layers_are_barriers(kind: Any) -> None:
    layers: Layers = {
        "a": nn.Linear(8, 6),
        "r": kind(6, 4, batch_first=True),
        "b": nn.Linear(4, 8),
        "c": nn.Linear(8, 2),
    }
    gm, inputs = prepared(Wired(lambda m, x: m.c(m.b(m.r(m.a(x))[0]).relu()), **layers), 5, 8)
    assert [decision.site for decision in PruneChannels().search_space(gm)] == ["b"]
    reasons = {entry.site: entry.reason or "" for entry in PruneChannels().explain(gm)}
    assert kind.__name__.lower() in reasons["a"].lower()
    pruned(gm, inputs, Policy({("channels", "b"): 3}))


class Residual(nn.Module):
    """Token embedding, two attention blocks, head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.norm1, self.norm2, self.last = nn.LayerNorm(8), nn.LayerNorm(8), nn.LayerNorm(8)
        self.qkv, self.o = nn.Linear(8, 24), nn.Linear(8, 8)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = x + fused(self, self.norm1(x))
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return self.head(self.last(x)[:, 0])


def test_the_residual_stream_is_cut_on_request() -> None:
    torch.manual_seed(0)
    tokens = torch.randint(0, 11, (2, 5))
    gm = trace(Residual().double().eval(), tokens)
    assert [decision.site for decision in PruneChannels().search_space(gm)] == ["qkv", "up"]
    step = PruneChannels(residual_stream=True)
    policy = step.search_space(gm).uniform(0.5)
    result = step.with_policy(policy)(gm).graph_module
    assert result.get_submodule("last").normalized_shape == (4,)
    assert result.get_submodule("embed").embedding_dim == 4
    masked = step.with_policy(policy).masked(gm)
    torch.testing.assert_close(masked(tokens), result(tokens), rtol=1e-10, atol=1e-12)
    again = step.search_space(result).uniform(0.5)
    assert step.with_policy(again)(result).modified


@settings(max_examples=15)
@given(
    parts=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    split=st.integers(1, 8),
    factor=st.sampled_from((1, 2, 3)),
    seed=st.integers(0, 99),
)
def test_cat_into_views_and_splits_is_index_exact(parts: list[int], split: int, factor: int, seed: int) -> None:
    total = sum(parts) * factor
    split = min(split, total)

    def forward(m: Any, x: Tensor) -> Tensor:
        y = torch.cat([m.get_submodule(f"a{index}")(x) for index in range(len(parts))], 1)
        y = y.view(y.shape[0], factor, -1, 2, 2).transpose(1, 2).flatten(1, 2)
        left, right = y[:, :split], y[:, split:]
        return m.left(left) if split == total else m.left(left) + m.right(right)

    layers: Layers = {f"a{index}": conv(3, size * factor) for index, size in enumerate(parts)}
    layers["left"] = conv(split, 2)
    if split < total:
        layers["right"] = conv(total - split, 2)
    gm, inputs = prepared(Wired(forward, **layers), 3, 2, 2)
    policy = PruneChannels().search_space(gm).sample(np.random.default_rng(seed))
    if PruneChannels(policy)(gm).modified:
        pruned(gm, inputs, policy)
