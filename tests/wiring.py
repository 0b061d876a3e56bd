"""Networks wired by a function, for cases that need one odd connection."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class Wired(nn.Module):
    """Layers by name, wired by a function."""

    def __init__(self, forward: Callable[..., Any], **layers: Any) -> None:
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.wiring = forward

    def forward(self, x: torch.Tensor) -> Any:
        return self.wiring(self, x)
