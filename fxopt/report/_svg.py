"""Charts of matplotlib as pieces of a page: text stays text, colours follow its theme, marks say what they are."""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import matplotlib
from matplotlib.figure import Figure

from fxopt.report._theme import LIGHT

if TYPE_CHECKING:
    from matplotlib.artist import Artist

__all__ = ["Chart", "Marks", "chart", "drawing", "shortened"]

_SIZE = 8.0
"""Points of the text."""
_WIDTH = 9.0
"""Inches; pages show it as wide as their column."""
_CHARACTERS = 28

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": _SIZE,
    "font.family": ["sans-serif"],
    # Names of layers may hold dollars.
    "text.parse_math": False,
    "text.color": LIGHT["text"],
    "axes.labelcolor": LIGHT["faint"],
    "axes.edgecolor": LIGHT["line"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "grid.color": LIGHT["line"],
    "grid.linewidth": 0.6,
    "xtick.color": LIGHT["faint"],
    "ytick.color": LIGHT["faint"],
    "legend.frameon": False,
}
_COLOUR = re.compile(r"#[0-9a-f]{6}\b")
_FONT = re.compile(r"font: (?:\w+ )?([\d.]+px) [^;]*")
_WANTED = re.compile(r"(?:\A|url\()#([\w-]+)")
_REFERENCE = re.compile(r"url\(#")
_NAMES = {value: name for name, value in LIGHT.items()}
_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufffe\uffff]")
"""What XML has no place for."""


@dataclass
class Marks:
    """What the marks of a chart are, in words.

    Attributes:
        words: Words of the marks by the id of their artist, in the order in which it draws them.
    """

    words: dict[str, list[str]] = field(default_factory=dict)

    def add(self, artist: Artist, words: Sequence[str]) -> None:
        """Say what an artist draws, mark by mark."""
        if not words:
            return
        name = f"marks-{len(self.words)}"
        artist.set_gid(name)
        self.words[name] = [_FORBIDDEN.sub("\ufffd", one) for one in words]


@dataclass(frozen=True)
class Chart:
    """A chart for the page.

    Attributes:
        name: Its name in the page, which its ids begin with.
        heading: Its heading.
        svg: The drawing.
        caption: What to know when reading it.
    """

    name: str
    heading: str
    svg: str
    caption: str


def chart(
    name: str,
    heading: str,
    told: str,
    draw: Callable[[Figure, Marks], None],
    *,
    height: float = 3.2,
    caption: str = "",
) -> Chart:
    """Draw a chart for the page.

    Args:
        name: Its name in the page.
        heading: Its heading.
        told: What it shows, for those who do not see it.
        draw: Draws it.
        height: Height in inches; it is 9 wide.
        caption: What to know when reading it.
    """
    marks = Marks()
    with drawing() as (figure, out):
        figure.set_size_inches(_WIDTH, height)
        draw(figure, marks)
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    return Chart(name, heading, _inlined(out.getvalue(), name, told, marks.words), caption)


@contextlib.contextmanager
def drawing() -> Iterator[tuple[Figure, io.BytesIO]]:
    """A figure in the style of reports, and where to save it."""
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": "fxopt"}), warnings.catch_warnings():
        # Letters that matplotlib's own font lacks are drawn by the reader's; only their width is a guess.
        warnings.filterwarnings("ignore", message=".*Glyph.*missing from font")
        yield Figure(figsize=(_WIDTH, 5.0), layout="constrained"), io.BytesIO()


def shortened(name: str) -> str:
    """A name that fits beside a chart: without its beginning if it is long."""
    return name if len(name) <= _CHARACTERS else "…" + name[-_CHARACTERS + 1 :]


def _inlined(svg: bytes, name: str, told: str, marks: Mapping[str, Sequence[str]]) -> str:
    root = ElementTree.fromstring(_FORBIDDEN.sub("\ufffd", svg.decode()))
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
    _without(root, ("metadata", "style"))
    named = {element.attrib["id"]: element for element in root.iter() if "id" in element.attrib}
    for identifier, words in marks.items():
        _name_marks(named[identifier], words)
    for element in root.iter():
        element.attrib = {key.rpartition("}")[2]: value for key, value in element.attrib.items()}
    wanted = {found for element in root.iter() for value in element.attrib.values() for found in _WANTED.findall(value)}
    for element in root.iter():
        _follow_theme(element.attrib, name, wanted)
    root.attrib = {
        "viewBox": root.attrib["viewBox"],
        "role": "img",
        "aria-labelledby": f"{name}-title",
    }
    title = ElementTree.Element("title", {"id": f"{name}-title"})
    title.text = _FORBIDDEN.sub("\ufffd", told)
    root.insert(0, title)
    return ElementTree.tostring(root, encoding="unicode")


def _without(root: ElementTree.Element, tags: Sequence[str]) -> None:
    """Styles of a drawing would hold for the whole page, and metadata names addresses."""
    for parent in list(root.iter()):
        for child in [child for child in parent if child.tag in tags]:
            parent.remove(child)


def _name_marks(group: ElementTree.Element, words: Sequence[str]) -> None:
    stored = {id(element) for parent in group.iter("defs") for element in parent.iter()}
    drawn = [one for one in group.iter() if one.tag in ("use", "path") and id(one) not in stored]
    for element, text in zip(drawn, words, strict=True):
        element.set("class", "mark")
        ElementTree.SubElement(element, "title").text = text


def _follow_theme(attributes: dict[str, str], name: str, wanted: Container[str]) -> None:
    """Take colours and font from the page, and let no two charts have an id in common; keep those that are wanted."""
    if "style" in attributes:
        style = _FONT.sub(r"font: \1 system-ui, sans-serif", attributes["style"])
        attributes["style"] = _COLOUR.sub(lambda found: _variable(found.group()), style)
    if "id" in attributes:
        identifier = attributes.pop("id")
        if identifier in wanted:
            attributes["id"] = f"{name}-{identifier}"
    if attributes.get("href", "").startswith("#"):
        attributes["href"] = f"#{name}-{attributes['href'][1:]}"
    if "clip-path" in attributes:
        attributes["clip-path"] = _REFERENCE.sub(f"url(#{name}-", attributes["clip-path"])


def _variable(colour: str) -> str:
    return f"var(--{_NAMES[colour]})" if colour in _NAMES else colour
