"""What would be cut and what cannot be, before anything is: as objects, as a table, as plain data."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["COLUMNS", "ChannelCut", "Explanation"]


@dataclass(frozen=True)
class ChannelCut:
    """What is cut from one channel group.

    Attributes:
        site: The group's site, as the policy names it.
        operator: Kind of the layer there: ``conv``, ``linear`` or ``embedding``.
        size: Number of units before.
        kept: Number of units after.
        layers: Module paths whose parameters or buffers shrink, in graph order.
        saved_elements: Elements of parameters and buffers that go if this group alone is cut.
        share: Part of the graph's parameters that the group's channels run through, 0 to 1; groups overlap, for a
            weight lies between two of them.
        reason: Why the group cannot be cut, or None if it can.
    """

    site: str
    operator: str
    size: int
    kept: int
    layers: tuple[str, ...]
    saved_elements: int
    share: float = 0.0
    reason: str | None = None


class Explanation(tuple[ChannelCut, ...]):
    """What becomes of every channel group: first those that can be cut, in graph order, then those that cannot.

    It is a tuple of :class:`ChannelCut`; ``str`` of it is a table.
    """

    __slots__ = ()

    @property
    def frozen(self) -> dict[str, float]:
        """For every reason why groups cannot be cut, the largest first, the sum of their shares of the parameters."""
        found: dict[str, float] = {}
        for cut in self:
            if cut.reason is not None:
                found[cut.reason] = found.get(cut.reason, 0.0) + cut.share
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    def to_data(self) -> dict[str, Any]:
        """As plain data: ``schema``, ``groups`` (the fields of every cut) and ``frozen`` (shares by reason)."""
        return {"schema": 1, "groups": [asdict(cut) for cut in self], "frozen": self.frozen}

    def to_json(self) -> str:
        """As JSON; see :meth:`to_data`."""
        return json.dumps(self.to_data(), indent=1)

    def rows(self) -> list[tuple[str, ...]]:
        """A row of texts for every group: site, operator, channels, layers that shrink, elements saved, share, why not.

        See :attr:`COLUMNS` for the headings.
        """
        return [
            (
                cut.site,
                cut.operator,
                f"{cut.size} -> {cut.kept}" if cut.kept < cut.size else str(cut.size),
                str(len(cut.layers)) if cut.layers else "",
                f"{cut.saved_elements:,}" if cut.saved_elements else "",
                f"{cut.share:.1%}",
                cut.reason or "",
            )
            for cut in self
        ]

    def __str__(self) -> str:
        """A table of all groups, one a line."""
        rows = [COLUMNS, *self.rows()]
        widths = [max(len(row[index]) for row in rows) for index in range(len(COLUMNS))]
        right = (2, 3, 4, 5)
        lines = (
            "  ".join(
                cell.rjust(width) if index in right else cell.ljust(width)
                for index, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        )
        return "\n".join(lines)


COLUMNS = ("site", "operator", "channels", "layers", "elements saved", "share", "not cut because")
"""Headings of :meth:`Explanation.rows`."""
