"""What the commands do; :mod:`fxopt.cli` has their options."""

from __future__ import annotations

__all__: list[str] = []
