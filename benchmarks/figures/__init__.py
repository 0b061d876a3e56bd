"""What the benchmarks are held to, and the table of it in ``RESULTS.md``.

Modules by subject (``speed``, ``targets``, ``channels``, ``bits``, ``operators``) hold the :class:`Bar` of each figure:
what is wanted, and the function that takes it from the JSON that a benchmark prints. ``table`` reads and writes the
table; ``python -m figures``, with this folder's parent on the path, brings it up to date with ``benchmarks/out``.
"""

from __future__ import annotations

from figures import bits, channels, operators, speed, targets
from figures.bar import Bar, Found, Wanted

__all__ = ["BARS", "Bar", "Found", "Wanted"]

BARS: tuple[Bar, ...] = (*speed.BARS, *targets.BARS, *channels.BARS, *bits.BARS, *operators.BARS)
"""All of them, in the order of the table."""
