"""What is loaded when it is asked for: the public names of a package, and classes that are known by name."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any, Generic, TypeVar, cast

from fxopt.errors import FxoptError, UnknownNameError

__all__ = ["Registry", "check_known", "lazily"]

_Kind = TypeVar("_Kind")


def lazily(
    package: str, places: Mapping[str, str], public: Collection[str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The functions ``__getattr__`` and ``__dir__`` of a package that imports a name on its first use.

    Args:
        package: The package.
        places: The module of each name.
        public: All of the package's public names.
    """

    def find(name: str) -> Any:
        if name not in places:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(places[name]), name)
        setattr(sys.modules[package], name, value)
        return value

    return find, lambda: sorted(public)


def check_known(what: str, name: object, known: Collection[str]) -> None:
    """Pass if something is one of the known names.

    Raises:
        UnknownNameError: If it is not, or no name at all; suggests the nearest.
    """
    if not isinstance(name, str) or name not in known:
        raise UnknownNameError(what, str(name), known)


class Registry(Generic[_Kind]):
    """Classes by name, each imported on its first use.

    Args:
        word: What one is called.
        base: Path of the class that each is a subclass of, ``"package.module:Class"``.
        error: What is raised where a class or an option does not fit.
        known: Paths of the classes that are there from the start.
        shared: Parameters of every class, which are no options.
    """

    def __init__(
        self, word: str, base: str, error: type[FxoptError], known: Mapping[str, str], shared: Collection[str] = ()
    ) -> None:
        self._word = word
        self._base = base
        self._error = error
        self._entries: dict[str, str | type[_Kind]] = dict(known)
        self._shared = frozenset(shared)

    def names(self) -> list[str]:
        """The names, sorted."""
        return sorted(self._entries)

    def check(self, name: str) -> None:
        """Pass if there is such a name.

        Raises:
            UnknownNameError: If there is none; suggests the nearest name.
        """
        check_known(self._word, name, self._entries)

    def load(self, name: str) -> type[_Kind]:
        """The class under ``name``.

        Raises:
            UnknownNameError: If there is none; suggests the nearest name.
            FxoptError: As ``error``, if a registered path leads to no such class.
        """
        self.check(name)
        entry = self._entries[name]
        if not isinstance(entry, str):
            return entry
        named = f"{self._word.capitalize()} {name!r}"
        try:
            found = _at(entry)
        except (ImportError, AttributeError) as failure:
            raise self._error(f"{named} cannot be loaded from {entry!r}: {failure}.") from failure
        if not (isinstance(found, type) and issubclass(found, _at(self._base))):
            raise self._error(f"{named}: {entry!r} is no subclass of {self._base.replace(':', '.')}.")
        return cast("type[_Kind]", found)

    def load_for(self, name: str, options: Collection[str]) -> type[_Kind]:
        """The class under ``name``, which takes all of these options.

        Raises:
            UnknownNameError: If there is none; suggests the nearest name.
            FxoptError: As ``error``, if a registered path leads to no such class or the class has no such option.
        """
        kind = self.load(name)
        known = [parameter for parameter in inspect.signature(kind).parameters if parameter not in self._shared]
        unknown = sorted(set(options) - set(known))
        if unknown:
            raise self._error(
                f"{self._word.capitalize()} {name!r} has no option {unknown[0]!r}; its options are "
                f"{', '.join(known) or 'none'}."
            )
        return kind

    def register(self, name: str, kind: type[_Kind] | str) -> None:
        """Make a class known by name.

        Args:
            name: The name; it must be free.
            kind: The class, or its path ``"package.module:Class"``, which is imported on first use.

        Raises:
            FxoptError: As ``error``, if the name is taken or the path has another form.
        """
        if name in self._entries:
            raise self._error(f"A {self._word} is called {name!r} already; choose another name.")
        if isinstance(kind, str) and not all(kind.partition(":")):
            raise self._error(f"The path of a {self._word} has the form 'package.module:Class', got {kind!r}.")
        self._entries[name] = kind


def _at(path: str) -> Any:
    module, _, attribute = path.partition(":")
    return getattr(importlib.import_module(module), attribute)
