"""PruneChannels across operators that rearrange, reduce or work along one dimension: cutting equals masking."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxopt.passes import PruneChannels
from tests.passes.test_prune_channels import prepared, pruned
from tests.wiring import Wired

PASSES: dict[str, Callable[[Tensor], Tensor]] = {
    "swapped and moved": lambda y: y.swapaxes(1, 3).movedim(3, 1),
    "moved by several": lambda y: torch.movedim(torch.movedim(y, (0, 1), (2, 3)), (2, 3), (0, 1)),
    "tiled": lambda y: y.tile(2, 1).mean(2, keepdim=True) + y,
    "repeated one by one": lambda y: y.repeat_interleave(2, 3).mean((2, 3), keepdim=True) * y,
    "flipped": lambda y: y.flip(-1),
    "rotated": lambda y: torch.rot90(y, 1, (2, 3)),
    "windows": lambda y: y.unfold(2, 2, 2).amax(-1),
    "folded": lambda y: F.fold(F.unfold(y, 2, stride=2), (4, 4), 2, stride=2),
    "sorted": lambda y: y.sort(3)[0].cumprod(3),
    "largest": lambda y: y.topk(2, 3)[0],
    "norm of pixels": lambda y: F.normalize(y.flatten(2), dim=2).unflatten(2, (4, 4)),
    "variance and mean": lambda y: (lambda found: y * found[0] + found[1])(torch.var_mean(y, (2, 3), keepdim=True)),
    "triangle": lambda y: y.tril(),
    "some pixels": lambda y: y.index_select(3, torch.tensor([2, 0])),
    "sampled by a grid": lambda y: F.grid_sample(
        y, torch.linspace(-1, 1, 16, dtype=y.dtype).view(1, 4, 2, 2).expand(y.shape[0], -1, -1, -1), align_corners=False
    ),
    "less usual functions": lambda y: torch.asinh(y).trunc() + F.threshold(y, 0.1, 0.0) + torch.xlogy(y.abs(), y.abs()),
}


@pytest.mark.parametrize("name", PASSES)
def test_channels_pass(name: str) -> None:
    between = PASSES[name]
    gm, inputs = prepared(Wired(lambda m, x: m.b(between(m.a(x))), a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(8, 2, 1)), 3, 4, 4)
    (decision,) = PruneChannels().search_space(gm)
    result = pruned(gm, inputs, PruneChannels().search_space(gm).uniform(0.5))
    assert (decision.site, result.get_submodule("b").in_channels) == ("a", 4)


def test_one_head_that_is_stretched_beside_several() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        one, several = m.a(x).view(x.shape[0], 1, 4, 4, 4), m.c(x).view(x.shape[0], 3, 4, 4, 4)
        return m.b((one.expand(-1, 3, -1, -1, -1) + several).flatten(1, 2))

    gm, inputs = prepared(Wired(forward, a=nn.Conv2d(3, 4, 1), c=nn.Conv2d(3, 12, 1), b=nn.Conv2d(12, 2, 1)), 3, 4, 4)
    assert pruned(gm, inputs, PruneChannels().search_space(gm).uniform(0.5)).get_submodule("b").in_channels == 6


def test_slopes_of_prelu_as_a_function_follow() -> None:
    layers = {"a": nn.Conv2d(3, 6, 1), "b": nn.Conv2d(6, 2, 1), "slopes": nn.Parameter(torch.rand(6))}
    gm, inputs = prepared(Wired(lambda m, x: m.b(F.prelu(m.a(x), m.slopes)), **layers), 3, 4, 4)
    assert pruned(gm, inputs, PruneChannels().search_space(gm).uniform(0.5)).slopes.shape == (3,)


REDUCES: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda y: y * y.sum(1, keepdim=True),
    "mean": lambda y: y - y.mean(1, keepdim=True),
    "mean over all": lambda y: y * y.mean((1, 2, 3), keepdim=True),
    "largest": lambda y: y + torch.amax(y, 1, keepdim=True),
    "largest with its place": lambda y: y + torch.max(y, 1, keepdim=True)[0],
    "smallest": lambda y: y + torch.min(y, 1, keepdim=True)[0],
    "length": lambda y: F.normalize(y, dim=1),
    "response": lambda y: (
        y * (y.norm(dim=(2, 3), keepdim=True) / y.norm(dim=(2, 3), keepdim=True).mean(1, keepdim=True))
    ),
    "two dimensions": lambda y: torch.cat([y, y], 1).unflatten(1, (2, 8)).sum((1, 2), keepdim=True)[:, 0] * y,
}


@pytest.mark.parametrize("name", REDUCES)
def test_what_is_reduced_is_cut_and_the_masked_twin_leaves_it_out(name: str) -> None:
    between = REDUCES[name]
    gm, inputs = prepared(Wired(lambda m, x: m.b(between(m.a(x))), a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(8, 2, 1)), 3, 4, 4)
    result = pruned(gm, inputs, PruneChannels().search_space(gm).uniform(0.5))
    assert result.get_submodule("b").in_channels == 4


def test_a_response_that_is_added_to_what_it_weighs_is_no_stream() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        size = y.norm(dim=1, keepdim=True)
        return m.b(m.gain * (y * (size / (size.mean(-1, keepdim=True) + 1e-6))) + y)

    layers = {"a": nn.Linear(3, 8), "b": nn.Linear(8, 2), "gain": nn.Parameter(torch.rand(8))}
    gm, inputs = prepared(Wired(forward, **layers), 5, 3)
    assert pruned(gm, inputs, PruneChannels().search_space(gm).uniform(0.5)).gain.shape == (4,)


@pytest.mark.parametrize(
    "between",
    [
        lambda y: y * torch.max(y, 1, keepdim=True)[1],
        lambda y: y * y.argmax(1, keepdim=True),
        lambda y: y / y.norm(p=-1, dim=1, keepdim=True),
    ],
)
def test_what_depends_on_the_places_or_the_number_of_channels_freezes_them(between: Callable[[Tensor], Tensor]) -> None:
    gm, _ = prepared(Wired(lambda m, x: m.b(between(m.a(x))), a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(8, 2, 1)), 3, 4, 4)
    assert not list(PruneChannels().search_space(gm))


def test_a_stream_that_is_averaged_over_by_hand_is_cut_on_request_only() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        y = y + m.b(y)
        return m.c(y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-5) * m.scale)

    layers = {"a": nn.Linear(3, 8), "b": nn.Linear(8, 8), "c": nn.Linear(8, 2), "scale": nn.Parameter(torch.rand(8))}
    gm, inputs = prepared(Wired(forward, **layers), 5, 3)
    assert not list(PruneChannels().search_space(gm))
    step = PruneChannels(residual_stream=True)
    step = step.with_policy(step.search_space(gm).uniform(0.5))
    result = step(gm).graph_module
    assert result.scale.shape == (4,)
    torch.testing.assert_close(result(inputs), step.masked(gm)(inputs), rtol=1e-10, atol=1e-12)
