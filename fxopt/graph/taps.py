"""Reading values inside a graph while it runs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx, nn

from fxopt.errors import VerifyError
from fxopt.graph import edit
from fxopt.graph._copies import same_modules

__all__ = ["Taps"]


class _Tap(nn.Module):
    """Keeps what passes through it."""

    def __init__(self, name: str, found: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self._name, self._found = name, found

    def forward(self, value: Any) -> Any:
        self._found[self._name] = value
        return value


class Taps:
    """A graph that remembers the values of some of its nodes from one call to the next.

    Args:
        gm: A graph. It is left alone.
        names: Names of nodes.

    Attributes:
        graph: Computes what ``gm`` does, with the very same modules, parameters, buffers and modes.
        values: The values of the nodes in the last call, by name, as part of autograd's graph.

    Raises:
        VerifyError: If there is no such node.
    """

    def __init__(self, gm: fx.GraphModule, names: Iterable[str]) -> None:
        self.values: dict[str, torch.Tensor] = {}
        self.graph = same_modules(gm)
        nodes = {node.name: node for node in self.graph.graph.nodes}
        for name in names:
            if name not in nodes:
                raise VerifyError(f"The graph has no node {name!r}; name one of gm.graph.nodes.")
            path = edit.free_path(self.graph, f"tap_{name}")
            edit.insert_module(self.graph, path, _Tap(name, self.values), nodes[name], (nodes[name],))
        # Nobody reads a tap, so that edit.finish would take it for dead.
        self.graph.recompile()
