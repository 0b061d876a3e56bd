"""What bit-widths mean, wherever they are written."""

from __future__ import annotations

__all__ = ["FLOAT_BITS", "MAX_BITS"]

FLOAT_BITS = 32
"""The bit-width that stands for "left in floating point"."""

MAX_BITS = 8
"""Most bits of a grid; wider values stay in floating point."""
