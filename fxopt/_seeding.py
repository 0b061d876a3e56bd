"""Random numbers that depend on a seed alone, and that leave the caller's as they were."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

__all__ = ["seeded"]


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw from a seed, on every device, and give torch's generators their states back at the end."""
    # Named one by one: left to itself, torch warns wherever there is more than one.
    in_use = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(devices=in_use):
        torch.manual_seed(seed)
        yield
