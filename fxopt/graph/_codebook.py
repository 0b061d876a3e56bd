"""Weights as indices into a codebook, found by k-means and trained by cluster (Han et al. 2016, Deep Compression)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn

from fxopt.errors import PassError
from fxopt.graph.grids import WeightScheme, checked_bits

__all__ = ["CodebookQuantizer"]

_ROUNDS = 50


class CodebookQuantizer(nn.Module):
    """Replaces every number of a weight by the nearest of ``2^bits`` shared values.

    The values are found by k-means (Lloyd's iteration, from equal distances between the extremes, which Deep
    Compression found to be best). Which value a number takes stays as :meth:`calibrate` left it, and training moves the
    values: the gradient of each is the sum of the gradients of all numbers that take it (Deep Compression, section 3),
    or their mean, which is what HAQ does when it averages each cluster after every step.

    Args:
        bits: Bits of an index, 1 to 8.
        size: Shape of the weight.
        gradient: "sum" or "mean".

    Attributes:
        codebook: The shared values, ascending where first found; a parameter of shape (2^bits,), or of as many values
            as the weight has numbers.
        labels: Which of them stands at each place, a uint8 buffer of the weight's shape.

    Raises:
        PassError: If an option is out of range.
    """

    labels: torch.Tensor

    def __init__(self, bits: int, size: torch.Size, gradient: Literal["sum", "mean"] = "sum") -> None:
        super().__init__()
        if gradient not in ("sum", "mean"):
            raise PassError(f"The gradient of a cluster is a 'sum' or a 'mean', not {gradient!r}.")
        self.bits = checked_bits(bits, "a weight")
        self.scheme = WeightScheme("kmeans")
        self.gradient = gradient
        self.codebook = nn.Parameter(torch.zeros(min(2**bits, size.numel())))
        self.register_buffer("labels", torch.zeros(size, dtype=torch.uint8))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """The shared values in the places of a weight's numbers; the weight itself is not looked at."""
        held: torch.Tensor = _LookUp.apply(self.codebook, self.labels, self.gradient)  # type: ignore[no-untyped-call]
        return held.to(weight.dtype)

    @torch.no_grad()
    def calibrate(self, weight: torch.Tensor) -> None:
        """Find the shared values of a weight, and which one each of its numbers takes."""
        values = weight.detach().float().flatten()
        count = len(self.codebook)
        distinct = values.unique()  # type: ignore[no-untyped-call]
        if len(distinct) <= count:
            centres = torch.cat([distinct, distinct[-1:].expand(count - len(distinct))])
        else:
            centres = torch.linspace(float(distinct[0]), float(distinct[-1]), count, device=values.device)
            for _ in range(_ROUNDS):
                labels = _nearest(values, centres)
                sizes = torch.bincount(labels, minlength=count)
                sums = torch.bincount(labels, values.double(), minlength=count)
                moved = torch.where(sizes > 0, sums / sizes.clamp(min=1), centres.double()).float().sort().values
                if torch.equal(moved, centres):
                    break
                centres = moved
        self.codebook.copy_(centres)
        self.labels.copy_(_nearest(values, centres).view_as(self.labels))

    def follow(self, weight: torch.Tensor) -> None:
        """Nothing: training moves the shared values themselves."""

    def settle(self, weight: torch.Tensor) -> None:
        """Nothing, as training left the shared values where they are."""

    def extra_repr(self) -> str:
        """The bits and the gradient."""
        return f"bits={self.bits}, gradient={self.gradient}"


def _nearest(values: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    return torch.bucketize(values, (centres[1:] + centres[:-1]) / 2)


class _LookUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, codebook: torch.Tensor, labels: torch.Tensor, gradient: str) -> torch.Tensor:
        ctx.save_for_backward(labels)
        ctx.count, ctx.mean = len(codebook), gradient == "mean"
        return codebook[labels.int()]

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        labels = ctx.saved_tensors[0].flatten().int()
        total = torch.bincount(labels, gradients[0].flatten(), minlength=ctx.count)
        if ctx.mean:
            total /= torch.bincount(labels, minlength=ctx.count).clamp(min=1)
        return total.to(gradients[0].dtype), None, None
