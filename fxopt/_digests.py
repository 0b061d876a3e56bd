"""Short names for what is too long to be compared."""

from __future__ import annotations

import hashlib

import torch
from torch import fx

__all__ = ["digest", "digest_of"]


def digest_of(graph: fx.GraphModule) -> str:
    """A short name for what a graph computes: its code and its tensors."""
    tensors = ((name, tensor.detach().cpu().contiguous()) for name, tensor in graph.state_dict().items())
    parts = (part for name, tensor in tensors for part in (name, tensor.reshape(-1).view(torch.uint8).numpy().data))
    return digest(graph.code, *parts)


def digest(*parts: str | bytes | memoryview) -> str:
    """A short name for what the parts say."""
    found = hashlib.sha256()
    for part in parts:
        found.update(part.encode() if isinstance(part, str) else part)
    return found.hexdigest()[:12]
