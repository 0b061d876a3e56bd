"""Where graphs multiply activations, and that the quantized form computes what the float one did."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx, nn

from fxopt.errors import PassError
from fxopt.graph import edit, trace
from fxopt.graph.matrix_products import QuantMatMul, matrix_products, quantize_product

SIZE = (2, 3, 5, 4)


class Attending(nn.Module):
    """Attention of a tensor with parts of itself, by options of the operator."""

    def __init__(self, masked: str = "", **options: Any) -> None:
        super().__init__()
        self.masked, self.options = masked, options

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        masks = {"numbers": x[:, :, :, :1] * x.new_ones(5), "truth": (x > 0.3)[:, :, :, :1].expand(2, 3, 5, 5)}
        mask = masks.get(self.masked)
        y = nn.functional.scaled_dot_product_attention(x, x * 2, x + 1, attn_mask=mask, **self.options)
        return y.transpose(1, 2).reshape(2, 5, 12)


class Calling(nn.Module):
    def __init__(self, function: Any, **parts: nn.Module) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.randn(4, 4))
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(self, x)


def example() -> torch.Tensor:
    return torch.randn(SIZE, generator=torch.Generator().manual_seed(0))


def spelled_out(module: nn.Module) -> tuple[fx.GraphModule, fx.GraphModule]:
    """A graph, and one in which all products are modules, without quantizers."""
    gm = trace(module.eval(), example())
    other = edit.fork(gm)
    for product in matrix_products(gm):
        nodes = {node.name: node for node in other.graph.nodes}
        twin = next(one for one in matrix_products(other) if one.site == product.site)
        assert nodes[product.node.name] is twin.node
        quantize_product(other, twin, 4)
        edit.finish(other)
    return gm, other


@pytest.mark.parametrize("masked", ["", "numbers", "truth"])
@pytest.mark.parametrize("options", [{}, {"scale": 0.7}])
def test_attention_spelled_out_computes_the_same(masked: str, options: dict[str, Any]) -> None:
    gm, other = spelled_out(Attending(masked, **options))
    assert sum(isinstance(module, QuantMatMul) for module in other.modules()) == 2
    # The first row of the mask of truth values hides everything somewhere, which gives zeros and no NaN.
    torch.testing.assert_close(other(example()), gm(example()), rtol=1e-5, atol=1e-6)


def test_causal_attention_computes_the_same() -> None:
    gm, other = spelled_out(Attending(is_causal=True))
    torch.testing.assert_close(other(example()), gm(example()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bits", [32, 4])
def test_sites_are_the_same_before_and_after(bits: int) -> None:
    def twice(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.inner(self.inner(x)) @ x.transpose(-1, -2)

    module = Calling(twice, inner=Calling(lambda _, x: x @ x.transpose(-1, -2) @ x))
    gm, other = spelled_out(module)
    wanted = ["inner.matmul", "inner.matmul_1", "inner.matmul_2", "inner.matmul_3", "matmul"]
    found = matrix_products(gm if bits == 32 else other)
    assert [product.site for product in found] == wanted
    assert {product.bits for product in found} == {bits}
    assert all(len(product.operands) == 2 for product in found)


def test_of_an_attention_all_is_found_again() -> None:
    gm, other = spelled_out(Attending("truth"))
    (before,), (after,) = matrix_products(gm), matrix_products(other)
    assert after.site == before.site == "scaled_dot_product_attention"
    assert [node.name for node in after.operands] == [node.name for node in before.operands]
    assert after.mask is not None
    assert before.mask is not None
    assert after.mask.name == before.mask.name
    assert len(after.inner) == 3
    assert after.bits == 4


def test_a_taken_name_is_left_alone() -> None:
    module = Calling(lambda self, x: self.matmul(x) @ x.transpose(-1, -2), matmul=nn.Linear(4, 4))
    assert [product.site for product in matrix_products(trace(module.eval(), example()))] == ["matmul_1"]


@pytest.mark.parametrize(
    "function",
    [
        lambda self, x: x @ self.weight,
        lambda self, x: self.weight @ x.transpose(-1, -2),
        lambda self, x: (x.double() @ x.double().transpose(-1, -2)).float(),
        lambda self, x: x @ self.weight[0],
        lambda self, x: nn.functional.scaled_dot_product_attention(x, x[:, :1], x[:, :1], enable_gqa=True),
    ],
)
def test_near_misses_are_no_products_of_activations(function: Any) -> None:
    assert matrix_products(trace(Calling(function).eval(), example())) == []


def test_a_view_behind_attention_becomes_a_reshape() -> None:
    class Viewing(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = nn.functional.scaled_dot_product_attention(x, x, x)
            return y.contiguous().view(2, 15, 4) * 2

    gm, other = spelled_out(Viewing())
    assert not other.graph.find_nodes(op="call_function", target=torch.ops.aten.view.default)
    torch.testing.assert_close(other(example()), gm(example()), rtol=1e-5, atol=1e-6)


def test_bits_are_checked() -> None:
    with pytest.raises(PassError, match="1 to 8"):
        QuantMatMul(9)
