"""The page that tells how far each preset can be trusted, held against the presets that it is made of.

``python tests/targets/test_preset_page.py`` writes the page anew.
"""

from __future__ import annotations

import html
import re
import textwrap
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest

from fxopt.targets import load, names
from fxopt.targets._presets import PresetTarget

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "presets.md"
_HINT = "Run `python tests/targets/test_preset_page.py` and look at what changed."
_WIDTH = 120
_HEAD = f"""\
# Presets, and how far to trust them

<!-- {_HINT.partition(" and ")[0]}: this page is made of the presets. -->

Every target that comes with fxopt but `host`, which is measured: its status, the bits that the status holds for, its
error in its file's own words, and where its figures come from. *Ranked* are bits at which a target puts networks in the
right order but does not tell their times. A figure that is fitted names what it is fitted to; the others are the
maker's, a paper's, or assumed, and say so. [How targets estimate](../explanation/targets.md) tells what follows from
it; `fxopt targets NAME` prints every single figure.

| target | family | status | bits | ranked | figures |
|---|---|---|---|---|---|
"""


def presets() -> list[PresetTarget]:
    """Every target that is made of a file, in the order of their names."""
    found = (load(name) for name in names() if name != "host")
    return [target for target in found if isinstance(target, PresetTarget)]


def page() -> str:
    """The page, from the presets alone."""
    targets = presets()
    return _HEAD + "".join(f"{row(target)}\n" for target in targets) + "".join(map(section, targets))


def row(target: PresetTarget) -> str:
    info = target.info
    link = re.sub(r"[^\w-]", "", target.name)
    cells = (
        f"[`{target.name}`](#{link})",
        f"`{info.family}`",
        info.status,
        _widths(info.calibrated_bits),
        _widths(info.ranks_only_bits),
        str(len(target.preset.figures)),
    )
    return f"| {' | '.join(cells)} |"


def section(target: PresetTarget) -> str:
    """What a target says of itself, and the sources of its figures; those of the device itself are not told twice."""
    info = target.info
    told = load(target.name.partition(":")[0]).info.sources if ":" in target.name else {}
    used = Counter(figure.source for figure in target.preset.figures.values())
    lines = [f"## `{target.name}`", f"{info.title}: **{info.status}**. {info.error}"]
    if info.energy_reason:
        lines.append(f"No energy: {info.energy_reason}")
    sources = [f"*{key}* ({_count(used[key])}): {text}" for key, text in info.sources.items() if told.get(key) != text]
    if told:
        lines.append(f"Sources are those of `{target.name.partition(':')[0]}`" + (", and:" if sources else "."))
    paragraphs = "".join(f"\n{_wrapped(line)}\n" for line in lines)
    return paragraphs + ("\n" + "".join(f"{_wrapped(f'- {one}', '  ')}\n" for one in sources) if sources else "")


def _widths(bits: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(bits)))


def _count(figures: int) -> str:
    return "no figure by itself" if not figures else f"{figures} figure{'s' * (figures > 1)}"


def _wrapped(text: str, indent: str = "") -> str:
    plain = re.sub(r"[<>\[\]|]", lambda found: f"&#{ord(found.group())};", " ".join(text.split()))
    return textwrap.fill(plain, _WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def test_the_page_is_what_the_presets_say() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), _HINT


def test_every_preset_has_a_row_and_a_section_that_says_all_of_it() -> None:
    text = PAGE.read_text(encoding="utf-8")
    rows = re.findall(r"^\| \[`([\w:-]+)`\]\(#([\w-]+)\) \|", text, re.MULTILINE)
    assert [name for name, _ in rows] == [name for name in names() if name != "host"]
    assert len({link for _, link in rows}) == len(rows)
    sections = re.split(r"^## `([\w:-]+)`$", text, flags=re.MULTILINE)[1:]
    plain = (" ".join(html.unescape(body).split()) for body in sections[1::2])
    bodies = dict(zip(sections[::2], plain, strict=True))
    assert list(bodies) == [name for name, _ in rows]
    for target in presets():
        assert " ".join(target.error.split()) in bodies[target.name], target.name
        assert f"**{target.status}**" in bodies[target.name]
        device = bodies[target.name.partition(":")[0]]
        for figure in target.preset.figures.values():
            source = " ".join(target.info.sources[figure.source].split())
            assert source in bodies[target.name] or source in device, (target.name, figure.source)


@pytest.mark.parametrize("name", [name for name in names() if name != "host"])
def test_what_is_calibrated_tells_how_far_it_is_off(name: str) -> None:
    target = load(name)
    assert bool(target.info.calibrated_bits) >= (target.status == "calibrated")
    if target.status == "calibrated":
        assert re.search(r"\d%|to the last one", target.error), target.error


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
