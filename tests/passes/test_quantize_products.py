"""Products of activations: what is decided about them, where their quantizers stand, and what is computed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import fx, nn

from fxopt.decisions import Capabilities, Policy
from fxopt.errors import PolicyError
from fxopt.graph import trace
from fxopt.graph.fake_quantize import ActivationQuantizer
from fxopt.graph.matrix_products import QuantMatMul, matrix_products
from fxopt.lowering import lower
from fxopt.passes import Quantize
from fxopt.sensitivity import sensitivities

SITE = "attention.scaled_dot_product_attention"


class Attention(nn.Module):
    """Attention of two heads between two layers, as one operator or written by hand."""

    def __init__(self, by_hand: bool = False, masked: bool = False) -> None:
        super().__init__()
        self.qkv, self.mix = nn.Linear(8, 24), nn.Linear(8, 8)
        self.by_hand, self.masked = by_hand, masked

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).view(-1, 5, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        mask = (x.mean(-1) > 0.0)[:, None, None, :] if self.masked else None
        if self.by_hand:
            y = (q @ k.transpose(-1, -2) / 2).softmax(-1) @ v
        else:
            y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.mix(y.transpose(1, 2).reshape(-1, 5, 8))


class Model(nn.Module):
    def __init__(self, **options: bool) -> None:
        super().__init__()
        self.first, self.attention, self.last = nn.Linear(6, 8), Attention(**options), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.attention(self.first(x).tanh()).mean(1))


def graph_of(**options: bool) -> tuple[fx.GraphModule, torch.Tensor]:
    torch.manual_seed(0)
    model, data = Model(**options).eval(), torch.randn(16, 5, 6)
    return trace(model, data[:2]), data


def quantized(policy: Policy | None = None, **options: Any) -> tuple[fx.GraphModule, torch.Tensor]:
    gm, data = graph_of(**options)
    return Quantize(policy, calibration=data)(gm).graph_module, data


def products_of(gm: fx.GraphModule) -> list[fx.Node]:
    return [
        node
        for node in gm.graph.find_nodes(op="call_module")
        if isinstance(gm.get_submodule(str(node.target)), QuantMatMul)
    ]


def operand_quantizers(gm: fx.GraphModule, node: fx.Node) -> list[ActivationQuantizer]:
    found: Any = [gm.get_submodule(str(source.target)) for source in node.all_input_nodes]
    assert all(isinstance(one, ActivationQuantizer) for one in found)
    return list(found)


@pytest.mark.parametrize("by_hand", [False, True])
def test_both_operands_are_quantized_and_the_softmax_is_not(by_hand: bool) -> None:
    gm, _ = quantized(by_hand=by_hand)
    scores, result = products_of(gm)
    assert all(one.bits == 8 for node in (scores, result) for one in operand_quantizers(gm, node))
    # What goes into the softmax is no integer, what comes out of it is.
    assert not any(isinstance(gm.get_submodule(str(u.target)), ActivationQuantizer) for u in _modules(scores.users))
    probabilities = operand_quantizers(gm, result)[0]
    assert float(probabilities.minimum) >= 0.0
    assert float(probabilities.maximum) <= 1.0
    # Queries, keys and values that one layer makes have grids of their own.
    assert len({id(one) for node in (scores, result) for one in operand_quantizers(gm, node)}) == 4


def _modules(nodes: Any) -> list[fx.Node]:
    return [node for node in nodes if node.op == "call_module"]


@pytest.mark.parametrize("bits", [1, 3, 8])
@pytest.mark.parametrize("options", [{}, {"symmetric": True}, {"power_of_two": True, "method": "mse"}])
def test_the_graph_computes_what_integers_compute(bits: int, options: dict[str, Any]) -> None:
    gm, data = graph_of()
    policy = Policy({("bits", SITE): (bits, bits)})
    made = Quantize(policy, calibration=data, activations=options)(gm).graph_module
    for node in products_of(made):
        left, right = operand_quantizers(made, node)
        one, other, found = _values(made, data, [*(source.args[0] for source in node.all_input_nodes), node])
        integers = [_centred(quantizer, value) for quantizer, value in ((left, one), (right, other))]
        steps = float(left.scale) * float(right.scale)
        wanted = np.matmul(*integers).astype(np.float64) * steps
        # Sums of products of steps, in 32-bit floats on the one side and in 64-bit integers on the other.
        np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())


def _centred(quantizer: ActivationQuantizer, values: torch.Tensor) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The integers of values less the one that stands for zero, by NumPy alone."""
    scale, zero = np.float32(quantizer.scale.item()), int(quantizer.zero_point)
    return np.clip(np.rint(values.numpy() / scale) + zero, *quantizer.bounds).astype(np.int64) - zero


def _values(gm: fx.GraphModule, data: torch.Tensor, nodes: list[Any]) -> list[torch.Tensor]:
    interpreter = fx.Interpreter(gm, garbage_collect_values=False)
    with torch.no_grad():
        interpreter.run(data)
    return [interpreter.env[node] for node in nodes]


def test_products_are_decided_behind_the_layers_and_ends_are_layers() -> None:
    gm, _ = graph_of()
    able = Capabilities({"matmul": ((8, 8), (4, 8), (4, 4), (32, 32)), "*": ((8, 8), (32, 32))})
    space = Quantize(ends=(8, 8)).search_space(gm, able)
    assert [one.site for one in space] == ["first", "attention.qkv", "attention.mix", "last", SITE]
    assert [len(one.choices) for one in space] == [1, 2, 2, 1, 3]
    assert space[-1].choices == ((4, 4), (8, 8), (32, 32))
    assert space[-1].operator == "matmul"
    assert space[-1].features["macs"] == 2 * 5 * 5 * (4 + 4)
    assert set(space[-1].features) == set(space[0].features)
    assert len(Quantize(products=False).search_space(gm, able)) == 4


def test_of_two_operands_that_differ_nothing_is_on_offer() -> None:
    gm, _ = graph_of()
    with pytest.raises(PolicyError, match=r"\(4, 8\) cannot be chosen"):
        Quantize(Policy({("bits", SITE): (4, 8)}))(gm)
    assert [one.site for one in Quantize().search_space(gm, Capabilities({"*": ((4, 8),)}))][-1] == "last"


def test_policies_that_name_layers_alone_leave_products_in_floating_point() -> None:
    gm, data = graph_of()
    layers = Policy({("bits", one): (8, 8) for one in ("first", "attention.qkv", "attention.mix", "last")})
    for step in (Quantize(layers, calibration=data), Quantize(calibration=data, products=False)):
        made = step(gm).graph_module
        assert not products_of(made)
        assert len(matrix_products(made)) == 1
        assert matrix_products(made)[0].bits == 32
        # Nothing is left to decide about a quantized graph.
        assert len(step.search_space(made)) == 0


@pytest.mark.parametrize("options", [{"by_hand": True}, {"masked": True}])
def test_rows_are_those_of_the_policy(options: dict[str, bool]) -> None:
    gm, _ = graph_of(**options)
    space = Quantize().search_space(gm)
    workload = lower(gm)
    for seed in range(4):
        policy = space.sample(np.random.default_rng(seed))
        bound, rewritten = workload.bind(policy), lower(Quantize(policy)(gm).graph_module).bind()
        assert bound.names == rewritten.names
        np.testing.assert_array_equal(bound.rows, rewritten.rows)


def test_a_product_costs_what_its_bits_say_and_the_softmax_stays_in_floating_point() -> None:
    gm, _ = graph_of()
    names = lower(gm).names
    rows = lower(gm).bind(Policy({("bits", SITE): (4, 4)})).rows[0]
    bits = {name.removeprefix(SITE): int(rows["activation_bits"][at]) for at, name in enumerate(names) if SITE in name}
    assert bits == {".qk": 4, ".softmax": 32, ".av": 4}


@pytest.mark.parametrize("method", ["mse", "kl", "hessian"])
@pytest.mark.parametrize("by_hand", [False, True])
def test_losses_of_products_fall_with_bits(method: Any, by_hand: bool) -> None:
    gm, data = graph_of(by_hand=by_hand)
    space = Quantize().search_space(gm, Capabilities({"*": ((2, 2), (8, 8), (32, 32))}))
    for decision, losses in zip(space, sensitivities(gm, space, data, method=method), strict=True):
        found = dict(zip(decision.choices, losses, strict=True))
        assert found[2, 2] > found[8, 8] >= found[32, 32] == 0.0, decision.site


def test_quantized_products_train() -> None:
    made, data = quantized()
    made.train()
    made(data).square().mean().backward()
    gradient = made.get_submodule("attention.qkv").weight.grad
    assert gradient is not None
    assert bool(gradient.abs().sum() > 0)
