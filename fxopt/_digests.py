"""Short names for what is too long to be compared."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping

import torch
from torch import fx

__all__ = ["digest", "digest_of", "digest_of_tensors"]


def digest_of(graph: fx.GraphModule) -> str:
    """A short name for what a graph computes: its code and its tensors."""
    return digest_of_tensors(graph.state_dict(), graph.code)


def digest_of_tensors(tensors: Mapping[str, torch.Tensor], *texts: str) -> str:
    """A short name for tensors, with names, types and shapes, and texts beside them."""
    return digest(*texts, *_parts(tensors))


def _parts(tensors: Mapping[str, torch.Tensor]) -> Iterator[str | memoryview]:
    for name, tensor in tensors.items():
        yield f"{name} {tensor.dtype} {tuple(tensor.shape)}"
        yield tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def digest(*parts: str | bytes | memoryview) -> str:
    """A short name for what the parts say."""
    found = hashlib.sha256()
    for part in parts:
        found.update(part.encode() if isinstance(part, str) else part)
    return found.hexdigest()[:12]
