"""Quantizers stand where a target asks for them, and what shares a grid computes on one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import fx, nn

from fxopt.decisions import Capabilities, Placement, Policy
from fxopt.errors import PassError, TargetError
from fxopt.export import Format, export_onnx
from fxopt.graph.fake_quantize import ActivationQuantizer
from fxopt.passes import Quantize
from fxopt.passes._placement import ROLES, Role
from tests.passes.quantizing import IMAGE, bits, chain, conv, graph_of, policy_of, quantized, sources

SHARED = Placement(shared_grids=("add", "cat"))


def added(m: Any, x: torch.Tensor) -> Any:
    return m.last(m.first(x) + 4.0 * m.second(x).relu())


def joined(m: Any, x: torch.Tensor) -> Any:
    return m.last(torch.cat([m.first(x), m.second(x).relu()], 1))


def pair(forward: Any, last: int = 3) -> fx.GraphModule:
    return graph_of(forward, first=conv(), second=conv(), last=conv(last))


def grid(gm: fx.GraphModule, name: str) -> ActivationQuantizer:
    found = gm.get_submodule(f"quantizers.{name}")
    assert isinstance(found, ActivationQuantizer)
    return found


def test_operands_of_an_addition_share_a_grid_that_covers_both() -> None:
    gm = graph_of(lambda m, x: m.last(m.first(x) + m.second(x)), first=conv(), second=conv(), last=conv())
    apart, together = quantized(gm), quantized(gm, placement=SHARED)
    assert chain(together) == chain(apart)
    assert grid(apart, "first") is not grid(apart, "second")
    shared = grid(together, "first")
    assert shared is grid(together, "second")
    assert shared is not grid(together, "add")
    both = [grid(apart, name) for name in ("first", "second")]
    assert float(shared.minimum) == min(float(one.minimum) for one in both)
    assert float(shared.maximum) == max(float(one.maximum) for one in both)


def test_parts_of_a_concatenation_and_its_result_share_a_grid() -> None:
    together = quantized(pair(joined, 6), placement=SHARED)
    names = ("first", "relu", "cat")
    assert len({id(grid(together, name)) for name in names}) == 1
    apart = quantized(pair(joined, 6))
    assert len({id(grid(apart, name)) for name in names}) == 3


def test_sharing_goes_on_through_chains_and_what_gives_values_back() -> None:
    def forward(m: Any, x: torch.Tensor) -> Any:
        one, two = m.first(x), m.second(x)
        return m.last(torch.cat([nn.functional.max_pool2d(one, 1), two], 1) + torch.cat([two, one], 1))

    together = quantized(pair(forward, 6), placement=SHARED)
    shared = {id(grid(together, name)) for name in ("first", "second", "max_pool2d", "cat", "cat_1")}
    assert len(shared) == 1
    assert id(grid(together, "add")) not in shared


def test_grids_of_different_bits_stay_apart() -> None:
    def forward(m: Any, x: torch.Tensor) -> Any:
        one = m.first(x)
        return m.last(one + m.second(one))

    gm = pair(forward)
    policy = policy_of(first=(8, 8), second=(8, 3), last=(8, 6))
    made = Quantize(policy, placement=SHARED)(gm).graph_module
    found = {name: module for name, module in made.named_modules() if isinstance(module, ActivationQuantizer)}
    # What the addition reads, on one grid, and gives is asked for at 6 bits; what the second layer reads at 3.
    assert sorted(module.bits for module in set(found.values())) == [3, 6, 6, 8, 8]


@pytest.mark.parametrize("activations", [{}, {"symmetric": True}, {"power_of_two": True}, {"method": "mse"}])
@pytest.mark.parametrize("width", [1, 4, 8])
def test_on_a_shared_grid_an_addition_adds_integers(width: int, activations: dict[str, Any]) -> None:
    gm = graph_of(lambda m, x: m.last(m.first(x) + m.second(x)), first=conv(), second=conv(), last=conv())
    policy = policy_of(first=(8, 8), second=(8, 8), last=(8, width))
    made = Quantize(policy, activations=activations, placement=SHARED)(gm).graph_module
    interpreter = fx.Interpreter(made, garbage_collect_values=False)
    with torch.no_grad():
        interpreter.run(torch.randn(IMAGE, generator=torch.Generator().manual_seed(1)))
    values = {node.name: value for node, value in interpreter.env.items()}
    shared = grid(made, "first")
    assert shared.bits == width
    scale, zero = np.float32(shared.scale.item()), int(shared.zero_point)
    centred = [
        np.clip(np.rint(values[name].numpy() / scale) + zero, *shared.bounds) - zero for name in ("first", "second")
    ]
    # One scale is taken out of the sum: nothing is scaled anew, which is what such hardware saves.
    np.testing.assert_allclose(values["add"].numpy(), (centred[0] + centred[1]) * scale, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("form", ["qdq", "qonnx"])
def test_shared_grids_are_exported(form: Format, tmp_path: Path) -> None:
    def forward(m: Any, x: torch.Tensor) -> Any:
        one, two = m.first(x), m.second(x)
        return m.last(torch.cat([one + two, two.relu()], 1))

    made = quantized(pair(forward, 6), placement=SHARED)
    report = export_onnx(made, tmp_path / "model.onnx", torch.randn(IMAGE), format=form)
    assert report.integers_differing is not None


def test_operators_without_an_integer_kernel_stay_in_floating_point() -> None:
    gm = graph_of(lambda m, x: m.last((m.first(x) + x).relu()), first=conv(), last=conv())
    made, floats = quantized(gm), quantized(gm, placement={"floats": ["add"]})
    assert sources(made, "add") == ["quantizers_first", "quantizers_x"]
    # A convolution writes to a grid whoever reads it; the other operand is not rounded.
    assert sources(floats, "add") == ["quantizers_first", "x"]
    assert sources(floats, "last") == ["quantizers_relu"]


def test_fused_activations_have_no_quantizer_before_them() -> None:
    gm = graph_of(lambda m, x: m.last(nn.functional.silu(m.first(x))), first=conv(), last=conv())
    plain = chain(quantized(gm))
    assert "silu_gate" in plain
    assert chain(quantized(gm, placement={"fuses": ["SiLU"]})) == [
        "Q(x)",
        "first",
        "silu",
        "Q(silu)",
        "last",
        "Q(last)",
    ]
    hard = graph_of(lambda m, x: m.last(nn.functional.hardswish(m.first(x))), first=conv(), last=conv())
    assert "Q(first)" in chain(quantized(hard))
    assert "Q(first)" not in chain(quantized(hard, placement={"fuses": ["hardswish"]}))


def test_ends_are_pinned_by_the_target_unless_the_pass_says_otherwise() -> None:
    gm = graph_of(lambda m, x: m.last(m.second(m.first(x))), first=conv(), second=conv(), last=conv())
    able = Capabilities({"*": ((4, 4), (8, 8))}, placement=Placement(ends=(8, 8)))

    def choices(step: Quantize) -> list[int]:
        return [len(one.choices) for one in step.search_space(gm, able)]

    assert choices(Quantize()) == [1, 2, 1]
    assert choices(Quantize(placement=Placement())) == [2, 2, 2]
    assert Quantize(ends=(4, 4)).search_space(gm, able)[0].choices == ((4, 4),)
    made = quantized(gm, placement=Placement(ends=(8, 4)))
    assert [bits(made, name) for name in ("x", "first", "second")] == [4, 8, 4]


def test_unknown_names_are_refused() -> None:
    gm = pair(added)
    with pytest.raises(PassError, match="floats names 'softmax', which has no integer kernel"):
        Quantize(placement={"floats": ["softmax"]})(gm)  # type: ignore[arg-type]
    with pytest.raises(PassError, match="fuses names 'add', which is no activation function"):
        Quantize(placement=Placement(fuses=("add",)))(gm)
    with pytest.raises(PassError, match=r"placement: .* its options are ends, floats"):
        Quantize(placement={"shared": ["add"]})  # type: ignore[arg-type]
    with pytest.raises(TargetError, match="shared_grids names 'mul'"):
        Quantize(placement={"shared_grids": ["mul"]})  # type: ignore[arg-type]


def test_every_role_is_of_an_operator_that_is_known() -> None:
    assert set(ROLES.values()) == set(Role)
    assert Quantize(Policy({}), placement=SHARED)(pair(added)).modified is False
