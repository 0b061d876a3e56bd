"""The public names and their signatures, held against ``public_api.txt``, so that none changes unawares.

``python tests/test_public_api.py`` writes the file anew. A name that leaves it, or takes other arguments, goes
the way of the deprecation policy in ``docs/reference/stability.md``.
"""

from __future__ import annotations

import dataclasses
import enum
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

FILE = Path(__file__).with_name("public_api.txt")
MODULES = (
    *("fxopt", "fxopt.api", "fxopt.data", "fxopt.decisions", "fxopt.errors", "fxopt.evaluate", "fxopt.export"),
    *("fxopt.graph", "fxopt.graph.channels", "fxopt.graph.edit", "fxopt.graph.ops", "fxopt.lowering", "fxopt.models"),
    *("fxopt.nas", "fxopt.objectives", "fxopt.passes", "fxopt.progress", "fxopt.report", "fxopt.search"),
    *("fxopt.search.engines", "fxopt.search.gym", "fxopt.search.solver", "fxopt.sensitivity", "fxopt.targets"),
    *("fxopt.targets.host", "fxopt.testing", "fxopt.training"),
)
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
_HINT = "Run `python tests/test_public_api.py` and look at what changed; see docs/reference/stability.md."


def lines() -> Iterator[str]:
    """A line a public name, and one a public member of a public class, sorted within each module."""
    for name in MODULES:
        module = importlib.import_module(name)
        for public in sorted(module.__all__):
            yield from described(f"{name}.{public}", getattr(module, public))


def described(name: str, value: Any) -> Iterator[str]:
    """What can be relied on of a value: its kind and signature, and those of its members if it is a class."""
    if not inspect.isclass(value):
        yield f"{name}{signature(value)}" if inspect.isroutine(value) else f"{name}: {type(value).__name__}"
        return
    yield f"class {name}{signature(value)}"
    if issubclass(value, enum.Enum):
        yield from (f"{name}.{member.name}" for member in value)
        return
    fields = {field.name for field in dataclasses.fields(value)} if dataclasses.is_dataclass(value) else set()
    for member in sorted(vars(value)):
        held = inspect.getattr_static(value, member)
        if member.startswith("_") or member in fields:
            continue
        if isinstance(held, (staticmethod, classmethod)) or inspect.isroutine(held):
            yield f"{name}.{member}{signature(getattr(value, member))}"
        else:
            yield f"{name}.{member}"


def signature(value: Any) -> str:
    """The names, kinds and defaults of arguments; annotations are mypy's to keep."""
    try:
        found = inspect.signature(value)
    except (TypeError, ValueError):
        return "(...)"
    plain = [one.replace(annotation=inspect.Parameter.empty) for one in found.parameters.values()]
    text = str(found.replace(parameters=plain, return_annotation=inspect.Signature.empty))
    return _ADDRESS.sub("", text)


@pytest.fixture(scope="module")
def public() -> list[str]:
    pytest.importorskip("gymnasium")
    return list(lines())


def test_the_public_names_are_those_that_were_agreed_on(public: list[str]) -> None:
    agreed = FILE.read_text(encoding="utf-8").splitlines()
    changes = [f"- {line}" for line in agreed if line not in public]
    changes += [f"+ {line}" for line in public if line not in agreed]
    assert changes == [], _HINT
    assert public == agreed


def test_every_name_of_the_package_itself_is_agreed_on(public: list[str]) -> None:
    import fxopt

    names = {re.split(r"[(:]", line.removeprefix("class "))[0] for line in public}
    assert {f"fxopt.{name}" for name in fxopt.__all__} <= names
    assert all(not part.startswith("_") for name in names for part in name.split(".") if part != "__version__")


def test_every_module_of_the_reference_is_held() -> None:
    pages = (FILE.parent.parent / "docs" / "reference").glob("*.md")
    texts = [page.read_text(encoding="utf-8") for page in pages]
    documented = {name for text in texts for name in re.findall(r"^::: ([\w.]+)", text, re.MULTILINE)}
    assert documented
    assert documented <= set(MODULES)


def test_a_change_of_an_argument_is_seen() -> None:
    def before(model: object, *, budget: object = None) -> None: ...

    def after(model: object, *, budget: object = 1) -> None: ...

    @dataclasses.dataclass(frozen=True)
    class Options:
        width: int = 3

        def double(self) -> int:
            return 2 * self.width

        def _hidden(self) -> None: ...

    assert [*described("f", before)] == ["f(model, *, budget=None)"] != [*described("f", after)]
    assert [*described("Options", Options)] == ["class Options(width=3)", "Options.double(self)"]
    assert [*described("LIMIT", 3)] == ["LIMIT: int"]


if __name__ == "__main__":
    FILE.write_text("\n".join(lines()) + "\n", encoding="utf-8")
