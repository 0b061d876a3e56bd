"""Random small networks: residual, concatenated, depthwise, grouped, gated, flattened; and transformer blocks.

A network is drawn as a plain description, so that a failing example prints and shrinks well; ``build`` makes the module
and its example inputs, the same ones every time.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from hypothesis import strategies as st
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fxopt.graph import trace

__all__ = ["BLOCKS", "Cnn", "Transformer", "cnns", "networks", "randomize_statistics", "traced", "transformers"]

IMAGE = 6
"""Height and width of the images, in pixels."""

_ACTIVATIONS = {"relu": nn.ReLU, "relu6": nn.ReLU6, "silu": nn.SiLU, "hardswish": nn.Hardswish}


@dataclass(frozen=True)
class Cnn:
    """A convolutional classifier of 6x6 images of 3 channels.

    Attributes:
        blocks: Kinds of blocks, from the stem to the head.
        width: Channels of the stem; even.
        head: How the features reach the classifier: ``pool``, ``flatten`` or ``conv``.
        norm: Whether batch norms follow the convolutions; those have a bias when they do not.
        activation: Name of the activation function.
        seed: Seed of the weights.
    """

    blocks: tuple[str, ...]
    width: int
    head: str
    norm: bool
    activation: str
    seed: int

    def build(self) -> tuple[nn.Module, Any]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            module = _CnnModule(self)
            randomize_statistics(module)
            return module, torch.randn(2, 3, IMAGE, IMAGE)


@dataclass(frozen=True)
class Transformer:
    """A transformer classifier of token sequences.

    Attributes:
        heads: Number of attention heads.
        head_width: Width of each.
        hidden: Width inside the feed-forward part.
        blocks: Number of blocks.
        fused: Whether one linear layer makes queries, keys and values.
        seed: Seed of the weights.
    """

    heads: int
    head_width: int
    hidden: int
    blocks: int
    fused: bool
    seed: int

    def build(self) -> tuple[nn.Module, Any]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return _TransformerModule(self), torch.randint(0, 13, (2, 5))


def cnns(*, norm: bool | None = None, max_blocks: int = 3) -> st.SearchStrategy[Cnn]:
    """Random CNNs; ``norm`` fixes whether they have batch norms."""
    return st.builds(
        Cnn,
        blocks=st.lists(st.sampled_from(sorted(_BLOCKS)), max_size=max_blocks).map(tuple),
        width=st.sampled_from((4, 6, 8)),
        head=st.sampled_from(("pool", "flatten", "conv")),
        norm=st.booleans() if norm is None else st.just(norm),
        activation=st.sampled_from(sorted(_ACTIVATIONS)),
        seed=st.integers(0, 1),
    )


def transformers() -> st.SearchStrategy[Transformer]:
    """Random transformer blocks."""
    return st.builds(
        Transformer,
        heads=st.integers(1, 3),
        head_width=st.sampled_from((2, 4)),
        hidden=st.sampled_from((4, 6, 9)),
        blocks=st.integers(1, 2),
        fused=st.booleans(),
        seed=st.integers(0, 1),
    )


def networks() -> st.SearchStrategy[Cnn | Transformer]:
    """Any of them."""
    return st.one_of(cnns(), transformers())


@cache
def traced(network: Cnn | Transformer, dtype: torch.dtype = torch.float32) -> tuple[fx.GraphModule, Any]:
    """The traced network in eval mode and its example inputs; made once, not to be changed."""
    module, example = network.build()
    example = example.to(dtype) if example.is_floating_point() else example
    return trace(module.to(dtype).eval(), example), example


def randomize_statistics(module: nn.Module) -> None:
    """Give batch norms statistics and affine parameters as after training."""
    for norm in module.modules():
        if isinstance(norm, _BatchNorm) and norm.running_mean is not None:
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2.0)
            if norm.affine:
                nn.init.uniform_(norm.weight, 0.5, 1.5)
                nn.init.normal_(norm.bias)


class _Unit(nn.Sequential):
    """Convolution, batch norm and activation."""

    def __init__(self, net: Cnn, inputs: int, outputs: int, kernel: int = 3, *, groups: int = 1, act: bool = True):
        layers: list[nn.Module] = [
            nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups, bias=not net.norm)
        ]
        if net.norm:
            layers.append(nn.BatchNorm2d(outputs))
        if act:
            layers.append(_ACTIVATIONS[net.activation]())
        super().__init__(*layers)


class _Residual(nn.Module):
    def __init__(self, net: Cnn, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(_Unit(net, width, width + 2), _Unit(net, width + 2, width, 1, act=False))
        self.width = width

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + self.body(x))


class _Concat(nn.Module):
    def __init__(self, net: Cnn, width: int) -> None:
        super().__init__()
        self.left, self.right = _Unit(net, width, 4, 1), _Unit(net, width, 6)
        self.width = width + 10

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.left(x), x, self.right(x)], 1)


class _InvertedResidual(nn.Module):
    def __init__(self, net: Cnn, width: int) -> None:
        super().__init__()
        self.expand = _Unit(net, width, 2 * width, 1)
        self.depthwise = _Unit(net, 2 * width, 2 * width, groups=2 * width)
        self.project = _Unit(net, 2 * width, width, 1, act=False)
        self.width = width

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.project(self.depthwise(self.expand(x)))


class _Multiplied(nn.Module):
    """A depthwise convolution with two outputs for each input."""

    def __init__(self, net: Cnn, width: int) -> None:
        super().__init__()
        self.depthwise = _Unit(net, width, 2 * width, groups=width)
        self.project = _Unit(net, 2 * width, 6, 1)
        self.width = 6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.project(self.depthwise(x))


class _Grouped(nn.Module):
    def __init__(self, net: Cnn, width: int) -> None:
        super().__init__()
        self.mix = _Unit(net, width, 8, 1)
        self.grouped = _Unit(net, 8, 8, groups=2)
        self.width = 8

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.grouped(self.mix(x))


class _Gated(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, net: Cnn, width: int) -> None:
        super().__init__()
        self.body = _Unit(net, width, width)
        self.squeeze, self.excite = nn.Conv2d(width, 3, 1), nn.Conv2d(3, width, 1)
        self.width = width

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.body(x)
        gate = torch.sigmoid(self.excite(torch.relu(self.squeeze(y.mean((2, 3), keepdim=True)))))
        return y * gate


class _PreActivated(nn.Module):
    """A batch norm in front of a convolution without padding, and one between activations."""

    def __init__(self, net: Cnn, width: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(width) if net.norm else nn.Identity()
        self.mix = nn.Conv2d(width, 6, 1)
        self.norm2 = nn.BatchNorm2d(6) if net.norm else nn.Identity()
        self.conv = nn.Conv2d(6, 6, 3, padding=1)
        self.width = 6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(torch.relu(self.norm2(torch.relu(self.mix(self.norm(x))))))


class _Split(nn.Module):
    """Halves that take different ways and meet again."""

    def __init__(self, net: Cnn, width: int) -> None:
        super().__init__()
        self.mix = _Unit(net, width, 8, 1)
        self.body = _Unit(net, 4, 4)
        self.width = 8

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left, right = self.mix(x).chunk(2, 1)
        return torch.cat([left, self.body(right)], 1)


_BLOCKS = {
    "residual": _Residual,
    "concat": _Concat,
    "inverted": _InvertedResidual,
    "multiplied": _Multiplied,
    "grouped": _Grouped,
    "gated": _Gated,
    "preactivated": _PreActivated,
    "split": _Split,
}


BLOCKS = tuple(sorted(_BLOCKS))
"""All kinds of blocks."""


class _CnnModule(nn.Module):
    def __init__(self, net: Cnn) -> None:
        super().__init__()
        self.stem = _Unit(net, 3, net.width)
        width = net.width
        blocks = []
        for kind in net.blocks:
            blocks.append(_BLOCKS[kind](net, width))
            width = blocks[-1].width
        self.blocks = nn.Sequential(*blocks)
        self.head = net.head
        self.classifier: nn.Module
        if net.head == "conv":
            self.classifier = nn.Conv2d(width, 5, 1)
        else:
            self.classifier = nn.Linear(width * (IMAGE * IMAGE if net.head == "flatten" else 1), 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.blocks(self.stem(x))
        if self.head == "conv":
            return self.classifier(x).mean((2, 3))
        return self.classifier(x.flatten(1) if self.head == "flatten" else x.mean((2, 3)))


class _Attention(nn.Module):
    def __init__(self, net: Transformer) -> None:
        super().__init__()
        width = net.heads * net.head_width
        self.heads, self.head_width = net.heads, net.head_width
        if net.fused:
            self.qkv = nn.Linear(width, 3 * width)
        else:
            self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.fused = net.fused
        self.mix = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = self.qkv(x).chunk(3, -1) if self.fused else (self.query(x), self.key(x), self.value(x))
        q, k, v = (part.view(*x.shape[:2], self.heads, self.head_width).transpose(1, 2) for part in parts)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.mix(y.transpose(1, 2).reshape(x.shape))


class _Block(nn.Module):
    def __init__(self, net: Transformer) -> None:
        super().__init__()
        width = net.heads * net.head_width
        self.norm1, self.attention = nn.LayerNorm(width), _Attention(net)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, net.hidden), nn.GELU(), nn.Dropout(0.1), nn.Linear(net.hidden, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class _TransformerModule(nn.Module):
    def __init__(self, net: Transformer) -> None:
        super().__init__()
        width = net.heads * net.head_width
        self.embed = nn.Embedding(13, width)
        self.position = nn.Parameter(torch.randn(5, width))
        self.blocks = nn.Sequential(*(_Block(net) for _ in range(net.blocks)))
        self.head = nn.Linear(width, 5)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.embed(tokens) + self.position).mean(1))
