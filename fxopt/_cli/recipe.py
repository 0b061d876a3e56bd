"""The options of ``fxopt optimize``, read from the command line and from a TOML recipe."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fxopt._cli.checking import check_option
from fxopt._cli.options import Options
from fxopt.errors import BudgetError, FxoptError, UnknownNameError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["kind_of", "options_of", "read_recipe"]


_WAYS = ("optimizer", "schedule", "distill", "scales", "objective", "reconstruct")
_TEXT = ("model", "target", "engine", "train", "val", "evaluate", "loss", "out", *_WAYS)
_NUMBERS = {"trials": 1, "epochs": 0, "final_epochs": 0, "trial_epochs": 0, "seed": 0, "patience": 1, "parallel": 1}
_LISTS = ("input", "passes")
_SWITCHES = ("verify_on_host",)
_TABLES = {
    "budget": '{ latency = "60%", size = "2MB" }',
    "shares": "{ select-operators = 0.3, quantize = 0.5 }",
}


def options_of(given: Mapping[str, Any]) -> Options:
    """The options of a command: what its command line says, and where it says nothing its recipe, if it has one.

    Args:
        given: The words of the command line by parameter; those that are no options of ``optimize`` are passed over.

    Raises:
        FxoptError: If the recipe or a word is wrong.
    """
    base = Options() if given.get("recipe") is None else read_recipe(given["recipe"])
    known = {field.name for field in dataclasses.fields(Options)}
    return base.changed(
        {
            name: _FROM_WORDS.get(name, lambda value: value)(value)
            for name, value in given.items()
            if value is not None and name in known
        }
    )


def read_recipe(path: Path) -> Options:
    """The options in a TOML file.

    Raises:
        FxoptError: If the file cannot be read, or an option is unknown, of the wrong kind, out of range or names what
            is not there; tells the line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as failure:
        raise FxoptError(f"Cannot read the recipe {path}: {failure}. Give the path of a TOML file.") from failure
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as failure:
        raise FxoptError(f"The recipe {path} is no TOML: {failure}.") from failure
    known = [field.name for field in dataclasses.fields(Options)]
    options = {}
    for name, value in data.items():
        where = f"recipe {path}, line {_line_of(text, (name,))}"
        if name not in known:
            raise UnknownNameError(f"option ({where})", name, known)
        options[name] = _checked(name, value, where)
        if name not in _TABLES:
            _check_alone(name, options[name], where)
            continue
        for key, entry in value.items():
            place = f"recipe {path}, line {_line_of(text, (name, key))}"
            plain = isinstance(entry, (str, int, float)) and not isinstance(entry, bool)
            _expect(plain, entry, f"{name}.{key}", "a text in quotes or a number", place)
            _check_alone(name, {key: entry}, place)
    return Options().changed(options)


def kind_of(name: str) -> str:
    """What an option in a recipe has to be, in words."""
    if name in _NUMBERS:
        return f"a whole number of at least {_NUMBERS[name]}"
    if name in _TABLES:
        return f"a table, such as {_TABLES[name]}"
    if name in _LISTS:
        return 'a list of texts, such as ["a", "b"]'
    if name in _SWITCHES:
        return "true or false"
    return "a number above zero" if name == "learning_rate" else "a text in quotes"


def _check_alone(name: str, value: Any, where: str) -> None:
    """Refuse a value that no other option can make right, and say where it stands."""
    try:
        check_option(name, Options().changed({name: value}))
    except FxoptError as failure:
        raise FxoptError(f"In the {where}: {failure}") from failure


def parse_budgets(texts: Sequence[str]) -> dict[str, str | float]:
    """Limits by metric from ``metric=limit`` texts.

    Raises:
        BudgetError: If a text has another form, or a metric is given twice.
    """
    return _parted(texts, "Budget", "limit", "metric=limit, such as latency=60% or size=2MB")


def parse_shares(texts: Sequence[str]) -> dict[str, str | float]:
    """Shares by pass from ``pass=share`` texts.

    Raises:
        BudgetError: If a text has another form, or a pass is given twice.
    """
    return _parted(texts, "Share", "number", "pass=part, such as quantize=50%")


def _parted(texts: Sequence[str], what: str, lacks: str, form: str) -> dict[str, str | float]:
    found: dict[str, str | float] = {}
    for text in texts:
        name, sign, value = (part.strip() for part in text.partition("="))
        if not sign or not name or not value:
            raise BudgetError(f"{what} {text!r} has no {lacks}; write {form}.")
        if name in found:
            raise BudgetError(f"The {what.lower()} for {name} is given twice, as {found[name]} and {value}; give one.")
        found[name] = value
    return found


def split_passes(text: str) -> tuple[str, ...]:
    """Names of passes from ``a,b``."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _checked(name: str, value: Any, where: str) -> Any:
    if name in _LISTS and isinstance(value, str):
        return split_passes(value) if name == "passes" else (value,)
    _expect(_fits(name, value), value, name, kind_of(name), where)
    return tuple(value) if name in _LISTS else value


def _fits(name: str, value: Any) -> bool:
    if name in _TABLES:
        return isinstance(value, dict)
    if name in _LISTS:
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    if name in _TEXT:
        return isinstance(value, str) and bool(value)
    if isinstance(value, bool) or name in _SWITCHES:
        return isinstance(value, bool) and name in _SWITCHES
    if name in _NUMBERS:
        return isinstance(value, int) and value >= _NUMBERS[name]
    return isinstance(value, (int, float)) and 0 < value < math.inf


def _expect(fits: bool, value: Any, name: str, wanted: str, where: str) -> None:
    if not fits:
        raise FxoptError(f"{name} = {value!r} ({where}) has to be {wanted}.")


def _line_of(text: str, path: Sequence[str]) -> int:
    """The line, counted from 1, on which a key, or the header of a table, stands in a TOML text.

    A prefix of the text is TOML itself unless it ends within a value, so the key stands behind the longest one that is
    and does not have it.
    """
    lines, last = text.splitlines(keepends=True), 0
    for count in range(1, len(lines) + 1):
        try:
            found: Any = tomllib.loads("".join(lines[:count]))
        except tomllib.TOMLDecodeError:
            continue
        for key in path:
            found = found.get(key) if isinstance(found, dict) else None
        if found is not None:
            break
        last = count
    return last + 1


_FROM_WORDS: dict[str, Callable[[Any], Any]] = {
    "budget": parse_budgets,
    "shares": parse_shares,
    "passes": split_passes,
    "input": tuple,
    "out": str,
}
