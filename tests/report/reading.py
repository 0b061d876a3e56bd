"""A page as a browser takes it apart, without a browser."""

from __future__ import annotations

from html.parser import HTMLParser

__all__ = ["Page"]

VOID = {"meta", "link", "img", "br", "hr", "input"}


class Page(HTMLParser):
    """What a browser would see: balanced tags, attributes, text by tag.

    Attributes:
        open: The elements that were not closed.
        tags: Every element with its attributes.
        text: The texts, each with the element that it stands in.
        tables: The rows of every table, heads among them, by the label of the region it stands in; a cell is its
            text and its attributes.
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[tuple[str, str]] = []
        self.tables: dict[str, list[list[tuple[str, dict[str, str | None]]]]] = {}
        self._region = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._keep(tag, dict(attrs))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._keep(tag, dict(attrs))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not data.strip():
            return
        self.text.append((self.open[-1] if self.open else "", data.strip()))
        if "td" in self.open or "th" in self.open:
            words, attrs = self.tables[self._region][-1][-1]
            self.tables[self._region][-1][-1] = (f"{words} {data.strip()}".strip(), attrs)

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)

    def seen(self, text: str) -> bool:
        return any(text in data for _, data in self.text)

    def column(self, table: str, number: int) -> list[str]:
        """The texts of a column, from 0, without its head."""
        return [row[number][0] for row in self.tables[table][1:]]

    def _keep(self, tag: str, attrs: dict[str, str | None]) -> None:
        self.tags.append((tag, attrs))
        if attrs.get("role") == "region":
            self._region = attrs["aria-label"] or ""
            self.tables[self._region] = []
        elif tag == "tr":
            self.tables[self._region].append([])
        elif tag in ("td", "th"):
            self.tables[self._region][-1].append(("", attrs))
