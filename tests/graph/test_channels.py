"""Channel groups against expectations derived by hand: which index of which dimension falls with which unit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor, fx, nn

from fxopt.graph import trace
from fxopt.graph.channels import ChannelGraph, analyze
from tests.graph.checks import Calls, image, rows
from tests.strategies import Cnn, Transformer, networks, traced

Forward = Callable[[Any, Tensor], Any]


def channels_of(forward: Forward, example: Tensor, **layers: Any) -> ChannelGraph:
    return analyze(trace(Calls(forward, **layers).eval(), example))


def members(channels: ChannelGraph, site: str) -> set[str]:
    return {f"{use.path}.{use.name}:{use.dim} {use.role}" for use in channels.by_site()[site].members}


def sizes(channels: ChannelGraph) -> dict[str, int]:
    return {group.site: group.size for group in channels.groups}


def frozen(channels: ChannelGraph) -> dict[str, str | None]:
    return {group.site: group.frozen_by for group in channels.frozen}


def labels(channels: ChannelGraph, path: str, name: str, dim: int) -> list[int]:
    (use,) = {
        (each.path, each.name, each.dim): each
        for each in channels.parameters
        if (each.path, each.name, each.dim) == (path, name, dim)
    }.values()
    return use.atoms.tolist()


def units(channels: ChannelGraph, site: str) -> list[int]:
    return channels.by_site()[site].units.tolist()


def conv(inputs: int, outputs: int, kernel: int = 1, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **options)


def test_a_chain() -> None:
    channels = channels_of(
        lambda self, x: self.b(torch.relu(self.norm(self.a(x)))),
        image(2),
        a=conv(3, 4, 3),
        norm=nn.BatchNorm2d(4),
        b=conv(4, 5),
    )
    assert sizes(channels) == {"a": 4}
    norm = {f"norm.{name}:0 along" for name in ("weight", "bias", "running_mean", "running_var")}
    assert members(channels, "a") == {"a.weight:0 out", "a.bias:0 along", "b.weight:1 in", *norm}
    assert list(frozen(channels)) == ["b"]
    assert "output" in str(frozen(channels)["b"])
    assert units(channels, "a") == labels(channels, "a", "weight", 0) == labels(channels, "b", "weight", 1)


def test_what_is_added_is_cut_together() -> None:
    channels = channels_of(
        lambda self, x: self.c(self.a(x) + self.b(x)), image(2), a=conv(3, 4), b=conv(3, 4, 3), c=conv(4, 2)
    )
    assert sizes(channels) == {"a": 4}
    assert members(channels, "a") == {
        "a.weight:0 out",
        "a.bias:0 along",
        "b.weight:0 out",
        "b.bias:0 along",
        "c.weight:1 in",
    }
    assert labels(channels, "b", "weight", 0) == labels(channels, "a", "weight", 0)


def test_a_residual_and_a_narrow_inside() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.stem(x)
        return self.head(torch.relu(y + self.b(torch.relu(self.a(y)))))

    channels = channels_of(forward, image(2), stem=conv(3, 4), a=conv(4, 6), b=conv(6, 4), head=conv(4, 2))
    assert sizes(channels) == {"stem": 4, "a": 6}
    assert {"b.weight:0 out", "a.weight:1 in", "head.weight:1 in"} <= members(channels, "stem")
    assert members(channels, "a") == {"a.weight:0 out", "a.bias:0 along", "b.weight:1 in"}


def test_what_is_concatenated_keeps_its_own_units() -> None:
    channels = channels_of(
        lambda self, x: self.c(torch.cat([self.a(x), x, self.b(x)], 1)),
        image(2),
        a=conv(3, 4),
        b=conv(3, 2),
        c=conv(9, 2),
    )
    assert sizes(channels) == {"a": 4, "b": 2}
    assert labels(channels, "c", "weight", 1) == [*units(channels, "a"), -1, -1, -1, *units(channels, "b")]


def test_what_is_concatenated_and_added_is_coupled_index_by_index() -> None:
    channels = channels_of(
        lambda self, x: self.d(torch.cat([self.a(x), self.b(x)], 1) + self.c(x)),
        image(2),
        a=conv(3, 4),
        b=conv(3, 2),
        c=conv(3, 6),
        d=conv(6, 2),
    )
    assert sizes(channels) == {"a": 4, "b": 2}
    assert labels(channels, "c", "weight", 0) == [*units(channels, "a"), *units(channels, "b")]


def test_a_depthwise_convolution_follows() -> None:
    channels = channels_of(
        lambda self, x: self.c(self.b(self.a(x))), image(2), a=conv(3, 4), b=conv(4, 4, 3, groups=4), c=conv(4, 2)
    )
    assert sizes(channels) == {"a": 4}
    assert {"b.weight:0 along", "b.bias:0 along", "c.weight:1 in"} <= members(channels, "a")
    assert labels(channels, "b", "weight", 0) == units(channels, "a")


def test_a_depthwise_convolution_with_two_outputs_for_each_input() -> None:
    channels = channels_of(
        lambda self, x: self.c(self.b(self.a(x))), image(2), a=conv(3, 3), b=conv(3, 6, groups=3), c=conv(6, 2)
    )
    one, two, three = units(channels, "a")
    assert (
        labels(channels, "b", "weight", 0) == labels(channels, "c", "weight", 1) == [one, one, two, two, three, three]
    )


def test_a_grouped_convolution_loses_the_same_of_every_group() -> None:
    channels = channels_of(
        lambda self, x: self.c(self.b(self.a(x))), image(2), a=conv(3, 4), b=conv(4, 6, groups=2), c=conv(6, 2)
    )
    assert sizes(channels) == {"a": 2, "b": 3}
    assert labels(channels, "a", "weight", 0) == units(channels, "a") * 2
    assert labels(channels, "b", "weight", 1) == units(channels, "a")
    assert labels(channels, "b", "weight", 0) == labels(channels, "c", "weight", 1) == units(channels, "b") * 2


@pytest.mark.parametrize("groups", [1, 2])
def test_a_transposed_convolution_makes_its_second_dimension(groups: int) -> None:
    channels = channels_of(
        lambda self, x: self.c(self.b(self.a(x))),
        image(2),
        a=conv(3, 4),
        b=nn.ConvTranspose2d(4, 6, 2, stride=2, groups=groups),
        c=conv(6, 2),
    )
    assert sizes(channels) == {"a": 4 // groups, "b": 6 // groups}
    assert labels(channels, "b", "weight", 0) == units(channels, "a") * groups
    assert labels(channels, "b", "weight", 1) == units(channels, "b")
    assert labels(channels, "b", "bias", 0) == units(channels, "b") * groups


def test_a_shuffle_takes_the_same_channel_of_every_group() -> None:
    def shuffle(self: Any, x: Tensor) -> Tensor:
        y = self.a(x)
        y = y.view(y.shape[0], 2, 3, 6, 6).transpose(1, 2).reshape(y.shape[0], 6, 6, 6)
        return self.c(torch.relu(self.b(y)))

    channels = channels_of(shuffle, image(2), a=conv(3, 6), b=conv(6, 5), c=conv(5, 2))
    assert sizes(channels) == {"a": 3, "b": 5}
    one, two, three = units(channels, "a")
    assert labels(channels, "a", "weight", 0) == [one, two, three, one, two, three]
    assert labels(channels, "b", "weight", 1) == [one, one, two, two, three, three]


def test_a_flattened_image_has_a_column_for_every_pixel() -> None:
    channels = channels_of(lambda self, x: self.b(self.a(x).flatten(1)), image(2), a=conv(3, 4), b=nn.Linear(4 * 36, 2))
    assert labels(channels, "b", "weight", 1) == np.repeat(units(channels, "a"), 36).tolist()


def test_a_flattened_image_with_channels_last() -> None:
    channels = channels_of(
        lambda self, x: self.b(self.a(x).permute(0, 2, 3, 1).flatten(1)), image(2), a=conv(3, 4), b=nn.Linear(144, 2)
    )
    assert labels(channels, "b", "weight", 1) == units(channels, "a") * 36


def test_views_count_their_channels() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.b(self.a(x).view(x.shape[0], 4, 36).mean(2))

    channels = channels_of(forward, image(2), a=conv(3, 4), b=nn.Linear(4, 2))
    assert sizes(channels) == {"a": 4}
    (constant,) = channels.constants
    assert (constant.argument, constant.position) == (1, 1)
    assert constant.atoms.tolist() == units(channels, "a")


def test_equal_chunks_fall_together() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        one, two = self.a(x).chunk(2, 1)
        return self.b(one * torch.sigmoid(two))

    channels = channels_of(forward, image(2), a=conv(3, 6), b=conv(3, 2))
    assert sizes(channels) == {"a": 3}
    assert labels(channels, "a", "weight", 0) == units(channels, "a") * 2


def test_parts_of_given_sizes_are_cut_on_their_own() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        one, two = self.a(x).split([2, 4], 1)
        return self.b(one).mean() + self.c(two).mean() + x.mean()

    channels = channels_of(forward, image(2), a=conv(3, 6), b=conv(2, 2), c=conv(4, 2))
    assert sizes(channels)["a"] == 2
    ids = labels(channels, "a", "weight", 0)
    assert len(set(ids)) == 6
    assert labels(channels, "b", "weight", 1) == ids[:2]
    assert labels(channels, "c", "weight", 1) == ids[2:]
    assert [constant.atoms.tolist() for constant in channels.constants] == [ids[:2], ids[2:]]


def test_slices_take_their_part_along() -> None:
    channels = channels_of(
        lambda self, x: self.c(torch.cat([self.b(y := self.a(x))[:, :2], y[:, 1:]], 1)),
        image(2),
        a=conv(3, 4),
        b=conv(4, 3),
        c=conv(5, 2),
    )
    one, other = labels(channels, "a", "weight", 0), labels(channels, "b", "weight", 0)
    assert labels(channels, "c", "weight", 1) == [*other[:2], *one[1:]]


def test_a_gate_falls_with_what_it_gates() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.body(x)
        gate = torch.sigmoid(self.excite(torch.relu(self.squeeze(y.mean((2, 3), keepdim=True)))))
        return self.head(y * gate)

    channels = channels_of(forward, image(2), body=conv(3, 4), squeeze=conv(4, 2), excite=conv(2, 4), head=conv(4, 3))
    assert sizes(channels) == {"body": 4, "squeeze": 2}
    assert {"excite.weight:0 out", "squeeze.weight:1 in", "head.weight:1 in"} <= members(channels, "body")
    assert members(channels, "squeeze") == {"squeeze.weight:0 out", "squeeze.bias:0 along", "excite.weight:1 in"}


def test_attention_is_cut_by_heads() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        q, k, v = (self.qkv(x).view(x.shape[0], 3, 3, 2, 4).permute(2, 0, 3, 1, 4)).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        return self.down(F.gelu(self.up(self.mix(y))))

    layers = {"qkv": nn.Linear(8, 24), "mix": nn.Linear(8, 8), "up": nn.Linear(8, 16), "down": nn.Linear(16, 8)}
    channels = channels_of(forward, torch.randn(2, 3, 8), **layers)
    assert sizes(channels) == {"qkv": 2, "mix": 8, "up": 16}
    assert set(frozen(channels)) == {"down"}
    one, two = units(channels, "qkv")
    assert labels(channels, "qkv", "weight", 0) == ([one] * 4 + [two] * 4) * 3
    assert labels(channels, "mix", "weight", 1) == [one] * 4 + [two] * 4


def test_a_module_called_twice_has_one_weight() -> None:
    channels = channels_of(
        lambda self, x: self.head(self.twice(torch.relu(self.twice(self.stem(x))))),
        image(2),
        stem=conv(3, 4),
        twice=conv(4, 4, 3),
        head=conv(4, 2),
    )
    assert sizes(channels) == {"stem": 4}
    assert {"stem.weight:0 out", "twice.weight:0 out", "twice.weight:1 in", "head.weight:1 in"} <= members(
        channels, "stem"
    )


def test_tied_weights_are_cut_alike() -> None:
    embed, head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
    head.weight = embed.weight
    channels = channels_of(
        lambda self, x: self.head(torch.relu(self.embed(x))), torch.tensor([[1], [2]]), embed=embed, head=head
    )
    assert sizes(channels) == {"embed": 4}
    assert members(channels, "embed") == {"embed.weight:1 out", "head.weight:1 in"}


def test_tied_weights_that_are_used_unlike_are_frozen() -> None:
    linear = nn.Linear(4, 4, bias=False)
    other = nn.Linear(4, 4, bias=False)
    other.weight = linear.weight
    channels = channels_of(
        lambda self, x: self.head(self.other(torch.relu(self.linear(x)))),
        rows(2),
        linear=linear,
        other=other,
        head=nn.Linear(4, 2),
    )
    assert sizes(channels) == {}
    assert "shared parameter" in str(frozen(channels)["linear"])


def test_a_parameter_read_directly_follows() -> None:
    channels = channels_of(
        lambda self, x: self.b(self.a(x) * self.scale + self.shift),
        image(2),
        a=conv(3, 4),
        b=conv(4, 2),
        scale=nn.Parameter(torch.randn(4, 1, 1)),
        shift=torch.randn(1, 4, 1, 1),
    )
    assert {".scale:0 along", ".shift:1 along"} <= members(channels, "a")


@pytest.mark.parametrize(
    ("barrier", "name"),
    [
        (lambda y: F.layer_norm(y, [4, 6, 6]), "layer_norm"),
        (lambda y: y.softmax(1), "softmax"),
        (lambda y: y.std(1, keepdim=True) + y, "std"),
        (lambda y: y[:, ::2].repeat(1, 2, 1, 1), "slice"),
        (lambda y: y[:, [1, 0, 2, 3]], "index"),
        (lambda y: F.pad(y, [0, 0, 0, 0, -1, 1]), "pad"),
        (lambda y: y.cumsum(1), "cumsum"),
    ],
)
def test_what_reads_across_channels_freezes_them(barrier: Callable[[Tensor], Tensor], name: str) -> None:
    channels = channels_of(lambda self, x: self.b(barrier(self.a(x))), image(2), a=conv(3, 4), b=conv(4, 2))
    assert sizes(channels) == {}
    assert name in str(frozen(channels)["a"])


@pytest.mark.parametrize(
    "passes",
    [
        lambda y: F.interpolate(F.max_pool2d(y, 2), scale_factor=2),
        lambda y: F.pad(y, [1, 1, 1, 1]),
        lambda y: y.transpose(1, 2).contiguous().transpose(1, 2),
        lambda y: y.unsqueeze(2).squeeze(2),
        lambda y: y.softmax(-1),
        lambda y: torch.where(y > 0, y, y * 0.1),
        lambda y: F.adaptive_avg_pool2d(y, 1).expand(-1, -1, 6, 6),
        lambda y: y.clamp(0, 6).to(torch.float64).float(),
    ],
)
def test_what_works_channel_by_channel_passes_them_on(passes: Callable[[Tensor], Tensor]) -> None:
    channels = channels_of(lambda self, x: self.b(passes(self.a(x))), image(2), a=conv(3, 4), b=conv(4, 2))
    assert sizes(channels) == {"a": 4}
    assert labels(channels, "b", "weight", 1) == units(channels, "a")


@settings(max_examples=6)
@given(networks())
def test_labels_fit_their_tensors(network: Cnn | Transformer) -> None:
    gm, _ = traced(network)
    channels = analyze(gm)
    every = [unit for group in (*channels.groups, *channels.frozen) for unit in group.units.tolist()]
    assert len(every) == len(set(every))
    loose = {unit for group in channels.groups for unit in group.units.tolist()}
    for node in gm.graph.nodes:
        if isinstance(node.meta.get("val"), Tensor) and node.op != "output":
            for dim, size in enumerate(node.meta["val"].shape):
                found = channels.labels(node, dim)
                assert found is None or (len(found) == size and set(found.tolist()) <= loose | {-1})
    for use in channels.parameters:
        assert len(use.atoms) == getattr(gm.get_submodule(use.path), use.name).shape[use.dim]
    for group in channels.groups:
        assert group.frozen_by is None
        counts = [np.isin(use.atoms, group.units) for use in group.members]
        assert all(count.sum() % group.size == 0 and count.any() for count in counts)


def test_an_empty_graph_has_no_groups() -> None:
    channels = channels_of(lambda self, x: x * 2, rows(2))
    assert (channels.groups, channels.frozen, channels.constants) == ((), (), ())


def test_the_analysis_changes_nothing() -> None:
    gm = trace(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)), image(2))
    before = [(node.name, node.args, dict(node.meta)) for node in gm.graph.nodes]
    analyze(gm)
    assert isinstance(gm, fx.GraphModule)
    assert [(node.name, node.args, dict(node.meta)) for node in gm.graph.nodes] == before
