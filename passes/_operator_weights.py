"""Weights of candidates: those of the block they stand in for as far as they fit, and seeded ones beyond."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from fxopt._seeding import seeded
from fxopt.passes._operator_patterns import Block, Squeeze, Unit
from fxopt.passes._operators import OWN, SqueezeExcite, is_custom
from fxopt.passes._scaling import scale_and_shift

__all__ = ["inherit", "initialize", "restart", "seed_of"]

_INVERTED, _FUSED = "mb", "fused"
_SAME_LAYERS: Mapping[str, str] = {
    "inverted-residual": _INVERTED,
    "fused-inverted-residual": _FUSED,
    "depthwise-separable": "separable",
    "basic": "basic",
    "bottleneck": "bottleneck",
    "convolution": "conv",
}


def seed_of(seed: int, *names: str) -> int:
    """A seed for something that has names."""
    digest = hashlib.sha256("/".join((str(seed), *names)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def initialize(module: nn.Module, seed: int, *names: str) -> None:
    """Set weights anew from a seed and names: convolutions as He et al. (2015), norms to one and zero."""
    generator = torch.Generator().manual_seed(seed_of(seed, *names))
    for part in module.modules():
        if isinstance(part, (_ConvNd, nn.Linear)):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu", generator=generator)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, _BatchNorm):
            part.reset_parameters()


def restart(gm: fx.GraphModule, seed: int) -> list[str]:
    """Set all of a graph's weights anew from a seed: as :func:`initialize`, other layers by ``reset_parameters``.

    Returns:
        The parameters that nothing sets anew, which are as they were.
    """
    left = []
    with seeded(seed_of(seed, "other layers")):
        for path, part in gm.named_modules():
            reset = getattr(part, "reset_parameters", None)
            if callable(reset):
                reset()
            else:
                left += [f"{path}.{name}".lstrip(".") for name, _ in part.named_parameters(recurse=False)]
    initialize(gm, seed, "from scratch")
    return left


def inherit(module: nn.Module, gm: fx.GraphModule, block: Block, name: str) -> bool:
    """Give a candidate of the same layers as its block the block's weights; whether it is one.

    Kernels are padded with zeros around the block's, or cut to their centre. Of more expanded channels than there are,
    those that remain weigh most in the layer that reads them (L1); channels that the block has not are read with
    weight zero. So a candidate that is no smaller than the block computes what the block computes; one that has the
    first two layers of an inverted residual in one computes that without the activation between them, but at the
    borders (as Fu et al. 2022 merge them).
    """
    if is_custom(name):
        return False
    family = _SAME_LAYERS.get(block.pattern.name)
    merged = family == _INVERTED and name.startswith(_FUSED) and _can_merge(gm, block)
    if not merged and not name.startswith(f"{OWN}-") and (family is None or not name.startswith(family)):
        return False
    mine = [part for part in module.children() if not isinstance(part, SqueezeExcite)]
    if len(mine) != len(block.units) - merged:
        return False
    kept: torch.Tensor | None = None
    with torch.no_grad():
        for index, new in enumerate(mine, start=int(merged)):
            read, kept = kept, _chosen(block, index, new)
            if merged and index == 1:
                _take_merged(gm, new, block, kept)
            else:
                _take(gm, new, block.units[index], kept, read)
            if block.squeeze is not None and index == block.squeeze.behind:
                _take_gate(gm, module, block.squeeze, kept)
    return True


def _can_merge(gm: fx.GraphModule, block: Block) -> bool:
    """Whether a block's first two layers are one but for the activation between them, with what candidates have behind.

    The first has no norm, or batch norm with statistics; the second has the stride, a norm if candidates have one, and
    an activation.
    """
    first, second = block.units[:2]
    norm = None if first.norm is None else gm.get_submodule(str(first.norm.target))
    linear = norm is None or (isinstance(norm, _BatchNorm) and norm.running_mean is not None)
    alike = (second.norm is None) == (block.style.norm is None) and second.activation is not None
    return linear and alike and first.module.stride == (1, 1)


def _take_merged(gm: fx.GraphModule, new: nn.Module, block: Block, kept: torch.Tensor | None) -> None:
    """Give a dense unit the product of a block's 1 x 1 layer and the depthwise one behind it."""
    first, second = block.units[:2]
    weight, shift = first.module.weight.detach().double(), first.module.weight.new_zeros(1).double()
    if first.module.bias is not None:
        shift = first.module.bias.detach().double()
    if first.norm is not None:
        scale, offset = scale_and_shift(gm.get_submodule(str(first.norm.target)))
        weight, shift = weight * scale[:, None, None, None], shift * scale + offset
    conv: Any = new.get_submodule("conv")
    kernels = second.module.weight.detach().double()
    bias = shift * kernels.sum((1, 2, 3))
    if second.module.bias is not None:
        bias += second.module.bias.detach()
    dense = _centred((kernels * weight).to(conv.weight), conv.kernel_size[0])
    conv.weight.copy_(_selected(dense, kept, 0, conv.weight.detach()))
    _take_rest(gm, new, second, bias.to(conv.weight), kept)


def _chosen(block: Block, index: int, new: nn.Module) -> torch.Tensor | None:
    """Which outputs of the block's unit the new one has, -1 for others; None where they are all the same."""
    fresh: Any = new.get_submodule("conv")
    old = block.units[index].module
    if index == len(block.units) - 1 or fresh.out_channels == old.out_channels:
        return None
    order = torch.arange(old.out_channels, device=old.weight.device)
    if fresh.out_channels < old.out_channels:
        scores = _reading(block, index).abs().double().sum((0, 2, 3))
        order = torch.argsort(scores, descending=True, stable=True)[: fresh.out_channels].sort().values
    missing = fresh.out_channels - len(order)
    return torch.cat([order, order.new_full((missing,), -1)])


def _reading(block: Block, index: int) -> torch.Tensor:
    """Weights of the dense layer that reads a unit's outputs, through depthwise ones."""
    following = next(one for one in block.units[index + 1 :] if one.module.groups == 1)
    return following.module.weight.detach()


def _take(gm: fx.GraphModule, new: nn.Module, old: Unit, kept: torch.Tensor | None, read: torch.Tensor | None) -> None:
    """Give a unit the weights of another: outputs ``kept`` of it, which read the inputs ``read``."""
    conv: Any = new.get_submodule("conv")
    weight = _centred(old.module.weight.detach(), conv.kernel_size[0])
    if old.module.groups == 1 and read is not None:
        weight = _selected(weight, read, 1, torch.zeros(()))
    conv.weight.copy_(_selected(weight, kept, 0, conv.weight.detach()))
    _take_rest(gm, new, old, _bias(old.module), kept)


def _take_rest(
    gm: fx.GraphModule, new: nn.Module, old: Unit, bias: torch.Tensor | None, kept: torch.Tensor | None
) -> None:
    """Give a unit another's bias and norm."""
    conv: Any = new.get_submodule("conv")
    if conv.bias is not None and bias is not None:
        conv.bias.copy_(_selected(bias, kept, 0, conv.bias.detach()))
    if old.norm is not None:
        _take_norm(new.get_submodule("norm"), gm.get_submodule(str(old.norm.target)), bias, kept)


def _bias(layer: Any) -> torch.Tensor | None:
    return None if layer.bias is None else layer.bias.detach()


def _take_norm(norm: nn.Module, like: nn.Module, bias: torch.Tensor | None, kept: torch.Tensor | None) -> None:
    """Give a norm the state of another; the bias of the layer before that one goes into its mean."""
    for name, tensor in norm.state_dict().items():
        source = like.state_dict()[name]
        if source.dim():
            source = source if kept is None else _selected(source, kept, 0, tensor)
            if name == "running_mean" and bias is not None:
                source = source - _selected(bias, kept, 0, torch.zeros_like(tensor))
        tensor.copy_(source)


def _take_gate(gm: fx.GraphModule, module: nn.Module, old: Squeeze, kept: torch.Tensor | None) -> None:
    gate: Any = next(part for part in module.children() if isinstance(part, SqueezeExcite))
    for new, node, dim in ((gate.reduce, old.reduce, 1), (gate.expand, old.expand, 0)):
        layer: Any = gm.get_submodule(str(node.target))
        fresh = torch.zeros(()) if dim else new.weight.detach()
        weight = layer.weight.detach().flatten(1)[:, :, None, None]
        new.weight.copy_(_selected(weight, kept, dim, fresh))
        if new.bias is None:
            continue
        if layer.bias is None:
            new.bias.zero_()
        else:
            new.bias.copy_(_selected(layer.bias.detach(), None if dim else kept, 0, new.bias.detach()))
    if old.norm is not None:
        reduce = gm.get_submodule(str(old.reduce.target))
        _take_norm(gate.norm, gm.get_submodule(str(old.norm.target)), _bias(reduce), None)


def _selected(source: torch.Tensor, kept: torch.Tensor | None, dim: int, fresh: torch.Tensor) -> torch.Tensor:
    """The entries ``kept`` of a dimension; those of ``fresh`` where there are none (-1)."""
    if kept is None:
        return source
    found = source.index_select(dim, kept.clamp(min=0))
    sizes = [1] * source.dim()
    sizes[dim] = -1
    return torch.where((kept >= 0).view(sizes), found, fresh)


def _centred(weight: torch.Tensor, kernel: int) -> torch.Tensor:
    """A kernel padded with zeros, or cut to its centre."""
    margin = (kernel - weight.shape[-1]) // 2
    return nn.functional.pad(weight, (margin,) * 4)
