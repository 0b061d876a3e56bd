"""The compiled loops against torch's operators, and when they are used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from fxopt.graph._hold import hold, hold_learned
from fxopt.graph._in_memory import Grids, follow
from fxopt.graph.grids import MIN_SCALE, PLAIN_WEIGHTS, weight_scales

EDGES = [0.0, -0.0, 0.5, -1.5, 2.5, 63.75, -64.25, 1e30, -3e38, 1e-42, float("inf"), float("-inf"), float("nan")]
VALUES = st.one_of(st.sampled_from(EDGES), st.floats(-100.0, 100.0, width=32))
SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.integers(1, 5))
GRIDS = st.sampled_from([(0, 255), (0, 15), (0, 1), (-127, 127), (-8, 7), (-1, 1)])
AXES = st.sampled_from([None, 0, 1, 3])
SCALES = (0.25, 0.1, 1.0, 3e-5, 7.7)


@st.composite
def cases(draw: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, tuple[int, int], int | None]:
    """Values in either order of memory, scales, zero points, bounds and axis."""
    x = torch.from_numpy(draw(hnp.arrays(np.float32, draw(SHAPES), elements=VALUES)))
    if draw(st.booleans()):
        x = x.to(memory_format=torch.channels_last)
    axis, bounds = draw(AXES), draw(GRIDS)
    size = () if axis is None else (x.shape[axis],)
    scale = torch.from_numpy(draw(hnp.arrays(np.float32, size, elements=st.sampled_from(SCALES))))
    zero = torch.from_numpy(draw(hnp.arrays(np.int32, size, elements=st.integers(*bounds))))
    return x, scale, zero if draw(st.booleans()) else None, bounds, axis


def by_operators(function: Callable[[], Any]) -> Any:
    """What a function gives without the compiled loops."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Grids, "of", lambda *_: None)
        return function()


def same(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=0.0, atol=0.0, equal_nan=True)


@given(cases(), st.integers(0, 2**31))
def test_values_and_gradients_are_those_of_torchs_operators(case: Any, seed: int) -> None:
    x, *grid = case
    gradient = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))

    def both() -> tuple[torch.Tensor, torch.Tensor]:
        leaf = x.clone().requires_grad_()
        y = hold(leaf, *grid)
        assert y.stride() == leaf.stride()
        y.backward(gradient)
        assert leaf.grad is not None
        return y.detach(), leaf.grad

    for one, other in zip(both(), by_operators(both), strict=True):
        same(one, other)


@given(cases(), st.booleans())
def test_learned_scales_hear_the_same(case: Any, rounding: bool) -> None:
    x, scale, *grid = case
    x = torch.nan_to_num(x, 0.3, 90.0, -90.0).clamp(-1e3, 1e3)
    gradient = torch.linspace(-1.0, 2.0, x.numel()).view(x.shape)

    def all_three() -> tuple[torch.Tensor, ...]:
        leaf, size = x.clone().requires_grad_(), (-scale).requires_grad_()
        y = hold_learned(leaf, size, *grid, rounding=rounding)
        y.backward(gradient)
        assert leaf.grad is not None
        assert size.grad is not None
        return y.detach(), leaf.grad, size.grad

    ours, theirs = all_three(), by_operators(all_three)
    same(ours[0], theirs[0])
    same(ours[1], theirs[1])
    room = 1e-5 * float((x.abs().max() / scale.min() + 300.0) * x.numel())
    torch.testing.assert_close(ours[2], theirs[2], rtol=1e-4, atol=room)


def test_sums_of_many_values_are_near_those_of_doubles() -> None:
    x = torch.randn(3, 50_000, generator=torch.Generator().manual_seed(0))
    scale = torch.tensor([0.01, 0.02, 0.5], requires_grad=True)
    gradient = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)) + 0.5
    hold_learned(x, scale, None, (-127, 127), 0, rounding=True).backward(gradient)
    steps = x.double() / scale.detach().double()[:, None]
    inside = steps.abs() < 127.5
    each = torch.where(inside, steps.round() - steps, steps.sign() * 127)
    wanted = (each * gradient).sum(1) * (50_000 * 127) ** -0.5
    assert scale.grad is not None
    torch.testing.assert_close(scale.grad.double(), wanted, rtol=1e-5, atol=1e-3)


@given(hnp.arrays(np.float32, SHAPES, elements=VALUES), st.integers(2, 8), st.booleans())
def test_scales_follow_as_the_scheme_says(values: np.ndarray, bits: int, last: bool) -> None:
    weight = torch.from_numpy(values)
    if last:
        weight = weight.to(memory_format=torch.channels_last)
    found = torch.empty(len(weight))
    assert follow(weight, 0, found, float(PLAIN_WEIGHTS.bounds(bits)[1]), MIN_SCALE)
    same(found, weight_scales(weight.flatten(1), bits, PLAIN_WEIGHTS)[0])


def test_a_gradient_of_any_layout_is_taken() -> None:
    x = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last).requires_grad_()
    scale = torch.tensor(0.1)
    hold(x, scale, None, (-127, 127)).sum().backward()
    assert x.grad is not None
    same(x.grad, torch.ones_like(x))


def test_the_loops_take_plain_tensors_and_nothing_else() -> None:
    def taken(x: torch.Tensor, scale: torch.Tensor, axis: int | None = None) -> bool:
        return Grids.of(x, scale, None, (-127, 127), axis) is not None

    x, scale = torch.randn(2, 3, 4, 4), torch.tensor(0.1)
    assert taken(x, scale)
    assert taken(torch.nn.Parameter(x), scale)
    assert taken(x, torch.ones(3), 1)
    assert not taken(x.double(), scale)
    assert not taken(x[:, :, ::2], scale)
    assert not taken(x.to("meta"), scale.to("meta"))
    assert not taken(x[:0], scale)
    assert not taken(x, torch.ones(2), 1)
    assert not taken(x.to(memory_format=torch.channels_last), torch.ones(3), 1)
    assert not follow(x.double(), 0, torch.ones(2), 127.0, MIN_SCALE)
    assert not follow(x, 1, torch.ones(3), 127.0, MIN_SCALE)


def test_many_threads_leave_large_tensors_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    scale = torch.tensor(0.1)
    assert Grids.of(torch.randn(100), scale, None, (-127, 127)) is not None
    assert Grids.of(torch.randn(40_000), scale, None, (-127, 127)) is None


def test_what_is_traced_goes_through_torchs_operators() -> None:
    x, scale = torch.randn(2, 3), torch.tensor(0.1)
    traced = make_fx(lambda value: hold(value, scale, None, (-127, 127)))(x)
    assert torch.ops.aten.div.Tensor in {node.target for node in traced.graph.nodes}
    other = torch.randn(2, 3)
    same(traced(other), hold(other, scale, None, (-127, 127)))
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert isinstance(hold(x, scale, None, (-127, 127)), FakeTensor)


def test_gradients_have_gradients_of_their_own() -> None:
    x = torch.tensor([-3.0, 0.2, 1.7], requires_grad=True)
    y = hold(x, torch.tensor(0.1), None, (-7, 7)) * x
    (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    # The slope is what is held, plus x where nothing is clipped; of which the slope is one, twice, there.
    (curve,) = torch.autograd.grad(slope.sum(), x)
    assert curve.tolist() == [0.0, 2.0, 0.0]


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("zero", [None, 3])
@pytest.mark.parametrize("learned", [False, True])
def test_it_is_compiled_in_one_piece_with_the_same_values_and_gradients(zero: int | None, learned: bool) -> None:
    shift = None if zero is None else torch.tensor(zero, dtype=torch.int32)
    scale = torch.tensor(0.1)

    def held(x: torch.Tensor) -> torch.Tensor:
        bounds = (0, 15) if zero is not None else (-8, 7)
        return hold_learned(x, scale, shift, bounds, rounding=True) if learned else hold(x, scale, shift, bounds)

    torch._dynamo.reset()
    compiled = torch.compile(held, backend="eager", fullgraph=True)
    found = []
    for function in (held, compiled):
        x = torch.linspace(-2.0, 2.0, 83, requires_grad=True)
        y = function(x)
        y.square().sum().backward()
        found.append((y.detach(), x.grad))
    for one, other in zip(*found, strict=True):
        assert one is not None
        assert other is not None
        assert torch.equal(one, other)
