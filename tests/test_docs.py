"""The documentation is true: its Python runs, its links lead somewhere, its commands and names exist."""

from __future__ import annotations

import contextlib
import doctest
import importlib
import io
import os
import re
import shlex
import sys
import unittest
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import typer

import fxopt
from fxopt import cli

PACKAGE = Path(fxopt.__file__).parent
ROOT = Path(__file__).resolve().parent.parent
OTHERS = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/RESULTS.md")
PAGES = sorted([*(ROOT / name for name in OTHERS), *(ROOT / "docs").rglob("*.md")])
FENCE = re.compile(r"^```(?P<language>\w*)(?P<info>[^\n]*)\n(?P<code>.*?)^```\s*$", re.MULTILINE | re.DOTALL)
TITLE = re.compile(r'\btitle="(?P<file>[^"]+)"')
SKIP = re.compile(r"<!-- skip: (?P<reason>\S.*?) -->\s*\Z")
LINK = re.compile(r"(?<!!)\[[^\]]*\]\((?P<target>[^)\s]+)\)")
SCRIPT = re.compile(r"\bbenchmarks/\w+\.py\b")
IDENTIFIER = re.compile(r"^::: (?P<name>[\w.]+)", re.MULTILINE)
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*")


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        language: The language after the fence.
        code: What it holds.
        line: The number of lines before its code.
        file: The file that it shows, from ``title="..."``; such a block is written rather than run.
        skip: Why it is neither run nor written, from a ``<!-- skip: reason -->`` before it.
    """

    language: str
    code: str
    line: int
    file: str | None
    skip: str | None


def blocks(text: str) -> Iterator[Block]:
    for match in FENCE.finditer(text):
        skip = SKIP.search(text[: match.start()])
        title = TITLE.search(match["info"])
        line = text.count("\n", 0, match.start("code"))
        yield Block(
            language=match["language"],
            code=match["code"],
            line=line,
            file=title["file"] if title else None,
            skip=skip["reason"] if skip else None,
        )


def live_blocks(page: Path) -> list[Block]:
    """The blocks to run or write, in order."""
    found = [block for block in blocks(page.read_text(encoding="utf-8")) if block.skip is None]
    return [block for block in found if block.file or block.language in ("python", "py")]


def commands(page: Path, *, skipped: bool = False) -> list[list[str]]:
    """The words after ``$ fxopt`` in the page's console blocks, lines that end in a backslash joined."""
    found = []
    for block in blocks(page.read_text(encoding="utf-8")):
        if block.language == "console" and (block.skip is None or skipped):
            lines = block.code.replace("\\\n", " ").splitlines()
            found += [shlex.split(line)[2:] for line in lines if line.startswith("$ fxopt")]
    return found


def all_commands(page: Path) -> list[list[str]]:
    return commands(page, skipped=True)


def identity(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def pages_with(finder: object) -> list[Path]:
    return [page for page in PAGES if finder(page)]  # type: ignore[operator]


def modules_with_examples() -> list[str]:
    """The modules of the package whose source holds a doctest."""
    sources = sorted(Path(folder) / name for folder, _, names in os.walk(PACKAGE, followlinks=True) for name in names)
    found = [path for path in sources if path.suffix == ".py" and ">>> " in path.read_text(encoding="utf-8")]
    dotted = [".".join(("fxopt", *path.relative_to(PACKAGE).with_suffix("").parts)) for path in found]
    return [name.removesuffix(".__init__") for name in dotted]


@pytest.mark.parametrize("page", pages_with(live_blocks), ids=identity)
def test_python_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace: dict[str, object] = {"__name__": "__main__"}
    with contextlib.redirect_stdout(io.StringIO()):
        for block in live_blocks(page):
            if block.file:
                (tmp_path / block.file).write_text(block.code, encoding="utf-8")
                continue
            code = compile("\n" * block.line + block.code, str(page), "exec", dont_inherit=True)
            exec(code, namespace)
    run_test_classes(namespace)


def run_test_classes(namespace: dict[str, object]) -> None:
    """Run the test classes that a page defines, as pytest would if they stood in a test file."""
    suites = [value for name, value in namespace.items() if name.startswith("Test") and isinstance(value, type)]
    for suite in suites:
        tests = [name for name in dir(suite) if name.startswith("test_")]
        assert tests, f"{suite.__name__} has no tests"
        for test in tests:
            with contextlib.suppress(unittest.SkipTest):
                getattr(suite(), test)()


@pytest.mark.parametrize("name", modules_with_examples())
def test_examples_in_docstrings_run(name: str) -> None:
    outcome = doctest.testmod(importlib.import_module(name), raise_on_error=False)
    assert outcome.attempted > 0
    assert outcome.failed == 0


@pytest.mark.parametrize("page", pages_with(commands), ids=identity)
def test_commands_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for block in live_blocks(page):
        if block.file:
            (tmp_path / block.file).write_text(block.code, encoding="utf-8")
    for words in commands(page):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            code = cli.main(words)
        assert code == 0, f"fxopt {shlex.join(words)}\n{printed.getvalue()}"


@pytest.mark.parametrize("page", pages_with(all_commands), ids=identity)
def test_commands_and_their_options_exist(page: Path) -> None:
    known = options_by_command()
    for words in all_commands(page):
        name = words[0] if words and not words[0].startswith("-") else ""
        assert name in known, f"fxopt {shlex.join(words)}"
        assert set(OPTION.findall(" ".join(words))) <= known[name], f"fxopt {shlex.join(words)}"


def test_the_reference_has_every_option_of_every_command() -> None:
    text = (ROOT / "docs" / "reference" / "cli.md").read_text(encoding="utf-8")
    sections = re.split(r"^## `fxopt ([\w-]+)`$", text, flags=re.MULTILINE)[1:]
    rows = re.compile(r"^\| `(--[a-z-]+)` \|", re.MULTILINE)
    written = {name: set(rows.findall(body)) for name, body in zip(sections[::2], sections[1::2], strict=True)}
    known = options_by_command()
    assert written == {name: known[name] for name in known if name}


def options_by_command() -> dict[str, set[str]]:
    """The long options of every subcommand but ``--help``; those of the command itself under the empty name."""
    command = typer.main.get_command(cli.app)
    found = {"": {option for parameter in command.params for option in parameter.opts}}
    for name, subcommand in command.commands.items():  # type: ignore[attr-defined]
        options = [parameter for parameter in subcommand.params if parameter.param_type_name == "option"]
        found[name] = {option for parameter in options for option in parameter.opts if option.startswith("--")}
    return found


@pytest.mark.parametrize("page", PAGES, ids=identity)
def test_links_lead_somewhere(page: Path) -> None:
    targets = [match["target"].partition("#")[0] for match in LINK.finditer(page.read_text(encoding="utf-8"))]
    local = [target for target in targets if target and "://" not in target]
    missing = [target for target in local if not (page.parent / target).exists()]
    assert not missing


def test_every_benchmark_that_is_named_exists() -> None:
    named = {name for page in PAGES for name in SCRIPT.findall(page.read_text(encoding="utf-8"))}
    assert "benchmarks/trace_zoo.py" in named
    assert [name for name in named if not (ROOT / name).is_file()] == []


def test_every_documented_name_exists() -> None:
    names = [name for page in PAGES for name in IDENTIFIER.findall(page.read_text(encoding="utf-8"))]
    assert names
    for name in names:
        assert resolves(name), f"::: {name}"


def resolves(name: str) -> bool:
    """Whether a dotted name is a module, or an attribute of one."""
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        parent, _, last = name.rpartition(".")
        return bool(parent) and hasattr(importlib.import_module(parent), last)
    return True


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    docs = [page.relative_to(ROOT / "docs").as_posix() for page in PAGES if (ROOT / "docs") in page.parents]
    assert docs
    assert [page for page in docs if page not in navigation] == []


def test_blocks_are_found_and_a_skip_needs_its_reason() -> None:
    first, second, third, fourth = blocks(
        "text\n\n```python\nx = 1\n```\n\n"
        "<!-- skip: needs a phone -->\n```python\ny = 2\n```\n\n"
        "<!-- skip: -->\n```py\n```\n"
        '```toml title="a.toml"\nz = 3\n```\n'
    )
    assert (first.code, first.line, first.skip, first.file) == ("x = 1\n", 3, None, None)
    assert second.skip == "needs a phone"
    assert third.skip is None
    assert (fourth.language, fourth.file) == ("toml", "a.toml")
