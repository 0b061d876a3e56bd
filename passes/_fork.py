"""Private copies of a graph to work on, as :mod:`fxopt.graph.edit` makes them."""

from __future__ import annotations

from fxopt.graph.edit import fork, own_copy

__all__ = ["fork", "own_copy"]
