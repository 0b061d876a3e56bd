"""Norms that average over some of their channels: what a norm computes once the others are cut, at full size."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

__all__ = ["MaskedNorm", "masked_norm"]


class MaskedNorm(nn.Module):
    """A norm over the channels of a mask; what it gives for the others is zero.

    Attributes:
        kept: Zeros and ones, shape (channels,); a buffer that the state_dict leaves out.
    """

    kept: torch.Tensor

    def _moments(self, x: torch.Tensor, kept: torch.Tensor, centred: bool) -> torch.Tensor:
        """``x`` of shape (..., values), zero where masked, divided by its spread over what is kept."""
        count = kept.expand_as(x).sum(-1, keepdim=True)
        mean = (x * kept).sum(-1, keepdim=True) / count if centred else torch.zeros_like(count)
        shifted = (x - mean) * kept
        return shifted * torch.rsqrt(shifted.square().sum(-1, keepdim=True) / count + self._eps(x))

    def _affine(self, y: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        weight, bias = self._parameters.get("weight"), self._parameters.get("bias")
        y = y if weight is None else y * weight.reshape(shape)
        return y if bias is None else y + bias.reshape(shape)

    def _eps(self, x: torch.Tensor) -> float:
        eps = getattr(self, "eps", None)
        return torch.finfo(x.dtype).eps if eps is None else float(eps)


class _MaskedLayerNorm(MaskedNorm, nn.LayerNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._affine(self._moments(x, self.kept.to(x.dtype), centred=True), (-1,))


class _MaskedRMSNorm(MaskedNorm, nn.RMSNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._affine(self._moments(x, self.kept.to(x.dtype), centred=False), (-1,))


class _MaskedGroupNorm(MaskedNorm, nn.GroupNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(x.shape[0], self.num_groups, -1)
        pixels = x[0, 0].numel()
        kept = self.kept.to(x.dtype).repeat_interleave(pixels).reshape(1, self.num_groups, -1)
        if self.num_groups == self.num_channels:
            kept = torch.ones_like(kept)
        y = self._moments(rows, kept, centred=True).reshape(x.shape)
        return self._affine(y, (1, -1, *[1] * (x.dim() - 2)))


_CLASSES: dict[type[nn.Module], Any] = {
    nn.LayerNorm: _MaskedLayerNorm,
    nn.RMSNorm: _MaskedRMSNorm,
    nn.GroupNorm: _MaskedGroupNorm,
}


def masked_norm(norm: nn.Module, kept: torch.Tensor) -> nn.Module:
    """A norm with the same tensors that averages over the channels that are kept.

    Args:
        norm: A layer, RMS or group norm.
        kept: Whether each channel stays, shape (channels,).
    """
    kind = next(masked for plain, masked in _CLASSES.items() if isinstance(norm, plain))
    result: nn.Module = kind.__new__(kind)
    state = {name: dict(value) if isinstance(value, dict) else value for name, value in norm.__dict__.items()}
    result.__dict__.update(state)
    result.__dict__["_non_persistent_buffers_set"] = {*norm._non_persistent_buffers_set}
    tensor = next(norm.parameters(), None)
    result.register_buffer("kept", kept.to(tensor.device if tensor is not None else kept.device), persistent=False)
    return result
